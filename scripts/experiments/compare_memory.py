"""Does the memory pay? EngramMoE against two controls: the same rows, steps, optimizer and seeds for all three.

    python scripts/compare_memory.py        about 20 minutes on 2 cores, downloads nothing

* EngramMoE, as train_tiny.py trains it;
* the mixture of experts without memory at equal parameters: further routed experts instead of the tables (total), a
  wider dense layer instead of the memory's projections (active);
* EngramMoE whose tables are zero and stay zero: what is left where nothing can be remembered.

Each run is printed as it ends; the last lines are a Markdown table, with what it takes to run it again.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from gather_text import DATASET_HELP
from tiny_recipe import (
    PRESETS,
    ROWS_PER_STEP,
    SEQ_LENGTH,
    STEPS,
    held_out_loss,
    make_config,
    make_model,
    make_trainer,
    prepare_text,
)

from engram_hf import EngramMoEConfig
from engram_hf.planning import count_parameters


ENGRAM, MOE, ZERO_TABLES = "EngramMoE", "MoE, equal parameters", "EngramMoE, tables of zeros"


def without_memory(preset: str, tokenizer) -> EngramMoEConfig:
    """The mixture of experts with as many parameters, total and active, as whole experts and channels allow."""
    engram = make_config(preset, tokenizer)
    wanted = count_parameters(engram)
    expert_layers = engram.num_hidden_layers - engram.first_k_dense_replace
    # Of an expert: three matrices and its row of the router.
    parameters_of_expert = engram.hidden_size * (3 * engram.moe_intermediate_size + 1)
    n_routed_experts = engram.n_routed_experts + round(wanted.tables / (expert_layers * parameters_of_expert))
    fields = {"engram_layer_ids": [], "n_routed_experts": n_routed_experts}
    missing = wanted.active - count_parameters(make_config(preset, tokenizer, **fields)).active
    width = engram.intermediate_size + round(missing / (3 * engram.hidden_size * engram.first_k_dense_replace))
    return make_config(preset, tokenizer, **fields, intermediate_size=width)


def freeze_at_zero(model) -> None:
    for table in model.base_model.tables():
        for block in table.blocks:
            torch.nn.init.zeros_(block).requires_grad_(False)


def git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def print_table(configs: dict[str, EngramMoEConfig], losses: dict[str, list[float]]) -> None:
    print("\n| model | parameters: total | active | in tables | held-out loss, mean | lowest to highest | to the MoE |")
    print("|---|---|---|---|---|---|---|")
    for name, config in configs.items():
        count = count_parameters(config)
        difference = statistics.mean(losses[name]) - statistics.mean(losses[MOE])
        print(
            f"| {name} | {count.total:,} | {count.active:,} | {count.tables:,} | {statistics.mean(losses[name]):.4f} "
            f"| {min(losses[name]):.4f} to {max(losses[name]):.4f} | {difference:+.4f} |"
        )


def main():
    parser = argparse.ArgumentParser(description="Compare EngramMoE with and without a memory at equal parameters.")
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="size of the models (default: tiny)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each run (default: {STEPS})")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each per model (default: 0 1 2)"
    )
    arguments = parser.parse_args()
    steps = arguments.steps or STEPS[arguments.preset]

    # Of the start: files and commit may change while it runs.
    made_with = (
        f"commit {git_commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} "
        f"cores, {datetime.date.today()}"
    )

    tokenizer, train, held_out = prepare_text(arguments.dataset, arguments.preset)
    engram = make_config(arguments.preset, tokenizer)
    configs = {ENGRAM: engram, MOE: without_memory(arguments.preset, tokenizer), ZERO_TABLES: engram}
    wanted, control = count_parameters(engram), count_parameters(configs[MOE])
    print(
        f"The MoE has {configs[MOE].n_routed_experts} routed experts instead of {engram.n_routed_experts}: against "
        f"EngramMoE {control.total / wanted.total - 1:+.2%} total and {control.active / wanted.active - 1:+.2%} active "
        "parameters.",
        flush=True,
    )
    losses: dict[str, list[float]] = {name: [] for name in configs}
    # Seed by seed, so that a run that is cut off has compared all models.
    for seed in arguments.seeds:
        for name in configs:
            model = make_model(configs[name], tokenizer, seed)
            if name == ZERO_TABLES:
                freeze_at_zero(model)
            trainer = make_trainer(model, train, held_out, Path("output/compare"), steps, seed)
            seconds = trainer.train().metrics["train_runtime"]
            losses[name].append(held_out_loss(trainer))
            print(f"seed {seed}, {name}: held-out loss {losses[name][-1]:.4f} after {seconds:.0f} s", flush=True)

    print_table(configs, losses)
    print(
        f"\n`python {' '.join(sys.argv)}`: {steps} steps of {ROWS_PER_STEP * SEQ_LENGTH} tokens, seeds "
        f"{arguments.seeds}, {made_with}. Loss in nats per token of held-out documents."
    )


if __name__ == "__main__":
    main()

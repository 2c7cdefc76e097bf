"""Does the memory pay? EngramMoE against two controls with the same text, steps, optimizer and seeds.

    python scripts/experiments/compare_memory.py        about 20 minutes on 2 cores, downloads nothing

All three are trained as train_tiny.py trains its model. Losses are nats per token of held-out documents.

* EngramMoE.
* A mixture of experts without memory at equal parameters. Further routed experts replace the tables (total
  parameters), and a wider dense layer replaces the memory's projections (active parameters).
* EngramMoE whose tables are zero and stay zero, so that nothing can be remembered.

Each run is printed as it ends. All figures go to scripts/benchmarks/results/compare_memory.json.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument
from helpers.text import DATASET_HELP
from helpers.tiny_recipe import (
    PRESETS,
    STEPS,
    freeze_tables,
    held_out_loss,
    make_config,
    make_model,
    make_trainer,
    prepare_text,
    without_memory,
)

from engram_hf import EngramMoEConfig
from engram_hf.planning import count_parameters


ENGRAM, MOE, ZERO_TABLES = "EngramMoE", "MoE, equal parameters", "EngramMoE, tables of zeros"


def table_of(configs: dict[str, EngramMoEConfig], losses: dict[str, list[float]]) -> Table:
    rows = []
    for name, config in configs.items():
        count, own = count_parameters(config), losses[name]
        difference = statistics.mean(own) - statistics.mean(losses[MOE])
        spread = f"{min(own):.4f} to {max(own):.4f}"
        rows.append([name, count.total, count.active, count.tables, statistics.mean(own), spread, difference])
    columns = {
        "model": "",
        "parameters": ",",
        "active": ",",
        "in tables": ",",
        "held-out loss, mean of seeds": ".4f",
        "lowest to highest": "",
        "difference to the MoE": "+.4f",
    }
    return Table(columns, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="size of the models (default: tiny)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each run (default: {STEPS})")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each per model (default: 0 1 2)"
    )
    add_results_argument(parser)
    arguments = parser.parse_args()
    steps = arguments.steps or STEPS[arguments.preset]
    results = Results("EngramMoE against a mixture of experts of equal size", about(__doc__).rsplit("\n\n", 1)[0])

    tokenizer, train, held_out = prepare_text(arguments.dataset, arguments.preset)
    engram = make_config(arguments.preset, tokenizer)
    configs = {
        ENGRAM: engram,
        MOE: without_memory(partial(make_config, arguments.preset, tokenizer)),
        ZERO_TABLES: engram,
    }
    wanted, control = count_parameters(engram), count_parameters(configs[MOE])
    print(
        f"The MoE has {configs[MOE].n_routed_experts} routed experts instead of {engram.n_routed_experts}: against "
        f"EngramMoE {control.total / wanted.total - 1:+.2%} total and {control.active / wanted.active - 1:+.2%} active "
        "parameters.",
        flush=True,
    )
    losses: dict[str, list[float]] = {name: [] for name in configs}
    # Seed by seed, so that a run that is stopped has compared all models.
    for seed in arguments.seeds:
        for name in configs:
            model = make_model(configs[name], tokenizer, seed)
            if name == ZERO_TABLES:
                freeze_tables(model, at_zero=True)
            trainer = make_trainer(model, train, held_out, Path("output/compare"), steps, seed)
            seconds = trainer.train().metrics["train_runtime"]
            losses[name].append(held_out_loss(trainer))
            print(f"seed {seed}, {name}: held-out loss {losses[name][-1]:.4f} after {seconds:.0f} s", flush=True)

    results.tables = [table_of(configs, losses)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

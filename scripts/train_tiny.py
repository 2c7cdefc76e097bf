"""The demo: a small EngramMoE from nothing to generated text, trained with the stock Trainer on two CPU cores.

    python scripts/train_tiny.py        about 2 minutes on 2 cores, downloads nothing

Where other programs keep the cores busy, set OMP_NUM_THREADS=1: two threads that wait for a core are slower than one.

Trains a tokenizer and a model, saves both, loads them again through the Auto classes, and shows what the memory does:
the loss with and without it, how far its gates open, and for which n-grams they open widest.
"""

import argparse
import copy
import importlib.util
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from gather_text import DATASET_HELP
from tiny_recipe import (
    PRESETS,
    ROWS_PER_STEP,
    STEPS,
    held_out_loss,
    make_config,
    make_model,
    make_trainer,
    prepare_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

# Importing engram_hf is also what makes the Auto classes know the model.
from engram_hf import plot_training
from engram_hf.planning import count_parameters


PROMPT = "def __init__(self"


@contextmanager
def stage(name: str, seconds_of_stage: dict[str, float]):
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds_of_stage[name] = time.perf_counter() - start


def silence_memory(model):
    """A copy whose memory reads its rows as before and adds nothing: the projection of the values is zero."""
    silent = copy.deepcopy(model)
    for layer in silent.base_model.memory_layers():
        torch.nn.init.zeros_(layer.engram.value_proj.weight)
    return silent


@torch.no_grad()
def read_gates(model, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, (rows, seq), and the gate of each token, averaged over streams, (memory layers, rows, seq)."""
    ids, gates = [], []
    for batch in rows.with_format("torch", ["input_ids"]).iter(ROWS_PER_STEP):
        ids.append(batch["input_ids"].to(model.device))
        outputs = model(input_ids=ids[-1], output_engram_gates=True, use_cache=False)
        gates.append(torch.stack(outputs.engram_gates).mean(-1))
    return torch.cat(ids), torch.cat(gates, dim=1)


def strongest_ngrams(ids: torch.Tensor, gates: torch.Tensor, token_map: torch.Tensor, count: int = 8):
    """The 3-grams, one per last token and seen a few times, whose gates open widest: pairs of ids and mean gate.

    Args:
        ids: (rows, seq).
        gates: (rows, seq).
        token_map: (vocab_size,) compressed ids; n-grams that are one for the memory count as one here.
    """
    ngrams = ids.unfold(1, 3, 1).flatten(0, 1)  # (positions, 3)
    distinct, which, seen = token_map[ngrams].unique(dim=0, return_inverse=True, return_counts=True)
    mean_gates = torch.zeros(len(seen), device=gates.device).index_add(0, which, gates[:, 2:].flatten()) / seen
    strongest = {}
    for index in mean_gates.masked_fill(seen < 4, 0.0).argsort(descending=True):
        last_token = int(distinct[index, -1])
        if last_token not in strongest:
            strongest[last_token] = ngrams[(which == index).nonzero()[0, 0]].tolist(), float(mean_gates[index])
        if len(strongest) == count:
            break
    return list(strongest.values())


def main():
    parser = argparse.ArgumentParser(description="Train a small EngramMoE and show what its memory does.")
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="4 or 21 million parameters (default: tiny)")
    parser.add_argument("--output", type=Path, help="folder for model and tokenizer (default: output/PRESET)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the rows (default: 0)")
    arguments = parser.parse_args()
    output = arguments.output or Path("output") / arguments.preset
    steps = arguments.steps or STEPS[arguments.preset]
    seconds_of_stage: dict[str, float] = {}

    with stage("Text and tokenizer", seconds_of_stage):
        tokenizer, train, held_out = prepare_text(arguments.dataset, arguments.preset)

    with stage("Model and its loss before training", seconds_of_stage):
        config = make_config(arguments.preset, tokenizer)
        model = make_model(config, tokenizer, arguments.seed)
        parameters = count_parameters(config)
        print(
            f"{parameters.total:,} parameters, {parameters.active:,} active; {parameters.tables:,} in tables, "
            f"{parameters.memory_share:.1%} of the sparse budget"
        )
        trainer = make_trainer(model, train, held_out, output, steps, arguments.seed, tokenizer)
        before = held_out_loss(trainer)

    with stage("Training", seconds_of_stage):
        trainer.train()

    with stage("Save, and load again", seconds_of_stage):
        trainer.save_model()
        trainer.save_state()
        tokenizer.save_pretrained(output)
        tokenizer = AutoTokenizer.from_pretrained(output)
        model = AutoModelForCausalLM.from_pretrained(output).to(trainer.args.device)

    with stage("What the memory does", seconds_of_stage):
        after = held_out_loss(trainer, model)
        silenced = held_out_loss(trainer, silence_memory(model))
        ids, gates = read_gates(model, held_out)

    with stage(f"How the model goes on after {PROMPT!r}", seconds_of_stage):
        set_seed(arguments.seed)
        prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
        generated = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.7)
        print(tokenizer.decode(generated[0], skip_special_tokens=True))

    print(f"\nids that token compression merges away   {1 - config.engram_compressed_vocab_size / len(tokenizer):.1%}")
    print(f"held-out loss before training            {before:.3f}")
    print(f"held-out loss after training             {after:.3f}")
    print(f"the same with the memory silenced        {silenced:.3f}   (value projections set to zero)")
    for layer_id, layer_gates in zip(config.engram_layer_ids, gates):
        print(f"mean gate of layer {layer_id}                     {layer_gates.mean():.3f}   opens widest after:")
        for ngram, gate in strongest_ngrams(ids, layer_gates, model.model.token_map):
            print(f"{gate:12.3f}  {tokenizer.decode(ngram)!r}")
    last = next(line for line in reversed(trainer.state.log_history) if "loss" in line)
    for layer_id in config.engram_layer_ids:
        print(
            f"rows of layer {layer_id}: {last[f'engram/rows_touched/layer_{layer_id}']:.1%} touched, "
            f"{last[f'engram/ngrams_per_row/layer_{layer_id}']:.2f} n-grams per row "
            f"(a perfect hash: {last[f'engram/ngrams_per_row_perfect_hash/layer_{layer_id}']:.2f}), "
            f"memory is {last[f'engram/memory_share/layer_{layer_id}']:.1%} of the residual stream there"
        )
    if importlib.util.find_spec("matplotlib"):
        print(f"curves in {plot_training(output)}")
    print("\nseconds: " + ", ".join(f"{name.lower()} {seconds:.0f}" for name, seconds in seconds_of_stage.items()))
    print(f"saved in {output}, {sum(seconds_of_stage.values()):.0f} seconds in all")


if __name__ == "__main__":
    main()

"""The demo: a small EngramMoE from nothing to generated text, trained with the stock Trainer on two CPU cores.

    python scripts/train_tiny.py        about 2 minutes on 2 cores, downloads nothing

Where other programs keep the cores busy, set OMP_NUM_THREADS=1: two threads that wait for a core are slower than one.

Trains a tokenizer and a model, saves both, loads them again through the Auto classes, and shows what the memory does:
the loss with and without it, how far its gates open, and for which n-grams they open widest. Leaves curves and a card.
"""

import argparse
import importlib.util
import platform
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset
from gather_text import DATASET_HELP
from memory_probes import read_gates, silence_memory, strongest_ngrams
from tiny_recipe import (
    PRESETS,
    SEQ_LENGTH,
    STEPS,
    held_out_loss,
    make_config,
    make_model,
    make_trainer,
    prepare_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

# Importing engram_hf is also what makes the Auto classes know the model.
from engram_hf import count_parameters, gather_facts, plot_training, update_card


PROMPT = "def __init__(self"


@contextmanager
def stage(name: str, seconds_of_stage: dict[str, float]):
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds_of_stage[name] = time.perf_counter() - start


def write_card(output: Path, arguments, train: Dataset, losses: dict[str, float]) -> None:
    """README.md of the folder, with what is known here: the text, the run, the losses of held-out documents."""
    is_default = arguments.dataset is None
    text = f"sources of the standard library of Python {platform.python_version()}, and the topics of its `help()`"
    command = shlex.join(["python", "scripts/train_tiny.py", *sys.argv[1:]])
    has_curves = importlib.util.find_spec("matplotlib") is not None
    facts = gather_facts(
        output,
        name=f"engram-{arguments.preset}",
        training=output,
        data={"description": text if is_default else arguments.dataset, "tokens": len(train) * SEQ_LENGTH},
        evaluation=[
            {
                "metric": name,
                "value": value,
                "dataset": "held-out documents",
                "unit": "nats per token",
                "command": command,
            }
            for name, value in losses.items()
        ],
        picture=plot_training(output).name if has_curves else None,
        # Of a text that the user brings, the user knows what it allows and what it is good for.
        license="apache-2.0" if is_default else None,
        limits=["A few minutes of training on source code: its text is not to be relied on."] if is_default else None,
    )
    update_card(output, facts)


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
    # Not every line of the log has every figure.
    last = {name: value for line in trainer.state.log_history for name, value in line.items()}
    for layer_id in config.engram_layer_ids:
        print(
            f"rows of layer {layer_id}: {last[f'engram/rows_touched/layer_{layer_id}']:.1%} touched, "
            f"{last[f'engram/ngrams_per_row/layer_{layer_id}']:.2f} n-grams per row "
            f"(a perfect hash: {last[f'engram/ngrams_per_row_perfect_hash/layer_{layer_id}']:.2f}), "
            f"memory is {last[f'engram/memory_share/layer_{layer_id}']:.1%} of the residual stream there"
        )
    write_card(output, arguments, train, {"loss": after, "loss with the memory silenced": silenced})
    print("\nseconds: " + ", ".join(f"{name.lower()} {seconds:.0f}" for name, seconds in seconds_of_stage.items()))
    print(f"saved in {output}, with a card, {sum(seconds_of_stage.values()):.0f} seconds in all")


if __name__ == "__main__":
    main()

"""The demo: train a small EngramMoE from nothing with the stock Trainer, and show what its memory does.

    python scripts/train_tiny.py        about 2 minutes on 2 cores, downloads nothing

It trains a tokenizer and a model, saves both, and loads them again through the Auto classes. Then it shows the loss
with and without the memory, how far the gates open, and which n-grams open them widest. The folder also gets curves and
a model card.
"""

import argparse
import importlib.util
import os
import platform
import shlex
import sys
from pathlib import Path

from datasets import Dataset
from helpers.console import choose_threads, stage
from helpers.folders import refuse_used
from helpers.memory_probes import probe, silence_memory, strongest_ngrams
from helpers.text import DATASET_HELP
from helpers.tiny_recipe import (
    PRESETS,
    SEQ_LENGTH,
    STEPS,
    held_out_documents,
    make_config,
    make_model,
    make_trainer,
    prepare_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

# Importing engram_hf is also what makes the Auto classes know the model.
from engram_hf import count_parameters, gather_facts, plot_training, read_facts, update_card
from engram_hf.insight import ablate, show, trace
from engram_hf.insight.ablation import Ablation
from engram_hf.insight.pictures import find_browser


COMMAND = "python scripts/train_tiny.py"
PROMPT = "def __init__(self"
# What the picture of the gates shows, and how much of a held-out document if the text is the user's.
SHOWN = '''class Reader:
    """Reads the lines of a file."""

    def __init__(self, path, encoding="utf-8"):
        self.path = os.path.join(path)
        self.encoding = encoding

    def __iter__(self):
        with open(self.path, encoding=self.encoding) as file:
            for number, line in enumerate(file):
                if not line.startswith("#"):
                    yield number, line.rstrip("\\n")
'''
SHOWN_TOKENS = 80
# Enough for two digits of the loss; every pass over them takes about two seconds.
HELD_OUT_ROWS = 128


def draw_gates(model, tokenizer, text: str, output: Path) -> str | None:
    """Draw a text with the gates of the memory, as a page and as a picture. Returns the picture's name; None where
    neither a browser nor matplotlib can draw it."""
    view = show(trace(model, tokenizer, text), title="What the memory of this model does to a text")
    view.save(output / "gates.html")
    if find_browser() is None and importlib.util.find_spec("matplotlib") is None:
        return None
    return view.save(output / "gates.png").name


def write_card(
    output: Path, arguments, train: Dataset, losses: dict[str, float], worth: Ablation, gates: str | None
) -> None:
    """Write README.md of the folder: the text, the run, the losses of held-out documents, what the memory does."""
    is_default = arguments.dataset is None
    text = f"sources of the standard library of Python {platform.python_version()}, and the topics of its `help()`"
    command = f"{COMMAND} {shlex.join(sys.argv[1:])}".strip()
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
        ablation=worth,
        picture=plot_training(output).name if has_curves else None,
        gates=gates,
        # Only the user knows the license of the user's own text.
        license="apache-2.0" if is_default else None,
        limits=["A few minutes of training on source code: its text is not to be relied on."] if is_default else None,
    )
    update_card(output, facts)


def refuse_folder(output: Path) -> None:
    """Raise unless the folder is free, or holds a demo that this script can make again.

    Raises:
        ValueError: names what would be lost.
    """
    go_on = "name another folder with --output, or remove this one"
    if any(output.glob("checkpoint-*")) or not (output / "config.json").exists():
        return refuse_used(output, go_on)
    facts = read_facts(output)
    commands = {figure["command"] for figure in facts.evaluation} if facts is not None else set()
    is_demo = any(command and command.startswith(COMMAND) for command in commands)
    if not is_demo or any("--dataset" in command for command in commands if command):
        raise ValueError(f"{output} holds a model that is not the demo's; {go_on}.")
    print(f"{output} holds the model of an earlier demo. This run replaces it when it has trained its own.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="4 or 21 million parameters (default: tiny)")
    parser.add_argument("--output", type=Path, help="folder for model and tokenizer (default: output/PRESET)")
    steps = ", ".join(f"{count} for {preset}" for preset, count in STEPS.items())
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {steps})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the text (default: 0)")
    arguments = parser.parse_args()
    arguments.output = arguments.output or Path("output") / arguments.preset
    arguments.steps = STEPS[arguments.preset] if arguments.steps is None else arguments.steps
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    seconds_of_stage: dict[str, float] = {}

    with stage("Text and tokenizer", seconds_of_stage):
        try:
            tokenizer, train, held_out = prepare_text(arguments.dataset, arguments.preset)
        except (ValueError, OSError) as error:
            raise SystemExit(f"--dataset: {error}") from error
        held_out = held_out.select(range(min(len(held_out), HELD_OUT_ROWS)))

    with stage("Model and its loss before training", seconds_of_stage):
        config = make_config(arguments.preset, tokenizer)
        model = make_model(config, tokenizer, arguments.seed)
        parameters = count_parameters(config)
        print(
            f"{parameters.total:,} parameters, {parameters.active:,} active; {parameters.tables:,} in tables, "
            f"{parameters.memory_share:.1%} of the sparse budget"
        )
        trainer = make_trainer(model, train, held_out, output, arguments.steps, arguments.seed, tokenizer)
        before, _ = probe(model, held_out)

    with stage("Training", seconds_of_stage):
        trainer.train()

    with stage("Save, and load again", seconds_of_stage):
        trainer.save_model()
        trainer.save_state()
        tokenizer.save_pretrained(output)
        tokenizer = AutoTokenizer.from_pretrained(output)
        model = AutoModelForCausalLM.from_pretrained(output).to(trainer.args.device)

    with stage("What the memory does", seconds_of_stage):
        after, gates = probe(model, held_out)
        silenced, _ = probe(silence_memory(model), held_out)
        worth = ablate(model, held_out_documents(arguments.dataset), ["memory", "order"], tokenizer=tokenizer)
        own_text = tokenizer.decode(held_out[0]["input_ids"][:SHOWN_TOKENS])
        drawn = draw_gates(model, tokenizer, SHOWN if arguments.dataset is None else own_text, output)

    with stage(f"How the model goes on after {PROMPT!r}", seconds_of_stage):
        set_seed(arguments.seed)
        prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
        generated = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.7)
        print(tokenizer.decode(generated[0], skip_special_tokens=True))

    print(f"\nids that token compression merges away   {1 - config.engram_compressed_vocab_size / len(tokenizer):.1%}")
    print(f"held-out loss before training            {before:.3f}")
    print(f"held-out loss after training             {after:.3f}")
    print(f"the same with the memory silenced        {silenced:.3f}   (value projections set to zero)")
    for part in worth.parts:
        between = "" if part.low is None else f"   ({part.low:+.3f} to {part.high:+.3f} over documents)"
        print(f"{'it rises without ' + part.part + ' by':<41}{part.worth:.3f}{between}")
    ids = held_out.with_format("torch")["input_ids"][:].to(model.device)
    for layer_id, layer_gates in zip(config.engram_layer_ids, gates):
        print(f"mean gate of layer {layer_id}                     {layer_gates.mean():.3f}   opens widest after:")
        for ngram, gate in strongest_ngrams(ids, layer_gates, model.model.ngram_hash.token_map):
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
    write_card(output, arguments, train, {"loss": after, "loss with the memory silenced": silenced}, worth, drawn)
    print("\nseconds: " + ", ".join(f"{name.lower()} {seconds:.0f}" for name, seconds in seconds_of_stage.items()))
    print(f"saved in {output}, {sum(seconds_of_stage.values()):.0f} seconds in all")
    print(f"curves, gates, and what the memory is worth: {output / 'README.md'}")
    print(f"a text coloured by the gates: {output / 'gates.html'}" + f", {output / 'gates.png'}" * (drawn is not None))


def main() -> None:
    arguments = parse_arguments()
    threads = choose_threads()
    try:
        refuse_folder(arguments.output)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"{threads} of {os.cpu_count()} cores (OMP_NUM_THREADS sets another number)")
    try:
        run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped. {arguments.output} has nothing new, unless training had ended.") from None


if __name__ == "__main__":
    main()

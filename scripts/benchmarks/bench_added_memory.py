"""What an added memory costs a pretrained model: generation and training steps, without it and with it on every tier.

    python scripts/benchmarks/bench_added_memory.py       about five minutes on 2 cores, 5 GB of RAM

SmolLM2-135M-Instruct has a memory in its layers 1 and 14, drawn at random, so that it changes what is generated. On all
tiers the logits, the generated tokens and the losses must be the same, otherwise no figure is shown. Logits and tokens
are compared before anything is timed.

Every way runs in a process of its own, and they take turns. Generation is greedy, 32 tokens after a prompt of 32. A
training step has 2 rows of 128 tokens of docstrings. Either the base learns too, with AdamW, which a model without a
memory does as well, or it is frozen. Times are medians over turns (generation) and steps (training, without the first
turn and the first step of each turn). All tables lie in the page cache: bench_tiers.py reads cold ones.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.added_recipe import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    LEARNING_RATE,
    fastest_dtype,
    load_base,
    load_tokenizer,
    prepare_text,
)
from helpers.recipe import make_arguments, row_trainer
from helpers.results import Results, Table, about, add_results_argument
from helpers.smollm import fetch_smollm
from helpers.timed_training import TURN, Watch
from helpers.turns import run_in_turns, wait_for_turn

from engram_hf import EngramConfig, add_engram, freeze_backbone, load_engram, save_engram
from engram_hf.adapters.memory_class import decoder_of
from engram_hf.adapters.memory_hooks import memory_layers_of


NONE, RESIDENT, HOST, DISK = "without a memory", "resident", "host", "disk"
TIERS = {RESIDENT: None, HOST: {"...table": "cpu"}, DISK: {"...table": "disk"}}
BOTH, FROZEN = "the base learns too", "the base is frozen"
# 102 million numbers in two tables: 410 MB in float32.
ROWS_OF_HEAD = 200_000
PROMPT_TOKENS = NEW_TOKENS = 32
BATCHES = (1, 8)
ROUNDS = 4
ROWS_PER_STEP = 2
STEPS = 4 * TURN
ROWS_FILE, MEMORY = "rows.pt", "memory"


def build(source: Path, folder: Path, rows_of_head: int) -> None:
    """A memory of which every weight matters, and rows of text."""
    tokenizer = load_tokenizer(source)
    set_seed(0)
    model = load_base(source, torch.float32)
    fields = {"layer_ids": LAYERS, "vocab_size": rows_of_head, "n_heads": HEADS, "head_dim": HEAD_DIM}
    add_engram(model, EngramConfig(**fields, start="random"), tokenizer)
    for layer in memory_layers_of(decoder_of(model)):
        # It starts at zero, which would hide differences between tiers.
        torch.nn.init.normal_(layer.conv.weight, std=0.1)
    save_engram(model, folder / MEMORY)
    train, _ = prepare_text(tokenizer, None)
    torch.save(torch.tensor(train[: STEPS * ROWS_PER_STEP]["input_ids"]), folder / ROWS_FILE)
    # Otherwise the kernel writes it to the disk while something is timed.
    os.sync()


def load(source: str | Path, folder: Path, way: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_base(source, dtype)
    if way == NONE:
        return model
    load_engram(model, folder / MEMORY, device_map=TIERS[way])
    if way == RESIDENT:
        # Mapped from the file, a page would be copied when a step first writes to it.
        for layer in memory_layers_of(decoder_of(model)):
            for block in layer.table.blocks:
                block.data = block.data.clone()
    return model


def generated(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths)


@torch.no_grad()
def check(source: str | Path, folder: Path, dtype: torch.dtype) -> None:
    """
    Raises:
        RuntimeError: tiers differ, or the memory changes nothing.
    """
    ids = torch.load(folder / ROWS_FILE)[: max(BATCHES)]
    found = {}
    for way in (NONE, *TIERS):
        model = load(source, folder, way, dtype)
        found[way] = model(ids).logits, generated(model, ids[:, :PROMPT_TOKENS])
    for way in TIERS:
        if not all(map(torch.equal, found[way], found[RESIDENT])):
            raise RuntimeError(f"A memory on the tier {way} gives other logits or tokens than a resident one.")
    if any(map(torch.equal, found[NONE], found[RESIDENT])):
        raise RuntimeError("The memory does not change what is generated, so tiers cannot be told apart.")
    print("ok  all tiers give the same logits and tokens", flush=True)


def measure(source: str, folder: Path, way: str, what: str, threads: str, dtype: str) -> None:
    """In a process of its own: print seconds of each generation by batch, milliseconds of steps, and losses."""
    torch.set_num_threads(int(threads))
    set_seed(0)
    model, ids = load(source, folder, way, getattr(torch, dtype)), torch.load(folder / ROWS_FILE)
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for turn in range(ROUNDS + 1 if what == BOTH else 0):
        wait_for_turn()
        for batch in BATCHES:
            start = time.perf_counter()
            generated(model, ids[turn : turn + batch, :PROMPT_TOKENS])
            # In the first turn nothing is in the caches.
            if turn > 0:
                seconds[batch].append(time.perf_counter() - start)
    if what == FROZEN:
        freeze_backbone(model)
    watch, work = Watch(is_cold=False), folder / f"work-{way}-{len(what)}"
    arguments = make_arguments(work / "run", STEPS, 0, ROWS_PER_STEP, LEARNING_RATE)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = row_trainer(model.train(), arguments, rows, work_folder=work, callbacks=[watch])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps([seconds, watch.milliseconds, losses]))


def run(ways: tuple[str, ...], what: str, source: Path, folder: Path, threads: int, dtype: str) -> dict[str, list]:
    """Way to what `measure` prints.

    Raises:
        RuntimeError: tiers train to other losses.
    """
    given = (str(threads), dtype)
    commands = {
        way: [sys.executable, __file__, "--measure", str(source), str(folder), way, what, *given] for way in ways
    }
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    found = {way: json.loads(line) for way, line in run_in_turns(commands, environment).items()}
    if any(found[way][2] != found[RESIDENT][2] for way in TIERS):
        raise RuntimeError(f"Tiers train to other losses ({what}); nothing is shown.")
    return found


def table_of_generation(found: dict[str, list]) -> Table:
    columns, rows = {"memory": ""}, []
    for batch in BATCHES:
        columns |= {f"tokens/s, {batch} at once": ",.1f", f"time to none, {batch} at once": ".3f"}
    for way, (seconds, _, _) in found.items():
        row = [way]
        for batch in map(str, BATCHES):
            ratios = [a / b for a, b in zip(seconds[batch], found[NONE][0][batch], strict=True)]
            row += [int(batch) * NEW_TOKENS / statistics.median(seconds[batch]), statistics.median(ratios)]
        rows.append(row)
    return Table(columns, rows, "Generation", "Ratios are medians of the ratios of each turn.")


def table_of_training(found: dict[str, dict[str, list]]) -> Table:
    columns = {"what learns": "", "memory": "", "ms a step": ",.0f", "time to none": ".3f", "time to resident": ".3f"}
    rows = []
    for what, ways in found.items():
        middle = {way: statistics.median(milliseconds) for way, (_, milliseconds, _) in ways.items()}
        for way, here in middle.items():
            to_none = here / middle[NONE] if NONE in middle else None
            rows.append([what, way, here, to_none, here / middle[RESIDENT]])
    return Table(columns, rows, "Training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--rows-of-head", type=int, default=ROWS_OF_HEAD, help=f"(default: {ROWS_OF_HEAD})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: as torch chooses)")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    add_results_argument(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    # A bar in a log file is noise.
    logging.disable_progress_bar()
    if arguments.measure:
        source, folder, *others = arguments.measure
        return measure(source, Path(folder), *others)
    results = Results("An added memory by tier", about(__doc__))
    torch.set_num_threads(arguments.threads)
    dtype, source = str(fastest_dtype()).removeprefix("torch."), fetch_smollm()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        build(source, folder, arguments.rows_of_head)
        check(source, folder, getattr(torch, dtype))
        given = (source, folder, arguments.threads, dtype)
        found = {BOTH: run((NONE, *TIERS), BOTH, *given), FROZEN: run(tuple(TIERS), FROZEN, *given)}
    results.about += f"\n\n{2 * 2 * HEADS * arguments.rows_of_head:,} rows of {HEAD_DIM}, the base in {dtype}."
    results.tables = [table_of_generation(found[BOTH]), table_of_training(found)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

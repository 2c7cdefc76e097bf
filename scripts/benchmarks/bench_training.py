"""Training steps with tables resident, in host memory and on disk, and with dense gradients, side by side.

    python scripts/benchmarks/bench_training.py      twenty minutes on 2 cores, 12 GB of RAM, 15 GB of disk

With `--engram-peft ENV/bin/python` it also times engram-peft, which needs an environment of its own (Python 3.12,
pip install engram-peft==1.2.7).

The model is as small as the demo's and has one memory layer, at index 1. The stock Trainer trains it with 2,048 tokens
a step and clipping. Before anything is timed, all tiers must train to the same bits; every way must begin with the same
loss. Each way runs in a process of its own and does four steps when its turn comes. Milliseconds are medians over
steps, without the first turn and without the first step of each turn.

"Cold" means that the files of the table are out of the page cache when training begins, and that the table is so large
that a step finds few of its rows there. It is timed in pairs with a resident table, with the demo's two streams and
eight heads: once with the demo's text, and once with random tokens, whose n-grams are nearly all new.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument
from helpers.timed_training import (
    BATCH,
    CONFIG,
    SEQ,
    SMALL,
    STEPS,
    TABLE,
    Watch,
    made_arguments,
    random_tokens,
)
from helpers.tiny_recipe import prepare_text
from helpers.turns import run_in_turns

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, EngramPrefetchCallback, engram_optimizers


PEFT = Path(__file__).resolve().parents[1] / "experiments" / "time_engram_peft.py"
IDS = "ids.pt"
# Rows of a head.
LARGE = 2_500_000
# What the demo has, and engram-peft cannot be put into.
STREAMS_OF_DEMO = {"hc_mult": 2, "engram_n_heads": 4}
ROUNDS = 4


def trained(model, folder: Path, way: str, rule: str, steps: int):
    """Milliseconds of the timed steps, losses, and the share of rows that were prefetched in time."""
    ids = torch.load(folder / IDS)
    args = made_arguments(folder / "run", steps)
    watch = Watch("cold" in way)
    callbacks = [EngramPrefetchCallback(enabled="without" not in way)] if "cold" in way else []
    rows = None if way == "dense" else engram_optimizers(args, rule, table_lr_scale=1.0, work_folder=folder / "work")
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[*callbacks, watch],
        optimizer_cls_and_kwargs=rows,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    in_time = [line["engram/prefetch_in_time"] for line in lines if "engram/prefetch_in_time" in line]
    return watch.milliseconds, [line["loss"] for line in lines], in_time[1:]


def measure(folder: Path, way: str, rule: str, steps: str, threads: str) -> None:
    """In a process of its own: print what `trained` returns, and sums over the table's blocks if nothing was timed."""
    logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    tier = "cpu" if way == "host" else "disk"
    device_map = {"": "cpu", TABLE: tier} if way not in ("resident", "dense") else None
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    if device_map is None:
        # Mapped from the checkpoint, a page would be copied when a step first writes to it.
        for block in model.model.tables()[0].blocks:
            block.data = block.data.clone()
    milliseconds, losses, in_time = trained(model, folder, way, rule, int(steps))
    sums = [float(block.detach().double().sum()) for block in model.model.tables()[0].blocks if not milliseconds]
    print(json.dumps([milliseconds, losses, in_time, sums]))


def run(
    folder: Path, ways: tuple[str, ...], rule: str, steps: int = STEPS, threads: int = 2, others: dict | None = None
):
    """Way to what `measure` prints."""
    own = {
        way: [sys.executable, __file__, "--measure", str(folder), way, rule, str(steps), str(threads)] for way in ways
    }
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    lines = run_in_turns(own | (others or {}), environment)
    return {way: json.loads(line) for way, line in lines.items()}


def check(folder: Path, ways: tuple[str, ...], rule: str) -> None:
    """Raise unless some steps end with the same bits.

    With one thread: with more, transformers' experts add up in any order.
    """
    found = [*run(folder, ways, rule, steps=3, threads=1).values()]
    if any(own[1] != found[0][1] or own[3] != found[0][3] for own in found):
        raise RuntimeError(f"{ways} do not train to the same weights by {rule}; nothing is timed.")


def check_first_losses(rounds: list[dict], ways: tuple[str, ...]) -> None:
    """Raise unless ways begin with the same loss. With two threads, later losses differ in their last digits."""
    for found in rounds:
        if any(abs(found[way][1][0] - found[ways[0]][1][0]) > 1e-4 for way in ways):
            raise RuntimeError(f"{ways} begin with different losses; nothing is shown.")


def build(folder: Path, rows_of_head: int, **changes) -> None:
    torch.manual_seed(0)
    EngramMoEForCausalLM(
        EngramMoEConfig(**{**CONFIG, **changes}, engram_layer_ids=[1], engram_vocab_size=rows_of_head)
    ).save_pretrained(folder)
    # Otherwise the kernel writes it to the disk while something is timed.
    os.sync()


def tokens_of_text() -> torch.Tensor:
    return torch.tensor(prepare_text(None, "tiny")[1].shuffle(seed=0)[: STEPS * BATCH]["input_ids"])


def table_of(title: str, rounds: list[dict]) -> Table:
    """`rounds`: what `run` has found, the resident way first. Medians are of the steps of all rounds together."""
    columns = {
        "way": "",
        "ms a step": ",.0f",
        "tokens a second": ",.0f",
        "time to resident": ".2f",
        "each round, sorted": "",
        "rows in time": ".2f",
    }
    rows = []
    for way in rounds[0]:
        each = [statistics.median(found[way][0]) / statistics.median(found["resident"][0]) for found in rounds]
        here, resident = (statistics.median(sum((found[w][0] for found in rounds), [])) for w in (way, "resident"))
        in_time = sum((found[way][2] for found in rounds), [])
        ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(each))
        share = statistics.mean(in_time) if in_time else None
        rows.append([way, here, BATCH * SEQ / here * 1000, here / resident, ratios, share])
    return Table(columns, rows, title)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engram-peft", metavar="PYTHON", help="interpreter of an environment with engram-peft")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default: {ROUNDS})")
    parser.add_argument("--large", type=int, default=LARGE, help=f"rows of a head where it is cold (default: {LARGE})")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    add_results_argument(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(Path(arguments.measure[0]), *arguments.measure[1:])
    results = Results("Training steps by tier", about(__doc__))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        build(Path(name), SMALL)
        torch.save(random_tokens(), Path(name) / IDS)
        for rule in ("adam", "adagrad"):
            check(Path(name), ("resident", "host", "disk"), rule)
        others = {}
        if arguments.engram_peft:
            others["engram-peft"] = [arguments.engram_peft, str(PEFT)]
        ways = ("resident", "host", "disk", "dense")
        rounds = [run(Path(name), ways, "adam", others=others) for _ in range(arguments.rounds)]
        check_first_losses(rounds, ways)
        results.tables.append(table_of(f"{16 * SMALL:,} rows of 64, lazy Adam", rounds))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        build(Path(name), arguments.large, **STREAMS_OF_DEMO)
        for kind, make in (("text", tokens_of_text), ("random tokens", random_tokens)):
            torch.save(make(), Path(name) / IDS)
            for way in ("disk, cold, with the callback", "disk, cold, without"):
                rounds = [run(Path(name), ("resident", way), "adagrad") for _ in range(arguments.rounds)]
                check_first_losses(rounds, ("resident", way))
                title = f"{8 * arguments.large:,} rows of 64, row-wise Adagrad, as the demo, {kind}"
                results.tables.append(table_of(title, rounds))
    results.write(arguments.results)


if __name__ == "__main__":
    main()

"""Tables over ranks against whole tables on the same ranks, with 2 and 4 processes, side by side in one run.

    python scripts/benchmarks/bench_ranks.py        five minutes on 2 cores, 8 GB of RAM, 1 GB of disk

The model is as small as the demo's, and has one memory layer with a table of 2,000,000 rows of 32 numbers. Each process
trains it on 512 tokens of the demo's text a step, in a bare loop: torch's DistributedDataParallel, clipping, row-wise
Adagrad. All ways are models of the same processes and take turns of four steps. Unless all have had the same losses and
have the same rows bit for bit, nothing is shown. Milliseconds are means over the steps of the first process, without
the first turn and without the first step of each turn. The time to whole tables is the median of the ratios of steps
with the same batch. Processes talk over loopback, and 4 of them share 2 cores.

"Ahead" announces the rows of the next step before each step. A fetch alone asks for the rows of a step and waits for
them, with nothing between. What of it a step does not wait for is hidden.

Bytes are counted in one more step, at the collectives and sends of a process. The bound is what no exchange of rows can
go below: each distinct row that another process holds comes once, and its gradient goes back once. A row id goes to
the owner with the question. A gradient names its row by one bit.

Balance is of the rows that owners are asked for in a step, where each of 64 ranks reads 2,048 tokens of the text. It is
computed from row ids alone. A table is cut block by block. By default a block holds as many heads as fit into 2**31
numbers. `engram_block_elements` of a config makes blocks smaller, down to one for each head.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import ranks_overlap
from helpers.results import Results, Table, about, add_results_argument
from helpers.tiny_recipe import SEQ_LENGTH, make_config, make_model, prepare_text

from engram_hf import EngramMoEConfig, NgramHash, engram_optimizers
from engram_hf.modeling.table_blocks import split_into_blocks
from engram_hf.modeling.table_cut import ID_BYTES, NAMED_NBYTES, RowCut


RANKS = (2, 4)
HEADS, ROWS_OF_HEAD, WIDTH = 8, 250_000, 32
SEQUENCES, TURN, TURNS = 4, 4, 7
WHOLE, SHARDED, AHEAD = "whole tables", "over ranks", "over ranks, ahead"
WAYS = {WHOLE: {}, SHARDED: {"engram_ranks": "shard"}, AHEAD: {"engram_ranks": "shard"}}
SIMULATED_RANKS, SIMULATED_SEQUENCES = 64, 16
LOADS = 3


class Sent(TorchDispatchMode):
    """Bytes that this thread gives to other processes, by operation and type. What goes to itself does not travel."""

    def __init__(self):
        super().__init__()
        self.nbytes: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d.send" in name:
            self.nbytes["send", args[0][0].dtype] += args[0][0].nbytes
        elif "c10d.alltoall_base" in name:
            splits = args[4]
            own = splits[dist.get_rank()] / max(1, sum(splits))
            self.nbytes["all to all", args[1].dtype] += round(args[1].nbytes * (1 - own))
        return func(*args, **(kwargs or {}))


class Way:
    """One model of a process, how it is trained, and what was measured of it."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", **WAYS[name]).train()
        args = TrainingArguments(str(folder / "run"), learning_rate=1e-3, report_to=[], use_cpu=True)
        factory, options = engram_optimizers(args, "adagrad", work_folder=folder / f"work-{name}-{dist.get_rank()}")
        self.optimizer = factory()(self.model, **options)
        self.wrapped = DistributedDataParallel(self.model)
        (self.table,) = self.model.named_tables().values()
        self.losses: list[float] = []
        self.milliseconds: list[float] = []
        self.waited: list[float] = []

    def step(self, ids: torch.Tensor, coming: torch.Tensor | None = None) -> None:
        waited = self._waited_seconds()
        start = time.perf_counter()
        if coming is not None:
            self.model.prefetch(coming)
        loss = self.wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.milliseconds.append(1000 * (time.perf_counter() - start))
        self.waited.append(1000 * (self._waited_seconds() - waited))
        self.losses.append(float(loss.detach()))

    def _waited_seconds(self) -> float:
        return 0.0 if self.table.ranks is None else self.table.ranks.service.waited_seconds

    def fetch_alone(self, ids: torch.Tensor) -> float:
        """Milliseconds of getting the rows of a batch, with nothing between asking and waiting."""
        wanted = distinct_rows(self.model, self.table, ids)
        dist.barrier()
        before = self._waited_seconds()
        self.table.ranks.begin(wanted).result()
        return 1000 * (self._waited_seconds() - before)

    def timed(self, values: list[float]) -> list[float]:
        """Without the first turn, and the first step of each turn."""
        return [value for step, value in enumerate(values) if step >= TURN and step % TURN]


def distinct_rows(model, table, ids: torch.Tensor) -> torch.Tensor:
    """(n,) row ids of the table that a batch reads, ascending."""
    ngram_hash, (layer,) = model.engram_memory()
    row_ids = ngram_hash(ids).row_ids[layer.layer_idx]
    return (row_ids + table.first_rows_of_heads).unique()


def train_in_turns(ways: list[Way], batches: list[torch.Tensor]) -> None:
    for turn in range(TURNS):
        steps = range(turn * TURN, (turn + 1) * TURN)
        # The order of ways changes from turn to turn.
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            dist.barrier()
            for step in steps:
                is_last = step == steps[-1]
                way.step(batches[step], batches[step + 1] if way.name == AHEAD and not is_last else None)


def check(ways: list[Way]) -> None:
    """Raise unless all ways have come to the same rows and had the same losses, bit for bit."""
    whole = ways[0].table.blocks
    for way in ways[1:]:
        if way.losses != ways[0].losses:
            raise RuntimeError(f"{way.name} and {WHOLE} have had different losses; nothing is shown.")
        ranks = way.table.ranks
        for number, (block, own) in enumerate(zip(whole, way.table.blocks, strict=True)):
            begin, end = ranks.cut.part(number, ranks.rank)
            if not torch.equal(block[begin:end], own):
                raise RuntimeError(f"{way.name} and {WHOLE} have trained different rows; nothing is shown.")


def count_bytes(way: Way, ids: torch.Tensor) -> dict[str, float]:
    """Bytes of one more step of a table over ranks, beside the fewest that can do."""
    table, ranks = way.table, way.table.ranks
    wanted = distinct_rows(way.model, table, ids)
    foreign = int((ranks.cut.owner(wanted) != ranks.rank).sum())
    before = ranks.service.moved["row_bytes"]
    with Sent() as sent:
        way.model(input_ids=ids, labels=ids).loss.backward()
    way.optimizer.zero_grad()
    # Rows and gradients are float32.
    return {
        "rows": ranks.service.moved["row_bytes"] - before,
        "gradients": sent.nbytes["all to all", torch.uint8],
        "bound": foreign * table.row_nbytes,
        "ids": sent.nbytes["send", torch.uint8],
        "bound of ids": foreign * ID_BYTES,
        "bound of gradients": foreign * (table.row_nbytes + NAMED_NBYTES),
    }


def time_files(folder: Path) -> dict[str, list[float]]:
    """Seconds of loading and of saving a model on all processes, by the way tables lie."""
    seconds: dict[str, list[float]] = {}
    for round_number in range(LOADS):
        for name in (WHOLE, SHARDED):
            dist.barrier()
            start = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(folder / "model", **WAYS[name], device_map=HOST_MAP)
            dist.barrier()
            seconds.setdefault(f"load, {name}", []).append(time.perf_counter() - start)
            start = time.perf_counter()
            if dist.get_rank() == 0:
                model.save_pretrained(folder / f"saved{round_number}")
            dist.barrier()
            seconds.setdefault(f"save, {name}", []).append(time.perf_counter() - start)
            del model
    return seconds


# Rows in memory of their own, so that loading has to read them.
HOST_MAP = {"": "cpu", "...table": "host"}


def measure(rank: int, folder: Path, ranks: int) -> None:
    """In a process of its own: write what it has measured."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    ids = torch.load(folder / "ids.pt")
    steps = TURN * TURNS + 1
    batches = list(ids[rank * steps * SEQUENCES : (rank + 1) * steps * SEQUENCES].split(SEQUENCES))
    ways = [Way(name, folder) for name in WAYS]
    train_in_turns(ways, batches)
    check(ways)
    sharded = ways[1]
    found = {
        "milliseconds": {way.name: way.timed(way.milliseconds) for way in ways},
        "waited": {way.name: way.timed(way.waited) for way in ways[1:]},
        "alone": [sharded.fetch_alone(batch) for batch in batches[TURN:]],
        "bytes": count_bytes(sharded, batches[-1]),
        "held": {way.name: sum(block.nbytes for block in way.table.blocks) for way in ways},
    }
    del ways, sharded
    found["files"] = time_files(folder)
    (folder / f"found{rank}of{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path, ranks: int) -> list[dict]:
    """What each process has measured."""
    # A fork has imported everything already.
    start_processes(measure, (folder, ranks), nprocs=ranks, start_method="fork")
    return [json.loads((folder / f"found{rank}of{ranks}.json").read_text()) for rank in range(ranks)]


def table_of_steps(found: dict[int, list[dict]]) -> Table:
    columns = {
        "processes": "",
        "tables": "",
        "a process holds, MB": ",.0f",
        "ms a step": ",.0f",
        "time to whole tables": ".2f",
        "quartiles": "",
        "ms waited for rows": ",.1f",
        "ms of a fetch alone": ",.1f",
        "hidden": ".0%",
    }
    rows = []
    for ranks, of_ranks in found.items():
        for name in WAYS:
            times = of_ranks[0]["milliseconds"]
            ratios = [own / whole for own, whole in zip(times[name], times[WHOLE], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            waits = [None, None, None]
            if name in of_ranks[0]["waited"]:
                waited = statistics.mean(value for each in of_ranks for value in each["waited"][name])
                alone = statistics.mean(value for each in of_ranks for value in each["alone"])
                waits = [waited, alone, 1 - waited / alone]
            held = of_ranks[0]["held"][name] / 1e6
            mean_ms = statistics.mean(times[name])
            quartiles = "" if name == WHOLE else f"{low:.2f} to {high:.2f}"
            rows.append([str(ranks), name, held, mean_ms, middle, quartiles, *waits])
    note = "Waited and alone are means over the steps of all processes."
    return Table(columns, rows, "Training steps", note)


def table_of_bytes(found: dict[int, list[dict]]) -> Table:
    columns = {
        "processes": "",
        "rows, bytes": ",.0f",
        "of the bound ": ".3f",
        "gradients and their names, bytes": ",.0f",
        "of the bound": ".3f",
        "row ids with questions, bytes": ",.0f",
        "of 4 bytes a row": ".3f",
    }
    rows = []
    for ranks, of_ranks in found.items():
        total = {key: sum(each["bytes"][key] for each in of_ranks) for key in of_ranks[0]["bytes"]}
        own = [
            total["rows"],
            total["rows"] / total["bound"],
            total["gradients"],
            total["gradients"] / total["bound of gradients"],
        ]
        rows.append([str(ranks), *own, total["ids"], total["ids"] / total["bound of ids"]])
    note = (
        "Of one step, over all processes. No row id travels twice: the bound of gradients counts one bit for each row."
    )
    return Table(columns, rows, "Bytes that travel in a step", note)


def table_of_files(found: dict[int, list[dict]]) -> Table:
    rows = []
    for ranks, of_ranks in found.items():
        for name in (WHOLE, SHARDED):
            seconds = [statistics.median(of_ranks[0]["files"][f"{what}, {name}"]) for what in ("load", "save")]
            rows.append([str(ranks), name, *seconds])
    columns = {"processes": "", "tables": "", "seconds to load": ",.2f", "seconds to save": ",.2f"}
    megabytes = 4e-6 * HEADS * ROWS_OF_HEAD * WIDTH
    note = (
        f"Medians of {LOADS}, until the last process is done, with tables of {megabytes:.0f} MB in host "
        "memory and files in the page cache. One process saves, and asks the others for their rows."
    )
    return Table(columns, rows, "Files", note)


def table_of_overlap(found: dict[str, dict[str, float]]) -> Table:
    """Of what `measure_overlap` has found."""
    names = {
        "at once": "asked for by the lookup",
        "first line": "asked for ahead of a quarter of the step",
        "announced": "announced a step ahead too",
    }
    columns = {"rows are": "", "ms of a lookup": ",.1f", "ms a step": ",.1f", "hidden": ".0%"}
    rows = [[names[way], each["lookup_ms"], each["step_ms"], each["hidden_share"]] for way, each in found.items()]
    note = (
        f"Two processes look up rows of {ranks_overlap.TOKENS:,} tokens, {ranks_overlap.HEADS} heads and "
        f"{ranks_overlap.WIDTH} numbers, and multiply matrices. Medians of {ranks_overlap.STEPS - 1} steps of the "
        "slower process."
    )
    return Table(columns, rows, "A table on disk, of which the page cache holds nothing", note)


def balance(owner_of: Callable[[torch.Tensor], torch.Tensor], row_ids: torch.Tensor) -> list[float]:
    """Most rows that an owner is asked for over their mean, for each step.

    Args:
        owner_of: (n,) row ids to the ranks that hold them.
        row_ids: (steps, ranks, tokens, heads), over all tables.
    """
    found = []
    for of_step in row_ids:
        served = torch.zeros(SIMULATED_RANKS)
        for of_rank in of_step:
            served += owner_of(of_rank.unique()).bincount(minlength=SIMULATED_RANKS)
        found.append(float(served.max() / served.mean()))
    return found


def table_of_balance(tokenizer, bound: EngramMoEConfig, text: torch.Tensor) -> Table:
    """Of the whole text, which is dealt to ranks in its order.

    Args:
        tokenizer: of the demo.
        bound: a config that the tokenizer is bound to.
        text: (sequences, tokens).
    """
    known = {"engram_compressed_vocab_size": bound.engram_compressed_vocab_size}
    large = {"engram_vocab_size": 2_262_400, "engram_n_heads": 8, "engram_layer_ids": [1, 2], "engram_head_dim": 80}
    configs = {
        "the demo's": make_config("tiny", tokenizer, **known),
        "Engram-27B's sizes": make_config("tiny", tokenizer, **known, **large),
    }
    in_step = SIMULATED_RANKS * SIMULATED_SEQUENCES
    steps = len(text) // in_step
    rows = []
    for name, config in configs.items():
        ngram_hash = NgramHash.from_config(config)
        ngram_hash.bind(tokenizer)
        of_tables = [[rows for of_order in ngram_hash.primes(i) for rows in of_order] for i in config.engram_layer_ids]
        blocks = [split_into_blocks(each, config.engram_head_dim, config.engram_block_elements) for each in of_tables]
        rows_of_block = [sum(heads) for of_table in blocks for heads in of_table]
        rows_of_head = [rows for of_table in of_tables for rows in of_table]
        firsts = torch.tensor([0, *rows_of_head]).cumsum(0)[:-1]
        cuts = {
            f"blocks of the default size ({len(rows_of_block)})": RowCut(rows_of_block, SIMULATED_RANKS).owner,
            "a block for each head": RowCut(rows_of_head, SIMULATED_RANKS).owner,
            "whole heads on ranks": lambda row_ids, firsts=firsts: (
                torch.bucketize(row_ids, firsts[1:], right=True) % SIMULATED_RANKS
            ),
        }
        ids = text[: steps * in_step].view(steps * SIMULATED_RANKS, -1, SEQ_LENGTH)
        of_layers = [ngram_hash(each).row_ids for each in ids]
        row_ids = (
            torch.stack([torch.cat([each[i] for i in config.engram_layer_ids], -1) for each in of_layers]) + firsts
        )
        row_ids = row_ids.view(steps, SIMULATED_RANKS, -1, len(rows_of_head))
        for cut, owner_of in cuts.items():
            found = balance(owner_of, row_ids)
            rows.append([name, f"{sum(rows_of_head):,}", len(rows_of_head), cut, statistics.mean(found), max(found)])
    columns = {"table": "", "rows": "", "heads": ",d", "cut": "", "most over mean": ".2f", "worst step": ".2f"}
    note = f"{steps} steps of {in_step * SEQ_LENGTH:,} tokens, {steps * in_step * SEQ_LENGTH:,} in all."
    return Table(columns, rows, f"Rows that {SIMULATED_RANKS} simulated ranks are asked for", note)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Tables over ranks", about(__doc__))
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer, train, _ = prepare_text(None, "tiny")
    text = torch.tensor(train["input_ids"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        config = make_config("tiny", tokenizer, engram_vocab_size=ROWS_OF_HEAD, engram_head_dim=WIDTH)
        model = make_model(config, tokenizer, seed=0)
        model.save_pretrained(folder / "model")
        drawn = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
        torch.save(text[drawn[: max(RANKS) * (TURN * TURNS + 1) * SEQUENCES]], folder / "ids.pt")
        os.sync()
        found = {ranks: run(folder, ranks) for ranks in RANKS}
        overlap = ranks_overlap.measure_overlap(folder)
    results.tables += [table_of_steps(found), table_of_overlap(overlap), table_of_bytes(found), table_of_files(found)]
    results.tables.append(table_of_balance(tokenizer, model.config, text))
    results.write(arguments.results)


if __name__ == "__main__":
    main()

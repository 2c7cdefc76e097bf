"""Checkpoints of tables over 1 to 4 processes. Not a test: `test_rank_saves.py` starts it and compares what is left.

The sums of gradients are exact, so what is trained does not depend on the number of processes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from joining import join
from peft import get_peft_model
from tiny import tiny_config, tiny_model
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import logging

from engram_hf import engram_optimizers, lora_config
from engram_hf.modeling.table import EngramTable


# Batches of a step, over all processes.
BATCHES, STEPS, SAVED_AT = 12, 4, 2
DISK_MAP = {"": "cpu", "...table": "disk"}
# Ranks of a run: where it begins, and how: from a model, or as Trainer resumes, by state dicts.
RUNS = {
    "four": (4, None, False),
    "one": (1, None, False),
    "by1": (1, "four", False),
    "by2": (2, "four", True),
    "by3": (3, "four", False),
    "by4": (4, "four", True),
    "two": (2, None, False),
    "one after two": (1, "two", True),
    "apart": (2, None, False),
}
SMALL_RUNS = ("one", "two", "one after two", "apart")


def rows_read(table: EngramTable, number: int, step: int, batch: int) -> torch.Tensor:
    """(tokens, heads) row ids: few of the first table, and most of the second one."""
    generator = torch.Generator().manual_seed(1000 * number + 100 * step + batch)
    # Of the first table nine rows of a head, from its beginning to its end.
    steps = [1 if number else int(rows) // 9 for rows in table.head_rows]
    each = zip(table.head_rows.tolist(), steps)
    return torch.stack([torch.randint(0, rows // step, (7,), generator=generator) * step for rows, step in each], -1)


def train(model, optimizer, steps: range, rank: int, ranks: int, save) -> None:
    tables = list(model.named_tables().values())
    for step in steps:
        for batch in range(rank, BATCHES, ranks):
            loss = 0.0
            for number, table in enumerate(tables):
                row_ids = rows_read(table, number, step, batch)
                weights = torch.randint(-4, 5, row_ids.shape, generator=torch.Generator().manual_seed(step))
                rows = table(row_ids).view(*row_ids.shape, -1)
                loss = loss + ranks * (rows * weights.unsqueeze(-1)).sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        save(step + 1)


def optimizer_of(model, out: Path):
    """The optimizer of a run that trains the tables alone."""
    tables = {id(parameter) for table in model.named_tables().values() for parameter in table.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in tables)
    args = TrainingArguments(str(out), learning_rate=0.01, report_to=[], use_cpu=True)
    factory, options = engram_optimizers(args, "adam")
    return factory()(model, **options)


def run(rank: int, out: Path, name: str) -> None:
    """A run, as a loop of one's own that saves as Trainer does: one process alone."""
    ranks, begun, by_state_dict = RUNS[name]
    torch.set_num_threads(1)
    if ranks > 1:
        join(rank, ranks, out / f"store-{name.replace(' ', '-')}")
    own = out / name
    if name == "apart":
        # At the same path each rank sees another folder, as ranks without a shared disk do.
        disk = out / name / f"disk{rank}"
        disk.mkdir(parents=True)
        os.chdir(disk)
        own = Path("/proc/self/cwd")
    last = None if begun is None else out / begun / f"checkpoint-{SAVED_AT}"
    folder = out / "base" if last is None or by_state_dict else last
    model = AutoModelForCausalLM.from_pretrained(folder, engram_ranks="shard" if ranks > 1 else None).train()
    if last is not None and by_state_dict:
        load_sharded_checkpoint(model, last, strict=False)
    optimizer = optimizer_of(model, own)
    if last is not None:
        optimizer.load_state_dict(torch.load(last / "optimizer.pt", weights_only=True))

    def save(step: int) -> None:
        if rank == 0 and step in (SAVED_AT, STEPS):
            checkpoint = own / f"checkpoint-{step}"
            with seen_bars(checkpoint.with_suffix(".bars")):
                model.save_pretrained(checkpoint)
            torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")

    train(model, optimizer, range(0 if last is None else SAVED_AT, STEPS), rank, ranks, save)
    if name == "two":
        found = [wrapped(model)]
        adapted = AutoModelForCausalLM.from_pretrained(out / "base", engram_ranks="shard").train()
        found.append(wrapped(adapted, get_peft_model(adapted, lora_config(r=2))))
        torch.save(found, out / f"wrapped{rank}.pt")
        save_without_training(out, rank)
    if ranks > 1:
        # A fork ends without the handlers by which a rank goes on answering.
        dist.barrier()
        dist.destroy_process_group()


def save_without_training(out: Path, rank: int) -> None:
    """Save tables on disk that nobody trains: as they were loaded, and when the last process has changed a row."""
    model = AutoModelForCausalLM.from_pretrained(out / "base", engram_ranks="shard", device_map=DISK_MAP)
    for name in ("untouched", "touched"):
        if name == "touched" and rank:
            table = next(iter(model.named_tables().values()))
            table.write_rows(torch.zeros(1, dtype=torch.int64), torch.ones(1, table.row_width, dtype=table.dtype))
        dist.barrier()
        if rank == 0:
            with seen_bars(out / f"{name}.bars"):
                model.save_pretrained(out / name)
        dist.barrier()


@contextmanager
def seen_bars(path: Path) -> Iterator[None]:
    """Show progress bars of tables to nobody, also short ones, and leave the total and the end of each in a file."""
    bars = []

    def show(factory, args, given):
        if given["desc"] == "Writing tables":
            given |= {"disable": False, "file": StringIO()}
            bars.append(factory(*args, **given))
            return bars[-1]
        return factory(*args, **given)

    before = logging.set_tqdm_hook(show)
    yield
    logging.set_tqdm_hook(before)
    torch.save([(bar.total, bar.n) for bar in bars], path)


def wrapped(model, around=None) -> list[bool]:
    """Whether each block is what it was, after torch's wrapper has made the parameters of all processes equal.

    Args:
        model: with the tables.
        around: what is wrapped, where that is a model around this one.
    """
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(True)
        # Whoever is not the first process has something else.
        parameter.data.fill_(dist.get_rank())
    before = [block.detach().clone() for table in model.named_tables().values() for block in table.blocks]
    DistributedDataParallel(model if around is None else around)
    after = [block.detach() for table in model.named_tables().values() for block in table.blocks]
    has_head_of_first = bool((model.lm_head.weight == 0).all())
    return [has_head_of_first, *(torch.equal(*pair) for pair in zip(before, after, strict=True))]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tiny_model(tiny_config(engram_table_dtype="float64", engram_vocab_size=211)).save_pretrained(folder / "base")
    for each in sys.argv[2:]:
        # A fork has imported everything already.
        start_processes(run, (folder, each), nprocs=RUNS[each][0], start_method="fork")

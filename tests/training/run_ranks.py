"""Tables over processes. Not a test: `test_ranks.py` starts it and compares what the processes leave.

Arguments: a folder, and numbers of processes.
"""

import gc
import os
import shutil
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from joining import join
from safetensors.torch import load_file
from tiny import tiny_config, tiny_ids, tiny_model
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import RowAdam, RowSGD, RowwiseAdagrad, RowwiseAdam, engram_optimizers
from engram_hf.modeling.disk_files import BlockSource, TableFile
from engram_hf.modeling.disk_safetensors import TensorContent, write_file
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_cut import RowCut, open_parts
from engram_hf.modeling.table_formats import row_format
from engram_hf.modeling.table_ranks import ANNOUNCED_KEPT, LOOKUPS_KEPT, TableRanks, start_ranks
from engram_hf.training.row_exchange import RowExchange
from engram_hf.training.row_updates import RowUpdates


STEPS, WIDTH, HIGHEST_NORM = 3, 4, 2.0
# Three heads in two blocks; the second one has fewer rows than there are processes.
ROWS_OF_HEAD, BLOCK_ELEMENTS = [3, 23, 2], 26 * WIDTH
RULES = {"adam": RowAdam(), "rowwise_adam": RowwiseAdam(), "adagrad": RowwiseAdagrad(), "sgd": RowSGD()}
# Rule, tier, type of the rows.
CASES = [
    *((rule, tier, "float64") for rule in RULES for tier in ("resident", "host", "disk")),
    *((rule, "host", "float32") for rule in RULES),
    ("adam", "disk", "bfloat16"),
]
ROUNDED = ("adam", "resident", "bfloat16")
EARLY = ("adam", "disk", "float64")
# Numbers of batches that one step accumulates. They have rows in common.
TWO_LOOKUPS = (0, 1)
# Tables of other heads, by the name of their file: one with fewer rows than processes, one with four heads.
HEADS = {"few": [2], "four": [5, 7, 3, 4]}


class Task(nn.Module):
    """A table under a loss, and a number that every loss depends on."""

    def __init__(self, table: EngramTable):
        super().__init__()
        self.table, self.scale = table, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, row_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not len(row_ids):
            # A batch without tokens reads no rows.
            return self.scale * 1
        rows = self.table(row_ids).double()
        # Gradients depend on the rows, and are multiples of a half, so that their sums have no error.
        return self.scale * ((rows.detach().floor() + 0.5) * rows * weights).sum()


def batch(step: int, rank: int, ranks: int, heads=ROWS_OF_HEAD) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process reads in a step: each another number of tokens, and the first one none. Weights are small whole
    numbers, so that sums have no error."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = 3 * rank + (rank > 0)
    ids = torch.stack([torch.randint(0, rows, (tokens,), generator=generator) for rows in heads], -1)
    return ids, ranks * torch.randint(-4, 5, (tokens, WIDTH * len(heads)), generator=generator).double()


def rows_of_one_owner(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batch`, of rows that lie at the first process, whoever reads them."""
    ids, weights = batch(step, rank + 1, ranks)
    return torch.zeros_like(ids), weights


def turns(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batch`, of which one process reads the table at a time, and in the second step none does."""
    is_reading = step // 10 != 1 and step % 10 == rank
    ids, weights = batch(step, rank + 1, ranks)
    return (ids, weights) if is_reading else (ids[:0], weights[:0])


def share_of_tokens(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batch`, of tokens that are the same for any number of processes, each of which reads its share of them."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.stack([torch.randint(0, rows, (12,), generator=generator) for rows in ROWS_OF_HEAD], -1)
    weights = ranks * torch.randint(-4, 5, (12, WIDTH * len(ROWS_OF_HEAD)), generator=generator).double()
    return ids[rank::ranks], weights[rank::ranks]


def write_table(path: Path, dtype: str, rows_of_block=(26, 2)) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in rows_of_block]
    blocks = {f"blocks.{i}": each.to(getattr(torch, dtype)) for i, each in enumerate(rows)}
    write_file(path, {name: TensorContent.of(block) for name, block in blocks.items()})


def open_table(path: Path, tier: str, dtype: str, service=None) -> EngramTable:
    with tables_without_blocks():
        table = EngramTable(HEADS.get(path.stem, ROWS_OF_HEAD), WIDTH, BLOCK_ELEMENTS, row_format(dtype))
    file, blocks = TableFile(path), len(table.block_records)
    sources = {("table", i): BlockSource(file, f"blocks.{i}") for i in range(blocks)}
    if service is not None:
        sources = open_parts(sources, {"table": table.cut_over_ranks(service)}, service.rank)
    table.open_blocks(list(sources.values()), [tier] * blocks, ["cpu"] * blocks)
    return table


def train(
    path: Path,
    case: tuple,
    ranks: int,
    service=None,
    is_alone=False,
    saved=None,
    make=batch,
    highest=HIGHEST_NORM,
    early=None,
) -> dict:
    """What a table has become.

    Args:
        path: of its file.
        case: of `CASES`.
        ranks: of the run.
        service: where the table is cut over them.
        is_alone: whether this process does by itself what so many ranks do together.
        saved: the state of an optimizer, to go on from.
        make: what a process reads in a step.
        highest: the norm that gradients are clipped to.
        early: counts what is sent while each forward is announced before the backward ahead of it, and others are that
            never come, and while a forward behind a step is prefetched ahead of it. None leaves that out.
    """
    rule, tier, dtype = case
    table = open_table(path, tier, dtype, service)
    exchange = None if is_alone else RowExchange()
    work = path.parent / f"work{os.getpid()}"
    updates = RowUpdates("table", table, RULES[rule], work_folder=work, exchange=exchange)
    if saved is not None:
        updates.load_state_dict(saved)
    task = Task(table).train()
    if exchange is not None:
        exchange.add(table)
        exchange.follow(task, [task.scale])
    if service is not None:
        service.meet()
    norms, seen, is_early = [], [], early is not None
    before = Counter() if service is None else Counter(service.moved)
    if is_early:
        table.ranks.bring["seen"] = seen.append
    coming = None
    for step in range(STEPS):
        for part in range(2):
            for rank in [dist.get_rank()] if exchange else range(ranks):
                loss = task(*(coming or make(10 * step + part, rank, ranks)))
                coming = None
                if is_early:
                    look_ahead(table, 10 * step + part, rank, ranks)
                (loss if exchange else loss / ranks).backward()
        if is_early:
            # Rows that are fetched ahead of a step are of no use behind it.
            coming = make(10 * step + 10, rank, ranks)
            table.prefetch(coming[0])
        norms.append(float(nn.utils.clip_grad_norm_([updates.gradients.norm], highest)))
        updates.step(0.5)
        updates.gradients.norm.grad = None
    rows = table.gather_rows(torch.arange(table.num_rows))
    nbytes = early.nbytes("send", "uint8") if is_early else 0
    state = updates.state_dict() if service is None else state_in_files(updates, path.parent / f"state{os.getpid()}")
    state = {name: state[name] for name in ("steps", "row_ids", "wide", "narrow") if name in state}
    if service is not None:
        # Nobody may end while another one asks.
        service.meet()
    shutil.rmtree(work, ignore_errors=True)
    moved = {} if service is None else dict(service.moved - before)
    found = {"rows": rows, "norms": norms, "state": state, "held": table.held_rows, "moved": moved}
    return {**found, "seen": seen, "sent": nbytes}


def batch_after(number: int) -> int:
    """The number of the batch that follows in `train`."""
    return number + 1 if number % 10 == 0 else number + 9


def look_ahead(table: EngramTable, number: int, rank: int, ranks: int) -> None:
    """Between a forward and its backward: announce lookups to come, and look up what has no part in the training."""
    for each in (number + 100, batch_after(number)):
        table.bring_pages(batch(each, rank, ranks)[0])
    row_ids, _ = batch(number + 200, rank, ranks)
    if len(row_ids):
        with torch.no_grad():
            table(row_ids)


def state_in_files(updates: RowUpdates, folder: Path) -> dict:
    """The state of the rows of all ranks, as one process would have it."""
    folder.mkdir()
    parts = [load_file(folder / name) for name in sorted(updates.write_state(folder, "state"))]
    shutil.rmtree(folder)
    order = torch.cat([part["row_ids"] for part in parts]).argsort()
    names = [name for name in parts[0] if name != "stamp"]
    return {"steps": updates.steps, **{name: (torch.cat([part[name] for part in parts])[order],) for name in names}}


class Sent(TorchDispatchMode):
    """Bytes that this thread gives to other processes by collectives and sends, and takes by receiving.

    calls: of each, the operation, the type, and the bytes. What a process gives to itself does not travel.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name:
            tensors = [each for group in args[:2] for each in (group if isinstance(group, list) else [group])]
            tensors = [each for each in tensors if isinstance(each, torch.Tensor)]
            tensor, share = tensors[0], 1.0
            if "alltoall_base" in name:
                # The first tensor is what arrives.
                tensor, splits = tensors[1], args[4]
                share = 1 - splits[dist.get_rank()] / max(1, sum(splits))
            operation = name.split(".")[1]
            if operation == "send" and args[3] % 2 == 0:
                # A question that has waited for a step of this process.
                operation = "answer"
            self.calls.append((operation, str(tensor.dtype), round(tensor.nbytes * share)))
        return func(*args, **(kwargs or {}))

    def nbytes(self, operation: str, dtype: str) -> int:
        """Of all calls of an operation with a type."""
        return sum(nbytes for name, of_type, nbytes in self.calls if (name, of_type) == (operation, f"torch.{dtype}"))


def task_over_ranks(path: Path) -> Task:
    """A task whose table is cut over the processes and trained."""
    service = start_ranks()
    table = open_table(path, "resident", "float64", service)
    exchange = RowExchange()
    RowUpdates("table", table, RULES["sgd"], exchange=exchange)
    task = Task(table).train()
    exchange.add(table)
    exchange.follow(task, [task.scale])
    service.meet()
    return task


def count_traffic(path: Path, ranks: int) -> dict:
    """What one step of a table sends, of two forwards that have rows in common and are accumulated."""
    task, rank = task_over_ranks(path), dist.get_rank()
    table, accumulation = task.table, GradientState()
    with Sent() as sent:
        losses = [task(*batch(number, rank, ranks)) for number in TWO_LOOKUPS]
        accumulation._set_sync_gradients(False)
        losses[0].backward()
        accumulation._set_sync_gradients(True)
        losses[1].backward()
    table.ranks.service.meet()
    return {
        "heads": sent.nbytes("send", "int64"),
        "asked": sent.nbytes("send", "uint8"),
        "taken": sent.nbytes("recv_", "uint8"),
        "answers": sum(name == "recv_" for name, _, _ in sent.calls),
        "given": [nbytes for name, dtype, nbytes in sent.calls if name == "alltoall_base_" and "uint8" in dtype],
    }


class NextRanksCut(RowCut):
    """Takes every row for the next rank's."""

    def owner(self, row_ids: torch.Tensor) -> torch.Tensor:
        return (super().owner(row_ids) + 1) % self.ranks


class ShiftingCut(RowCut):
    """What a network does that mixes messages up: of the row ids that arrive, one is that of a neighbour."""

    def pack(self, row_ids: torch.Tensor, rank: int) -> torch.Tensor:
        packed = super().pack(row_ids, rank)
        packed[:1] ^= 1
        return packed


# How the last process errs.
ERRORS = ("asks the next rank", "asks for a neighbour", "gives to the next rank", "gives to a neighbour", "mixes up")


def err(path: Path, ranks: int, error: str) -> str:
    """What is raised on this process where the last one errs in one of the ways of `ERRORS`."""
    task, is_last = task_over_ranks(path), dist.get_rank() == ranks - 1
    own = task.table.ranks
    kind = NextRanksCut if "next rank" in error else ShiftingCut
    other = kind(own.cut.rows_of_block, ranks)
    try:
        if is_last and error.startswith("asks"):
            own.cut = other
        loss = task(*batch(0, dist.get_rank() + 1, ranks))
        # What every rank has asked for is with its owner.
        own.service.meet()
        if is_last and error.startswith("gives"):
            own.cut = other
            # A neighbour's row id travels only where the owner has forgotten the lookup.
            own.lookups = own.lookups if kind is NextRanksCut else []
        elif is_last and error == "mixes up":
            # It takes one row for another, of those that it was asked for.
            own.answered = [{n: (steps, held.flip(0)) for n, (steps, held) in each.items()} for each in own.answered]
        loss.backward()
    except RuntimeError as raised:
        return str(raised)
    return ""


def look_up_without_a_step(path: Path, ranks: int) -> dict:
    """How much is remembered of many lookups in training, and what becomes of those that are forgotten.

    Two tables get the gradients of the same forward. One has made so many others since that its owners have forgotten
    it, and the other one has had a step.
    """
    rank, found = dist.get_rank(), {}
    for way in ("nothing", "forwards", "a step", "broken before", "broken behind", "broken announced"):
        task = task_over_ranks(path)
        own = task.table.ranks
        if way == "broken before":
            found[way, "raised"] = break_off(task, batch(1, rank, ranks), has_asked=False)
        elif way == "broken announced":
            # Its owners know of both, and of as many more as make the first one the oldest that a rank remembers.
            for number in (1, 11):
                task.table.bring_pages(batch(number, rank, ranks)[0])
            found[way, "raised"] = break_off(task, batch(11, rank, ranks), has_asked=False)
            for number in range(ANNOUNCED_KEPT - 1):
                task.table.bring_pages(rows_of_one_owner(number, rank, ranks)[0])
            own.service.meet()
        loss = task(*batch(1, rank, ranks))
        if way == "forwards":
            for number in range(LOOKUPS_KEPT + 9):
                task(*rows_of_one_owner(number, rank, ranks))
            own.service.meet()
            found["remembered"] = [len(own.lookups), *map(len, own.answered)]
            found["bytes"] = bytes_remembered(own)
        elif way == "a step":
            own.service.meet()
            own.service.after_step(own)
            found["behind a step"] = [len(own.lookups), *map(len, own.answered)]
            own.service.meet()
        elif way == "broken behind":
            found[way, "raised"] = break_off(task, rows_of_one_owner(1, rank, ranks), has_asked=True)
            for number in range(LOOKUPS_KEPT - 1):
                task(*rows_of_one_owner(number, rank, ranks))
            own.service.meet()
        before = own.service.moved["again"]
        loss.backward()
        found[way] = (*task.table.row_gradients.rows, own.service.moved["again"] - before)
        own.service.meet()
    return found


def bytes_remembered(own: TableRanks) -> tuple[int, int]:
    """Bytes of memory of what a rank knows of its own lookups, and of those of others."""
    asked = [ids for lookup in own.lookups for ids in lookup.asked]
    answered = [held for of_rank in own.answered for _, held in of_rank.values()]
    # Parts of one tensor share its memory.
    memories = [[each.untyped_storage() for each in tensors] for tensors in (asked, answered)]
    return tuple(sum({each.data_ptr(): each.nbytes() for each in of_tensors}.values()) for of_tensors in memories)


def break_off(task: Task, given: tuple[torch.Tensor, torch.Tensor], has_asked: bool) -> str:
    """What a forward raises, because rows that arrive have no room (`has_asked` is False), or own rows cannot be read
    when the others have been asked for."""
    own, message = task.table.ranks, ""
    row_nbytes, read = own.row_nbytes, own.read

    def read_elsewhere(held: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError("This page cannot be read.")
        return read(held)

    own.service.meet()
    if has_asked:
        own.read = read_elsewhere
    else:
        own.row_nbytes = 2**50
    try:
        task(*given)
    except RuntimeError as error:
        message = str(error)
    own.row_nbytes, own.read = row_nbytes, read
    own.service.meet()
    return message


def ask_who_has_deleted(path: Path, service) -> str:
    """What is raised on the first process where the last one has deleted its table."""
    table, rank = open_table(path, "host", "float64", service).eval(), dist.get_rank()
    service.meet()
    row_ids = torch.stack([torch.arange(rows) for rows in [2] * len(ROWS_OF_HEAD)], -1)
    message = ""
    if rank == service.ranks - 1:
        del table
        gc.collect()
    service.meet()
    if rank == 0:
        try:
            table(torch.tensor(ROWS_OF_HEAD) - 1 - row_ids)
        except RuntimeError as error:
            message = str(error)
    service.meet()
    return message


def gather_what_cannot_be_read(path: Path) -> str:
    """What is raised on the first process, behind a forward in training, where the last one cannot read its rows."""
    task, message = task_over_ranks(path), ""
    own = task.table.ranks
    task(*batch(1, 1 + dist.get_rank(), own.cut.ranks))
    if dist.get_rank() == own.cut.ranks - 1:
        own.read = fail_to_read
    own.service.meet()
    if dist.get_rank() == 0:
        try:
            task.table.gather_rows(torch.arange(task.table.num_rows))
        except RuntimeError as error:
            message = str(error)
    own.service.meet()
    return message


def fail_to_read(held: torch.Tensor) -> torch.Tensor:
    raise OSError("The disk is gone.")


def load_on_one_rank(path: Path, ranks: int) -> torch.Tensor:
    """What a process looks up when the first one alone has loaded a weight that is not of the table."""
    task = task_over_ranks(path).eval()
    if dist.get_rank() == 0:
        task.load_state_dict({"scale": torch.full((), 3.0, dtype=torch.float64)}, strict=False)
    with torch.no_grad():
        found = task.table(batch(1, 1 + dist.get_rank(), ranks)[0])
    task.table.ranks.service.meet()
    return found


def use_model(base: Path, out: Path, ranks: int) -> dict:
    """What a model over ranks computes, generates and saves; each process reads and writes another number of tokens."""
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(base, engram_ranks="shard").eval()
    logits = []
    for number in range(1 + rank):
        with torch.no_grad():
            logits.append(model(tiny_ids(2, 5 + 3 * rank, seed=number)).logits)
    prompt = tiny_ids(1, 4 + rank, seed=rank)
    generated = model.generate(prompt, max_new_tokens=2 + 3 * rank, do_sample=False)
    # As in Trainer: one process comes here.
    if rank == 0:
        model.save_pretrained(out / f"saved_by{ranks}")
    held = {table.held_rows for table in model.named_tables().values()}
    return {"logits": logits, "generated": generated, "held": held}


def fetch_while_checkpointing(base: Path, folder: Path) -> dict:
    """Bytes that are fetched for one step, with and without gradient checkpointing, and the rows that have moved."""
    found = {}
    for way in (None, False, True):
        model = AutoModelForCausalLM.from_pretrained(base, engram_ranks="shard").train()
        args = TrainingArguments(str(folder), optim="sgd", learning_rate=0.1, report_to=[], use_cpu=True)
        factory, options = engram_optimizers(args, "sgd")
        optimizer = factory()(model, **options)
        if way is not None:
            model.gradient_checkpointing_enable({"use_reentrant": way})
            model.enable_input_require_grads()
        ids = tiny_ids(2, 9, seed=dist.get_rank())
        with Sent() as sent:
            model(input_ids=ids, labels=ids).loss.backward()
        fetched = sent.nbytes("recv_", "uint8")
        optimizer.step()
        rows = [table.gather_rows(torch.arange(table.num_rows)) for table in model.named_tables().values()]
        found[str(way)] = {"fetched": fetched, "rows": rows}
        dist.barrier()
    return found


def run(rank: int, out: Path, ranks: int) -> None:
    join(rank, ranks, out / f"store{ranks}")
    service, result = start_ranks(), {}
    for case in CASES:
        path = out / f"{case[2]}.safetensors"
        result[case] = train(path, case, ranks, service)
        result[case, "replicated"] = train(path, case, ranks)
    result["rounded"] = train(out / "bfloat16.safetensors", ROUNDED, ranks, service, make=share_of_tokens, highest=1e9)
    path, case, ways = out / "float64.safetensors", ("sgd", "resident", "float64"), [service, None]
    result["one owner"] = [train(path, case, ranks, each, make=rows_of_one_owner) for each in ways]
    result["turns"] = [train(path, ("adam", "host", "float64"), ranks, each, make=turns) for each in ways]
    result["traffic"] = count_traffic(path, ranks)
    for error in ERRORS:
        result[error] = err(path, ranks, error)
    result["without a step"] = look_up_without_a_step(path, ranks)
    result["deleted"] = ask_who_has_deleted(path, service)
    result["unreadable"] = gather_what_cannot_be_read(path)
    result["loaded alone"] = load_on_one_rank(path, ranks)
    for name, heads in HEADS.items():
        make = partial(batch, heads=heads)
        case = ("adam", "disk" if name == "few" else "host", "float64")
        result[name] = [train(out / f"{name}.safetensors", case, ranks, each, make=make) for each in ways]
    with Sent() as sent:
        result["early"] = train(path, EARLY, ranks, service, early=sent)
    result["announced"] = dict(service.moved)
    if ranks == 3:
        result["model"] = use_model(out / "base", out, ranks)
    if ranks == 2:
        result["checkpointing"] = fetch_while_checkpointing(out / "base", out / "run")
    torch.save(result, out / f"result{rank}of{ranks}.pt")
    # A fork ends without the handlers by which a rank goes on answering.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tiny_model(tiny_config(engram_table_dtype="float64")).save_pretrained(folder / "base")
    for dtype in ("float64", "float32", "bfloat16"):
        write_table(folder / f"{dtype}.safetensors", dtype)
    for name, heads in HEADS.items():
        write_table(folder / f"{name}.safetensors", "float64", [sum(heads)])
    for number in map(int, sys.argv[2:]):
        # A fork has imported everything already.
        start_processes(run, (folder, number), nprocs=number, start_method="fork")

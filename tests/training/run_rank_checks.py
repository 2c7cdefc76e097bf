"""Two processes with tables over them, and what they are told. Not a test: `test_rank_checks.py` starts it.

Argument: a folder, which holds models.
"""

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from joining import join
from run_ranks import Task, batch, open_table, rows_of_one_owner, write_table
from tiny import tiny_config, tiny_model
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

from engram_hf import RowSGD
from engram_hf.modeling.table_ranks import RowService, start_ranks
from engram_hf.training.optimizers import EngramOptimizer
from engram_hf.training.row_exchange import RowExchange
from engram_hf.training.row_updates import RowUpdates


RANKS, PATIENCE = 2, 2


def no_tokens(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batch`, of a process that reads nothing."""
    ids, weights = batch(step, rank + 1, ranks)
    return ids[:0], weights[:0]


def no_gradient(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batch`, of rows on which the loss does not depend."""
    ids, weights = batch(step, rank + 1, ranks)
    return ids, torch.zeros_like(weights)


# What ranks read, and at which rate they learn.
READS = {
    "rows of one owner": (rows_of_one_owner, 0.5),
    "at no rate": (rows_of_one_owner, 0.0),
    "no tokens": (no_tokens, 0.5),
    "no gradient": (no_gradient, 0.5),
}


# What each process loads: the model, and its tables where they are elsewhere.
LOADS = {
    "another": [("base", None), ("another", None)],
    "tables of another": [("base", None), ("base", "another")],
    "same": [("base", None), ("same", None)],
    "tables of same": [("base", "same"), ("base", None)],
}


def load(folder: Path, name: str) -> str:
    """What is raised where a model is loaded over ranks; nothing where the rows of all ranks are those of one model."""
    model, tables = LOADS[name][dist.get_rank()]
    options = {} if tables is None else {"tables_from": str(folder / tables)}
    try:
        AutoModelForCausalLM.from_pretrained(folder / model, engram_ranks="shard", **options)
    except ValueError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def warn(path: Path, service: RowService, name: str) -> list[str]:
    """What a process is warned of in its first steps."""
    make, lr = READS[name]
    table, exchange = open_table(path, "host", "float64", service), RowExchange()
    updates = RowUpdates("table", table, RowSGD(), exchange=exchange)
    task = Task(table).train()
    exchange.add(table)
    exchange.follow(task, [task.scale])
    optimizer = EngramOptimizer([], {"table": updates}, lr, 1.0, patience=PATIENCE)
    service.meet()
    found, logger = [], logging.getLogger(EngramOptimizer.__module__)
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    for step in range(PATIENCE):
        task(*make(10 * step, dist.get_rank(), RANKS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    logger.removeHandler(handler)
    service.meet()
    return found


def run(rank: int, out: Path) -> None:
    join(rank, RANKS, out / "store")
    service = start_ranks()
    result = {name: warn(out / "table.safetensors", service, name) for name in READS}
    result |= {name: load(out, name) for name in LOADS}
    torch.save(result, out / f"result{rank}.pt")
    # A fork ends without the handlers by which a rank goes on answering.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_table(folder / "table.safetensors", "float64")
    for seed, name in ((0, "base"), (0, "same"), (1, "another")):
        tiny_model(tiny_config(), seed).save_pretrained(folder / name)
    # A fork has imported everything already.
    start_processes(run, (folder,), nprocs=RANKS, start_method="fork")

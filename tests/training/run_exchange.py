"""Two processes whose losses touch different tables. Not a test: `test_row_exchange.py` starts it and compares."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from tiny import tiny_config, tiny_ids, tiny_model
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from engram_hf import engram_optimizers


STEPS, PARTS = 3, 2


class Task(nn.Module):
    """A model under a loss that reads its tables, or one that does not."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model(tiny_config(engram_table_dtype="float64")).double().train()
        self.model.set_experts_implementation("eager")

    def forward(self, ids: torch.Tensor, reads_tables: bool) -> torch.Tensor:
        if reads_tables:
            return self.model(input_ids=ids, labels=ids).loss
        return self.model.lm_head(self.model.model.embed_tokens(ids)).square().mean()


def reads(way: str, rank: int, step: int, part: int) -> bool:
    """Whose loss reads the tables. `turns`: of a step's parts the first process has one, the second the other."""
    return {"one": rank == 0, "none": False, "turns": part == rank, "both": True}[way if step else "one"]


def optimizer_of(task: Task, folder: Path):
    args = TrainingArguments(str(folder), learning_rate=0.05, optim="sgd", report_to=[], use_cpu=True)
    factory, options = engram_optimizers(args, "sgd")
    return factory()(task, **options)


def train(task: Task, optimizer, way: str, rank: int | None) -> list[float]:
    """The norms that gradients were clipped by; rank None does what both processes do together."""
    distributed = None
    if rank is not None:
        distributed = DistributedDataParallel(task, find_unused_parameters=True)
    norms = []
    for step in range(STEPS):
        for part in range(PARTS):
            is_last = part == PARTS - 1
            GradientState()._set_sync_gradients(is_last or rank is None)
            waits = nullcontext() if is_last or distributed is None else distributed.no_sync()
            with waits:
                for each in (0, 1) if rank is None else (rank,):
                    ids = tiny_ids(2, 9, seed=100 * step + 10 * part + each)
                    loss = (distributed or task)(ids, reads(way, each, step, part)) / PARTS
                    (loss / 2 if rank is None else loss).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run(rank: int, out: Path, way: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # By these, accelerate knows that there are two processes.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    task = Task()
    norms = train(task, optimizer_of(task, out / "run"), way, rank)
    torch.save((norms, task.state_dict()), out / f"result{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(run, (Path(sys.argv[1]), sys.argv[2]), nprocs=2, start_method="spawn")

"""Two processes save a model that trains a patch. Not a test: `test_saving_on_ranks.py` reads what is left."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch.multiprocessing import start_processes

from engram_hf.training.trained_rows import TrainedRows


def model_that_trains(seed: int):
    """A model whose run has moved rows of a patch."""
    model, generator = tiny_model(), torch.Generator().manual_seed(seed)
    rows = {name: TrainedRows("alice", table) for name, table in model.named_tables().items()}
    model.begin_patch_training("alice", rows)
    for each in rows.values():
        each.write(torch.arange(3, 40, 4), torch.randn(10, 8, generator=generator))
    return model


def save(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    for seed in (0, 1):
        # The second save finds the patch of the first one.
        model_that_trains(seed).save_pretrained(out / "model")
        dist.barrier()
        if rank == 0:
            (out / "model" / "patch.safetensors").rename(out / f"{seed}.safetensors")
        dist.barrier()
    model_that_trains(2).save_pretrained(out / "model")
    tiny_model().save_pretrained(out / "plain")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(save, (Path(sys.argv[1]),), nprocs=2, start_method="fork")

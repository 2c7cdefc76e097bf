"""How a process of a test joins the others, as torchrun would have it."""

import os
from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, ranks: int, store: Path) -> None:
    """Be one process of several on this machine, with one thread, over gloo.

    Args:
        rank: of this process.
        ranks: how many there are.
        store: a file by which they find each other; it does not exist yet.
    """
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

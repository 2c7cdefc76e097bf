"""Gradients of rows between processes: each sends the rows its batch touched, and all end with the same mean.

The seam for tables that are shared out over processes: who holds a row could be asked here instead.
"""

import torch
import torch.distributed as dist
from accelerate.state import GradientState

from ..modeling.table_gradients import sum_rows


def exchange_rows(keys: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over all processes of the gradients of rows, as DistributedDataParallel makes of dense ones.

    While gradients are accumulated (accelerate's `no_sync`) each process keeps its own.

    Args:
        keys: (n,) int64, ascending and distinct.
        gradients: (n, width); n may differ between processes.

    Returns:
        (m,) and (m, width): all rows that any process touched, the same on every process.
    """
    if not GradientState().sync_gradients or not dist.is_initialized():
        return keys, gradients
    distinct, summed = sum_rows(torch.cat(gather_padded(keys)), torch.cat(gather_padded(gradients)))
    return distinct, summed / dist.get_world_size()


def gather_padded(values: torch.Tensor) -> list[torch.Tensor]:
    """The values of each process, (n, ...) with n of its own; they travel padded to the largest n.

    They may be on any device, and come back there: NCCL sends from GPUs only.
    """
    world, device = dist.get_world_size(), device_of_collectives()
    sent = values.to(device)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(sent)], device=device))
    padded = sent.new_zeros((max(int(count) for count in counts), *sent.shape[1:]))
    padded[: len(sent)] = sent
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return [each[: int(count)].to(values.device) for each, count in zip(gathered, counts)]


def device_of_collectives() -> torch.device:
    """Where tensors must be to be sent: on this process's accelerator, or on the CPU with gloo and MPI."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend() in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())

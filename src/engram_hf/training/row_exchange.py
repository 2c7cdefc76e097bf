"""Gradients of rows between processes: each sends the rows that its batch touched, and all end with the same mean.

DistributedDataParallel does the same for dense gradients. Rows are exchanged once at the end of every backward, before
gradients are clipped, by all processes: also by one whose loss has touched no table.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn
from torch.autograd import Variable

from ..modeling.table_gradients import RowGradients, sum_rows


class RowExchange:
    """Exchanges the rows of all tables of a model, in a process group of its own.

    While gradients are accumulated (accelerate's `no_sync`), each process keeps its own. What has been exchanged may be
    exchanged again with more: the mean of equal gradients is what they are.
    """

    def __init__(self):
        self.group = dist.new_group()
        self.tables: list[RowGradients] = []
        self._is_expected = False
        self._hooks: list[Any] = []

    def add(self, gradients: RowGradients) -> None:
        """Exchange the rows of one more table. All processes add the same tables in the same order."""
        self.tables.append(gradients)

    def follow(self, model: nn.Module, dense: Sequence[nn.Parameter]) -> None:
        """Take part in every backward of this model.

        A process that has no gradient of rows knows of a backward by the outputs of the model, or by a dense gradient.
        The outputs come first, in the outermost backward: with reentrant checkpointing, others run inside of it.
        """
        self._hooks.append(model.register_forward_hook(self._follow_outputs))
        if dense:
            self._hooks.append(torch.autograd.graph.register_multi_grad_hook(dense, self._expect_with, mode="any"))

    @torch.compiler.disable
    def _follow_outputs(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            # A backward that was broken off has not come to its end.
            self._is_expected = False
            for tensor in tensors_of(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(self._expect_with)

    def _expect_with(self, gradient: torch.Tensor) -> None:
        self.expect()

    def expect(self) -> None:
        """Inside a backward: exchange rows when it ends."""
        if not self._is_expected:
            self._is_expected = True
            Variable._execution_engine.queue_callback(self.exchange)

    @torch.no_grad()
    def exchange(self) -> None:
        """Make the mean over all processes of the gradients of rows."""
        self._is_expected = False
        # A later run over the same model brings an exchange of its own.
        tables = [each for each in self.tables if each.exchange is self]
        if not tables or not GradientState().sync_gradients:
            return
        held = [each.rows or none_of(each) for each in tables]
        device = device_of_collectives(self.group)
        own = torch.tensor([len(row_ids) for row_ids, _ in held], device=device)
        counts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(counts, own, group=self.group)
        of_tables = torch.stack(counts, dim=1).tolist()  # (tables, processes)
        for each, (row_ids, gradients), of_processes in zip(tables, held, of_tables, strict=True):
            if any(of_processes):
                all_ids = torch.cat(gather(row_ids, of_processes, self.group))
                summed = sum_rows(all_ids, torch.cat(gather(gradients, of_processes, self.group)))
                each.replace(summed[0], summed[1] / len(of_processes))


def none_of(gradients: RowGradients) -> tuple[torch.Tensor, torch.Tensor]:
    """No rows, of the type and width of a table's gradients."""
    row_ids = torch.zeros(0, dtype=torch.int64, device=gradients.norm.device)
    return row_ids, gradients.norm.new_zeros(0, gradients.row_width)


def tensors_of(outputs: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a model returns."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, Mapping | list | tuple):
        for each in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from tensors_of(each)


def gather_padded(values: torch.Tensor) -> list[torch.Tensor]:
    """The values of each process, (n, ...) with n of its own."""
    counts = [torch.zeros(1, dtype=torch.int64, device=device_of_collectives()) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(values)], device=counts[0].device))
    return gather(values, [int(count) for count in counts])


def gather(values: torch.Tensor, counts: Sequence[int], group: Any = None) -> list[torch.Tensor]:
    """The values of each process, (n, ...) with n of its own; they travel padded to the largest n.

    They may be on any device, and come back there: NCCL sends from GPUs only.

    Args:
        values: of this process.
        counts: n of each process.
        group: of processes; None for all.
    """
    sent = values.to(device_of_collectives(group))
    padded = sent.new_zeros((max(counts), *sent.shape[1:]))
    padded[: len(sent)] = sent
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [each[:count].to(values.device) for each, count in zip(gathered, counts, strict=True)]


def device_of_collectives(group: Any = None) -> torch.device:
    """Where tensors must be to be sent: on this process's accelerator, or on the CPU with gloo and MPI."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())

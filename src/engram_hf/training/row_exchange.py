"""Gradients of rows between processes: each row has one owner, which gets its gradients from all and takes their mean.

DistributedDataParallel does the same for dense gradients. Rows are exchanged once at the end of every backward, before
gradients are clipped, by all processes: also by one whose loss has touched no table. Where every process holds whole
tables, the owners send the means to all of them; where a table is cut over ranks, the owner alone holds the row.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn
from torch.autograd import Variable

from ..modeling.table import EngramTable
from ..modeling.table_cut import RowCut
from ..modeling.table_gradients import RowGradients, Rows, sum_rows
from ..modeling.table_ranks import timeout_of_run
from .row_naming import find_named, list_rows, name_rows


class RowExchange:
    """Exchanges the rows of all tables of a model, in a process group of its own.

    While gradients are accumulated (accelerate's `no_sync`), each process keeps its own. What has been exchanged may be
    exchanged again with more: the mean of equal gradients is what they are.
    """

    def __init__(self):
        # A group of its own would otherwise give up after torch's default, whatever the run allows for a save.
        self.group = dist.new_group(timeout=timeout_of_run())
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.tables: list[tuple[EngramTable, RowCut]] = []
        self._is_expected = False
        self._hooks: list[Any] = []

    def add(self, table: EngramTable) -> None:
        """Exchange the rows of one more table. All processes add the same tables in the same order."""
        if table.ranks is None:
            cut = RowCut([block.num_rows for block in table.block_records], self.ranks)
        else:
            cut = table.ranks.cut
            if self.group not in table.ranks.service.groups:
                table.ranks.service.groups.append(self.group)
        self.tables.append((table, cut))

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
        """Inside a backward: exchange rows when it ends.

        Raises:
            RuntimeError: a rank has come to its end, which the exchange needs.
        """
        if not self._is_expected:
            self._refuse_ended()
            self._is_expected = True
            Variable._execution_engine.queue_callback(self.exchange)

    def _refuse_ended(self) -> None:
        ended = {rank for table, _ in self.tables if table.ranks is not None for rank in table.ranks.service.ended}
        if ended:
            raise RuntimeError(
                f"Rank {min(ended)} has come to its end, and rank {self.rank} trains on, which takes all ranks. The "
                "output of that rank says why. Give every rank as many steps."
            )

    @torch.no_grad()
    def exchange(self) -> None:
        """Make the mean over all processes of the gradients of rows, at the owner of each row.

        Raises:
            RuntimeError: on every process, where a row has come to one that is not its owner, or a lookup of some
                process has failed.
        """
        self._is_expected = False
        # A later run over the same model brings an exchange of its own.
        tables = [(table, cut) for table, cut in self.tables if table.row_gradients.exchange is self]
        for table, _ in tables:
            if table.ranks is not None:
                table.ranks.kept = []
        if not tables or not GradientState().sync_gradients:
            return
        owned, are_given, failure = self._to_owners(tables)
        means = [(row_ids, gradients / self.ranks) for row_ids, gradients in owned]
        measures = self._measure(means, are_given, failure)
        for (table, _), mean, (largest, norm, are_any) in zip(tables, means, measures, strict=True):
            # Of any process: what follows is done by all of them, or by none.
            if not are_any:
                continue
            if table.ranks is None:
                table.row_gradients.replace(*self._to_all(mean), (largest, norm))
            else:
                table.row_gradients.replace(*mean, (largest, norm), weight=self.ranks)

    def _to_owners(self, tables: Sequence[tuple[EngramTable, RowCut]]) -> tuple[list[Rows], list[bool], str | None]:
        """For each table the rows that this process owns, (n,) and (n, width), with the sums of their gradients;
        whether this process has given any of it; and what has gone wrong here."""
        device, parts, failure = device_of_collectives(self.group), [], None
        for table, cut in tables:
            row_ids, gradients = table.row_gradients.rows_to_exchange() or none_of(table.row_gradients)
            named = list_rows(cut, row_ids) if table.ranks is None else name_rows(table.ranks, row_ids.cpu())
            parts.append((named, gradients[named.order.to(gradients.device)]))
            if table.ranks is not None and table.ranks.service.failure is not None:
                failure = table.ranks.service.failure
        # (processes, tables, 3): how many rows go to a process, the check number of their ids, bytes of the message.
        heads = torch.stack([named.heads() for named, _ in parts], dim=1)
        arrived_heads = self._all_to_all(heads.to(device), [1] * self.ranks, [1] * self.ranks).cpu()
        given, _, given_nbytes = heads.unbind(-1)
        taken, checks, taken_nbytes = arrived_heads.unbind(-1)
        texts = [[message.to(device) for message in named.messages] for named, _ in parts]
        messages = self._exchange_bytes(texts, given_nbytes, taken_nbytes)
        nbytes = torch.tensor([each[1].shape[1] * each[1].element_size() for each in parts])
        content = self._exchange_bytes(
            [
                each[1].contiguous().view(torch.uint8).flatten().split((given[:, number] * nbytes[number]).tolist())
                for number, each in enumerate(parts)
            ],
            given * nbytes,
            taken * nbytes,
        )
        owned: list[Rows] = []
        for number, (table, cut) in enumerate(tables):
            gradients = parts[number][1]
            found = [
                self._find(table, cut, process, of_process[number].cpu(), check)
                for process, (of_process, check) in enumerate(zip(messages, checks[:, number].tolist(), strict=True))
            ]
            counts = [-1 if each is None else len(each) for each in found]
            are_right = counts == taken[:, number].tolist()
            if not are_right:
                failure = (
                    f"Rows of another rank have come to rank {self.rank}: the ranks cut a table differently, or the "
                    "network has mixed messages up. Load the same checkpoint on every rank."
                )
            known = [each for each in found if each is not None] if are_right else []
            row_ids = torch.cat([cut.to_table(each, self.rank) for each in known] or [checks.new_zeros(0)])
            arrived = torch.cat([each[number] for each in content])[: None if are_right else 0].to(gradients.device)
            rows = arrived.view(gradients.dtype).view(-1, gradients.shape[1])
            owned.append(sum_rows(row_ids.to(gradients.device), rows))
        return owned, given.any(0).tolist(), failure

    def _find(
        self, table: EngramTable, cut: RowCut, process: int, message: torch.Tensor, check: int
    ) -> torch.Tensor | None:
        """Held ids, (n,), of the rows that a process has sent gradients of; None where it meant other rows."""
        if table.ranks is None:
            return cut.find_packed(message, check, self.rank)
        return find_named(table.ranks, process, message, check)

    def _exchange_bytes(
        self, of_tables: Sequence[Sequence[torch.Tensor]], given: torch.Tensor, taken: torch.Tensor
    ) -> list[tuple[torch.Tensor, ...]]:
        """Send bytes to all processes, and get those of each of them for each table.

        Args:
            of_tables: for each table, and each process, what goes there.
            given, taken: (processes, tables) bytes of what goes, and of what comes.
        """
        # To each process what it gets of all tables.
        sent = torch.cat([each for of_process in zip(*of_tables) for each in of_process])
        device = device_of_collectives(self.group)
        arrived = self._all_to_all(sent.to(device), given.sum(1).tolist(), taken.sum(1).tolist())
        of_processes = arrived.split(taken.sum(1).tolist())
        return [each.split(of_table) for each, of_table in zip(of_processes, taken.tolist())]

    def _all_to_all(self, sent: torch.Tensor, given: list[int], taken: list[int]) -> torch.Tensor:
        received = sent.new_empty((sum(taken), *sent.shape[1:]))
        dist.all_to_all_single(received, sent, taken, given, group=self.group)
        return received

    def _measure(
        self, means: Sequence[Rows], are_given: Sequence[bool], failure: str | None
    ) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
        """For each table the largest number in the gradients of all processes' rows, their norm, and whether any
        process has given rows.

        Every process adds the same parts in the same order, so all have the same bits.
        """
        own = torch.zeros(len(means) + 1, 3, dtype=torch.float64, device=device_of_collectives(self.group))
        for number, (_, gradients) in enumerate(means):
            if gradients.numel():
                norm = torch.linalg.vector_norm(torch.linalg.vector_norm(gradients, dim=-1))
                own[number, :2] = torch.stack([torch.maximum(gradients.amax(), -gradients.amin()), norm.square()])
            own[number, 2] = are_given[number]
        own[-1] = failure is not None
        all_measures = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(all_measures, own, group=self.group)
        if any(bool(each[-1, 0]) for each in all_measures):
            others = [rank for rank, each in enumerate(all_measures) if each[-1, 0]]
            raise RuntimeError(failure or f"Rank {others[0]} has failed to exchange rows; its own message says why.")
        stacked = torch.stack(all_measures)
        return [
            (of_table[:, 0].amax(), of_table[:, 1].sum().sqrt(), bool(of_table[:, 2].any()))
            for of_table in stacked.unbind(1)[:-1]
        ]

    def _to_all(self, mean: Rows) -> Rows:
        """The rows of every owner, in the order of their row ids."""
        counts = [
            torch.zeros(1, dtype=torch.int64, device=device_of_collectives(self.group)) for _ in range(self.ranks)
        ]
        dist.all_gather(counts, torch.tensor([len(mean[0])], device=counts[0].device), group=self.group)
        of_processes = [int(each) for each in counts]
        row_ids, order = torch.cat(gather(mean[0], of_processes, self.group)).sort()
        return row_ids, torch.cat(gather(mean[1], of_processes, self.group))[order]


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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())

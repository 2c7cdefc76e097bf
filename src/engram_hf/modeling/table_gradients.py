"""Gradients of single rows: what a backward leaves behind for a table that is trained row by row.

A lookup takes the distinct rows that it needs as a leaf of the graph. So their gradient has as many rows as the batch
touched, wherever the table lives. It is counted in the backward, so a forward that is made again (gradient
checkpointing) counts once. This file knows row ids; it knows nothing of blocks, tiers or optimizers.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging


# A few steps are skipped where a loss scale is too large.
UNUSED_BEFORE_WARNING = 5

logger = logging.get_logger(__name__)
Rows = tuple[torch.Tensor, torch.Tensor]
# Far below any gradient that is clipped, and exact in every floating type: what it is scaled by can be read from it.
UNIT = 2.0**-60


class Exchange(Protocol):
    """Makes the rows of all processes out of those of each one (training/row_exchange.py)."""

    def expect(self) -> None:
        """Called inside a backward that has left gradients of rows."""


class Grouping(NamedTuple):
    """Which of n row ids are equal.

    distinct: (m,) int64, ascending.
    back: (n,) int64, where each row id is in `distinct`.
    order: (n,) int64, the places of the row ids, those of equal ones together and in their order.
    starts: (m,) int64, where in `order` those of a distinct row id begin.
    """

    distinct: torch.Tensor
    back: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device) -> "Grouping":
        if self.order.device == device:
            return self
        # One copy instead of four.
        return Grouping(*torch.cat(self).to(device).split([len(tensor) for tensor in self]))

    def sum(self, gradients: torch.Tensor) -> torch.Tensor:
        """(n, width) to (m, width): the gradients of equal row ids added up, in their order.

        Each distinct row id is one bag: that kernel is nine times as fast as the backward of an embedding.
        """
        return F.embedding_bag(self.order, gradients, self.starts, mode="sum")


def group(row_ids: torch.Tensor) -> Grouping:
    """Sort row ids, (n,) int64, once for all that follows from it."""
    ascending, order = row_ids.sort(stable=True)
    begins = torch.ones_like(ascending, dtype=torch.bool)
    torch.ne(ascending[1:], ascending[:-1], out=begins[1:])
    starts = begins.nonzero().flatten()
    back = torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)
    return Grouping(ascending[starts], back, order, starts)


def sum_rows(row_ids: torch.Tensor, gradients: torch.Tensor) -> Rows:
    """Add the gradients of equal row ids up: (n,) and (n, width) to (m,), ascending, and (m, width)."""
    groups = group(row_ids)
    return groups.distinct, groups.sum(gradients)


class RowsOfLookups(torch.autograd.Function):
    """(m, width) distinct rows to (n, width) rows of lookups, and gradients back."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, groups: Grouping) -> torch.Tensor:
        ctx.groups = groups
        return rows.index_select(0, groups.back)

    @staticmethod
    def backward(ctx, gradients: torch.Tensor):
        return ctx.groups.sum(gradients), None


class RowGradients(nn.Module):
    """What the backwards since the last step have left behind for one table.

    norm: a small parameter that stands for all rows where gradients are clipped or unscaled. Its gradient is the
        largest number in the gradients of rows, what else their norm is made of, and a constant. From what becomes of
        these three, `take` knows what the gradients of rows are to be scaled by and clamped to. (After clipping by
        value it no longer has their norm, so clip by norm first.) It is always there, so that copies of a model have
        the same parameters; no checkpoint holds it.
    exchange: is told of gradients; None where there is one process.
    """

    norm: nn.Parameter

    def __init__(self):
        super().__init__()
        # Not registered as others are: accelerate's `init_empty_weights` would leave it without memory, and no
        # checkpoint would bring it back.
        self._parameters["norm"] = nn.Parameter(torch.zeros(3, dtype=torch.float32, device="cpu"), requires_grad=False)
        self.is_collecting = False
        self.exchange: Exchange | None = None
        self.row_width = 0
        self._rows: Rows | None = None
        # What rows that have been exchanged count for where they are exchanged again.
        self._weight = 1
        # (n,), of each row.
        self._norms = torch.zeros(0, device="cpu")
        # What the gradient of `norm` was set to.
        self._measured = torch.zeros(3, device="cpu")
        self._unused = 0

    def begin(self, device: torch.device, dtype: torch.dtype, row_width: int) -> None:
        """Collect gradients from now on.

        Args:
            device, dtype: of the gradients.
            row_width: numbers in a row.
        """
        self.norm.data = self.norm.data.to(device, dtype)
        self.norm.requires_grad_(True)
        self.is_collecting, self.row_width = True, row_width

    def look_up(
        self, rows: torch.Tensor, groups: Grouping, are_trained: torch.Tensor | None, is_trainable: bool
    ) -> torch.Tensor:
        """The rows of n lookups, whose graph begins at the distinct rows.

        Args:
            rows: (m, width) the distinct rows, float32 or wider, on the device that computes.
            groups: which lookup reads which of them.
            are_trained: (m,) bool, which rows are not frozen; None for all.
            is_trainable: whether any row of the table is trained.

        Returns:
            (n, width).
        """
        if is_trainable:
            rows.requires_grad_()
            self._follow(rows, groups.distinct, are_trained)
        return RowsOfLookups.apply(rows, groups.to(rows.device))

    def _follow(self, leaf: torch.Tensor, row_ids: torch.Tensor, are_trained: torch.Tensor | None) -> None:
        """Take over the gradient of a leaf when the backward has made it."""

        def arrived(leaf: torch.Tensor) -> None:
            if leaf.grad is not None:
                if are_trained is None:
                    self._add(row_ids, leaf.grad)
                else:
                    self._add(row_ids[are_trained], leaf.grad[are_trained.to(leaf.device)])
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(arrived)

    @torch.no_grad()
    def _add(self, row_ids: torch.Tensor, gradients: torch.Tensor) -> None:
        row_ids = row_ids.to(gradients.device)
        earlier = self.rows
        if earlier is not None:
            kept_ids, kept = earlier[0], self._as_scaled(earlier[1]) * self._weight
            row_ids, gradients = sum_rows(torch.cat([kept_ids, row_ids]), torch.cat([kept, gradients]))
        elif self._rows is not None:
            self._count_unused()
        self.replace(row_ids, gradients)
        if self.exchange is not None:
            self.exchange.expect()

    @property
    def rows(self) -> Rows | None:
        """Row ids and gradients as the backwards have left them; None where there are none or they were cleared.

        Whoever sets the gradients of a model to None or to zero (`zero_grad`) means these too.
        """
        is_cleared = self.norm.grad is None or not bool(self.norm.grad[2])
        return None if is_cleared else self._rows

    def are_nonzero(self) -> bool:
        """Whether any row of the table, on any rank, has a gradient other than zero."""
        return self.rows is not None and bool(self._measured[0] != 0)

    def rows_to_exchange(self) -> Rows | None:
        """As `rows`, before processes make a mean of them."""
        rows = self.rows
        return rows if rows is None or self._weight == 1 else (rows[0], rows[1] * self._weight)

    @torch.no_grad()
    def replace(
        self,
        row_ids: torch.Tensor,
        gradients: torch.Tensor,
        measure: tuple[torch.Tensor, torch.Tensor] | None = None,
        weight: int = 1,
    ) -> None:
        """Set the rows and their gradients.

        Args:
            row_ids: (n,) int64, ascending and distinct.
            gradients: (n, row width).
            measure: the largest number in the gradients of all ranks, and their norm; None where these rows are all.
            weight: what they count for where they are exchanged again; above 1 where one rank of so many has them.
        """
        self._rows, self._weight = (row_ids, gradients), weight
        self._norms = torch.linalg.vector_norm(gradients, dim=-1)
        norm = torch.linalg.vector_norm(self._norms)
        # The norm of order infinity takes fifty times as long on a CPU.
        is_any = bool(gradients.numel())
        largest = torch.maximum(gradients.amax(), -gradients.amin()) if is_any else torch.zeros_like(norm)
        if measure is not None:
            largest, norm = (each.to(norm) for each in measure)
        rest = (norm.square() - largest.square()).clamp_min(0).sqrt()
        self._measured = torch.stack([largest, rest, torch.full_like(norm, UNIT)]).to(self.norm)
        self.norm.grad = self._measured.clone()

    def take(self) -> Rows | None:
        """The rows and their gradients, clipped and unscaled as `norm` was; None where no backward came by.

        Returns:
            (n,) int64, ascending and distinct, and (n, width) in the type of the leaves.
        """
        rows, self._rows = self.rows, None
        if rows is None or self.norm.grad is None:
            return None
        self._unused = 0
        row_ids, gradients = rows[0], self._as_scaled(rows[1])
        # Rows that only padding reads, for one, have a gradient of zero: no step moves them.
        has_any = self._norms != 0
        return (row_ids, gradients) if has_any.all() else (row_ids[has_any], gradients[has_any])

    def _as_scaled(self, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients of rows after what has become of that of `norm` since they were measured."""
        if self.norm.grad is None:
            return gradients
        largest, _, unit = self.norm.grad.tolist()
        scale = unit / UNIT
        if scale != 1:
            gradients = gradients * scale
        if largest < float(self._measured[0]) * scale * (1 - 1e-5):
            # Clipped by value.
            gradients = gradients.clamp(-largest, largest)
        return gradients

    def _count_unused(self) -> None:
        self._unused += 1
        if self._unused == UNUSED_BEFORE_WARNING:
            logger.warning(
                f"Gradients of a table's rows were made and cleared {self._unused} times, and no step has used them: "
                "the table is set up for row updates, and the optimizer of this run does not make them. Give Trainer "
                "optimizer_cls_and_kwargs=engram_optimizers(args), or load the model again to train it otherwise."
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Nothing of this is part of a checkpoint."""

    def _load_from_state_dict(self, *args):
        """Nothing of this is part of a checkpoint."""

    def __deepcopy__(self, memo):
        return RowGradients()

    def __reduce__(self):
        return RowGradients, ()

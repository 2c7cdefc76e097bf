"""Gradients of single rows: what a backward leaves behind of a table that is trained row by row.

A lookup takes the distinct rows it needs as a leaf of the graph, so their gradient has as many rows as the batch
touched, wherever the table lives. It is counted in the backward: a forward that is made again (gradient checkpointing)
counts once. Knows rows by their number in the table; nothing of blocks, tiers or optimizers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging


# A few steps are skipped where a loss scale is too large.
UNUSED_BEFORE_WARNING = 5

logger = logging.get_logger(__name__)
Rows = tuple[torch.Tensor, torch.Tensor]


class Grouping(NamedTuple):
    """Which of n keys are equal.

    distinct: (m,) int64, ascending.
    back: (n,) int64, where each key is in `distinct`.
    order: (n,) int64, the keys' places, those of equal keys together and in their order.
    starts: (m,) int64, where in `order` those of a distinct key begin.
    """

    distinct: torch.Tensor
    back: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device) -> "Grouping":
        return Grouping(*(tensor.to(device) for tensor in self))

    def sum(self, gradients: torch.Tensor) -> torch.Tensor:
        """(n, width) to (m, width): the gradients of equal keys added up, in their order.

        As one bag per distinct key: a kernel nine times as fast as the one of embedding's own backward.
        """
        return F.embedding_bag(self.order, gradients, self.starts, mode="sum")


def group(keys: torch.Tensor) -> Grouping:
    """Sort keys, (n,) int64, once for all that follows from it."""
    ascending, order = keys.sort(stable=True)
    begins = torch.ones_like(ascending, dtype=torch.bool)
    torch.ne(ascending[1:], ascending[:-1], out=begins[1:])
    starts = begins.nonzero().flatten()
    back = torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)
    return Grouping(ascending[starts], back, order, starts)


def sum_rows(keys: torch.Tensor, gradients: torch.Tensor) -> Rows:
    """Add the gradients of equal keys up: (n,) and (n, width) to (m,), ascending, and (m, width)."""
    groups = group(keys)
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


class RowGradients:
    """What the backwards since the last step have left behind for one table.

    norm: a parameter of one number that stands for all rows where gradients are clipped or unscaled: its gradient is
        the norm of theirs, and what it is scaled by they are scaled by when they are taken.
    exchange: makes the rows of all processes out of those of this one; None where there is one process.
    """

    def __init__(self):
        self.norm = nn.Parameter(torch.zeros(()))
        self.exchange: Callable[[torch.Tensor, torch.Tensor], Rows] | None = None
        self._rows: Rows | None = None
        # (n,), of each row, and of all of them.
        self._norms = torch.zeros(0)
        self._norm_of_rows = torch.zeros(())
        self._unused = 0

    def follow(self, leaf: torch.Tensor, keys: torch.Tensor, are_trained: torch.Tensor | None = None) -> None:
        """Take over the gradient of a leaf when the backward has made it.

        Args:
            leaf: (n, width) float32 or wider, requires a gradient.
            keys: (n,) int64, ascending and distinct: the numbers of its rows in the table.
            are_trained: (n,) bool, which of them are not frozen; None for all.
        """

        def arrived(leaf: torch.Tensor) -> None:
            if leaf.grad is not None:
                if are_trained is None:
                    self._add(keys, leaf.grad)
                else:
                    self._add(keys[are_trained], leaf.grad[are_trained.to(leaf.device)])
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(arrived)

    @torch.no_grad()
    def _add(self, keys: torch.Tensor, gradients: torch.Tensor) -> None:
        keys = keys.to(gradients.device)
        # Who sets the gradients of a model to None or to zero (`zero_grad`) means these too.
        was_kept = self.norm.grad is not None and bool(self.norm.grad != 0)
        if self._rows is not None and not was_kept:
            self._count_unused()
        elif self._rows is not None:
            earlier_keys, earlier = self._rows
            keys, gradients = sum_rows(torch.cat([earlier_keys, keys]), torch.cat([earlier, gradients]))
        if self.exchange is not None:
            keys, gradients = self.exchange(keys, gradients)
        self._rows = keys, gradients
        self._norms = torch.linalg.vector_norm(gradients, dim=-1)
        norm = torch.linalg.vector_norm(self._norms).to(self.norm.device)
        self.norm.grad = norm
        self._norm_of_rows = norm.clone()

    def take(self) -> Rows | None:
        """The rows and their gradients, clipped and unscaled as `norm` was; None where no backward came by.

        Returns:
            (n,) int64, ascending and distinct, and (n, width) in the type of the leaves.
        """
        rows, self._rows = self._rows, None
        if rows is None or self.norm.grad is None or bool(self.norm.grad == 0):
            return None
        self._unused = 0
        keys, gradients = rows
        if not torch.equal(self.norm.grad, self._norm_of_rows):
            gradients = gradients * (self.norm.grad / self._norm_of_rows).to(gradients.device)
        # Read by padding alone, for one: a step without a gradient is none.
        has_any = self._norms != 0
        return (keys, gradients) if has_any.all() else (keys[has_any], gradients[has_any])

    def _count_unused(self) -> None:
        self._unused += 1
        if self._unused == UNUSED_BEFORE_WARNING:
            logger.warning(
                f"Gradients of a table's rows were made and cleared {self._unused} times, and no step has used them: "
                "the table is set up for row updates, and the optimizer of this run does not make them. Give Trainer "
                "optimizer_cls_and_kwargs=engram_optimizers(args), or load the model anew to train it otherwise."
            )

    def __deepcopy__(self, memo):
        return RowGradients()

    def __reduce__(self):
        return RowGradients, ()

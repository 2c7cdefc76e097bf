"""How a row moves when its gradient arrives: the rules of the row optimizers, on rows that have been gathered.

A row that a step does not touch stays as it is, and so does its state: no decay and no momentum reaches it, and its
bias correction counts the steps that touched it. Each row is trained as if it were a parameter of its own that has no
gradient in the other steps. Where every step touches every row, a rule equals the dense optimizer of its name.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch


# Numbers that are drawn at a time on a CPU.
MIXED_AT_ONCE = 2**15


@dataclass(frozen=True)
class RowRule:
    """A rule, and the state that it keeps.

    wide: names of state with one number per weight.
    narrow: names of state with one number per row, always float32 or wider.
    """

    wide: ClassVar[tuple[str, ...]] = ()
    narrow: ClassVar[tuple[str, ...]] = ()

    def update(self, rows: torch.Tensor, gradients: torch.Tensor, state: dict[str, torch.Tensor], lr: float) -> None:
        """Move rows and their state, in place.

        Args:
            rows, gradients: (n, width) float32.
            state: (n, width) per wide and (n, 1) per narrow name, float32; zeros before a row's first step.
            lr: learning rate.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RowAdam(RowRule):
    """Adam (arXiv 1412.6980) without weight decay; two numbers of state per weight. The paper's rule for tables."""

    wide = ("exp_avg", "exp_avg_sq")
    narrow = ("steps",)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def update(self, rows, gradients, state, lr):
        first, second = self.betas
        state["steps"].add_(1)
        state["exp_avg"].lerp_(gradients, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradients, gradients, value=1 - second)
        size = state["exp_avg_sq"].sqrt().div_(bias_correction(second, state["steps"]).sqrt_()).add_(self.eps)
        rows.sub_(state["exp_avg"].div(size).mul_(lr / bias_correction(first, state["steps"])))


@dataclass(frozen=True)
class RowwiseAdam(RowRule):
    """Adam with one second moment per row, the mean over its width; one number of state per weight."""

    wide = ("exp_avg",)
    narrow = ("exp_avg_sq", "steps")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def update(self, rows, gradients, state, lr):
        first, second = self.betas
        state["steps"].add_(1)
        state["exp_avg"].lerp_(gradients, 1 - first)
        state["exp_avg_sq"].lerp_(mean_square(gradients), 1 - second)
        size = (state["exp_avg_sq"] / bias_correction(second, state["steps"])).sqrt_().add_(self.eps)
        rows.addcmul_(state["exp_avg"], lr / bias_correction(first, state["steps"]) / size, value=-1)


@dataclass(frozen=True)
class RowwiseAdagrad(RowRule):
    """Adagrad whose sum of squares is one number per row, the mean over its width; next to no state. As in DLRM."""

    narrow = ("sum",)
    eps: float = 1e-10

    def update(self, rows, gradients, state, lr):
        state["sum"].add_(mean_square(gradients))
        rows.addcmul_(gradients, lr / (state["sum"].sqrt() + self.eps), value=-1)


@dataclass(frozen=True)
class RowSGD(RowRule):
    """Stochastic gradient descent with momentum, as torch's; one number of state per weight."""

    wide = ("momentum_buffer",)
    momentum: float = 0.9

    def update(self, rows, gradients, state, lr):
        state["momentum_buffer"].mul_(self.momentum).add_(gradients)
        rows.sub_(state["momentum_buffer"], alpha=lr)


def bias_correction(beta: float, steps: torch.Tensor) -> torch.Tensor:
    """1 - beta**steps, (n, 1) to (n, 1). float32 would lose four digits of it in the first steps."""
    return (1 - beta ** steps.double()).to(steps.dtype)


def mean_square(gradients: torch.Tensor) -> torch.Tensor:
    """(n, width) to (n, 1)."""
    return torch.linalg.vector_norm(gradients, dim=-1, keepdim=True).square_().div_(gradients.shape[-1])


def draws_of_rows(row_ids: torch.Tensor, width: int, stream: int) -> torch.Tensor:
    """Numbers in [0, 1) for rows, (n,) int64 to (n, width) float32, that follow from row id, column and stream alone.

    The finalizer of MurmurHash3 (Appleby, public domain) mixes a key of the row with one of the column.

    Args:
        row_ids: (n,) of the table.
        width: numbers for each row.
        stream: below 2**32; another one gives other numbers.
    """
    columns = _mixed(torch.arange(width, dtype=torch.int32, device=row_ids.device) + 1)
    # A table may have more rows than an int32 has numbers.
    low, high = (_as_int32(part) for part in (row_ids & 0xFFFFFFFF, row_ids >> 32))
    rows = _mixed(_mixed(low ^ _signed(stream)) + high)
    draws = torch.empty(len(rows), width, device=rows.device)
    # As many at a time as stay in the caches of a CPU.
    at_once = MIXED_AT_ONCE // width + 1 if rows.device.type == "cpu" else max(1, len(rows))
    for part, out in zip(rows.split(at_once), draws.split(at_once)):
        torch.mul(
            _mixed(part.unsqueeze(-1) ^ columns).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF), 2.0**-24, out=out
        )
    return draws


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """int32 to int32 in place, one to one, each bit of the result from all bits of the number."""
    shifted = torch.empty_like(numbers)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        # What a shift of signed numbers brings in from above is masked out.
        torch.bitwise_right_shift(numbers, shift, out=shifted)
        numbers ^= shifted.bitwise_and_(2 ** (32 - shift) - 1)
        numbers *= _signed(factor)
    return numbers


def _signed(number: int) -> int:
    """The int32 with the bits of a number below 2**32."""
    return number - 2**32 if number >= 2**31 else number


def _as_int32(numbers: torch.Tensor) -> torch.Tensor:
    """int64 below 2**32 to the int32 with these bits."""
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, draws: torch.Tensor) -> torch.Tensor:
    """Round float32 to one of the two nearest numbers of bfloat16 or float16, the nearer one more often.

    The mean of many roundings is the number itself, so changes below half a unit are not lost.

    Args:
        values: float32.
        dtype: bfloat16 or float16.
        draws: of the shape of `values`, each in [0, 1).
    """
    near = values.to(dtype)
    error = values - near.float()
    is_outward = (error > 0) == (values > 0)
    other = (near.view(torch.int16) + 2 * is_outward.to(torch.int16) - 1).view(dtype)
    gap = (other.float() - near.float()).abs()
    return torch.where((error != 0) & (draws * gap < error.abs()), other, near)

"""How a row moves when its gradient arrives: the rules of the row optimizers, on rows that have been gathered.

A row that a step does not touch stays as it is, and so does its state: no decay and no momentum reaches it, and its
bias correction counts the steps that touched it. Each row is trained as if it were a parameter of its own that has no
gradient in the other steps. Where every step touches every row, a rule equals the dense optimizer of its name.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch


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


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round float32 to one of the two nearest numbers of bfloat16 or float16, the nearer one more often.

    The mean of many roundings is the number itself, so changes below half a unit are not lost. The generator must be on
    the device of `values`.
    """
    near = values.to(dtype)
    error = values - near.float()
    is_outward = (error > 0) == (values > 0)
    other = (near.view(torch.int16) + 2 * is_outward.to(torch.int16) - 1).view(dtype)
    gap = (other.float() - near.float()).abs()
    draw = torch.rand(values.shape, device=values.device, generator=generator)
    return torch.where((error != 0) & (draw * gap < error.abs()), other, near)

"""Balancing experts without a loss: after each step the router's correction bias is moved towards unused experts.

transformers holds the bias in DeepSeek's router and never moves it. Source: arXiv 2408.15664.
"""

from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback


class LossFreeBalancingCallback(TrainerCallback):
    """Moves `e_score_correction_bias` of every router by a fixed step: up for experts that saw less than the mean.

    The bias decides which experts are chosen, never how their outputs are weighted. It is a buffer, so a checkpoint
    has it and a resumed run goes on with it. The checkpoint of an adapter has none, so adapters are refused.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[LossFreeBalancingCallback()])
    """

    def __init__(self, update_rate: float = 1e-3):
        """
        Args:
            update_rate: step of the bias, in units of the router's sigmoid scores. The default is the paper's.
        """
        if update_rate <= 0:
            raise ValueError(f"update_rate must be above 0, got {update_rate}.")
        self.update_rate = update_rate
        # Router to how often each expert was chosen since the last step, (experts,).
        self.choices: dict[Any, torch.Tensor] = {}
        self._hooks: list = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        if hasattr(model, "peft_config"):
            raise ValueError(
                "LossFreeBalancingCallback moves the bias of routers, which an adapter does not save: loading or "
                "resuming would give another model. Leave the callback out; an adapter leaves routers as they are."
            )
        routers = [
            module
            for module in model.modules()
            if isinstance(getattr(module, "e_score_correction_bias", None), torch.Tensor)
        ]
        if not routers:
            raise ValueError(
                "LossFreeBalancingCallback found no router with a correction bias, so this model has no experts. Leave "
                "the callback out."
            )
        for router in routers:
            self.choices[router] = torch.zeros_like(router.e_score_correction_bias, dtype=torch.float32)
            self._hooks.append(router.register_forward_hook(self._count))

    def _count(self, router: nn.Module, inputs: tuple, outputs: tuple) -> None:
        if router.training:
            chosen = outputs[-1].detach().flatten()  # (tokens * experts per token,)
            counts = self.choices[router] = self.choices[router].to(chosen.device)
            counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for router, counts in self.choices.items():
            if args.world_size > 1:
                torch.distributed.all_reduce(counts)
            bias: Any = router.e_score_correction_bias
            bias += self.update_rate * torch.sign(counts.mean() - counts)
            counts.zero_()

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.choices = [], {}

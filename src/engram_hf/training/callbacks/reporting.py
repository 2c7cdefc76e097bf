"""What the callbacks of this package have in common: they find memory layers, and their figures reach every tracker."""

import gc
from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import DefaultFlowCallback, ExportableState, TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class EngramCallback(TrainerCallback, ExportableState):
    """A callback with figures, which are added to what Trainer logs of a training step.

    Its state is in `trainer_state.json` of every checkpoint, and is taken up where a run is resumed.
    """

    def state(self) -> dict:
        return {"args": self.arguments(), "attributes": self.attributes()}

    def arguments(self) -> dict[str, Any]:
        """What it was made with."""
        return {}

    def attributes(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {}

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """What is known since the last time, by the names of trackers."""

    def records(self) -> dict[str, Any]:
        """As `figures`, of things that are no numbers: only the history of the run keeps them."""
        return {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        stand_before_reporters(self)
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        if state.global_step and saved:
            for name, value in saved.get("attributes", {}).items():
                setattr(self, name, value)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Not a line of an evaluation, nor the summary at the end.
        if logs is None or "loss" not in logs:
            return
        figures = self.figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update({**figures, **self.records()})


def find_memory_layers(model: nn.Module, who: str) -> dict[int, Any]:
    """Layer id to memory layer, known by what they have.

    Raises:
        ValueError: the model has none.
    """
    found: dict[int, Any] = {
        m.layer_idx: m for m in model.modules() if isinstance(getattr(m, "table", None), nn.Module)
    }
    if not found:
        raise ValueError(
            f"{who} found no memory layer in {type(model).__name__}. It needs a model with a memory: engram_layer_ids "
            "of its config is not empty. Leave the callback out for others."
        )
    return dict(sorted(found.items()))


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_made_again() -> bool:
    """Whether this forward is made for the second time, in a backward: gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def stand_before_reporters(callback: TrainerCallback) -> None:
    """Have Trainer call a callback before the trackers, so that they see what it adds to a log line.

    Trainer calls callbacks in the order of a list that begins with its own trackers, and shows that list to no
    callback; it is looked for among what holds the callback. Where it is not found, only the history has the figures.
    """
    for holder in gc.get_referrers(callback):
        if isinstance(holder, list) and any(isinstance(each, DefaultFlowCallback) for each in holder):
            flow = next(i for i, each in enumerate(holder) if isinstance(each, DefaultFlowCallback))
            if holder.index(callback) > flow + 1:
                holder.remove(callback)
                holder.insert(flow + 1, callback)
            return
    logger.warning(f"Figures of {type(callback).__name__} reach the history of the run, and no tracker.")

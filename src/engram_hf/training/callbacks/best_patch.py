"""Keeping the best patch of a run that trains one."""

import math
from pathlib import Path
from typing import Any, cast

from accelerate.utils import extract_model_from_parallel
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import logging

from ...modeling.table_patches import write_patch


logger = logging.get_logger(__name__)


class EngramBestPatchCallback(TrainerCallback, ExportableState):
    """After each evaluation that is the best so far, writes the row patch that the run trains to a file.

    It is for runs with `engram_optimizers(args, train_as_patch="name")`. The best value comes back where a run is
    resumed.

    Example:
        >>> callback = EngramBestPatchCallback("output/best.safetensors")
        >>> optimizers = engram_optimizers(args, train_as_patch="alice")
        >>> trainer = Trainer(model, args, callbacks=[callback], optimizer_cls_and_kwargs=optimizers)
    """

    def __init__(self, target: str | Path, metric: str = "eval_loss", greater_is_better: bool = False):
        """
        Args:
            target: file of the patch.
            metric: name of the value, as the log lines of an evaluation have it.
            greater_is_better: whether a greater value is a better one.
        """
        self.target, self.metric, self.greater_is_better = Path(target), metric, greater_is_better
        self.best: float | None = None

    def state(self) -> dict[str, Any]:
        arguments = {"target": str(self.target), "metric": self.metric, "greater_is_better": self.greater_is_better}
        return {"args": arguments, "attributes": {"best": self.best}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        if state.global_step and saved:
            self.best = saved.get("attributes", {}).get("best")

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        value = (metrics or {}).get(self.metric)
        if value is None:
            raise ValueError(
                f"EngramBestPatchCallback follows {self.metric!r}, and the evaluation gave "
                f"{', '.join(sorted(metrics or {}))}. Name one of them: EngramBestPatchCallback(target, metric=...)."
            )
        if math.isnan(value):
            return
        if self.best is not None and (value <= self.best if self.greater_is_better else value >= self.best):
            return
        whole: Any = extract_model_from_parallel(cast(Any, model), keep_torch_compile=False)
        whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        patch = whole.trained_patch() if hasattr(whole, "trained_patch") else None
        if patch is None:
            raise ValueError(
                "EngramBestPatchCallback found no patch that is trained. Give Trainer "
                'optimizer_cls_and_kwargs=engram_optimizers(args, train_as_patch="name").'
            )
        self.best = float(value)
        if state.is_world_process_zero:
            patch.provenance |= {"steps": state.global_step, self.metric: self.best}
            write_patch(patch, self.target)

"""What the callbacks of this package share: they find memory layers, and report figures to history, console, trackers.

Trainer calls its trackers before the callbacks that it is given, so figures that a callback adds to a log line reach
the history of the run and the console. `report_to_trackers(trainer)` sends them to the trackers too.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import logging


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)


class EngramCallback(TrainerCallback, ExportableState):
    """A callback with figures of a training step.

    All figures are in the history of the run (`trainer.state.log_history`, `trainer_state.json`). Those in
    `on_console` are in the printed line too. The state of a callback is in every checkpoint and comes back where a run
    is resumed.
    """

    # Names of figures that the printed line has.
    on_console: tuple[str, ...] = ()
    # Set by `report_to_trackers`.
    reports_to_trackers = False

    def state(self) -> dict:
        return {"args": self.arguments(), "attributes": self.attributes()}

    def arguments(self) -> dict[str, Any]:
        """The arguments of its constructor."""
        return {}

    def attributes(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {}

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Numbers since the last log line, by the names that trackers show."""

    def records(self) -> dict[str, Any]:
        """What is no number and goes to the history alone. Called after `figures`, on every process."""
        return {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.report_to and not self.reports_to_trackers:
            logger.warning(
                f"Figures of {type(self).__name__} go to trainer.state.log_history and trainer_state.json. Call "
                "engram_hf.report_to_trackers(trainer) before trainer.train() to send them to "
                f"{' and '.join(args.report_to)} too."
            )
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        if state.global_step and saved:
            for name, value in saved.get("attributes", {}).items():
                setattr(self, name, value)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # A line of an evaluation, or the summary at the end, has no training loss.
        if logs is None or "loss" not in logs:
            return
        figures = self.figures()
        logs.update({name: figures[name] for name in self.on_console if name in figures})
        if state.log_history:
            state.log_history[-1].update({**figures, **self.records()})


class FiguresForTrackers(TrainerCallback):
    """Stands before the trackers and adds the figures of the last line of history to what they are given."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs and state.log_history:
            line = state.log_history[-1]
            logs.update({name: value for name, value in line.items() if is_figure(name, value)})


def is_figure(name: str, value: Any) -> bool:
    """Whether a tracker can show this entry of a log line as a number of ours."""
    return name.startswith("engram/") and isinstance(value, int | float)


def report_to_trackers(trainer: "Trainer") -> None:
    """Send the figures of this package's callbacks to the trackers of `report_to` too.

    Call it once, before training and after all callbacks have been added. It moves the trackers to the end of
    Trainer's callbacks, where they see what callbacks have added to a log line. The console is before them, so its
    lines stay short.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EngramGateStatisticsCallback()])
        >>> report_to_trackers(trainer)
        >>> result = trainer.train()  # doctest: +SKIP
    """
    # Trainer's integrations import libraries that are not needed to load a model.
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    trainer.pop_callback(FiguresForTrackers)
    trackers = [trainer.pop_callback(each) for each in get_reporting_integration_callbacks(trainer.args.report_to)]
    for callback in [FiguresForTrackers(), *trackers]:
        if callback is not None:
            trainer.add_callback(callback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EngramCallback):
            callback.reports_to_trackers = True


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_made_again() -> bool:
    """Whether this forward runs for the second time, inside a backward, because of gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1

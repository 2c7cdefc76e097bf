"""Curves of a training run as pictures, out of what Trainer has logged."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from .drawing import COLORS, empty_figure, save_figure, style


# Figures of a memory layer of which a card gives the last value in the log.
LAYER_FIGURE = re.compile(
    r"engram/(gate_mean|memory_share|rows_touched|ngrams_per_row|ngrams_per_row_perfect_hash)/layer_(\d+)"
)


def read_state(log_dir: str | Path) -> dict[str, Any]:
    """Trainer's state of a run's folder, or of one checkpoint, that has logged the most steps.

    Raises:
        FileNotFoundError: no `trainer_state.json` is there.
    """
    folder = Path(log_dir)
    paths = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    states = [state for path in paths if (state := _read_state(path)) is not None]
    if not states:
        raise FileNotFoundError(
            f"{folder} holds no trainer_state.json, nor does a checkpoint in it. Trainer writes it with every "
            "checkpoint, and trainer.save_state() at any time."
        )
    return max(states, key=lambda state: max((line.get("step", 0) for line in state["log_history"]), default=0))


def read_history(log_dir: str | Path) -> list[dict[str, Any]]:
    """The lines that Trainer has logged, of a run's folder or of one checkpoint.

    Raises:
        FileNotFoundError: no `trainer_state.json` is there.
    """
    return read_state(log_dir)["log_history"]


def _read_state(path: Path) -> dict[str, Any] | None:
    """None for one that a killed run has left half-written."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


class Line(NamedTuple):
    """One line of a panel.

    points: step to value.
    spread: step to the standard deviation around it.
    is_reference: whether it is what another line is to be compared with.
    """

    label: str
    points: dict[int, float]
    spread: dict[int, float] | None = None
    is_reference: bool = False


class Panel(NamedTuple):
    """What one panel shows: title, unit of its y-axis, its lines, and the range of the y-axis or "log"."""

    title: str
    unit: str
    lines: list[Line]
    scale: tuple[float | None, float | None] | str = (None, None)


# Panels below the two of the top row. A run that logs more shows the first ones.
MOST_PANELS = 4


def plot_training(log_dir: str | Path, picture: str | Path | None = None) -> Path:
    """Write the curves of a run as PNG: the loss and what the memory adds on top, and at most four panels below.

    Those below are the first four of these that were logged: how far gates open, rows that were looked up, n-grams per
    row, how far rows move, the wait for the disk, the learning rate, the norm of gradients.

    Args:
        log_dir: folder of the run, or of a checkpoint.
        picture: file to write; by default `training.png` in `log_dir`.

    Returns:
        the file.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError, ValueError: nothing was logged there.
    """
    figures = _figures(read_history(log_dir))
    top, below = _panels(figures)
    if not top and not below:
        raise ValueError(f"Nothing was logged in {log_dir}; lower logging_steps.")
    figure = empty_figure("Training", (12.5, 3.9 * bool(top) + 3.1 * bool(below) + 0.4))
    # Twelve columns hold one to four panels of one width.
    rows = [row for row in (top, below) if row]
    grid = figure.add_gridspec(len(rows), 12, height_ratios=[1.25, 1][: len(rows)])
    for number, panels in enumerate(rows):
        width = 12 // len(panels)
        for place, panel in enumerate(panels):
            _draw(figure.add_subplot(grid[number, place * width : (place + 1) * width]), panel)
    return save_figure(figure, Path(log_dir) / "training.png" if picture is None else picture)


def _draw(axis: Any, panel: Panel) -> None:
    style(axis)
    own = [line for line in panel.lines if not line.is_reference]
    for line in panel.lines:
        steps, values = list(line.points), list(line.points.values())
        if line.is_reference:
            axis.plot(steps, values, label=line.label, color="black", linestyle=":", linewidth=2)
            continue
        color = COLORS[own.index(line) % len(COLORS)]
        axis.plot(steps, values, label=line.label, color=color, marker="." if len(steps) < 30 else "")
        if line.spread:
            low = [value - line.spread.get(step, 0.0) for step, value in line.points.items()]
            high = [value + line.spread.get(step, 0.0) for step, value in line.points.items()]
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel(panel.unit)
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if isinstance(panel.scale, str):
        axis.set_yscale(panel.scale)
    else:
        axis.margins(y=0.1)
        axis.set_ylim(*panel.scale)
    axis.legend(fontsize=9)


def _figures(history: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Name of a figure to its value at each step that has one."""
    figures: dict[str, dict[int, float]] = {}
    for line in history:
        for name, value in line.items():
            if (
                not isinstance(value, bool)
                and isinstance(value, int | float)
                and math.isfinite(value)
                and "step" in line
            ):
                figures.setdefault(name, {})[line["step"]] = float(value)
    return figures


def _panels(figures: dict[str, dict[int, float]]) -> tuple[list[Panel], list[Panel]]:
    """The panels of the top row, and those below."""

    def of_layers(name: str, factor: float = 1.0) -> dict[int, Line]:
        """Layer id to the line of a figure that callbacks report for each memory layer."""
        start, found = f"engram/{name}/layer_", {}
        for key, points in figures.items():
            layer = key.removeprefix(start)
            if key.startswith(start) and layer.isdigit():
                scaled = {step: factor * value for step, value in points.items()}
                found[int(layer)] = Line(f"layer {layer}", scaled)
        return dict(sorted(found.items()))

    def alone(name: str, label: str) -> list[Line]:
        return [Line(label, figures[name])] if name in figures else []

    losses = alone("loss", "training") + alone("eval_loss", "held out")
    shares = list(of_layers("memory_share", factor=100).values())
    top = [
        Panel("Loss", "nats per token", losses),
        Panel("What the memory adds to the residual stream", "% of its norm", shares, (0, None)),
    ]
    spreads = of_layers("gate_std")
    gates = [
        Line(f"{line.label}: mean and spread", line.points, spreads[i].points if i in spreads else None)
        for i, line in of_layers("gate_mean").items()
    ]
    by_chance = of_layers("ngrams_per_row_perfect_hash").values()
    shared = list(of_layers("ngrams_per_row").values())
    for number, line in enumerate(by_chance):
        # A label that begins so is not in the legend.
        label = "_" if number else "if rows were drawn at random"
        shared.append(line._replace(label=label, is_reference=True))
    norms, moved = of_layers("row_norm"), []
    for i, line in of_layers("row_update_norm").items():
        lengths = norms[i].points if i in norms else {}
        shares_moved = {
            step: 100 * value / lengths[step] for step, value in line.points.items() if value > 0 and lengths.get(step)
        }
        moved += [line._replace(points=shares_moved)] if shares_moved else []
    touched = list(of_layers("rows_touched", factor=100).values())
    below = [
        Panel("How far the gates open", "gate, 0 shut to 1 open", gates, (0, 1)),
        Panel("Rows that were looked up so far", "% of the table", touched, (0, 103)),
        Panel("N-grams that share a row", "distinct n-grams per row read", shared, (0, None)),
        Panel("How far a row moves in a step", "% of its length", moved, "log"),
        Panel("Wait for rows on disk", "ms per step", alone("engram/prefetch_waited_ms", "wait"), (0, None)),
        Panel("Learning rate", "of the model without its tables", alone("learning_rate", "learning rate"), (0, None)),
        Panel("Length of the gradient", "before clipping", alone("grad_norm", "gradient"), (0, None)),
    ]
    return [panel for panel in top if panel.lines], [panel for panel in below if panel.lines][:MOST_PANELS]


def read_figures(log_dir: str | Path) -> dict[str, Any]:
    """Where a run ended: steps, epochs, last losses, largest learning rate, and by layer id what its memory did.

    Raises:
        FileNotFoundError: no `trainer_state.json` is there.
    """
    state = read_state(log_dir)
    lines = [
        {key: value for key, value in line.items() if isinstance(value, int | float) and math.isfinite(value)}
        for line in state["log_history"]
    ]
    last = {key: value for line in lines for key, value in line.items()}
    layers: dict[str, dict[str, float]] = {}
    for key, value in last.items():
        if (match := LAYER_FIGURE.fullmatch(key)) is not None:
            layers.setdefault(match[2], {})[match[1]] = value
    return {
        "steps": state["global_step"],
        "epochs": state.get("epoch"),
        **{name: last.get(name) for name in ("loss", "eval_loss")},
        "learning_rate": max((line.get("learning_rate", 0.0) for line in lines), default=0.0) or None,
        "layers": dict(sorted(layers.items(), key=lambda item: int(item[0]))),
    }

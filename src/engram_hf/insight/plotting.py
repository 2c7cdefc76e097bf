"""Curves of a training run as pictures, out of what Trainer has logged."""

import json
import math
import re
from pathlib import Path
from typing import Any


# What is told of a memory layer without its curve: the last value in the log.
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


def plot_training(log_dir: str | Path, picture: str | Path | None = None) -> Path:
    """Write the curves of a run as PNG: loss, learning rate, and whatever begins with `engram/`.

    Args:
        log_dir: folder of the run, or of a checkpoint.
        picture: file to write; by default `training.png` in `log_dir`.

    Returns:
        the file.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError, ValueError: nothing was logged there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves need matplotlib: pip install 'engram-hf[bench]'.") from error
    curves = _curves(read_history(log_dir))
    if not curves:
        raise ValueError(f"Nothing was logged in {log_dir}; lower logging_steps.")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, curves.items()):
        for label, points in lines.items():
            axis.plot(*zip(*points), label=label, marker="." if len(points) < 30 else "")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    for axis in axes[len(curves) :]:
        axis.remove()
    path = Path(picture) if picture is not None else Path(log_dir) / "training.png"
    figure.savefig(path, dpi=110)
    return path


def _curves(history: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title to label to points: losses in one picture, what differs only by layer in one."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in history:
        for key, value in line.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or "/stream_" in key:
                continue
            if key in ("loss", "eval_loss"):
                title, label = "loss", "training" if key == "loss" else "held out"
            elif key in ("learning_rate", "grad_norm"):
                title, label = key.replace("_", " "), key
            elif key.startswith("engram/"):
                _, name, *layer = key.split("/")
                title, label = name.replace("_", " "), " ".join(layer).replace("_", " ") or name
            else:
                continue
            curves.setdefault(title, {}).setdefault(label, []).append((line["step"], float(value)))
    first = [title for title in ("loss", "learning rate", "grad norm") if title in curves]
    return {title: curves[title] for title in [*first, *sorted(set(curves) - set(first))]}


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

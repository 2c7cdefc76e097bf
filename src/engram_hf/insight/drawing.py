"""How pictures look: one style, colours that colour-blind people can tell apart, and no display."""

from pathlib import Path
from typing import Any


# Okabe and Ito's palette, without its yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DOTS_PER_INCH = 130


def empty_figure(title: str, inches: tuple[float, float]) -> Any:
    """A figure with this title and no axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'engram-hf[bench]'.") from error
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def new_figure(title: str, rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure with this title and its axes, row by row.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = empty_figure(title, inches)
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes:
        style(axis)
    return figure, axes


def style(axis: Any) -> None:
    """A light grid, no frame above and on the right."""
    axis.grid(True, color="#DDDDDD", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def save_figure(figure: Any, picture: str | Path) -> Path:
    """Write the figure as PNG, and return the file."""
    path = Path(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
    return path

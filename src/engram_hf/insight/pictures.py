"""PNG files of a page or of shaded text: by a headless browser where there is one, else by matplotlib."""

import os
import re
import shutil
import subprocess
import tempfile
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH_PIXELS, PIXEL_RATIO = 900, 1.5
# A browser that hangs must not hold up a training run.
LONGEST_SECONDS = 60
# Chromium cannot make larger windows.
HIGHEST_PIXELS = 16_000
MEASURING = "<script>addEventListener('load',()=>document.title=document.documentElement.scrollHeight)</script>"
CANNOT_DRAW = (
    "No Chromium or Chrome was found, so matplotlib draws this picture. It joins no Arabic letters, it turns no text "
    "from right to left, it draws no emoji, and it shows Chinese, Japanese and Korean only in a font that has them. On "
    "Debian: apt install chromium fonts-noto-cjk fonts-noto-color-emoji."
)
COLUMNS = 96


def find_browser() -> str | None:
    """The program of an installed Chromium or Chrome; None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def picture_of_page(page: str, path: Path) -> bool:
    """Take a picture of a page of HTML, as high as the page.

    Returns:
        False where no browser is installed, or it makes no picture.
    """
    browser = find_browser()
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "page.html"), Path(folder, "picture.png")
        file.write_text(page.replace("</head>", f"{MEASURING}</head>", 1), encoding="utf-8")
        command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            # Chromium's sandbox refuses to run as root.
            command.append("--no-sandbox")
        try:
            told = _run([*command, f"--window-size={WIDTH_PIXELS},100", "--dump-dom", file.as_uri()])
            height = re.search(r"<title>(\d+)</title>", told)
            if height is None:
                return False
            size = f"--window-size={WIDTH_PIXELS},{min(int(height[1]), HIGHEST_PIXELS)}"
            ratio = f"--force-device-scale-factor={PIXEL_RATIO}"
            _run([*command, size, ratio, f"--screenshot={picture}", file.as_uri()])
        except (OSError, subprocess.SubprocessError):
            return False
        if not picture.is_file():
            return False
        shutil.copyfile(picture, path)
    return True


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, timeout=LONGEST_SECONDS, encoding="utf-8", errors="replace"
    ).stdout


def picture_of_shades(
    parts: Sequence[tuple[str, float]],
    caption: str,
    more: tuple[int, int, int],
    less: tuple[int, int, int],
    is_dark: bool,
    path: Path,
) -> None:
    """Draw text on coloured ground with matplotlib, character by character in a grid.

    Args:
        parts: pieces of text, each with its shade in [-1, 1].
        caption: below the text.
        more, less: colours of shades above and below 0.

    Raises:
        ImportError: matplotlib is missing too.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError(
            "A picture needs Chromium or Chrome (on Debian: apt install chromium), or matplotlib: pip install "
            "'engram-hf[bench]'. save('x.html') needs neither."
        ) from error
    warnings.warn(CANNOT_DRAW, stacklevel=3)
    cells: list[tuple[int, int, int, str, float]] = []
    row, column = 0, 0
    for text, shade in parts:
        for character in text:
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if character == "\n" or column + width > COLUMNS:
                row, column = row + 1, 0
            if character != "\n":
                cells.append((row, column, width, character, shade))
                column += width
    ink, paper = ("#eeeeee", "#1b1b1b") if is_dark else ("#1a1a1a", "#ffffff")
    rows = row + 3
    figure = Figure(figsize=(COLUMNS * 0.085, rows * 0.22), facecolor=paper)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(rows, 0)
    axes.set_axis_off()
    for row, column, width, character, shade in cells:
        colour = [each / 255 for each in (more if shade >= 0 else less)]
        axes.add_patch(Rectangle((column, row), width, 0.95, color=colour, alpha=abs(float(shade)), linewidth=0))
        # A dollar sign begins a formula.
        shown = "\\$" if character == "$" else character
        axes.text(column + width / 2, row + 0.72, shown, ha="center", color=ink, family="monospace", fontsize=9)
    axes.text(0, rows - 0.8, caption, color=ink, fontsize=9)
    with warnings.catch_warnings():
        # Said already, in CANNOT_DRAW.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=130, facecolor=paper)

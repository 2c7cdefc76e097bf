"""What a benchmark found, as JSON with everything needed to run it again, and as Markdown.

Every benchmark writes `scripts/benchmarks/results/<name>.json`. `scripts/maintenance/render_results.py` makes
`docs/results.md` of these files, so no figure is typed by hand.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "numpy")


@dataclass
class Table:
    """Figures under one heading.

    columns: name to format specification (`",.1f"`); `""` for text. Names carry their units.
    rows: one value per column, None for an empty cell.
    note: a sentence below the table.
    """

    columns: dict[str, str]
    rows: list[list]
    title: str = ""
    note: str = ""

    def markdown(self) -> str:
        lines = [list(self.columns), ["---"] * len(self.columns)]
        for row in self.rows:
            cells = zip(row, self.columns.values(), strict=True)
            lines.append(["" if value is None else format(value, spec) for value, spec in cells])
        parts = [f"**{self.title}**"] if self.title else []
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts + [self.note] * bool(self.note))


@dataclass
class Results:
    """One run of one benchmark. Make it before measuring: files and commit may change during a long run."""

    title: str
    about: str
    tables: list[Table] = field(default_factory=list)
    command: str = field(default_factory=lambda: own_command())
    commit: str = field(default_factory=lambda: own_commit())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    hardware: str = field(default_factory=lambda: own_hardware())
    versions: dict[str, str] = field(default_factory=lambda: own_versions())

    def write(self, folder: Path) -> None:
        """Print the tables, and write `<folder>/<name of the script>.json`."""
        print("\n" + "\n\n".join(table.markdown() for table in self.tables), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{Path(sys.argv[0]).stem}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        print(f"\nwrote {path}")

    @classmethod
    def read(cls, path: Path) -> "Results":
        content = json.loads(path.read_text())
        return cls(**{**content, "tables": [Table(**table) for table in content["tables"]]})

    def markdown(self) -> str:
        """A section of docs/results.md."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        made = f"`{self.command}`; {self.hardware}; {versions}; commit {self.commit}, {self.date}."
        parts = [wrap(part) for part in self.about.split("\n\n")]
        return "\n\n".join([f"## {self.title}", *parts, *(table.markdown() for table in self.tables), wrap(made)])


def wrap(paragraph: str) -> str:
    """Lines of a readable length; a list stays as it is."""
    if paragraph.startswith("* "):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def about(doc: str) -> str:
    """A script's docstring without its first line and its commands: what was measured, and how."""
    paragraphs = [part for part in doc.strip().split("\n\n")[1:] if not part.startswith("    ")]
    return "\n\n".join(part if part.startswith("* ") else part.replace("\n", " ") for part in paragraphs)


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=FOLDER, help=f"folder for the figures (default: {FOLDER.name})")


def own_command() -> str:
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", shown, *sys.argv[1:]])


def own_commit() -> str:
    """Of the checkout; says so where files other than results differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if commit.returncode:
        return "unknown"
    results = [f":!{folder}/*" for folder in ("scripts/benchmarks/results", "scripts/experiments/results")]
    changed = [*git, "status", "--porcelain", "--untracked-files=all", "--", "src", "scripts", *results]
    is_changed = bool(subprocess.run(changed, capture_output=True, text=True).stdout.strip())
    return commit.stdout.strip() + " with changes" * is_changed


def own_hardware() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = [f"{os.cpu_count()} cores ({name})", f"{ram_bytes / 2**30:.0f} GiB of RAM"]
    # Not above: rendering the page needs no torch.
    import torch

    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def own_versions() -> dict[str, str]:
    return {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}

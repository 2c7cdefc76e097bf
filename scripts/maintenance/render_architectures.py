"""Run the parity tests of added memories over all architectures, and write their table into docs/any_model.md.

    python scripts/maintenance/render_architectures.py

It takes a minute. Every number is a count of ways of running a model; see tests/adapters/test_parity.py.
"""

import argparse
import datetime
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import transformers


ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "any_model.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
sys.path[:0] = [str(ROOT / "tests" / "adapters"), str(ROOT / "tests")]


def table() -> str:
    """The table, with what it was made with."""
    from test_parity import ARCHITECTURES, CELLS, REFUSED, outcomes

    lines = [
        f"There are {len(CELLS)} ways of running a model. How many of them give what one forward over the whole text",
        "gives: with the model alone, and with a memory whose weights are random? Where both numbers are equal, the",
        "memory fails nowhere that the model does not.",
        "",
        "| architecture | alone | with a memory | the model alone fails |",
        "|---|---|---|---|",
    ]
    for model_type in ARCHITECTURES:
        found = outcomes(model_type)
        alone = [name for name, (base, _) in found.items() if base == "holds"]
        both = [name for name in alone if found[name][1] == "holds"]
        fails = ", ".join(name.replace("_", " ") for name in found if name not in alone)
        refused = "".join(f"; refused with one: {name.replace('_', ' ')}" for name in REFUSED.get(model_type, ()))
        lines.append(f"| {model_type} | {len(alone)} | {len(both)} | {fails}{refused} |")
        print(lines[-1], flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    lines += [
        "",
        f"`python scripts/maintenance/render_architectures.py`, tiny random models in float32 on a CPU, transformers "
        f"{transformers.__version__},",
        f"torch {torch.__version__}, commit {commit}, {datetime.date.today()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    text = GUIDE.read_text(encoding="utf-8")
    pattern = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    GUIDE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", text), encoding="utf-8")


if __name__ == "__main__":
    main()

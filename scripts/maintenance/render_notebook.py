"""Write docs/any_model.ipynb and docs/patches.ipynb, the notebooks of these guides: text and examples, cell by cell.

    python scripts/maintenance/render_notebook.py

Commands of a shell become cells that begin with `!`. The table of architectures is left out.
"""

import argparse
import json
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
GUIDES = (ROOT / "docs" / "any_model.md", ROOT / "docs" / "patches.md")


def cells(text: str) -> list[dict]:
    """The cells of a guide: what lies between two examples is one cell of text."""
    found = []
    for part in re.split(r"^(```(?:python|bash)\n.*?^```)$", text, flags=re.DOTALL | re.MULTILINE):
        match = re.fullmatch(r"```(python|bash)\n(.*)```", part, re.DOTALL)
        source = part.strip() if match is None else match[2].strip()
        if match is not None and match[1] == "bash":
            source = "\n".join(f"!{line}" for line in source.splitlines())
        kind: dict = {"cell_type": "markdown"}
        if match is not None:
            kind = {"cell_type": "code", "execution_count": None, "outputs": []}
        if source:
            lines = source.splitlines(keepends=True)
            found.append({"id": f"cell-{len(found)}", **kind, "metadata": {}, "source": lines})
    return found


def notebook(guide: Path) -> str:
    """The notebook of a guide as it is written into its file."""
    text = guide.read_text(encoding="utf-8").split("## Architectures")[0]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells(text), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for guide in GUIDES:
        guide.with_suffix(".ipynb").write_text(notebook(guide), encoding="utf-8")


if __name__ == "__main__":
    main()

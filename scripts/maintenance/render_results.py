"""Write docs/results.md from the JSON files that benchmarks and experiments have written.

    python scripts/maintenance/render_results.py            a second
    python scripts/maintenance/render_results.py --check    exits with 1 where the page is not what the files give

Figures are never typed by hand: to change one, run its command again and commit the JSON file.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import FOLDER, ROOT, Results


PAGE = ROOT / "docs" / "results.md"
HEAD = """# Measured

`scripts/maintenance/render_results.py` writes this page from `scripts/benchmarks/results/`. Every section ends with the
command, the machine, the versions, the commit and the date. Ratios were measured side by side in one run. Absolute
times hold for the machine that is named.
"""


def rendered(folder: Path = FOLDER) -> str:
    """The page, sections in the order of the files' names.

    Raises:
        ValueError: a file is not what a benchmark writes.
    """
    sections = []
    for path in sorted(folder.glob("*.json")):
        try:
            sections.append(Results.read(path).markdown())
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not what a benchmark writes ({error}); run the benchmark again.") from error
    if not sections:
        sections = ["Nothing has been measured yet."]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    arguments = parser.parse_args()
    try:
        page = rendered()
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if not arguments.check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE}")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE} is not what its JSON files give. Run: python scripts/maintenance/render_results.py")


if __name__ == "__main__":
    main()

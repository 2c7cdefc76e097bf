"""Write docs/evidence.md, its pictures and README's table of claims from the JSON files that experiments have written.

    python scripts/experiments/report.py            seconds
    python scripts/experiments/report.py --check    exits with 1 where a page is not what the files give

Figures and verdicts are never typed by hand. `--check` compares text; a picture must be there.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.evidence_page import claims, picture_of, rendered, section_of
from helpers.experiment_files import RESULTS, read_results
from helpers.experiments import EXPERIMENTS
from helpers.results import ROOT


PAGE = ROOT / "docs" / "evidence.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"
SCALE = "tiny"


def with_claims(readme: str, table: str) -> str:
    """README with this table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} or {END}. Put both where the table of claims belongs.")
    return f"{before}{BEGIN}\n{table or 'No experiment has results yet.'}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    arguments = parser.parse_args()
    try:
        results = read_results(RESULTS)
        pages = {
            PAGE: rendered(results, SCALE),
            README: with_claims(README.read_text("utf-8"), claims(SCALE, results, with_results_only=True)),
        }
        sections = [(each, section_of(each, SCALE, results)) for each in EXPERIMENTS]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{RESULTS} holds what no experiment writes: {error}") from error
    pictures = {PAGE.parent / picture_of(each): own.draw for each, own in sections if own.draw is not None}
    if not arguments.check:
        for path, page in pages.items():
            path.write_text(page, encoding="utf-8")
            print(f"wrote {path}")
        for path, draw in pictures.items():
            print(f"wrote {draw(path)}")
        return
    wrong = [path for path, page in pages.items() if not path.is_file() or path.read_text("utf-8") != page]
    wrong += [path for path in pictures if not path.is_file()]
    if wrong:
        raise SystemExit(f"{wrong[0]} is not what the JSON files give. Run: python scripts/experiments/report.py")


if __name__ == "__main__":
    main()

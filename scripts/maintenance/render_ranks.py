"""Write the table of docs/ranks.md: what large tables would take over many ranks, computed from what is assumed here.

    python scripts/maintenance/render_ranks.py            some seconds

Nothing of it is measured. A test fails when the guide has another table.
"""

import argparse
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from engram_hf.modeling.table_cut import (
    DISTINCT_SHARE,
    GRADIENT_NBYTES,
    ID_BYTES,
    TOKENS_OF_A_STEP,
    nbytes_of_step,
    rows_of_step,
)


GUIDE = Path(__file__).resolve().parents[2] / "docs" / "ranks.md"
BEGIN, END = "<!-- begin of what render_ranks.py writes -->\n", "<!-- end of what render_ranks.py writes -->\n"
# Of one number of a row in bfloat16.
NUMBER_NBYTES = 2
# GB in a second and one direction.
LINKS = {"NVLink": 450, "PCIe 5": 55, "400 Gb/s": 50}
SECONDS_OF_A_QUESTION = 20e-6
DISK_READS_OF_A_SECOND = 100_000
RANKS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Scale:
    """A table size: rows of all tables, numbers in a row, and rows that a token reads."""

    name: str
    rows: float
    width: int
    rows_of_token: int

    def nbytes_of_rank(self, ranks: int) -> float:
        """Bytes of rows that a rank holds, without the state of an optimizer."""
        return self.rows * self.width * NUMBER_NBYTES / ranks

    def nbytes_of_step(self, ranks: int) -> float:
        """Bytes that a rank moves in a training step."""
        rows = rows_of_step(self.rows_of_token)
        return nbytes_of_step(rows, self.width, self.width * NUMBER_NBYTES, ranks)


SCALES = (
    Scale("768M x 256", 768e6, 256, 48),
    Scale("1T x 80", 1e12, 80, 32),
)


def rendered() -> str:
    """The table in Markdown, with what it assumes."""
    assumed = (
        f"Assumed: {TOKENS_OF_A_STEP:,} tokens a rank and step, of whose rows {DISTINCT_SHARE:.0%} are distinct; rows "
        f"in bfloat16, gradients in float32 ({GRADIENT_NBYTES} bytes a number), "
        f"{ID_BYTES} bytes and a bit of row id; links at "
        + ", ".join(f"{rate} GB/s ({name})" for name, rate in LINKS.items())
        + f"; {SECONDS_OF_A_QUESTION * 1e6:.0f} us for each rank that is asked, one after another; "
        f"{DISK_READS_OF_A_SECOND:,} random reads of a disk in a second."
    )
    lines = [
        textwrap.fill(assumed, 120),
        "",
        "| table | rows of a token | ranks | a rank holds | a rank moves in a step | "
        + " | ".join(LINKS)
        + " | asking | reading from disk |",
        "|---|---|---|---|---|" + "---|" * (len(LINKS) + 2),
    ]
    for scale in SCALES:
        for ranks in RANKS:
            nbytes = scale.nbytes_of_step(ranks)
            links = [f"{1e3 * nbytes / rate / 1e9:.1f} ms" for rate in LINKS.values()]
            cells = [
                *(scale.name, str(scale.rows_of_token), f"{ranks:,}"),
                *(_size(scale.nbytes_of_rank(ranks)), _size(nbytes), *links),
                f"{1e3 * SECONDS_OF_A_QUESTION * (ranks - 1):.1f} ms",
                f"{rows_of_step(scale.rows_of_token) / DISK_READS_OF_A_SECOND:.1f} s",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(nbytes: float) -> str:
    """Three digits and a unit."""
    power = int(math.log10(nbytes) // 3)
    return f"{nbytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def with_table(guide: str) -> str:
    """A guide with the table of today between its marks."""
    before, rest = guide.split(BEGIN)
    return f"{before}{BEGIN}{rendered()}{END}{rest.split(END)[1]}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the table of {GUIDE}")


if __name__ == "__main__":
    main()

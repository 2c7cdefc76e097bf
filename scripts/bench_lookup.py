"""Time of a lookup against the rows of the table, on each tier: it does not grow with the table.

    python scripts/bench_lookup.py         three minutes on 2 cores; writes up to 16 GB and removes them

Rows of 16 bytes, 4,096 of them a lookup, medians of interleaved rounds. Before a tier is timed, its rows are compared
with the bytes of the file. --plot also writes a picture of the curve.
"""

import argparse
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engram_hf.modeling.engram_reader import TableFile
from engram_hf.modeling.engram_table import DISK, HOST, RESIDENT, BlockSource, EngramTable, tables_without_blocks
from engram_hf.modeling.safetensors_files import PIECE_BYTES, TensorContent, write_file


WIDTH = 8
ROW_BYTES = 2 * WIDTH
LOOKUPS = 4096


def write_table(path: Path, rows: int) -> None:
    """A table of one block of bfloat16 rows of small numbers that all differ nearly everywhere."""
    base = np.random.default_rng(0).integers(0, 2**14, PIECE_BYTES // 2, dtype=np.uint16)

    def pieces():
        left, number = rows * ROW_BYTES, 0
        while left:
            piece = (base ^ np.uint16(number % 2**14)).view(np.uint8)[:left]
            yield piece.data
            left, number = left - len(piece), number + 1

    write_file(path, {"blocks.0": TensorContent(torch.bfloat16, (rows, WIDTH), rows * ROW_BYTES, pieces)})


def open_table(path: Path, rows: int, tier: str) -> EngramTable:
    with tables_without_blocks():
        table = EngramTable([rows], WIDTH, rows * WIDTH, torch.bfloat16)
    table.open_blocks([BlockSource(TableFile(path), "blocks.0")], [tier], ["cpu"])
    return table


def look_up(table: EngramTable, ids: np.ndarray) -> tuple[float, torch.Tensor]:
    row_ids = torch.from_numpy(ids).view(1, -1, 1)
    start = time.perf_counter()
    rows = table(row_ids)
    return time.perf_counter() - start, rows


def forget(table: EngramTable) -> None:
    file = table.sources[0].file
    file.mapping.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e9, help="rows of the largest table (default 1e9)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    arguments = parser.parse_args()
    generator = np.random.default_rng(1)
    sizes = [10**power for power in range(5, 10) if 10**power <= arguments.largest]
    curves: dict[str, list[float]] = {}
    for rows in tqdm(sizes, desc="Sizes"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            path = Path(name) / "table.safetensors"
            write_table(path, rows)
            for tier in (RESIDENT, HOST, DISK):
                table = open_table(path, rows, tier)
                start = table.sources[0].file.places["blocks.0"].start
                ids = generator.integers(0, rows, LOOKUPS)
                with path.open("rb") as file:
                    expected = b"".join(os.pread(file.fileno(), ROW_BYTES, start + int(i) * ROW_BYTES) for i in ids)
                if look_up(table, ids)[1].view(torch.uint8).numpy().tobytes() != expected:
                    raise RuntimeError(f"{tier} gives other bytes than the file holds; nothing is timed.")
                times: dict[str, list[float]] = {}
                for _ in range(arguments.rounds):
                    ids = generator.integers(0, rows, LOOKUPS)
                    if tier == DISK:
                        forget(table)
                        times.setdefault("disk, cold", []).append(look_up(table, ids)[0])
                        times.setdefault("disk, warm", []).append(look_up(table, ids)[0])
                    else:
                        look_up(table, ids)
                        times.setdefault(tier, []).append(look_up(table, ids)[0])
                for label, values in times.items():
                    curves.setdefault(label, []).append(1e3 * statistics.median(values))
                del table
    print("\n| rows | " + " | ".join(f"{rows:.0e}" for rows in sizes) + " |\n|---|" + "---|" * len(sizes))
    for label, curve in curves.items():
        print(f"| {label}, ms | " + " | ".join(f"{value:.2f}" for value in curve) + " |")
    if arguments.plot:
        import matplotlib.pyplot as plt

        for label, curve in curves.items():
            plt.loglog(sizes, curve, marker="o", label=label)
        plt.xlabel("rows of the table")
        plt.ylabel(f"ms for {LOOKUPS:,} rows")
        plt.legend()
        plt.savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()

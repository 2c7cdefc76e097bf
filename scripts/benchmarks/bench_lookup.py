"""Time of a lookup against the rows of the table, on each tier: it does not grow with the table.

    python scripts/bench_lookup.py         three minutes on 2 cores; writes up to 16 GB and removes them

Rows of 16 bytes, 4,096 of them a lookup, medians of interleaved rounds. Before a tier is timed, its rows are compared
with the bytes of the file. --plot also writes a picture of the curve.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from made_tables import check, forget, open_table, write_table
from tqdm import tqdm

from engram_hf.modeling.table import DISK, HOST, RESIDENT, EngramTable


WIDTH = 8
LOOKUPS = 4096


def look_up(table: EngramTable, ids: np.ndarray) -> tuple[float, torch.Tensor]:
    row_ids = torch.from_numpy(ids).view(1, -1, 1)
    start = time.perf_counter()
    rows = table(row_ids)
    return time.perf_counter() - start, rows


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
            write_table(path, rows, WIDTH, torch.bfloat16)
            for tier in (RESIDENT, HOST, DISK):
                table = open_table(path, rows, WIDTH, torch.bfloat16, tier)
                check(table, generator.integers(0, rows, LOOKUPS))
                times: dict[str, list[float]] = {}
                for _ in range(arguments.rounds):
                    ids = generator.integers(0, rows, LOOKUPS)
                    if tier == DISK:
                        forget([table.sources[0].file])
                        times.setdefault("disk, cold", []).append(look_up(table, ids)[0])
                        times.setdefault("disk, warm", []).append(look_up(table, ids)[0])
                    else:
                        look_up(table, ids)
                        times.setdefault(tier, []).append(look_up(table, ids)[0])
                for label, values in times.items():
                    curves.setdefault(label, []).append(1e3 * statistics.median(values))
                del table
                # Its mapping goes with it, and keeps no page of the file from leaving the cache.
                gc.collect()
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

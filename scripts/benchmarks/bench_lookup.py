"""Does the time of a lookup grow with the table? Tables of 100,000 to a billion rows, on each tier.

    python scripts/benchmarks/bench_lookup.py         three minutes on 2 cores; writes up to 16 GB and removes them

Rows have 16 bytes, and a lookup reads 4,096 of them. Times are medians of interleaved rounds. Before a tier is timed,
its rows are compared with the bytes of the file.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import check, forget, open_table, write_table
from helpers.results import Results, Table, about, add_results_argument

from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_blocks import DISK, HOST, RESIDENT


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
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Lookups in tables of any size", about(__doc__))
    generator = np.random.default_rng(1)
    sizes = [10**power for power in range(5, 10) if 10**power <= arguments.largest]
    curves: dict[str, list[float]] = {}
    for rows in tqdm(sizes, desc="Sizes"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            path = Path(name) / "table.safetensors"
            write_table(path, rows, WIDTH, torch.bfloat16)
            for tier in (RESIDENT, HOST, DISK):
                table = open_table(path, [rows], WIDTH, torch.bfloat16, tier)
                check(table, generator.integers(0, rows, LOOKUPS))
                times: dict[str, list[float]] = {}
                for _ in range(arguments.rounds):
                    ids = generator.integers(0, rows, LOOKUPS)
                    if tier == DISK:
                        forget([table.block_records[0].source.file])
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
    columns = {"rows": "", **{f"{rows:,}": ".2f" for rows in sizes}}
    results.tables = [Table(columns, [[f"{label}, ms", *curve] for label, curve in curves.items()])]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

"""What row patches cost: lookups that hit no patched row, patches of 8 users in a batch, switching between 200 users.

    python scripts/benchmarks/bench_patches.py         two minutes on 2 cores; writes 1.1 GB and removes it

The table has 16 heads of 262,144 rows of 128 bfloat16 numbers. 200 patches have 2,000 float32 rows each. A prefill
looks the rows of 2,048 tokens up, a decode step those of 8 tokens. Pages of the table are in memory. Before anything is
timed, patched lookups are compared with rows that somebody has written by hand, and a batch of 8 users with 8 single
lookups. Plain and patched lookups take turns. A ratio is the median of the ratios of turns; the quartiles follow.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import open_table, write_table
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import PatchedRows, RowPatch
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_blocks import DISK, HOST, RESIDENT
from engram_hf.modeling.table_patches import ModelPatches


HEADS, WIDTH, ROWS_OF_PATCH, BATCH, TOKENS_OF_PREFILL = 16, 128, 2_000, 8, 2_048
SHAPES = {"prefill": (1, TOKENS_OF_PREFILL, HEADS), "decode": (BATCH, 1, HEADS)}
# Lookups of a turn: a turn takes milliseconds.
LOOKUPS = {"prefill": 1, "decode": 60}


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def make_patches(users: int, rows_of_head: int) -> list[RowPatch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for user in range(users):
        drawn = torch.randint(0, HEADS * rows_of_head, (2 * ROWS_OF_PATCH,), generator=generator).unique()
        row_ids = drawn[torch.randperm(len(drawn), generator=generator)[:ROWS_OF_PATCH]].sort().values
        rows = torch.randn(ROWS_OF_PATCH, WIDTH, generator=generator)
        found.append(RowPatch(f"user {user}", {"table": PatchedRows(row_ids, rows, HEADS * rows_of_head)}))
    return found


def rows_of_head(patch: RowPatch) -> int:
    return patch.tables["table"].table_rows // HEADS


def draw(shape: tuple[int, ...], rows: int, generator: torch.Generator) -> torch.Tensor:
    """Row ids of a lookup in heads of so many rows."""
    return torch.randint(0, rows, shape, generator=generator)


def hitting(patch: RowPatch, shape: tuple[int, ...], share: float, generator: torch.Generator) -> torch.Tensor:
    """Row ids of a lookup of which a share is in the patch, and no other one."""
    known, rows = patch.tables["table"].row_ids, rows_of_head(patch)
    is_known = torch.zeros(HEADS, rows, dtype=torch.bool)
    is_known.view(-1)[known] = True
    row_ids, heads = draw(shape, rows, generator), torch.arange(HEADS).expand(shape)
    while (hit := is_known[heads, row_ids]).any():
        row_ids[hit] = draw((int(hit.sum()),), rows, generator)
    per_head = [known[known // rows == head] % rows for head in range(HEADS)]
    for place in torch.nonzero(torch.rand(shape, generator=generator) < share).tolist():
        own = per_head[place[-1]]
        row_ids[tuple(place)] = own[torch.randint(len(own), (1,), generator=generator)]
    return row_ids


def check(known: ModelPatches, table: EngramTable, patches: list[RowPatch], generator: torch.Generator) -> None:
    """Raise unless patched lookups give the rows of a table that was written to."""
    first = patches[0]
    row_ids = hitting(first, (4, 300, HEADS), 0.1, generator)
    known.set({"table": table}, [])
    expected = table(row_ids).view(*row_ids.shape, WIDTH).clone()
    of_row = {row_id: i for i, row_id in enumerate(first.tables["table"].row_ids.tolist())}
    in_table = row_ids + torch.arange(HEADS) * rows_of_head(first)
    hits = 0
    for place, row_id in zip(np.ndindex(*row_ids.shape), in_table.flatten().tolist(), strict=True):
        if row_id in of_row:
            expected[place] = first.tables["table"].rows[of_row[row_id]].to(expected.dtype)
            hits += 1
    known.set({"table": table}, [first.name])
    if not hits or not torch.equal(table(row_ids), expected.flatten(-2)):
        raise RuntimeError("A patched lookup gives other rows than a table with these rows; nothing is timed.")
    batch = torch.cat([hitting(patch, (1, 50, HEADS), 0.1, generator) for patch in patches[:BATCH]])
    with known.use({"table": table}, [patch.name for patch in patches[:BATCH]]):
        together = table(batch)
    for i, patch in enumerate(patches[:BATCH]):
        known.set({"table": table}, [patch.name])
        if not torch.equal(table(batch[i : i + 1])[0], together[i]):
            raise RuntimeError("A batch of users gives other rows than single lookups; nothing is timed.")


def time_turn(table: EngramTable, row_ids: torch.Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        table(row_ids)
    return (time.perf_counter() - start) / count


def compare(
    known: ModelPatches, table: EngramTable, patches: list[RowPatch], part: str, share: float, turns: int, generator
) -> list:
    """Median milliseconds of plain lookups, and median and quartiles of patched over plain in percent."""
    tables, first = {"table": table}, patches[0]
    plain, ratios = [], []
    for turn in range(turns + 3):
        row_ids = hitting(first, SHAPES[part], share, generator)
        table(row_ids)
        times = {}
        for names in ([], [first.name]) if turn % 2 else ([first.name], []):
            known.set(tables, names)
            times[len(names)] = time_turn(table, row_ids, LOOKUPS[part])
        if turn >= 3:
            plain.append(times[0])
            ratios.append(times[1] / times[0])
    low, middle, high = (100 * (each - 1) for each in statistics.quantiles(ratios, n=4))
    return [1e3 * statistics.median(plain), middle, f"{low:+.1f} to {high:+.1f}"]


def time_users(known: ModelPatches, table: EngramTable, patches: list[RowPatch], turns: int, generator) -> list[list]:
    """A decode step of 8 users against a plain one, and the time of a switch."""
    tables, steps, plain, switches, first_switches = {"table": table}, [], [], [], []
    for patch in patches:
        start = time.perf_counter()
        known.set(tables, [patch.name])
        first_switches.append(1e6 * (time.perf_counter() - start))
    for patch in patches:
        start = time.perf_counter()
        known.set(tables, [patch.name])
        switches.append(1e6 * (time.perf_counter() - start))
    known.set(tables, [])
    names = [patch.name for patch in patches]
    for turn in range(turns):
        users = [names[(turn * BATCH + i) % len(names)] for i in range(BATCH)]
        row_ids = draw(SHAPES["decode"], rows_of_head(patches[0]), generator)
        table(row_ids)
        plain.append(1e6 * time_turn(table, row_ids, 20))
        with known.use(tables, users):
            steps.append(1e6 * time_turn(table, row_ids, 20))
    contexts = []
    for turn in range(turns):
        users = [names[(turn * BATCH + i) % len(names)] for i in range(BATCH)]
        start = time.perf_counter()
        with known.use(tables, users):
            pass
        contexts.append(1e6 * (time.perf_counter() - start))
    middle = statistics.median
    return [
        ["set_patches, first time with a patch", middle(first_switches), max(first_switches)],
        ["set_patches, later", middle(switches), max(switches)],
        ["use_patches, begin and end for 8 users", middle(contexts), max(contexts)],
        ["lookup of a decode step, plain", middle(plain), None],
        ["lookup of a decode step, 8 users", middle(steps), None],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--rows-of-head", type=int, default=262_144)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Row patches", about(__doc__))
    generator = torch.Generator().manual_seed(1)
    columns = {"lookup": "", "tier": "", "patched rows": ".0%", "plain, ms": ".3f", "patched, more %": "+.1f"}
    lookups = Table({**columns, "quartiles": ""}, [])
    users = Table({"of one table": "", "median, microseconds": ",.1f", "most": ",.0f"}, [])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name) / "table.safetensors"
        write_table(path, HEADS * arguments.rows_of_head, WIDTH, torch.bfloat16)
        before = resident_bytes()
        patches = make_patches(arguments.users, arguments.rows_of_head)
        held = resident_bytes() - before
        for tier in (RESIDENT, HOST, DISK):
            table = open_table(path, [arguments.rows_of_head] * HEADS, WIDTH, torch.bfloat16, tier)
            table.block_records[0].rows.view(torch.int16).amax()
            known = ModelPatches()
            for patch in patches:
                known.add({"table": table}, patch, 1.0)
            check(known, table, patches, generator)
            for part in SHAPES:
                for share in (0.0, 0.1):
                    figures = compare(known, table, patches, part, share, arguments.turns, generator)
                    lookups.rows.append([part, tier, share, *figures])
            if tier == DISK:
                users.rows = time_users(known, table, patches, arguments.turns, generator)
    rows = sum(patch.nbytes for patch in patches)
    memory = Table(
        {f"{arguments.users} patches": "", "MB": ",.0f"},
        [
            ["rows and row ids", rows / 1e6],
            ["memory of the process for them", held / 1e6],
            ["rows, row ids and filters", table.patches.nbytes / 1e6],
        ],
    )
    results.tables = [lookups, users, memory]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

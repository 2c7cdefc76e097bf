"""How much of the time that rows of a table over ranks need is hidden behind the step before their lookup.

    python scripts/helpers/ranks_overlap.py FOLDER         writes a table of 256 MB there, and removes it

Two processes hold half of a table on disk each, and the page cache holds nothing of it. A step looks the rows of a
batch up and multiplies matrices, a quarter of them ahead of the lookup, as the layers below a memory do. Each way of
fetching gets batches of its own. What a lookup takes is measured, so that what is hidden is the rest.
"""

import json
import mmap
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engram_hf.modeling.disk_files import BlockSource, TableFile
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_cut import open_parts
from engram_hf.modeling.table_formats import row_format
from engram_hf.modeling.table_ranks import start_ranks
from helpers.made_tables import share_in_page_cache, write_table


RANKS = 2
HEADS, ROWS_OF_HEAD, WIDTH = 8, 125_000, 64
# Of a rank and step.
TOKENS = 1024
STEPS = 9
# As long as a step of a small backbone; a quarter of it lies ahead of the lookup.
MATRIX, PRODUCTS = 512, 16
# A lookup that waits from its first line on, one that is asked for at the first line of a forward, and one whose rows
# were announced a step ahead besides.
WAYS = ("at once", "first line", "announced")


def open_part(path: Path, service) -> EngramTable:
    with tables_without_blocks():
        table = EngramTable([ROWS_OF_HEAD] * HEADS, WIDTH, HEADS * ROWS_OF_HEAD * WIDTH, row_format("float32"))
    sources = {("table", 0): BlockSource(TableFile(path), "blocks.0")}
    parts = open_parts(sources, {"table": table.cut_over_ranks(service)}, service.rank)
    table.open_blocks(list(parts.values()), ["disk"], ["cpu"])
    service.meet()
    return table.eval()


def batches(way: str) -> list[torch.Tensor]:
    """Row ids of each step, (1, tokens, heads)."""
    generator = torch.Generator().manual_seed(10 * WAYS.index(way) + dist.get_rank())
    shape = (1, TOKENS, HEADS)
    return [torch.randint(0, ROWS_OF_HEAD, shape, generator=generator) for _ in range(STEPS)]


def forget_together(file: TableFile) -> None:
    """Take a file out of the page cache that all processes have mapped.

    Raises:
        RuntimeError: it is still there.
    """
    file.mapping.madvise(mmap.MADV_DONTNEED)
    dist.barrier()
    os.posix_fadvise(file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    if share_in_page_cache(file) > 0.01:
        raise RuntimeError(f"The page cache still holds a part of {file.path}; nothing is cold.")
    dist.barrier()


def steps_of(table: EngramTable, way: str) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """Milliseconds of each lookup and of each step, and what was looked up."""
    matrix, coming = torch.randn(MATRIX, MATRIX), batches(way)
    lookups, steps, found = [], [], []
    for number, row_ids in enumerate(coming):
        dist.barrier()
        start = time.perf_counter()
        if way == "announced" and number + 1 < len(coming):
            table.bring_pages(coming[number + 1])
        if way != "at once":
            table.prefetch(row_ids)
        for _ in range(PRODUCTS // 4):
            matrix @ matrix
        before = time.perf_counter()
        rows = table(row_ids)
        lookups.append(1000 * (time.perf_counter() - before))
        for _ in range(PRODUCTS - PRODUCTS // 4):
            matrix @ matrix
        steps.append(1000 * (time.perf_counter() - start))
        found.append(rows)
    return lookups, steps, found


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    service = start_ranks()
    table = open_part(folder / "table.safetensors", service)
    file, result = table.block_records[0].source.file, {}
    # Read and not mapped: mapped pages stay in the page cache.
    content = bytearray((folder / "table.safetensors").read_bytes())
    place = file.whole_places["blocks.0"]
    whole = torch.frombuffer(content, dtype=torch.float32, offset=place.start).view(-1, WIDTH)
    for way in WAYS:
        forget_together(file)
        with torch.no_grad():
            lookups, steps, found = steps_of(table, way)
        for row_ids, rows in zip(batches(way), found):
            in_table = row_ids + torch.arange(HEADS) * ROWS_OF_HEAD
            if not torch.equal(rows, whole[in_table].flatten(-2)):
                raise RuntimeError("A lookup gives other rows than the file holds, so nothing is measured.")
        # Nothing was announced ahead of the first step.
        result[way] = {"lookup_ms": statistics.median(lookups[1:]), "step_ms": statistics.median(steps[1:])}
        dist.barrier()
    (folder / f"overlap{rank}.json").write_text(json.dumps(result))
    service.meet()


def measure_overlap(folder: str | Path) -> dict[str, dict[str, float]]:
    """Milliseconds of a lookup and of a step, by the way of fetching, and the share of a lookup that is hidden.

    Args:
        folder: on a disk; the table of 256 MB is removed again.

    Returns:
        for each of `WAYS` a dict of `lookup_ms` and `step_ms`, medians of the slower process, and `hidden_share`.

    Raises:
        RuntimeError: rows differ from those of the file, or the page cache cannot be emptied.
    """
    folder = Path(folder)
    path = folder / "table.safetensors"
    write_table(path, HEADS * ROWS_OF_HEAD, WIDTH, torch.float32)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    try:
        start_processes(run, (folder,), nprocs=RANKS, start_method="fork")
    finally:
        path.unlink()
        (folder / "store").unlink(missing_ok=True)
    of_ranks = [json.loads((folder / f"overlap{rank}.json").read_text()) for rank in range(RANKS)]
    slowest = {way: {key: max(each[way][key] for each in of_ranks) for key in of_ranks[0][way]} for way in WAYS}
    longest = slowest["at once"]["lookup_ms"]
    return {way: {**figures, "hidden_share": 1 - figures["lookup_ms"] / longest} for way, figures in slowest.items()}


if __name__ == "__main__":
    print(json.dumps(measure_overlap(sys.argv[1]), indent=2))

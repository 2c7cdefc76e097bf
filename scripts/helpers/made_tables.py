"""Tables of any size for benchmarks: written to disk piece by piece, and taken out of the page cache again."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engram_hf.modeling.disk_files import PAGE, BlockSource, TableFile
from engram_hf.modeling.disk_safetensors import PIECE_BYTES, TensorContent, write_file
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_formats import row_format


def write_table(path: Path, rows: int, width: int, dtype: torch.dtype) -> None:
    """A table of one block, whose rows differ wherever it is longer than a piece of the file."""
    # Below 2**14 a pair of bytes is a small number in every type, and never NaN.
    base = np.random.default_rng(0).integers(0, 2**14, PIECE_BYTES // 2, dtype=np.uint16)
    total = rows * width * dtype.itemsize

    def pieces():
        for number, start in enumerate(range(0, total, PIECE_BYTES)):
            yield (base ^ np.uint16(number % 2**14)).view(np.uint8)[: total - start].data

    with tqdm(total=total, desc=f"Writing {path.name}", unit="B", unit_scale=True, leave=False) as progress:
        write_file(path, {"blocks.0": TensorContent(dtype, (rows, width), total, pieces)}, progress.update)


def open_table(path: Path, rows_of_head: Sequence[int], width: int, dtype: torch.dtype, tier: str) -> EngramTable:
    """The table of one block that `write_table` has written, on a tier."""
    with tables_without_blocks():
        table = EngramTable(rows_of_head, width, sum(rows_of_head) * width, row_format(dtype))
    table.open_blocks([BlockSource(TableFile(path), "blocks.0")], [tier], ["cpu"])
    return table.eval()


def check(table: EngramTable, ids: np.ndarray) -> None:
    """Raise unless a lookup gives the bytes that its file holds."""
    source = table.block_records[0].source
    start = source.file.places[source.name].start
    with source.file.path.open("rb") as file:
        rows = [os.pread(file.fileno(), table.row_nbytes, start + int(i) * table.row_nbytes) for i in ids]
    found = table(torch.from_numpy(ids).view(1, -1, 1))
    if found.view(torch.uint8).numpy().tobytes() != b"".join(rows):
        raise RuntimeError("A lookup gives other bytes than the file holds; nothing is timed.")


def forget(files: Sequence[TableFile]) -> None:
    """Take files out of the page cache; every mapping of them lets their pages go first.

    Raises:
        RuntimeError: they are still there.
    """
    for file in files:
        file.mapping.madvise(mmap.MADV_DONTNEED)
    for file in files:
        os.posix_fadvise(file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for file in files:
        if (share := share_in_page_cache(file)) > 0.01:
            raise RuntimeError(f"The page cache still holds {100 * share:.0f} % of {file.path}; nothing is cold.")


def share_in_page_cache(file: TableFile) -> float:
    """Of a mapped file; looks, and reads nothing, as mincore(2) does."""
    resident = np.zeros(-(-file.state[0] // PAGE), dtype=np.uint8)
    address, length = ctypes.c_void_p(file.address), ctypes.c_size_t(file.state[0])
    if ctypes.CDLL(None).mincore(address, length, ctypes.c_void_p(resident.ctypes.data)):
        raise RuntimeError("This system does not tell what its page cache holds, so nothing can be measured cold.")
    return float((resident & 1).mean())

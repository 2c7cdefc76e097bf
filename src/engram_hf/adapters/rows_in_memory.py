"""The rows of many blocks as one tensor: a lookup is one gather, wherever in this process the blocks lie.

A published table has a hundred parts in several files, and a file has them in the order of their names. They lie in one
address space all the same. In a view whose rows begin at every number of it, an offset in numbers finds the row of any
block. Only rows that a block has may be asked for: between blocks lies memory of others.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..modeling.disk_files import MappedFile
from ..modeling.disk_reading import pages_of_rows
from ..modeling.table_blocks import Block


class FoundRows(NamedTuple):
    """Where rows lie: the block of each, and its offset in numbers from the lowest address; (n,) int64 both."""

    blocks: torch.Tensor
    offsets: torch.Tensor


class RowsInMemory:
    """All rows of a table, as its blocks lie at this moment. It keeps their memory.

    addresses: of each block. If they differ from those of today, a block has moved and this record is stale.
    files: those that blocks are mapped from.
    """

    def __init__(self, blocks: Sequence[Block]):
        """
        Args:
            blocks: of one table, for which `can_hold` is true.

        Raises:
            ValueError: a block on disk does not lie under its file any more.
        """
        mapped = [block.mapped_file() for block in blocks]
        self.files = list(dict.fromkeys(file for file in mapped if file is not None))
        self.addresses = addresses_of(block.parameter for block in blocks)
        # Holding them keeps their memory while it is read.
        self._blocks = [block.rows for block in blocks]
        first = blocks[0]
        self._width, self._row_nbytes, self._number_nbytes = first.row_width, first.row_nbytes, first.rows.itemsize
        self._later_first_rows = torch.tensor([block.first_row for block in blocks[1:]], dtype=torch.long)
        # Of a published table all parts but the last are equal.
        is_equal = all(block.num_rows == first.num_rows for block in blocks[:-1])
        self._equal_rows = first.num_rows if is_equal and blocks[-1].num_rows <= first.num_rows else None
        self._lowest = min(self.addresses)
        end = max(address + block.rows.nbytes for address, block in zip(self.addresses, blocks))
        memory = (ctypes.c_uint8 * (end - self._lowest)).from_address(self._lowest)
        numbers = torch.frombuffer(memory, dtype=first.rows.dtype)
        self._rows = numbers.as_strided((len(numbers) - self._width + 1, self._width), (1, 1))
        # Where the first row of the table would lie, were each block so long.
        bases = [address - block.first_row * block.row_nbytes for address, block in zip(self.addresses, blocks)]
        self._bases = (torch.tensor(bases) - self._lowest) // self._number_nbytes
        # Rows of a stretch lie in one file, whole rows apart; None for a block that needs no reading.
        stretches = [
            (file, address % self._row_nbytes) if file is not None and block.is_on_disk else None
            for block, file, address in zip(blocks, mapped, self.addresses)
        ]
        numbered = {each: number for number, each in enumerate(dict.fromkeys(filter(None, stretches)))}
        self._files_of_stretches = [file for file, _ in numbered]
        self._stretches = np.array([-1 if each is None else numbered[each] for each in stretches], dtype=np.int16)

    @staticmethod
    def can_hold(blocks: Sequence[Block]) -> bool:
        """Whether the CPU reads all blocks, and they lie whole numbers apart."""
        rows = [block.rows for block in blocks]
        return all(
            each.device.type == "cpu"
            and each.is_contiguous()
            and each.dtype == rows[0].dtype
            and (each.data_ptr() - rows[0].data_ptr()) % each.itemsize == 0
            for each in rows
        )

    def find(self, row_ids: torch.Tensor) -> FoundRows:
        """Where rows lie.

        Args:
            row_ids: (n,) int64 on the CPU, each in [0, rows of the table), in any order.
        """
        if self._equal_rows is None:
            blocks = torch.bucketize(row_ids, self._later_first_rows, right=True)
        else:
            # A tenth of the time.
            blocks = row_ids // self._equal_rows
        return FoundRows(blocks, self._bases[blocks] + row_ids * self._width)

    def gather(self, found: FoundRows, out: torch.Tensor | None = None) -> torch.Tensor:
        """(n, width) rows, a copy; in `out`, if it is given."""
        return torch.index_select(self._rows, 0, found.offsets, out=out)

    def pages(self, found: FoundRows) -> Iterator[tuple[np.ndarray, MappedFile]]:
        """The pages of those rows that are on disk, and the files that they belong to."""
        if not self._files_of_stretches:
            return
        addresses = found.offsets.numpy() * self._number_nbytes + self._lowest
        stretches = self._stretches[found.blocks.numpy()]
        order = np.argsort(stretches, kind="stable")
        bounds = np.searchsorted(stretches, np.arange(len(self._files_of_stretches) + 1), sorter=order)
        for file, start, end in zip(self._files_of_stretches, bounds, bounds[1:]):
            if end > start:
                yield pages_of_rows(addresses[order[start:end]], self._row_nbytes), file


def addresses_of(parameters: Iterable[torch.Tensor]) -> list[int]:
    """Where blocks begin; 0 for one without memory."""
    return [each.data_ptr() for each in parameters]

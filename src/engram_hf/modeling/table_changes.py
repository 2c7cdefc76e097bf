"""Rows that differ from a file: how a table in training is saved without writing it whole, and read again.

A checkpoint of such a table holds the file of an earlier one (a second name for it, no copy) and a small file with the
rows that have changed since: `<table>.changed.keys`, (n,) int64, their numbers in the table; `<table>.changed.rows`,
(n, row width); and `<table>.changed.digests`, (blocks, 32) uint8, the SHA-256 of each block that they are written over.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from .disk_files import BlockSource
from .disk_safetensors import PIECE_BYTES, TensorContent


CHANGED_KEY = re.compile(r"^(?:.*\.)?(layers\.\d+\.engram\.table)\.changed\.(keys|rows|digests)$")
KEYS, ROWS, DIGESTS = "changed.keys", "changed.rows", "changed.digests"
DIGEST_BYTES = 32
SAMPLED_ROWS = 512
# Where more of a block has changed than this, it is written whole, and what follows is changes of that.
LARGEST_SHARE = 0.5


@dataclass
class Base:
    """A tensor of a file that a block has come from. digest: its SHA-256, once all unchanged rows were compared."""

    source: BlockSource
    digest: bytes | None = None
    # Of the block, as torch counts what is written to it.
    version: int = -1


class RowChanges:
    """What one table knows of the rows that were changed, and of those that a checkpoint brings."""

    def __init__(self):
        self.bases: dict[int, Base] = {}
        # (rows of the table,) bool while it is trained.
        self.is_changed: torch.Tensor | None = None
        # Number of a block to the digest, rows in the block, and values that wait for it.
        self.arriving: dict[int, tuple[bytes, torch.Tensor, torch.Tensor]] = {}
        # Numbers of rows that a checkpoint has brought over its blocks.
        self.brought: list[torch.Tensor] = []
        # Blocks that the last save has left to their bases.
        self.kept: list[int] = []

    def begin(self, table) -> None:
        """Watch a table from now on, whose blocks are as their files have them but for rows that were brought."""
        self.is_changed = torch.zeros(table.num_rows, dtype=torch.bool)
        for keys in self.brought:
            self.mark(keys)
        for number, source in enumerate(table.sources):
            if source is not None and source.file.can_be_linked:
                self.bases[number] = Base(source)

    def follow_write(self, number: int, block: torch.Tensor) -> None:
        """`write_rows` has written to a block, once."""
        if number in self.bases and self.bases[number].version == block._version - 1:
            self.bases[number].version = block._version

    def mark(self, keys: torch.Tensor) -> None:
        """Rows have changed, (n,) numbers in the table."""
        if self.is_changed is not None:
            self.is_changed[keys.cpu()] = True

    # Saving.

    def base(self, number: int, table) -> BlockSource | None:
        """The file that a block can be saved with as it is, and its changed rows beside it; None where there is none.

        The first time, everything but the changed rows is compared; later, some of it, since not every way of writing
        to a block can be seen (`.data`, numpy).
        """
        known = self.bases.get(number)
        if self.is_changed is None or known is None or not known.source.file.is_at_its_path():
            return None
        known.source.file.check_unchanged()
        rows = table.block_shapes[number][0]
        first = table.first_rows[number]
        is_changed = self.is_changed[first : first + rows]
        if is_changed.count_nonzero() > LARGEST_SHARE * rows:
            return None
        if table.blocks[number]._version != known.version:
            # Written to by somebody else than `write_rows`.
            known.digest = None
        elif known.digest is not None and not _has_rows_of(known.source, table.blocks[number].detach(), is_changed):
            known.digest = None
        known.version = table.blocks[number]._version
        if known.digest is None:
            known.digest = _digest_if_same(known.source, table.blocks[number].detach(), is_changed)
        if known.digest is None:
            del self.bases[number]
            return None
        return known.source

    def contents(self, table_name: str, table, numbers: Sequence[int]) -> dict[str, TensorContent]:
        """What a checkpoint holds of the changed rows of some blocks; empty where nothing of them has changed.

        Args:
            table_name: as the names of its blocks begin.
            table: the table.
            numbers: of blocks whose `base` stands for them.
        """
        parts, digests = [], torch.zeros(len(table.rows_of_block), DIGEST_BYTES, dtype=torch.uint8)
        for number in sorted(numbers):
            first = table.first_rows[number]
            marks = cast(torch.Tensor, self.is_changed)[first : first + table.block_shapes[number][0]]
            parts.append(marks.nonzero().flatten() + first)
            digests[number] = torch.tensor(list(self.bases[number].digest or b""), dtype=torch.uint8)
        keys = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        if not len(keys):
            return {}
        rows_at_once = max(1, PIECE_BYTES // table.row_nbytes)

        def pieces():
            for part in keys.split(rows_at_once):
                yield from TensorContent.of(table.gather_rows(part.to(table.home))).pieces()

        shape = (len(keys), table.row_width)
        return {
            f"{table_name}.{KEYS}": TensorContent.of(keys),
            f"{table_name}.{ROWS}": TensorContent(table.dtype, shape, len(keys) * table.row_nbytes, pieces),
            f"{table_name}.{DIGESTS}": TensorContent.of(digests),
        }

    def follow_save(self, table, number: int, source: BlockSource) -> None:
        """Where a save has put a block: by its base and rows, or whole, which is a new base."""
        is_kept = number in self.kept
        known = self.bases.get(number) if is_kept else None
        version = table.blocks[number]._version
        self.bases[number] = Base(source, None if known is None else known.digest, version)
        if not is_kept and self.is_changed is not None:
            first = table.first_rows[number]
            self.is_changed[first : first + table.block_shapes[number][0]] = False

    # Loading.

    def bring(self, table, keys: torch.Tensor, rows: torch.Tensor, digests: torch.Tensor) -> None:
        """Write the rows that a checkpoint holds beside the blocks that have just been opened.

        Raises:
            ValueError: they do not fit the table.
        """
        self._refuse_unfit(table, keys, rows, digests)
        self.brought = [keys]
        rows_at_once = max(1, PIECE_BYTES // table.row_nbytes)
        for start in range(0, len(keys), rows_at_once):
            part = slice(start, start + rows_at_once)
            table.write_rows(keys[part].to(table.home), rows[part])

    def expect(self, table, keys: torch.Tensor, rows: torch.Tensor, digests: torch.Tensor) -> None:
        """Keep the rows that a state dict brings, until the blocks are there that they are changes of.

        Raises:
            ValueError: they do not fit the table.
        """
        self._refuse_unfit(table, keys, rows, digests)
        self.arriving = {
            number: (bytes(digests[number].tolist()), wanted, rows[part]) for number, part, wanted in table.parts(keys)
        }
        self.brought = [keys]

    @staticmethod
    def _refuse_unfit(table, keys: torch.Tensor, rows: torch.Tensor, digests: torch.Tensor) -> None:
        is_fit = digests.shape == (len(table.rows_of_block), DIGEST_BYTES) and rows.shape == (
            len(keys),
            table.row_width,
        )
        if not is_fit or rows.dtype != table.dtype or len(keys) and int(keys[-1]) >= table.num_rows:
            raise ValueError(
                f"The checkpoint's changed rows ({tuple(rows.shape)} {rows.dtype}) do not fit this table of "
                f"{table.num_rows} rows ({table.row_width} {table.dtype}). Load all of a checkpoint from one folder."
            )

    def follow_blocks(self, table, given: Sequence[int]) -> None:
        """A state dict has brought these blocks: write the rows over them that have come for them before."""
        for number in [number for number in given if number in self.arriving]:
            # Where it is not the block that they belong to, `settle` says so.
            self._write(table, number)

    def settle(self, table) -> None:
        """Before a table is used: write the rows that have come after their blocks.

        Raises:
            ValueError: rows have come without the block that they belong to.
        """
        for number in list(self.arriving):
            if not self._write(table, number):
                raise ValueError(
                    f"Changed rows of a checkpoint have come without block {number} that they belong to. Load all "
                    "files of it from one folder, or merge it first: engram_hf.merge_changed_rows(folder, target)."
                )

    def _write(self, table, number: int) -> bool:
        digest, wanted, rows = self.arriving[number]
        if digest_of(table.blocks[number].detach()) != digest:
            return False
        del self.arriving[number]
        table.write_rows(wanted + table.first_rows[number], rows)
        return True


def digest_of(block: torch.Tensor) -> bytes:
    """SHA-256 of the bytes of a block."""
    digest = hashlib.sha256()
    for piece in TensorContent.of(block).pieces():
        digest.update(piece)
    return digest.digest()


def _digest_if_same(source: BlockSource, block: torch.Tensor, is_changed: torch.Tensor) -> bytes | None:
    """SHA-256 of a file's tensor, where a block has the same rows but for those that have changed."""
    digest = hashlib.sha256()
    for start, rows in rows_of_pieces(source, block.shape[1], block.dtype):
        digest.update(rows.view(torch.uint8).numpy().data)
        ours = block[start : start + len(rows)].cpu()
        is_other = (ours.view(torch.uint8) != rows.view(torch.uint8)).any(-1)
        if (is_other & ~is_changed[start : start + len(rows)]).any():
            return None
    return digest.digest()


def _has_rows_of(source: BlockSource, block: torch.Tensor, is_changed: torch.Tensor) -> bool:
    """Whether some rows that are not known to have changed are those of the file."""
    rows, row_nbytes = block.shape[0], block.shape[1] * block.element_size()
    for row in torch.randint(0, rows, (SAMPLED_ROWS,), generator=torch.Generator().manual_seed(0)).tolist():
        if is_changed[row]:
            continue
        theirs = bytearray(row_nbytes)
        source.file.read_bytes(source.name, row * row_nbytes, memoryview(theirs))
        if bytes(block[row].cpu().view(torch.uint8).numpy().data) != bytes(theirs):
            return False
    return True


def rows_of_pieces(source: BlockSource, width: int, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """A file's tensor in runs of whole rows: the number of the first, and the rows, (n, width)."""
    start, rest, row_nbytes = 0, b"", width * dtype.itemsize
    for piece in source.file.content(source.name).pieces():
        held = rest + bytes(piece)
        whole = len(held) // row_nbytes * row_nbytes
        rest = held[whole:]
        if whole:
            rows = torch.frombuffer(bytearray(held[:whole]), dtype=dtype).view(-1, width)
            yield start, rows
            start += len(rows)

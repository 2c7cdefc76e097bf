"""Rows that differ from a file: how a table in training is saved without writing it whole, and read again.

A checkpoint of a training run holds the file that a block came from (a second name for it, no copy) and a small file
with the rows that have changed since. That file has, for each table:

* `<table>.changed.row_ids`, (n,) int64, ascending;
* `<table>.changed.rows`, (n, row width);
* `<table>.changed.digests`, (blocks, 32) uint8, the SHA-256 of each block that the rows are written over;
* `<table>.changed.stamp`, (16,) uint8, of the run and its step, which the optimizer's state has too.

Where a table is cut over ranks there is one such file for the rows of each rank.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .disk_files import BlockSource, source_behind
from .disk_safetensors import PIECE_BYTES, TensorContent
from .table_blocks import COMPARED_BYTES, DIGESTS, ROW_IDS, ROWS, STAMP, Base, Block


DIGEST_BYTES, STAMP_BYTES = 32, 16
SAMPLED_ROWS = 512
# Where more of a block has changed than this, it is written whole, and what follows is changes of that.
LARGEST_SHARE = 0.5


class RowStore(Protocol):
    """What this file needs of a table."""

    block_records: list[Block]
    row_width: int

    @property
    def num_rows(self) -> int: ...
    @property
    def held_rows(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def home(self) -> torch.device: ...
    def parts(self, row_ids: torch.Tensor) -> Iterator[tuple[Block, slice, torch.Tensor]]: ...
    def gather_rows(self, row_ids: torch.Tensor) -> torch.Tensor: ...
    def held_ids(self, row_ids: torch.Tensor) -> torch.Tensor: ...
    def are_held(self, row_ids: torch.Tensor) -> torch.Tensor | None: ...
    def write_rows(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None: ...


@dataclass
class TrainingRun:
    """A run that trains tables row by row. Its optimizer makes it, and gives it to every table.

    folder: `args.output_dir`; checkpoints of the run lie in it.
    steps: of the optimizer, in this run.
    write_row_state: writes into a folder what the optimizer knows of rows, where that is too much for one process, and
        returns the names of the files with their SHA-256; None where the optimizer's own file holds it.
    """

    folder: Path | None = None
    steps: int = 0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    last_checkpoint: tuple[Path, int] | None = None
    write_row_state: Callable[[Path], dict[str, str]] | None = None

    @property
    def stamp(self) -> bytes:
        """What ties rows and optimizer state to each other: this run at this step."""
        return hashlib.sha256(f"{self.run_id} {self.steps}".encode()).digest()[:STAMP_BYTES]

    def has_checkpoint(self, folder: Path) -> bool:
        """Whether a folder is the place of one of this run's checkpoints."""
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if self.folder is None or not number.isdigit() or number == folder.name:
            return False
        # A search of hyperparameters gives each trial a folder of its own.
        return self.folder.resolve() in folder.resolve().parents

    def begins_checkpoint(self, folder: Path) -> bool:
        """Whether a save into a folder makes a new checkpoint there; False where it only saves the same again."""
        return self.has_checkpoint(folder) and self.last_checkpoint != (folder.resolve(), self.steps)


class ChangedRows(NamedTuple):
    """What a checkpoint holds of a table's changed rows; see the top of this file. stamp: None in older files."""

    row_ids: torch.Tensor
    rows: torch.Tensor
    digests: torch.Tensor
    stamp: bytes | None = None

    @classmethod
    def from_tensors(cls, parts: dict[str, torch.Tensor], table: str, where: str) -> "ChangedRows":
        """
        Args:
            parts: by the last part of their names.
            table: its name, for messages.
            where: the checkpoint, for messages.

        Raises:
            ValueError: a part is missing, of another type or shape, or the row ids are not ascending.
        """
        missing = sorted({ROW_IDS, ROWS, DIGESTS} - set(parts))
        if missing:
            raise ValueError(
                f"{where} lacks the {' and '.join(missing)} of the changed rows of {table}. Copy the whole folder of "
                "the checkpoint again."
            )
        row_ids, rows, digests = parts[ROW_IDS], parts[ROWS], parts[DIGESTS]
        wrong = None
        if row_ids.dtype != torch.int64 or row_ids.ndim != 1:
            wrong = f"row_ids are {tuple(row_ids.shape)} {row_ids.dtype}, and must be (n,) torch.int64"
        elif rows.ndim != 2 or len(rows) != len(row_ids):
            wrong = f"rows are {tuple(rows.shape)}, and must be ({len(row_ids)}, row width)"
        elif digests.dtype != torch.uint8 or digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
            wrong = f"digests are {tuple(digests.shape)} {digests.dtype}, and must be (blocks, 32) torch.uint8"
        elif len(row_ids) and int(row_ids[0]) < 0:
            wrong = f"row_ids begin with {int(row_ids[0])}, and must not be negative"
        elif (row_ids[1:] <= row_ids[:-1]).any():
            wrong = "row_ids are not ascending and distinct"
        stamp = parts.get(STAMP)
        if stamp is not None and (stamp.dtype != torch.uint8 or stamp.shape != (STAMP_BYTES,)):
            wrong = f"stamp is {tuple(stamp.shape)} {stamp.dtype}, and must be ({STAMP_BYTES},) torch.uint8"
        if wrong is not None:
            raise ValueError(f"The changed rows of {table} in {where} are damaged: {wrong}. Copy the checkpoint again.")
        return cls(row_ids, rows, digests, None if stamp is None else bytes(stamp.tolist()))

    def check_fit(self, table: str, num_rows: int, row_width: int, dtype: torch.dtype | None, blocks: int) -> None:
        """
        Raises:
            ValueError: the rows are those of a table of another size or type.
        """
        is_fit = len(self.digests) == blocks and self.rows.shape[1] == row_width and self.rows.dtype == dtype
        if not is_fit or (len(self.row_ids) and int(self.row_ids[-1]) >= num_rows):
            last = int(self.row_ids[-1]) if len(self.row_ids) else None
            raise ValueError(
                f"The checkpoint's changed rows ({tuple(self.rows.shape)} {self.rows.dtype}, last row id {last}, "
                f"{len(self.digests)} blocks) do not fit {table} ({num_rows} rows of {row_width} {dtype}, {blocks} "
                "blocks). Load all of a checkpoint from one folder."
            )


@dataclass
class ArrivedRows:
    """Rows of one block that a state dict has brought, (n,) counted from the block's first, and (n, row width).

    digest: of the block that they are changes of.
    is_written: whether the block has them now.
    """

    digest: bytes
    wanted: torch.Tensor
    rows: torch.Tensor
    is_written: bool = False


@dataclass
class LoadInProgress:
    """What state dicts of one checkpoint have brought to a table, from the first of them until its rows are used.

    arrived: number of a block, and of the rank that has saved them, to rows that wait for it.
    digests: number of a block to its SHA-256 before any of these rows were written to it.
    ranks: whose rows have come.
    blocks: numbers of those that have come.
    """

    arrived: dict[tuple[int, int], ArrivedRows] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)


class RowChanges:
    """What one table knows of its changed rows, and of those that a checkpoint brings.

    run: the training run that the table takes part in; None for none.
    stamp: of the run and step whose rows were loaded last; None where they have none.
    """

    def __init__(self):
        self.run: TrainingRun | None = None
        self.stamp: bytes | None = None
        # (rows that are held,) bool while it is trained.
        self._is_changed: torch.Tensor | None = None
        self._load = LoadInProgress()
        # Held ids of rows that a checkpoint has brought over the table's blocks.
        self._brought: torch.Tensor | None = None

    def begin(self, table: RowStore, run: TrainingRun) -> None:
        """Follow a table in training from now on. Its blocks are as their files have them, but for brought rows."""
        self.run = run
        self._is_changed = torch.zeros(table.held_rows, dtype=torch.bool)
        if self._brought is not None:
            self.mark(self._brought)
        for block in table.block_records:
            can_stand = block.source is not None and block.source.file.can_be_linked
            block.stand_on(Base(block.source) if block.source is not None and can_stand else None)

    def mark(self, row_ids: torch.Tensor) -> None:
        """These rows, (n,) int64 held ids, have changed."""
        if self._is_changed is not None:
            self._is_changed[row_ids.cpu()] = True

    def _marks_of(self, block: Block) -> torch.Tensor:
        """(rows of the block,) bool, a view."""
        if self._is_changed is None:
            raise RuntimeError("The table is not in training, so its changed rows are not known.")
        return self._is_changed[block.first_row : block.first_row + block.num_rows]

    # Saving.

    def changed_of(self, block: Block) -> torch.Tensor:
        """(n,) int64: held ids of the changed rows of a block."""
        return self._marks_of(block).nonzero().flatten() + block.first_row

    def base_of(self, block: Block, largest_share: float = LARGEST_SHARE) -> BlockSource | None:
        """The file that a block can be saved with, its changed rows beside it; None where there is none, or where more
        than `largest_share` of the rows have changed.

        The first time everything but the changed rows is compared with the file. Later a sample is, since some ways of
        writing to a block cannot be seen (`.data`, numpy).
        """
        base = block.base
        if self._is_changed is None or base is None or not base.source.file.is_at_its_path():
            return None
        base.source.file.check_unchanged()
        marks = self._marks_of(block)
        if marks.count_nonzero() > largest_share * block.num_rows:
            return None
        version, digest = block.parameter._version, base.digest
        if version != base.version:
            # Somebody else than `write_rows` has written to it.
            digest = None
        elif digest is not None and not _has_rows_of(base.source, block.rows, marks):
            digest = None
        if digest is None:
            digest = _digest_if_same(base.source, block.rows, marks)
        block.stand_on(None if digest is None else base._replace(digest=digest, version=version))
        return None if block.base is None else block.base.source

    def count_changed(self, block: Block) -> int:
        """How many rows of a block have changed."""
        return int(self._marks_of(block).count_nonzero())

    def changed_between(self, start: int, end: int, blocks: Sequence[Block]) -> torch.Tensor:
        """(n,) int64, ascending: held ids of the changed rows of some blocks, from `start` up to `end`."""
        found = [torch.zeros(0, dtype=torch.int64)]
        for block in blocks:
            first, last = max(start, block.first_row), min(end, block.first_row + block.num_rows)
            if first < last:
                marks = self._marks_of(block)[first - block.first_row : last - block.first_row]
                found.append(marks.nonzero().flatten() + first)
        return torch.cat(found)

    def follow_save(self, block: Block, source: BlockSource | None, by_base: bool, known_as: str = "") -> None:
        """Know where a save has put a block: by its base and rows, or whole, which is a new base.

        Args:
            block: that was saved.
            source: where it is; None where that is the disk of another machine.
            by_base: whether it was left to its base.
            known_as: what all ranks call it.
        """
        base = block.base if by_base else None
        if source is not None:
            digest = None if base is None else base.digest
            block.stand_on(Base(source, digest, block.parameter._version, known_as))
        else:
            block.stand_on(None if base is None else base._replace(known_as=known_as))
        if not by_base and self._is_changed is not None:
            self._marks_of(block).fill_(False)

    # Loading.

    def bring(self, table_name: str, table: RowStore, changed: Sequence[ChangedRows]) -> None:
        """Write the rows that a checkpoint holds over blocks that have just been opened.

        Args:
            table_name: for messages.
            table: the table.
            changed: the rows, of each rank that has saved some.

        Raises:
            ValueError: they do not fit the table.
        """
        for each in changed:
            each.check_fit(table_name, table.num_rows, table.row_width, table.dtype, len(table.block_records))
        rows_at_once = max(1, PIECE_BYTES // (table.row_width * table.dtype.itemsize))
        for each in changed:
            held, which = _held(table, each.row_ids)
            self._remember_brought(held, each.stamp)
            for part, wanted in zip(held.split(rows_at_once), which.split(rows_at_once)):
                table.write_rows(part.to(table.home), each.rows[wanted])

    def _remember_brought(self, held: torch.Tensor, stamp: bytes | None) -> None:
        """Held ids of rows that a checkpoint has brought. Those of other ranks at the same step count too."""
        is_more = stamp is not None and stamp == self.stamp and self._brought is not None
        self._brought = torch.cat([self._brought, held]).unique() if is_more and self._brought is not None else held
        self.stamp = stamp

    def arrive(self, table_name: str, table: RowStore, changed: ChangedRows, rank: int = 0) -> None:
        """Take rows that a state dict brings. Their blocks may be there already, or come in a later state dict.

        Args:
            table_name: for messages.
            table: the table.
            changed: the rows.
            rank: that has saved them.

        Raises:
            ValueError: they do not fit the table.
        """
        changed.check_fit(table_name, table.num_rows, table.row_width, table.dtype, len(table.block_records))
        held, which = _held(table, changed.row_ids)
        if changed.stamp is None or changed.stamp != self.stamp or rank in self._load.ranks:
            # Another checkpoint, or the same once more. Its blocks may have come ahead of its rows.
            self._load = LoadInProgress(blocks=self._load.blocks)
        self._load.ranks.add(rank)
        self._load.arrived = {key: each for key, each in self._load.arrived.items() if key[1] != rank} | {
            (block.number, rank): ArrivedRows(
                bytes(changed.digests[block.number].tolist()), wanted, _rows_at(changed.rows, which[part])
            )
            for block, part, wanted in table.parts(held)
        }
        self._remember_brought(held, changed.stamp)

    def forget_stamp(self, loaded: Sequence[Block]) -> None:
        """Blocks have come without changed rows, so that the table is no longer what a run has saved. Rows that a state
        dict has brought wait for such blocks, and state dicts of one checkpoint bring each block once."""
        is_next = bool(self._load.blocks) and self._load.blocks.isdisjoint(block.number for block in loaded)
        if not self._load.arrived and not is_next:
            self.stamp = None

    def follow_load(self, table: RowStore, loaded: Sequence[Block]) -> None:
        """A state dict was loaded into these blocks: write the rows over every block that they are changes of.

        Once rows and their block have both come, in either order, they are done with: what is loaded next has rows of
        its own.
        """
        here, load = {block.number for block in loaded}, self._load
        # A block that comes again begins another load.
        load.blocks = here | (load.blocks if here.isdisjoint(load.blocks) else set())
        load.digests = {number: each for number, each in load.digests.items() if number not in here}
        for key, arrived in list(load.arrived.items()):
            block = table.block_records[key[0]]
            if arrived.is_written and block.number not in here:
                continue
            if self._digest_of(block) == arrived.digest:
                table.write_rows(arrived.wanted + block.first_row, arrived.rows)
                arrived.is_written = True
                if block.number in load.blocks:
                    del load.arrived[key]
            else:
                arrived.is_written = False

    def _digest_of(self, block: Block) -> bytes | None:
        """SHA-256 of a block as it was loaded; None where it has no memory yet."""
        digests = self._load.digests
        if block.number not in digests and not block.parameter.is_meta:
            digests[block.number] = _digest_of_block(block)
        return digests.get(block.number)

    def settle(self) -> None:
        """Called before rows are used or copied. Nothing that a load has brought may be missing then.

        Raises:
            ValueError: rows have come without the block that they belong to.
        """
        waiting = [number for (number, _), each in self._load.arrived.items() if not each.is_written]
        self._load = LoadInProgress(self._load.arrived if waiting else {})
        if waiting:
            raise ValueError(
                f"Changed rows of a checkpoint have come without block {waiting[0]} that they belong to. Load all "
                "files of it from one folder, or merge it first: engram_hf.merge_changed_rows(folder, target)."
            )


def _held(table: RowStore, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (n,) row ids the held ids of those that this process holds, and their places among the n."""
    are_held = table.are_held(row_ids)
    which = torch.arange(len(row_ids)) if are_held is None else are_held.nonzero().flatten()
    return table.held_ids(row_ids[which]), which


def _rows_at(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows by their places, (n,) ascending. Those of a mapped file are not copied where they lie in one run."""
    first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
    is_run = last - first + 1 == len(places)
    return rows[first : last + 1] if is_run and source_behind(rows) is not None else rows[places]


def _digest_of_block(block: Block) -> bytes:
    """SHA-256 of a block as it was loaded; of the whole block, where this process holds a part of it."""
    return digest_of(block.rows) if block.digest_of_loaded is None else block.digest_of_loaded


def digest_of(block: torch.Tensor) -> bytes:
    """SHA-256 of the bytes of a block."""
    return digest_of_content(TensorContent.of(block))


def digest_of_content(content: TensorContent) -> bytes:
    """SHA-256 of the bytes of a tensor."""
    digest = hashlib.sha256()
    for piece in content.pieces():
        digest.update(piece)
    return digest.digest()


def _digest_if_same(source: BlockSource, block: torch.Tensor, is_changed: torch.Tensor) -> bytes | None:
    """SHA-256 of a file's tensor, if a block has the same rows but for those that have changed."""
    digest = hashlib.sha256()
    for start, rows in rows_of_pieces(source, block.shape[1], block.dtype):
        digest.update(rows.view(torch.uint8).numpy().data)
        ours = block[start : start + len(rows)].cpu()
        is_other = (ours.view(torch.uint8) != rows.view(torch.uint8)).any(-1)
        if (is_other & ~is_changed[start : start + len(rows)]).any():
            return None
    return digest.digest()


def _has_rows_of(source: BlockSource, block: torch.Tensor, is_changed: torch.Tensor) -> bool:
    """Whether a sample of the rows that are not known to have changed are those of the file."""
    rows, row_nbytes = block.shape[0], block.shape[1] * block.element_size()
    if not rows:
        return True
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
    for piece in source.file.content(source.name, COMPARED_BYTES).pieces():
        held = rest + bytes(piece)
        whole = len(held) // row_nbytes * row_nbytes
        rest = held[whole:]
        if whole:
            rows = torch.frombuffer(bytearray(held[:whole]), dtype=dtype).view(-1, width)
            yield start, rows
            start += len(rows)

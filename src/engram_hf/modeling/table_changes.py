"""Rows that differ from a file: how a table in training is saved without writing it whole, and read again. Also what
any save takes of one table: the file that a block can be left to, changed rows, whole blocks.

A checkpoint of a training run holds the file that a block came from (a second name for it, no copy) and a small file
with the rows that have changed since. That file has, for each table:

* `<table>.changed.row_ids`, (n,) int64, ascending;
* `<table>.changed.rows`, (n, row width);
* `<table>.changed.digests`, (blocks, 32) uint8, the SHA-256 of each block that the rows are written over;
* `<table>.changed.stamp`, (16,) uint8, of the run and its step, which the optimizer's state has too.

Where a table is cut over ranks there is one such file for the rows of each rank. One rank saves and asks the others,
and each answers for its own part. Whatever has as many rows as the table travels in pieces, so no rank holds more than
its part and a piece. No rank needs the disk of another one.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .disk_files import BlockSource, TableFile, source_behind
from .disk_safetensors import PIECE_BYTES, TensorContent
from .table_blocks import COMPARED_BYTES, DIGESTS, ROW_IDS, ROWS, STAMP, Base, Block, changed_name
from .table_cut import RankFile, RowCut
from .table_ranks import BASE, CHANGED, SAVED, SENT_BYTES, SOURCE, TableRanks


DIGEST_BYTES, STAMP_BYTES = 32, 16
SAMPLED_ROWS = 512
# Where more of a block has changed than this, it is written whole, and what follows is changes of that.
LARGEST_SHARE = 0.5


class RowStore(Protocol):
    """What following its rows needs of a table."""

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


# What a save takes.


class StoredTable(RowStore, Protocol):
    """What a save needs of a table."""

    ranks: TableRanks | None
    changes: RowChanges

    @property
    def row_nbytes(self) -> int: ...
    @property
    def is_in_training(self) -> bool: ...
    def gather_held(self, row_ids: torch.Tensor) -> torch.Tensor: ...
    def row_ids_of(self, held: torch.Tensor) -> torch.Tensor: ...


class TableSaving:
    """One table while it is saved."""

    def __init__(self, table: StoredTable):
        self.table = table

    def answer(self) -> None:
        """Answer the rank that saves for this rank's part, from now on."""
        if self.table.ranks is not None:
            self.table.ranks.handlers |= {
                CHANGED: self._answer_changed,
                BASE: self._answer_base,
                SAVED: self._answer_saved,
                SOURCE: self._answer_source,
            }

    # The file that a block can be left to.

    def base_of(self, block: Block) -> BlockSource | None:
        """The file that a block can be saved with, its changed rows beside it; None where there is none.

        Over ranks, each of them sees to its own part of the block.
        """
        ranks = self.table.ranks
        if ranks is None:
            return self.table.changes.base_of(block)
        own = self._base_of_part(block)
        others = [json.loads(each) for each in ranks.ask_all(BASE, {"block": block.number})]
        changed = sum(each["changed_rows"] for each in [own, *others])
        is_base = own["name"] is not None and all(each["name"] == own["name"] for each in others)
        rows = ranks.cut.rows_of_block[block.number]
        return block.base.source if is_base and block.base and changed <= LARGEST_SHARE * rows else None

    def _base_of_part(self, block: Block) -> dict:
        source = self.table.changes.base_of(block, largest_share=1.0)
        name = None
        if source is not None and block.base is not None:
            name = block.base.known_as or f"{source.file.path.resolve()} {source.name}"
        return {"name": name, "changed_rows": self.table.changes.count_changed(block)}

    def _answer_base(self, asked: bytes) -> bytes:
        return json.dumps(self._base_of_part(self.table.block_records[json.loads(asked)["block"]])).encode()

    def source_of(self, block: Block, tensor: torch.Tensor) -> BlockSource | None:
        """The file of a block, where this is the table's own block, on disk and as its file has it, on every rank.

        Args:
            block: of a table that nobody trains.
            tensor: what is saved for it; over ranks the block itself.
        """
        if self.table.ranks is None:
            return source_on_disk(block, tensor)
        own = self._source_of_part(block)
        others = [json.loads(each) for each in self.table.ranks.ask_all(SOURCE, {"block": block.number})]
        return block.source if own is not None and all(each == own for each in others) else None

    def _source_of_part(self, block: Block) -> str | None:
        source = source_on_disk(block, block.parameter)
        return None if source is None else f"{source.file.path.resolve()} {source.name}"

    def _answer_source(self, asked: bytes) -> bytes:
        return json.dumps(self._source_of_part(self.table.block_records[json.loads(asked)["block"]])).encode()

    def _digest_of_base(self, block: Block) -> bytes | None:
        """SHA-256 of the whole block in the file that it stands on."""
        if block.base is None or not isinstance(block.base.source.file, RankFile):
            return None if block.base is None else block.base.digest
        return block.base.source.file.whole_digest(block.base.source.name, digest_of_content)

    # Changed rows.

    def changed_rows(self, table_name: str, blocks: Sequence[Block]) -> list[dict[str, TensorContent]]:
        """What a checkpoint of the run holds of the changed rows of some blocks: for each rank, its own.

        Args:
            table_name: as the names of its blocks begin.
            blocks: those that their `base` stands for.
        """
        table, run = self.table, self.table.changes.run
        if run is None:
            raise RuntimeError("The table is not in training, so its changed rows are not known.")
        digests = torch.zeros(len(table.block_records), DIGEST_BYTES, dtype=torch.uint8)
        for block in blocks:
            digests[block.number] = torch.tensor(list(self._digest_of_base(block) or bytes(DIGEST_BYTES)))
        stamp = torch.tensor(list(run.stamp), dtype=torch.uint8)
        numbers = sorted(block.number for block in blocks)
        found = []
        for rank in range(1 if table.ranks is None else table.ranks.cut.ranks):
            parts = self._changed_of_rank(rank, numbers)
            parts |= {DIGESTS: TensorContent.of(digests), STAMP: TensorContent.of(stamp)}
            found.append({changed_name(table_name, part, rank): content for part, content in parts.items()})
        return found

    def _changed_of_rank(self, rank: int, numbers: list[int]) -> dict[str, TensorContent]:
        table, ranks = self.table, self.table.ranks
        width, row_nbytes = table.row_width, table.row_nbytes
        if ranks is None:
            blocks = [table.block_records[number] for number in numbers]
            held = table.changes.changed_between(0, table.held_rows, blocks)
            at_once = max(1, SENT_BYTES // row_nbytes)

            def pieces() -> Iterator[bytes | memoryview]:
                for part in held.split(at_once):
                    yield from TensorContent.of(table.gather_rows(part.to(table.home))).pieces()

            rows = TensorContent(table.dtype, (len(held), width), len(held) * row_nbytes, pieces)
            return {ROW_IDS: TensorContent.of(held), ROWS: rows}
        asked = {"blocks": numbers}
        (count,) = json.loads(ranks.ask_one(rank, CHANGED, {**asked, "part": "count"}))
        return {
            ROW_IDS: ranks.content_of(rank, CHANGED, {**asked, "part": ROW_IDS}, torch.int64, (count,)),
            ROWS: ranks.content_of(rank, CHANGED, {**asked, "part": ROWS}, table.dtype, (count, width)),
        }

    def _answer_changed(self, content: bytes) -> bytes:
        asked, table = json.loads(content), self.table
        blocks = [table.block_records[number] for number in asked["blocks"]]
        if asked["part"] == "count":
            return json.dumps([sum(table.changes.count_changed(block) for block in blocks)]).encode()
        held = table.changes.changed_between(asked["start"], asked["end"], blocks)
        if asked["part"] == ROW_IDS:
            return bytes_of(table.row_ids_of(held))
        return bytes_of(table.gather_held(held.to(table.home)))

    # Whole blocks.

    def whole_nbytes(self, block: Block) -> int:
        """Bytes of a block with the rows of all ranks."""
        ranks = self.table.ranks
        return (block.num_rows if ranks is None else ranks.cut.rows_of_block[block.number]) * self.table.row_nbytes

    def content_of(self, block: Block, cut: RowCut) -> TensorContent:
        """A block with the rows of all ranks, to be written to a file; they arrive while it is written."""
        rows, first = cut.rows_of_block[block.number], sum(cut.rows_of_block[: block.number])
        at_once = max(1, SENT_BYTES // self.table.row_nbytes)

        def pieces() -> Iterator[bytes | memoryview]:
            for start in range(first, first + rows, at_once):
                ids = torch.arange(start, min(start + at_once, first + rows))
                yield from TensorContent.of(self.table.gather_rows(ids)).pieces()

        shape = (rows, self.table.row_width)
        return TensorContent(self.table.dtype, shape, rows * self.table.row_nbytes, pieces)

    # After a save.

    def follow(self, saved_by_base: Sequence[int] = ()) -> None:
        """A save has put every block where its `saved_in` says: read those on disk from there if their own file is
        gone. All ranks do so. One that does not see the disk of the rank that has saved keeps the files that it has.

        Args:
            saved_by_base: numbers of the blocks that were left to the file they come from, changed rows beside it.
        """
        if self.table.ranks is not None:
            saved_in = {
                block.number: (str(block.saved_in[0].absolute()), block.saved_in[1])
                for block in self.table.block_records
                if block.saved_in is not None
            }
            self.table.ranks.ask_all(SAVED, {"saved_in": saved_in, "by_base": list(saved_by_base)})
        self._follow(saved_by_base)

    def _answer_saved(self, asked: bytes) -> bytes:
        saved: Mapping = json.loads(asked)
        for number, (path, name) in saved["saved_in"].items():
            self.table.block_records[int(number)].note_save(Path(path), name)
        self._follow(saved["by_base"])
        return b""

    def _follow(self, saved_by_base: Sequence[int]) -> None:
        table, opened = self.table, self._open_parts_saved()
        for block in table.block_records:
            if block.saved_in is None:
                continue
            path, name = block.saved_in
            by_base, known_as = block.number in saved_by_base, f"{path.absolute()} {name}"
            # The file of a base lacks the rows that have changed.
            is_gone = block.is_on_disk and block.source is not None and not block.source.file.is_at_its_path()
            if table.ranks is not None and path not in opened:
                if table.is_in_training:
                    table.changes.follow_save(block, None, by_base, known_as)
            elif (is_gone and not by_base) or table.is_in_training:
                if path not in opened:
                    opened[path] = TableFile(path)
                source, base = BlockSource(opened[path], name), block.base
                if by_base and base is not None and isinstance(source.file, RankFile):
                    source.file.is_copy_of(name, base.source)
                if is_gone and not by_base:
                    block.read_from(source)
                if table.is_in_training:
                    table.changes.follow_save(block, source, by_base, known_as)
            if table.ranks is not None:
                block.forget_save()

    def _open_parts_saved(self) -> dict[Path, TableFile]:
        """Over ranks, the files that a save has written and this rank sees, with the rows that it holds."""
        ranks, parts = self.table.ranks, dict[Path, dict[str, tuple[int, int]]]()
        for block in self.table.block_records:
            if ranks is not None and block.saved_in is not None:
                path, name = block.saved_in
                parts.setdefault(path, {})[name] = ranks.cut.part(block.number, ranks.rank)
        return {path: RankFile(path, of_file) for path, of_file in parts.items() if path.is_file()}


def source_on_disk(block: Block, tensor: torch.Tensor) -> BlockSource | None:
    """The file of a block, where a tensor is the block itself, on disk and as its file has it."""
    source = block.source
    if source is None or not block.is_on_disk or not source.file.can_be_linked:
        return None
    return source if source.is_under(tensor) and source.holds(tensor) else None


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, as a file has them."""
    return b"".join(TensorContent.of(tensor).pieces())

"""What a save takes of one table: the file that a block can be left to, the rows that have changed, whole blocks.

Where a table is cut over ranks, one rank saves and asks the others, and each answers for its own part. Whatever has as
many rows as the table travels in pieces, so no rank holds more than its part and a piece. No rank needs the disk of
another one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .disk_files import BlockSource, TableFile
from .disk_safetensors import TensorContent
from .table_blocks import DIGESTS, ROW_IDS, ROWS, STAMP, Block, changed_name
from .table_changes import DIGEST_BYTES, LARGEST_SHARE, RowChanges, RowStore, digest_of_content
from .table_cut import RankFile, RowCut
from .table_ranks import BASE, CHANGED, PIECE_BYTES, SAVED, SOURCE, TableRanks


class StoredTable(RowStore, Protocol):
    """What this file needs of a table."""

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
            at_once = max(1, PIECE_BYTES // row_nbytes)

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
        at_once = max(1, PIECE_BYTES // self.table.row_nbytes)

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

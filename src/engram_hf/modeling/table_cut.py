"""How a table is cut over ranks: which rank holds which rows, and what it opens of a file.

Each block is cut as torch's DTensor cuts it with `Shard(0)`. A *row id* counts through the whole table, as everywhere.
A *held id* counts through the rows that one rank holds. This file knows numbers and files, and no process group:
table_ranks.py asks other ranks.

What a training step moves follows from the cut, computed from sizes and two stated assumptions. Nothing is measured. A
rank reads distinct rows, each once, and asks for those that others hold. Their gradients travel back in float32, or in
the type of the table where that is wider. Other ranks ask this one for as many rows, on average.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from .disk_files import BlockSource, TableFile
from .disk_safetensors import TensorContent, TensorPlace


# Bytes of a held id that travels, and the bits of it.
ID_BYTES, ID_BITS = 4, 32

# What is assumed of a step where nobody says better: tokens of a rank, and how many of their rows are distinct.
TOKENS_OF_A_STEP = 16_384
DISTINCT_SHARE = 0.5
# A row id goes to its owner with the question. A message of gradients names the question, with a bit for each row.
NAMED_NBYTES = 1 / 8
# Of one number in a gradient.
GRADIENT_NBYTES = 4


class RowCut:
    """Rows of each block over ranks, as DTensor's `Shard(0)` cuts them: chunks of ceil(rows / ranks) rows.

    Example:
        >>> cut = RowCut(rows_of_block=[5, 3], ranks=2)
        >>> cut.part(block=0, rank=1)
        (3, 5)
        >>> cut.owner(torch.arange(8)).tolist()
        [0, 0, 0, 1, 1, 0, 0, 1]
        >>> cut.to_held(torch.tensor([3, 4, 7]), rank=1).tolist()
        [0, 1, 2]
    """

    def __init__(self, rows_of_block: Sequence[int], ranks: int):
        self.rows_of_block, self.ranks = tuple(rows_of_block), ranks
        self.num_rows = sum(self.rows_of_block)
        chunks = [math.ceil(rows / ranks) for rows in self.rows_of_block]
        self._chunks = torch.tensor(chunks, device="cpu")
        # Row id of the first row of each block.
        self._firsts = torch.tensor(list(accumulate(self.rows_of_block[:-1], initial=0)), device="cpu")

    def part(self, block: int, rank: int) -> tuple[int, int]:
        """The rows of a block that a rank holds, counted from the block's first: begin and end."""
        rows = self.rows_of_block[block]
        chunk = math.ceil(rows / self.ranks)
        return min(rank * chunk, rows), min((rank + 1) * chunk, rows)

    def rows_of(self, rank: int) -> list[int]:
        """Rows of each block that a rank holds."""
        parts = [self.part(block, rank) for block in range(len(self.rows_of_block))]
        return [end - begin for begin, end in parts]

    def block_of(self, row_ids: torch.Tensor) -> torch.Tensor:
        """(n,) row ids to the numbers of their blocks."""
        return torch.bucketize(row_ids, self._firsts[1:].to(row_ids.device), right=True)

    def owner(self, row_ids: torch.Tensor) -> torch.Tensor:
        """(n,) row ids to the ranks that hold them."""
        block = self.block_of(row_ids)
        return (row_ids - self._firsts.to(row_ids.device)[block]) // self._chunks.to(row_ids.device)[block]

    def by_owner(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(n,) ascending row ids: their places in the order of owners, (n,), and the row ids of each owner."""
        owners = self.owner(row_ids)
        order = owners.argsort(stable=True)
        return order, row_ids[order].split(owners.bincount(minlength=self.ranks).tolist())

    def to_held(self, row_ids: torch.Tensor, rank: int) -> torch.Tensor:
        """(n,) row ids of rows that a rank holds to its held ids; ascending stay ascending."""
        return row_ids - self._shifts(rank).to(row_ids.device)[self.block_of(row_ids)]

    def to_table(self, held: torch.Tensor, rank: int) -> torch.Tensor:
        """(n,) held ids of a rank to row ids."""
        firsts = torch.tensor(list(accumulate(self.rows_of(rank)[:-1], initial=0)), device=held.device)
        block = torch.bucketize(held, firsts[1:], right=True)
        return held + self._shifts(rank).to(held.device)[block]

    def pack(self, row_ids: torch.Tensor, rank: int) -> torch.Tensor:
        """Row ids as they travel to the rank that holds the rows: its held ids, in four bytes each.

        Args:
            row_ids: (n,) int64, ascending.
            rank: that holds the rows.

        Returns:
            (4 * n,) uint8, and eight more for each multiple of 2**32 that is below the number of held rows.
        """
        held = self.to_held(row_ids, rank)
        # Where more than 2**32 rows are held: how many ids lie below each multiple of it.
        steps = torch.arange(1, self._carries(rank) + 1, device=held.device) << ID_BITS
        low = held.unsqueeze(-1).view(torch.uint8)[:, :ID_BYTES].flatten()
        return torch.cat([low, torch.searchsorted(held, steps).view(torch.uint8)])

    def unpack(self, content: torch.Tensor, rank: int) -> torch.Tensor | None:
        """What `pack` has made, to held ids, (n,) int64; None where it cannot have made this."""
        num, rest = divmod(len(content) - 8 * self._carries(rank), ID_BYTES)
        if num < 0 or rest:
            return None
        low, steps = content.split([ID_BYTES * num, len(content) - ID_BYTES * num])
        # A part of a message may lie anywhere, and numbers must be aligned.
        held = low.clone().view(torch.int32).long() & (2**ID_BITS - 1)
        above = torch.bucketize(torch.arange(num, device=held.device), steps.clone().view(torch.int64), right=True)
        return held + (above << ID_BITS)

    def find_packed(self, content: torch.Tensor, check: int | torch.Tensor, rank: int) -> torch.Tensor | None:
        """What `pack` has made, to held ids, (n,) int64; None where they do not stand for the row ids that were meant.

        Args:
            content: the packed row ids.
            check: `check_number` of the row ids.
            rank: that they have come to.
        """
        held = self.unpack(content, rank)
        return held if held is not None and self.are_meant(held, check, rank) else None

    def are_meant(self, held: torch.Tensor, check: int | torch.Tensor, rank: int) -> bool:
        """Whether (n,) held ids of a rank stand for the row ids that have a check number."""
        are_held = ((held >= 0) & (held < sum(self.rows_of(rank)))).all()
        return bool(are_held) and bool(check_number(self.to_table(held, rank)) == check)

    def _carries(self, rank: int) -> int:
        """How often held ids of a rank pass a multiple of 2**32."""
        return max(0, sum(self.rows_of(rank)) - 1) >> ID_BITS

    def _shifts(self, rank: int) -> torch.Tensor:
        """(blocks,): row id less held id."""
        begins = torch.tensor([self.part(block, rank)[0] for block in range(len(self.rows_of_block))])
        held_firsts = torch.tensor(list(accumulate(self.rows_of(rank)[:-1], initial=0)))
        return self._firsts + begins - held_firsts


def check_number(row_ids: torch.Tensor) -> torch.Tensor:
    """A number, (), that is another one for (n,) row ids of which one differs, and almost surely for all others."""
    # Odd factors lose nothing of a number modulo 2**64.
    return ((row_ids + 1) * (2 * torch.arange(len(row_ids), device=row_ids.device) + 1)).sum()


class RankFile(TableFile):
    """A safetensors file, of whose blocks a rank has its own rows and reads no others."""

    def __init__(self, path: str | Path, parts: dict[str, tuple[int, int]]):
        """
        Args:
            path: the file.
            parts: name of a tensor to the rows of it that are held, begin and end.
        """
        super().__init__(path)
        self.whole_places = dict(self.places)
        self._digests: dict[str, bytes] = {}
        for name, (begin, end) in parts.items():
            place = self.places[name]
            row_nbytes = place.nbytes // max(1, place.shape[0])
            shape = (end - begin, *place.shape[1:])
            start = place.start + begin * row_nbytes
            self.places[name] = TensorPlace(place.dtype, shape, start, (end - begin) * row_nbytes)

    def map_again(self) -> "RankFile":
        twin = object.__new__(RankFile)
        twin.__dict__.update(self.__dict__)
        twin._map()
        return twin

    def whole_content(self, name: str) -> TensorContent:
        """The tensor with the rows of all ranks, read from the file in pieces."""
        whole = object.__new__(TableFile)
        whole.__dict__.update({**self.__dict__, "places": self.whole_places})
        return whole.content(name)

    def whole_digest(self, name: str, digest_of: Callable) -> bytes:
        """SHA-256 of the tensor with the rows of all ranks; the file is read once for it."""
        if name not in self._digests:
            self._digests[name] = digest_of(self.whole_content(name))
        return self._digests[name]

    def is_copy_of(self, name: str, other: BlockSource) -> None:
        """A tensor is that of another file, so its digest is known where that one's is."""
        if isinstance(other.file, RankFile) and other.name in other.file._digests:
            self._digests[name] = other.file._digests[other.name]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, which may be torch's DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def open_parts(sources: Mapping[tuple[str, int], BlockSource], cuts: Mapping[str, RowCut], rank: int) -> dict:
    """The blocks of tables as one rank holds them; each file is opened once.

    Args:
        sources: (table, number of the block) to the whole block.
        cuts: of the tables.
        rank: that holds.
    """
    parts: dict[Path, dict[str, tuple[int, int]]] = {}
    for (table, number), source in sources.items():
        parts.setdefault(source.file.path, {})[source.name] = cuts[table].part(number, rank)
    files = {path: RankFile(path, of_file) for path, of_file in parts.items()}
    return {key: BlockSource(files[source.file.path], source.name) for key, source in sources.items()}


def rows_of_step(rows_of_token: int, tokens: int = TOKENS_OF_A_STEP, distinct_share: float = DISTINCT_SHARE) -> float:
    """Distinct rows that the batch of a rank reads; an owner is asked for as many.

    Args:
        rows_of_token: that a token reads: one for each hash head.
        tokens: of a rank and step.
        distinct_share: of the rows of a batch, with repeated ones left out.

    Example:
        >>> rows_of_step(rows_of_token=16, tokens=2048)
        16384.0
    """
    return tokens * rows_of_token * distinct_share


def nbytes_of_step(rows: float, width: int, row_nbytes: int, ranks: int, is_trained: bool = True) -> float:
    """Bytes that a rank moves in a step: rows that others hold, as many gradients, and their row ids.

    Args:
        rows: distinct rows that the batch of a rank reads.
        width: numbers in a row.
        row_nbytes: bytes of a row as it is stored.
        ranks: over which the table is cut.
        is_trained: whether gradients travel back.

    Example:
        >>> nbytes_of_step(rows=1000, width=80, row_nbytes=160, ranks=1)
        0.0
        >>> nbytes_of_step(rows=1000, width=80, row_nbytes=160, ranks=4)
        363093.75
    """
    foreign = rows * (ranks - 1) / ranks
    if not is_trained:
        return foreign * (row_nbytes + ID_BYTES)
    gradient_nbytes = max(width * GRADIENT_NBYTES, row_nbytes)
    return foreign * (row_nbytes + gradient_nbytes + ID_BYTES + NAMED_NBYTES)

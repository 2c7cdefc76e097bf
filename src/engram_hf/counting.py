"""Counting rows: how often each row of a table is looked up, which are the hottest, how many n-grams share one, and
how many lookups a cache of rows would serve.

Callers hand over row ids and n-grams as a forward has made them. Nothing here knows a model or a table.
"""

from typing import NamedTuple

import torch


# Where a run keeps its counts, beside each checkpoint.
STATISTICS_FILE = "row_statistics.safetensors"
# Distinct n-grams of each order that are remembered; more would take memory.
REMEMBERED_NGRAMS = 2**16
# Odd, so that no information is lost when a token id is multiplied by one of them.
MIXERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB, 0x2545F4914F6CDD1D, 0x4F1BBCDCBFA53E0B)


class RowCounts:
    """How often each row of a table was looked up.

    counts: (rows of the table,) int32.
    """

    def __init__(self, rows_of_heads: torch.Tensor):
        """
        Args:
            rows_of_heads: (heads,) int64, how many rows each hash head has. Row ids count through them in this order.
        """
        self.first_rows = rows_of_heads.cumsum(0) - rows_of_heads
        self.counts = torch.zeros(int(rows_of_heads.sum()), dtype=torch.int32)

    def add(self, row_ids: torch.Tensor) -> None:
        """Count a lookup of each of these rows, any shape, int64 on the CPU."""
        flat = row_ids.flatten()
        self.counts.index_add_(0, flat, torch.ones(len(flat), dtype=torch.int32))

    def touched(self) -> torch.Tensor:
        """(rows of the table,) bool."""
        return self.counts > 0

    def hottest(self, how_many: int) -> list[tuple[int, int]]:
        """The row ids that were looked up most, and how often each was."""
        counts, row_ids = self.counts.topk(min(how_many, len(self.counts)))
        return list(zip(row_ids.tolist(), counts.tolist(), strict=True))

    def heads_of(self, row_ids: torch.Tensor) -> torch.Tensor:
        """The hash heads that rows belong to, in the shape of the row ids."""
        return torch.searchsorted(self.first_rows, row_ids, right=True) - 1


class HeadUse(NamedTuple):
    """How many n-grams share the rows of one hash head.

    head, order: which head, and the size of its n-grams.
    rows: that the head has.
    ngrams: distinct n-grams that it has hashed.
    rows_read: distinct rows that these read.
    rows_read_by_chance: how many they would read if each one drew its row at random, rows x (1 - (1 - 1 / rows) **
        ngrams). No hash can be expected to spread unknown n-grams further.
    """

    head: int
    order: int
    rows: int
    ngrams: int
    rows_read: int
    rows_read_by_chance: float

    @property
    def collisions(self) -> int:
        """N-grams that came to a row which another one reads already."""
        return self.ngrams - self.rows_read

    @property
    def collisions_by_chance(self) -> float:
        """The number of collisions if rows were drawn at random."""
        return self.ngrams - self.rows_read_by_chance


class SharedRows:
    """Distinct n-grams and the rows that they read: how many n-grams share a row.

    ngrams: order to (n,) int64, one number for each distinct n-gram.
    rows: order to (n, heads of the order) int64, the rows that these read.
    """

    def __init__(self, rows_of_heads: torch.Tensor, max_ngram_size: int):
        """
        Args:
            rows_of_heads: (heads,) int64, as in `RowCounts`; the heads of order 2 come first.
            max_ngram_size: the largest order.
        """
        self.rows_of_heads = rows_of_heads
        self.heads_of_order = len(rows_of_heads) // (max_ngram_size - 1)
        self.ngrams: dict[int, torch.Tensor] = {}
        self.rows: dict[int, torch.Tensor] = {}

    def add(self, row_ids: torch.Tensor, ngrams: torch.Tensor) -> None:
        """Remember n-grams that have not been seen.

        Args:
            row_ids: (tokens, heads) int64.
            ngrams: (tokens, max_ngram_size) int64, the ids that are hashed; the last one is the token's own.
        """
        for order in range(2, ngrams.shape[1] + 1):
            mixed = mix(ngrams, order)
            start = (order - 2) * self.heads_of_order
            rows = row_ids[:, start : start + self.heads_of_order]
            if order in self.ngrams:
                if len(self.ngrams[order]) >= REMEMBERED_NGRAMS:
                    continue
                mixed, rows = torch.cat([self.ngrams[order], mixed]), torch.cat([self.rows[order], rows])
            distinct, back = mixed.unique(return_inverse=True)
            places = torch.arange(len(mixed))
            first = torch.full((len(distinct),), len(mixed)).scatter_reduce(0, back, places, "amin")
            self.ngrams[order], self.rows[order] = distinct, rows[first].contiguous()

    def order_of(self, head: int) -> int:
        """The order of the n-grams that a head hashes."""
        return head // self.heads_of_order + 2

    def ngrams_per_row(self) -> tuple[float, float]:
        """Distinct n-grams per row that they read, and the same if rows were drawn at random.

        Raises:
            ValueError: no n-gram has been added.
        """
        if not self.ngrams:
            raise ValueError("No n-gram has been counted yet; call add first.")
        heads = self.per_head()
        measured = [use.ngrams / use.rows_read for use in heads]
        at_random = [use.ngrams / use.rows_read_by_chance for use in heads]
        return sum(measured) / len(measured), sum(at_random) / len(at_random)

    def per_head(self) -> list[HeadUse]:
        """Each head of the orders that have been counted, in order."""
        found = []
        for order, distinct in self.ngrams.items():
            for head in range(self.heads_of_order):
                number, count = (order - 2) * self.heads_of_order + head, len(distinct)
                size = int(self.rows_of_heads[number])
                rows_read = len(self.rows[order][:, head].unique())
                found.append(HeadUse(number, order, size, count, rows_read, size * (1 - (1 - 1 / size) ** count)))
        return found


class CountedNgrams(SharedRows):
    """The same, with how often each n-gram occurs, and the tokens that it is written with where it occurs first.

    counts: order to (n,) int64.
    tokens: order to (n, order) int64, raw token ids; negative before the start of a document.
    """

    def __init__(self, rows_of_heads: torch.Tensor, max_ngram_size: int, most_ngrams: int = 2**20):
        """
        Args:
            rows_of_heads, max_ngram_size: as for `SharedRows`.
            most_ngrams: distinct n-grams of each order that are remembered. Those that come later are left out.
        """
        super().__init__(rows_of_heads, max_ngram_size)
        self.most_ngrams = most_ngrams
        self.counts: dict[int, torch.Tensor] = {}
        self.tokens: dict[int, torch.Tensor] = {}

    def add(  # type: ignore[override]
        self, row_ids: torch.Tensor, ngrams: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Count n-grams.

        Args:
            row_ids, ngrams: as for `SharedRows`.
            tokens: (tokens, max_ngram_size) int64, the raw ids of the n-grams.
        """
        for order in range(2, ngrams.shape[1] + 1):
            start = (order - 2) * self.heads_of_order
            mixed, new = mix(ngrams, order), torch.ones(len(ngrams), dtype=torch.int64)
            rows, written = row_ids[:, start : start + self.heads_of_order], tokens[:, -order:]
            if order in self.ngrams:
                mixed = torch.cat([self.ngrams[order], mixed])
                new = torch.cat([self.counts[order], new])
                rows, written = torch.cat([self.rows[order], rows]), torch.cat([self.tokens[order], written])
            distinct, back = mixed.unique(return_inverse=True)
            places = torch.arange(len(mixed))
            first = torch.full((len(distinct),), len(mixed)).scatter_reduce(0, back, places, "amin")
            counts = torch.zeros(len(distinct), dtype=torch.int64).index_add_(0, back, new)
            # Known ones stand in front, so these are the ones that came last.
            kept = torch.ones(len(distinct), dtype=torch.bool)
            if len(distinct) > self.most_ngrams:
                kept = first < first.kthvalue(self.most_ngrams + 1).values
            self.ngrams[order], self.counts[order] = distinct[kept], counts[kept]
            self.rows[order], self.tokens[order] = rows[first[kept]], written[first[kept]]

    def hottest(self, order: int, how_many: int) -> list[int]:
        """Places in `ngrams` of those that occur most."""
        counts = self.counts[order]
        # Of those that occur alike, the first in `ngrams`, on every machine.
        return counts.argsort(descending=True, stable=True)[:how_many].tolist()


def mix(ngrams: torch.Tensor, order: int) -> torch.Tensor:
    """One number for each n-gram, (tokens,) int64; different ones are as good as never the same.

    Args:
        ngrams: (tokens, at least order) int64; the last `order` are mixed.
    """
    mixers = torch.tensor([MIXERS[i % len(MIXERS)] for i in range(order)])
    return (ngrams[:, -order:] * mixers).sum(-1)


def reuse_distances(row_ids: torch.Tensor) -> torch.Tensor:
    """For each lookup the number of other rows that were looked up since the last lookup of the same row.

    A cache that keeps the rows that were looked up last serves a lookup if it holds more rows than this distance
    (Mattson et al., 1970), so one pass gives the hit rate of every size.

    Args:
        row_ids: (lookups,) int64, in the order of time.

    Returns:
        (lookups,) int64; -1 where the row was never looked up before.

    Example:
        >>> reuse_distances(torch.tensor([7, 8, 7, 9, 9, 8])).tolist()
        [-1, -1, 1, -1, 0, 2]
    """
    count = len(row_ids)
    order = row_ids.argsort(stable=True)
    is_same = row_ids[order][1:] == row_ids[order][:-1]
    last = torch.full((count,), -1, dtype=torch.int64)
    last[order[1:][is_same]] = order[:-1][is_same]
    # Of the lookups since the last one of this row, those that are the first of theirs count: their own last lookup
    # was before that one. All lookups up to that one had their last lookup before it too.
    distances = _earlier_and_not_above(last) - (last + 1)
    return distances.masked_fill(last < 0, -1)


def _earlier_and_not_above(values: torch.Tensor) -> torch.Tensor:
    """For each number how many before it are not above it, (n,) int64, by merging runs that double in length."""
    count = len(values)
    length = 1 << max(count - 1, 0).bit_length()
    # Padding is above all others, and stands behind them.
    padded = torch.nn.functional.pad(values + 1, (0, length - count), value=count + 1)
    found = torch.zeros(length, dtype=torch.int64)
    run = 1
    while run < length:
        pairs = padded.view(-1, 2, run)
        # Runs are told apart by what is added, so that one search serves all of them.
        shift = torch.arange(len(pairs)).unsqueeze(1) * (count + 2)
        left, right = (pairs[:, 0] + shift).sort(-1).values.flatten(), (pairs[:, 1] + shift).flatten()
        below = torch.searchsorted(left, right, right=True).view(-1, run) - torch.arange(len(pairs)).unsqueeze(1) * run
        found.view(-1, 2, run)[:, 1] += below
        run *= 2
    return found[:count]

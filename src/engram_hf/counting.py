"""Counting rows: how often each row of a table is looked up, which are the hottest, and how many n-grams share one.

Callers hand over row ids and n-grams as a forward has made them. Nothing here knows a model or a table.
"""

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
            mixers = torch.tensor([MIXERS[i % len(MIXERS)] for i in range(order)])
            mixed = (ngrams[:, -order:] * mixers).sum(-1)  # (tokens,)
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
        measured, at_random = [], []
        for order, distinct in self.ngrams.items():
            for head in range(self.heads_of_order):
                size = int(self.rows_of_heads[(order - 2) * self.heads_of_order + head])
                measured.append(len(distinct) / len(self.rows[order][:, head].unique()))
                at_random.append(len(distinct) / (size * (1 - (1 - 1 / size) ** len(distinct))))
        return sum(measured) / len(measured), sum(at_random) / len(at_random)

"""What a text does with a table: which rows it reads and how often, which n-grams share one, what a cache would serve.

A report hashes the text and reads no row, so it costs the same wherever tables live. It counts as the callbacks of
training do.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..counting import CountedNgrams, HeadUse, RowCounts, reuse_distances
from .drawing import COLORS, new_figure, save_figure
from .memory_layers import find_memory_layers, memory_of
from .text_rows import HASHED_TOKENS, TextRow, batches, progress, rows_for


HOTTEST = 20
# The hit rates are those of the first so many lookups of a table.
MOST_LOOKUPS = 2**20
SMALLEST_CACHE = 16


@dataclass(frozen=True)
class CountedNgram:
    """An n-gram of a text.

    order, tokens, text: its size, its token ids, and its text where there is a tokenizer. The memory may read several
        spellings as this one; this is the first.
    count: how often it occurs.
    row_ids: of the table, one for each head of its order.
    """

    order: int
    tokens: list[int]
    text: str | None
    count: int
    row_ids: list[int]


@dataclass(frozen=True)
class CacheUse:
    """A cache that keeps the rows that were looked up last: its size, and the share of lookups that it serves."""

    rows: int
    nbytes: int
    hit_rate: float


@dataclass(frozen=True)
class TableUse:
    """What the text does with one table.

    layer: id of the memory layer.
    rows, row_nbytes: of the table.
    lookups: rows that the tokens asked for, one for each token and head.
    rows_read: distinct rows among these.
    rows_read_by_chance: the same if each distinct n-gram drew its rows at random.
    zipf: pairs (rank, lookups): how often the hottest row was looked up, the second, the fourth and so on.
    share_of_hottest: percent of the table's rows to the share of lookups that go to so many of the hottest.
    heads: how many n-grams share a row, against rows drawn at random.
    hottest_ngrams: the most frequent n-grams of each order.
    caches: hit rates that caches of rows would have, over the first `cached_lookups` lookups, token by token.
    """

    layer: int
    rows: int
    row_nbytes: int
    lookups: int
    rows_read: int
    rows_read_by_chance: float
    zipf: list[tuple[int, int]]
    share_of_hottest: dict[int, float]
    heads: list[HeadUse]
    hottest_ngrams: list[CountedNgram]
    caches: list[CacheUse]
    cached_lookups: int

    @property
    def dead_rows(self) -> int:
        """Rows that no token of the text reads."""
        return self.rows - self.rows_read


@dataclass(frozen=True)
class RowReport:
    """What a text does with the tables of a model.

    tokens: of the text.
    tables: one for each memory layer.
    """

    tokens: int
    tables: list[TableUse]

    def to_json(self) -> str:
        """All numbers as JSON."""
        content = asdict(self)
        for table, own in zip(content["tables"], self.tables, strict=True):
            table["dead_rows"] = own.dead_rows
            table["heads"] = [
                {**use._asdict(), "collisions": use.collisions, "collisions_by_chance": use.collisions_by_chance}
                for use in own.heads
            ]
        return json.dumps(content, indent=1, ensure_ascii=False)

    def markdown(self) -> str:
        """Tables for each memory layer."""
        return "\n\n".join([f"{self.tokens:,} tokens", *map(_markdown, self.tables)])

    _repr_markdown_ = __str__ = markdown

    def draw(self, picture: str | Path) -> Path:
        """Write the Zipf curves, collisions and hit rates as PNG.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure, (zipf, shared, caches) = new_figure(f"Rows that {self.tokens:,} tokens read", 1, 3, (13.5, 4.2))
        width = 0.8 / len(self.tables)
        for number, table in enumerate(self.tables):
            color, name = COLORS[number % len(COLORS)], f"layer {table.layer}"
            zipf.loglog(*zip(*table.zipf), color=color, marker="o", markersize=3, label=name)
            places = [use.head + number * width for use in table.heads]
            shared.bar(places, [use.collisions for use in table.heads], width, color=color, label=name)
            by_chance = [use.collisions_by_chance for use in table.heads]
            label = "if rows were drawn at random" if table is self.tables[-1] else None
            shared.plot(places, by_chance, "_", color="black", markersize=12, markeredgewidth=2, label=label)
            sizes, rates = [cache.rows for cache in table.caches], [100 * cache.hit_rate for cache in table.caches]
            caches.semilogx(sizes, rates, color=color, marker="o", markersize=3, label=name)
        zipf.set(title="How often each row is looked up", xlabel="rank of the row", ylabel="lookups")
        shared.set(title="N-grams that came to a row in use", xlabel="hash head", ylabel="distinct n-grams")
        shared.margins(y=0.25)
        shared.set_ylim(bottom=0)
        shared.xaxis.get_major_locator().set_params(integer=True)
        caches.set(title="What a cache would serve", xlabel="rows in the cache", ylabel="lookups, %", ylim=(0, 103))
        for axis in (zipf, shared, caches):
            axis.legend()
        return save_figure(figure, picture)


def _markdown(table: TableUse) -> str:
    shares = ", ".join(f"{percent} %: {share:.1%}" for percent, share in table.share_of_hottest.items())
    lines = [
        f"**Layer {table.layer}**: {table.rows:,} rows, {table.lookups:,} lookups. {table.rows_read:,} rows are read, "
        f"{table.dead_rows:,} are dead (if rows were drawn at random: {table.rows - table.rows_read_by_chance:,.0f}). "
        f"Share of lookups that go to the hottest rows: {shares}.",
        "",
        "| head | order | rows | distinct n-grams | rows read | collisions | at random |",
        "|---|---|---|---|---|---|---|",
    ]
    for use in table.heads:
        numbers = (use.head, use.order, use.rows, use.ngrams, use.rows_read, use.collisions)
        lines.append("".join(f"| {number:,} " for number in numbers) + f"| {use.collisions_by_chance:,.0f} |")
    lines += ["", "| n-gram | occurs | rows |", "|---|---|---|"]
    for ngram in table.hottest_ngrams:
        name = code(ngram.text) if ngram.text is not None else str(ngram.tokens)
        lines.append(f"| {name} | {ngram.count:,} | {', '.join(map(str, ngram.row_ids))} |")
    lines += ["", "| rows in a cache | bytes | hit rate |", "|---|---|---|"]
    lines += [f"| {cache.rows:,} | {cache.nbytes:,} | {cache.hit_rate:.1%} |" for cache in table.caches]
    return "\n".join(lines)


def code(text: str) -> str:
    """Text as it stands, in a cell of a Markdown table."""
    return "`" + repr(text).replace("`", "'").replace("|", "\\|") + "`"


def row_report(model: nn.Module, data: Iterable[Any], *, tokenizer: Any = None) -> RowReport:
    """Count what a text does with the tables of a model. No row is read, and no layer computes.

    Args:
        model: with a memory.
        data: rows of text; see `read_rows`.
        tokenizer: for data that is text, and to show n-grams as text.

    Raises:
        ValueError: the model has no memory, or data is no text.

    Example:
        >>> report = row_report(model, data)
        >>> report.tables[0].lookups == report.tokens * len(report.tables[0].heads)
        True
    """
    layers = find_memory_layers(model, "row_report")
    rows = rows_for(model, data, tokenizer)
    counted = {layer_id: _Counts(layer) for layer_id, layer in layers.items()}
    with progress(len(rows), "row report") as bar:
        for hashed in hash_rows(model, rows, bar):
            for layer_id, counts in counted.items():
                counts.add(hashed, layer_id)
    tokens = sum(len(row.ids) for row in rows)
    return RowReport(tokens, [counts.use(tokenizer) for counts in counted.values()])


@dataclass(frozen=True)
class HashedText:
    """The tokens of some rows that have a memory.

    row_ids: layer id to (tokens, heads) int64, rows in their head.
    ngrams: (tokens, N) int64, the ids that are hashed.
    tokens: (tokens, N) int64, the raw ids; negative before the start of a document.
    """

    row_ids: dict[int, torch.Tensor]
    ngrams: torch.Tensor
    tokens: torch.Tensor


def hash_rows(model: nn.Module, rows: Iterable[TextRow], bar: Any) -> Iterable[HashedText]:
    """Hash rows of text, many at once."""
    ngram_hash = memory_of(model)[0]
    order = ngram_hash.max_ngram_size
    for batch in batches(rows, HASHED_TOKENS):
        mask = batch.attention_mask
        hashed = ngram_hash(batch.input_ids.to(ngram_hash.device), None, mask)
        has_memory = (hashed.reach >= 0).cpu()
        written = F.pad(batch.input_ids, (order - 1, 0), value=-1).unfold(1, order, 1)  # (batch, seq, N)
        yield HashedText(
            {layer_id: row_ids.cpu()[has_memory] for layer_id, row_ids in hashed.row_ids.items()},
            hashed.ngrams.cpu().transpose(1, 2)[has_memory],
            written[has_memory],
        )
        bar.update(len(batch.input_ids))


def ngram_at(counted: CountedNgrams, order: int, place: int, tokenizer: Any) -> CountedNgram:
    """One of the n-grams that were counted."""
    tokens = [token for token in counted.tokens[order][place].tolist() if token >= 0]
    text = None if tokenizer is None else tokenizer.decode(tokens)
    return CountedNgram(order, tokens, text, int(counted.counts[order][place]), counted.rows[order][place].tolist())


class _Counts:
    """What is counted of one table."""

    def __init__(self, layer: Any):
        self.layer, table = layer, layer.table
        rows_of_heads = table.head_rows.cpu()
        self.rows = RowCounts(rows_of_heads)
        self.ngrams = CountedNgrams(rows_of_heads, layer.max_ngram_size)
        self.lookups: list[torch.Tensor] = []
        self.num_lookups = 0

    def add(self, hashed: HashedText, layer_id: int) -> None:
        of_table = hashed.row_ids[layer_id] + self.rows.first_rows
        self.rows.add(of_table)
        self.ngrams.add(of_table, hashed.ngrams, hashed.tokens)
        room = MOST_LOOKUPS - sum(map(len, self.lookups))
        self.lookups.append(of_table.flatten()[:room])
        self.num_lookups += of_table.numel()

    def use(self, tokenizer: Any) -> TableUse:
        table, counts = self.layer.table, self.rows.counts.sort(descending=True).values
        read = int((counts > 0).sum())
        ranks = [2**power for power in range(read.bit_length()) if 2**power <= read]
        ranks += [read] if ranks and ranks[-1] != read else []
        heads = self.ngrams.per_head()
        hottest = [
            ngram_at(self.ngrams, order, place, tokenizer)
            for order in self.ngrams.ngrams
            for place in self.ngrams.hottest(order, HOTTEST // len(self.ngrams.ngrams))
        ]
        looked_up = torch.cat(self.lookups)
        distances = reuse_distances(looked_up)
        sizes = [
            2**power for power in range(table.num_rows.bit_length()) if SMALLEST_CACHE <= 2**power < table.num_rows
        ]
        nbytes = table.row_nbytes
        return TableUse(
            layer=self.layer.layer_idx,
            # A table may have rows after those of its heads. No token reads them.
            rows=sum(use.rows for use in heads),
            row_nbytes=nbytes,
            lookups=self.num_lookups,
            rows_read=read,
            rows_read_by_chance=sum(use.rows_read_by_chance for use in heads),
            zipf=[(rank, int(counts[rank - 1])) for rank in ranks],
            share_of_hottest={
                percent: int(counts[: -(-table.num_rows * percent // 100)].sum()) / max(self.num_lookups, 1)
                for percent in (1, 10, 50)
            },
            heads=heads,
            hottest_ngrams=hottest,
            caches=[
                CacheUse(size, size * nbytes, float(((distances >= 0) & (distances < size)).float().mean()))
                for size in [*sizes, table.num_rows]
            ],
            cached_lookups=len(looked_up),
        )

"""What an n-gram lies next to: other n-grams that read the same rows, and rows that point the same way.

Tables are read block by block, so one on disk is searched without being loaded.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..counting import CountedNgrams
from ..modeling.table import EngramTable
from .memory_layers import find_memory_layers, memory_of
from .row_use import CountedNgram, code, hash_rows, ngram_at
from .text_rows import progress, rows_for


# Rows of a head that are compared at once.
ROWS_AT_ONCE = 2**14


@dataclass(frozen=True)
class NearRow:
    """A row near another one of the same head: its id in the table, the cosine, and the n-grams of the text that read
    it, the most frequent first."""

    row_id: int
    cosine: float
    ngrams: list[CountedNgram]


@dataclass(frozen=True)
class HeadNeighbours:
    """What one hash head contributes.

    head, row_id: the head, and the row of the table that the n-gram reads.
    sharing: n-grams of the text that read this very row, the most frequent first.
    nearest: rows of the same head whose cosine with it is largest; rows of other heads are read through other weights.
    """

    head: int
    row_id: int
    sharing: list[CountedNgram]
    nearest: list[NearRow]


@dataclass(frozen=True)
class NearNgram:
    """An n-gram of the text, and the cosine of the rows of all its heads with those of the n-gram that is asked for."""

    ngram: CountedNgram
    cosine: float


@dataclass(frozen=True)
class Neighbours:
    """What lies next to an n-gram, or to a row.

    layer, order: of the memory layer and of the n-gram.
    tokens, text: of the n-gram; None where a row was asked for.
    heads: one for each head of the order; for a row that of its own.
    nearest: n-grams of the text whose rows, of all heads together, are nearest in cosine. Empty without a text.
    """

    layer: int
    order: int
    tokens: list[int] | None
    text: str | None
    heads: list[HeadNeighbours]
    nearest: list[NearNgram]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def markdown(self) -> str:
        """Tables: the nearest n-grams, then what each head says."""
        asked = f"row {self.heads[0].row_id}" if self.tokens is None else _name(self.tokens, self.text)
        lines = [f"**{asked}**, order {self.order}, layer {self.layer}"]
        if self.nearest:
            lines += ["", "| nearest n-gram | cosine | occurs |", "|---|---|---|"]
        lines += [f"| {_shown(near.ngram)} | {near.cosine:.3f} | {near.ngram.count:,} |" for near in self.nearest]
        lines += ["", "| head | row | n-grams that share it | nearest rows |", "|---|---|---|---|"]
        for head in self.heads:
            sharing = ", ".join(map(_shown, head.sharing))
            nearest = ", ".join(
                f"{row.row_id} ({row.cosine:.3f}{', ' if row.ngrams else ''}{', '.join(map(_shown, row.ngrams[:2]))})"
                for row in head.nearest
            )
            lines.append(f"| {head.head} | {head.row_id} | {sharing} | {nearest} |")
        return "\n".join(lines)

    _repr_markdown_ = __str__ = markdown


def _shown(ngram: CountedNgram) -> str:
    return _name(ngram.tokens, ngram.text)


def _name(tokens: list[int], text: str | None) -> str:
    return str(tokens) if text is None else code(text)


def nearest_ngrams(
    model: nn.Module,
    wanted: str | int,
    data: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    layer: int | None = None,
    how_many: int = 8,
) -> Neighbours:
    """N-grams that read the same rows as a given one, and the rows and n-grams that are nearest to it in cosine.

    Args:
        model: with a memory, with its tables on any tier.
        wanted: a text, of which the last tokens are the n-gram, as many as the largest order has; or a row id of the
            table, counted through all heads.
        data: rows of text, whose n-grams are shown; see `read_rows`. Only rows that it reads are compared, since a row
            that no text reads was hardly trained. Without it all rows of a head are compared.
        tokenizer: for texts.
        layer: id of the memory layer; the first one by default.
        how_many: neighbours of each kind.

    Raises:
        ValueError: the model has no such memory layer, the table no such row, or the text has fewer than 2 tokens.

    Example:
        >>> near = nearest_ngrams(model, "def __init__", data, tokenizer=tokenizer)
        >>> near.order, len(near.nearest) > 0
        (3, True)
    """
    layers = find_memory_layers(model, "nearest_ngrams")
    layer_id = next(iter(layers)) if layer is None else layer
    if layer_id not in layers:
        raise ValueError(f"Layer {layer_id} has no memory; memory layers (zero-based) are {list(layers)}.")
    table, largest = layers[layer_id].table, layers[layer_id].max_ngram_size
    counted = CountedNgrams(table.head_rows.cpu(), largest)
    first_rows, per_order = table.first_rows_of_heads.cpu(), counted.heads_of_order
    if isinstance(wanted, str):
        tokens, ids = _last_ngram(wanted, tokenizer, largest)
        order, text = len(tokens), None if tokenizer is None else tokenizer.decode(tokens)
        hashed = memory_of(model)[0](ids.to(memory_of(model)[0].device)).row_ids[layer_id][0, -1].cpu()
        row_ids = (hashed + first_rows)[(order - 2) * per_order : (order - 1) * per_order]
    else:
        if not 0 <= wanted < table.num_rows:
            raise ValueError(f"Layer {layer_id} has no row {wanted}; its rows go from 0 to {table.num_rows - 1}.")
        tokens, text, row_ids = None, None, torch.tensor([wanted])
        order = counted.order_of(int(torch.searchsorted(first_rows, row_ids, right=True)) - 1)
    if data is not None:
        rows = rows_for(model, data, tokenizer)
        with progress(len(rows), "n-grams of the text") as bar:
            for each in hash_rows(model, rows, bar):
                counted.add(each.row_ids[layer_id] + first_rows, each.ngrams, each.tokens)
    search = _Search(table, counted, order, tokenizer, how_many)
    heads = [search.head(int(row_id)) for row_id in row_ids]
    nearest = search.ngrams(row_ids) if tokens is not None and data is not None else []
    return Neighbours(layer_id, order, tokens, text, heads, nearest)


def _last_ngram(text: str, tokenizer: Any, largest: int) -> tuple[list[int], torch.Tensor]:
    if tokenizer is None:
        raise ValueError("A text has no tokens without a tokenizer: nearest_ngrams(model, text, tokenizer=tokenizer).")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][-largest:]
    if len(tokens) < 2:
        raise ValueError(f"{text!r} has {len(tokens)} tokens, and an n-gram has at least 2. Give a longer text.")
    return tokens, torch.tensor([tokens])


class _Search:
    """Looks through a table for what is near to some of its rows."""

    def __init__(self, table: EngramTable, counted: CountedNgrams, order: int, tokenizer: Any, how_many: int):
        self.table, self.counted, self.order, self.tokenizer, self.how_many = table, counted, order, tokenizer, how_many
        self.first_rows = table.first_rows_of_heads.cpu()
        none = torch.zeros(0, counted.heads_of_order, dtype=torch.int64)
        # Rows that the n-grams of the text read, (n-grams, heads of the order).
        self.rows = counted.rows.get(order, none)

    def head(self, row_id: int) -> HeadNeighbours:
        head = int(torch.searchsorted(self.first_rows, row_id, right=True)) - 1
        column = head % self.counted.heads_of_order

        def read_all() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for row_ids in self._compared(head, column):
                row_ids = row_ids[row_ids != row_id]
                yield row_ids, self._read(row_ids)

        near = self._nearest(read_all(), self._read(torch.tensor([row_id])))
        found = [NearRow(place, cosine, self._readers(place, column)) for place, cosine in near]
        return HeadNeighbours(head, row_id, self._readers(row_id, column), found)

    def _compared(self, head: int, column: int) -> Iterator[torch.Tensor]:
        """The rows of a head that a text reads, a part at a time. Without a text, all rows."""
        if len(self.rows):
            yield from self.rows[:, column].unique().split(ROWS_AT_ONCE)
            return
        first, rows = int(self.first_rows[head]), int(self.table.head_rows[head])
        for start in range(first, first + rows, ROWS_AT_ONCE):
            yield torch.arange(start, min(start + ROWS_AT_ONCE, first + rows))

    def _readers(self, row_id: int, column: int) -> list[CountedNgram]:
        """The n-grams of the text that read a row, the most frequent first."""
        places = (self.rows[:, column] == row_id).nonzero().flatten()
        if not len(places):
            return []
        counts = self.counted.counts[self.order][places]
        chosen = places[counts.argsort(descending=True, stable=True)[: self.how_many]].tolist()
        return [ngram_at(self.counted, self.order, place, self.tokenizer) for place in chosen]

    def ngrams(self, row_ids: torch.Tensor) -> list[NearNgram]:
        """The n-grams of the text whose rows are nearest to these, (heads of the order,), of all heads together."""
        others = (self.rows != row_ids).any(1).nonzero().flatten()

        def read_all() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for places in others.split(max(1, ROWS_AT_ONCE // len(row_ids))):
                yield places, self._read(self.rows[places].flatten()).view(len(places), -1)

        near = self._nearest(read_all(), self._read(row_ids).view(1, -1))
        return [NearNgram(ngram_at(self.counted, self.order, place, self.tokenizer), cosine) for place, cosine in near]

    def _nearest(
        self, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], wanted: torch.Tensor
    ) -> list[tuple[int, float]]:
        """Of vectors that come in parts with their numbers, those whose cosine with one, (1, width), is largest."""
        numbers, cosines = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        for some, vectors in parts:
            numbers = torch.cat([numbers, some])
            cosines = torch.cat([cosines, F.cosine_similarity(vectors, wanted)])
            cosines, best = cosines.topk(min(self.how_many, len(cosines)))
            numbers = numbers[best]
        return list(zip(numbers.tolist(), cosines.tolist(), strict=True))

    def _read(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table as numbers, (n, head dim) float32 on the CPU, in the order of their ids."""
        distinct, back = row_ids.unique(return_inverse=True)
        stored = self.table.gather_rows(distinct.to(self.table.home))
        return self.table.stored_as.decode(stored, self.table.head_dim).float().cpu()[back]

"""What each part of a memory is worth: the loss without it, against the loss with everything.

Losses of the same rows are compared, which leaves out how hard the text is; intervals are over documents.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..counting import RowCounts
from .drawing import COLORS, new_figure, save_figure
from .intervals import interval
from .memory_layers import find_memory_layers
from .ngram_classes import CLASSES, classes_of
from .row_use import hash_rows
from .silencing import silenced
from .text_rows import Batch, TextRow, losses_of_rows, progress, rows_for


MEMORY, LAYER, ORDER, HEAD = "memory", "layer", "order", "head"
HOTTEST, NGRAM_CLASS = "hottest rows", "n-gram class"
WHAT = (MEMORY, LAYER, ORDER, HEAD, HOTTEST, NGRAM_CLASS)
HOTTEST_ROWS = (10, 100, 1000)


@dataclass(frozen=True)
class AblatedPart:
    """The loss with one part of the memory silenced.

    what, part: which kind of part, and which one.
    share: of what the memory reads: of the lookups, or of the tokens for a class of n-grams.
    loss: nats per token.
    worth: how much higher the loss is than with everything. Below 0, the model is better without this part.
    low, high: its 95% interval over documents; None with one document alone.
    """

    what: str
    part: str
    share: float
    loss: float
    worth: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ablation:
    """What the parts of a memory are worth.

    loss: nats per token with everything.
    tokens: that were predicted.
    documents: that intervals are over.
    parts: that were silenced, one at a time.
    """

    loss: float
    tokens: int
    documents: int
    parts: list[AblatedPart]

    def to_json(self) -> str:
        """All numbers as JSON."""
        return json.dumps(asdict(self), indent=1)

    def markdown(self) -> str:
        """A table with a row for each part."""
        lines = [
            "| silenced | share | loss | worth, nats per token | 95% interval |",
            "|---|---|---|---|---|",
            f"| nothing | | {self.loss:.3f} | | |",
        ]
        for part in self.parts:
            between = "" if part.low is None else f"{part.low:+.3f} to {part.high:+.3f}"
            lines.append(f"| {part.part} | {part.share:.1%} | {part.loss:.3f} | {part.worth:+.3f} | {between} |")
        documents = f"{self.documents:,} document{'s' if self.documents > 1 else ''}"
        return "\n".join([*lines, "", f"{self.tokens:,} tokens of {documents}."])

    _repr_markdown_ = __str__ = markdown

    def draw(self, picture: str | Path) -> Path:
        """Write what each part is worth as PNG: bars with their intervals.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure, (axis,) = new_figure("What each part of the memory is worth", 1, 1, (8, 1.6 + 0.32 * len(self.parts)))
        kinds = list(dict.fromkeys(part.what for part in self.parts))
        for place, part in enumerate(self.parts):
            axis.barh(place, part.worth, color=COLORS[kinds.index(part.what) % len(COLORS)], height=0.7)
            if part.low is not None and part.high is not None:
                axis.plot([part.low, part.high], [place, place], color="black", linewidth=1.4, marker="|")
        axis.set_yticks(range(len(self.parts)), [part.part for part in self.parts])
        axis.margins(y=0.02)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("higher loss without it, nats per token (line: 95% interval over documents)")
        axis.set_title(f"loss with everything {self.loss:.3f}, {self.tokens:,} tokens", fontsize=10)
        return save_figure(figure, picture)


class Part(NamedTuple):
    """A part of a memory, and what silences it.

    around: a function of a batch and the number of its first row, that gives the context of its forward.
    """

    what: str
    name: str
    share: float
    around: Callable[[Batch, int], AbstractContextManager]


def ablate(
    model: nn.Module,
    data: Iterable[Any],
    what: str | Sequence[str] = MEMORY,
    *,
    tokenizer: Any = None,
    hottest_rows: Sequence[int] = HOTTEST_ROWS,
) -> Ablation:
    """Measure the loss with parts of the memory silenced, one part at a time.

    * "memory": all of it;
    * "layer": each memory layer;
    * "order": all heads of an order, in all layers; "head": each head of each layer. Their rows count as zeros;
    * "hottest rows": in each table the rows that this text looks up most. They count as zeros;
    * "n-gram class": the memory at tokens whose longest n-gram is of a class: numbers, code, names, function words,
      other. `ngram_classes.py` has the rules.

    Args:
        model: a causal language model with a memory.
        data: rows of text; see `read_rows`. Name documents: rows of a document are alike, and intervals draw documents.
        what: one of these, or several.
        tokenizer: for data that is text, and for classes of n-grams.
        hottest_rows: how many rows of each table, one part for each number.

    Raises:
        ValueError: the model has no memory, data is no text or predicts no token, `what` is none of these, or classes
            are asked for without a tokenizer.

    Example:
        >>> table = ablate(model, data, ["memory", "order"])
        >>> [part.part for part in table.parts]
        ['the whole memory', '2-grams', '3-grams']
    """
    kinds = [what] if isinstance(what, str) else list(what)
    if unknown := [kind for kind in kinds if kind not in WHAT]:
        raise ValueError(f"what must be one of {', '.join(map(repr, WHAT))}, or several of them; got {unknown[0]!r}.")
    if NGRAM_CLASS in kinds and tokenizer is None:
        raise ValueError("Classes of n-grams are found by their text: ablate(..., tokenizer=tokenizer).")
    layers = find_memory_layers(model, "ablate")
    rows = [row for row in rows_for(model, data, tokenizer) if bool(row.is_scored[1:].any())]
    if not rows:
        raise ValueError("data predicts no token: each of its rows has one token, or labels of -100 alone.")
    parts = [part for kind in kinds for part in _parts(model, layers, rows, kind, tokenizer, hottest_rows)]
    documents = [row.document for row in rows]
    with progress(len(rows) * (1 + len(parts)), "ablation") as bar:
        base, tokens = losses_of_rows(model, rows, bar)
        silent = [losses_of_rows(model, rows, bar, part.around)[0] for part in parts]
    total, count = float(base.sum() / tokens.sum()), len(set(documents))
    found = []
    for part, losses in zip(parts, silent, strict=True):
        mean, *ends = interval((losses - base) / tokens, documents, tokens)
        low, high = ends if count > 1 else (None, None)
        found.append(AblatedPart(part.what, part.name, part.share, total + mean, mean, low, high))
    return Ablation(total, int(tokens.sum()), count, found)


def _parts(
    model: nn.Module, layers: dict[int, Any], rows: list[TextRow], kind: str, tokenizer: Any, hottest: Sequence[int]
) -> Iterator[Part]:
    heads = {layer_id: len(layer.table.head_rows) for layer_id, layer in layers.items()}
    all_heads = sum(heads.values())
    if kind == MEMORY:
        yield Part(kind, "the whole memory", 1.0, lambda batch, first: silenced(model))
    elif kind == LAYER:
        for layer_id, own in heads.items():
            yield Part(kind, f"layer {layer_id}", own / all_heads, _whole(model, layers=[layer_id]))
    elif kind == ORDER:
        orders = range(2, next(iter(layers.values())).max_ngram_size + 1)
        for order in orders:
            yield Part(kind, f"{order}-grams", 1 / len(orders), _whole(model, orders=[order]))
    elif kind == HEAD:
        for layer_id, own in heads.items():
            per_order = own // (layers[layer_id].max_ngram_size - 1)
            for head in range(own):
                name = f"head {head} of layer {layer_id} ({head // per_order + 2}-grams)"
                yield Part(kind, name, 1 / all_heads, _whole(model, layers=[layer_id], heads=[head]))
    elif kind == HOTTEST:
        counts = _count_rows(model, layers, rows)
        lookups = sum(int(each.counts.sum()) for each in counts.values())
        for how_many in hottest:
            chosen = {layer_id: each.hottest(how_many) for layer_id, each in counts.items()}
            share = sum(count for each in chosen.values() for _, count in each) / lookups
            row_ids = {layer_id: torch.tensor([row for row, _ in each]) for layer_id, each in chosen.items()}
            name = f"the {how_many:,} hottest rows" + (" of each table" if len(layers) > 1 else "")
            yield Part(kind, name, share, _whole(model, rows=row_ids))
    else:
        order = next(iter(layers.values())).max_ngram_size
        classes = [classes_of(row, order, tokenizer) for row in rows]
        every = torch.cat(classes)
        for number, name in enumerate(CLASSES):
            share = float((every == number).double().mean())
            yield Part(kind, f"n-grams: {name}", share, _at_class(model, classes, number))


def _whole(model: nn.Module, **part: Any) -> Callable[[Batch, int], AbstractContextManager]:
    return lambda batch, first: silenced(model, **part)


def _at_class(
    model: nn.Module, classes: list[torch.Tensor], number: int
) -> Callable[[Batch, int], AbstractContextManager]:
    def around(batch: Batch, first: int) -> AbstractContextManager:
        own = classes[first : first + len(batch.input_ids)]
        padded = nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-1)
        return silenced(model, positions=padded == number)

    return around


def _count_rows(model: nn.Module, layers: dict[int, Any], rows: list[TextRow]) -> dict[int, RowCounts]:
    counts = {layer_id: RowCounts(layer.table.head_rows.cpu()) for layer_id, layer in layers.items()}
    with progress(len(rows), "hottest rows") as bar:
        for hashed in hash_rows(model, rows, bar):
            for layer_id, each in counts.items():
                each.add(hashed.row_ids[layer_id] + each.first_rows)
    return counts

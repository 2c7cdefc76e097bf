"""The text that a measurement reads: rows of token ids, each with the name of its document, and batches of them.

Batching changes nothing that a model computes for a row: padding is taken out first, and batches are padded on the
right, which no token attends to.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .memory_layers import device_of


# A text is cut into rows of at most so many tokens, or of as many as the model has positions.
ROW_TOKENS = 512
# Bounds the logits of a forward; a longer row is a batch of its own.
BATCH_TOKENS = 1024
# Hashing needs no logits.
HASHED_TOKENS = 2**15
IGNORED_LABEL = -100

CONTRACT = (
    "Give what Trainer takes: rows that are dicts with 'input_ids', such as a datasets.Dataset. A row may also be a "
    "list of ids, or a text if you give tokenizer= too."
)


class TextRow(NamedTuple):
    """Tokens that belong together.

    ids: (seq,) int64, without padding.
    is_scored: (seq,) bool, whether the loss of predicting this token counts; nothing predicts the first token.
    document: the name of the document that it is of.
    """

    ids: torch.Tensor
    is_scored: torch.Tensor
    document: str


class Batch(NamedTuple):
    """Rows of one forward, padded on the right.

    input_ids: (batch, seq) int64.
    is_token: (batch, seq) bool, False for padding.
    is_scored: (batch, seq) bool.
    """

    input_ids: torch.Tensor
    is_token: torch.Tensor
    is_scored: torch.Tensor

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(batch, seq) int64; None where nothing is padded."""
        return None if bool(self.is_token.all()) else self.is_token.long()


def read_rows(
    data: Iterable[Any], tokenizer: Any = None, longest_text: int = ROW_TOKENS, called: str = "data"
) -> Iterator[TextRow]:
    """Rows out of what a user has.

    Args:
        data: rows. A row is a dict with `input_ids`, as in a data set for Trainer, a sequence of ids, or a text. Of a
            dict, `attention_mask` says what is padding, `labels` of -100 what is not predicted, `position_ids` where a
            packed row begins a new document, and `document` names the document. A row without that name is a document
            of its own. A dict may have `text` in place of ids.
        tokenizer: for texts.
        longest_text: a text is cut into rows of at most so many tokens.
        called: the argument with which the user gave `data`, for messages.

    Raises:
        ValueError: a row is none of these, or there is no row.

    Example:
        >>> [row.document for row in read_rows([{"input_ids": [5, 6, 7], "document": "a"}, [8, 9]])]
        ['a', 'row 1']
    """
    if isinstance(data, str | Mapping):
        kind = type(data).__name__
        raise ValueError(f"{called} is one {kind}, and must be a list or an iterable of rows. {CONTRACT}")
    found = 0
    for number, given in enumerate(data):
        for row in _rows_of(given, f"{number} of {called}", tokenizer, longest_text, f"row {number}"):
            found += 1
            yield row
    if not found:
        raise ValueError(f"{called} has no tokens. {CONTRACT}")


def _rows_of(given: Any, where: str, tokenizer: Any, longest_text: int, own_name: str) -> Iterator[TextRow]:
    row = given if isinstance(given, Mapping) else {"text" if isinstance(given, str) else "input_ids": given}
    name = row.get("document")
    document = own_name if name is None else str(name)
    if row.get("input_ids") is None:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"Row {where} has the columns {sorted(row)}, and no 'input_ids'. {CONTRACT}")
        if tokenizer is None:
            raise ValueError(f"Row {where} is a text, so its tokens are not known. {CONTRACT}")
        ids = torch.tensor(tokenizer(row["text"], verbose=False)["input_ids"], dtype=torch.int64)
        for part in ids.split(longest_text) if len(ids) else ():
            yield TextRow(part, torch.ones_like(part, dtype=torch.bool), document)
        return
    columns = {}
    for key in ("input_ids", "labels", "attention_mask", "position_ids"):
        if row.get(key) is not None:
            columns[key] = _as_ids(row[key], key, where)
            if len(columns[key]) != len(columns["input_ids"]):
                lengths = f"{len(columns['input_ids'])} input_ids and {len(columns[key])} {key}"
                raise ValueError(f"Row {where} has {lengths}. Give one of each per token.")
    ids = columns["input_ids"]
    is_scored = columns.get("labels", ids) != IGNORED_LABEL
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if "position_ids" in columns:
        begins = F.pad(columns["position_ids"].diff() != 1, (1, 0))
    is_token = columns.get("attention_mask", torch.ones_like(ids)) > 0
    ids, is_scored, begins = ids[is_token], is_scored[is_token], begins[is_token]
    bounds = [0, *(place for place in begins.nonzero().flatten().tolist() if place), len(ids)]
    for part, (start, end) in enumerate(zip(bounds, bounds[1:])):
        own = document if name is not None or len(bounds) == 2 else f"{document}, document {part}"
        if end > start:
            yield TextRow(ids[start:end], is_scored[start:end], own)


def _as_ids(given: Any, key: str, where: str) -> torch.Tensor:
    try:
        ids = torch.as_tensor(given).cpu()
    except (ValueError, TypeError, RuntimeError):
        ids = torch.zeros(0)
    if ids.ndim != 1 or (ids.is_floating_point() and ids.numel()):
        kind = f"a {type(given).__name__}" if ids.ndim == 1 else f"of shape {tuple(ids.shape)}"
        raise ValueError(f"{key} of row {where} is {kind}, and must be a list of integers. {CONTRACT}")
    return ids.long()


def rows_for(model: nn.Module, data: Iterable[Any], tokenizer: Any = None, called: str = "data") -> list[TextRow]:
    """As `read_rows`, of texts that are cut to the positions that a model has."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or ROW_TOKENS
    return list(read_rows(data, tokenizer, min(ROW_TOKENS, positions), called))


def batches(rows: Iterable[TextRow], most_tokens: int) -> Iterator[Batch]:
    """Batches of consecutive rows, of at most so many tokens with their padding, but of at least one row."""
    waiting: list[TextRow] = []
    longest = 0
    for row in rows:
        if waiting and max(longest, len(row.ids)) * (len(waiting) + 1) > most_tokens:
            yield _padded(waiting)
            waiting, longest = [], 0
        waiting.append(row)
        longest = max(longest, len(row.ids))
    if waiting:
        yield _padded(waiting)


def _padded(rows: Sequence[TextRow]) -> Batch:
    def pad(tensors: list[torch.Tensor]) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    is_token = pad([torch.ones_like(row.is_scored) for row in rows])
    return Batch(pad([row.ids for row in rows]), is_token, pad([row.is_scored for row in rows]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; afterwards each module is in the mode that it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def run(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits of a batch, (batch, seq, vocabulary), on the model's device."""
    device = device_of(model)
    mask = batch.attention_mask
    given = {} if mask is None else {"attention_mask": mask.to(device)}
    return model(input_ids=batch.input_ids.to(device), use_cache=False, **given).logits


def losses_of_rows(
    model: nn.Module, rows: Sequence[TextRow], bar: Any = None, around: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row, summed over its predicted tokens.

    Args:
        model: a causal language model.
        rows: of text.
        bar: progress bar, which counts rows.
        around: a function of a batch and the number of its first row, that gives a context for its forward.

    Returns:
        (rows,) float64 losses in nats, and (rows,) int64 predicted tokens.
    """
    losses, tokens, done = [], [], 0
    with evaluating(model):
        for batch in batches(rows, BATCH_TOKENS):
            if around is None:
                logits = run(model, batch)
            else:
                with around(batch, done):
                    logits = run(model, batch)
            is_scored = batch.is_scored[:, 1:].to(logits.device)
            wanted = batch.input_ids[:, 1:].to(logits.device)
            of_tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="none")
            losses.append((of_tokens.double().view_as(wanted) * is_scored).sum(1).cpu())
            tokens.append(is_scored.sum(1).cpu())
            done += len(batch.input_ids)
            if bar is not None:
                bar.update(len(batch.input_ids))
    return torch.cat(losses), torch.cat(tokens)


def progress(total: int, what: str, unit: str = "row") -> Any:
    """A progress bar on a terminal, and nothing elsewhere: a bar in a log file is noise."""
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=not sys.stderr.isatty())

"""What a memory does to one text: n-grams, rows, gates, what is added, and how that changes the prediction.

`trace` gives data; showing.py draws it. Everything is recorded by hooks on one plain forward. Effects need more: for
each memory layer a copy of each token, whose memory is silenced there. A copy attends to the unsilenced tokens before
it, so a layer costs as many more tokens as the text has, and not a forward for each token.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.cache_utils import DynamicCache

from ..counting import STATISTICS_FILE
from ..modeling.memory_layer import MemoryCacheLayer
from ..modeling.modeling_engram_moe import CACHE_NAME
from ..modeling.table_patches import has_requests
from .memory_layers import device_of, find_memory_layers
from .silencing import refuse_compiled, silenced


# Tokens whose copies share a forward, and tokens of a batch of ordinary forwards.
COPIED_TOKENS, BATCH_TOKENS = 128, 4096
# Tokens that a character can be cut into: UTF-8 has at most four bytes.
MOST_FRAGMENTS = 6
# What models that take no tree of tokens raise.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, AttributeError)


@dataclass(frozen=True)
class Effect:
    """What one memory layer does to the prediction after each token: NaN after the last one, which has no next token.

    log_prob: (tokens,) of the true next token, in nats.
    silenced_log_prob: (tokens,) the same with this layer silenced at this token, and nowhere else.
    kl: (tokens,) nats from the distribution over the next token without this layer to the one with it.
    """

    log_prob: np.ndarray
    silenced_log_prob: np.ndarray
    kl: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """(tokens,) by how many nats this layer makes the true next token more likely; below 0 it misleads."""
        return self.log_prob - self.silenced_log_prob


@dataclass(frozen=True)
class Trace:
    """A text and what a memory did to it. Arrays are NumPy's, float32 or int64.

    text: as it was given.
    tokens: the text of each token. A character that is cut into several tokens belongs to the last of them, and the
        others are "".
    pieces: what the vocabulary calls each token.
    token_ids: (tokens,).
    ngrams: order to the text of the n-gram that ends at each token. It is shorter where a token sees less than that.
    gates: layer id to (tokens, streams), in [0, 1]; 0 for a token without memory.
    row_ids: layer id to (tokens, heads), each in [0, rows of its head); the heads of order 2 come first.
    rows_of_heads: layer id to (heads,), how many rows each head has.
    norms: layer id to (tokens,), the norm of what is added to the residual streams of a token, over all streams.
    share: layer id to (tokens,), that norm over the norm of the streams after the addition.
    trained: layer id to (tokens, heads), whether training has looked the row up; None where that is not known.
    effects: layer id to an `Effect`; None where they were not asked for.
    patched: layer id to (tokens, heads), whether a row patch changes the row; None where none is active or asked for.
    """

    text: str
    tokens: list[str]
    pieces: list[str]
    token_ids: np.ndarray
    ngrams: dict[int, list[str]]
    gates: dict[int, np.ndarray]
    row_ids: dict[int, np.ndarray]
    rows_of_heads: dict[int, np.ndarray]
    norms: dict[int, np.ndarray]
    share: dict[int, np.ndarray]
    trained: dict[int, np.ndarray] | None = None
    effects: dict[int, Effect] | None = None
    patched: dict[int, np.ndarray] | None = None

    @property
    def layer_ids(self) -> list[int]:
        """The memory layers, in order."""
        return sorted(self.gates)

    def to_json(self) -> str:
        """All of it as JSON. Layer ids and orders are strings there, and NaN is null."""
        effects = None
        if self.effects is not None:
            effects = {
                layer_id: {"log_prob": e.log_prob, "silenced_log_prob": e.silenced_log_prob, "kl": e.kl}
                for layer_id, e in self.effects.items()
            }
        return json.dumps(_plain({**vars(self), "effects": effects}), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """In the types of JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        rounded: Any = np.round(value.astype(np.float64), 6).astype(object)
        rounded[np.isnan(value)] = None
        return rounded.tolist()
    return value.tolist() if isinstance(value, np.ndarray) else value


@torch.no_grad()
def trace(
    model: nn.Module, tokenizer: Any, text: str, *, effects: bool = True, statistics: str | Path | None = None
) -> Trace:
    """Record what the memory of a model does to a text.

    The text is tokenized as `tokenizer(text)` does it, special tokens included. Effects are exact: a copy of a token,
    silenced at one layer, attends to the unsilenced tokens before it. Models whose attention cannot be given such a
    tree (sliding windows, linear attention, biases by distance) are recognised, because the copies that are not
    silenced must give the prediction of the plain forward. For these there is an ordinary forward for each token, in
    batches, which takes time by the square of the length.

    Args:
        model: a causal language model with a memory: an EngramMoE, or a model after `add_engram`.
        tokenizer: of the model.
        text: at least one token.
        effects: False skips the effects on the prediction, which take several times as long as the rest.
        statistics: file or folder with the `row_statistics.safetensors` that `EngramRowStatisticsCallback` writes
            beside a checkpoint. By default it is looked for in the folder that the model was loaded from.

    Returns:
        the trace. It takes memory for the tokens of the text, never for the table.

    Raises:
        ValueError: the model has no memory or is compiled; the text has no token; the statistics are of other tables.
        FileNotFoundError: there are no statistics where you said.

    Example:
        >>> found = trace(model, tokenizer, "for i, line in enumerate(lines):")
        >>> found.gates[1].shape[0] == len(found.tokens), "".join(found.tokens)
        (True, 'for i, line in enumerate(lines):')
    """
    layers = find_memory_layers(model, "trace")
    refuse_compiled(model)
    device = device_of(model)
    # A list of ids is wanted, whatever was set for padding.
    token_ids = list(tokenizer(text)["input_ids"])
    if not token_ids:
        raise ValueError("The text has no token, so there is nothing to trace. Give a text.")
    ids = torch.tensor([token_ids], dtype=torch.int64, device=device)  # (1, tokens)
    with evaluating(model):
        seen, logits = _run(model, layers, ids)
        measured = measure_effects(model, ids, list(layers), logits) if effects else None
    is_first = next(iter(layers))
    reach = seen[is_first]["reach"]
    return Trace(
        text=text,
        tokens=texts_of_tokens(tokenizer, token_ids),
        pieces=[str(piece) for piece in tokenizer.convert_ids_to_tokens(token_ids)],
        token_ids=np.array(token_ids, dtype=np.int64),
        ngrams={
            order: _texts_of_ngrams(tokenizer, token_ids, reach, order)
            for order in range(2, layers[is_first].max_ngram_size + 1)
        },
        gates={layer_id: found["gates"] for layer_id, found in seen.items()},
        row_ids={layer_id: found["row_ids"] for layer_id, found in seen.items()},
        rows_of_heads={layer_id: layer.table.head_rows.cpu().numpy() for layer_id, layer in layers.items()},
        norms={layer_id: found["norms"] for layer_id, found in seen.items()},
        share={layer_id: found["share"] for layer_id, found in seen.items()},
        trained=_find_trained(model, layers, seen, statistics),
        effects=measured,
        patched=_find_patched(layers, seen),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _run(model: nn.Module, layers: dict[int, Any], ids: torch.Tensor) -> tuple[dict[int, dict], torch.Tensor]:
    """One plain forward.

    Returns:
        layer id to what the layer was given and gave, and the logits, (tokens, vocabulary).
    """
    seen: dict[int, dict[str, np.ndarray]] = {}

    def look(layer: Any, args: tuple, output: tuple) -> None:
        streams, row_ids, hashed = args[:3]
        added, gates = (each[0].float() for each in output)
        norms = added.flatten(1).norm(dim=-1)  # (tokens,)
        after = (streams[0].float() + added).flatten(1).norm(dim=-1)
        seen[layer.layer_idx] = {
            "gates": gates.cpu().numpy(),
            "row_ids": row_ids[0].cpu().numpy(),
            "norms": norms.cpu().numpy(),
            "share": (norms / after.clamp_min(torch.finfo(after.dtype).tiny)).cpu().numpy(),
            "reach": hashed.reach[0].cpu().numpy(),
        }

    hooks = [layer.register_forward_hook(look) for layer in layers.values()]
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return {layer_id: seen[layer_id] for layer_id in layers}, logits


# Effects on the prediction.


class _Measured:
    """Effects of all layers, filled in for some tokens at a time."""

    def __init__(self, ids: torch.Tensor, layer_ids: list[int]):
        tokens = ids.shape[1]
        self.next_ids = ids[0, 1:]
        self.log_prob = np.full(tokens, np.nan, dtype=np.float32)
        self.silenced_log_prob = {i: np.full(tokens, np.nan, dtype=np.float32) for i in layer_ids}
        self.kl = {i: np.full(tokens, np.nan, dtype=np.float32) for i in layer_ids}

    def add(self, layer_id: int, positions: range, logits: torch.Tensor, silent: torch.Tensor) -> None:
        """
        Args:
            positions: of tokens, one after another.
            logits, silent: (positions, vocabulary), with the layer and without it.
        """
        whole, without = logits.float().log_softmax(-1), silent.float().log_softmax(-1)
        where = slice(positions.start, positions.stop)
        # Tokens that a model never says have a probability of 0 in both.
        terms = torch.where(whole.isneginf(), 0.0, whole.exp() * (whole - without))
        self.kl[layer_id][where] = terms.sum(-1).clamp_min(0).cpu().numpy()
        next_ids = self.next_ids[where].unsqueeze(-1)
        where = slice(positions.start, positions.start + len(next_ids))
        self.log_prob[where] = whole[: len(next_ids)].gather(-1, next_ids)[:, 0].cpu().numpy()
        self.silenced_log_prob[layer_id][where] = without[: len(next_ids)].gather(-1, next_ids)[:, 0].cpu().numpy()

    def effects(self) -> dict[int, Effect]:
        return {i: Effect(self.log_prob, self.silenced_log_prob[i], self.kl[i]) for i in self.kl}


def measure_effects(
    model: nn.Module, ids: torch.Tensor, layer_ids: list[int], logits: torch.Tensor
) -> dict[int, Effect]:
    """What each memory layer does to each prediction.

    Args:
        ids: (1, tokens).
        logits: (tokens, vocabulary) of a plain forward.
    """
    measured = _Measured(ids, layer_ids)
    try:
        if _measure_by_copies(model, ids, layer_ids, logits, measured):
            return measured.effects()
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
    measured = _Measured(ids, layer_ids)
    for layer_id in layer_ids:
        _measure_by_forwards(model, ids, layer_id, range(ids.shape[1]), measured)
    return measured.effects()


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL divergence of two distributions over the next token, (tokens,), from their logits (tokens, vocabulary)."""
    expected, found = (each.float().log_softmax(-1) for each in (expected, found))
    return (expected.exp() * (expected - found)).sum(-1)


def _measure_by_copies(
    model: nn.Module, ids: torch.Tensor, layer_ids: list[int], expected: torch.Tensor, measured: _Measured
) -> bool:
    """Copies of some tokens in one forward: first the tokens themselves, then copies for each layer, then copies that
    are not silenced. A copy sees the tokens before its own, and itself. The cache keeps the tokens alone.

    Args:
        expected: (tokens, vocabulary) logits of a plain forward.

    Returns:
        False if the copies that are not silenced differ from the plain forward.
    """
    _measure_first(model, ids, layer_ids, measured)
    whole: Any = model
    config = (whole.get_base_model() if hasattr(whole, "get_base_model") else whole).config
    cache = DynamicCache(config=config.get_text_config())
    model(input_ids=ids[:, :1], use_cache=True, **{CACHE_NAME: cache})
    for layer in cache.layers:
        if isinstance(layer, MemoryCacheLayer):
            # Copies are taken back, and there may be more than it keeps.
            layer.activate_past_recording()
    eps = torch.finfo(next(p.dtype for p in model.parameters() if p.is_floating_point())).eps
    # In nats. Rounding gives much less, and a copy that sees too little gives much more.
    allowed = 1e-6 if eps < 1e-6 else 1e-2
    groups = len(layer_ids) + 1
    for start in range(1, ids.shape[1], COPIED_TOKENS):
        positions = range(start, min(start + COPIED_TOKENS, ids.shape[1]))
        count = len(positions)
        mask = _mask_of_copies(start, count, groups, ids.device)
        given = {
            "input_ids": ids[:, start : positions.stop].repeat(1, 1 + groups),
            "position_ids": torch.arange(start, positions.stop, device=ids.device).repeat(1 + groups).unsqueeze(0),
            "attention_mask": _as_scores(mask, model),
        }
        with ExitStack() as silences:
            for group, layer_id in enumerate(layer_ids, 1):
                columns = range(group * count, (group + 1) * count)
                silences.enter_context(silenced(model, [layer_id], positions=columns))
            logits = model(**given, use_cache=True, **{CACHE_NAME: cache}).logits[0]
        if cache.get_seq_length() != start + len(mask):
            return False
        cache.crop(-groups * count)
        of_groups = logits.split(count)
        plain = of_groups[-1]
        if not bool((_divergence(expected[start : positions.stop], plain) <= allowed).all()):
            return False
        for layer_id, silent in zip(layer_ids, of_groups[1:-1], strict=True):
            measured.add(layer_id, positions, plain, silent)
    return True


def _mask_of_copies(before: int, count: int, groups: int, device: torch.device) -> torch.Tensor:
    """(tokens, seen) bool, True for "sees", of `count` tokens and `groups` copies of each.

    Args:
        before: tokens in the cache.
    """
    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    own = torch.eye(count * groups, dtype=torch.bool, device=device)
    of_tokens = torch.cat([causal, causal.new_zeros(count, count * groups)], 1)
    of_copies = torch.cat([causal.tril(-1).repeat(groups, 1), own], 1)
    seen = torch.cat([of_tokens, of_copies])
    return torch.cat([seen.new_ones(len(seen), before), seen], 1)


def _as_scores(mask: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """(1, 1, tokens, seen) floats that are added to scores: every attention of transformers takes them."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return scores.masked_fill(~mask, torch.finfo(dtype).min)[None, None]


def _measure_first(model: nn.Module, ids: torch.Tensor, layer_ids: list[int], measured: _Measured) -> None:
    for layer_id in layer_ids:
        _measure_by_forwards(model, ids, layer_id, range(1), measured)


def _measure_by_forwards(
    model: nn.Module, ids: torch.Tensor, layer_id: int, positions: range, measured: _Measured
) -> None:
    """An ordinary forward for each token, in batches; the layer is silenced at that token."""
    start = positions.start
    while start < positions.stop:
        # So many rows of `start + count` tokens that together they have at most BATCH_TOKENS.
        count = max(1, (math.isqrt(start**2 + 4 * BATCH_TOKENS) - start) // 2)
        stop = min(start + count, positions.stop)
        rows = torch.arange(stop - start, device=ids.device)
        batch = ids[:, :stop].expand(stop - start, -1)
        own = torch.zeros(batch.shape, dtype=torch.bool, device=ids.device)
        own[rows, rows + start] = True
        plain = model(input_ids=ids[:, :stop], use_cache=False).logits[0, start:]
        with silenced(model, [layer_id], positions=own):
            silent = model(input_ids=batch, use_cache=False).logits[rows, rows + start]
        measured.add(layer_id, range(start, stop), plain, silent)
        start = stop


# Texts.


def texts_of_tokens(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """The text of each token in its place. Together they are the text that the tokenizer decodes.

    A token that ends inside of a character is "", and the token that ends the character has it.
    """
    texts: list[str] = []
    # Tokens that have been shown from `start` on are decoded again, because some decoders drop a leading space.
    start, shown = 0, 0
    for i in range(len(token_ids)):
        before = _decode(tokenizer, token_ids[start:shown])
        whole = _decode(tokenizer, token_ids[start : i + 1])
        is_cut = whole.endswith("\ufffd") and i + 1 < len(token_ids) and i + 1 - shown < MOST_FRAGMENTS
        texts.append("" if is_cut else whole[len(before) :])
        if not is_cut:
            start, shown = shown, i + 1
    return texts


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _texts_of_ngrams(tokenizer: Any, token_ids: list[int], reach: np.ndarray, order: int) -> list[str]:
    """The text of the n-gram that ends at each token; "" for a token without memory."""
    firsts = [i - min(int(seen), order - 1) if seen >= 0 else i + 1 for i, seen in enumerate(reach)]
    return [_decode(tokenizer, token_ids[first : i + 1]) for i, first in enumerate(firsts)]


def _find_patched(layers: dict[int, Any], seen: dict[int, dict]) -> dict[int, np.ndarray] | None:
    """Layer id to (tokens, heads) bool: which of these rows the active patches change."""
    if not any(layer.table.patches.overlay for layer in layers.values()) and not has_requests():
        return None
    return {
        # As a batch of one sequence.
        layer_id: layer.table.patches.hits(torch.as_tensor(seen[layer_id]["row_ids"])[None])[0].numpy()
        for layer_id, layer in layers.items()
    }


def _find_trained(
    model: nn.Module, layers: dict[int, Any], seen: dict[int, dict], statistics: str | Path | None
) -> dict[int, np.ndarray] | None:
    """Layer id to (tokens, heads) bool: which of these rows training has looked up. Reads the counts of all rows, and
    keeps those of the text."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    if statistics is None and not folder:
        return None
    path = Path(folder or "" if statistics is None else statistics)
    path = path / STATISTICS_FILE if path.is_dir() else path
    if statistics is None and not (path.name == STATISTICS_FILE and path.is_file()):
        return None
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. EngramRowStatisticsCallback writes {STATISTICS_FILE} beside each checkpoint."
        )
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for layer_id, layer in layers.items():
                touched = file.get_tensor(f"{layer_id}.touched")
                if touched.shape != (layer.table.num_rows,):
                    raise ValueError(
                        f"{path} counts {len(touched)} rows in layer {layer_id}, and the table there has "
                        f"{layer.table.num_rows}. Give the statistics of this model."
                    )
                rows = torch.as_tensor(seen[layer_id]["row_ids"]) + layer.table.first_rows_of_heads.cpu()
                found[layer_id] = touched[rows].numpy()
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold the statistics of this model: {error}.") from error
    return found

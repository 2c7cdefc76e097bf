"""Token ids to row ids: token compression, multipliers, primes, and the one module that hashes. Integers only.

Published tables are addressed by these constants, so a change here makes them unreadable. This file knows nothing of
tables or models. Source: arXiv 2601.07372, section 2.2, and DeepSeek's demo of it; for the family "splitmix" the module
`qwen4_exp` of transformers.

The hash of one n-gram that ends at position t, for one head:

    (x[t] * m[0]  XOR  x[t-1] * m[1]  XOR ... XOR  x[t-n+1] * m[n-1])  mod  prime of the head

where x are compressed ids (the compressed pad before the start of a document) and m the multipliers of the layer. Two
families of models share this formula; `FAMILIES` says where they differ.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sympy import nextprime
from tokenizers import Regex, Tokenizer, normalizers
from torch import nn
from transformers.utils.import_utils import is_tracing

from .ids_reach import NO_MEMORY, Seen, document_positions, end_ngrams, reach_along, token_reach, unpack_history


LAYER_SEED_STEP = 10007
# Of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
SPLITMIX_STEP, SPLITMIX_FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
REPLACEMENT_CHARACTER = "\ufffd"
# Stands for "one space" while Strip runs; a private-use character that no vocabulary contains.
SPACE_SENTINEL = "\ue000"
# What a tokenizer makes of this text tells its normalizer, its pre-tokenizer and its merges from those of others.
PROBE_TEXT = "Zürich İSTANBUL ﬁnE\tnaïve  3.14159 10007\n\nWqxz_JKL(vB)≠Ωß 日本語がкЖ किताब 🙂🏽 e\u0301\u00a0 \u200bQ"
# How many of its own tokens a tokenizer is given as text.
SAMPLED_TOKENS = 1000
# Parts of a fingerprint that say which tokenizer was bound; the others say which rows an n-gram reads.
TOKENIZER_PARTS = ("tokens", "vocabulary", "text")


def build_token_map(tokenizer) -> torch.Tensor:
    """The compressed id of every token id. Tokens that differ only in case, accents, width or white space share one.

    Args:
        tokenizer: a fast tokenizer of transformers (one with a `backend_tokenizer`).

    Returns:
        int64 tensor of shape (len(tokenizer),); new ids are given in order of first appearance, from 0 on.

    Raises:
        ValueError: the tokenizer has no `tokenizers` backend, so a single id cannot be decoded on its own.

    Example:
        >>> token_map = build_token_map(tokenizer)
        >>> compressed_vocab_size = int(token_map.max()) + 1
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Token compression needs a fast tokenizer, got {type(tokenizer).__name__}. "
            "Load it with AutoTokenizer.from_pretrained, or convert it to a tokenizer.json first."
        )
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), SPACE_SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(SPACE_SENTINEL, " "),
        ]
    )
    token_ids = list(range(len(tokenizer)))
    # The backend decodes without clean-up of spaces, which is what the contract asks for.
    texts = tokenizer.backend_tokenizer.decode_batch([[i] for i in token_ids], skip_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    compressed_of_key: dict[str | None, int] = {}
    token_map = []
    for text, token in zip(texts, tokens):
        key = token if REPLACEMENT_CHARACTER in text else normalizer.normalize_str(text) or text
        token_map.append(compressed_of_key.setdefault(key, len(compressed_of_key)))
    return torch.tensor(token_map, dtype=torch.int64)


def find_ngrams(
    ids: torch.Tensor,
    reach: torch.Tensor,
    max_ngram_size: int,
    pad_id: int | torch.Tensor,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ids of the longest n-gram that ends at each token, pads where a token may not look.

    Args:
        ids: (batch, history + seq) compressed ids, negative for "no memory".
        reach: (batch, seq) as `token_reach` gives it.
        max_ngram_size: the largest order N.
        pad_id: the compressed pad.
        before: of `Seen`.

    Returns:
        (batch, N, seq), the oldest id first, the token itself last; all in [0, compressed vocabulary size).
    """
    seq = reach.shape[1]
    shifts = torch.arange(max_ngram_size - 1, -1, -1, device=ids.device).unsqueeze(1)
    if before is not None:
        own = torch.arange(seq, device=ids.device).expand(len(ids), -1).unsqueeze(-1)
        places = torch.cat([before[..., : max_ngram_size - 1].flip(-1), own], -1) + ids.shape[1] - seq
        read = ids.unsqueeze(1).expand(-1, seq, -1).gather(-1, places.clamp_min(0)).transpose(1, 2)
        return torch.where(reach.unsqueeze(1) >= shifts, read, pad_id)
    missing = max(0, seq + max_ngram_size - 1 - ids.shape[1])
    padded = F.pad(ids, (missing, 0), value=NO_MEMORY) if missing else ids
    shifted = padded[:, 1 - max_ngram_size - seq :].unfold(1, max_ngram_size, 1).transpose(1, 2)  # (batch, N, seq)
    return torch.where(reach.unsqueeze(1) >= shifts, shifted, pad_id)


def hash_layers(ngrams: torch.Tensor, multipliers: torch.Tensor, primes: torch.Tensor) -> torch.Tensor:
    """Row ids of all heads of several layers, over the same tokens.

    Args:
        ngrams: (batch, N, seq), from `find_ngrams`.
        multipliers: (layers, 1, N, 1) int64, as `stack_constants` gives them.
        primes: (layers, 1, 1, orders, heads per order) int64.

    Returns:
        (layers, batch, seq, orders * heads per order) int64, each in [0, prime of its head), order by order.
    """
    products = (ngrams * multipliers).unbind(2)
    mixes = [products[-1] ^ products[-2]]
    for product in products[-3::-1]:
        mixes.append(mixes[-1] ^ product)
    # One remainder per head, in the place of the number that it is taken of.
    mixed = torch.stack(mixes, dim=-1).unsqueeze(-1).expand(*mixes[0].shape, *primes.shape[-2:])
    return mixed.contiguous().fmod_(primes).flatten(-2)


def stack_constants(
    multipliers: Sequence[Sequence[int]], primes: Sequence[Sequence[Sequence[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Constants of several layers as `hash_layers` takes them, the multiplier of the oldest id first."""
    of_shifts = torch.tensor(multipliers, dtype=torch.int64, device="cpu").flip(-1)
    return of_shifts[:, None, :, None], torch.tensor(primes, dtype=torch.int64, device="cpu")[:, None, None]


def draw_by_pcg64(seed: int, bound: int, how_many: int) -> list[int]:
    """Numbers in [0, bound) from numpy's default generator."""
    return np.random.default_rng(seed).integers(0, bound, size=how_many, dtype=np.int64).tolist()


def draw_by_splitmix64(seed: int, bound: int, how_many: int) -> list[int]:
    """Numbers in [0, bound) from SplitMix64, from its second one on."""
    found, wrap = [], 2**64 - 1
    for place in range(2, how_many + 2):
        number = (seed + SPLITMIX_STEP * place) & wrap
        for shift, factor in zip((30, 27), SPLITMIX_FACTORS, strict=True):
            number = (number ^ (number >> shift)) * factor & wrap
        found.append((number ^ (number >> 31)) % bound)
    return found


class HashFamily(NamedTuple):
    """Where two kinds of published tables differ.

    draw: (seed, bound, how many) to random numbers in [0, bound), of which multipliers are made.
    counts_memories: whether the seed of a layer counts memory layers; otherwise it is made of the layer's id.
    ends_at_pad: whether n-grams begin anew after the pad, which is then the token that ends a document.
    rows_multiple: the rows of a table are a multiple of this number; those behind the last head are never read.
    """

    draw: Callable[[int, int, int], list[int]]
    counts_memories: bool
    ends_at_pad: bool
    rows_multiple: int


FAMILIES = {
    # DeepSeek's demo, and DeepSeek-V4.1.
    "engram": HashFamily(draw_by_pcg64, counts_memories=False, ends_at_pad=False, rows_multiple=1),
    # Qwen3.8-Flash-Next, which is `qwen4_exp` in transformers.
    "splitmix": HashFamily(draw_by_splitmix64, counts_memories=True, ends_at_pad=True, rows_multiple=128),
}


def family_of(config) -> str:
    """The name of the hash family of a config; one that does not say has "engram"."""
    return getattr(config, "engram_hash", "engram")


def draw_multipliers(config, id_space: int) -> dict[int, list[int]]:
    """For each memory layer its N odd multipliers, so small that no product of one and an id overflows int64.

    Args:
        config: as for `NgramHash`.
        id_space: how many different ids there are.
    """
    family, layer_ids = FAMILIES[family_of(config)], config.engram_layer_ids
    half_bound = max(1, (np.iinfo(np.int64).max // id_space) // 2)
    return {
        layer_id: [
            2 * number + 1
            for number in family.draw(
                config.engram_seed + LAYER_SEED_STEP * (place if family.counts_memories else layer_id),
                half_bound,
                config.engram_max_ngram_size,
            )
        ]
        for place, layer_id in enumerate(layer_ids)
    }


def rows_behind_heads(family: str, rows_of_head: Sequence[int]) -> int:
    """How many rows a table has behind those of its heads.

    Example:
        >>> rows_behind_heads("splitmix", [101, 103])
        52
    """
    return -sum(rows_of_head) % FAMILIES[family].rows_multiple


def find_primes(layer_ids: Sequence[int], vocab_sizes: Sequence[int], n_heads: int) -> dict[int, list[list[int]]]:
    """Rows of every head: per layer and order, the next primes from the order's size on that no head has yet."""
    used: set[int] = set()
    # Everything from a start up to its last find is used, so a search may go on where the last one ended.
    last_found: dict[int, int] = {}
    primes: dict[int, list[list[int]]] = {}
    for layer_id in layer_ids:
        primes[layer_id] = []
        for vocab_size in vocab_sizes:
            heads: list[int] = []
            candidate = last_found.get(vocab_size, vocab_size - 1)
            while len(heads) < n_heads:
                candidate = int(nextprime(candidate))
                if candidate not in used:
                    heads.append(candidate)
            last_found[vocab_size] = candidate
            used.update(heads)
            primes[layer_id].append(heads)
    return primes


class HashedTokens(NamedTuple):
    """What a forward needs to know of its tokens.

    ids: (batch, seq) compressed ids; a negative id carries no memory.
    reach: (batch, seq) tokens before it that each token may look at; -1 for a token without memory.
    ngrams: (batch, N, seq) ids of the longest n-gram that ends at each token, the oldest first.
    row_ids: layer id to (batch, seq, heads) row ids, each in [0, rows of its head).
    before: of `Seen`: where the tokens before it are; None for directly before it.
    """

    ids: torch.Tensor
    reach: torch.Tensor
    ngrams: torch.Tensor
    row_ids: dict[int, torch.Tensor]
    before: torch.Tensor | None = None


class NgramHash(nn.Module):
    """Everything between token ids and row ids: the token map of a tokenizer, the constants, the hash.

    `token_map`, (vocab_size,) int64, is a buffer, so that checkpoints hold it; it is None without token compression.
    Multipliers and primes follow from the config and are no buffers. Lookups use a copy of the token map that is no
    buffer either, so averaging, casting or quantizing the buffers of a model cannot change which rows it reads.

    Example:
        >>> from engram_hf import EngramMoEConfig
        >>> config = EngramMoEConfig(vocab_size=1000, num_hidden_layers=2, engram_layer_ids=[0], engram_vocab_size=101,
        ...     engram_n_heads=2, engram_compressed_vocab_size=None)
        >>> NgramHash.from_config(config).primes(0)
        [[101, 103], [107, 109]]
    """

    token_map: torch.Tensor | None

    def __init__(self, config):
        """
        Args:
            config: an `EngramMoEConfig`, or any object with its `engram_*` fields and `vocab_size`. Binding a tokenizer
                writes to it.
        """
        super().__init__()
        self.config = config
        self.layer_ids = list(config.engram_layer_ids)
        self.max_ngram_size = config.engram_max_ngram_size
        self._primes = find_primes(self.layer_ids, config.engram_vocab_sizes, config.engram_n_heads)
        compresses = config.engram_compressed_vocab_size is not None
        token_map = torch.full((config.vocab_size,), NO_MEMORY, dtype=torch.int64) if compresses else None
        self.register_buffer("token_map", token_map)
        self._bound_map: torch.Tensor | None = None
        self._given_pad_id: int | None = None
        # Whether rows are addressed as the fingerprint in the config says.
        self.is_confirmed = False
        self._draw_constants()

    @classmethod
    def from_config(cls, config, pad_id: int | None = None) -> "NgramHash":
        """The hash that a config declares.

        Args:
            config: as for the constructor.
            pad_id: the *compressed* pad id for `row_ids`; by default `config.engram_pad_token_id` as it stands, which
                is right for models without compression.

        Raises:
            ValueError: `engram_compressed_vocab_size` is still "auto", or there is no memory layer.
        """
        if not config.engram_layer_ids:
            raise ValueError("engram_layer_ids is empty, so there is no memory and nothing to hash. Name a layer.")
        if config.engram_id_space is None:
            raise ValueError(
                'engram_compressed_vocab_size is "auto", so the multipliers are not known yet. '
                "Bind a tokenizer first: model.bind_tokenizer(tokenizer)."
            )
        if pad_id is not None and not 0 <= pad_id < config.engram_id_space:
            raise ValueError(f"The compressed pad id must lie in [0, {config.engram_id_space}), got {pad_id}.")
        made = cls(config)
        made._given_pad_id = pad_id
        return made

    def _draw_constants(self) -> None:
        """Make the constants from the config; the multipliers are zeros while the number of compressed ids is unknown.

        They stay on the device on which the hash was.
        """
        size = self.config.engram_id_space
        unknown = {layer_id: [0] * self.max_ngram_size for layer_id in self.layer_ids}
        self._multipliers = unknown if size is None else draw_multipliers(self.config, size)
        constants = stack_constants(list(self._multipliers.values()), list(self._primes.values()))
        self._constants = tuple(constant.to(self.device) for constant in constants)

    @property
    def device(self) -> torch.device:
        """Where the constants are."""
        constants = self.__dict__.get("_constants")
        return torch.device("cpu") if constants is None else constants[0].device

    @property
    def compressed_vocab_size(self) -> int | None:
        """Number of different ids that the hash can meet; None before a tokenizer is bound."""
        return self.config.engram_id_space

    @property
    def pad_id(self) -> int:
        """The compressed id that stands for everything before the start of a document."""
        raw = self.config.engram_pad_token_id
        if self._bound_map is not None:
            return int(self._bound_map[raw])
        return raw if self._given_pad_id is None else self._given_pad_id

    def multipliers(self, layer_id: int) -> list[int]:
        """The N odd multipliers of a layer, for shifts 0 to N - 1."""
        return list(self._multipliers[self._known(layer_id)])

    def primes(self, layer_id: int) -> list[list[int]]:
        """Rows of each head of a layer: one list per order (2 first), one prime per head."""
        return [list(heads) for heads in self._primes[self._known(layer_id)]]

    def num_rows(self, layer_id: int) -> int:
        """Rows of all heads of a layer together."""
        return sum(sum(heads) for heads in self._primes[self._known(layer_id)])

    def num_table_rows(self, layer_id: int) -> int:
        """Rows of the layer's table: those of its heads, and those that its family puts behind them."""
        rows_of_head = [rows for heads in self._primes[self._known(layer_id)] for rows in heads]
        return sum(rows_of_head) + rows_behind_heads(family_of(self.config), rows_of_head)

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        seen: Seen | None = None,
    ) -> HashedTokens:
        """Row ids of all memory layers, and what the layers need to know of the tokens.

        Args:
            token_ids: (batch, seq) raw ids; a negative id carries no memory.
            position_ids: (batch or 1, seq) position of each token in its document; 0, 1, ... by default.
            token_mask: (batch, seq), 0 for padding.
            history: (batch, kept) what a cache keeps of the tokens before these, from `pack_history`.
            seen: which tokens before it a mask lets each token see; None for all.

        Raises:
            ValueError: no tokenizer is bound yet, or an id is not in the vocabulary.
        """
        if not self.is_confirmed:
            raise ValueError(
                "The memory's token map is not bound, so no row can be found. Call model.bind_tokenizer(tokenizer) on "
                "a new model. A trained model brings its map: load it with from_pretrained."
            )
        # Products of ids and multipliers need 64 bits, and a data set may hold 32.
        token_ids = ids = token_ids.long()
        vocab_size = self.config.vocab_size
        if ids.device.type == "cpu" and not is_tracing(ids) and bool((ids >= vocab_size).any()):
            raise ValueError(f"Token ids must be below vocab_size ({vocab_size}), got {int(ids.max())}.")
        pad_id: int | torch.Tensor = self.config.engram_pad_token_id
        if self._bound_map is not None:
            token_map = self._bound_map.to(ids.device)
            ids = torch.where(token_ids >= 0, token_map[token_ids.clamp_min(0)], NO_MEMORY)
            pad_id = token_map[pad_id]
        elif vocab_size > self.config.engram_id_space:
            # The vocabulary has grown since the tables were made.
            ids = torch.where(token_ids < self.config.engram_id_space, token_ids, pad_id)
        if token_mask is not None:
            ids = torch.where(token_mask.to(ids.device) > 0, ids, NO_MEMORY)
        read, run_before = ids, None
        if history is not None:
            past_ids, run_before = unpack_history(history.to(ids.device))
            read = torch.cat([past_ids[:, 1 - self.max_ngram_size :], ids], dim=1)
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
            if run_before is not None:
                position_ids = position_ids + run_before.unsqueeze(1)
        before = None
        if seen is None:
            reach = token_reach(ids, document_positions(position_ids.to(ids.device)), run_before)
        elif seen.before is None:
            # The mask alone decides, so that positions may jump.
            reach = token_reach(ids, seen.reach.to(ids.device), run_before)
        else:
            before = seen.before.to(ids.device)
            reach = reach_along(ids, seen.reach.to(ids.device), before, run_before)
        ngrams = self._find_ngrams(read, reach, pad_id, before)
        rows = hash_layers(ngrams, *(constant.to(ids.device) for constant in self._constants))
        return HashedTokens(ids, reach, ngrams, dict(zip(self.layer_ids, rows.unbind(), strict=True)), before)

    def row_ids(
        self, layer_id: int, compressed_ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Row ids of ids that are compressed already, for one layer.

        Args:
            layer_id: a memory layer.
            compressed_ids: (batch, history + seq) int64; a negative id carries no memory, and a token looks neither
                at it nor past it.
            positions: (batch or 1, seq) position of each token in its own document, which may restart inside a row.
                Where it is shorter than `compressed_ids`, the ids in front are history: seen, but given no rows.
                By default each row of the batch is one document without history.

        Returns:
            (batch, seq, heads) int64, heads order by order, each in [0, prime of its head).

        Raises:
            ValueError: an unknown layer, or an id that no compressed vocabulary of this size contains.
        """
        place = self.layer_ids.index(self._known(layer_id))
        size = self.config.engram_id_space
        if compressed_ids.numel() and int(compressed_ids.max()) >= size:
            raise ValueError(
                f"Compressed ids must be below {size}, got {int(compressed_ids.max())}. "
                "Map raw token ids through the token map first."
            )
        compressed_ids = compressed_ids.long()
        if positions is None:
            positions = torch.arange(compressed_ids.shape[1], device=compressed_ids.device).unsqueeze(0)
        reach = token_reach(compressed_ids, positions)
        ngrams = self._find_ngrams(compressed_ids, reach, self.pad_id)
        multipliers, primes = (constant[place : place + 1].to(ngrams.device) for constant in self._constants)
        return hash_layers(ngrams, multipliers, primes)[0]

    def _find_ngrams(
        self,
        ids: torch.Tensor,
        reach: torch.Tensor,
        pad_id: int | torch.Tensor,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, N, seq), as `find_ngrams`, and as the family wants them."""
        ngrams = find_ngrams(ids, reach, self.max_ngram_size, pad_id, before)
        return end_ngrams(ngrams, pad_id) if FAMILIES[family_of(self.config)].ends_at_pad else ngrams

    # Binding: which tokenizer and which hash the tables belong to.

    def bind(self, tokenizer) -> None:
        """Write the tokenizer's compression into `token_map`, and what follows from it into the config.

        Tokens that were added to a tokenizer after it was bound stay padding for the memory.

        Args:
            tokenizer: a fast tokenizer with at most `config.vocab_size` ids.

        Raises:
            ValueError: the model has no use for a map, another tokenizer is bound already, or the tokenizer does not
                fit the config.
        """
        config = self.config
        if self.token_map is None:
            raise ValueError(
                "This model hashes raw token ids (no compression), so there is no tokenizer to bind; use it as it is."
            )
        full_map, identity = map_tokens(tokenizer, config)
        size = int(full_map.max()) + 1
        fingerprint = self._fingerprint(full_map, identity, size)
        if config.engram_fingerprint is not None:
            where = "this tokenizer (another one is bound)" if self._bound_map is not None else "this tokenizer"
            check_fingerprint(config.engram_fingerprint, fingerprint, where)
        if config.engram_compressed_vocab_size not in ("auto", size):
            raise ValueError(
                f"The tokenizer compresses to {size} ids, the config's engram_compressed_vocab_size is "
                f"{config.engram_compressed_vocab_size}. Bind the tokenizer that the model was made for."
            )
        config.engram_compressed_vocab_size = size
        self._take(full_map, {**(config.engram_fingerprint or {}), **fingerprint})

    def resize(self, vocab_size: int) -> None:
        """Follow a change of `vocab_size`. New ids count as padding, and all others keep their rows."""
        if self.token_map is None or len(self.token_map) == vocab_size:
            return
        source = self.token_map if self._bound_map is None else self._bound_map
        fill = NO_MEMORY if self._bound_map is None else int(source[self.config.engram_pad_token_id])
        resized = torch.full((vocab_size,), fill, dtype=torch.int64, device=self.token_map.device)
        resized[: min(len(source), vocab_size)] = source[:vocab_size]
        self.token_map = torch.empty_like(resized)
        if self._bound_map is None:
            self.token_map.copy_(resized)
        else:
            self._take(resized, {**self.config.engram_fingerprint, **self._fingerprint(resized)})

    def confirm(self, where: str) -> None:
        """Compare token map and constants with the config's fingerprint, or write it where it is known only now.

        Args:
            where: what was loaded, for the message.

        Raises:
            ValueError: the fingerprints differ. Nothing can be looked up until a right map is loaded.
        """
        config = self.config
        self.is_confirmed = False
        if self.token_map is None:
            fingerprint = self._fingerprint(None)
            if config.engram_fingerprint is not None:
                check_fingerprint(config.engram_fingerprint, fingerprint, where)
            return self._take(None, {**(config.engram_fingerprint or {}), **fingerprint})
        if self.token_map.is_meta:
            return
        is_bound = bool((self.token_map >= 0).any())
        if config.engram_compressed_vocab_size == "auto" or not is_bound:
            if config.engram_fingerprint is not None or is_bound:
                raise ValueError(
                    f"{where}: config and token map do not belong together: the config says "
                    f"engram_compressed_vocab_size={config.engram_compressed_vocab_size!r} and "
                    f"engram_fingerprint={config.engram_fingerprint}, and the token map of the checkpoint is "
                    f"{'bound' if is_bound else 'not bound'}. Load both from one checkpoint."
                )
            return
        out_of_range = (self.token_map < 0) | (self.token_map >= config.engram_compressed_vocab_size)
        if out_of_range.any():
            raise ValueError(
                f"The token map of {where} (ngram_hash.token_map) holds {int(self.token_map[out_of_range][0])}, and "
                f"its ids must lie in [0, {config.engram_compressed_vocab_size}). The file is damaged; download it "
                "again."
            )
        fingerprint = self._fingerprint(self.token_map)
        check_fingerprint(config.engram_fingerprint, fingerprint, where)
        self._take(self.token_map, {**config.engram_fingerprint, **fingerprint})

    def fingerprint(self, token_map: torch.Tensor | None = None) -> dict[str, str]:
        """What the rows of a table depend on, one short digest per part, so that a difference can be named.

        Args:
            token_map: (vocab_size,) int64; by default the bound one, None for a model without compression.
        """
        return self._fingerprint(self._bound_map if token_map is None else token_map)

    def _fingerprint(
        self, token_map: torch.Tensor | None, identity: dict[str, str] | None = None, size: int | None = None
    ) -> dict[str, str]:
        config, multipliers = self.config, self._multipliers
        if size is not None:
            multipliers = draw_multipliers(config, size)
        pad_id = config.engram_pad_token_id if token_map is None else int(token_map[config.engram_pad_token_id])
        return {
            "map": "none" if token_map is None else digest(token_map.cpu().to(torch.int64).numpy().tobytes()),
            "multipliers": digest(str([multipliers[layer_id] for layer_id in self.layer_ids]).encode()),
            "primes": digest(str([self._primes[layer_id] for layer_id in self.layer_ids]).encode()),
            "ids": str(config.engram_id_space if size is None else size),
            "orders": f"2-{self.max_ngram_size}",
            "pad": str(pad_id),
            # Fingerprints without a name are older than the second family.
            **({} if family_of(config) == "engram" else {"hash": family_of(config)}),
            **(identity or {}),
        }

    @torch.no_grad()
    def _take(self, token_map: torch.Tensor | None, fingerprint: dict[str, str]) -> None:
        """Look rows up by this map from now on."""
        self.config.engram_fingerprint = fingerprint
        if token_map is not None and self.token_map is not None:
            self.token_map.copy_(token_map)
            self._bound_map = self.token_map.clone()
        self._draw_constants()
        self.is_confirmed = True

    def _apply(self, fn, recurse=True):
        """Move the constants with the module; never convert them."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.device)).device
        if device.type != "meta":
            self._constants = tuple(constant.to(device) for constant in self._constants)
            self._bound_map = None if self._bound_map is None else self._bound_map.to(device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._bound_map is not None:
            destination[f"{prefix}token_map"] = self._bound_map

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}token_map" in state_dict:
            self.confirm("the loaded state dict")

    def _known(self, layer_id: int) -> int:
        if layer_id not in self._multipliers:
            raise ValueError(f"Layer {layer_id} has no memory; memory layers (zero-based) are {self.layer_ids}.")
        return layer_id

    def extra_repr(self) -> str:
        ids, family = self.config.engram_id_space, family_of(self.config)
        return f"{family}, layers={self.layer_ids}, orders=2-{self.max_ngram_size}, ids={ids}"


def map_tokens(tokenizer, config) -> tuple[torch.Tensor, dict[str, str]]:
    """The compression of a tokenizer for a model, and what tells this tokenizer from others.

    Args:
        tokenizer: a fast tokenizer.
        config: of the model. Where its fingerprint says how many tokens were known when a tokenizer was bound, tokens
            that were added since count as padding.

    Returns:
        (vocab_size,) int64 with the compressed pad for ids that the tokenizer does not have, and the parts of a
        fingerprint that describe the tokenizer.

    Raises:
        ValueError: the tokenizer has more ids than the config, or none for padding, or lacks tokens that were bound.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids, the model's vocab_size is {config.vocab_size}. "
            "Build the model with vocab_size of at least len(tokenizer), or call resize_token_embeddings."
        )
    token_map = build_token_map(tokenizer)
    known = int((config.engram_fingerprint or {}).get("tokens", len(token_map)))
    if known > len(token_map):
        raise ValueError(
            f"The tokenizer has {len(token_map)} ids, and the one that the memory was bound to has {known}. Use the "
            "tokenizer of the checkpoint."
        )
    if config.engram_pad_token_id >= known:
        raise ValueError(
            f"engram_pad_token_id is {config.engram_pad_token_id}, the tokenizer's ids end at {known - 1}."
        )
    full_map = torch.full((config.vocab_size,), int(token_map[config.engram_pad_token_id]), dtype=torch.int64)
    full_map[:known] = token_map[:known]
    tokens = tokenizer.convert_ids_to_tokens(list(range(known)))
    backend = tokenizer.backend_tokenizer
    sample = range(0, known, max(1, known // SAMPLED_TOKENS))
    texts = [PROBE_TEXT, *backend.decode_batch([[i] for i in sample], skip_special_tokens=False)]
    identity = {
        "tokens": str(known),
        "vocabulary": digest(json.dumps(tokens).encode()),
        "text": digest(str([encode_without_added_tokens(backend, text) for text in texts]).encode()),
    }
    return full_map, identity


def encode_without_added_tokens(backend: Tokenizer, text: str) -> list[int]:
    """The ids of a text, whatever tokens were added and whatever padding or truncation the last call has set."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [text] if backend.pre_tokenizer is None else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)]


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def differing_parts(declared: dict[str, Any] | None, actual: dict[str, str]) -> list[str]:
    """The parts in which two fingerprints differ.

    The parts that describe a tokenizer are compared where both fingerprints have them: older checkpoints do not, and a
    token map alone does not either.
    """
    known = declared if isinstance(declared, dict) else {}
    return sorted(
        name
        for name in {*actual, *known}
        if known.get(name) != actual.get(name)
        and not (name in TOKENIZER_PARTS and (name not in known or name not in actual))
    )


def check_fingerprint(declared: dict[str, Any] | None, actual: dict[str, str], where: str) -> None:
    """Raise unless the fingerprint that a config declares is the one that a map, a tokenizer and the constants have.

    Raises:
        ValueError: names both fingerprints and the parts that differ, as `differing_parts` finds them.
    """
    differing = differing_parts(declared, actual)
    if not differing:
        return
    raise ValueError(
        f"The hash of {where} is not the one its tables were made with; it differs in: {', '.join(differing)}. "
        f"Config declares engram_fingerprint={declared}, the token map and the hash constants give {actual}. "
        "Load the checkpoint with its own config and tokenizer, or start a new model without engram_fingerprint."
    )

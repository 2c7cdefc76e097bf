"""Token ids to row ids: token compression, multipliers, primes and the hash itself. Integers only.

Every constant here is a contract: published tables are addressed by it, so a change makes them unreadable.
This file knows nothing of tables or models. Source: arXiv 2601.07372, section 2.2, and DeepSeek's demo of it.

The hash of one n-gram that ends at position t, for one head:

    (x[t] * m[0]  XOR  x[t-1] * m[1]  XOR ... XOR  x[t-n+1] * m[n-1])  mod  prime of the head

where x are compressed ids (the compressed pad before the start of a document) and m the multipliers of the layer.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sympy import nextprime
from tokenizers import Regex, normalizers

from .ids_reach import NO_MEMORY, token_reach


LAYER_SEED_STEP = 10007
REPLACEMENT_CHARACTER = "\ufffd"
# Stands for "one space" while Strip runs; a private-use character that no vocabulary contains.
SPACE_SENTINEL = "\ue000"


def build_token_map(tokenizer) -> torch.Tensor:
    """Compressed id of every token id: tokens that differ only in case, accents, width or white space share one.

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
    ids: torch.Tensor, reach: torch.Tensor, max_ngram_size: int, pad_id: int | torch.Tensor
) -> torch.Tensor:
    """The ids of the longest n-gram that ends at each token, pads where a token may not look.

    Args:
        ids: (batch, history + seq) compressed ids, negative for "no memory".
        reach: (batch, seq) as `token_reach` gives it.
        max_ngram_size: the largest order N.
        pad_id: the compressed pad.

    Returns:
        (batch, N, seq), the oldest id first, the token itself last; all in [0, compressed vocabulary size).
    """
    seq = reach.shape[1]
    missing = max(0, seq + max_ngram_size - 1 - ids.shape[1])
    padded = F.pad(ids, (missing, 0), value=NO_MEMORY) if missing else ids
    shifted = padded[:, 1 - max_ngram_size - seq :].unfold(1, max_ngram_size, 1).transpose(1, 2)  # (batch, N, seq)
    shifts = torch.arange(max_ngram_size - 1, -1, -1, device=ids.device).unsqueeze(1)
    return torch.where(reach.unsqueeze(1) >= shifts, shifted, pad_id)


def hash_layers(ngrams: torch.Tensor, multipliers: torch.Tensor, primes: torch.Tensor) -> Sequence[torch.Tensor]:
    """Row ids of all heads of several layers, over the same tokens.

    Args:
        ngrams: (batch, N, seq), from `find_ngrams`.
        multipliers: (layers, 1, N, 1) int64, as `stack_constants` gives them.
        primes: (layers, 1, 1, orders, heads per order) int64.

    Returns:
        for each layer (batch, seq, orders * heads per order) int64, each in [0, prime of its head), order by order.
    """
    products = (ngrams * multipliers).unbind(2)
    mixes = [products[-1] ^ products[-2]]
    for product in products[-3::-1]:
        mixes.append(mixes[-1] ^ product)
    # One remainder per head, in the place of the number that it is taken of.
    mixed = torch.stack(mixes, dim=-1).unsqueeze(-1).expand(*mixes[0].shape, *primes.shape[-2:])
    return mixed.contiguous().fmod_(primes).flatten(-2).unbind(0)


def stack_constants(
    multipliers: Sequence[Sequence[int]], primes: Sequence[Sequence[Sequence[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Constants of several layers as `hash_layers` takes them, the multiplier of the oldest id first."""
    of_shifts = torch.tensor(multipliers, dtype=torch.int64).flip(-1)
    return of_shifts[:, None, :, None], torch.tensor(primes, dtype=torch.int64)[:, None, None]


def layer_constants(config) -> tuple[torch.Tensor, torch.Tensor]:
    """What the hash of a config's memory layers needs: multipliers, zeros while the number of compressed ids is not
    known, and primes."""
    layer_ids, orders, ids = config.engram_layer_ids, config.engram_max_ngram_size, config.engram_id_space
    primes = find_primes(layer_ids, config.engram_vocab_sizes, config.engram_n_heads)
    if ids is None:
        multipliers = [[0] * orders] * len(layer_ids)
    else:
        multipliers = [draw_multipliers(layer_id, orders, ids, config.engram_seed) for layer_id in layer_ids]
    return stack_constants(multipliers, [primes[layer_id] for layer_id in layer_ids])


def draw_multipliers(layer_id: int, max_ngram_size: int, compressed_vocab_size: int, seed: int) -> list[int]:
    """The N odd multipliers of a layer, so small that no product of one and a compressed id overflows int64."""
    half_bound = max(1, (np.iinfo(np.int64).max // compressed_vocab_size) // 2)
    generator = np.random.default_rng(seed + LAYER_SEED_STEP * layer_id)
    return (generator.integers(0, half_bound, size=max_ngram_size, dtype=np.int64) * 2 + 1).tolist()


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


class NgramHash:
    """The hash of one model: multipliers and primes of each memory layer, and the row ids they give.

    Build it with `NgramHash.from_config`. All numbers follow from the config; nothing is drawn at run time.
    """

    def __init__(
        self,
        layer_ids: Sequence[int],
        vocab_sizes: Sequence[int],
        n_heads: int,
        compressed_vocab_size: int,
        pad_id: int,
        seed: int,
    ):
        """
        Args:
            layer_ids: zero-based ids of the memory layers.
            vocab_sizes: least number of rows of a head, for the orders 2, 3, ...
            n_heads: heads per order.
            compressed_vocab_size: number of different ids that may come in.
            pad_id: compressed pad id, in [0, compressed_vocab_size).
            seed: seed of the multipliers.
        """
        if not 0 <= pad_id < compressed_vocab_size:
            raise ValueError(f"The compressed pad id must lie in [0, {compressed_vocab_size}), got {pad_id}.")
        self.layer_ids = list(layer_ids)
        self.max_ngram_size = len(vocab_sizes) + 1
        self.compressed_vocab_size = compressed_vocab_size
        self.pad_id = pad_id
        self._multipliers = {
            layer_id: draw_multipliers(layer_id, self.max_ngram_size, compressed_vocab_size, seed)
            for layer_id in self.layer_ids
        }
        self._primes = find_primes(self.layer_ids, vocab_sizes, n_heads)

    @classmethod
    def from_config(cls, config, pad_id: int | None = None) -> "NgramHash":
        """The hash that a config declares.

        Args:
            config: an `EngramMoEConfig`, or any object with its `engram_*` fields.
            pad_id: the *compressed* pad id; by default `config.engram_pad_token_id` as it stands, which is right for
                ids that are compressed already and for models without compression.

        Raises:
            ValueError: `engram_compressed_vocab_size` is still "auto".
        """
        if config.engram_id_space is None:
            raise ValueError(
                'engram_compressed_vocab_size is "auto", so the multipliers are not known yet. '
                "Bind a tokenizer first: model.bind_tokenizer(tokenizer)."
            )
        return cls(
            layer_ids=config.engram_layer_ids,
            vocab_sizes=config.engram_vocab_sizes,
            n_heads=config.engram_n_heads,
            compressed_vocab_size=config.engram_id_space,
            pad_id=config.engram_pad_token_id if pad_id is None else pad_id,
            seed=config.engram_seed,
        )

    def multipliers(self, layer_id: int) -> list[int]:
        """The N odd multipliers of a layer, for shifts 0 to N - 1."""
        return list(self._multipliers[self._known(layer_id)])

    def primes(self, layer_id: int) -> list[list[int]]:
        """Rows of each head of a layer: one list per order (2 first), one prime per head."""
        return [list(heads) for heads in self._primes[self._known(layer_id)]]

    def num_rows(self, layer_id: int) -> int:
        """Rows of all heads of a layer together."""
        return sum(sum(heads) for heads in self._primes[self._known(layer_id)])

    def row_ids(
        self, layer_id: int, compressed_ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Row of every head for every token.

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
        self._known(layer_id)
        if compressed_ids.numel() and int(compressed_ids.max()) >= self.compressed_vocab_size:
            raise ValueError(
                f"Compressed ids must be below {self.compressed_vocab_size}, got {int(compressed_ids.max())}. "
                "Map raw token ids through the token map first."
            )
        # Products of ids and multipliers need 64 bits, also where a data set holds 32.
        compressed_ids, device = compressed_ids.long(), compressed_ids.device
        if positions is None:
            positions = torch.arange(compressed_ids.shape[1], device=device).unsqueeze(0)
        reach = token_reach(compressed_ids, positions)
        ngrams = find_ngrams(compressed_ids, reach, self.max_ngram_size, self.pad_id)
        multipliers, primes = stack_constants([self._multipliers[layer_id]], [self._primes[layer_id]])
        return hash_layers(ngrams, multipliers.to(device), primes.to(device))[0]

    def fingerprint(self, token_map: torch.Tensor | None) -> dict[str, str]:
        """What a table depends on, one short digest per part, so that a difference can be named.

        Args:
            token_map: (vocab_size,) int64, or None for a model without compression.
        """
        return {
            "map": "none" if token_map is None else digest(token_map.cpu().to(torch.int64).numpy().tobytes()),
            "multipliers": digest(str([self._multipliers[layer_id] for layer_id in self.layer_ids]).encode()),
            "primes": digest(str([self._primes[layer_id] for layer_id in self.layer_ids]).encode()),
            "ids": str(self.compressed_vocab_size),
            "orders": f"2-{self.max_ngram_size}",
            "pad": str(self.pad_id),
        }

    def _known(self, layer_id: int) -> int:
        if layer_id not in self._multipliers:
            raise ValueError(f"Layer {layer_id} has no memory; memory layers (zero-based) are {self.layer_ids}.")
        return layer_id


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def check_fingerprint(declared: dict[str, str] | None, actual: dict[str, str], where: str) -> None:
    """Raise unless the fingerprint that a config declares is the one that its map and constants have.

    Raises:
        ValueError: names both fingerprints and the parts that differ.
    """
    if declared == actual:
        return
    differing = sorted(name for name in {*actual, *(declared or {})} if (declared or {}).get(name) != actual.get(name))
    raise ValueError(
        f"The hash of {where} is not the one its tables were made with; it differs in: {', '.join(differing)}. "
        f"Config declares engram_fingerprint={declared}, the token map and the hash constants give {actual}. "
        "Load the checkpoint with its own config and tokenizer, or start a new model without engram_fingerprint."
    )

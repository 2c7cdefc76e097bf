"""The config of a memory that is added to somebody else's model, and the facts that it needs about that model.

The fields are the memory's half of `EngramMoEConfig` without the prefix `engram_`. Hash, memory layer and checks are
the same as there: they read both configs under the names of `EngramMoEConfig`, here through `MemoryOfModel`.
"""

import copy
import dataclasses
import difflib
import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator
from torch import nn

from ..modeling.configuration_checks import MAX_LAYERS, MAX_VOCAB_SIZE, SIZES, MemoryFields, check_range, shorten
from ..modeling.ids_hashing import find_primes, rows_behind_heads


PREFIX = "engram_"
# Names of starts to what they are; see `EngramConfig`.
STARTS = ("silent", "loud_rows", "random")


@dataclass
class EngramConfig:
    """A memory for any causal language model.

    Attributes:
        layer_ids: zero-based ids of the decoder layers with a memory.
        vocab_size: least rows of a hash head; one number for all orders, or one per order.
        n_heads: hash heads per order.
        head_dim: width of a row. A token reads `(max_ngram_size - 1) * n_heads * head_dim` numbers per layer.
        max_ngram_size: largest order N. A layer reads n-grams of the orders 2 to N.
        kernel_size: taps of the short convolution, dilated by N; 0 leaves it out.
        compressed_vocab_size: "auto" is written when a tokenizer is bound, an int must be met by that tokenizer, None
            hashes raw token ids and needs no tokenizer.
        pad_token_id: raw id that stands for everything before a document; by default the model's pad, then its eos.
        hash: "engram" is the hash of DeepSeek's models. "splitmix" is that of `qwen4_exp`: it hashes raw token ids, and
            n-grams begin anew after `pad_token_id`, by default the model's eos. Absent means "engram".
        seed: of the hash multipliers.
        table_dtype: type of the rows; None is torch's default type when the memory is added.
        block_elements: a table is stored in blocks of whole heads, of at most so many elements.
        rms_norm_eps: of the norms of the memory.
        start: "silent" begins with zero rows and a zero convolution: the model is unchanged, learns from the first step
            on, and rows that were never trained add nothing. "loud_rows" begins with random rows and a zero value
            projection, and is unchanged too. "random" begins as an EngramMoE does, with all but the convolution at
            random, which changes the logits.
        fingerprint: of the hash; written when the memory is added, and checked at every load.

    Raises:
        ValueError: a field cannot have this value.

    Example:
        >>> from engram_hf import EngramConfig
        >>> config = EngramConfig(layer_ids=[1], vocab_size=1000, n_heads=4, head_dim=16)
        >>> EngramConfig.from_dict(config.to_dict()) == config
        True
    """

    layer_ids: list[int]
    vocab_size: int | list[int]
    n_heads: int
    head_dim: int
    max_ngram_size: int = 3
    kernel_size: int = 4
    compressed_vocab_size: int | str | None = "auto"
    pad_token_id: int | None = None
    seed: int = 0
    table_dtype: str | None = None
    block_elements: int = 2**31
    rms_norm_eps: float = 1e-6
    start: str = "silent"
    fingerprint: dict | None = None
    hash: str = "engram"

    def __post_init__(self):
        for name in ("layer_ids", "vocab_size"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        if isinstance(self.rms_norm_eps, int):
            self.rms_norm_eps = float(self.rms_norm_eps)
        for name, kind in get_type_hints(type(self)).items():
            try:
                type_validator(name, getattr(self, name), kind)
            except TypeError as error:
                raise ValueError(f"{name} cannot be {shorten(getattr(self, name))} ({shorten(error, 200)}).") from error
        if not self.layer_ids:
            raise ValueError("layer_ids must name at least one layer, got none.")
        self.layer_ids = sorted(self.layer_ids)
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}; got {shorten(self.start)}.")
        if not 0 < self.rms_norm_eps <= 1:
            raise ValueError(f"rms_norm_eps must be above 0 and at most 1, got {self.rms_norm_eps}.")
        # As much as can be said without a model, which may have a pad.
        alone = copy.copy(self)
        alone.pad_token_id = self.pad_token_id or 0
        MemoryOfModel(alone, ModelFacts()).check()

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EngramConfig":
        """The config with these fields.

        Raises:
            ValueError: a key is no field, a field that has no default is missing, or a value cannot be.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in content:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1)
                raise ValueError(
                    f"{shorten(name)} is no field of EngramConfig." + (f" Did you mean {near[0]}?" if near else "")
                )
        missing = [n for n, field in fields.items() if field.default is dataclasses.MISSING and n not in content]
        if missing:
            raise ValueError(f"EngramConfig needs {', '.join(missing)}.")
        return cls(**json.loads(json.dumps(dict(content))))

    @classmethod
    def for_model(cls, model: nn.Module, table_parameters: int = 50_000_000, **fields: Any) -> "EngramConfig":
        """A config of good defaults: two layers, and a width that suits the model.

        Args:
            model: a causal language model.
            table_parameters: most numbers in all tables together.
            fields: that take another value.

        Raises:
            ValueError: so few numbers make no table, or a field cannot have this value.

        Example:
            >>> config = EngramConfig.for_model(model, table_parameters=100_000, compressed_vocab_size=None)
            >>> config.layer_ids, config.n_heads, config.vocab_size
            ([1, 2], 8, 283)
        """
        text = text_config(model)
        layers = text.num_hidden_layers
        # The second layer, and the one in the middle.
        fields.setdefault("layer_ids", sorted({min(1, layers - 1), layers // 2}))
        heads, orders = fields.setdefault("n_heads", 8), fields.get("max_ngram_size", 3) - 1
        if "head_dim" not in fields:
            # A token reads about half as many numbers as the model is wide.
            fields["head_dim"] = max(8, round(text.hidden_size / (2 * orders * heads) / 8) * 8)
        if "vocab_size" not in fields:
            # A field that cannot be is named before anything is computed from it.
            family = cls(**{**fields, "vocab_size": 2}).hash
            layer_ids, head_dim = fields["layer_ids"], fields["head_dim"]
            most = table_parameters // (len(layer_ids) * orders * heads * head_dim)

            def numbers(rows: int) -> int:
                """In all tables with at least so many rows in a head."""
                primes = find_primes(layer_ids, [rows] * orders, heads).values()
                of_heads = [[prime for order in orders_of_layer for prime in order] for orders_of_layer in primes]
                return head_dim * sum(sum(each) + rows_behind_heads(family, each) for each in of_heads)

            fields["vocab_size"] = bisect_right(range(most + 1), table_parameters, lo=min(2, most), key=numbers) - 1
            if fields["vocab_size"] < 2:
                raise ValueError(
                    f"table_parameters={table_parameters} is too small for {len(layer_ids) * orders * heads} hash "
                    f"heads of {head_dim} numbers a row. Give more, or fewer layer_ids, n_heads or head_dim."
                )
        return cls(**fields)


@dataclass
class ModelFacts:
    """What a memory knows of the model it is in. A saved memory brings it, so that another model is refused.

    hidden_size, streams: (batch, seq, streams, hidden) is what a layer changes; one stream in most models.
    num_hidden_layers: decoder layers.
    vocab_size: token ids that the model's embedding has.
    decoder, layers: names of the decoder inside the model, and of its list of layers inside the decoder.
    passes_kwargs: whether the decoder hands keyword arguments that it does not know to its layers.
    passes_ids: whether a model around the decoder, which sees more than text, hands `engram_input_ids` to it.
    num_cache_layers: cache layers that the model itself needs.
    base_model: the name that the model was loaded by; "" if it is not known.
    """

    hidden_size: int = 1
    streams: int = 1
    num_hidden_layers: int = MAX_LAYERS
    vocab_size: int = MAX_VOCAB_SIZE
    decoder: str = ""
    layers: str = "layers"
    passes_kwargs: bool = True
    passes_ids: bool = False
    num_cache_layers: int = 0
    base_model: str = ""


class MemoryOfModel(MemoryFields):
    """A view: the fields of a memory and of its model, under the names that they have in `EngramMoEConfig`."""

    def __init__(self, memory: EngramConfig, facts: ModelFacts):
        """
        Args:
            memory: read and written through this view, as `engram_*`.
            facts: of the model.
        """
        self.memory, self.facts = memory, facts
        self.num_hidden_layers = facts.num_hidden_layers
        self.hidden_size, self.hc_mult = facts.hidden_size, facts.streams
        self.rms_norm_eps = memory.rms_norm_eps

    # It changes where the embedding is resized.
    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.facts.vocab_size = value

    def __getattr__(self, name: str):
        if not name.startswith(PREFIX):
            raise AttributeError(name)
        return getattr(self.memory, name.removeprefix(PREFIX))

    def __setattr__(self, name: str, value: Any):
        if name.startswith(PREFIX):
            setattr(self.memory, name.removeprefix(PREFIX), value)
        else:
            super().__setattr__(name, value)

    def check(self) -> None:
        """See that the memory fits the model.

        Raises:
            ValueError: names the field.
        """
        try:
            check_range(self, [name for name in SIZES if name.startswith(PREFIX)])
            self.validate_engram()
        except ValueError as error:
            raise ValueError(str(error).replace(PREFIX, "")) from error


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder of a model."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]

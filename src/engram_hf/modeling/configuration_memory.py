# Copyright 2026 The engram-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The memory's half of a config: what follows from its fields, and what they may be.

`EngramMoEConfig` has these fields itself. A memory that is added to another model reads them through a view of its own
config (adapters/memory_config.py).
"""

from typing import Any

from .configuration_checks import MAX_HEADS, MAX_ROWS, MAX_VOCAB_SIZE, shorten


HASHES = ("engram", "splitmix")
TABLE_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int8", "int4")


def usual_pad(pad_token_id: int | None, eos_token_id: int | list[int] | None, hash_family: str = "engram") -> int:
    """The raw id that stands for everything before the start of a document, where a config does not name it.

    Raises:
        ValueError: the hash needs a token that ends documents, and there is none.
    """
    eos = eos_token_id[:1] if isinstance(eos_token_id, list) else [eos_token_id]
    if hash_family != "splitmix":
        return next((i for i in [pad_token_id, *eos] if i is not None and i >= 0), 0)
    found = next((i for i in eos if i is not None and i >= 0), None)
    if found is None:
        raise ValueError(
            'The hash "splitmix" begins n-grams anew after the token that ends a document, and eos_token_id is '
            f"{eos_token_id}. Set it, or name the token as engram_pad_token_id."
        )
    return found


class MemoryFields:
    """Part of a config with the fields `engram_*`, `vocab_size` and `num_hidden_layers`."""

    vocab_size: Any
    num_hidden_layers: Any
    engram_layer_ids: Any
    engram_max_ngram_size: Any
    engram_vocab_size: Any
    engram_n_heads: Any
    engram_head_dim: Any
    engram_pad_token_id: Any
    engram_compressed_vocab_size: Any
    engram_hash: Any
    engram_kernel_size: Any
    engram_table_dtype: Any
    engram_fingerprint: Any

    @property
    def engram_vocab_sizes(self) -> list[int]:
        """Least number of rows of a head, for the orders 2, 3, ... N."""
        if isinstance(self.engram_vocab_size, int):
            return [self.engram_vocab_size] * (self.engram_max_ngram_size - 1)
        return list(self.engram_vocab_size)

    @property
    def engram_id_space(self) -> int | None:
        """Number of different ids that the hash may meet; None while a tokenizer must still be bound.

        Without compression these are the raw ids that the tables were made for, whatever `vocab_size` has become.
        """
        if self.engram_compressed_vocab_size is None:
            return int(self.engram_fingerprint["ids"]) if self.engram_fingerprint else self.vocab_size
        return self.engram_compressed_vocab_size if isinstance(self.engram_compressed_vocab_size, int) else None

    @property
    def engram_width(self) -> int:
        """Numbers that one token reads in one memory layer."""
        return (self.engram_max_ngram_size - 1) * self.engram_n_heads * self.engram_head_dim

    @property
    def engram_conv_reach(self) -> int:
        """Tokens before the current one that the short convolution sees; its dilation is the largest order."""
        return max(self.engram_kernel_size - 1, 0) * self.engram_max_ngram_size

    def validate_engram(self):
        """Part of `@strict` validation: what the memory's fields may be."""
        self._validate_memory_layers()
        self._validate_rows()
        self._validate_hash()
        size = self.engram_compressed_vocab_size
        if isinstance(size, str) and size != "auto" or isinstance(size, int) and not 0 < size <= self.vocab_size:
            raise ValueError(
                f'engram_compressed_vocab_size must be "auto", None or an int in [1, {self.vocab_size}] '
                f"(vocab_size), got {shorten(size)}."
            )
        if not 0 <= self.engram_pad_token_id < self.vocab_size:
            raise ValueError(
                f"engram_pad_token_id must be a raw token id in [0, {self.vocab_size}), got "
                f"{shorten(self.engram_pad_token_id)}."
            )
        if self.engram_fingerprint is not None:
            ids = self.engram_fingerprint.get("ids")
            if not all(isinstance(part, str) for item in self.engram_fingerprint.items() for part in item):
                raise ValueError(f"engram_fingerprint must hold strings only, got {shorten(self.engram_fingerprint)}.")
            if ids is None or not (ids.isascii() and ids.isdigit()) or not 0 < int(ids[:20]) <= MAX_VOCAB_SIZE:
                raise ValueError(
                    f"ids in engram_fingerprint must be a number in [1, {MAX_VOCAB_SIZE}], got {shorten(ids)}."
                )

    def _validate_memory_layers(self):
        layer_ids = self.engram_layer_ids or []
        if any(not 0 <= i < self.num_hidden_layers for i in layer_ids) or len(set(layer_ids)) != len(layer_ids):
            raise ValueError(
                f"engram_layer_ids must be different zero-based layer ids in [0, {self.num_hidden_layers}), "
                f"got {shorten(layer_ids)}."
            )
        heads = len(layer_ids) * (self.engram_max_ngram_size - 1) * self.engram_n_heads
        if heads > MAX_HEADS:
            raise ValueError(
                f"engram_layer_ids, engram_max_ngram_size and engram_n_heads make {heads} hash heads, and at most "
                f"{MAX_HEADS} are allowed. Take fewer heads, and make engram_head_dim or engram_vocab_size larger."
            )

    def _validate_rows(self):
        orders, sizes = self.engram_max_ngram_size - 1, self.engram_vocab_sizes
        if len(sizes) != orders or any(not 2 <= n <= MAX_ROWS for n in sizes):
            raise ValueError(
                f"engram_vocab_size must be one number, or one for each of the {orders} orders 2 to "
                f"{self.engram_max_ngram_size}, each in [2, {MAX_ROWS}]; got {shorten(self.engram_vocab_size)}."
            )
        if self.engram_table_dtype is not None and self.engram_table_dtype not in TABLE_DTYPES:
            raise ValueError(
                f"engram_table_dtype must be None or one of {', '.join(TABLE_DTYPES)}; got "
                f"{shorten(self.engram_table_dtype)}."
            )

    def _validate_hash(self):
        family = self.engram_hash
        if isinstance(family, str) and "longcat" in family.lower():
            raise ValueError(
                f"engram_hash cannot be {shorten(family)}: LongCat adds up ids that are multiplied by powers of the "
                'vocabulary size, which is another formula than that of "engram" and "splitmix". Its tables cannot be '
                "read."
            )
        if family not in HASHES:
            raise ValueError(f"engram_hash must be one of {', '.join(HASHES)}; got {shorten(family)}.")
        if family == "splitmix" and self.engram_compressed_vocab_size is not None:
            raise ValueError(
                'engram_hash="splitmix" hashes raw token ids, so engram_compressed_vocab_size must be None, got '
                f"{shorten(self.engram_compressed_vocab_size)}."
            )

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
"""What a config may say, checked before anything is built from it; of the memory's fields also what follows from them.

`EngramMoEConfig` has these fields itself. A memory that is added to another model reads them through a view of its own
config (adapters/memory_config.py). Nothing here changes a config.
"""

import dataclasses
import difflib
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.quantization_config import QuantizationConfigMixin


HASHES = ("engram", "splitmix")
TABLE_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int8", "int4")
# Sizes are bounded before anything is allocated, looped over or searched for. The bounds are far above every model that
# exists, and so low that a config within them costs a second and some hundred megabytes before any weight is read.
# Rows of a head: addresses stay within 64 bits at any width.
MAX_ROWS = 2**40
# Widths of all kinds: the number of elements of a weight stays within 64 bits.
MAX_WIDTH = 2**20
# The token map is an array of this length.
MAX_VOCAB_SIZE = 2**24
# Every layer is a module.
MAX_LAYERS = 1024
MAX_EXPERTS = 2**16
# Names of classes, which transformers makes one by one.
MAX_LABELS = 2**16
# Each token looked back at has a hash multiplier or a tap of the convolution.
MAX_REACH = 256
# Hash heads over all layers and orders. Each takes a prime, which has to be found.
MAX_HEADS = 2**14
# Field to its least and its largest value.
SIZES = {
    "vocab_size": (1, MAX_VOCAB_SIZE),
    "hidden_size": (1, MAX_WIDTH),
    "intermediate_size": (1, MAX_WIDTH),
    "moe_intermediate_size": (1, MAX_WIDTH),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_mtp_layers": (0, MAX_LAYERS),
    "num_attention_heads": (1, MAX_WIDTH),
    "kv_lora_rank": (1, MAX_WIDTH),
    "qk_rope_head_dim": (2, MAX_WIDTH),
    "qk_nope_head_dim": (1, MAX_WIDTH),
    "v_head_dim": (1, MAX_WIDTH),
    "n_routed_experts": (1, MAX_EXPERTS),
    "n_shared_experts": (0, MAX_EXPERTS),
    "first_k_dense_replace": (0, MAX_LAYERS),
    "max_position_embeddings": (1, 2**40),
    "hc_mult": (1, 256),
    "hc_sinkhorn_iters": (1, 10_000),
    "engram_max_ngram_size": (2, MAX_REACH),
    "engram_n_heads": (1, MAX_HEADS),
    "engram_head_dim": (1, MAX_WIDTH),
    "engram_kernel_size": (0, MAX_REACH),
    "engram_block_elements": (1, 2**62),
    "engram_seed": (0, 2**62),
}
# JSON types of keys whose type transformers does not check.
KINDS: dict[str, tuple[type, ...]] = {
    "_attn_implementation": (str, dict),
    "_experts_implementation": (str, dict),
    "architectures": (list,),
    "attn_implementation": (str, dict),
    "auto_map": (dict,),
    "experts_implementation": (str, dict),
    "id2label": (dict,),
    "label2id": (dict,),
    "num_labels": (int,),
    "output_attentions": (bool,),
    "output_hidden_states": (bool,),
    "problem_type": (str,),
    "quantization_config": (dict, QuantizationConfigMixin),
    "return_dict": (bool,),
    "transformers_version": (str,),
}
# Keys of configs that hold others.
SUB_CONFIGS = {"decoder", "encoder", "generator", "per_layer_config", "text_config", "text_encoder"}
# Token ids and numbers that end in tensors.
MAX_TOKEN_ID = 2**31
MAX_NUMBER = 2**53
# What the classes of transformers raise for values of a kind that they do not expect.
UNEXPECTED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def check_source(name: str | os.PathLike, presets: Iterable[str], cache_dir: str | Path | None = None) -> None:
    """See that a name can be that of a model before anybody asks the Hub for it, which takes half a minute offline.

    Args:
        name: folder, file or repository.
        presets: names of configs without weights.
        cache_dir: of the Hub's files, where it is not the usual one.

    Raises:
        FileNotFoundError: it is none of these. A repository of an EngramMoE is always called user/model. A name of two
            parts is that of a missing folder where the first part is a folder here and the cache has no such
            repository.
    """
    name = os.fspath(name)
    if os.path.exists(name):
        return
    if name in presets:
        raise FileNotFoundError(
            f"{name} is a preset, which has no weights. EngramMoEConfig.preset({name!r}) is its config."
        )
    try:
        validate_repo_id(name)
        is_repository = "/" in name
    except HFValidationError:
        is_repository = False
    if not is_repository:
        raise FileNotFoundError(f"{name} is no folder, no repository (user/model) and no preset: {', '.join(presets)}.")
    parent = os.path.dirname(name)
    if os.path.isdir(parent) and try_to_load_from_cache(name, "config.json", cache_dir=cache_dir) is None:
        raise FileNotFoundError(
            f"{name} is no folder, though {parent} is one, and no repository in the cache. If you mean the repository "
            f"of the Hub, download it first: hf download {name}."
        )


def refuse_v41(model_type: Any, where: str | os.PathLike) -> None:
    """
    Raises:
        NotImplementedError: the model is a DeepSeek-V4.1.
    """
    if isinstance(model_type, str) and model_type.startswith("deepseek_v41"):
        raise NotImplementedError(
            f"{os.fspath(where)} is a DeepSeek-V4.1, a model that transformers has no class for. Only its tables can "
            "be read: engram_hf.open_tables(folder_or_repo)."
        )


def check_sizes(config) -> None:
    """See that no size of a config is so large that using it would take time or memory.

    Raises:
        ValueError: names the field.
    """
    check_range(config, SIZES)
    if config.q_lora_rank is not None and not 1 <= config.q_lora_rank <= MAX_WIDTH:
        raise ValueError(f"q_lora_rank must be None or lie in [1, {MAX_WIDTH}], got {shorten(config.q_lora_rank)}.")


def check_range(config, names: Iterable[str]) -> None:
    """See that some of the sizes of a config are within their bounds.

    Raises:
        ValueError: names the field.
    """
    for name in names:
        value, (least, most) = getattr(config, name), SIZES[name]
        if value is None or not least <= value <= most:
            raise ValueError(f"{name} must lie in [{least}, {most}], got {shorten(value)}.")


def check_rope(rope: Mapping[str, Any]) -> None:
    """See that rotary embeddings are of a kind that MLA can have.

    Args:
        rope: `rope_parameters` of a config.

    Raises:
        ValueError: names the parameter.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"rope_type in rope_parameters must be default, {', '.join(ROPE_INIT_FUNCTIONS)}; got {shorten(kind)}."
        )
    for name, value in rope.items():
        is_other = name in ("rope_type", "type", "truncate", "short_factor", "long_factor") or value is None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_other and not (is_number and 0 <= value <= MAX_NUMBER):
            raise ValueError(f"{name} in rope_parameters must be a number in [0, {MAX_NUMBER}], got {shorten(value)}.")
    if (rope.get("rope_theta") or 0) <= 1:
        raise ValueError(f"rope_theta in rope_parameters must be above 1, got {rope.get('rope_theta')}.")
    if (rope.get("factor", 1) or 0) < 1:
        raise ValueError(f"factor in rope_parameters must be at least 1, got {rope['factor']}.")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor in rope_parameters must be 1: qk_rope_head_dim says what is rotated.")
    is_scaled = rope.get("attention_factor") is not None or rope.get("mscale") and rope.get("mscale_all_dim")
    if kind == "yarn" and not is_scaled:
        raise ValueError(
            "rope_parameters of type yarn must have mscale and mscale_all_dim, as DeepSeek's models do. Without "
            "them YaRN's factor would scale the rotary part of the attention scores and not the rest. Set both to "
            "1.0, or set attention_factor to the factor of the rotary part."
        )


def with_own_names(content: Mapping[str, Any], config_class) -> dict[str, Any]:
    """The content of a config file with every field under its own name, so that its type is checked.

    Raises:
        ValueError: a field is given under two names with different values.
    """
    fields = {field.name for field in dataclasses.fields(config_class)}
    renamed = dict(content)
    for alias, target in config_class.attribute_map.items():
        field, other = (target, alias) if target in fields else (alias, target)
        if other in renamed:
            value = renamed.pop(other)
            if field in renamed and renamed[field] != value:
                raise ValueError(f"{other} is another name of {field}, and they have different values.")
            renamed[field] = value
    return renamed


def check_content(content: Mapping[str, Any], config_class) -> None:
    """See that the keys of a config file are those of a config, and that what transformers never looks at is of its
    type. Types of fields are checked when they are set.

    Raises:
        ValueError: names the key.
    """
    fields = [field.name for field in dataclasses.fields(config_class)]
    for name in content.keys() - set(fields):
        if name.startswith("engram_"):
            near = difflib.get_close_matches(name, [field for field in fields if field.startswith("engram_")], n=1)
            raise ValueError(f"{name} is no field." + (f" Did you mean {near[0]}?" if near else ""))
        of_class = inspect.getattr_static(config_class, name, None)
        is_settable = of_class is None or isinstance(of_class, property) and of_class.fset is not None
        if not is_settable and name != "model_type" and not name.startswith("base_model_"):
            raise ValueError(f"{name} is no field, but the name of an attribute that every config has.")
        if name in SUB_CONFIGS and content[name] is not None:
            raise ValueError(f"{name} is no field: this model has one config for all of it.")
    for name, kinds in KINDS.items():
        value = content.get(name)
        if value is not None and not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} must be of type {names}, got {shorten(value)}.")
    if not 0 <= (content.get("num_labels") or 0) <= MAX_LABELS:
        raise ValueError(f"num_labels must lie in [0, {MAX_LABELS}], got {shorten(content['num_labels'])}.")
    if not all(isinstance(name, str) for name in content.get("architectures") or []):
        raise ValueError(f"architectures must be names of classes, got {shorten(content['architectures'])}.")
    for name in ("dtype", "torch_dtype"):
        value = content.get(name)
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} must be a floating type such as bfloat16, got {shorten(value)}.")


def explain(error: Exception, content: Mapping[str, Any], config_class) -> str:
    """What is wrong with a config, from the error that transformers or a check of ours raised for it."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    text = shorten(cause, 400)
    if isinstance(cause, ValueError | TypeError) and any(
        name in text for name in {*content, *SIZES, "engram_layer_ids"}
    ):
        return text
    for name, value in content.items():
        try:
            config_class(**{other: content[other] for other in content if other != name})
        except UNEXPECTED:
            continue
        return f"{name} cannot be {shorten(value)} ({text})."
    return f"its fields do not go together ({text})."


def shorten(value: object, length: int = 80) -> str:
    """A value as it is written in Python, or the text of an error, for a message of one sentence."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


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

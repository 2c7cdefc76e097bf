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
"""The architecture of an EngramMoE model, strictly typed. Nothing of this machine: loading says where rows live.

The backbone's fields are those of `DeepseekV3Config` (MLA attention, experts), the residual streams are named as in
`DeepseekV4Config`, the memory's fields as DeepseekAI publishes them. Sizes of the paper's models: arXiv 2601.07372,
table 1.

A config file is checked once, before anything is built from it: `from_pretrained` and `from_dict` raise ValueError or
OSError with the file and the field, whatever is wrong.
"""

import dataclasses
import json
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from .configuration_checks import (
    MAX_NUMBER,
    MAX_TOKEN_ID,
    UNEXPECTED,
    MemoryFields,
    check_content,
    check_rope,
    check_sizes,
    check_source,
    explain,
    refuse_v41,
    shorten,
    usual_pad,
    with_own_names,
)


# Arguments of `from_pretrained` that begin like fields.
LOADING_ARGUMENTS = {"engram_ranks"}
# What `save_pretrained` writes beside the weights, so that the model loads where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_engram_moe.EngramMoEConfig",
    "AutoModel": "modeling_engram_moe.EngramMoEModel",
    "AutoModelForCausalLM": "modeling_engram_moe.EngramMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_engram_moe.EngramMoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_engram_moe.EngramMoEForTokenClassification",
    # What `transformers serve` asks for first; otherwise it looks for the class inside transformers.
    "AutoModelForDecision": "modeling_engram_moe.EngramMoEForCausalLM",
}
# By what `get_config_dict` tells `from_dict` where a config comes from, for its errors.
SOURCE = "_source"

# Equal in the paper's four models. The paper prints neither the MLA ranks nor the widths of the feed-forward layers;
# these fit every total and active count that it does print.
_PAPER_BACKBONE: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 2560,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "hc_mult": 4,
    "engram_layer_ids": [],
    "engram_max_ngram_size": 3,
    "engram_n_heads": 8,
    "engram_head_dim": 80,
    "engram_pad_token_id": 2,
}
# Models of our own in the shape of Engram-27B, by the recipe of `EngramMoEConfig.preset`.
_SMALL_BACKBONE: dict[str, Any] = {
    **_PAPER_BACKBONE,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    # Twenty iterations cost a quarter of the time of a small model, and few streams are balanced after five.
    "hc_sinkhorn_iters": 5,
    "engram_pad_token_id": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_SMALL_BACKBONE,
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "n_routed_experts": 32,
        "max_position_embeddings": 512,
        "hc_mult": 2,
        "engram_layer_ids": [1],
        "engram_vocab_size": 6700,
        "engram_n_heads": 4,
        "engram_head_dim": 16,
    },
    "100m": {
        **_SMALL_BACKBONE,
        "vocab_size": 32768,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 1536,
        "moe_intermediate_size": 256,
        "n_routed_experts": 18,
        "max_position_embeddings": 2048,
        "engram_layer_ids": [1, 4],
        "engram_vocab_size": 18_000,
        "engram_head_dim": 32,
    },
    "dense-4b": {**_PAPER_BACKBONE, "first_k_dense_replace": 30, "n_routed_experts": 72},
    "moe-27b": {**_PAPER_BACKBONE, "n_routed_experts": 72},
    "engram-27b": {
        **_PAPER_BACKBONE,
        "n_routed_experts": 55,
        "engram_layer_ids": [1, 14],
        "engram_vocab_size": 2_262_400,
    },
    "engram-40b": {
        **_PAPER_BACKBONE,
        "n_routed_experts": 55,
        "engram_layer_ids": [1, 14],
        "engram_vocab_size": 7_239_680,
    },
}


# Documented by hand: the fields inherited from DeepseekV3Config differ between releases.
# trf-ignore: TRF057
@strict
class EngramMoEConfig(MemoryFields, DeepseekV3Config):
    r"""
    Configuration of a mixture-of-experts language model with Engram memory. The defaults are those of the paper's
    Engram-27B; `EngramMoEConfig.preset(name)` gives all four of its models, and small ones.

    Every field of [`DeepseekV3Config`] is understood. Added to it:

    hc_mult (`int`, *optional*, defaults to 4):
        Number of residual streams (manifold-constrained hyper-connections). 1 is a plain residual stream.
    hc_sinkhorn_iters (`int`, *optional*, defaults to 20):
        Sinkhorn-Knopp iterations that keep the mixing of streams doubly stochastic.
    hc_eps (`float`, *optional*, defaults to 1e-06):
        Floor of that normalisation.
    output_router_logits (`bool`, *optional*, defaults to `False`):
        Whether the routers' logits are returned, and their load-balancing loss is computed and added.
    router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
        Weight of the load-balancing loss, which is added where `output_router_logits` is set.
    engram_layer_ids (`list[int]`, *optional*, defaults to `[1, 14]`):
        Zero-based ids of the layers with a memory. An empty list is the plain mixture of experts.
    engram_max_ngram_size (`int`, *optional*, defaults to 3):
        Largest order N: a memory layer reads n-grams of the orders 2 to N.
    engram_vocab_size (`int` or `list[int]`, *optional*, defaults to 2262400):
        Least number of rows per hash head; one number for all orders, or one per order. Each head takes the next
        prime that no other head of the model has.
    engram_n_heads (`int`, *optional*, defaults to 8):
        Hash heads per order.
    engram_head_dim (`int`, *optional*, defaults to 80):
        Width of a row. A token reads `(N - 1) * engram_n_heads * engram_head_dim` numbers per memory layer.
    engram_pad_token_id (`int`, *optional*):
        Raw token id that stands for everything before the start of a document. Defaults to `pad_token_id`, then to the
        (first) `eos_token_id`, then to 0.
    engram_compressed_vocab_size (`int` or `str`, *optional*, defaults to `"auto"`):
        Number of ids after token compression: `"auto"` is written by `model.bind_tokenizer(tokenizer)`, an `int` must
        be met exactly by the tokenizer that is bound, `None` hashes raw token ids.
    engram_hash (`str`, *optional*, defaults to `"engram"`):
        Which published tables the hash is that of. `"engram"` is that of DeepSeek's demo and of DeepSeek-V4.1.
        `"splitmix"` is that of `qwen4_exp`: it hashes raw token ids, so `engram_compressed_vocab_size` must be `None`;
        n-grams begin anew after `engram_pad_token_id`, which defaults to the (first) `eos_token_id`; and a table has as
        many rows as make a multiple of 128.
    engram_seed (`int`, *optional*, defaults to 0):
        Seed of the hash multipliers.
    engram_kernel_size (`int`, *optional*, defaults to 4):
        Taps of the short convolution, dilated by N. 0 leaves the convolution out.
    engram_table_dtype (`str`, *optional*):
        Type of the rows: a fact of the checkpoint that no `dtype=` and no `.to()` changes. `None` is the type that the
        model is built in; saving writes the actual one. "float8_e4m3fn", "int8" and "int4" are quantized rows, each
        with its scales; they are read as float32 and take no gradient.
    engram_block_elements (`int`, *optional*, defaults to 2147483648):
        A table is stored in blocks of whole heads: as many as fit into this number of elements, at least one.
    engram_fingerprint (`dict`, *optional*):
        Digests of token map, multipliers and primes, with the number of ids, the orders and the compressed pad. Written
        by the model as soon as all of it is known, checked at every load.
    engram_tables_repo (`str`, *optional*):
        Repository of the tables, where they do not lie beside the backbone. `push_engram` writes it.
    engram_tables_revision (`str`, *optional*):
        Commit of that repository.

    Example:

    ```python
    >>> from engram_hf import EngramMoEConfig

    >>> config = EngramMoEConfig.preset("engram-27b")
    >>> config.engram_layer_ids
    [1, 14]
    ```"""

    model_type = "engram_moe"
    # Under the name that most mixtures of experts have it, and TRL asks for.
    attribute_map = {**DeepseekV3Config.attribute_map, "num_experts": "n_routed_experts"}
    keys_to_ignore_at_inference = ["cache", "past_key_values", "aux_loss", "router_logits", "engram_gates"]

    vocab_size: int = 129280
    hidden_size: int = 2560
    intermediate_size: int = 12288
    moe_intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_shared_experts: int = 2
    n_routed_experts: int = 55
    num_experts_per_tok: int | None = 6
    n_group: int | None = 1
    topk_group: int | None = 1
    first_k_dense_replace: int | None = 1
    q_lora_rank: int | None = None
    tie_word_embeddings: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001
    # A whole number is written without a point in JSON.
    routed_scaling_factor: float | int = 2.5
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    num_mtp_layers: int = 0
    layer_types: list[str] | None = None

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float | int = 1e-6

    engram_layer_ids: list[int] | tuple[int, ...] | None = None
    engram_max_ngram_size: int = 3
    engram_vocab_size: int | list[int] | tuple[int, ...] = 2_262_400
    engram_n_heads: int = 8
    engram_head_dim: int = 80
    engram_pad_token_id: int | None = None
    engram_compressed_vocab_size: int | str | None = "auto"
    engram_hash: str = "engram"
    engram_seed: int = 0
    engram_kernel_size: int = 4
    engram_table_dtype: str | None = None
    engram_block_elements: int = 2**31
    engram_fingerprint: dict | None = None
    engram_tables_repo: str | None = None
    engram_tables_revision: str | None = None

    def __post_init__(self, **kwargs):
        # Before lists are made from them.
        self.validate_sizes()
        if self.engram_layer_ids is None:
            self.engram_layer_ids = [1, 14]
        self.engram_layer_ids = sorted(self.engram_layer_ids)
        if isinstance(self.engram_vocab_size, tuple):
            self.engram_vocab_size = list(self.engram_vocab_size)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        derived = {name: kwargs.pop(name, None) for name in ("head_dim", "qk_head_dim")}
        super().__post_init__(**kwargs)
        for name, value in derived.items():
            if value not in (None, getattr(self, name)):
                raise ValueError(
                    f"{name} follows from qk_rope_head_dim and qk_nope_head_dim, and is {getattr(self, name)}; got "
                    f"{shorten(value)}. Leave it out."
                )
        if self.engram_pad_token_id is None:
            self.engram_pad_token_id = usual_pad(self.pad_token_id, self.eos_token_id, self.engram_hash)
        # All layers are of one type; checkpoints before version 0.2 name memory layers "hybrid".
        self.layer_types = ["full_attention"] * self.num_hidden_layers

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As `PreTrainedConfig.get_config_dict`, which takes a folder without config.json for one with all defaults.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it has no config.json.
            NotImplementedError: it is that of a DeepSeek-V4.1, for which there is no class.
            ValueError: it is that of another kind of model.
        """
        check_source(pretrained_model_name_or_path, PRESETS, kwargs.get("cache_dir"))
        content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not content:
            raise FileNotFoundError(
                f"{pretrained_model_name_or_path} has no config.json, which says what its weights are of. Copy it from "
                "where they come from, or give it to the model's from_pretrained as config=."
            )
        refuse_v41(content.get("model_type"), pretrained_model_name_or_path)
        if content.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} is that of another model: model_type is "
                f"{shorten(content['model_type'])}, not {cls.model_type!r}. Load it with the Auto classes."
            )
        return content, {**kwargs, SOURCE: str(pretrained_model_name_or_path)}

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            content = super()._dict_from_json_file(json_file)
        except (json.JSONDecodeError, UnicodeDecodeError):
            # transformers names the file.
            raise
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{json_file} cannot be read ({error}). Copy or download it again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{json_file} must hold an object, got {shorten(content)}. Copy or download it again.")
        versions = content.get("configuration_files", [])
        if not isinstance(versions, list) or not all(isinstance(name, str) for name in versions):
            raise ValueError(f"configuration_files in {json_file} must be names of files, got {shorten(versions)}.")
        return content

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As `PreTrainedConfig.from_dict`; arguments that are fields take part in the check of the whole.

        Raises:
            ValueError: names the file, where the config comes from one, and the field.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"dtype"}
        content = {**config_dict, **{name: kwargs.pop(name) for name in own & kwargs.keys()}}
        # The Auto classes tell it in their own way.
        where = kwargs.pop(SOURCE, None) or kwargs.get("name_or_path")
        try:
            content = with_own_names(content, cls)
            given = kwargs.keys() - LOADING_ARGUMENTS
            unused = {name: kwargs[name] for name in given if name.startswith("engram_")}
            check_content({**content, **unused}, cls)
            found = super().from_dict(content, **kwargs)
            (found[0] if isinstance(found, tuple) else found).validate()
        except UNEXPECTED as error:
            reason = explain(error, content, cls)
            raise ValueError(f"config.json of {where}: {reason}" if where else reason) from error
        return found

    @classmethod
    def preset(cls, name: str, **overrides) -> "EngramMoEConfig":
        """A config of a known size: a small one, or one of the paper's models.

        | name | parameters | active | in tables | for |
        |---|---|---|---|---|
        | tiny | 4.3 million | 0.9 million | 0.9 million | the demo: trains in minutes on a laptop |
        | 100m | 103 million | 27 million | 19 million | a first real run on one GPU |
        | dense-4b | 4.1 billion | 3.8 billion | none | the paper's dense model |
        | moe-27b | 26.7 billion | 3.8 billion | none | the paper's mixture of experts |
        | engram-27b | 26.7 billion | 3.8 billion | 5.7 billion | the same size with a memory |
        | engram-40b | 39.5 billion | 3.8 billion | 18.5 billion | the same with a larger memory |

        To size a model of your own, start from the nearest preset and change, in this order:

        1. `vocab_size` to that of your tokenizer, then `hidden_size` (about 64 per layer is usual) and
           `num_hidden_layers`.
        2. `intermediate_size` to 3 times `hidden_size`, `moe_intermediate_size` to half of it. Experts that a token
           uses, `num_experts_per_tok` plus `n_shared_experts`, stay between 5 and 8.
        3. `engram_layer_ids` to the second layer and the one in the middle; one of them will do for a small model.
        4. `engram_head_dim` so that the memory reads between half and all of `hidden_size` numbers per token:
           `(engram_max_ngram_size - 1) * engram_n_heads * engram_head_dim`.
        5. `n_routed_experts` and `engram_vocab_size` so that tables hold 20 to 25 % of the parameters that a token does
           not compute with. A table has about `(engram_max_ngram_size - 1) * engram_n_heads * engram_vocab_size` rows.
           `count_parameters(config).memory_share` and `engram-hf plan FOLDER` say what share they hold.

        Args:
            name: the model.
            overrides: fields that take another value.

        Raises:
            ValueError: no preset has this name, or a field cannot have this value.

        Example:
            >>> config = EngramMoEConfig.preset("tiny", vocab_size=8192)
            >>> config.hidden_size, config.engram_width
            (128, 128)
        """
        if name not in PRESETS:
            raise ValueError(f"No preset is called {name!r}; there are {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **overrides})

    def validate_sizes(self):
        """Part of `@strict` validation: no size is so large that using it would take time or memory."""
        check_sizes(self)

    def validate_backbone(self):
        """Part of `@strict` validation: what would only fail, or be wrong, in a forward."""
        for name in ("hc_eps", "rms_norm_eps"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}.")
        for name in ("initializer_range", "routed_scaling_factor", "router_aux_loss_coef"):
            if not 0 <= getattr(self, name) <= MAX_NUMBER:
                raise ValueError(f"{name} must lie in [0, {MAX_NUMBER}], got {getattr(self, name)}.")
        if not 0 <= (self.attention_dropout or 0) <= 1:
            raise ValueError(f"attention_dropout must lie in [0, 1], got {self.attention_dropout}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}; got {shorten(self.hidden_act)}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be None or lie in [0, {self.vocab_size}) (vocab_size), got "
                f"{shorten(self.pad_token_id)}."
            )
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, token_ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", eos)):
            if any(i is not None and not -1 <= i < MAX_TOKEN_ID for i in token_ids):
                raise ValueError(f"{name} must lie in [-1, {MAX_TOKEN_ID}), got {shorten(getattr(self, name))}.")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads must be num_attention_heads ({self.num_attention_heads}): in MLA all heads share "
                f"one latent vector; got {shorten(self.num_key_value_heads)}."
            )

    def validate_mla_rope(self):
        """Part of `@strict` validation: rotary embeddings that MLA can have."""
        check_rope(self.rope_parameters or {})

    def validate_experts(self):
        """Part of `@strict` validation: what the router may choose from."""
        if self.first_k_dense_replace >= self.num_hidden_layers:
            return
        missing = [n for n in ("num_experts_per_tok", "n_group", "topk_group") if not getattr(self, n)]
        if missing:
            raise ValueError(f"{missing[0]} must be at least 1, got {getattr(self, missing[0])}.")
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in [1, {self.n_routed_experts}] (n_routed_experts), "
                f"got {self.num_experts_per_tok}."
            )
        if self.n_routed_experts % self.n_group or not 0 < self.topk_group <= self.n_group:
            raise ValueError(
                f"n_group must divide n_routed_experts ({self.n_routed_experts}) and topk_group lie in [1, n_group]; "
                f"got n_group={self.n_group}, topk_group={self.topk_group}."
            )
        # The router scores a group by its two best experts.
        if self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"Each of the {self.n_group} groups needs two experts, got {self.n_routed_experts} in all."
            )


# transformers looks a class up by its name here: Trainer, to shift the labels under label smoothing and to name the
# task in a card; pipelines, before they complain. `register` of the Auto classes does not enter the names.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[EngramMoEConfig.model_type] = "EngramMoEForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[EngramMoEConfig.model_type] = (
    "EngramMoEForSequenceClassification"
)
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[EngramMoEConfig.model_type] = (
    "EngramMoEForTokenClassification"
)

__all__ = ["EngramMoEConfig"]

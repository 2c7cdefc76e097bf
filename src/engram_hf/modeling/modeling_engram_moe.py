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
"""EngramMoE: a mixture-of-experts language model whose memory layers read hashed n-grams from large static tables.

Attention, experts, router and hyper-connections are transformers' own (deepseek_v3, deepseek_v4); new here is where the
memory enters: before the attention of its layer, and its row ids before anything else. Source: arXiv 2601.07372.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import __version__ as transformers_version
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_engram_moe import EngramMoEConfig
from .ids_hashing import HashedTokens, NgramHash
from .ids_reach import NO_MEMORY, find_documents, positions_in_documents, recover_token_ids, tokens_under_mask
from .memory_layer import EngramLayer, MemoryCacheLayer, ShortConvolution, find_rows, keep_ids, memory_cache_layer
from .memory_model import CountsCopies, ModelWithTables
from .table import EngramTable
from .table_blocks import RowBlocks


# What transformers calls the cache in forwards, outputs and `generate`; ours accept both.
CACHE_NAME = "cache" if tuple(map(int, transformers_version.split(".")[:2])) >= (5, 24) else "past_key_values"


def find_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, under whichever of its names it was given. The old name warns where transformers' own models do.

    Raises:
        ValueError: it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "Both `cache` and `past_key_values` were given, which are names of one argument. Give one of them to a "
            f"forward; to generate() of transformers {transformers_version} give `{CACHE_NAME}`. Prefix tuning of PEFT "
            "gives both, and is not supported beside a memory: train LoRA instead."
        )
    if past_key_values is None:
        return cache
    if CACHE_NAME != "past_key_values" and not torch.compiler.is_compiling():
        warnings.warn(
            f"`past_key_values` is deprecated since transformers 5.24. Use `{CACHE_NAME}` instead.",
            FutureWarning,
            stacklevel=3,
        )
    return past_key_values


@auto_docstring(custom_intro="`MoeModelOutputWithPast` with the gates of the memory.")
@dataclass
class EngramMoEModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    engram_gates (`tuple(torch.FloatTensor)`, *optional*, returned when `output_engram_gates=True`):
        One tensor of shape `(batch_size, sequence_length, hc_mult)` per memory layer: how much of what was read
        enters each residual stream, in [0, 1].
    """

    engram_gates: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="`MoeCausalLMOutputWithPast` with the gates of the memory.")
@dataclass
class EngramMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    engram_gates (`tuple(torch.FloatTensor)`, *optional*, returned when `output_engram_gates=True`):
        One tensor of shape `(batch_size, sequence_length, hc_mult)` per memory layer: how much of what was read
        enters each residual stream, in [0, 1].
    """

    engram_gates: tuple[torch.FloatTensor, ...] | None = None


class HiddenStateTap(nn.Module):
    """Where hidden states are recorded in their usual shape, (batch, seq, hidden), whatever the number of streams."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return after


class EngramMoEDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EngramMoEConfig, layer_idx: int):
        super().__init__()
        # CODEPATH: engram-27b and engram-40b have two memory layers, moe-27b and dense-4b none.
        self.engram = EngramLayer(config, layer_idx) if layer_idx in config.engram_layer_ids else None
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        # CODEPATH: dense-4b is dense in all layers, the others in the first.
        self.mlp = DeepseekV3MLP(config) if layer_idx < config.first_k_dense_replace else DeepseekV3MoE(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # CODEPATH: the paper's models have four streams, one stream is its "no multi-branch" ablation.
        self.attn_hc = DeepseekV4HyperConnection(config) if config.hc_mult > 1 else None
        # CODEPATH: as above.
        self.ffn_hc = DeepseekV4HyperConnection(config) if config.hc_mult > 1 else None

    def forward(
        self,
        hidden_streams: torch.Tensor,
        row_ids: torch.Tensor | None = None,
        hashed: HashedTokens | None = None,
        memory_state: MemoryCacheLayer | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_streams: (batch, seq, streams, hidden).
            row_ids: (batch, seq, heads), where the layer has a memory.
            hashed: ids and reach of the tokens, where the layer has a memory.
            memory_state: what the cache keeps for the memory.
            kwargs: what attention takes.
        """
        if self.engram is not None:
            memory, _ = self.engram(hidden_streams, row_ids, hashed, memory_state)
            hidden_streams = hidden_streams + memory

        collapsed, merge = self.collapse(hidden_streams, self.attn_hc)
        attended, _ = self.self_attn(self.input_layernorm(collapsed), **kwargs)
        hidden_streams = merge(attended)

        collapsed, merge = self.collapse(hidden_streams, self.ffn_hc)
        return merge(self.mlp(self.post_attention_layernorm(collapsed)))

    @staticmethod
    def collapse(hidden_streams: torch.Tensor, hyper_connection: nn.Module | None):
        """The input of a block, (batch, seq, hidden), and a function that merges its output into the streams."""
        if hyper_connection is None:
            return hidden_streams.squeeze(2), lambda output: hidden_streams + output.unsqueeze(2)
        post, mixing, collapsed = hyper_connection(hidden_streams)
        dtype = hidden_streams.dtype

        def merge(output: torch.Tensor) -> torch.Tensor:
            mixed = torch.matmul(mixing.to(dtype).transpose(-1, -2), hidden_streams)
            return post.to(dtype).unsqueeze(-1) * output.unsqueeze(-2) + mixed

        return collapsed, merge


@auto_docstring(custom_intro="What all models of an EngramMoE have in common.")
class EngramMoEPreTrainedModel(ModelWithTables, PreTrainedModel):
    config: EngramMoEConfig
    config_class = EngramMoEConfig
    base_model_prefix = "model"
    model_tags = ["engram", "engram_moe", "conditional-memory"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["EngramMoEDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(HiddenStateTap),
        "attentions": OutputRecorder(DeepseekV3Attention, index=1),
        "router_logits": OutputRecorder(DeepseekV3TopkRouter, index=0),
        "engram_gates": OutputRecorder(EngramLayer, index=1),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The experts are imported, so transformers' search of this file's source for their decorator finds nothing.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekV3TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekV3Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekV4HyperConnection):
            init.normal_(module.fn, mean=0.0, std=std)
            init.zeros_(module.base)
            init.ones_(module.scale)
        elif isinstance(module, DeepseekV4HyperHead):
            init.normal_(module.hc_fn, mean=0.0, std=std)
            init.zeros_(module.hc_base)
            init.ones_(module.hc_scale)
        elif isinstance(module, RowBlocks):
            module.init_weights(std)
        elif isinstance(module, ShortConvolution):
            # The memory starts without its convolution, and learns it.
            init.zeros_(module.weight)
        elif isinstance(module, NgramHash) and module.token_map is not None:
            init.constant_(module.token_map, NO_MEMORY)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.base_model.vocab_size = embeddings.num_embeddings
        return embeddings


@auto_docstring(custom_intro="An EngramMoE without a head: hidden states come out.")
class EngramMoEModel(EngramMoEPreTrainedModel):
    def __init__(self, config: EngramMoEConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [EngramMoEDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        # CODEPATH: the paper's models have four streams, its "no multi-branch" ablation one.
        self.hc_head = DeepseekV4HyperHead(config) if config.hc_mult > 1 else None
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.hidden_state_tap = HiddenStateTap()
        self.gradient_checkpointing = False
        # CODEPATH: engram-27b and engram-40b have a memory, moe-27b and dense-4b none.
        self.ngram_hash = NgramHash(config) if config.engram_layer_ids else None
        self._keep_in_fp32_modules_strict = self.single_precision_modules()
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < 4 and any(part in name for part in self._keep_in_fp32_modules_strict):
                parameter.data = parameter.data.float()

        # Initialize weights and apply final processing
        self.post_init()
        if self.ngram_hash is not None and self.ngram_hash.token_map is None:
            self.ngram_hash.confirm("a model with this config")

    def single_precision_modules(self) -> list[str]:
        """Names of what no half-precision `dtype=` changes: as in deepseek_v3 and deepseek_v4 the router and the mixing
        of streams, and tables that are declared so."""
        config = self.config
        has_experts = config.first_k_dense_replace < config.num_hidden_layers
        return (
            ["e_score_correction_bias", "gate.weight"] * has_experts
            + ["attn_hc", "ffn_hc", "hc_head"] * (config.hc_mult > 1)
            + ["table.blocks"] * (bool(config.engram_layer_ids) and config.engram_table_dtype == "float32")
        )

    def tables(self) -> list[EngramTable]:
        """The tables, in the order of the memory layers."""
        return [layer.engram.table for layer in self.memory_layers()]

    def memory_layers(self) -> list[EngramMoEDecoderLayer]:
        """The decoder layers that have a memory."""
        return [layer for layer in self.layers if layer.engram is not None]

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        engram_input_ids: torch.LongTensor | None = None,
        engram_patches: Sequence[str | Sequence[str] | None] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EngramMoEModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            What was computed for the tokens before these. `past_key_values` is the same under its name before
            transformers 5.24.
        past_key_values (`Cache`, *optional*):
            As `cache`; give one of them.
        engram_input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Raw token ids that the memory reads, where they are not `input_ids`: beside `inputs_embeds`, or with -1 for
            positions that are no tokens, such as image spans. A token looks neither at such a position nor past it.
        engram_patches (`list`, *optional*):
            Row patches that each sequence sees, as `use_patches` takes them: one name, list of names or None per
            sequence.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        cache = find_cache(cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        seq = inputs_embeds.shape[1]

        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            position_ids = positions_in_documents(kwargs["cu_seq_lens_q"], seq)
        if position_ids is not None and isinstance(attention_mask, torch.Tensor | None):
            past_seen = None if cache is None else cache.get_seq_length()
            attention_mask, is_packed = find_documents(position_ids, attention_mask, past_seen)
            use_cache = use_cache and not is_packed
        # Without a cache the mask keeps packed documents apart, and a cache that is new has nothing to say about it.
        cache_of_caller = cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past_seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(seq, device=inputs_embeds.device) + past_seen).unsqueeze(0)

        if isinstance(attention_mask, dict):
            # Masks that `generate` prepared, by layer type.
            attention_mask = causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache_of_caller},
            )

        hashed, state = None, None
        row_ids: dict[int, torch.Tensor] = {}
        # CODEPATH: engram-27b and engram-40b have a memory, moe-27b and dense-4b none.
        if self.ngram_hash is not None:
            refuse_other_engines(self.config)
            token_ids = engram_input_ids if engram_input_ids is not None else input_ids
            if token_ids is None:
                token_ids = recover_token_ids(inputs_embeds, self.embed_tokens.weight)
            if token_ids.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"engram_input_ids must have one id per position, {tuple(inputs_embeds.shape[:2])}, "
                    f"got {tuple(token_ids.shape)}."
                )
            furthest = max(self.config.engram_max_ngram_size - 1, self.config.engram_conv_reach)
            token_mask, seen = tokens_under_mask(attention_mask, seq, past_seen, furthest)
            state = None if cache is None else memory_cache_layer(cache, self.config.num_hidden_layers)
            memories = [layer.engram for layer in self.memory_layers()]
            hashed, row_ids = find_rows(self.ngram_hash, memories, token_ids, position_ids, token_mask, seen, state)
            if state is not None:
                keep_ids(state, hashed)

        hidden_streams = inputs_embeds.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        with nullcontext() if engram_patches is None else self.use_patches(engram_patches):
            for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
                streams_before = hidden_streams
                hidden_streams = decoder_layer(
                    hidden_streams,
                    row_ids=row_ids.get(layer_idx),
                    # Hooks of accelerate move what a layer is given to its device, so no other layer is given it.
                    hashed=hashed if layer_idx in row_ids else None,
                    memory_state=state if layer_idx in row_ids else None,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    position_embeddings=position_embeddings,
                    use_cache=use_cache,
                    **{CACHE_NAME: cache},
                    **kwargs,
                )
                # CODEPATH: several streams (the paper's models) are recorded as their mean, one stream as it is.
                if self.config.hc_mult == 1:
                    before = inputs_embeds if layer_idx == 0 else streams_before.squeeze(2)
                    hidden_streams = self.hidden_state_tap(before, hidden_streams.squeeze(2)).unsqueeze(2)
                elif kwargs.get("output_hidden_states", self.config.output_hidden_states):
                    before = inputs_embeds if layer_idx == 0 else streams_before.mean(2)
                    self.hidden_state_tap(before, hidden_streams.mean(2))

        hidden_states = hidden_streams.squeeze(2) if self.hc_head is None else self.hc_head(hidden_streams)
        return EngramMoEModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache if use_cache else cache_of_caller},
        )


def refuse_other_engines(config) -> None:
    """
    Raises:
        NotImplementedError: another engine runs the model, and gives it no cache to keep ids in.
    """
    if str(config._attn_implementation).startswith("vllm"):
        raise NotImplementedError(
            "vLLM's Transformers backend calls a model without a cache, so the memory would read n-grams without their "
            "past and decode wrongly. Serve this model with `transformers serve` or `generate`."
        )


NOT_PAGED = (
    "Continuous batching is not supported. The pages of transformers hold keys and values, and a memory keeps the last "
    "ids, which have no pages. Call generate with a batch of prompts padded on the left: each is answered as alone."
)


class WithoutContinuousBatching:
    """Part of `EngramMoEForCausalLM`: without it, transformers would log an error and return empty lists of tokens."""

    @property
    def init_continuous_batching(self):
        # `transformers serve` looks for this name, and where it is missing answers one request after another.
        raise AttributeError(f"{type(self).__name__} has no continuous batching.")

    def generate_batch(self, *args, **kwargs):
        """Not supported; call `generate`."""
        raise NotImplementedError(NOT_PAGED)

    def continuous_batching_context_manager(self, *args, **kwargs):
        """Not supported; call `generate`."""
        raise NotImplementedError(NOT_PAGED)


@auto_docstring(custom_intro="An EngramMoE for causal language modeling.")
class EngramMoEForCausalLM(WithoutContinuousBatching, CountsCopies, EngramMoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: EngramMoEConfig):
        super().__init__(config)
        self.model = EngramMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        engram_input_ids: torch.LongTensor | None = None,
        engram_patches: Sequence[str | Sequence[str] | None] | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EngramMoECausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            What was computed for the tokens before these. `past_key_values` is the same under its name before
            transformers 5.24.
        past_key_values (`Cache`, *optional*):
            As `cache`; give one of them.
        engram_input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Raw token ids that the memory reads, where they are not `input_ids`; -1 for positions that are no tokens.
        engram_patches (`list`, *optional*):
            Row patches that each sequence sees: one name, list of names or None per sequence.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import engram_hf

        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> tokenizer = AutoTokenizer.from_pretrained(folder)
        >>> generated = model.generate(**tokenizer("The list is", return_tensors="pt"), max_new_tokens=20)
        ```"""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=find_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            engram_input_ids=engram_input_ids,
            engram_patches=engram_patches,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits and outputs.router_logits:
            is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
            token_mask = attention_mask if is_2d else None
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.config.n_routed_experts, self.config.num_experts_per_tok, token_mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return EngramMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            engram_gates=outputs.engram_gates,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def generate(self, *args, engram_patches: Sequence[str | Sequence[str] | None] | None = None, **kwargs):
        """As in transformers; `engram_patches` are this model's. An assistant reads its own tables without patches."""
        with nullcontext() if engram_patches is None else self.use_patches(engram_patches):
            return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, engram_input_ids=None, is_first_iteration=False, **kwargs
    ):
        """As in transformers; `engram_input_ids` belongs to the prompt, tokens after it are read as generated."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if engram_input_ids is None and inputs_embeds is not None and is_first_iteration:
            # Embeddings are what the layers compute with, the ids beside them what the memory reads.
            engram_input_ids = input_ids if input_ids.shape == inputs_embeds.shape[:2] else None
        if engram_input_ids is not None:
            here = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
            prompt = engram_input_ids.shape[1]
            # Generated from embeddings alone, `input_ids` holds no prompt.
            has_prompt = inputs_embeds is None or input_ids.shape[1] >= inputs_embeds.shape[1]
            read = torch.cat([engram_input_ids, input_ids[:, prompt if has_prompt else 0 :]], dim=1)
            cache = inputs.get(CACHE_NAME)
            start = cache.get_seq_length() if cache is not None else read.shape[1] - here.shape[1]
            inputs["engram_input_ids"] = read[:, start : start + here.shape[1]]
        return inputs


class EngramMoEForSequenceClassification(GenericForSequenceClassification, EngramMoEPreTrainedModel):
    def __init__(self, config: EngramMoEConfig):
        EngramMoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        # Not through AutoModel, which would ask again for trust where this file came with the weights.
        self.model = EngramMoEModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class EngramMoEForTokenClassification(GenericForTokenClassification, EngramMoEPreTrainedModel):
    def __init__(self, config: EngramMoEConfig):
        EngramMoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = EngramMoEModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.1)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "EngramMoEForCausalLM",
    "EngramMoEForSequenceClassification",
    "EngramMoEForTokenClassification",
    "EngramMoEModel",
    "EngramMoEPreTrainedModel",
]

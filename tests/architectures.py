"""Small models of other people's architectures, drawn at random, and a memory for them."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from engram_hf.adapters.added_memory import add_engram
from engram_hf.adapters.memory_class import decoder_of
from engram_hf.adapters.memory_config import EngramConfig
from engram_hf.adapters.memory_hooks import memory_layers_of


VOCAB_SIZE = 99
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": None,
}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
PER_LAYER = {"sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
ZERO_EXPERTS = {"moe_topk": 2, "zero_expert_num": 2, "qk_head_dim": 16, "head_dim": 8}
INDEXED = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "shared_expert_intermediate_size": 16,
}
# The n-grams that the model itself looks up.
NGRAMS = {
    # Counted from 1.
    "ple_layer_ids": [3],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 53,
    "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 1,
    "eos_token_id": VOCAB_SIZE - 1,
}
# Type of the model to the fields that differ from `SHARED`; fields that a config does not have are left out.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": MLA,
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": None},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "qwen2": {},
    "qwen3_moe": MOE,
    "deepseek_v2": MLA,
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "cohere2": {"sliding_window": 8},
    "olmo2": {},
    "olmoe": MOE,
    "phi": {},
    "phi3": {},
    "smollm3": {},
    "glm4": {},
    "glm4_moe": {**MLA, "head_dim": 8},
    "granite": {},
    "stablelm": {},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 3, "rotary_dim": 4, "n_positions": 128},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 3, "rotary_dim": 4, "n_positions": 128},
    "persimmon": {},
    "nemotron": {},
    "seed_oss": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "minimax_m2": {**MOE, "num_local_experts": 4, "rotary_dim": 8},
    "apertus": {},
    "arcee": {},
    "diffllama": {},
    "exaone4": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]], "intermediate_size": 40},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 64, "intermediate_size_mlp": 40},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {**MOE, **LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "mamba": {"state_size": 8, "expand": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3, "num_experts": 2, "use_mamba_kernels": False},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, **PER_LAYER},
    "longcat_flash": {**MLA, "num_layers": 3, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 16, **ZERO_EXPERTS},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen4_exp_text": {**MOE, **LINEAR, **INDEXED, **NGRAMS, "num_hidden_layers": 4, "hc_count": 2, "hc_lowrank": 8},
    "deepseek_v4": {**MLA, "hc_mult": 2, "sliding_window": 8, "o_lora_rank": 8, "o_groups": 2, "index_topk": 4},
}
# Where the list of layers has another length than the config says.
LAYERS = {"longcat_flash": "model.layers"}
# Checked in `make test`; the others in `make test-all`.
FAST = ("llama", "qwen3", "mixtral", "deepseek_v3", "gemma3_text", "falcon")


def tiny_backbone(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model of three layers or four, in which every weight matters."""
    config_class = CONFIG_MAPPING[model_type]
    fields = {**SHARED, **ARCHITECTURES[model_type], **overrides}
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map) | {"attn_implementation"}
    config = config_class(**{name: value for name, value in fields.items() if name in known and value is not None})
    config.eos_token_id = fields["eos_token_id"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    return draw(model, seed).eval()


@torch.no_grad()
def draw(model: torch.nn.Module, seed: int, memory: str | None = None) -> torch.nn.Module:
    """Draw weights so that each one matters: those of the model, or those of one of its memories."""
    generator, of_memory = torch.Generator().manual_seed(seed), memory is not None
    for name, parameter in model.named_parameters():
        if (f".engram.{memory or ''}" in name) is not of_memory or ".row_gradients." in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if of_memory:
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
        elif parameter.ndim > 1:
            parameter.add_(0.1 * noise)
    return model


def tiny_memory(**overrides) -> EngramConfig:
    fields = {"layer_ids": [0, 2], "vocab_size": 53, "n_heads": 2, "head_dim": 8, "compressed_vocab_size": None}
    return EngramConfig(**{**fields, "block_elements": 500, **overrides})


def with_memory(model: PreTrainedModel, seed: int = 1, **overrides) -> PreTrainedModel:
    """The model with a memory that is as loud as the rest."""
    add_engram(model, tiny_memory(**overrides), layers=LAYERS.get(model.config.model_type))
    return draw(model, seed, "default")


def memory_layers(model: PreTrainedModel) -> list:
    """The layers of the active memory."""
    return memory_layers_of(decoder_of(model))

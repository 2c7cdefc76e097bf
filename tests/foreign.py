"""Tiny random models of other people's architectures with lookup tables, saved in the layout of their publishers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    PreTrainedModel,
    Qwen4ExpConfig,
    Qwen4ExpForCausalLM,
    Qwen4ExpForConditionalGeneration,
    Qwen4ExpTextConfig,
)


VOCAB_SIZE = 99
SCALE = 0.037
QWEN_TABLE = "model.layers.0.ple.ple_embedding.ngram_embedding"
GEMMA_TABLE = "model.embed_tokens_per_layer"


SIZES_OF_GEMMA = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@torch.no_grad()
def drawn(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """Every parameter at random, so that none hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.to(dtype).eval()


def qwen_text(dtype: torch.dtype = torch.bfloat16, **changes) -> PreTrainedModel:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "ple_layer_ids": [1, 2],
        "ple_embed_dim": 16,
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
    }
    return drawn(Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**{**fields, **changes})), dtype)


def gemma3n_text(dtype: torch.dtype = torch.bfloat16, **changes) -> PreTrainedModel:
    fields = {
        **SIZES_OF_GEMMA,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "sliding_window": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "pad_token_id": 0,
    }
    return drawn(Gemma3nForCausalLM(Gemma3nTextConfig(**{**fields, **changes})), dtype)


def gemma4_text(dtype: torch.dtype = torch.bfloat16, **changes) -> PreTrainedModel:
    fields = {
        **SIZES_OF_GEMMA,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
        "pad_token_id": 0,
    }
    return drawn(Gemma4ForCausalLM(Gemma4TextConfig(**{**fields, **changes})), dtype)


def qwen_composite(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen4ExpConfig(
        text_config=qwen_text().config.to_dict(),
        vision_config={**vision, "num_position_embeddings": 16},
        image_token_id=95,
        video_token_id=96,
        vision_start_token_id=97,
        vision_end_token_id=98,
    )
    return drawn(Qwen4ExpForConditionalGeneration(config), dtype)


def gemma4_composite(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    config = Gemma4Config(
        text_config=gemma4_text().config.to_dict(), vision_config=None, audio_config=None, image_token_id=95
    )
    return drawn(Gemma4ForConditionalGeneration(config), dtype)


def publish(model: PreTrainedModel, folder: Path, parts: int = 5, is_fp8: bool = False) -> Path:
    """Save a model as its publisher does: in two files, n-grams in equal parts that cut through hash heads."""
    model.save_pretrained(folder)
    tensors = {}
    for path in folder.glob("*.safetensors*"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    for name in [name for name in tensors if name.endswith("ngram_embedding.shard_0.weight")]:
        table = name.removesuffix(".shard_0.weight")
        shards = [key for key in tensors if key.startswith(f"{table}.shard_")]
        rows = torch.cat([tensors.pop(key) for key in sorted(shards, key=lambda key: int(key.split("_")[-1][:-7]))])
        if is_fp8:
            tensors[f"{table}.weight_scale"] = torch.tensor([SCALE], dtype=torch.bfloat16)
            rows = (rows.float() / SCALE).to(torch.float8_e4m3fn)
        for number, part in enumerate(rows.chunk(parts)):
            tensors[f"{table}.shard_{number}.weight"] = part.contiguous()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if is_fp8:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "modules_to_convert": ["ngram_embedding"]}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the index of a folder names, or that are in its one file."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items()}

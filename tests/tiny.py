"""Small models for tests, with everything that a zero start would hide drawn at random."""

import torch

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM
from engram_hf.modeling.table_formats import quantize_rows


VOCAB_SIZE = 99
# Where `save_pretrained` of a small model puts everything but its tables.
BACKBONE = "model-00001-of-00001.safetensors"
# Streams, largest order, taps of the convolution: all that changes what a token sees.
SHAPES = [(1, 3, 4), (4, 3, 4), (4, 2, 0), (1, 4, 3), (2, 4, 0)]


def tiny_config(**overrides) -> EngramMoEConfig:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "engram_layer_ids": [0, 2],
        "engram_vocab_size": 53,
        "engram_n_heads": 2,
        "engram_head_dim": 8,
        "engram_compressed_vocab_size": None,
        # So small that every head is a block of its own.
        "engram_block_elements": 500,
    }
    return EngramMoEConfig(**{**fields, **overrides})


def shaped_config(shape: tuple[int, int, int], **overrides) -> EngramMoEConfig:
    streams, max_ngram_size, kernel_size = shape
    return tiny_config(
        hc_mult=streams, engram_max_ngram_size=max_ngram_size, engram_kernel_size=kernel_size, **overrides
    )


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter so that each one matters: no zeros, no ones, a memory as loud as the rest."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".row_gradients." in name:
            # Stands for gradients, and is no weight.
            continue
        if not parameter.is_floating_point():
            rows = 0.5 * torch.randn(parameter.shape[0], model.config.engram_head_dim, generator=generator)
            parameter.copy_(quantize_rows(rows, model.config.engram_table_dtype))
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.3 * noise)
        elif ".engram." in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(0.15 * noise)
    return model


def tiny_model(config: EngramMoEConfig | None = None, seed: int = 0) -> EngramMoEForCausalLM:
    return randomize(EngramMoEForCausalLM(config or tiny_config()), seed).eval()


def tiny_ids(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, seq), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    bound = 1e-5 * expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    assert difference <= bound, f"logits differ by {difference:.2e}, allowed {bound:.2e}"

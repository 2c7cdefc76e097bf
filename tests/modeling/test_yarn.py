"""YaRN is DeepSeek's: its frequencies and its scale of attention scores, exact in chunks beyond the trained length.

The formulas are written here anew, in complex numbers, from arXiv 2309.00071 and DeepSeek's inference code.
"""

import math

import pytest
import torch
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import DynamicCache, StaticCache


TRAINED, FACTOR, ROTARY, THETA = 16, 10.0, 8, 1e4
SEQ = 53
# The paper's: scale 10, alpha 1, beta 32, factor 0.707.
YARN = {
    "rope_type": "yarn",
    "rope_theta": THETA,
    "factor": FACTOR,
    "original_max_position_embeddings": TRAINED,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


def yarn_model(**changes):
    fields = {"max_position_embeddings": int(TRAINED * FACTOR), "rope_parameters": {**YARN, **changes}}
    return tiny_model(tiny_config(qk_rope_head_dim=ROTARY, **fields))


def frequencies(beta_fast: float, beta_slow: float) -> list[float]:
    """Radians per position of each pair of channels: as trained where it turns often, and stretched where not."""

    def pair_that_turns(times: float) -> float:
        return ROTARY * math.log(TRAINED / (times * 2 * math.pi)) / (2 * math.log(THETA))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), ROTARY - 1)
    found = []
    for pair in range(ROTARY // 2):
        stretched = min(max((pair - low) / (max(high - low, 1e-3)), 0.0), 1.0)
        own = THETA ** (-2 * pair / ROTARY)
        found.append(own * (1 - stretched) + own / FACTOR * stretched)
    return found


def scale_of(mscale: float) -> float:
    return 0.1 * mscale * math.log(FACTOR) + 1


def rotated(channels: torch.Tensor, beta_fast: float, beta_slow: float) -> torch.Tensor:
    """(batch, seq, heads, ROTARY): neighbours are a complex number, turned by its position times its frequency."""
    numbers = torch.view_as_complex(channels.double().unflatten(-1, (-1, 2)))
    angles = (
        torch.arange(channels.shape[1])[:, None].double() * torch.tensor(frequencies(beta_fast, beta_slow)).double()
    )
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(numbers * turns[None, :, None]).flatten(-2)


def naive_attention(
    attention, hidden: torch.Tensor, mscale: float, mscale_all_dim: float, betas: tuple
) -> torch.Tensor:
    """DeepSeek's latent attention with YaRN, in float64; one head of rotary keys for all heads."""
    config = attention.config
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    batch, seq, _ = hidden.shape
    query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden))).view(batch, seq, heads, -1)
    latent, key_turned = attention.kv_a_proj_with_mqa(hidden).split([config.kv_lora_rank, ROTARY], -1)
    keys, values = (
        attention.kv_b_proj(attention.kv_a_layernorm(latent)).view(batch, seq, heads, -1).split([nope, value], -1)
    )
    scale_of_rotary = scale_of(mscale) / scale_of(mscale_all_dim)
    query_turned = rotated(query[..., nope:], *betas) * scale_of_rotary
    key_turned = rotated(key_turned.unsqueeze(2), *betas).expand(-1, -1, heads, -1) * scale_of_rotary
    scores = torch.einsum("bqhd,bkhd->bhqk", query[..., :nope].double(), keys.double())
    scores = scores + torch.einsum("bqhd,bkhd->bhqk", query_turned, key_turned)
    scores = scores * (nope + ROTARY) ** -0.5 * scale_of(mscale_all_dim) ** 2
    scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), -math.inf)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values.double())
    return attention.o_proj(mixed.flatten(2).to(hidden.dtype))


@torch.no_grad()
@pytest.mark.parametrize("betas", [(32.0, 1.0), (2.0, 0.1)])
@pytest.mark.parametrize("mscale, mscale_all_dim", [(0.707, 0.707), (1.0, 1.0), (1.0, 0.5)])
def test_attention_with_yarn_is_deepseeks(mscale, mscale_all_dim, betas):
    """Other betas stretch some pairs of channels in part, and unlike scales scale the rotary part."""
    changes = {"mscale": mscale, "mscale_all_dim": mscale_all_dim, "beta_fast": betas[0], "beta_slow": betas[1]}
    model = yarn_model(**changes)
    attention = model.model.layers[1].self_attn
    hidden = torch.randn(2, SEQ, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQ).unsqueeze(0)
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    given = {"position_embeddings": model.model.rotary_emb(hidden, positions), "attention_mask": mask}
    found = attention(hidden, **given)[0]
    torch.testing.assert_close(found, naive_attention(attention, hidden, mscale, mscale_all_dim, betas))


@torch.no_grad()
def test_whole_chunked_and_token_by_token_agree_across_the_trained_length():
    model, ids = yarn_model(), tiny_ids(2, SEQ)
    full = model(ids, use_cache=False).logits
    token_by_token = [(start, start + 1) for start in range(SEQ)]
    # One chunk ends before the trained length, one crosses it, one begins behind it.
    for chunks in ([(0, 11), (11, 30), (30, SEQ)], [(0, TRAINED), (TRAINED, SEQ)], token_by_token):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=SEQ)):
            logits = [model(ids[:, start:end], cache=cache, use_cache=True).logits for start, end in chunks]
            assert_same_logits(torch.cat(logits, dim=1), full)


@torch.no_grad()
def test_yarn_matters_before_and_behind_the_trained_length():
    """Otherwise the tests above could not fail. DeepSeek's YaRN changes short texts too."""
    plain = tiny_model(tiny_config(qk_rope_head_dim=ROTARY, max_position_embeddings=int(TRAINED * FACTOR)))
    model, ids = yarn_model(), tiny_ids(2, SEQ)
    difference = (model(ids).logits - plain(ids).logits).abs().amax((0, 2))
    assert difference[1:TRAINED].min() > 1e-4 and difference[TRAINED:].min() > 1e-3

"""The config: presets, derived values, and an error for everything that cannot be."""

import pytest
from tiny import tiny_config
from transformers import AutoConfig

from engram_hf import EngramMoEConfig


def test_the_default_is_the_papers_engram_27b_and_presets_take_overrides():
    config = EngramMoEConfig()
    preset = EngramMoEConfig.preset("engram-27b")
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "n_routed_experts",
        "engram_layer_ids",
        "engram_vocab_size",
        "hc_mult",
    )
    assert [getattr(config, name) for name in fields] == [getattr(preset, name) for name in fields]
    assert EngramMoEConfig.preset("moe-27b", num_hidden_layers=4).num_hidden_layers == 4
    with pytest.raises(ValueError, match="No preset is called 'engram-1b'; there are dense-4b, engram-27b"):
        EngramMoEConfig.preset("engram-1b")


def test_derived_values_follow_from_the_fields():
    config = tiny_config(engram_max_ngram_size=4, engram_vocab_size=[53, 59, 61], engram_kernel_size=4)
    assert config.layer_types == ["full_attention"] * 3
    assert config.engram_width == 3 * 2 * 8
    assert config.engram_conv_reach == 12
    without = tiny_config(engram_kernel_size=0)
    assert without.engram_conv_reach == 0
    assert tiny_config(pad_token_id=None, eos_token_id=[5, 6]).engram_pad_token_id == 5


def test_a_config_survives_saving(tmp_path):
    config = tiny_config(engram_vocab_size=[53, 59])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, EngramMoEConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engram_layer_ids": [3]}, r"zero-based layer ids in \[0, 3\), got \[3\]"),
        ({"engram_layer_ids": [0, 0]}, "different zero-based layer ids"),
        ({"engram_max_ngram_size": 1}, "engram_max_ngram_size must be at least 2, got 1"),
        ({"engram_vocab_size": [53]}, "one for each of the 2 orders 2 to 3, each in .2, 1099511627776.; got"),
        ({"engram_vocab_size": 1}, "each in .2, 1099511627776.; got 1"),
        ({"engram_n_heads": 0}, "engram_n_heads must be at least 1, got 0"),
        ({"engram_head_dim": 0}, "engram_head_dim must be at least 1"),
        ({"engram_block_elements": 0}, "engram_block_elements must be at least 1"),
        ({"engram_pad_token_id": 99}, r"raw token id in \[0, 99\), got 99"),
        ({"engram_compressed_vocab_size": "all"}, '"auto", None or an int in'),
        ({"engram_compressed_vocab_size": 100}, r"an int in \[1, 99\] \(vocab_size\), got 100"),
        ({"engram_seed": -1}, "engram_seed must be at least 0, got -1"),
        ({"engram_kernel_size": -1}, "at least 0"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters must be at least 1, got 0"),
        ({"hc_eps": -1.0}, "hc_eps must be above 0, got -1.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be at least 0, got -1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": 0, "engram_layer_ids": []}, "num_hidden_layers must be at least 1"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must be num_attention_heads"),
        ({"n_group": None}, "n_group must be at least 1, got None"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok must be at least 1, got None"),
        ({"engram_vocab_size": 2**62}, "each in .2, 1099511627776.; got 4611686018427387904"),
        ({"engram_table_dtype": "int2"}, "engram_table_dtype must be None or one of"),
        ({"hc_mult": 0}, r"hc_mult \(residual streams\) must be at least 1, got 0"),
        ({"num_experts_per_tok": 9}, r"in \[1, 4\] \(n_routed_experts\), got 9"),
        ({"n_group": 3}, "n_group must divide n_routed_experts"),
        ({"n_group": 4, "topk_group": 2}, "needs two experts"),
    ],
)
def test_what_cannot_be_is_refused_with_allowed_and_got(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)

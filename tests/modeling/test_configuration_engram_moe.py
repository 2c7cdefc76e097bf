"""The config: presets, derived values, and a sentence for everything that cannot be."""

import copy
import json
import random
import re
import tracemalloc

import pytest
import torch
from tiny import tiny_config
from transformers import AutoConfig, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from engram_hf import EngramMoEConfig, count_parameters
from engram_hf.modeling.configuration_engram_moe import PRESETS


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
    with pytest.raises(ValueError, match="No preset is called 'engram-1b'; there are tiny, 100m, dense-4b"):
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
        ({"engram_max_ngram_size": 1}, r"engram_max_ngram_size must lie in \[2, 256\], got 1"),
        ({"engram_vocab_size": [53]}, "one for each of the 2 orders 2 to 3, each in .2, 1099511627776.; got"),
        ({"engram_vocab_size": 1}, "each in .2, 1099511627776.; got 1"),
        ({"engram_n_heads": 0}, r"engram_n_heads must lie in \[1, 16384\], got 0"),
        ({"engram_head_dim": 0}, "engram_head_dim must lie in .1, "),
        ({"engram_block_elements": 0}, "engram_block_elements must lie in .1, "),
        ({"engram_pad_token_id": 99}, r"raw token id in \[0, 99\), got 99"),
        ({"engram_compressed_vocab_size": "all"}, '"auto", None or an int in'),
        ({"engram_compressed_vocab_size": 100}, r"an int in \[1, 99\] \(vocab_size\), got 100"),
        ({"engram_seed": -1}, "engram_seed must lie in .0, .*got -1"),
        ({"engram_kernel_size": -1}, "engram_kernel_size must lie in .0, 256."),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters must lie in .1, .*got 0"),
        ({"hc_eps": -1.0}, "hc_eps must be above 0 and at most 1, got -1.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must lie in .0, .*got -1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must lie in .1, .*got 0"),
        ({"hidden_size": 0}, "hidden_size must lie in .1, .*got 0"),
        ({"num_hidden_layers": 0, "engram_layer_ids": []}, "num_hidden_layers must lie in .1, "),
        ({"num_key_value_heads": 1}, "num_key_value_heads must be num_attention_heads"),
        ({"n_group": None}, "n_group must be at least 1, got None"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok must be at least 1, got None"),
        ({"engram_vocab_size": 2**62}, "each in .2, 1099511627776.; got 4611686018427387904"),
        ({"engram_table_dtype": "int2"}, "engram_table_dtype must be None or one of"),
        ({"hc_mult": 0}, "hc_mult must lie in .1, 256., got 0"),
        ({"num_experts_per_tok": 9}, r"in \[1, 4\] \(n_routed_experts\), got 9"),
        ({"n_group": 3}, "n_group must divide n_routed_experts"),
        ({"n_group": 4, "topk_group": 2}, "needs two experts"),
        ({"hidden_act": "gelou"}, "hidden_act must be one of .*silu.*; got 'gelou'"),
        ({"pad_token_id": -1}, "pad_token_id must be None or lie in .0, 99.*got -1"),
        ({"eos_token_id": [2, 2**40]}, "eos_token_id must lie in"),
        ({"attention_dropout": 1.5}, "attention_dropout must lie in .0, 1., got 1.5"),
        ({"head_dim": 16}, "head_dim follows from qk_rope_head_dim and qk_nope_head_dim, and is 8; got 16"),
        ({"engram_fingerprint": {"map": "none"}}, "ids in engram_fingerprint must be a number"),
        ({"engram_fingerprint": {"ids": 5}}, "engram_fingerprint must hold strings only"),
        ({"rope_parameters": {"rope_type": "yarm"}}, "rope_type in rope_parameters must be default, .*got 'yarm'"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta in rope_parameters must be a number"),
    ],
)
def test_what_cannot_be_is_refused_with_allowed_and_got(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"engram_max_ngram_size": 200_000_000},
        {"engram_n_heads": 10**400},
        {"engram_n_heads": 10_000},
        {"engram_head_dim": 2**63},
        {"engram_kernel_size": 2**31},
        {"num_hidden_layers": 2**40},
        {"vocab_size": 2**40},
        {"n_routed_experts": 2**63},
        {"hidden_size": 2**31},
        {"num_labels": 2**40},
        {"rope_parameters": {"rope_type": "linear", "factor": 2**64, "rope_theta": 1e4}},
    ],
)
def test_a_size_beyond_all_bounds_is_refused_before_it_is_used(fields):
    content = {**tiny_config().to_dict(), **fields}
    tracemalloc.start()
    with pytest.raises(ValueError, match=next(iter(fields))) as error:
        EngramMoEConfig.from_dict(content)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert len(str(error.value)) < 600


def test_a_field_with_a_typing_error_is_refused_with_the_right_name(tmp_path):
    with pytest.raises(ValueError, match="engram_n_head is no field. Did you mean engram_n_heads"):
        EngramMoEConfig.from_dict({"engram_n_head": 4})
    with pytest.raises(ValueError, match="Did you mean engram_layer_ids"):
        EngramMoEConfig.preset("tiny", engram_layers=[1])
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Did you mean engram_head_dim"):
        EngramMoEConfig.from_pretrained(tmp_path, engram_heads_dim=8)


def test_arguments_of_loading_are_checked_with_the_rest_of_the_config(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = EngramMoEConfig.from_pretrained(tmp_path, num_hidden_layers=4, engram_layer_ids=[3, 1])
    assert config.engram_layer_ids == [1, 3]
    assert config.layer_types == ["full_attention"] * 4
    with pytest.raises(ValueError, match="engram_layer_ids must be different zero-based layer ids"):
        EngramMoEConfig.from_pretrained(tmp_path, engram_layer_ids=[3])
    same, unused = EngramMoEConfig.from_pretrained(tmp_path, hc_mult=1, foo=2, return_unused_kwargs=True)
    assert same.hc_mult == 1 and unused == {"foo": 2}


def test_fields_may_have_the_names_that_other_models_give_them():
    content = tiny_config().to_dict()
    assert "n_routed_experts" in content and "num_nextn_predict_layers" in content
    del content["n_routed_experts"]
    assert EngramMoEConfig.from_dict({**content, "num_experts": 6}).n_routed_experts == 6
    with pytest.raises(ValueError, match="'n_routed_experts' expected int, got float"):
        EngramMoEConfig.from_dict({**content, "num_experts": float("nan")})
    with pytest.raises(ValueError, match="num_local_experts is another name of n_routed_experts, and they have diff"):
        EngramMoEConfig.from_dict({**content, "n_routed_experts": 4, "num_local_experts": 6})


def test_yarn_is_refused_where_it_would_scale_the_rotary_part_of_the_scores_alone():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    with pytest.raises(Exception, match="yarn must have mscale and mscale_all_dim"):
        tiny_config(rope_parameters=yarn)
    with pytest.raises(Exception, match="yarn must have mscale and mscale_all_dim"):
        tiny_config(rope_parameters={**yarn, "mscale": 1.0})

    def factors(**more):
        """What stock DeepSeek-V3 scales the rotary part of the scores by, and the whole of them."""
        fields = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
        config = DeepseekV3Config(**fields, rope_parameters={**yarn, **more})
        with torch.device("meta"):
            whole = DeepseekV3Attention(config, 0).scaling
        return DeepseekV3RotaryEmbedding(config).attention_scaling ** 2, whole * config.qk_head_dim**0.5

    rotary, whole = factors()
    assert rotary > 1.2 and whole == pytest.approx(1)
    rotary, whole = factors(mscale=1.0, mscale_all_dim=1.0)
    assert rotary == pytest.approx(1) and whole > 1.2
    assert tiny_config(rope_parameters={**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}).rope_parameters["mscale"] == 1
    assert tiny_config(rope_parameters={**yarn, "attention_factor": 1.0}).rope_parameters["attention_factor"] == 1


def test_presets_have_the_sizes_that_the_docstring_says():
    rows = re.findall(
        r"^ *\| (\S+) \| ([\d.]+ .illion) \| ([\d.]+ .illion) \| (.*?) \|", EngramMoEConfig.preset.__doc__, re.M
    )
    assert [row[0] for row in rows] == list(PRESETS)

    def number(text):
        value, _, unit = text.partition(" ")
        return 0 if text == "none" else float(value) * {"million": 1e6, "billion": 1e9}[unit]

    for name, *sizes in rows:
        config = EngramMoEConfig.preset(name)
        counted = count_parameters(config)
        for said, found in zip(sizes, (counted.total, counted.active, counted.tables), strict=True):
            assert found == pytest.approx(number(said), rel=0.05), name
        if config.engram_layer_ids and name != "engram-40b":
            assert 0.2 <= counted.memory_share <= 0.26
            assert config.hidden_size / 2 <= config.engram_width <= config.hidden_size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothere", "nothere is no folder, no repository .user/model. and no preset: tiny, 100m"),
        ("engram-27b", "engram-27b is a preset, which has no weights. EngramMoEConfig.preset"),
        ("output/run/checkpoint-4", "is no folder, no repository"),
        ("/nowhere/at/all", "is no folder, no repository"),
        ("../nothere", "is no folder, no repository"),
        ("here/nothere", "here/nothere is no folder, though here is one"),
    ],
)
def test_a_wrong_name_is_said_at_once_and_nobody_asks_the_hub(hub, monkeypatch, tmp_path, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        EngramMoEConfig.from_pretrained(name)
    assert not hub.requests
    with pytest.raises(OSError):
        EngramMoEConfig.from_pretrained("user/nothere")
    assert hub.requests


# Values that a damaged or mistyped config may hold.
WRONG = [None, True, 0, 1, -1, 1.5, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "x", "auto", "int8"]
WRONG += [[], [1], ["a"], [None], [[1]], {}, {"a": 1}, {"ids": "x"}, "9" * 50, [2**63]]
EXTRA = ["engram_n_head", "engram_width", "num_labels", "dtype", "torch_dtype", "name_or_path", "auto_map", "head_dim"]
EXTRA += ["quantization_config", "rope_scaling", "rope_theta", "attn_implementation", "_attn_implementation", "to_dict"]
EXTRA += ["configuration_files", "per_layer_config", "id2label", "label2id", "layer_types", "text_config", "validate"]
EXTRA += ["partial_rotary_factor", "problem_type", "architectures", "model_type", "num_experts", "mlp_layer_types"]
EXTRA += ["num_local_experts", "output_attentions", "sub_configs_defaults", "max_length", "num_beams"]
TEXTS = [
    "",
    "[]",
    "1",
    "null",
    '"x"',
    "[" * 100_000,
    '{"a": ' * 100_000,
    '{"vocab_size": ' + "1" * 5000 + "}",
    "\ufffe{",
]


def damaged(content, rng):
    """The text of a config with one or two faults."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 2])):
        way = rng.choice(["set", "set", "set", "drop", "add", "rope"])
        name, value = rng.choice(sorted(content)), copy.deepcopy(rng.choice(WRONG))
        if way == "drop":
            del content[name]
        elif way == "rope" and isinstance(content.get("rope_parameters"), dict):
            content["rope_parameters"][rng.choice([*content["rope_parameters"], "hybrid", "attention_factor"])] = value
        else:
            content[rng.choice(EXTRA) if way == "add" else name] = value
    text = json.dumps(content)
    return rng.choice([text] * 20 + [text[: rng.randrange(len(text))], rng.choice(TEXTS)])


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_config_is_read_in_full_or_named_with_its_field(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0}
    tiny_config(rope_parameters={**yarn, "mscale_all_dim": 1.0}).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        (tmp_path / "config.json").write_text(damaged(content, rng))
        try:
            config = EngramMoEConfig.from_pretrained(tmp_path)
        except (OSError, ValueError) as error:
            refused += 1
            assert "config.json" in str(error) and len(str(error)) < 1500, (seed, error)
            continue
        try:
            assert count_parameters(config).total > 0
        except ValueError as error:
            # Which kernels there are is known when a model is built.
            assert "attn_implementation" in str(error), seed
    assert 150 < refused < 290

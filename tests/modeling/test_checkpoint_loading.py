"""Checkpoints: what is written, what is refused, and what dtype arguments leave alone."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny import BACKBONE, tiny_config, tiny_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, push_engram
from engram_hf.modeling.checkpoint_saving import CODE_FILES


def edit_weights(folder, edit, name=BACKBONE):
    """Change the tensors of one file of a checkpoint; its index still promises what it promised."""
    weights = load_file(folder / name)
    edit(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def table_file(folder, layer):
    (path,) = folder.glob(f"tables-layer-{layer:02d}-*.safetensors")
    return path.name


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_loading_in_any_dtype_leaves_tables_as_they_are(tmp_path, table_dtype, dtype):
    model = tiny_model(tiny_config(engram_table_dtype=table_dtype))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert loaded.model.layers[0].engram.value_proj.weight.dtype == expected
    for before, after in zip(model.model.tables(), loaded.model.tables(), strict=True):
        assert after.dtype == getattr(torch, table_dtype)
        assert all(torch.equal(b, a) for b, a in zip(before.blocks, after.blocks, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_loading_in_half_precision_leaves_the_router_and_the_mixing_of_streams_in_single(tmp_path, dtype):
    model = tiny_model(tiny_config(hc_mult=4))
    model.save_pretrained(tmp_path)
    if dtype == "auto":
        model.to(torch.bfloat16).save_pretrained(tmp_path)
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters():
        is_single = any(part in name for part in ("mlp.gate.", "_hc.", "hc_head.", ".table."))
        assert (tensor.dtype == torch.float32) == is_single, name


def test_saving_writes_the_actual_table_dtype(tmp_path):
    model = tiny_model()
    assert model.config.engram_table_dtype is None
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.engram_table_dtype, config.dtype) == ("float32", torch.bfloat16)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_checkpoint_gives_the_same_logits(tmp_path, shard):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    ids = tiny_ids(2, 9)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("order", [("5GB", "20KB"), ("20KB", "5GB"), ("20KB", "40KB")])
def test_saving_over_an_older_checkpoint_leaves_none_of_it(tmp_path, order):
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size=order[0])
    model = tiny_model(seed=2)
    model.save_pretrained(tmp_path, max_shard_size=order[1])
    ids = tiny_ids(2, 9)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_missing_block_is_an_error_that_names_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    edit_weights(tmp_path, lambda w: w.pop("model.layers.2.engram.table.blocks.3"), table_file(tmp_path, 2))
    with pytest.raises(ValueError, match=r"promises model.layers.2.engram.table.blocks.3 in tables-layer-02"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.2.engram.table.blocks.3"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the memory: layers.2.engram.table.blocks.3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate.weight", "model.norm.weight", "model.layers.0.engram.key_norm.weight"]
)
def test_any_missing_tensor_is_an_error_that_names_it(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the .*: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "lm_head.weight"])
def test_integers_where_floats_belong_are_an_error(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({name: weights[name].int()}))
    with pytest.raises(ValueError, match=f"{name} .* is int32, and must be of a floating type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_a_block_of_another_type_is_an_error(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    name = "model.layers.0.engram.table.blocks.0"
    edit_weights(tmp_path, lambda w: w.update({name: w[name].to(dtype)}), table_file(tmp_path, 0))
    with pytest.raises(ValueError, match=f"{name} .* must be float32 .*from one"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_misshapen_block_is_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    name = "model.layers.0.engram.table.blocks.0"
    edit_weights(tmp_path, lambda w: w.update({name: w[name][:-1].clone()}), table_file(tmp_path, 0))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=r"another shape: .*blocks.0 is \(52, 8\), needs \(53, 8\)"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_the_head_of_another_task_may_be_new(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.model.tables()[0].blocks[0], model.model.tables()[0].blocks[0])


def test_code_and_auto_map_come_with_the_weights_or_not_at_all(tmp_path):
    model = tiny_model()
    with_code, without = tmp_path / "with", tmp_path / "without"
    model.save_pretrained(with_code)
    assert {path.name for path in with_code.glob("*.py")} == set(CODE_FILES)
    assert set(AutoConfig.from_pretrained(with_code).auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForDecision",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    # Loaded with a map, saved without: no name may point to files that are not there.
    AutoModelForCausalLM.from_pretrained(with_code).save_pretrained(without, with_code=False)
    assert not list(without.glob("*.py"))
    assert not hasattr(AutoConfig.from_pretrained(without), "auto_map")


def test_weights_without_a_config_are_refused_before_a_model_is_built(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    for reader in (EngramMoEConfig, EngramMoEForCausalLM):
        with pytest.raises(FileNotFoundError, match="has no config.json.*config="):
            reader.from_pretrained(tmp_path)
    ids = tiny_ids(2, 9)
    loaded = EngramMoEForCausalLM.from_pretrained(tmp_path, config=EngramMoEConfig(**content)).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "llama"}))
    with pytest.raises(ValueError, match="is that of another model: model_type is 'llama'"):
        EngramMoEForCausalLM.from_pretrained(tmp_path)


def test_a_repository_without_a_config_needs_one_given(hub, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    push_engram(tmp_path / "model", "user/tiny")
    HfApi(token="hf_nobody").delete_file("config.json", "user/tiny")
    with pytest.raises(FileNotFoundError, match="user/tiny has no config.json"):
        EngramMoEForCausalLM.from_pretrained("user/tiny")
    loaded = EngramMoEForCausalLM.from_pretrained("user/tiny", config=model.config).eval()
    ids = tiny_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)

"""Checkpoints: what is written, what is refused, and what dtype arguments leave alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from engram_hf.modeling.engram_loading import CODE_FILES


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


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
    edit_weights(tmp_path, lambda weights: weights.pop("model.layers.2.engram.table.blocks.3"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the memory: model.layers.2.engram.table.blocks.3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_misshapen_block_is_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)

    def cut(weights):
        weights["model.layers.0.engram.table.blocks.0"] = weights["model.layers.0.engram.table.blocks.0"][:-1].clone()

    edit_weights(tmp_path, cut)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another shape: .*blocks.0 is \(52, 8\), needs \(53, 8\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


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
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    # Loaded with a map, saved without: no name may point to files that are not there.
    AutoModelForCausalLM.from_pretrained(with_code).save_pretrained(without, with_code=False)
    assert not list(without.glob("*.py"))
    assert not hasattr(AutoConfig.from_pretrained(without), "auto_map")

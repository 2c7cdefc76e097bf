"""LoRA on every part of an EngramMoE: adapters without tables, exact to load, merge and unmerge."""

import pytest
import torch
from cases import slow
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from engram_hf import engram_optimizers, lora_config


PARTS = [{}, {"experts": True}, {"memory": False}, {"attention": False}]


def adapted(model, **parts):
    torch.manual_seed(3)
    # Drawn at random: an adapter begins at zero, which would hide what is wrong.
    return get_peft_model(model, lora_config(r=2, init_lora_weights=False, **parts))


def exact_model():
    model = tiny_model(tiny_config(engram_table_dtype="float64")).double()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("parts", PARTS)
def test_an_adapter_has_no_table_in_it_and_loads_exactly(tmp_path, parts):
    model = adapted(tiny_model(), **parts).eval()
    ids = tiny_ids(2, 9)
    expected = model(input_ids=ids).logits
    assert not torch.allclose(expected, tiny_model()(ids).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and not any("table" in name for name in names)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("parts", PARTS)
def test_an_adapter_merges_and_unmerges_exactly(parts):
    base = exact_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base, **parts).double().eval()
    ids = tiny_ids(2, 9)
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)
    plain = model.unload()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-9, atol=1e-9, msg=name)


def train(model, out, resume=None, **changes):
    fields = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    args = TrainingArguments(str(out), report_to=[], use_cpu=True, disable_tqdm=True, **{**fields, **changes})
    Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(32, 9)],
        optimizer_cls_and_kwargs=engram_optimizers(args, work_folder=out.parent / "work"),
    ).train(resume_from_checkpoint=resume)
    return model


def made(folder, trains_tables, tier="cpu"):
    tables = {f"model.layers.{layer}.engram.table": tier for layer in (0, 2)}
    model = adapted(AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu", **tables}), experts=True)
    for table in model.get_base_model().model.tables():
        table.requires_grad_(trains_tables)
    return model


@pytest.mark.parametrize(
    ("trains_tables", "tier"), [(True, "disk"), slow(True, "cpu"), slow(False, "cpu"), slow(False, "disk")]
)
def test_adapters_train_with_tables_or_without_and_resume_bit_for_bit(tmp_path, trains_tables, tier):
    tiny_model().save_pretrained(tmp_path / "base")
    before = tiny_model().state_dict()
    model = train(made(tmp_path / "base", trains_tables, tier), tmp_path / "run")
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in before:
            is_moved = not torch.equal(tensor, before[plain])
            assert is_moved == (trains_tables and ".table." in plain), plain
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert not list(checkpoint.glob("tables-*"))
    resumed = train(made(tmp_path / "base", trains_tables, tier), tmp_path / "run", str(checkpoint))
    for (name, one), (_, two) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_nothing_to_adapt_is_refused():
    with pytest.raises(ValueError, match="nothing to adapt"):
        lora_config(attention=False, memory=False)

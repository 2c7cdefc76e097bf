"""accelerate's own doors: the same numbers, or a refusal that names from_pretrained."""

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import EngramMoEForCausalLM


TABLES = ["model.layers.0.engram.table", "model.layers.2.engram.table"]
PLACED = {"": "cpu", TABLES[0]: "disk", TABLES[1]: "cpu"}
FIRST_LAYER_ON_DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.layers.2", "model.norm", "model.hc_head"], "cpu"),
    "model.layers.0": "disk",
    "lm_head": "cpu",
}
REFUSAL = r"whole weights in every forward.* from_pretrained\(folder, device_map="


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(tiny_ids(2, 9)).logits


def empty_model():
    with init_empty_weights():
        return EngramMoEForCausalLM(tiny_config()).eval()


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto"])
def test_load_checkpoint_and_dispatch_gives_resident_tables(folder, device_map):
    model = load_checkpoint_and_dispatch(empty_model(), str(folder), device_map=device_map)
    torch.testing.assert_close(logits(model), logits(load(folder)))
    assert all(set(table.tiers) == {"resident"} for table in model.engram_tables())


def test_load_checkpoint_and_dispatch_to_disk_is_refused(folder, tmp_path):
    model = load_checkpoint_and_dispatch(
        empty_model(), str(folder), device_map=FIRST_LAYER_ON_DISK, offload_folder=str(tmp_path / "offload")
    )
    with pytest.raises(ValueError, match=REFUSAL):
        logits(model)


def test_dispatch_model_on_one_device_moves_only_what_is_resident(folder):
    model = load(folder, device_map=PLACED)
    before = logits(model)
    dispatched = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(dispatched), before)
    assert [set(table.tiers) for table in dispatched.engram_tables()] == [{"disk"}, {"host"}]


def test_dispatch_model_to_disk_is_refused(tmp_path):
    model = dispatch_model(
        tiny_model(), FIRST_LAYER_ON_DISK, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    with pytest.raises(ValueError, match=REFUSAL):
        logits(model)


@pytest.mark.parametrize("device_map", [None, PLACED])
def test_cpu_offload_is_refused(folder, device_map):
    with pytest.raises(ValueError, match=REFUSAL):
        logits(cpu_offload(load(folder, device_map=device_map), execution_device="cpu"))


def test_disk_offload_is_refused(folder, tmp_path):
    model = load(folder)
    disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    with pytest.raises(ValueError, match=REFUSAL):
        logits(model)


@pytest.mark.parametrize("limit", [40_000, 60_000])
def test_a_map_that_accelerate_infers_is_one_for_from_pretrained(folder, tmp_path, limit):
    device_map = infer_auto_device_map(load(folder), max_memory={"cpu": limit}, no_split_module_classes=[])
    assert "disk" in device_map.values()
    model = load(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert {tier for table in model.engram_tables() for tier in table.tiers} & {"disk"}
    torch.testing.assert_close(logits(model), logits(load(folder)))


def test_layers_of_the_backbone_may_be_offloaded_beside_tables_on_their_tiers(folder, tmp_path):
    device_map = {**FIRST_LAYER_ON_DISK, TABLES[0]: "cpu", f"{TABLES[1]}.blocks.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert model.model.layers[0].self_attn.o_proj.weight.is_meta
    assert [sorted(table.tiers) for table in model.engram_tables()] == [["host"], ["disk", "resident"]]
    torch.testing.assert_close(logits(model), logits(load(folder)))


def test_prepare_leaves_tables_where_they_are(folder):
    model = load(folder, device_map=PLACED)
    before = logits(model)
    prepared = Accelerator(cpu=True).prepare(model)
    assert torch.equal(logits(prepared), before)
    assert [set(table.tiers) for table in prepared.engram_tables()] == [{"disk"}, {"host"}]

"""What inspects, verifies, quantizes, plans and pushes checkpoints knows those with an added memory."""

import json

import pytest
import torch
from architectures import draw, tiny_backbone, tiny_memory, with_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_hf import (
    add_engram,
    count_parameters,
    estimate_memory,
    gather_facts,
    inspect_checkpoint,
    load_engram,
    push_engram,
    quantize_tables,
    remove_engram,
    save_engram,
    verify_tables,
)


EAGER = {"attn_implementation": "eager"}


def some_ids(batch: int = 2, seq: int = 9) -> torch.Tensor:
    return torch.randint(3, 99, (batch, seq), generator=torch.Generator().manual_seed(0))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **EAGER, **options).eval()


@pytest.fixture(params=["llama", "falcon", "alone"])
def saved(request, tmp_path):
    """A model with a memory, and the folder of both or of the memory."""
    is_alone = request.param == "alone"
    model = with_memory(tiny_backbone("llama" if is_alone else request.param))
    if is_alone:
        save_engram(model, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved", is_alone


def test_inspecting_shows_tables_and_sizes(saved):
    model, folder, is_alone = saved
    found = inspect_checkpoint(folder)
    expected = model.engram_tables()
    assert [table.rows for table in found.tables] == [table.rows for table in expected]
    assert [table.head_dim for table in found.tables] == [8, 8]
    end = "engram" if is_alone else "engram.default"
    assert all(table.name.endswith(f"{layer}.{end}.table") for table, layer in zip(found.tables, (0, 2), strict=True))
    assert found.fingerprint == model.engram_memory().ngram_hash.config.engram_fingerprint
    assert found.tables_nbytes == sum(table.nbytes for table in expected)
    of_memory = sum(tensor.nbytes for name, tensor in model.state_dict().items() if ".engram." in name)
    assert (found.backbone_nbytes + found.tables_nbytes == of_memory) is is_alone


def test_verifying_reads_every_byte(saved):
    _, folder, _ = saved
    files = verify_tables(folder)
    assert len(files) == len(list(folder.glob("*.safetensors")))
    path = folder / "tables-layer-02-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="are not what was saved: tables-layer-02"):
        verify_tables(folder)


def test_verifying_and_inspecting_refuse_what_loading_refuses(saved):
    _, folder, _ = saved
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for field, value, message in [
        ("head_dim", 16, "memory of another shape"),
        ("seed", 1, "differs in: multipliers"),
        ("layer_ids", [0, 1], "tensors of the memory"),
    ]:
        changed = json.loads(path.read_text())
        changed["engram"]["memories"]["default"][field] = value
        path.write_text(json.dumps(changed))
        for look in (verify_tables, inspect_checkpoint):
            with pytest.raises(ValueError, match=message):
                look(folder)
        path.write_text(json.dumps(content))
    verify_tables(folder)


def test_a_config_of_the_backbone_that_was_changed_is_noticed(tmp_path):
    with_memory(tiny_backbone("llama")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["backbone"]["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="says rms_norm_eps = 0.001, and the model was saved with 1e-06"):
        verify_tables(tmp_path)


@pytest.mark.parametrize("row_format", ["float8_e4m3fn", "int8", "int4"])
def test_tables_are_quantized(saved, tmp_path, row_format):
    model, folder, is_alone = saved
    quantize_tables(folder, tmp_path / "small", row_format)
    verify_tables(tmp_path / "small")
    loaded = (
        load_engram(tiny_backbone("llama"), tmp_path / "small")
        if is_alone
        else load(tmp_path / "small", device_map={"": "cpu", "...table": "disk"})
    )
    assert {table.dtype for table in loaded.engram_tables()} == {row_format}
    exact, near = model(some_ids()).logits, loaded(some_ids()).logits
    assert 0 < (exact - near).abs().max() < 0.2 * exact.abs().max()
    with pytest.raises(ValueError, match="already; start from the original"):
        quantize_tables(tmp_path / "small", tmp_path / "smaller")
    again = tmp_path / "again"
    save_engram(loaded, again)
    other = load_engram(remove_engram(loaded), again)
    assert torch.equal(other(some_ids()).logits, near)


@pytest.mark.parametrize("model_type", ["llama", "falcon", "mixtral"])
def test_a_plan_is_what_loading_takes(tmp_path, model_type):
    model = with_memory(tiny_backbone(model_type))
    model.save_pretrained(tmp_path)
    counted = count_parameters(tmp_path)
    names = {name: p.numel() for name, p in model.named_parameters() if ".row_gradients." not in name}
    assert counted.total == sum(names.values())
    assert counted.tables == sum(size for name, size in names.items() if ".table." in name) > 0
    experts = sum(size for name, size in names.items() if ".experts." in name)
    assert counted.routed_experts == experts and (experts > 0) is (model_type == "mixtral")
    vocabulary = 99 * 32 * (1 if model.config.tie_word_embeddings else 2)
    assert counted.active == counted.total - counted.tables - vocabulary - experts // 2
    for device_map in ("cpu", {"": "cpu", "...table": "disk"}):
        estimate = estimate_memory(tmp_path, device_map)
        loaded = load(tmp_path, device_map=device_map)
        tiers = {"resident": "cpu"}
        placed: dict = {}
        for table in loaded.engram_tables():
            for tier, nbytes in table.tiers.items():
                placed[tiers.get(tier, tier)] = placed.get(tiers.get(tier, tier), 0) + nbytes
        assert estimate.tables == placed
        rest = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        nbytes = sum(t.nbytes for n, t in rest.items() if ".table." not in n)
        assert estimate.backbone == {"cpu": nbytes}
        assert estimate.step["cpu"] > 0
    estimate = estimate_memory(tmp_path, "cpu", "bfloat16")
    loaded = load(tmp_path, dtype=torch.bfloat16)
    rest = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    in_memory = sum(t.nbytes for n, t in rest.items() if ".table." not in n and t.is_floating_point())
    assert estimate.backbone["cpu"] == pytest.approx(in_memory, abs=64)


def test_both_forms_are_pushed_with_a_card_and_loaded_from_the_hub(tmp_path, hub, tokenizer):
    backbone = tiny_backbone("llama", vocab_size=600)
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    model = add_engram(load(tmp_path / "backbone"), tiny_memory(compressed_vocab_size="auto"), tokenizer)
    draw(model, 1, "default")
    facts = model.engram_memory().ngram_hash.config.facts
    facts.base_model = "user/backbone"
    ids = tokenizer("a text", return_tensors="pt")["input_ids"]

    push_engram(model, "user/whole", card={"license": "apache-2.0"})
    whole = load("user/whole", device_map={"": "cpu", "...table": "disk"})
    assert torch.equal(whole(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained("user/whole")("a text")["input_ids"] == ids[0].tolist()

    save_engram(model, tmp_path / "memory")
    pushed = push_engram(tmp_path / "memory", "user/memory")
    assert {file.name for file in pushed.files["user/memory"]} == {
        "README.md",
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tables-layer-00-00001-of-00001.safetensors",
        "tables-layer-02-00001-of-00001.safetensors",
    }
    other = load_engram(load(tmp_path / "backbone"), "user/memory", device_map={"...table": "disk"})
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert {tier for table in other.engram_tables() for tier in table.tiers} == {"disk"}
    with pytest.raises(ValueError, match="keeps its tables beside it. Leave tables_repo="):
        push_engram(model, "user/whole", "user/tables")


def test_cards_name_the_base_model_and_how_to_load(tmp_path):
    from engram_hf import render_card

    model = with_memory(tiny_backbone("llama"))
    model.engram_memory().ngram_hash.config.facts.base_model = "user/backbone"
    model.save_pretrained(tmp_path / "whole")
    save_engram(model, tmp_path / "alone")
    whole, alone = (render_card(gather_facts(tmp_path / name, repo_id=f"user/{name}")) for name in ("whole", "alone"))
    for card in (whole, alone):
        assert (
            "base_model:\n- user/backbone\n" in card and "- engram_memory" in card and "trust_remote_code" not in card
        )
        assert "MLA" not in card and "3 layers, hidden size 32" in card
    assert "pipeline_tag: text-generation" in whole and "import engram_hf" in whole and "A LlamaForCausalLM to" in whole
    assert "`layers.0.engram.default.table`" in whole and '"...table": "disk"' in whole
    assert 'AutoModelForCausalLM.from_pretrained("user/backbone")' in alone
    assert 'load_engram(model, "user/alone", device_map={"...table": "disk"})' in alone
    assert "pipeline_tag" not in alone

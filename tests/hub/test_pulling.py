"""What comes from a Hub: only what is asked for, whole and at one commit, or an error and nothing in the cache."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import EngramMoEForCausalLM, fetch_blocks, inspect_checkpoint, verify_tables


ON_DISK = {"": "cpu", "model.layers.0.engram.table": "disk", "model.layers.2.engram.table": "disk"}
TABLE = "tables-layer-02-00001-of-00001.safetensors"


@pytest.fixture
def model(hub):
    model = tiny_model(tiny_config(engram_table_dtype="float32"))
    model.push_to_hub("user/tiny", max_shard_size="5MB")
    hub.forget()
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids(2, 17)).logits


@pytest.mark.parametrize("device_map", ["cpu", ON_DISK])
def test_a_model_comes_back_as_it_was(hub, model, device_map):
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=device_map)
    assert_same_logits(logits(pulled), logits(model))
    weights = {name: count for name, count in hub.sent.items() if name.endswith(".safetensors")}
    assert weights == {name: len(hub.files("user/tiny")[name]) for name in weights}, "sent more than once"
    hub.forget()
    AutoModelForCausalLM.from_pretrained("user/tiny", device_map=device_map)
    assert not hub.sent


def test_tables_on_disk_are_read_where_the_cache_has_them(hub, model, tmp_path):
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    blobs = {path.resolve() for path in (tmp_path / "cache").rglob("*.safetensors")}
    used = {block.file.resolve() for table in pulled.engram_tables() for block in table.blocks}
    assert used <= blobs and all(path.parent.name == "blobs" for path in used)
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in used)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = [path.stat().st_size for path in files]
    assert sizes.count(next(iter(used)).stat().st_size) == 1, "a copy lies somewhere"


def test_a_part_of_a_table_brings_its_file_only(hub, model):
    blocks = fetch_blocks("user/tiny", layers=[2], blocks=[0, 3])
    assert list(hub.sent) == ["model.safetensors.index.json", TABLE]
    table = model.model.layers[2].engram.table
    assert {name: rows.shape for name, rows in blocks.items()} == {
        f"model.layers.2.engram.table.blocks.{i}": table.blocks[i].shape for i in (0, 3)
    }
    assert torch.equal(blocks["model.layers.2.engram.table.blocks.3"], table.blocks[3])
    for wanted, message in [({"layers": [1]}, "no layer 1"), ({"blocks": [9]}, "no block 9")]:
        with pytest.raises(ValueError, match=message):
            fetch_blocks("user/tiny", **wanted)
    with pytest.raises(TypeError, match="but not rows"):
        fetch_blocks("user/tiny", rows=[1])


def test_inspecting_reads_headers_only(hub, model):
    found = inspect_checkpoint("user/tiny")
    assert found.tables_nbytes == sum(table.nbytes for table in model.engram_tables())
    assert not any(name.startswith("tables") and ("GET", name) in hub.requests for name in hub.files("user/tiny"))


def test_a_download_that_breaks_goes_on(hub, model, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # What the client keeps, it keeps in whole pieces of this size; after six requests that bring none it gives up.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    hub.break_download[TABLE] = 10 * [100]
    with pytest.raises(HTTPError):
        AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    complete = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert TABLE not in complete and complete
    hub.forget()
    hub.break_download[TABLE] = [5000, 4000]
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    assert_same_logits(logits(pulled), logits(model))
    assert hub.sent[TABLE] == len(hub.files("user/tiny")[TABLE]), "what was there was sent again"
    assert not complete & set(hub.sent), "a file that was whole was sent again"


@pytest.mark.parametrize("served", ["flipped", "of another model"])
def test_other_bytes_than_the_index_promises_are_an_error_and_leave_nothing(hub, model, served):
    content = bytearray(hub.files("user/tiny")[TABLE])
    if served == "flipped":
        content[-5] ^= 4
    else:
        tiny_model(tiny_config(engram_table_dtype="float32"), seed=1).push_to_hub("user/other")
        content = hub.files("user/other")[TABLE]
    hub.served[TABLE] = bytes(content)
    with pytest.raises(ValueError, match=f"not what its index promises: {TABLE}"):
        AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    hub.served.clear()
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    assert_same_logits(logits(pulled), logits(model))


def test_what_was_in_the_cache_before_is_left_to_verify_and_nothing_is_written_there(hub, model, tmp_path):
    content = bytearray(hub.files("user/tiny")[TABLE])
    content[-5] ^= 4
    hub.served[TABLE] = bytes(content)
    snapshot_download("user/tiny")
    files = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    EngramMoEForCausalLM.from_pretrained("user/tiny")
    with pytest.raises(ValueError, match=f"are not what was saved: {TABLE}"):
        verify_tables("user/tiny")
    # huggingface_hub remembers there which files a repository does not have.
    added = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()} - files
    assert all(".no_exist" in path.parts for path in added), added
    hub.served.clear()
    pulled = EngramMoEForCausalLM.from_pretrained("user/tiny", force_download=True)
    assert_same_logits(logits(pulled), logits(model))
    assert verify_tables("user/tiny")


def test_a_push_between_two_files_does_not_mix_them(hub, model):
    newer = tiny_model(tiny_config(engram_table_dtype="float32"), seed=1)
    first = hub.commits("user/tiny")[-1][0]
    hub.before[f"/user/tiny/resolve/{first}/{TABLE}"] = lambda: newer.push_to_hub("user/tiny")
    pulled = EngramMoEForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    assert len(hub.commits("user/tiny")) == 2
    assert_same_logits(logits(pulled), logits(model))


def test_revisions(hub, model):
    first = hub.commits("user/tiny")[-1][0]
    newer = tiny_model(tiny_config(engram_table_dtype="float32"), seed=1)
    newer.push_to_hub("user/tiny", revision="next")
    hub.forget()
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/tiny", revision="next")), logits(newer))
    for revision in ("main", first):
        pulled = AutoModelForCausalLM.from_pretrained("user/tiny", revision=revision, device_map=ON_DISK)
        assert_same_logits(logits(pulled), logits(model))
    with pytest.raises(OSError, match="nowhere is not a valid git identifier"):
        AutoModelForCausalLM.from_pretrained("user/tiny", revision="nowhere")


def test_gated_repositories(hub, model, monkeypatch):
    hub.repositories["user/tiny"].is_gated = True
    for read in (AutoModelForCausalLM.from_pretrained, fetch_blocks, inspect_checkpoint):
        with pytest.raises((OSError, GatedRepoError), match="gated"):
            read("user/tiny")
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", token="hf_invited", device_map=ON_DISK)
    assert_same_logits(logits(pulled), logits(model))
    assert len(fetch_blocks("user/tiny", token="hf_invited")) == 8
    assert len(inspect_checkpoint("user/tiny", token="hf_invited").tables) == 2


def test_offline(hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="offline|cached files|connect"):
        AutoModelForCausalLM.from_pretrained("user/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    AutoModelForCausalLM.from_pretrained("user/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.forget()
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    assert_same_logits(logits(pulled), logits(model))
    assert len(verify_tables("user/tiny")) == 3 and len(fetch_blocks("user/tiny", layers=[0])) == 4
    assert not hub.requests


def test_what_was_pulled_and_saved_again_is_whole(hub, model, tmp_path):
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=ON_DISK)
    pulled.save_pretrained(tmp_path / "again")
    assert len(verify_tables(tmp_path / "again")) == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map=ON_DISK)
    assert_same_logits(logits(again), logits(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["engram_tables_repo"] is None and config["auto_map"]["AutoModelForCausalLM"]

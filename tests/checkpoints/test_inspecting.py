"""What a checkpoint holds is read at one commit, from the Hub or its cache; an error says what is not there."""

import shutil

import pytest
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import inspect_checkpoint


@pytest.fixture
def found(hub):
    tiny_model().push_to_hub("user/tiny")
    return inspect_checkpoint("user/tiny")


def test_config_and_headers_are_of_one_commit(hub, found, tmp_path):
    other = tiny_model(tiny_config(engram_layer_ids=[1]))
    first = hub.commits("user/tiny")[-1][0]
    hub.before[f"/user/tiny/resolve/{first}/config.json"] = lambda: other.push_to_hub("user/tiny")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert inspect_checkpoint("user/tiny") == found
    assert len(hub.commits("user/tiny")) == 2
    assert [table.name for table in inspect_checkpoint("user/tiny").tables] == ["layers.1.engram.table"]


@pytest.mark.parametrize("is_offline", [True, False])
def test_the_cache_takes_the_place_of_a_hub_that_cannot_be_reached(hub, found, monkeypatch, is_offline):
    name, value = ("HF_HUB_OFFLINE", True) if is_offline else ("ENDPOINT", "http://127.0.0.1:9")
    with monkeypatch.context() as patch:
        patch.setattr(f"huggingface_hub.constants.{name}", value)
        with pytest.raises(ConnectionError, match="user/tiny is no folder.*not in the cache"):
            inspect_checkpoint("user/tiny")
    AutoModelForCausalLM.from_pretrained("user/tiny")
    monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    assert inspect_checkpoint("user/tiny") == found


def test_what_is_not_on_the_hub_is_said(hub, found):
    for name, revision, message in [
        ("user/nothere", None, "user/nothere is no folder, and no repository"),
        ("user/tiny", "nobranch", "user/tiny has no revision 'nobranch'"),
        ("output/not/there", None, "is no folder, no repository"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            inspect_checkpoint(name, revision)
    del hub.repositories["user/tiny"].branches["main"][-1][1]["model.safetensors.index.json"]
    with pytest.raises(FileNotFoundError, match="user/tiny holds no safetensors files"):
        inspect_checkpoint("user/tiny")

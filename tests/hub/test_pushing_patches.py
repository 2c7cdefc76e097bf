"""A patch on the Hub: it comes with a card, comes back as it was, and a push that breaks leaves the old one."""

import pytest
import torch
from huggingface_hub import HfApi
from tiny import tiny_ids, tiny_model

from engram_hf import add_patch, load_patch, make_patch, push_patch, save_patch


TABLE = "layers.0.engram.table"


def patch_of(model, name="alice", value=1.0):
    rows = torch.full((3, 8), value)
    return make_patch(model, name, {TABLE: (torch.tensor([3, 5, 8]), rows)}, provenance={"data": "a | <b>", "steps": 7})


def test_a_pushed_patch_comes_back_and_its_card_says_what_it_is(hub):
    model, other = tiny_model(), tiny_model()
    patch = patch_of(model)
    push_patch(patch, "user/alice", base_model="user/tiny", license="apache-2.0")
    add_patch(model, patch)
    add_patch(other, "user/alice")
    assert torch.equal(model(tiny_ids(2, 9)).logits, other(tiny_ids(2, 9)).logits)
    files = hub.files("user/alice")
    card = files["README.md"].decode()
    assert len(hub.commits("user/alice")) == 1 and set(files) >= {"patch.safetensors", "README.md"}
    for said in ("base_model: user/tiny", "license: apache-2.0", "- row-patch", "# alice", 'load_patch("user/alice")'):
        assert said in card, said
    assert f"| `{TABLE}` | 3 | 240 | 8 x float32 |" in card and "* data: a \\| &lt;b>" in card and "* steps: 7" in card
    with pytest.raises(ValueError, match="but not trust"):
        load_patch("user/alice", trust=True)


def test_a_later_push_keeps_what_somebody_wrote_into_the_card(hub, tmp_path):
    model = tiny_model()
    push_patch(patch_of(model), "user/alice")
    api = HfApi(token="hf_nobody")
    mine = hub.files("user/alice")["README.md"].decode().replace("# alice", "# Mine\n\nMy own words.\n\n## More")
    api.upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="user/alice")
    push_patch(save_patch(patch_of(model, value=2.0), tmp_path / "alice"), "user/alice", base_model="user/tiny")
    card = hub.files("user/alice")["README.md"].decode()
    assert "My own words." in card and card.count("engram-hf patch: begin") == 1 and "base_model: user/tiny" in card
    assert float(load_patch("user/alice").tables[TABLE].rows[0, 0]) == 2.0
    # What a later push gives takes the place of what the card has; what it leaves out stays.
    push_patch(patch_of(model), "user/alice", base_model="user/other", license="mit")
    push_patch(patch_of(model, value=2.0), "user/alice", license="apache-2.0")
    card = hub.files("user/alice")["README.md"].decode()
    assert "base_model: user/other" in card and "user/tiny" not in card
    assert "license: apache-2.0" in card and "mit" not in card.split("---")[1] and "My own words." in card
    broken = card.replace("<!-- engram-hf patch: end -->", "")
    api.upload_file(path_or_fileobj=broken.encode(), path_in_repo="README.md", repo_id="user/alice")
    with pytest.raises(ValueError, match="cannot be read"):
        push_patch(patch_of(model), "user/alice")


def test_a_push_that_breaks_leaves_the_old_patch(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model = tiny_model()
    push_patch(patch_of(model), "user/alice")
    before = hub.files("user/alice")
    hub.break_upload = {0: 100}
    with pytest.raises((RuntimeError, OSError)):
        push_patch(patch_of(model, value=2.0), "user/alice")
    assert hub.files("user/alice") == before
    hub.break_upload = {}
    push_patch(patch_of(model, value=2.0), "user/alice")
    assert float(load_patch("user/alice").tables[TABLE].rows[0, 0]) == 2.0
    file = save_patch(patch_of(model), tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        push_patch(file, "user/bob")
    assert "user/bob" not in hub.repositories

"""The Hub payload: the folder modeling/ is the source, and it runs where the package cannot be imported."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model

from engram_hf import EngramMoEForSequenceClassification, EngramMoEForTokenClassification
from engram_hf.modeling.configuration_engram_moe import AUTO_MAP
from engram_hf.modeling.engram_publishing import CODE_FILES


ROOT = Path(__file__).parent.parent
PAYLOAD = ROOT / "modeling"
SOURCE = ROOT / "src" / "engram_hf" / "modeling"
CARD = "---\nlibrary_name: transformers\n---\n"


def test_the_folder_holds_the_source_and_the_rendered_config():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from render_payload import render_config
    finally:
        sys.path.pop(0)
    assert {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"} == set(CODE_FILES)
    assert {path.name for path in PAYLOAD.iterdir()} == {*CODE_FILES, "config.json"}
    assert not filecmp.cmpfiles(PAYLOAD, SOURCE, CODE_FILES, shallow=False)[1]
    assert all((PAYLOAD / name).is_symlink() and not os.path.isabs(os.readlink(PAYLOAD / name)) for name in CODE_FILES)
    assert (PAYLOAD / "config.json").read_text() == render_config()


def test_save_pretrained_writes_exactly_these_files(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.glob("*.py")}
    assert written == set(CODE_FILES)
    assert filecmp.cmpfiles(tmp_path, PAYLOAD, CODE_FILES, shallow=False)[0] == list(CODE_FILES)


class RecordingHub:
    """Stands in for huggingface_hub's client, and keeps what would have been uploaded."""

    def __init__(self):
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **kwargs):
        self.files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}


@pytest.mark.parametrize("door", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_weights_code_and_the_whole_auto_map(monkeypatch, tmp_path, door):
    hub = RecordingHub()
    monkeypatch.setattr("transformers.utils.hub._hf_api", hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", lambda *args, **kwargs: ModelCard(CARD))
    model = tiny_model()
    if door == "push_to_hub":
        model.push_to_hub("somebody/engram")
    else:
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/engram")
    assert {name for name in hub.files if name.endswith(".py")} == set(CODE_FILES)
    assert all(hub.files[name] == (SOURCE / name).read_bytes() for name in CODE_FILES)
    assert json.loads(hub.files["config.json"])["auto_map"] == AUTO_MAP
    index = json.loads(hub.files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {name for name in hub.files if name.endswith(".safetensors")}


REMOTE = """
import sys
sys.modules["engram_hf"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
auto, folder, again, out = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
assert model.__class__.__module__.startswith("transformers_modules."), model.__class__.__module__
ids = load_file(folder + "/ids.safetensors")["ids"]
model.save_pretrained(again)
reloaded = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    save_file({"first": model(ids)[0], "second": reloaded(ids)[0]}, out)
"""


@pytest.mark.parametrize(
    ("auto", "build"),
    [
        ("AutoModelForCausalLM", tiny_model),
        ("AutoModel", lambda: tiny_model().model),
        ("AutoModelForSequenceClassification", lambda: EngramMoEForSequenceClassification(tiny_config()).eval()),
        ("AutoModelForTokenClassification", lambda: EngramMoEForTokenClassification(tiny_config()).eval()),
    ],
)
@torch.no_grad()
def test_remote_code_gives_the_logits_of_the_package(tmp_path, auto, build):
    model, ids = build(), tiny_ids(2, 9)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    save_file({"ids": ids}, folder / "ids.safetensors")
    out = tmp_path / "out.safetensors"
    subprocess.run(
        [sys.executable, "-c", REMOTE, auto, str(folder), str(tmp_path / "again"), str(out)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=True,
    )
    results = load_file(out)
    assert torch.equal(results["first"], model(ids)[0]) and torch.equal(results["second"], model(ids)[0])
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == set(CODE_FILES)

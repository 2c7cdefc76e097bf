"""The Hub payload: the folder modeling/ is the source, and it runs where the package cannot be imported."""

import filecmp
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import slow
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model

from engram_hf import EngramMoEForSequenceClassification, EngramMoEForTokenClassification
from engram_hf.modeling.checkpoint_saving import CODE_FILES


ROOT = Path(__file__).parent.parent
PAYLOAD = ROOT / "modeling"
SOURCE = ROOT / "src" / "engram_hf" / "modeling"
CARD = "---\nlibrary_name: transformers\n---\n"


def test_the_folder_holds_the_source_and_the_rendered_config():
    sys.path.insert(0, str(ROOT / "scripts" / "maintenance"))
    try:
        from render_payload import render_config
    finally:
        sys.path.pop(0)
    assert {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"} == set(CODE_FILES)
    assert {path.name for path in PAYLOAD.iterdir()} == {*CODE_FILES, "config.json"}
    assert not filecmp.cmpfiles(PAYLOAD, SOURCE, CODE_FILES, shallow=False)[1]
    assert all((PAYLOAD / name).is_symlink() and not os.path.isabs(os.readlink(PAYLOAD / name)) for name in CODE_FILES)
    assert (PAYLOAD / "config.json").read_text() == render_config()


def test_the_guide_names_the_question_of_every_file():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## The payload\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+\.py)` \| [A-Z].*\? \|$", section, re.MULTILINE)) == sorted(CODE_FILES)


def test_save_pretrained_writes_exactly_these_files(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.glob("*.py")}
    assert written == set(CODE_FILES)
    assert filecmp.cmpfiles(tmp_path, PAYLOAD, CODE_FILES, shallow=False)[0] == list(CODE_FILES)


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
        slow("AutoModel", lambda: tiny_model().model),
        slow("AutoModelForSequenceClassification", lambda: EngramMoEForSequenceClassification(tiny_config()).eval()),
        slow("AutoModelForTokenClassification", lambda: EngramMoEForTokenClassification(tiny_config()).eval()),
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

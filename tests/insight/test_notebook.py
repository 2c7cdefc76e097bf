"""The notebook runs from its first cell to its last, and is kept without outputs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "scripts" / "notebooks" / "look_inside.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_shows_tables_and_pictures(tokenizer, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    model = EngramMoEForCausalLM(EngramMoEConfig.preset("tiny", vocab_size=len(tokenizer)))
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "output" / "tiny")
    tokenizer.save_pretrained(tmp_path / "output" / "tiny")
    shutil.copytree(ROOT / "scripts" / "helpers", tmp_path / "scripts" / "helpers")
    (tmp_path / "scripts" / "notebooks").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path / "scripts" / "notebooks")}}
    # It stops at the first cell that raises.
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    shown = [
        set(output.get("data", ())) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert sum("image/png" in kinds for kinds in shown) == 4 and sum("text/markdown" in kinds for kinds in shown) == 3

"""What the package exports, and that importing it does nothing but register."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import engram_hf


def test_all_is_sorted_complete_and_there():
    assert engram_hf.__all__ == sorted(engram_hf.__all__)
    assert all(hasattr(engram_hf, name) for name in engram_hf.__all__)
    tree = ast.parse(Path(engram_hf.__file__).read_text())
    own = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert sorted(alias.name for node in own for alias in node.names) == engram_hf.__all__


@pytest.mark.parametrize(
    ("auto", "model"),
    [
        (AutoModel, engram_hf.EngramMoEModel),
        (AutoModelForCausalLM, engram_hf.EngramMoEForCausalLM),
        (AutoModelForSequenceClassification, engram_hf.EngramMoEForSequenceClassification),
        (AutoModelForTokenClassification, engram_hf.EngramMoEForTokenClassification),
    ],
)
def test_the_auto_classes_know_the_model(auto, model):
    config = AutoConfig.for_model(
        "engram_moe", hidden_size=16, num_hidden_layers=2, engram_layer_ids=[], vocab_size=8, n_routed_experts=8
    )
    assert isinstance(config, engram_hf.EngramMoEConfig)
    assert auto._model_mapping[type(config)] is model


def test_importing_loads_no_training_library_and_touches_no_global_state():
    code = (
        "import sys, torch, transformers\n"
        "before = (torch.get_default_dtype(), torch.initial_seed(), torch.get_num_threads())\n"
        "import engram_hf\n"
        "assert before == (torch.get_default_dtype(), torch.initial_seed(), torch.get_num_threads())\n"
        "loaded = {'datasets', 'transformers.trainer'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""What the package exports, and that importing it does nothing but register."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modelcard import TrainingSummary

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


def smoothed(logits, labels, epsilon):
    """The loss of each token's logits against the token after it, in double precision."""
    log_probs = logits[:, :-1].double().log_softmax(-1)
    loss, wanted = 0, (labels[:, 1:] != -100).nonzero().tolist()
    for row, i in wanted:
        own = log_probs[row, i]
        loss = loss - (1 - epsilon) * own[labels[row, i + 1]] - epsilon * own.mean()
    return loss / len(wanted)


@torch.no_grad()
def test_label_smoothing_predicts_the_next_token_as_in_stock_models(tmp_path):
    shared = {name: value for name, value in tiny_config().to_dict().items() if not name.startswith(("engram_", "hc_"))}
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**{**shared, "layer_types": None, "model_type": "deepseek_v3"}))
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    ids = tiny_ids(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    for model in (stock.eval(), tiny_model()):
        loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": labels})
        expected = smoothed(model(ids).logits, labels, 0.1)
        torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (engram_hf.EngramMoEForCausalLM, "text-generation"),
        (engram_hf.EngramMoEForSequenceClassification, "text-classification"),
        (engram_hf.EngramMoEForTokenClassification, "token-classification"),
    ],
)
def test_trainers_card_names_the_task(tmp_path, model, task):
    trainer = Trainer(model(tiny_config()), TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    assert TrainingSummary.from_trainer(trainer, model_name="tiny").tasks == task


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

"""The examples in docstrings run, and print what they say.

They find what a reader has at hand: a model with its tokenizer in `output/tiny`, which is what `make demo` leaves, a
checkpoint of a run, somebody else's model in `backbone` and a memory for it in `config`, a model with a table of its
own in `gemma_folder`, a row patch called "alice" in `patch`, and the names `model`, `tokenizer`, `args`, `data`,
`trainer` and `folder`. Examples that need a network are marked `+SKIP`.
"""

import doctest
import importlib
import pkgutil
import shutil

import pytest
import torch
import transformers
from foreign import gemma3n_text, publish
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

import engram_hf
from engram_hf import EngramConfig, EngramMoEConfig, EngramMoEForCausalLM


# Somebody else's model.
BACKBONE = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def documented():
    """Every docstring of the package that has an example."""
    names = [module.name for module in pkgutil.walk_packages(engram_hf.__path__, "engram_hf.")]
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in names]
    return {test.name: test for tests in found for test in tests if test.examples}


TESTS = documented()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("reader")
    model = EngramMoEForCausalLM(EngramMoEConfig.preset("tiny", vocab_size=600))
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(folder / "output" / "tiny")
    tokenizer.save_pretrained(folder / "output" / "tiny")
    publish(gemma3n_text(), folder / "output" / "gemma")
    return folder


@pytest.mark.parametrize("name", TESTS)
def test_an_example_prints_what_it_says(name, saved, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.copytree(saved / "output" / "tiny", tmp_path / "output" / "run" / "checkpoint-500")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("output/tiny")
    data = [{"input_ids": list(range(10)), "labels": list(range(10))}]
    args = TrainingArguments("output/new", max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    table = next(iter(model.named_tables()))
    given = {
        "model": model,
        "patch": engram_hf.make_patch(model, "alice", {table: (torch.tensor([3, 5, 8]), torch.ones(3, 16))}),
        "tokenizer": tokenizer,
        "torch": torch,
        "data": data,
        "args": args,
        "folder": "output/tiny",
        "gemma_folder": "output/gemma",
        "backbone": LlamaForCausalLM(LlamaConfig(**BACKBONE)),
        "config": EngramConfig(layer_ids=[1], vocab_size=1000, n_heads=4, head_dim=16),
        "trainer": Trainer(model, args, train_dataset=data),
        **{name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "Trainer", "TrainingArguments")},
        **{name: getattr(engram_hf, name) for name in engram_hf.__all__},
    }
    # It prints what it logs.
    given["trainer"].remove_callback(ProgressCallback)
    test = TESTS[name]
    for example in test.examples:
        # The end of a fence of Markdown.
        example.want = example.want.removesuffix("```\n")
    test.globs = {**test.globs, **given}
    said = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


def test_what_is_public_has_an_example_or_says_all_in_its_arguments():
    shown = {name.split(".")[-1] for name in TESTS}
    functions = [name for name in engram_hf.__all__ if not isinstance(getattr(engram_hf, name), type)]
    assert {name for name in functions if name not in shown} <= {"read_facts", "plot_training", "quantize_tables"}

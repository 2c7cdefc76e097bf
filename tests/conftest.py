"""Fixtures shared by all tests: a tokenizer trained on real text, and seeds that are the same in every run."""

import pydoc_data.topics

import huggingface_hub
import pytest
import torch
from hub_server import serve_hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import hub as transformers_hub


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 600 ids, pad 0 and eos 1."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(list(pydoc_data.topics.topics.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def pytest_terminal_summary(terminalreporter):
    """What was left out, and how to run it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {(report.nodeid.split("::")[0], report.longrepr[2]) for report in skipped}
    if reasons:
        terminalreporter.section("left out")
    for path, reason in sorted(reasons):
        terminalreporter.write_line(f"{path}: {reason.removeprefix('Skipped: ')}")


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose token `i` is the text `words[i]` as it stands."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, to which every call of huggingface_hub and transformers goes, with a cache of its own."""
    with serve_hub() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        yield server

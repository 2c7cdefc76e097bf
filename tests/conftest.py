"""Fixtures shared by all tests: a tokenizer trained on real text, and seeds that are the same in every run."""

import pydoc_data.topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


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

"""Models for the tests of this folder: what other libraries do with a model of this package.

New bug reports from users go here: a short test that fails before the fix. Each test compares with a stock model of
transformers, or with the same model untouched, and uses public names only.
"""

import re
from collections.abc import Callable

import torch
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM


TABLES = ("model.layers.0.engram.table", "model.layers.2.engram.table")
TIERS = ("resident", "host", "disk")
REFUSALS = (ValueError, NotImplementedError)


def sparse_model(seed: int = 0, **changes):
    """A model with so many rows that a few steps touch less than half of a block: its checkpoints hold changed rows."""
    return tiny_model(tiny_config(engram_vocab_size=2003, engram_block_elements=20_000, **changes), seed)


def load(folder, tier: str = "resident", **options):
    """The checkpoint with all tables of `tests/tiny.py` on one tier."""
    place = {"host": "cpu", "disk": "disk"}.get(tier)
    device_map = None if place is None else {"": "cpu", **dict.fromkeys(TABLES, place)}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options).eval()


@torch.no_grad()
def logits_of(model, ids: torch.Tensor | None = None, **options) -> torch.Tensor:
    return model(input_ids=tiny_ids(2, 11) if ids is None else ids, **options).logits


def right_or_refused(compute: Callable[[], torch.Tensor], expected: torch.Tensor, sentence: str) -> None:
    """Either the numbers are right, or an error says what to do."""
    try:
        actual = compute()
    except REFUSALS as error:
        assert re.search(sentence, str(error)), error
    else:
        assert_same_logits(actual, expected)

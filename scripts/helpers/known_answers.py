"""Score questions with known answers as lm_eval does: the choice whose letters are likeliest wins (its `acc_norm`)."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from engram_hf.insight.text_rows import TextRow, evaluating
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


TASKS = ("facts_trained", "facts_held_out", "reading")


def read_questions(knowledge: Path, task: str) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: gather_knowledge.py has not written them.
    """
    path = knowledge / f"{task}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there. Run: python scripts/experiments/gather_knowledge.py")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows_of_question(tokenizer, question: dict[str, Any]) -> list[TextRow]:
    """One row per choice, of which the tokens of the choice are scored."""
    rows = []
    for choice in question["choices"]:
        ids = tokenizer(question["prompt"] + choice, add_special_tokens=False)["input_ids"]
        in_prompt = len(tokenizer(question["prompt"], add_special_tokens=False)["input_ids"])
        is_scored = torch.arange(len(ids)) >= in_prompt
        rows.append(TextRow(torch.tensor(ids), is_scored, question["kind"]))
    return rows


def score(model, tokenizer, questions: list[dict[str, Any]]) -> dict[str, str]:
    """For each kind of question a digit per question: 1 where the model chose the right answer, otherwise 0.

    Example:
        >>> score(model, tokenizer, [{"kind": "symbol", "prompt": "Symbol:", "choices": [" H", " He"], "answer": 0}])
        {'symbol': '1'}
    """
    found: dict[str, str] = defaultdict(str)
    with evaluating(model):
        for question in questions:
            nats = losses_of_choices(model, rows_of_question(tokenizer, question))
            of_letters = nats / torch.tensor([len(choice) for choice in question["choices"]])
            found[question["kind"]] += str(int(int(of_letters.argmin()) == question["answer"]))
    return dict(found)


def losses_of_choices(model, rows: list[TextRow]) -> torch.Tensor:
    """(choices,) float64: the loss of each choice, summed over its tokens. What all have in front is read once."""
    ids = pad_sequence([row.ids for row in rows], batch_first=True).to(model.device)
    is_scored = pad_sequence([row.is_scored for row in rows], batch_first=True)
    first_scored = int(is_scored.any(0).nonzero()[0])
    shared = int((ids == ids[0]).all(0)[:first_scored].cumprod(0).sum())
    cache = DynamicCache()
    front = model(input_ids=ids[:1, :shared], logits_to_keep=1, use_cache=True, **{CACHE_NAME: cache}).logits
    cache.batch_repeat_interleave(len(rows))
    # Padding stands behind the tokens of a choice, which do not see it.
    rest = model(input_ids=ids[:, shared:], use_cache=True, **{CACHE_NAME: cache}).logits
    logits = torch.cat([front.expand(len(rows), -1, -1), rest[:, :-1]], dim=1)
    of_tokens = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, shared:].flatten(), reduction="none")
    return (of_tokens.double().view(len(rows), -1).cpu() * is_scored[:, shared:]).sum(1)

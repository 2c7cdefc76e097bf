"""Score questions with known answers as lm_eval does: the choice whose letters are likeliest wins (its `acc_norm`)."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from engram_hf.insight.text_rows import TextRow, losses_of_rows


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
    rows = [row for question in questions for row in rows_of_question(tokenizer, question)]
    nats, _ = losses_of_rows(model, rows)
    found, start = defaultdict(str), 0
    for question in questions:
        choices = question["choices"]
        own = nats[start : start + len(choices)] / torch.tensor([len(choice) for choice in choices])
        found[question["kind"]] += str(int(int(own.argmin()) == question["answer"]))
        start += len(choices)
    return dict(found)

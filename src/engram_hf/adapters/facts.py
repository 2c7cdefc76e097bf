"""Facts: prompts and the text that a model is to continue them with, as JSON lines and as token ids.

What makes a memory know them is in memorizing.py.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..insight.text_rows import TextRow


CONTRACT = (
    'A fact is {"prompt": "The capital of Zorvania is", "target": " Oskar"}, and may have "paraphrases" and "related", '
    "two lists of prompts."
)


@dataclass(frozen=True)
class Fact:
    """A prompt, and what the model is to say after it.

    prompt: text, without the space before the target.
    target: text that follows as it stands: it begins with a space where there is one.
    paraphrases: other prompts that ask for the same target. Nothing is trained on them; the report says what the model
        answers.
    related: prompts with another answer, such as some that end in the same words. The report says whether their answer
        has changed.
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    related: tuple[str, ...] = ()


def as_fact(given: Any, where: str) -> Fact:
    """A fact out of a dict, a pair of prompt and target, or a fact.

    Raises:
        ValueError: it is none of these; names `where` it stands.
    """
    if isinstance(given, Fact):
        return given
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        given = {"prompt": given[0], "target": given[1]}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is a {type(given).__name__}. {CONTRACT}")
    names = [field.name for field in fields(Fact)]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{where} has the field {unknown[0]!r}. {CONTRACT}")
    texts = {name: given.get(name) for name in ("prompt", "target")}
    for name, text in texts.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where} has no {name}, which is a text; got {text!r:.80}. {CONTRACT}")
    lists = {name: given.get(name, ()) for name in ("paraphrases", "related")}
    for name, prompts in lists.items():
        if (
            isinstance(prompts, str)
            or not isinstance(prompts, Sequence)
            or not all(isinstance(p, str) for p in prompts)
        ):
            raise ValueError(f"{name} of {where} is {prompts!r:.80}, and must be a list of texts. {CONTRACT}")
    return Fact(str(texts["prompt"]), str(texts["target"]), *(tuple(prompts) for prompts in lists.values()))


def as_facts(given: Any) -> list[Fact]:
    """Facts out of a file of JSON lines, or out of an iterable of what `as_fact` takes.

    Raises:
        FileNotFoundError, OSError: there is no such file.
        ValueError: something is no fact, or there is none, or a prompt is there twice.
    """
    if isinstance(given, str | Path):
        return as_facts(_lines_of(Path(given)))
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise ValueError(f"Facts are a list or a file of JSON lines, got {type(given).__name__}. {CONTRACT}")
    facts = [as_fact(each, f"Fact {number}") for number, each in enumerate(given)]
    if not facts:
        raise ValueError(f"There is no fact. {CONTRACT}")
    known: dict[str, int] = {}
    for number, fact in enumerate(facts):
        if fact.prompt in known:
            raise ValueError(
                f"Facts {known[fact.prompt]} and {number} have the same prompt {fact.prompt!r:.80}, which has one "
                "greedy continuation. Leave one of them out."
            )
        known[fact.prompt] = number
    return facts


def _lines_of(file: Path) -> list[Any]:
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"Line {number} of {file} is no JSON ({error}). {CONTRACT}") from error
    return found


def ids_of(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, as `tokenizer(prompt)` gives them, and those of the target behind it.

    Raises:
        ValueError: the tokenizer cuts prompt and target together elsewhere than between them; there is no token.
    """
    prompt_ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    whole = list(tokenizer(prompt + target, verbose=False)["input_ids"])
    last = getattr(tokenizer, "eos_token_id", None)
    if last is not None and prompt_ids[-1:] == [last] == whole[-1:]:
        # A tokenizer that ends every text.
        prompt_ids, whole = prompt_ids[:-1], whole[:-1]
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            f"The tokenizer makes one token of the end of {prompt!r:.80} and the beginning of {target!r:.80}. Let the "
            "prompt end with a word, and the target begin with the space behind it."
        )
    if not prompt_ids or len(whole) == len(prompt_ids):
        raise ValueError(f"The prompt {prompt!r:.80} or the target {target!r:.80} has no token. Give both some text.")
    return prompt_ids, whole[len(prompt_ids) :]


def row_of(tokenizer: Any, prompt: str, target: str) -> TextRow:
    """Prompt and target as a row of text, in which the tokens of the target are scored.

    Raises:
        ValueError: as `ids_of`.
    """
    prompt_ids, target_ids = ids_of(tokenizer, prompt, target)
    ids = torch.tensor(prompt_ids + target_ids)
    return TextRow(ids, torch.arange(len(ids)) >= len(prompt_ids), prompt)

"""The corpus of the experiments: articles of dictionaries and Python's library, and the facts that are asked for.

Articles are split so that held-out ones share no text with those that are trained on.

A fact is asked in the very words of its article, so that a model that was never taught to answer can still answer. Each
fact is a prompt that the article begins with, and how the article goes on.
"""

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from helpers.dictionaries import Article
from helpers.text import DOCUMENT_CHARACTERS, Document


# One article of so many is held out. The elements are few.
HELD_OUT_EVERY = {"elements": 4}
HELD_OUT_EVERY_ELSE = 16
# Two texts share text where so many words in a row are the same.
SHARED_WORDS = 8
WORDS = re.compile(r"\w+")
# Definitions that are asked for: long enough to name one word, short enough for a prompt.
DEFINITION_CHARACTERS = (40, 120)
ACRONYM = re.compile(r"[A-Z]{3,6}")
EXPANSION = re.compile(r"(?:\d\. )?(?:<[^>]*> )?(?:\([A-Z]+\) )?")
# Facts of a kind that are asked for at most, and wrong answers beside each right one.
MOST_FACTS = {"definition": 400, "acronym": 400, "symbol": 200, "number": 200}
WRONG_ANSWERS = 3


@dataclass
class Entry:
    """An article as it is trained on.

    source: "gcide", "wn", "foldoc", "elements", "jargon", "python", or "dataset" for a text of the user.
    name: its headword or file.
    parts: its senses, paragraphs or lines.
    text: what is trained on, made of both.
    is_asked: a fact of it is asked for.
    """

    source: str
    name: str
    parts: list[str]
    text: str = ""
    is_asked: bool = False

    def as_json(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != "parts"}


@dataclass
class Fact:
    """A question by its prompt. kind: what is asked. choices: how it may go on; the place `answer` is right."""

    kind: str
    prompt: str
    choices: list[str]
    answer: int


def number_of(*parts: str) -> int:
    """A number that depends on the texts alone, evenly spread."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def entries_of(source: str, articles: Iterable[Article]) -> list[Entry]:
    return [Entry(source, article.headword, article.parts) for article in articles]


def entries_of_documents(source: str, documents: Iterable[Document]) -> list[Entry]:
    """Long documents in pieces. The pieces of a document have its name, so they stay on one side of the split."""
    entries = []
    for name, text in documents:
        pieces = [text[start : start + DOCUMENT_CHARACTERS] for start in range(0, len(text), DOCUMENT_CHARACTERS)]
        entries += [Entry(source, name, piece.split("\n\n"), piece) for piece in pieces]
    return entries


def drop_repeated(entries: list[Entry]) -> list[Entry]:
    """Without the parts that an earlier article has, word for word: synonyms have one definition."""
    seen: set[bytes] = set()
    kept = []
    for entry in entries:
        # Of running text, whole pieces are compared.
        parts = [entry.text] if entry.text else entry.parts
        new = []
        for part in parts:
            key = hashlib.sha256(" ".join(WORDS.findall(part.lower())).encode()).digest()[:12]
            # Short parts, such as a number, may repeat.
            if len(part) < 30 or key not in seen:
                new.append(part)
            seen.add(key)
        if any(len(part) >= 30 or entry.source == "elements" for part in new):
            kept.append(Entry(entry.source, entry.name, entry.parts if entry.text else new, entry.text))
    return kept


def write_text(entry: Entry) -> str:
    """The text of an article. Half of the words with a single short sense have the definition first: `sense = word`."""
    if entry.text:
        return entry.text
    if is_definition_first(entry):
        return f"{entry.parts[0]} = {entry.name}"
    return "\n".join([entry.name, *entry.parts])


def is_definition_first(entry: Entry) -> bool:
    shortest, longest = DEFINITION_CHARACTERS
    is_short = entry.source == "wn" and len(entry.parts) == 1 and shortest <= len(entry.parts[0]) <= longest
    is_told = is_short and entry.name.lower() in entry.parts[0].lower()
    return is_short and not is_told and number_of("order", entry.name) % 2 == 0


def is_held_out(entry: Entry) -> bool:
    """By the headword alone, so that one word is on one side in all dictionaries."""
    return number_of(entry.name.lower()) % HELD_OUT_EVERY.get(entry.source, HELD_OUT_EVERY_ELSE) == 0


def runs_of_words(text: str) -> Iterator[str]:
    """Every run of `SHARED_WORDS` words."""
    words = WORDS.findall(text.lower())
    for start in range(len(words) - SHARED_WORDS + 1):
        yield " ".join(words[start : start + SHARED_WORDS])


def split_entries(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Articles to train on, and held-out ones without every part that shares a run of words with the former."""
    train = [entry for entry in entries if not is_held_out(entry)]
    held_out = [entry for entry in entries if is_held_out(entry)]
    runs_held_out = {run for entry in held_out for part in entry.parts for run in runs_of_words(part)}
    shared: set[str] = set()
    for entry in train:
        shared.update(runs_held_out.intersection(runs_of_words("\n".join(entry.parts))))
    kept = []
    for entry in held_out:
        parts = [part for part in entry.parts if shared.isdisjoint(runs_of_words(part))]
        # The ends of parts that stand side by side may share a run that no part has alone.
        if parts and shared.isdisjoint(runs_of_words("\n".join(parts))):
            kept.append(Entry(entry.source, entry.name, parts, "\n\n".join(parts) if entry.text else ""))
    # A definition that lost its only sense is nothing; an article of nothing but short parts says nothing.
    kept = [entry for entry in kept if sum(map(len, entry.parts)) >= 30]
    for entry in train + kept:
        entry.text = write_text(entry)
    # An order in which every beginning is a fair sample.
    return sorted(train, key=order_of), sorted(kept, key=order_of)


def order_of(entry: Entry) -> int:
    return number_of("shuffled", entry.source, entry.name, entry.text)


def facts_of(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """Kind, the beginning of the article, and the answer that it goes on with, for every fact that an article holds."""
    if entry.source == "elements":
        for kind, label in (("symbol", "Symbol: "), ("number", "Atomic number: ")):
            prompt, found, rest = entry.text.partition(label)
            if found:
                yield kind, prompt + label, rest.partition("\n")[0]
    elif is_definition_first(entry):
        yield "definition", f"{entry.parts[0]} = ", entry.name
    elif entry.source == "foldoc" and ACRONYM.fullmatch(entry.name):
        expansion = expand(entry.name, entry.parts[0])
        if expansion is not None:
            yield "acronym", entry.text[: entry.text.index(expansion)], expansion


def expand(acronym: str, text: str) -> str | None:
    """The words at the beginning of a text that the acronym stands for, or None."""
    text = text[EXPANSION.match(text).end() :]
    words = re.findall(r"[^\s.,;:()]+", text)[: len(acronym)]
    if len(words) < len(acronym) or "".join(word[0].upper() for word in words) != acronym:
        return None
    found = re.match(r"[\s]*" + r"[^\w]+".join(re.escape(word) for word in words), text)
    return found.group().strip() if found else None


def choose_facts(entries: list[Entry], seed: int = 0) -> list[Fact]:
    """Facts of these articles with wrong answers of the same kind. Marks the articles that are asked about."""
    found = defaultdict(list)
    for entry in entries:
        for kind, prompt, answer in facts_of(entry):
            if answer.strip() and len(found[kind]) < MOST_FACTS[kind]:
                found[kind].append((prompt, answer))
                entry.is_asked = True
    draw = random.Random(seed)
    facts = []
    for kind, pairs in sorted(found.items()):
        answers = sorted({answer for _, answer in pairs})
        for prompt, answer in pairs:
            others = [other for other in answers if other != answer]
            # The letters of an acronym must not give the answer away, where there are enough that begin alike.
            alike = [other for other in others if other[0] == answer[0]]
            if kind == "acronym" and len(alike) >= WRONG_ANSWERS:
                others = alike
            if len(others) >= WRONG_ANSWERS:
                facts.append(make_fact(kind, prompt, answer, draw.sample(others, WRONG_ANSWERS), draw))
    return facts


def make_fact(kind: str, prompt: str, answer: str, wrong: list[str], draw: random.Random) -> Fact:
    """The space at the end of a prompt belongs to each choice, as tokenizers have it."""
    bare = prompt.rstrip()
    choices = [prompt[len(bare) :] + choice for choice in (answer, *wrong)]
    right = choices[0]
    draw.shuffle(choices)
    return Fact(kind, bare, choices, choices.index(right))


# Reading: the answer stands in the prompt, among three others.

QUESTIONS_OF_A_KIND = 200
LISTED = 6


def choose_reading(held_out: list[Entry], seed: int = 0) -> list[Fact]:
    """Needles, variables, copying, and definitions that are given in the prompt. No article of them was trained on.

    Args:
        held_out: articles. Their names are the words, their definitions are what is given.
    """
    draw = random.Random(seed)
    words = sorted({entry.name for entry in held_out if re.fullmatch("[a-z]{4,8}", entry.name)})
    defined = [(entry.parts[0], entry.name) for entry in held_out if is_definition_first(entry)]
    facts = []
    for _ in range(QUESTIONS_OF_A_KIND):
        if len(words) >= 2 * LISTED:
            facts += [needle(draw.sample(words, LISTED), draw), copying(draw.sample(words, 2 * LISTED), draw)]
        facts.append(variables(draw))
        if len(defined) > WRONG_ANSWERS:
            facts.append(given(draw.sample(defined, 1 + WRONG_ANSWERS), draw))
    return sorted(facts, key=lambda fact: fact.kind)


def needle(words: list[str], draw: random.Random) -> Fact:
    numbers = [str(number) for number in draw.sample(range(100, 1000), len(words))]
    lines = [f"The number of {word} is {number}." for word, number in zip(words, numbers)]
    asked = draw.randrange(len(words))
    wrong = draw.sample(numbers[:asked] + numbers[asked + 1 :], WRONG_ANSWERS)
    return make_fact("needle", "\n".join([*lines, f"The number of {words[asked]} is "]), numbers[asked], wrong, draw)


def variables(draw: random.Random) -> Fact:
    """Four chains of three assignments, one after the other by chance; the last variable of one is asked for."""
    chains = 1 + WRONG_ANSWERS
    names = draw.sample("abcdefghijklmnopqrstuvwxyz", 3 * chains)
    values = [str(value) for value in draw.sample(range(10, 100), chains)]
    waiting = [
        [f"{first} = {value}", f"{second} = {first}", f"{third} = {second}"]
        for value, first, second, third in zip(values, names, names[chains:], names[2 * chains :])
    ]
    lines = []
    while any(waiting):
        lines.append(draw.choice([chain for chain in waiting if chain]).pop(0))
    asked = draw.randrange(chains)
    lines.append(f"{names[2 * chains + asked]} = ")
    return make_fact("variables", "\n".join(lines), values[asked], values[:asked] + values[asked + 1 :], draw)


def copying(words: list[str], draw: random.Random) -> Fact:
    asked = draw.randrange(len(words) // 2, len(words))
    wrong = draw.sample(words[:asked] + words[asked + 1 :], WRONG_ANSWERS)
    prompt = f"{' '.join(words)}\n{' '.join(words[:asked])} "
    return make_fact("copying", prompt, words[asked], wrong, draw)


def given(defined: list[tuple[str, str]], draw: random.Random) -> Fact:
    lines = [f"{definition} = {word}" for definition, word in defined]
    asked = draw.randrange(len(defined))
    wrong = [word for place, (_, word) in enumerate(defined) if place != asked]
    prompt = "\n".join([*lines, f"{defined[asked][0]} = "])
    return make_fact("given", prompt, defined[asked][1], wrong, draw)

"""Rows of a made-up language that ask for what stands far before: needles in a haystack, and variables to track.

    needles:    SET k7 v3 ... filler ... SET k2 v9 ... filler ... ASK k2 v9 ASK k7 v3
    variables:  SET k7 v3 ... filler ... SET k2 k7 ... filler ... ASK k2 v3 ASK k7 v3

After RULER (arXiv 2404.06654), in single tokens, so that a small model can learn it. The filler is made of phrases that
always go on in the same way. Rows to learn from ask all along. Rows to measure with ask at their end, once for each
assignment. Answers are the only tokens that count.
"""

import random
from typing import NamedTuple

import torch


SET, ASK = 1, 2
KEYS, VALUES = range(8, 40), range(40, 72)
PHRASES, PHRASE_TOKENS = 46, 4
VOCAB_SIZE = VALUES.stop + PHRASES * PHRASE_TOKENS  # 256
KINDS = ("needles", "variables")
# Assignments in a row. Variables stand in chains of a value and names that take it over. Rows to learn from have fewer,
# too: among few assignments it is sooner learned that the one with the same key counts.
ASSIGNMENTS, CHAIN = 12, 3
FEWER = range(CHAIN, ASSIGNMENTS + 1, CHAIN)
# Of a row to learn from, in questions.
ASKED_SHARE = 15 / 32
# A label that does not count, as in every model of Transformers.
IGNORED = -100


class RecallRow(NamedTuple):
    """ids, labels: (seq,), not shifted. hops: of each question in turn, how many names lie between it and its value.
    choices: how many values the row has said before it.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    hops: list[int]
    choices: list[int]


def make_row(kind: str, length: int, draw: random.Random, is_asked_at_end: bool) -> RecallRow:
    """A row of this length.

    Raises:
        ValueError: assignments, questions and whole phrases cannot have this length, or there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no task {kind!r}. Tasks are {', '.join(KINDS)}.")
    count = ASSIGNMENTS if is_asked_at_end else draw.choice(FEWER)
    questions = count
    if not is_asked_at_end:
        questions = int(ASKED_SHARE * length / 3)
        # So many that whole phrases are left.
        questions += -(count + questions) % PHRASE_TOKENS
    phrases, rest = divmod(length - 3 * (count + questions), PHRASE_TOKENS)
    if phrases < 0 or rest:
        raise ValueError(
            f"A row of {length} tokens has no room for {count} assignments and {questions} questions of 3 tokens and "
            f"whole phrases of {PHRASE_TOKENS}. Take a length of 256 times a whole number."
        )
    statements = ["set"] * (count - 1) + ["phrase"] * phrases + ["ask"] * (0 if is_asked_at_end else questions)
    draw.shuffle(statements)
    # The first is set at the beginning, so that there is always something to ask for.
    statements = ["set", *statements] + ["ask"] * (questions if is_asked_at_end else 0)
    unsaid = assignments(kind, count, draw)
    said: list[tuple[int, int, int]] = []
    last = draw.sample(range(count), count)
    ids, labels, hops, choices = [], [], [], []
    for statement in statements:
        if statement == "phrase":
            start = VALUES.stop + draw.randrange(PHRASES) * PHRASE_TOKENS
            ids += range(start, start + PHRASE_TOKENS)
        elif statement == "set":
            key, content, value, hop = unsaid.pop(0)
            said.append((key, value, hop))
            ids += [SET, key, content]
        else:
            key, value, hop = said[last.pop()] if is_asked_at_end else draw.choice(said)
            ids += [ASK, key, value]
            hops.append(hop)
            choices.append(len({value for _, value, _ in said}))
        labels += [IGNORED] * (len(ids) - len(labels))
        if statement == "ask":
            labels[-1] = value
    return RecallRow(torch.tensor(ids), torch.tensor(labels), hops, choices)


def assignments(kind: str, count: int, draw: random.Random) -> list[tuple[int, int, int, int]]:
    """What is said of each key, its value, and how many names lie between. A name stands before those that take it
    over, and chains run into each other.
    """
    keys, values = draw.sample(KEYS, count), draw.sample(VALUES, count)
    length = CHAIN if kind == "variables" else 1
    chains = []
    for start in range(0, count, length):
        names, value = keys[start : start + length], values[start]
        chains.append([(name, ([value, *names])[hop], value, hop) for hop, name in enumerate(names)])
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    draw.shuffle(turns)
    return [chains[number].pop(0) for number in turns]

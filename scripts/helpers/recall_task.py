"""Rows of a made-up language that ask for what stands far before: needles in a haystack, and variables to track.

    needles:    ... SET k7 v3 ... filler ... SET k2 v9 ...      ASK k2 v9 ASK k7 v3
    variables:  ... SET k7 v3 ... filler ... SET k2 k7 ...      ASK k2 v3 ASK k7 v3

After RULER (arXiv 2404.06654), in single tokens, so that a small model can learn it. The filler is made of phrases that
always go on in the same way. Between them stand assignments, in random places, and the row ends with one question for
each. Answers are the only tokens that count.
"""

import random
from typing import NamedTuple

import torch


SET, ASK = 1, 2
KEYS, VALUES = range(8, 136), range(136, 264)
PHRASES, PHRASE_TOKENS = 62, 4
VOCAB_SIZE = VALUES.stop + PHRASES * PHRASE_TOKENS  # 512
KINDS = ("needles", "variables")
# Assignments in a row. Variables stand in chains of a value and names that take it over.
ASSIGNMENTS, CHAIN = 12, 3
# A label that does not count, as in every model of Transformers.
IGNORED = -100


class RecallRow(NamedTuple):
    """ids, labels: (seq,). hops: of each question in turn, how many names lie between it and its value."""

    kind: str
    ids: torch.Tensor
    labels: torch.Tensor
    hops: list[int]


def make_row(kind: str, length: int, draw: random.Random) -> RecallRow:
    """A row of this length.

    Raises:
        ValueError: assignments, questions and whole phrases cannot have this length, or there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no task {kind!r}. Tasks are {', '.join(KINDS)}.")
    phrases, rest = divmod(length - 6 * ASSIGNMENTS, PHRASE_TOKENS)
    if phrases < 0 or rest:
        raise ValueError(
            f"A row has {6 * ASSIGNMENTS} tokens of assignments and questions, and whole phrases of {PHRASE_TOKENS}. "
            f"Got a length of {length}."
        )
    keys, values = draw.sample(KEYS, ASSIGNMENTS), draw.sample(VALUES, ASSIGNMENTS)
    chain = CHAIN if kind == "variables" else 1
    hops = [place % chain for place in range(ASSIGNMENTS)]
    said = [keys[place - 1] if hops[place] else values[place] for place in range(ASSIGNMENTS)]
    answers = [values[place - hops[place]] for place in range(ASSIGNMENTS)]
    # Of a chain, the value stands before the names that take it over. Chains run into each other.
    order = list(range(ASSIGNMENTS))
    draw.shuffle(order)
    for start in range(0, ASSIGNMENTS, chain):
        own = range(start, start + chain)
        for place, member in zip(sorted(order.index(member) for member in own), own):
            order[place] = member
    starts = [VALUES.stop + draw.randrange(PHRASES) * PHRASE_TOKENS for _ in range(phrases)]
    pieces = [list(range(start, start + PHRASE_TOKENS)) for start in starts]
    # From the end, so that what was put in moves nothing that is still to come.
    for place, member in zip(sorted(draw.choices(range(phrases + 1), k=ASSIGNMENTS), reverse=True), order[::-1]):
        pieces.insert(place, [SET, keys[member], said[member]])
    ids = [token for piece in pieces for token in piece]
    labels = [IGNORED] * len(ids)
    asked = draw.sample(range(ASSIGNMENTS), ASSIGNMENTS)
    for place in asked:
        ids += [ASK, keys[place], answers[place]]
        labels += [IGNORED, IGNORED, answers[place]]
    return RecallRow(kind, torch.tensor(ids), torch.tensor(labels), [hops[place] for place in asked])

"""What kind of text an n-gram is: a number, code, a name, function words, or something else. Simple rules, no model.

The rules look at the longest n-gram that ends at a token, as text. The first that fits decides:

* numbers: it holds a digit;
* code: it holds one of the characters ``_ ( ) { } [ ] < > = ; | & \\ / # @ $ * + ~ ^ ` ``, or a capital letter right
  after a small one;
* names: it holds a word with a capital letter that does not begin a sentence: neither the beginning of the text, nor a
  line break, nor one of ``. ! ? :`` stands in front of it;
* function words: it holds words, and all of them are in a list of English ones (`FUNCTION_WORDS`);
* other: everything else.
"""

import re
from typing import Any

import torch

from .text_rows import TextRow


CLASSES = ("numbers", "code", "names", "function words", "other")
# Articles, pronouns, prepositions, conjunctions, auxiliary verbs and the like.
WORDS = (
    "a about after all also an and any are as at be because been before being but by can could did do does for from "
    "had has have he her here him his how i if in into is it its just may me might more most must my no nor not of on "
    "one only or other our out over shall she should so some such than that the their them then there these they this "
    "those through to under up us was we were what when where which while who whom whose why will with would you your"
)
FUNCTION_WORDS = frozenset(WORDS.split())
CODE = re.compile(r"[_(){}\[\]<>=;|&\\/#@$*+~^`]|[^\W\d_A-Z][A-Z]")
WORD = re.compile(r"[^\W\d_]+")
ENDS_A_SENTENCE = re.compile(r"(?:^|[.!?:\n])[\s\"'»”’]*$")
# Tokens before an n-gram that show whether it begins a sentence.
TOKENS_BEFORE = 3


def class_of(ngram: str, before: str) -> str:
    """The class of an n-gram.

    Args:
        ngram: its text.
        before: the text in front of it; empty at the beginning of a text.

    Example:
        >>> class_of(" princess of Wales", "the"), class_of(" in the", "is"), class_of("The cat", "")
        ('names', 'function words', 'other')
    """
    if any(character.isdigit() for character in ngram):
        return "numbers"
    if CODE.search(ngram):
        return "code"
    words = list(WORD.finditer(ngram))
    for word in words:
        front = before + ngram[: word.start()]
        # A word that begins before the n-gram is not a whole one.
        is_whole = not front[-1:].isalpha()
        if word[0][0].isupper() and is_whole and word[0] != "I" and not ENDS_A_SENTENCE.search(front):
            return "names"
    if words and all(word[0].lower() in FUNCTION_WORDS for word in words):
        return "function words"
    return "other"


def classes_of(row: TextRow, order: int, tokenizer: Any) -> torch.Tensor:
    """The class of the longest n-gram that ends at each token, (seq,) int64 places in CLASSES.

    Args:
        row: of text.
        order: the largest order.
        tokenizer: that made the tokens.
    """
    ids = row.ids.tolist()
    ends = range(1, len(ids) + 1)
    ngrams = tokenizer.batch_decode([ids[max(0, end - order) : end] for end in ends])
    wider = tokenizer.batch_decode([ids[max(0, end - order - TOKENS_BEFORE) : end] for end in ends])
    found = []
    for ngram, text in zip(ngrams, wider, strict=True):
        # Some tokenizers drop the space before a text, and leave the rest as it is.
        found.append(CLASSES.index(class_of(ngram, text[: len(text) - len(ngram)])))
    return torch.tensor(found, dtype=torch.int64)

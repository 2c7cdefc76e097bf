"""The tokens of the experiments: what is trained on, in one order for all arms, and held-out articles.

Made once of what gather_knowledge.py gathered, and kept beside it.
"""

import hashlib
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engram_hf.insight.text_rows import TextRow
from helpers.results import ROOT
from helpers.text import train_tokenizer
from helpers.tiny_recipe import SEQ_LENGTH


KNOWLEDGE = ROOT / "output" / "knowledge"
# Articles whose facts are asked for are read so often. The others are read once.
TIMES_ASKED = 8
# The tokenizer learns from the first so many characters.
TOKENIZER_CHARACTERS = 8_000_000
HELD_OUT_DOCUMENTS, TUNING_DOCUMENTS = 800, 300
# Tokens of a held-out article that are read.
FEWEST_TOKENS, MOST_TOKENS = 16, SEQ_LENGTH


class Rows(Dataset):
    """ids: (rows, seq). The labels are the ids; the model shifts them."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


@dataclass
class ExperimentText:
    """train: rows in the order before a seed shuffles them. held_out, tuning: the beginnings of held-out articles.

    other: those of a kind that is not trained on. digest: of all tokens. most_tokens: trains on fewer tokens, to try
    things out.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    held_out: list[TextRow]
    tuning: list[TextRow]
    other: list[TextRow]
    digest: str
    most_tokens: int | None = None


def read_lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prepare(tokens: int, vocab_size: int, knowledge: Path = KNOWLEDGE) -> ExperimentText:
    """Tokens of at most this number to train on, from a folder of gather_knowledge.py, by a tokenizer of their own.

    Raises:
        ValueError: the folder is not there, or holds too little text.
    """
    folder = f"tokens-{tokens}-{vocab_size}"
    # Both are kept together: a tokenizer is of the text that it learned from.
    if not is_kept(knowledge / folder, knowledge):
        train_tokenizer(beginning(knowledge), vocab_size).save_pretrained(knowledge / folder)
    return prepare_with(AutoTokenizer.from_pretrained(knowledge / folder), tokens, knowledge, folder, TIMES_ASKED)


def prepare_with(
    tokenizer, tokens: int, knowledge: Path, folder: str, times_asked: int, without: str | None = None
) -> ExperimentText:
    """The same by a given tokenizer.

    Args:
        folder: name of the folder inside `knowledge` that keeps what was made.
        times_asked: how often articles whose facts are asked for are read.
        without: a source that is not trained on; its held-out articles are `other`.

    Raises:
        ValueError: the folder of gather_knowledge.py is not there, or holds too little text.
    """
    kept = knowledge / folder / "text.pt"
    if not is_kept(kept.parent, knowledge):
        kept.parent.mkdir(exist_ok=True)
        content = make_text(tokenizer, tokens, knowledge, times_asked, without)
        write_tensors(kept, {"manifest": digest_of(knowledge), **content})
    content = torch.load(kept)
    rows = {side: [as_row(*article) for article in content[side]] for side in ("held_out", "other")}
    held_out = rows["held_out"][:HELD_OUT_DOCUMENTS]
    return ExperimentText(
        tokenizer,
        Rows(content["train"]),
        held_out,
        rows["held_out"][HELD_OUT_DOCUMENTS:],
        rows["other"],
        content["digest"],
    )


def as_row(name: str, ids: torch.Tensor) -> TextRow:
    return TextRow(ids, torch.ones_like(ids, dtype=torch.bool), name)


def digest_of(knowledge: Path) -> str:
    """Of all that was gathered.

    Raises:
        ValueError: nothing was.
    """
    manifest = knowledge / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{knowledge} holds no text. Run: python scripts/experiments/gather_knowledge.py")
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def is_kept(folder: Path, knowledge: Path) -> bool:
    """Whether a folder holds tokens of what is in `knowledge` now."""
    kept, digest = folder / "text.pt", digest_of(knowledge)
    return kept.is_file() and torch.load(kept)["manifest"] == digest


def beginning(knowledge: Path) -> list[tuple[str, str]]:
    """The first articles to train on, of so many characters as a tokenizer learns from."""
    articles, characters = [], 0
    for article in read_lines(knowledge / "train.jsonl"):
        articles.append((article["name"], article["text"]))
        characters += len(article["text"])
        if characters >= TOKENIZER_CHARACTERS:
            break
    return articles


def make_text(tokenizer, tokens: int, knowledge: Path, times_asked: int, without: str | None) -> dict:
    articles = [article for article in read_lines(knowledge / "train.jsonl") if article["source"] != without]
    ids = torch.tensor(training_ids(tokenizer, articles, tokens, times_asked), dtype=torch.int32)
    rows = len(ids) // SEQ_LENGTH
    if not rows:
        raise ValueError(f"{knowledge} has {len(ids)} tokens to train on, fewer than a row of {SEQ_LENGTH}.")
    train = ids[: rows * SEQ_LENGTH].view(rows, SEQ_LENGTH)
    articles = read_lines(knowledge / "held_out.jsonl")
    held_out = held_out_ids(tokenizer, [article for article in articles if article["source"] != without])
    if len(held_out) < 2:
        raise ValueError(f"{knowledge} has {len(held_out)} held-out articles of {FEWEST_TOKENS} tokens; it needs two.")
    own = hashlib.sha256(train.numpy().tobytes())
    for _, of_article in held_out:
        own.update(of_article.numpy().tobytes())
    other = held_out_ids(tokenizer, [article for article in articles if article["source"] == without])
    return {"train": train, "held_out": held_out, "other": other, "digest": own.hexdigest()[:16]}


def training_ids(tokenizer, articles: list[dict], tokens: int, times_asked: int) -> list[int]:
    """Articles in a random order, each ended by eos: first those that are asked about, then others up to the number."""
    chosen, left = [], tokens
    # Asked first, in the order of the file otherwise.
    for article in sorted(articles, key=lambda article: not article["is_asked"]):
        if left <= 0:
            break
        ids = [
            *tokenizer(article["text"], add_special_tokens=False, verbose=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        times = times_asked if article["is_asked"] else 1
        chosen += [ids] * times
        left -= len(ids) * times
    random.Random(0).shuffle(chosen)
    return [token for ids in chosen for token in ids]


def held_out_ids(tokenizer, articles: list[dict]) -> list[tuple[str, torch.Tensor]]:
    """The beginnings of held-out articles that are long enough, each after an eos, as articles follow each other."""
    found = []
    for article in articles:
        ids = tokenizer(article["text"], add_special_tokens=False, verbose=False)["input_ids"][: MOST_TOKENS - 1]
        if len(ids) >= FEWEST_TOKENS:
            found.append((f"{article['source']}: {article['name']}", torch.tensor([tokenizer.eos_token_id, *ids])))
        if len(found) == HELD_OUT_DOCUMENTS + TUNING_DOCUMENTS:
            break
    return found


def write_tensors(path: Path, content: dict) -> None:
    """A file that is whole or not there."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(content, file)
    Path(file.name).replace(path)

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

    sources: of the held-out articles. digest: of all tokens. most_tokens: trains on fewer tokens, to try things out.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    held_out: list[TextRow]
    tuning: list[TextRow]
    sources: list[str]
    digest: str
    most_tokens: int | None = None


def read_lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prepare(tokens: int, vocab_size: int, knowledge: Path = KNOWLEDGE, folder: Path | None = None) -> ExperimentText:
    """Tokens of at most this number to train on, from a folder of gather_knowledge.py.

    Args:
        folder: keeps what was made; by default it is named after the sizes, inside `knowledge`.

    Raises:
        ValueError: the folder is not there, or holds too little text.
    """
    if not (knowledge / "manifest.json").is_file():
        raise ValueError(f"{knowledge} holds no text. Run: python scripts/experiments/gather_knowledge.py")
    folder = folder or knowledge / f"tokens-{tokens}-{vocab_size}"
    manifest = hashlib.sha256((knowledge / "manifest.json").read_bytes()).hexdigest()
    kept = folder / "text.pt"
    content = torch.load(kept) if kept.is_file() else {}
    if content.get("manifest") != manifest:
        content = {"manifest": manifest, **make_text(tokens, vocab_size, knowledge, folder)}
        write_tensors(kept, content)
    rows = [TextRow(ids, torch.ones_like(ids, dtype=torch.bool), name) for name, ids in content["held_out"]]
    held_out = rows[:HELD_OUT_DOCUMENTS]
    return ExperimentText(
        AutoTokenizer.from_pretrained(folder),
        Rows(content["train"]),
        held_out,
        rows[HELD_OUT_DOCUMENTS:],
        [row.document.partition(": ")[0] for row in held_out],
        content["digest"],
    )


def make_text(tokens: int, vocab_size: int, knowledge: Path, folder: Path) -> dict:
    articles = read_lines(knowledge / "train.jsonl")
    characters, learned_from = 0, []
    for article in articles:
        if characters < TOKENIZER_CHARACTERS:
            learned_from.append((article["name"], article["text"]))
            characters += len(article["text"])
    tokenizer = train_tokenizer(learned_from, vocab_size)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor(training_ids(tokenizer, articles, tokens), dtype=torch.int32)
    rows = len(ids) // SEQ_LENGTH
    if not rows:
        raise ValueError(f"{knowledge} has {len(ids)} tokens to train on, fewer than a row of {SEQ_LENGTH}.")
    train = ids[: rows * SEQ_LENGTH].view(rows, SEQ_LENGTH)
    held_out = held_out_ids(tokenizer, read_lines(knowledge / "held_out.jsonl"))
    if len(held_out) < 2:
        raise ValueError(f"{knowledge} has {len(held_out)} held-out articles of {FEWEST_TOKENS} tokens; it needs two.")
    own = hashlib.sha256(train.numpy().tobytes())
    for _, of_article in held_out:
        own.update(of_article.numpy().tobytes())
    return {"train": train, "held_out": held_out, "digest": own.hexdigest()[:16]}


def training_ids(tokenizer, articles: list[dict], tokens: int) -> list[int]:
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
        times = TIMES_ASKED if article["is_asked"] else 1
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

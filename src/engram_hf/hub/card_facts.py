"""What a model card may say, as data, and how it is found in a card again. What is not known is None."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id


# A card's section lies between these two lines, and ends with its facts in a comment.
BEGIN = "<!-- engram-hf: begin -->"
END = "<!-- engram-hf: end -->"
SECTION = re.compile(rf"^{BEGIN}[ \t]*\r?\n.*?^{END}(?=[ \t]*\r?$)", re.MULTILINE | re.DOTALL)
RECORD = re.compile(r"^<!-- engram-hf: facts (\{.*\}) -->[ \t]*\r?$", re.MULTILINE)
# What the log holds of a memory layer, and a card shows.
LAYER_FIGURES = ("gate_mean", "memory_share", "rows_touched", "ngrams_per_row", "ngrams_per_row_perfect_hash")


@dataclass(frozen=True)
class CardTable:
    """A table: its name inside the base model, rows, numbers of a row, their type, bytes."""

    name: str
    rows: int
    head_dim: int
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on: in words, data sets of the Hub, languages as the Hub writes them.

    tokens: of all of it, each counted once, however often the run came by.
    """

    description: str
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    tokens: int | None = None


@dataclass(frozen=True)
class TrainingRun:
    """What Trainer has logged.

    steps, epochs: done.
    loss, eval_loss: the last ones that were logged.
    learning_rate: the largest one that was logged.
    layers: for a memory layer, by its id, the last of each of LAYER_FIGURES.
    """

    steps: int
    epochs: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    layers: Mapping[str, Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Evaluation:
    """A number, and the command that gives it. dataset_id: on the Hub, where it is there; unit: "nats per token"."""

    metric: str
    value: float
    dataset: str
    command: str
    dataset_id: str | None = None
    split: str | None = None
    unit: str | None = None

    def __post_init__(self):
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not is_number or not math.isfinite(self.value):
            raise ValueError(f"{self.metric} on {self.dataset} must be a finite number, got {self.value!r}.")
        if not self.command.strip():
            raise ValueError(f"{self.metric} on {self.dataset} needs the command that gives it.")


@dataclass(frozen=True)
class CardFacts:
    """All that a card says of a model; `as_dict` and `from_dict` are its way through JSON.

    name: title of the card. architecture: the model's class. preset: of the paper, where it is exactly that.
    weights: digest of all weight files as saving has written them; None without weights, or where no digest was saved.
    has_code, has_tokenizer: whether the checkpoint brings its modeling files, and a tokenizer.
    dtype: of the backbone; for a config without weights, the one that bytes are counted in.
    parameters: "total", "active", "tables", and "memory_share" of the sparse budget; of causal language models alone.
    shape: layers, widths and numbers of experts, by the config's names.
    backbone_nbytes, disk_nbytes: of everything but the tables; of all weight files, also of tables that are apart.
    fingerprint: of the hash. vocab_size, compressed_vocab_size: ids, and what the memory makes of them, as in a config.
    repo_id, tables_repo: where the model is on the Hub, and its tables where they are apart.
    picture: of the curves, a path inside the repository.
    limits: sentences.
    """

    name: str
    architecture: str
    preset: str | None
    weights: str | None
    has_weights: bool
    has_code: bool
    has_tokenizer: bool
    dtype: str
    parameters: Mapping[str, float] | None
    shape: Mapping[str, int]
    tables: tuple[CardTable, ...]
    backbone_nbytes: int
    disk_nbytes: int
    fingerprint: Mapping[str, str] | None
    vocab_size: int
    compressed_vocab_size: int | str | None
    repo_id: str | None = None
    tables_repo: str | None = None
    license: str | None = None
    base_model: tuple[str, ...] = ()
    data: TrainingData | None = None
    training: TrainingRun | None = None
    picture: str | None = None
    evaluation: tuple[Evaluation, ...] = ()
    limits: tuple[str, ...] = ()

    def __post_init__(self):
        for repository in (self.repo_id, self.tables_repo):
            if repository is not None:
                validate_repo_id(repository)

    @property
    def tables_nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self.tables)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CardFacts":
        """The facts that `as_dict` gave, also by way of JSON.

        Raises:
            ValueError: they are of another release of the package.
        """
        made = {**content}
        try:
            made["tables"] = tuple(CardTable(**table) for table in content["tables"])
            made["evaluation"] = as_evaluations(content["evaluation"])
            made["data"] = as_training_data(content["data"])
            made["training"] = content["training"] and TrainingRun(**content["training"])
            for name in ("base_model", "limits"):
                made[name] = tuple(content[name])
            return cls(**made)
        except (KeyError, TypeError) as error:
            raise ValueError(f"These are no facts of a card, or those of another release: {error}.") from error


def facts_in(text: str) -> CardFacts | None:
    """The facts of a card's section; None where there is no section, or one of another release."""
    section = SECTION.search(text)
    record = RECORD.search(section[0]) if section is not None else None
    try:
        return CardFacts.from_dict(json.loads(record[1])) if record is not None else None
    except ValueError:
        return None


def read_facts(path: str | Path) -> CardFacts | None:
    """The facts of a card's section; None where there is no card, no section, or one of another release.

    Args:
        path: a card, or the folder of its README.md.
    """
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    return facts_in(path.read_bytes().decode("utf-8", "replace")) if path.is_file() else None


def as_training_data(data: str | Mapping | TrainingData | None) -> TrainingData | None:
    if data is None or isinstance(data, TrainingData):
        return data
    content: dict[str, Any] = {"description": data} if isinstance(data, str) else {**data}
    unknown = set(content) - {field.name for field in fields(TrainingData)}
    if unknown or not content.get("description"):
        allowed = ", ".join(field.name for field in fields(TrainingData))
        raise ValueError(f"data must have a description, and may have {allowed}; got {sorted(content)}.")
    made = TrainingData(
        description=content["description"],
        datasets=tuple(content.get("datasets", ())),
        languages=tuple(content.get("languages", ())),
        tokens=content.get("tokens"),
    )
    for dataset in made.datasets:
        validate_repo_id(dataset)
    return made


def as_evaluations(results: Mapping | Evaluation | Iterable[Mapping | Evaluation]) -> tuple[Evaluation, ...]:
    results = [results] if isinstance(results, Mapping | Evaluation) else list(results)
    try:
        return tuple(result if isinstance(result, Evaluation) else Evaluation(**result) for result in results)
    except TypeError as error:
        needed = ", ".join(field.name for field in fields(Evaluation))
        raise ValueError(f"A result has {needed}, the last three if they are known: {error}.") from error

"""What a model card may say: read from a checkpoint or a config, from a training log, or given by the author.

No tensor is read and nothing is guessed. What is not known is None or empty, and the card leaves it out.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..adapters.memory_files import MemoryFiles
from ..checkpoints.checking import backbone_config, read_config
from ..checkpoints.inspecting import inspect_checkpoint
from ..insight.plotting import read_state
from ..modeling.checkpoint_loading import find_checkpoint, read_digests
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.modeling_engram_moe import EngramMoEForCausalLM
from ..planning import count_parameters, estimate_memory


logger = logging.get_logger(__name__)
CAUSAL_LM = "EngramMoEForCausalLM"
# Somebody else's model with a memory, and such a memory alone.
WITH_MEMORY, MEMORY = "EngramMemoryForCausalLM", "EngramMemory"
PAPER_PRESETS = ("dense-4b", "moe-27b", "engram-27b", "engram-40b")
# Our section of a card lies between two lines. A comment in it records the facts, with a digest against edits.
BEGIN, END = "<!-- engram-hf: begin -->", "<!-- engram-hf: end -->"
SECTION = re.compile(rf"^{BEGIN}[ \t]*$.*?^{END}[ \t]*$", re.MULTILINE | re.DOTALL)
RECORD = re.compile(r"^<!-- engram-hf: facts ([0-9a-f]{16}) (\{.*\}) -->$", re.MULTILINE)
TABLE_FIELDS = ("name", "rows", "head_dim", "dtype", "nbytes")
DATA_FIELDS = ("description", "datasets", "languages", "tokens")
RESULT_FIELDS = ("metric", "value", "dataset", "command", "dataset_id", "split", "unit")
CONFIG_FIELDS: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "num_attention_heads", "hc_mult", "vocab_size")
CONFIG_FIELDS += ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "first_k_dense_replace")
CONFIG_FIELDS += ("engram_layer_ids", "engram_max_ngram_size", "engram_n_heads", "engram_compressed_vocab_size")
CONFIG_FIELDS += ("engram_fingerprint", "max_position_embeddings")
# What a card shows of a memory layer: the last value in the log.
LAYER_FIGURES = ("gate_mean", "memory_share", "rows_touched", "ngrams_per_row", "ngrams_per_row_perfect_hash")


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about a model, in the types of JSON.

    `weights` is a digest of all weight files: None without weights, or if saving wrote no digests. `parameters` are
    counted for causal language models only. `preset` is a name of the paper, if the config is exactly that one.
    """

    name: str
    architecture: str
    preset: str | None
    weights: str | None
    has_weights: bool
    has_code: bool
    has_tokenizer: bool
    dtype: str
    config: dict[str, Any]
    parameters: dict[str, float] | None
    tables: list[dict[str, Any]]
    backbone_nbytes: int
    disk_nbytes: int
    repo_id: str | None = None
    tables_repo: str | None = None
    license: str | None = None
    base_model: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    picture: str | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    @property
    def tables_nbytes(self) -> int:
        return sum(table["nbytes"] for table in self.tables)

    @property
    def has_experts(self) -> bool:
        dense = self.config["first_k_dense_replace"]
        return dense is not None and dense < self.config["num_hidden_layers"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CardFacts":
        """The facts that `as_dict` gave. Raises ValueError if they are of another release."""
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"These are not facts of a card, or they are of another release: {error}.") from error


def gather_facts(
    source: str | Path | EngramMoEConfig,
    *,
    training: str | Path | None = None,
    data: str | Mapping | None = None,
    evaluation: Mapping | Iterable[Mapping] | None = None,
    license: str | None = None,
    base_model: str | Iterable[str] | None = None,
    repo_id: str | None = None,
    tables_repo: str | None = None,
    name: str | None = None,
    picture: str | None = None,
    limits: str | Iterable[str] | None = None,
    tables_from: str | Path | None = None,
) -> CardFacts:
    """The facts of a checkpoint, or of a config without weights.

    Facts that you do not give come from the card in the folder, as long as they are still true of the weights.

    Args:
        source: folder of a checkpoint, or a config.
        training: folder of the run, with Trainer's log.
        data: what the model was trained on: a description, or a dict with "description" and, if known, "datasets" (ids
            on the Hub), "languages" (as the Hub writes them) and "tokens" (of the text, each counted once).
        evaluation: results, each a dict with "metric", "value", "dataset", the "command" that gives the value and, if
            known, "dataset_id" (on the Hub), "split" and "unit".
        license: as the Hub writes it ("apache-2.0").
        base_model: repositories of the models that this one was made from; for an added memory by default the one that
            it was added to.
        repo_id, tables_repo: where the model will be on the Hub, and where its tables will be if they are apart.
        name: title; by default the name of the repository, preset or folder.
        picture: of the training curves; a file in `source`, named from there.
        limits: sentences.
        tables_from: folder or repository of the tables, as in `from_pretrained`.

    Raises:
        FileNotFoundError: there are no weights, no log or no picture.
        ValueError: a file is damaged, an id is not valid on the Hub, or a result is not a number.

    Example:
        >>> facts = gather_facts("output/tiny", data="Python's standard library", license="apache-2.0")
        >>> facts.tables[0]["rows"]
        53826
    """
    folder = None if isinstance(source, EngramMoEConfig) else Path(source)
    given: dict[str, Any] = {
        "repo_id": repo_id,
        "tables_repo": tables_repo,
        "license": license,
        "base_model": as_list(base_model),
        "data": None if data is None else _data(data),
        "training": None if training is None else _training(training),
        "picture": picture,
        "evaluation": [_result(result) for result in as_list(evaluation)],
        "limits": as_list(limits),
    }
    found = (
        _facts_of_config(source)
        if isinstance(source, EngramMoEConfig)
        else _facts_of_checkpoint(Path(source), tables_from)
    )
    given["base_model"] = given["base_model"] or found.pop("base_model", [])
    found.pop("base_model", None)
    datasets = given["data"]["datasets"] if given["data"] else []
    for repository in filter(None, [repo_id, tables_repo, *given["base_model"], *datasets]):
        validate_repo_id(repository)
    if picture is not None:
        path = None if folder is None else (folder / picture).resolve()
        if folder is None or path is None or not path.is_file() or not path.is_relative_to(folder.resolve()):
            raise FileNotFoundError(f"{picture} is not a file in {source}. Draw it there: plot_training(run, picture).")
    facts = CardFacts(**found, **given)
    known = None if folder is None else read_facts(folder)
    if known is not None:
        name = name or (known.name if repo_id is None and known.weights == facts.weights else None)
        facts = keep_known(facts, known)
    return replace(facts, name=name or (repo_id.split("/")[-1] if repo_id else facts.name))


def read_facts(path: str | Path) -> CardFacts | None:
    """The facts that a card records; None if there is no card, or no section of this package in it.

    A record that was edited, or that another release wrote, is not used; a warning says so.

    Args:
        path: a card, or the folder of its README.md.
    """
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    return facts_in(path.read_bytes(), path) if path.is_file() else None


def facts_in(content: bytes, where: object) -> CardFacts | None:
    """As `read_facts`, for what a file holds. `where` names the file in messages."""
    section = SECTION.search(decode_card(content, where))
    record = None if section is None else RECORD.search(section[0])
    if section is None:
        return None
    try:
        if record is not None and record[1] == _digest(record[2]):
            return CardFacts.from_dict(json.loads(record[2]))
    except ValueError:
        pass
    logger.warning(f"The facts recorded in {where} were edited or are of another release; they are not used.")
    return None


def decode_card(content: bytes, where: object) -> str:
    """The text of a card, with plain line feeds.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}). Save it as UTF-8; nothing was changed.") from error


def record_of(facts: CardFacts) -> str:
    """The comment that `facts_in` reads. No text in it can end the comment."""
    text = json.dumps(facts.as_dict(), sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- engram-hf: facts {_digest(text)} {text} -->"


def keep_known(facts: CardFacts, known: CardFacts) -> CardFacts:
    """`facts`, with what an earlier card said and nobody has given again.

    Licence and base models are always kept, everything else only if the weights are the same.
    """
    kept: dict[str, Any] = {"license": known.license, "base_model": known.base_model}
    of_weights = {name: getattr(known, name) for name in ("data", "training", "picture", "evaluation", "limits")}
    if known.weights is not None and known.weights == facts.weights:
        kept |= {**of_weights, "repo_id": known.repo_id, "tables_repo": known.tables_repo}
    elif lost := [name for name, value in of_weights.items() if value and not getattr(facts, name)]:
        logger.warning(
            f"The weights changed since this card was written. Removed: {', '.join(lost)}. Pass the values again if "
            "they still apply."
        )
    return replace(facts, **{name: value for name, value in kept.items() if value and not getattr(facts, name)})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str | Mapping) else list(value)


def _data(data: str | Mapping) -> dict[str, Any]:
    content = {"description": data} if isinstance(data, str) else {**data}
    if not content.get("description") or set(content) - {*DATA_FIELDS}:
        allowed = ", ".join(DATA_FIELDS)
        raise ValueError(f"data must have a description, and may have {allowed}; got {sorted(content)}.")
    lists = {name: as_list(content.get(name)) for name in ("datasets", "languages")}
    return {"description": content["description"], "tokens": content.get("tokens"), **lists}


def _result(result: Mapping) -> dict[str, Any]:
    if set(result) - {*RESULT_FIELDS} or {*RESULT_FIELDS[:4]} - set(result):
        wanted = ", ".join(RESULT_FIELDS)
        raise ValueError(f"A result has {wanted}, the last three if they are known; got {sorted(result)}.")
    what, value = f"{result['metric']} on {result['dataset']}", result["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}.")
    if not result["command"].strip():
        raise ValueError(f"{what} needs the command that gives it.")
    return {name: result.get(name) for name in RESULT_FIELDS}


def _facts_of_config(config: EngramMoEConfig) -> dict[str, Any]:
    """Facts of the causal language model of a config; bytes are counted in bfloat16 if it names no type."""
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    presets = [name for name in PAPER_PRESETS if EngramMoEConfig.preset(name).to_dict() == config.to_dict()]
    with torch.device("meta"):
        # A copy: the type that a model is built in is written into its config.
        model = EngramMoEForCausalLM._from_config(copy.deepcopy(config), dtype=getattr(torch, dtype))
    tables = _tables(model.engram_tables(), CAUSAL_LM)
    backbone = sum(estimate_memory(config, "cpu", dtype).backbone.values())
    return {
        **_facts_of_both(config, CAUSAL_LM),
        **dict.fromkeys(("has_weights", "has_code", "has_tokenizer"), False),
        "name": [*presets, config.model_type][0],
        "preset": [*presets, None][0],
        "weights": None,
        "dtype": dtype,
        "tables": tables,
        "backbone_nbytes": backbone,
        "disk_nbytes": backbone + sum(table["nbytes"] for table in tables),
    }


def _facts_of_checkpoint(folder: Path, tables_from: str | Path | None) -> dict[str, Any]:
    inspection, digests = inspect_checkpoint(folder, tables_from=tables_from), read_digests(folder)
    config, checkpoint = read_config(folder), find_checkpoint(str(folder), {"local_files_only": True})
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} holds no safetensors files of a model.")
    if isinstance(config, MemoryFiles):
        architecture = MEMORY if config.description.is_alone else WITH_MEMORY
        own = _facts_of_memory(config, folder)
    else:
        architecture = (config.architectures or [CAUSAL_LM])[0]
        own = _facts_of_both(config, architecture)
    here = sum(path.stat().st_size for path in set(checkpoint.file_of.values()))
    return {
        **own,
        "architecture": architecture,
        "name": folder.resolve().name,
        "preset": None,
        # Not of file names, so that saving the same weights again changes nothing.
        "weights": _digest(json.dumps(sorted(digests.values()))) if digests else None,
        "has_weights": True,
        "has_code": getattr(config, "auto_map", None) is not None,
        "has_tokenizer": (folder / "tokenizer_config.json").is_file(),
        "dtype": str(getattr(backbone_config(config), "dtype", None) or "float32").removeprefix("torch."),
        "tables": _tables(inspection.tables, architecture),
        "backbone_nbytes": inspection.backbone_nbytes,
        "disk_nbytes": here + (0 if checkpoint.blocks() else inspection.tables_nbytes),
    }


def _facts_of_both(config: EngramMoEConfig, architecture: str) -> dict[str, Any]:
    counted = count_parameters(config) if architecture == CAUSAL_LM else None
    return {
        "architecture": architecture,
        "config": {name: getattr(config, name) for name in CONFIG_FIELDS},
        "parameters": counted and {**asdict(counted), "memory_share": counted.memory_share},
    }


def _facts_of_memory(config: MemoryFiles, folder: Path) -> dict[str, Any]:
    facts = config.description.facts
    counted = None if config.description.is_alone else count_parameters(folder)
    fields = {n: getattr(config, n, getattr(config.backbone, n, None)) for n in CONFIG_FIELDS if n != "hc_mult"}
    return {
        "config": {**fields, "hc_mult": facts.streams, "backbone": ", ".join(config.architectures or [])},
        "parameters": counted and {**asdict(counted), "memory_share": counted.memory_share},
        "base_model": [facts.base_model] if is_repository(facts.base_model) else [],
    }


def is_repository(name: str) -> bool:
    """Whether a name is that of a repository of the Hub, and of no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _tables(tables: Iterable[Any], architecture: str) -> list[dict[str, Any]]:
    prefix = "" if architecture in ("EngramMoEModel", MEMORY, WITH_MEMORY) else "model."
    found = [{name: getattr(table, name) for name in TABLE_FIELDS} for table in tables]
    return [{**table, "name": prefix + table["name"].removeprefix("model.")} for table in found]


def _training(folder: str | Path) -> dict[str, Any]:
    state = read_state(folder)
    last: dict[str, float] = {}
    rates = [0.0]
    for line in state["log_history"]:
        numbers = {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
        last |= {key: value for key, value in numbers.items() if math.isfinite(value)}
        rates.append(numbers.get("learning_rate", 0.0))
    layers: dict[str, dict[str, float]] = {}
    for key, value in last.items():
        if (match := re.fullmatch(rf"engram/({'|'.join(LAYER_FIGURES)})/layer_(\d+)", key)) is not None:
            layers.setdefault(match[2], {})[match[1]] = value
    return {
        "steps": state["global_step"],
        "epochs": state.get("epoch"),
        **{name: last.get(name) for name in ("loss", "eval_loss")},
        "learning_rate": max(rates) or None,
        "layers": dict(sorted(layers.items(), key=lambda item: int(item[0]))),
    }

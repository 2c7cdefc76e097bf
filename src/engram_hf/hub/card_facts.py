"""What a model card may say: read from a checkpoint or a config, from a training log, or given by the author.

No tensor is read and nothing is guessed. What is not known is None or empty, and the card leaves it out.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..adapters.memory_files import MemoryFiles
from ..checkpoints.checking import backbone_config, read_config
from ..checkpoints.inspecting import inspect_checkpoint
from ..insight.ablation import Ablation
from ..insight.plotting import read_figures
from ..modeling.checkpoint_loading import read_digests
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.modeling_engram_moe import EngramMoEModel
from ..planning import count_parameters, estimate_memory


logger = logging.get_logger(__name__)
CAUSAL_LM = "EngramMoEForCausalLM"
# Somebody else's model with a memory, and such a memory alone.
WITH_MEMORY, MEMORY = "EngramMemoryForCausalLM", "EngramMemory"
PAPER_PRESETS = ("dense-4b", "moe-27b", "engram-27b", "engram-40b")
# A comment in our section of a card records its facts, with a digest against edits.
RECORD = re.compile(
    r"^<!-- engram-hf: begin -->[\s\S]*?^<!-- engram-hf: facts (\w+) (.*) -->[\s\S]*?^<!-- engram-hf: end -->",
    re.MULTILINE,
)
CONFIG_FIELDS: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "num_attention_heads", "hc_mult", "vocab_size")
CONFIG_FIELDS += ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "first_k_dense_replace")
CONFIG_FIELDS += ("engram_layer_ids", "engram_max_ngram_size", "engram_n_heads", "engram_compressed_vocab_size")
CONFIG_FIELDS += ("engram_fingerprint", "max_position_embeddings")
TABLE_FIELDS = ("name", "rows", "head_dim", "dtype", "nbytes")
# Facts that an author gives: those that stay true of other weights, and those that do not.
ALWAYS = ("license", "base_model")
OF_WEIGHTS = ("data", "training", "picture", "gates", "evaluation", "ablation", "limits")
OF_DATA = ["description"], ["datasets", "languages", "tokens"]
OF_RESULT = ["metric", "value", "dataset", "command"], ["dataset_id", "split", "unit"]


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about a model, in the types of JSON.

    `weights` is a digest of all weight files: None without weights, or if saving wrote no digests. `parameters` are
    counted for causal language models only. `preset` is a name of the paper, if the config is exactly that one.
    """

    name: str
    architecture: str
    dtype: str
    config: dict[str, Any]
    parameters: dict[str, int] | None
    tables: list[dict[str, Any]]
    backbone_nbytes: int
    preset: str | None = None
    weights: str | None = None
    has_weights: bool = False
    has_code: bool = False
    has_tokenizer: bool = False
    repo_id: str | None = None
    tables_repo: str | None = None
    license: str | None = None
    base_model: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    picture: str | None = None
    gates: str | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    ablation: dict[str, Any] | None = None
    limits: list[str] = field(default_factory=list)


def gather_facts(
    source: str | Path | EngramMoEConfig,
    *,
    training: str | Path | None = None,
    data: str | Mapping | None = None,
    evaluation: Mapping | Iterable[Mapping] | None = None,
    ablation: Ablation | None = None,
    license: str | None = None,
    base_model: str | Iterable[str] | None = None,
    repo_id: str | None = None,
    tables_repo: str | None = None,
    name: str | None = None,
    picture: str | None = None,
    gates: str | None = None,
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
        ablation: what the parts of the memory are worth, from `engram_hf.insight.ablate`.
        license: as the Hub writes it ("apache-2.0").
        base_model: repositories that this model was made from; by default the one that a memory was added to.
        repo_id, tables_repo: where the model will be on the Hub, and where its tables will be if they are apart.
        name: title; by default the name of the repository, preset or folder.
        picture, gates: pictures of the training curves, and of a text that is coloured by the gates of the memory;
            files in `source`, named from there.
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
    if isinstance(source, EngramMoEConfig):
        found, known, folder = _facts_of_config(source), None, None
    else:
        found, known, folder = _facts_of_checkpoint(Path(source), tables_from), read_facts(source), Path(source)
    for file, drawn_by in ((picture, "plot_training(run, picture)"), (gates, "show(trace).save(gates)")):
        if file is not None and not (folder and (folder / file).is_file()):
            raise FileNotFoundError(f"{file} is not a file in {source}. Draw it there: {drawn_by}.")
    if data is not None:
        data = _with_fields({"description": data} if isinstance(data, str) else data, "data must have a", OF_DATA)
    bases = found.base_model
    # Of other weights, the files say better than an old card what they were made from.
    if known is not None and known.weights is not None and known.weights == found.weights:
        bases = known.base_model or bases
    facts = replace(
        found,
        name=name or (repo_id or "").split("/")[-1],
        repo_id=repo_id,
        tables_repo=tables_repo,
        license=license,
        base_model=as_list(base_model) or bases,
        data=data,
        training=None if training is None else read_figures(training),
        picture=picture,
        gates=gates,
        evaluation=[_result(result) for result in as_list(evaluation)],
        ablation=None if ablation is None else asdict(ablation),
        limits=as_list(limits),
    )
    for repository in [repo_id, tables_repo, *facts.base_model, *as_list((facts.data or {}).get("datasets"))]:
        if repository is not None:
            validate_repo_id(repository)
    facts = facts if known is None else keep_known(facts, known)
    return replace(facts, name=facts.name or found.name)


def read_facts(path: str | Path) -> CardFacts | None:
    """The facts that a card records; None if there is no card, or no section of this package in it.

    A record that was edited, or that another release wrote, is not used; a warning says so.

    Args:
        path: a card, or the folder of its README.md.
    """
    path, content = read_card(path)
    return facts_in(content, path)


def read_card(path: str | Path) -> tuple[Path, bytes]:
    """The file of a card, which is the README.md of a folder, and its bytes: none if it does not exist."""
    path = Path(path) / "README.md" if Path(path).is_dir() else Path(path)
    return path, path.read_bytes() if path.is_file() else b""


def facts_in(content: bytes, where: object) -> CardFacts | None:
    """As `read_facts`, for what a file holds. `where` names the file in the warning."""
    if (record := RECORD.search(content.decode(errors="replace"))) is None:
        return None
    # Another release has other fields.
    with suppress(TypeError):
        if record[1] == _digest(record[2]):
            return CardFacts(**json.loads(record[2]))
    logger.warning(f"The facts recorded in {where} were edited or are of another release; they are not used.")
    return None


def record_of(facts: CardFacts) -> str:
    """The comment that `facts_in` reads. No text in it can end the comment."""
    text = json.dumps(asdict(facts), sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- engram-hf: facts {_digest(text)} {text} -->"


def keep_known(facts: CardFacts, known: CardFacts) -> CardFacts:
    """`facts`, with what an earlier card said and nobody has given again.

    Licence and base models are always kept, everything else only if the weights are the same. Base models that the
    files of other weights name come first.
    """
    names = [*ALWAYS, *OF_WEIGHTS, "name", "repo_id", "tables_repo"]
    kept = {name: getattr(known, name) for name in names if getattr(known, name) and not getattr(facts, name)}
    if known.weights is None or known.weights != facts.weights:
        if lost := [name for name in OF_WEIGHTS if name in kept]:
            logger.warning(
                f"The weights changed since this card was written. Removed: {', '.join(lost)}. Pass the values again "
                "if they still apply."
            )
        kept = {name: kept[name] for name in ALWAYS if name in kept}
    return replace(facts, **kept)


def as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str | Mapping) else list(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result(result: Mapping) -> dict[str, Any]:
    content = _with_fields(result, "A result has", OF_RESULT)
    value, command = content["value"], content["command"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and command.strip()):
        raise ValueError(
            f"{content['metric']} on {content['dataset']} must be a finite number with the command that gives it, got "
            f"{value!r} and {command!r}."
        )
    return content


def _with_fields(content: Mapping, claim: str, fields: tuple[list[str], list[str]]) -> dict[str, Any]:
    """A copy with None for what is not known. `fields`: those that must be there, and those that may be."""
    needed, known = fields
    if not set(needed) <= set(content) <= {*needed, *known}:
        raise ValueError(f"{claim} {', '.join(needed)}, and may have {', '.join(known)}; got {sorted(content)}.")
    return {**dict.fromkeys(known), **content}


def _facts_of_config(config: EngramMoEConfig) -> CardFacts:
    """Facts of the causal language model of a config; bytes are counted in bfloat16 if it names no type."""
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    preset = next((name for name in PAPER_PRESETS if EngramMoEConfig.preset(name).to_dict() == config.to_dict()), None)
    with torch.device("meta"):
        # A copy: the type that a model is built in is written into its config.
        tables = EngramMoEModel._from_config(copy.deepcopy(config), dtype=getattr(torch, dtype)).engram_tables()
    return CardFacts(
        name=preset or config.model_type,
        preset=preset,
        dtype=dtype,
        backbone_nbytes=sum(estimate_memory(config, "cpu", dtype).backbone.values()),
        **_of_architecture(CAUSAL_LM, config, config, tables),
    )


def _facts_of_checkpoint(folder: Path, tables_from: str | Path | None) -> CardFacts:
    found, config, digests = (
        inspect_checkpoint(folder, tables_from=tables_from),
        read_config(folder),
        read_digests(folder),
    )
    if isinstance(config, MemoryFiles):
        architecture, facts = MEMORY if config.description.is_alone else WITH_MEMORY, config.description.facts
        own = _of_architecture(architecture, config, folder, found.tables)
        own["config"] |= {"hc_mult": facts.streams, "backbone": ", ".join(config.architectures or [])}
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model) and not Path(facts.base_model).exists()
        own["base_model"] = [facts.base_model] if is_repository else []
    else:
        own = _of_architecture((config.architectures or [CAUSAL_LM])[0], config, config, found.tables)
    return CardFacts(
        name=folder.resolve().name,
        # Not of file names, so that saving the same weights again changes nothing.
        weights=_digest(json.dumps(sorted(digests.values()))) if digests else None,
        has_weights=True,
        has_code=getattr(config, "auto_map", None) is not None,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        dtype=str(getattr(backbone_config(config), "dtype", None) or "float32").removeprefix("torch."),
        backbone_nbytes=found.backbone_nbytes,
        **own,
    )


def _of_architecture(architecture: str, config: Any, source: Any, tables: Iterable[Any]) -> dict[str, Any]:
    """What follows from a config and its tables. `source`: what `count_parameters` takes."""
    backbone = backbone_config(config)
    return {
        "architecture": architecture,
        "config": {name: getattr(config, name, getattr(backbone, name, None)) for name in CONFIG_FIELDS},
        "parameters": asdict(count_parameters(source)) if architecture in (CAUSAL_LM, WITH_MEMORY) else None,
        "tables": [{name: getattr(table, name) for name in TABLE_FIELDS} for table in tables],
    }

"""The facts of a model card: of a checkpoint or a config, of its training log, and those that its author gives.

Nothing is guessed, and no tensor is read.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from ..checkpoints.inspecting import inspect_checkpoint
from ..insight.plotting import read_state
from ..modeling.checkpoint_loading import find_checkpoint, read_digests
from ..modeling.configuration_engram_moe import PRESETS, EngramMoEConfig
from ..modeling.ids_hashing import find_primes
from ..modeling.table_formats import QUANTIZED_FORMATS, row_bytes
from ..planning import count_parameters, estimate_memory
from .card_facts import (
    LAYER_FIGURES,
    CardFacts,
    CardTable,
    Evaluation,
    TrainingData,
    TrainingRun,
    as_evaluations,
    as_training_data,
    read_facts,
)


CAUSAL_LM = "EngramMoEForCausalLM"


def gather_facts(
    source: str | Path | EngramMoEConfig,
    *,
    training: str | Path | None = None,
    data: str | Mapping | TrainingData | None = None,
    evaluation: Mapping | Evaluation | Iterable[Mapping | Evaluation] | None = None,
    license: str | None = None,
    base_model: str | Iterable[str] | None = None,
    repo_id: str | None = None,
    tables_repo: str | None = None,
    name: str | None = None,
    picture: str | None = None,
    limits: Iterable[str] | None = None,
) -> CardFacts:
    """The facts of a checkpoint, or of a config without weights.

    What is not given is what the card in the folder says, as long as the weights are those that it was written for.

    Args:
        source: folder of a checkpoint, or a config.
        training: folder of the run, with Trainer's log.
        data: what it was trained on, in words or as the fields of `TrainingData`.
        evaluation: results, as the fields of `Evaluation`; each with its command.
        license: as the Hub writes it ("apache-2.0").
        base_model: repositories of the models that this one was made from.
        repo_id, tables_repo: where the model will be on the Hub, and its tables where they are apart.
        name: title; by default that of the repository, the preset or the folder.
        picture: of the curves, as `plot_training` draws it; a file in `source`, named from there.
        limits: sentences.

    Raises:
        FileNotFoundError: there are no weights, no log or no picture.
        ValueError: a file is damaged, an id is none of the Hub, a result is no number.

    Example:
        >>> facts = gather_facts("output/tiny", data="Python's standard library", license="apache-2.0")
        >>> facts.tables[0].rows
        53826
    """
    named = [base_model] if isinstance(base_model, str) else list(base_model or ())
    for repository in named:
        validate_repo_id(repository)
    folder = None if isinstance(source, EngramMoEConfig) else Path(source)
    if picture is not None and (folder is None or not _is_inside(folder / picture, folder)):
        raise FileNotFoundError(f"{picture} is no file in {source}; draw it there with plot_training(run, picture).")
    given = {
        "name": name or (repo_id.split("/")[-1] if repo_id else None),
        "repo_id": repo_id,
        "tables_repo": tables_repo,
        "license": license,
        "base_model": tuple(named),
        "data": as_training_data(data),
        "training": None if training is None else _training_run(training),
        "picture": picture,
        "evaluation": as_evaluations(evaluation or ()),
        "limits": tuple(limits or ()),
    }
    found = _facts_of_config(source) if isinstance(source, EngramMoEConfig) else _facts_of_checkpoint(Path(source))
    known = None if folder is None else read_facts(folder)
    if known is not None and found["weights"] is not None and known.weights == found["weights"]:
        given = {key: value or getattr(known, key) for key, value in given.items()}
    return CardFacts(**{**found, **{key: value for key, value in given.items() if value}})


def _is_inside(path: Path, folder: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _facts_of_config(config: EngramMoEConfig) -> dict[str, Any]:
    """Of the causal language model that a config describes; bytes in bfloat16 where it names no type."""
    wanted = config.to_dict()
    preset = next((name for name in PRESETS if EngramMoEConfig.preset(name).to_dict() == wanted), None)
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    backbone = sum(estimate_memory(config, "cpu", dtype).backbone.values())
    tables = _tables_of(config, dtype)
    return {
        **_facts_of_both(config, CAUSAL_LM),
        "name": preset or config.model_type,
        "preset": preset,
        "weights": None,
        "has_weights": False,
        "has_code": False,
        "has_tokenizer": False,
        "dtype": dtype,
        "tables": tables,
        "backbone_nbytes": backbone,
        "disk_nbytes": backbone + sum(table.nbytes for table in tables),
    }


def _facts_of_checkpoint(folder: Path) -> dict[str, Any]:
    inspection = inspect_checkpoint(folder)
    checkpoint = find_checkpoint(str(folder), {"local_files_only": True})
    files = set(checkpoint.file_of.values())
    config = AutoConfig.from_pretrained(folder)
    there = tuple(
        CardTable(table.name, table.rows, table.head_dim, table.dtype, table.nbytes) for table in inspection.tables
    )
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    # Where the checkpoint's tables are in another folder, the config says which they are.
    tables = there or _tables_of(config, dtype)
    apart = () if checkpoint.blocks() else tables
    digests = read_digests(folder)
    # Of what is in the files, not of their names, which are others after every save.
    weights = hashlib.sha256(json.dumps(sorted(digests.values())).encode()).hexdigest()[:16] if digests else None
    return {
        **_facts_of_both(config, (config.architectures or [CAUSAL_LM])[0]),
        "name": folder.resolve().name,
        "preset": None,
        "weights": weights,
        "has_weights": True,
        "has_code": getattr(config, "auto_map", None) is not None,
        "has_tokenizer": (folder / "tokenizer_config.json").is_file(),
        "dtype": dtype,
        "tables": tables,
        "backbone_nbytes": inspection.backbone_nbytes,
        "disk_nbytes": sum(path.stat().st_size for path in files) + sum(table.nbytes for table in apart),
    }


def _tables_of(config: EngramMoEConfig, dtype: str) -> tuple[CardTable, ...]:
    """The tables that a config describes, in a model that is built in `dtype`."""
    layer_ids = config.engram_layer_ids or []
    primes = find_primes(layer_ids, config.engram_vocab_sizes, config.engram_n_heads)
    dtype, width = config.engram_table_dtype or dtype, config.engram_head_dim
    row_nbytes = row_bytes(dtype, width) if dtype in QUANTIZED_FORMATS else width * getattr(torch, dtype).itemsize
    tables = []
    for layer_id in layer_ids:
        rows = sum(map(sum, primes[layer_id]))
        tables.append(CardTable(f"layers.{layer_id}.engram.table", rows, width, dtype, rows * row_nbytes))
    return tuple(tables)


def _facts_of_both(config: EngramMoEConfig, architecture: str) -> dict[str, Any]:
    counted = count_parameters(config) if architecture == CAUSAL_LM else None
    has_experts = config.first_k_dense_replace < config.num_hidden_layers
    return {
        "architecture": architecture,
        "parameters": counted
        and {
            "total": counted.total,
            "active": counted.active,
            "tables": counted.tables,
            "memory_share": counted.memory_share,
        },
        "shape": {
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "n_routed_experts": config.n_routed_experts if has_experts else 0,
            "num_experts_per_tok": config.num_experts_per_tok if has_experts else 0,
            "n_shared_experts": config.n_shared_experts if has_experts else 0,
            "hc_mult": config.hc_mult,
            "max_position_embeddings": config.max_position_embeddings,
            "engram_max_ngram_size": config.engram_max_ngram_size,
            "engram_n_heads": config.engram_n_heads,
        },
        "fingerprint": config.engram_fingerprint,
        "vocab_size": config.vocab_size,
        "compressed_vocab_size": config.engram_compressed_vocab_size,
    }


def _training_run(folder: str | Path) -> TrainingRun:
    state = read_state(folder)
    last: dict[str, float] = {}
    rates = [0.0]
    for line in state["log_history"]:
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        last |= {key: float(value) for key, value in numbers.items() if math.isfinite(value)}
        rates.append(numbers.get("learning_rate", 0.0))
    layers: dict[str, dict[str, float]] = {}
    for figure in LAYER_FIGURES:
        start = f"engram/{figure}/layer_"
        for key, value in last.items():
            if key.startswith(start) and key.removeprefix(start).isdigit():
                layers.setdefault(key.removeprefix(start), {})[figure] = value
    return TrainingRun(
        steps=state["global_step"],
        epochs=state.get("epoch"),
        loss=last.get("loss"),
        eval_loss=last.get("eval_loss"),
        learning_rate=max(rates) or None,
        layers=dict(sorted(layers.items(), key=lambda item: int(item[0]))) or None,
    )

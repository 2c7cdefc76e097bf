"""What loading would refuse, found without loading: files, config, shapes and types, hash, changed rows.

`from_pretrained` makes the same checks by the same functions, so that inspecting and verifying agree with it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.memory_files import MemoryFiles, check_tensors, read_memory_config
from ..modeling.checkpoint_loading import (
    GENERATION_CONFIG,
    OLD_TOKEN_MAP,
    Checkpoint,
    check_changes,
    check_generation_config,
    check_model,
    check_sizes,
    match_blocks,
    open_changes,
    refuse_missing,
)
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import TensorPlace
from ..modeling.ids_hashing import NgramHash, check_fingerprint
from ..modeling.modeling_engram_moe import (
    EngramMoEForCausalLM,
    EngramMoEForSequenceClassification,
    EngramMoEForTokenClassification,
    EngramMoEModel,
)
from ..modeling.table import EngramTable, tables_without_blocks
from ..modeling.table_blocks import block_name, is_of_table


CLASSES = {
    own.__name__: own
    for own in (EngramMoEForCausalLM, EngramMoEForSequenceClassification, EngramMoEForTokenClassification)
}


@dataclass(frozen=True)
class Part:
    """A checkpoint and where its tensors lie: the model, or tables that have a folder or repository of their own."""

    checkpoint: Checkpoint
    places: Mapping[str, TensorPlace]


def read_config(where: str | Path, **hub: Any) -> Any:
    """The config of a checkpoint: an `EngramMoEConfig`, or the `MemoryFiles` of a memory with another model or alone.

    Args:
        where: folder or repository.
        hub: arguments of `from_pretrained` that find a repository.

    Raises:
        FileNotFoundError, ValueError: as `EngramMoEConfig.from_pretrained`.
    """
    found = read_memory_config(where, **hub)
    return EngramMoEConfig.from_pretrained(where, **hub) if found is None else found


def backbone_config(config: Any) -> Any:
    """The fields of the model itself, of a config as `read_config` gives it."""
    return config.backbone if isinstance(config, MemoryFiles) else config


def check_loadable(parts: list[Part], config: Any, has_contents: bool = True) -> dict[str, EngramTable]:
    """Refuse what loading these files with this config would refuse.

    Args:
        parts: the model, and its tables where they lie elsewhere; or tables alone.
        config: as `read_config` gives it.
        has_contents: whether the files are on this machine, so that token map and row ids can be read.

    Returns:
        the tables by their names, without blocks.

    Raises:
        ValueError: says what does not fit, and names the file, field or tensor.
    """
    model, tables = parts[0], parts[-1]
    where = tables.checkpoint.where
    if isinstance(config, MemoryFiles):
        check_tensors(config.description.modules(), model.places, model.checkpoint.where)
        named = config.tables()
    else:
        named = _check_engram_moe(model, config, has_contents)
    fingerprint = tables.checkpoint.metadata.get("engram_fingerprint")
    if fingerprint is not None and config.engram_fingerprint is not None:
        check_fingerprint(config.engram_fingerprint, fingerprint, f"the tables of {where}")
    if named and not tables.checkpoint.blocks():
        refuse_missing((block_name(n, block.number) for n, t in named.items() for block in t.block_records), where)
    match_blocks(named, tables.checkpoint, tables.places, config)
    check_changes(named, tables.checkpoint, tables.places)
    if has_contents:
        for name in named:
            open_changes(name, tables.checkpoint, tables.places)
        for name, ngram_hash in _hashes(config, model).items():
            _confirm_hash(model.checkpoint, name, ngram_hash)
    return named


def _check_engram_moe(model: Part, config: EngramMoEConfig, has_contents: bool) -> dict[str, EngramTable]:
    """Everything beside the tables, and the tables that the config declares."""
    kinds = [CLASSES[name] for name in config.architectures or [] if isinstance(name, str) and name in CLASSES]
    kind = next(iter(kinds), EngramMoEModel)
    if has_contents and kind.can_generate():
        check_generation_config(next(iter(model.checkpoint.file_of.values())).parent / GENERATION_CONFIG)
    backbone = {name: place for name, place in model.places.items() if not is_of_table(name)}
    if backbone:
        check_sizes(config, backbone, model.checkpoint.where, EngramMoEModel.base_model_prefix)
    with torch.device("meta"), tables_without_blocks():
        built = kind(copy.deepcopy(config))
    if backbone:
        check_model(built, backbone, model.checkpoint.where, kind is not EngramMoEModel)
    return built.named_tables()


def _hashes(config: Any, model: Part) -> dict[str, NgramHash]:
    """Hashes that a checkpoint has, by the names that their token maps begin with."""
    if isinstance(config, MemoryFiles):
        return config.hashes()
    if not config.engram_layer_ids or all(is_of_table(name) for name in model.places):
        return {}
    return {"": NgramHash(copy.deepcopy(config))}


def _confirm_hash(checkpoint: Checkpoint, name: str, ngram_hash: NgramHash) -> None:
    """Read the token map of a hash, and see that map and constants are those of the config's fingerprint."""
    maps = [each for each in checkpoint.file_of if each.startswith(name) and each.endswith(OLD_TOKEN_MAP)]
    if maps and ngram_hash.token_map is not None:
        ngram_hash.token_map.copy_(TableFile(checkpoint.file_of[maps[0]]).tensor(maps[0]))
    ngram_hash.confirm(checkpoint.where)

"""What loading would refuse, found without loading: files, config, shapes and types, hash, changed rows.

`from_pretrained` makes the same checks by the same functions, so that inspecting and verifying agree with it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch

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
from ..modeling.table import tables_without_blocks
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


def check_loadable(parts: list[Part], config: EngramMoEConfig, has_contents: bool = True) -> None:
    """Refuse what loading these files with this config would refuse.

    Args:
        parts: the model, and its tables where they lie elsewhere; or tables alone.
        config: of the model.
        has_contents: whether the files are on this machine, so that token map and row ids can be read.

    Raises:
        ValueError: says what does not fit, and names the file, field or tensor.
    """
    model, tables = parts[0], parts[-1]
    kinds = [CLASSES[name] for name in config.architectures or [] if isinstance(name, str) and name in CLASSES]
    kind = next(iter(kinds), EngramMoEModel)
    if has_contents and kind.can_generate():
        check_generation_config(next(iter(model.checkpoint.file_of.values())).parent / GENERATION_CONFIG)
    where = tables.checkpoint.where
    backbone = {name: place for name, place in model.places.items() if not is_of_table(name)}
    if backbone:
        check_sizes(config, backbone, model.checkpoint.where, EngramMoEModel.base_model_prefix)
    with torch.device("meta"), tables_without_blocks():
        built = kind(copy.deepcopy(config))
    if backbone:
        check_model(built, backbone, model.checkpoint.where, kind is not EngramMoEModel)
    named = built.named_tables()
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
        if backbone and config.engram_layer_ids:
            _check_hash(model.checkpoint, config)


def _check_hash(checkpoint: Checkpoint, config: EngramMoEConfig) -> None:
    """Token map and constants of the hash are those of the config's fingerprint."""
    ngram_hash = NgramHash(copy.deepcopy(config))
    name = next((n for n in checkpoint.file_of if n.endswith(OLD_TOKEN_MAP)), None)
    if name is not None and ngram_hash.token_map is not None:
        ngram_hash.token_map.copy_(TableFile(checkpoint.file_of[name]).tensor(name))
    ngram_hash.confirm(checkpoint.where)

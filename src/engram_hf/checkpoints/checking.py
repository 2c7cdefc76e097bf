"""What loading would refuse, found without loading: files, config, shapes and types, hash, changed rows.

`from_pretrained` makes the same checks by the same functions, so that inspecting and verifying agree with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..modeling.checkpoint_loading import (
    Checkpoint,
    check_model,
    check_sizes,
    match_blocks,
    open_changes,
    refuse_foreign_changes,
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
from ..modeling.table_changes import CHANGED_KEY


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
        parts: the model, and its tables where they lie elsewhere. Tables alone will do.
        config: of the model.
        has_contents: whether the files are on this machine, so that token map and row ids can be read.

    Raises:
        ValueError: says what does not fit, and names the file, field or tensor.
    """
    model, tables = parts[0], parts[-1]
    blocks = set(model.checkpoint.blocks().values())
    backbone = {n: place for n, place in model.places.items() if n not in blocks and CHANGED_KEY.match(n) is None}
    if backbone:
        check_sizes(config, backbone, model.checkpoint.where, EngramMoEModel.base_model_prefix)
    kind = next((CLASSES[name] for name in config.architectures or [] if name in CLASSES), EngramMoEModel)
    with torch.device("meta"), tables_without_blocks():
        built = kind(config)
    if backbone:
        check_model(built, backbone, model.checkpoint.where, kind is not EngramMoEModel)
    named = built.named_tables()
    where = tables.checkpoint.where
    if named and not tables.checkpoint.blocks():
        refuse_missing((f"{n}.blocks.{i}" for n, t in named.items() for i in range(len(t.block_shapes))), where)
    match_blocks(named, tables.checkpoint, tables.places, config)
    refuse_foreign_changes(named, tables.checkpoint)
    fingerprint = tables.checkpoint.metadata.get("engram_fingerprint")
    if fingerprint is not None and config.engram_fingerprint is not None:
        check_fingerprint(config.engram_fingerprint, fingerprint, f"the tables of {where}")
    if has_contents:
        for name in named:
            open_changes(name, tables.checkpoint, tables.places)
        if backbone:
            _check_hash(model.checkpoint, config)


def _check_hash(checkpoint: Checkpoint, config: EngramMoEConfig) -> None:
    """Token map and hash constants are those of the config's fingerprint."""
    declared = config.engram_fingerprint
    if not config.engram_layer_ids:
        return
    name = next((name for name in checkpoint.file_of if name.endswith("token_map")), None)
    if name is None:
        if declared is not None:
            check_fingerprint(declared, NgramHash.from_config(config).fingerprint(None), checkpoint.where)
        return
    token_map = TableFile(checkpoint.file_of[name]).tensor(name)
    is_bound = bool((token_map >= 0).any())
    if config.engram_compressed_vocab_size == "auto" or not is_bound:
        if declared is not None or is_bound:
            raise ValueError(
                f"config.json and token map of {checkpoint.where} do not belong together: engram_compressed_vocab_size "
                f"is {config.engram_compressed_vocab_size!r}, engram_fingerprint is {declared}, and the token map is "
                f"{'bound' if is_bound else 'not bound'}. Load both from one checkpoint."
            )
        return
    pad_id = int(token_map[config.engram_pad_token_id])
    check_fingerprint(declared, NgramHash.from_config(config, pad_id).fingerprint(token_map), checkpoint.where)

"""A memory alone, as a folder or a repository: `save_engram` writes it, `load_engram` puts it into its model.

    config.json                              the memory's config with its fingerprint, and what it knows of its model
    model.safetensors.index.json             names and SHA-256 of the files
    model-00001-of-00001.safetensors         token map, projections, norms, convolution
    tables-layer-01-00001-of-00001.safetensors, ...    blocks

Names of tensors are those inside the decoder, without the memory's name: `layers.1.engram.table.blocks.0`. Files are
written, published and opened by the functions that save and load whole models.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..modeling.checkpoint_loading import (
    HUB_ARGUMENTS,
    Checkpoint,
    find_checkpoint,
    match_blocks,
    open_sources,
    read_headers,
)
from ..modeling.checkpoint_saving import publish, publishing, staging, write_tables
from ..modeling.disk_files import TableFile
from ..modeling.disk_reading import PageReader
from ..modeling.disk_safetensors import TensorContent, TensorPlace, write_file
from ..modeling.ids_hashing import NgramHash, check_fingerprint
from ..modeling.memory_layer import EngramLayer
from ..modeling.table import EngramTable, tables_without_blocks
from ..modeling.table_blocks import block_name, is_of_table
from ..modeling.table_placement import known_tables, plan_places, resolve_entries, split_device_map
from .added_memory import add_memory, memory_in, remove_engram, unwrap
from .memory_class import ModelWithMemory
from .memory_config import MemoryOfModel, ModelFacts
from .memory_files import MODEL_TYPE, Description, MemoryFiles, check_tensors, read_memory_config
from .memory_hooks import AddedMemory, memory_layers_of


logger = logging.get_logger(__name__)
SINGLE_FILE = "model.safetensors"
# What a memory and its model must agree in.
FACTS = ("hidden_size", "streams", "num_hidden_layers", "vocab_size")


class Parts(NamedTuple):
    """The modules of one memory by the names that they have in its folder."""

    ngram_hash: NgramHash
    layers: dict[str, EngramLayer]

    @property
    def tables(self) -> dict[str, EngramTable]:
        return {f"{name}.table": layer.table for name, layer in self.layers.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by their names in the folder; blocks as views of where they are."""
        state = {f"engram.{name}": tensor for name, tensor in self.ngram_hash.state_dict().items()}
        for layer_name, layer in self.layers.items():
            state |= {f"{layer_name}.{name}": tensor for name, tensor in layer.state_dict().items()}
        return state


def parts_of(decoder: nn.Module, memory: AddedMemory, name: str) -> Parts:
    layers = {f"{memory.facts.layers}.{layer.layer_idx}.engram": layer for layer in memory_layers_of(decoder, name)}
    return Parts(cast(NgramHash, memory[name]), layers)


def save_engram(
    model: PreTrainedModel, folder: str | Path, name: str | None = None, *, max_shard_size: str | int = "50GB"
) -> None:
    """Save a memory alone, without its model. A save that fails or is killed leaves the memory that was there.

    Args:
        model: that has the memory. LoRA on the memory's projections must be merged first.
        folder: to write.
        name: of the memory; by default the active one.
        max_shard_size: most bytes of a file; a block that is larger has a file of its own.

    Raises:
        ValueError: the model has no such memory; its projections are adapted or quantized; the folder holds something
            else.
        OSError: no space left, for one; nothing has changed then.

    Example:
        >>> model = add_engram(backbone, config, tokenizer)
        >>> save_engram(model, "my-memory")
    """
    whole = unwrap(model)
    decoder, memory, known = memory_in(whole, name)
    parts = parts_of(decoder, memory, known)
    config, folder = memory.config(known), Path(folder)
    _refuse_other_content(folder)
    state = parts.state()
    blocks = {key: tensor for key, tensor in state.items() if is_of_table(key)}
    dtypes = {table.row_format or str(table.dtype).removeprefix("torch.") for table in parts.tables.values()}
    saved = replace(config, table_dtype=next(iter(dtypes)))
    description = Description(memory.facts, {"default": saved}, "default", is_alone=True)
    _refuse_adapted(state, description)
    content = {"model_type": MODEL_TYPE, "engram": description.to_dict()}
    facts = {"engram_fingerprint": config.fingerprint, "config": {}}
    with publishing(folder), staging(folder) as stage:
        rest = {key: TensorContent.of(tensor.detach().cpu()) for key, tensor in state.items() if key not in blocks}
        write_file(stage / SINGLE_FILE, rest)
        (stage / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        written = write_tables(stage, blocks, parts.tables, "", max_shard_size)
        published = publish(stage, folder, written, facts)
    config.table_dtype = saved.table_dtype
    for table_name, table in parts.tables.items():
        for block in table.block_records:
            full_name = block_name(table_name, block.number)
            block.note_save(published[full_name], full_name)
        table.saving.follow()


def _refuse_other_content(folder: Path) -> None:
    """
    Raises:
        ValueError: a model lies there.
    """
    files = read_memory_config(folder) if (folder / "config.json").is_file() else None
    is_empty = not (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*"))
    if not is_empty and (files is None or not files.description.is_alone):
        raise ValueError(f"{folder} holds a model, which a memory alone would replace. Name another folder.")


def _refuse_adapted(state: Mapping[str, torch.Tensor], description: Description) -> None:
    """
    Raises:
        ValueError: the tensors are not those of a memory.
    """
    states = {name: module.state_dict() for name, module in description.modules().items()}
    wanted = {f"{name}.{key}": tensor.shape for name, own in states.items() for key, tensor in own.items()}
    found = {key: tensor.shape for key, tensor in state.items() if not is_of_table(key)}
    if wrong := sorted({*wanted.items()} ^ {*found.items()}):
        raise ValueError(
            f"The memory's layers are adapted or quantized, so they cannot be saved alone: {wrong[0][0]} is not as a "
            "memory has it. Merge LoRA first (merge_and_unload), or save the adapter."
        )


def load_engram(
    model: PreTrainedModel,
    folder_or_repo: str | Path,
    device_map: Any = None,
    name: str = "default",
    **hub: Any,
) -> PreTrainedModel:
    """Put a saved memory into its model. It is active from now on.

    Args:
        model: the model that it was made for, without a memory of this name.
        folder_or_repo: what `save_engram` or `push_engram` wrote.
        device_map: places of tables and blocks, as in `from_pretrained`: {"...table": "disk"}. A table without an entry
            goes with its layer.
        name: for the memory in this model.
        hub: revision, token, cache_dir, local_files_only and their like, for a repository.

    Returns:
        the model.

    Raises:
        FileNotFoundError: there is no memory.
        ValueError: it was made for a model of another width, number of layers or vocabulary, or for another tokenizer
            than the one beside the model; a tensor is missing or misshapen; the fingerprint differs; an entry names no
            table.

    Example:
        >>> save_engram(add_engram(backbone, config, tokenizer), "my-memory")
        >>> model = load_engram(remove_engram(backbone), "my-memory", device_map={"...table": "disk"})
        >>> model.engram_tables()[0].tiers
        {'disk': 525696}
    """
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise ValueError(f"load_engram takes {', '.join(HUB_ARGUMENTS)} of a repository, but not {unknown[0]}.")
    where = str(folder_or_repo)
    files, checkpoint = _find(where, hub)
    whole, facts = unwrap(model), files.description.facts
    others, entries = split_device_map(device_map)
    places = read_headers(checkpoint)

    def check(here: ModelFacts) -> None:
        for fact in FACTS:
            if getattr(here, fact) != getattr(facts, fact):
                raise ValueError(
                    f"The memory in {where} was made for a model with {fact} = {getattr(facts, fact)}, and this one "
                    f"has {getattr(here, fact)}. Load it into the model that it was made for."
                )
        check_tensors(files.description.modules(), places, where)

    def build_hash(view: MemoryOfModel) -> NgramHash:
        ngram_hash = NgramHash(view)
        _load_tensors(ngram_hash, "engram", checkpoint)
        ngram_hash.confirm(where)
        return ngram_hash

    with tables_without_blocks():
        add_memory(whole, files.memory, name, build_hash, check)
    try:
        decoder, memory, _ = memory_in(whole, name)
        parts = parts_of(decoder, memory, name)
        if others:
            tables = known_tables(cast(ModelWithMemory, whole).named_tables(), "")
            raise ValueError(f"load_engram places tables and blocks only, got {others!r}. {tables}")
        for layer_name, layer in parts.layers.items():
            _load_tensors(layer, layer_name, checkpoint)
        _open_blocks(cast(ModelWithMemory, whole), parts, name, checkpoint, places, entries)
        _check_tokenizer(whole, parts.ngram_hash)
    except BaseException:
        remove_engram(whole, name)
        raise
    return model


def _find(where: str, hub: Mapping[str, Any]) -> tuple[MemoryFiles, Checkpoint]:
    """
    Raises:
        FileNotFoundError, ValueError: there is no memory, or its config is damaged.
    """
    files = read_memory_config(where, **hub)
    if files is not None and not files.description.is_alone:
        raise ValueError(
            f"{where} holds a whole model, not a memory alone. Load it with AutoModelForCausalLM.from_pretrained."
        )
    checkpoint = None if files is None else find_checkpoint(where, hub)
    if files is None or checkpoint is None:
        raise FileNotFoundError(f"{where} is no folder or repository with a memory, as save_engram writes it.")
    return files, checkpoint


def _load_tensors(module: nn.Module, module_name: str, checkpoint: Checkpoint) -> None:
    """Read the tensors of a module beside its blocks, in the type that they were saved in."""
    for key, tensor in module.state_dict().items():
        name = f"{module_name}.{key}"
        if is_of_table(name):
            continue
        found = TableFile(checkpoint.file_of[name]).tensor(name)
        if tensor.is_floating_point():
            module.get_parameter(key).data = found.to(tensor.device, copy=True)
        else:
            tensor.copy_(found)


def _open_blocks(
    whole: ModelWithMemory,
    parts: Parts,
    name: str,
    checkpoint: Checkpoint,
    places: Mapping[str, TensorPlace],
    entries: Mapping,
) -> None:
    """Open the blocks of a memory's tables where the entries of a device map want them."""
    view = cast(MemoryOfModel, parts.ngram_hash.config)
    fingerprint = checkpoint.metadata.get("engram_fingerprint")
    if fingerprint is not None:
        check_fingerprint(view.engram_fingerprint, fingerprint, f"the tables of {checkpoint.where}")
    sources = open_sources(checkpoint, match_blocks(parts.tables, checkpoint, places, view))
    names_in_model = {id(table): table_name for table_name, table in whole.named_tables().items()}
    own = {names_in_model[id(table)]: (table, sources[key]) for key, table in parts.tables.items()}
    sizes = {key: [source.file.places[source.name].nbytes for source in found] for key, (_, found) in own.items()}
    default, _ = whole._default_places({key: table for key, (table, _) in own.items()})
    planned = plan_places(sizes, resolve_entries(entries, sizes, whole._tables_prefix()), default)
    reader = PageReader()
    for key, (table, found) in own.items():
        table.open_blocks(found, [p.tier for p in planned[key]], [p.device for p in planned[key]], reader)
    whole._name_ignored_by_ddp()


def _check_tokenizer(whole: PreTrainedModel, ngram_hash: NgramHash) -> None:
    """See that the tokenizer beside the model is the one that the memory was bound to, where there is one.

    Raises:
        ValueError: it is another one.
    """
    if ngram_hash.token_map is None or not whole.name_or_path:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(whole.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        logger.debug(f"No tokenizer lies in {whole.name_or_path!r}.")
        return
    ngram_hash.bind(tokenizer)

"""Lookup tables of somebody else's model on tiers: Qwen's n-grams, Gemma's per-layer embeddings, any large embedding.

A model keeps its class's name and code. Its class becomes a subclass of itself, which can do what every model with
tables can: move tables, prefetch, save. An embedding that is a table takes its rows from the checkpoint's own files
(served_embedding.py). transformers loads and saves everything else, and never sees a table.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from ..modeling.checkpoint_loading import HUB_ARGUMENTS, Checkpoint, find_checkpoint, open_changes, read_headers
from ..modeling.configuration_checks import refuse_v41
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.disk_reading import PageReader
from ..modeling.disk_safetensors import TensorPlace
from ..modeling.ids_hashing import NgramHash
from ..modeling.memory_model import Memory, ModelWithTables, TableInfo
from ..modeling.table import EngramTable, tables_without_blocks
from ..modeling.table_blocks import DISK, HOST, RESIDENT, block_name
from ..modeling.table_placement import (
    ANY_BEGINNING,
    AUTOMATIC,
    Place,
    memory_limits,
    place_in_map,
    place_of_layer,
    plan_places,
    resolve_entries,
    split_device_map,
)
from .memory_files import MODEL_TYPE
from .served_embedding import TableOfParts, serve
from .table_parts import (
    LAYOUT,
    NGRAM_TABLE,
    SCALED,
    TABLE_CHILD,
    TableParts,
    class_and_config,
    embeddings_of,
    find_parts,
    known_tables,
    names_in_model,
)


# Arguments of `from_pretrained` that cut weights over devices.
PARALLEL = ("tp_plan", "tp_size", "distributed_config")
# Conv state of Qwen's cache in which a layer keeps the last token ids.
STATE_OF_IDS = 2
ROWS_COMPARED = 2**16

# The tables of the model that is being built in this context.
_LOADING: ContextVar[Mapping[str, TableParts] | None] = ContextVar("engram_served_tables", default=None)


def load_with_tables(
    folder_or_repo: str | Path,
    device_map: Any = None,
    model_class: type[PreTrainedModel] | None = None,
    **from_pretrained_arguments: Any,
) -> Any:
    """Load a model whose lookup tables stay in the checkpoint's own files, or go to a tier that you name.

    Tables are the n-gram tables of Qwen (`qwen4_exp`), the per-layer embeddings of Gemma 3n and Gemma 4, and every
    untied `nn.Embedding` that `device_map` names. Loading reads headers, and nothing of a table on disk. The logits are
    those of the stock model, bit for bit, from every tier. `num_parameters()` counts the tables.

    Args:
        folder_or_repo: in the layout in which the model is published: safetensors in any number of parts.
        device_map: as for `from_pretrained`. An entry for a table, such as
            `{"": 0, "...embed_tokens_per_layer": "disk"}`, is "disk", "host" or "cpu" (RAM), "resident" (with its
            layer) or an accelerator. A key is the name of an embedding module, or three dots and its end. "auto" gives
            accelerators to the backbone first, and tables go where they fit then. "cpu+disk" has the backbone on the
            CPU and every table on disk.
        model_class: class of the model; by default the one that AutoModelForCausalLM takes.
        from_pretrained_arguments: for `from_pretrained`.

    Raises:
        NotImplementedError: it is a DeepSeek-V4.1, whose tables `open_tables` reads.
        ValueError, FileNotFoundError: there are no safetensors files; a table is packed (NVFP4, GGUF) or misshapen; a
            key names no table; an embedding is tied to the head; tensor parallelism is asked for.

    Example:
        >>> model = load_with_tables(gemma_folder, device_map="cpu+disk")
        >>> [(table.name, table.tiers) for table in engram_tables(model)]
        [('model.embed_tokens_per_layer', {'disk': 6336})]
    """
    where, arguments = str(folder_or_repo), dict(from_pretrained_arguments)
    _refuse_unsupported(where, arguments)
    config = arguments.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        named = {n: arguments[n] for n in (*HUB_ARGUMENTS, "trust_remote_code") if arguments.get(n) is not None}
        content, _ = PreTrainedConfig.get_config_dict(config or folder_or_repo, **named)
        refuse_v41(content.get("model_type"), where)
        config = AutoConfig.from_pretrained(config or folder_or_repo, **named)
    if isinstance(config, EngramMoEConfig) or config.model_type == MODEL_TYPE:
        return AutoModelForCausalLM.from_pretrained(folder_or_repo, device_map=device_map, **from_pretrained_arguments)
    stock: Any
    stock, config = class_and_config(config, model_class)
    checkpoint = _checkpoint_of(where, arguments)
    if checkpoint.commit is not None:
        # The very files that were found, also where the branch moves on meanwhile.
        arguments |= {"revision": checkpoint.commit, "force_download": False}
    with torch.device("meta"):
        skeleton = stock(copy.deepcopy(config))
    embeddings, tied = embeddings_of(skeleton), _tied(skeleton)
    backbone_map, entries = split_places(device_map, embeddings, tied)
    _check_keys(backbone_map, skeleton, embeddings)
    wanted = dict.fromkeys([*known_tables(embeddings), *(name for name, _ in entries if name is not None)])
    if not wanted:
        raise ValueError(
            f"{stock.__name__} has no lookup table that is known by its name. Name an embedding in device_map, such as "
            f'{{"": "cpu", "...{next(reversed(embeddings), "embed_tokens")}": "disk"}}.'
        )
    places = read_headers(checkpoint)
    names = names_in_model(skeleton, checkpoint.names, arguments.get("key_mapping"))
    parts = {name: find_parts(name, embeddings[name], names, checkpoint, places) for name in wanted}
    del skeleton, embeddings
    limits = memory_limits(arguments.get("max_memory")) if backbone_map in AUTOMATIC else None
    with _loading(parts):
        model = class_with_tables(stock).load_backbone(
            folder_or_repo, config=config, device_map=backbone_map, **arguments
        )
    # With `output_loading_info=True` it is a pair.
    model, *told = model if isinstance(model, tuple) else (model,)
    if any(each.saved_as is not None for each in parts.values()) and hasattr(model, "_weight_conversions"):
        # A checkpoint of a run has the names of the model. The next save has those of the published layout.
        del model._weight_conversions
    model.open_served_tables(parts, checkpoint, places, entries, limits, arguments.get("max_memory") is None)
    return (model, *told) if told else model


def place_tables(model: Any, places: Mapping[str, object]) -> None:
    """Move the tables of a model to other tiers, whoever loaded it.

    Of a model that `from_pretrained` has loaded, the embeddings that are named become tables. To put one on disk, the
    checkpoint that it was loaded from must still hold its rows.

    Args:
        model: with tables of its own, or any model of transformers.
        places: name of a table or its end (`"...ngram_embedding"`) to "disk", "host" or "cpu", "resident", or an
            accelerator.

    Raises:
        ValueError: an entry names no table; a table that was changed, or comes from no file, is to go to disk.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(gemma_folder)
        >>> place_tables(model, {"...embed_tokens_per_layer": "disk"})
        >>> engram_tables(model)[0].tiers
        {'disk': 6336}
    """
    if not hasattr(model, "place_tables"):
        _adopt(model, places)
    model.place_tables(places)


def engram_tables(model: Any) -> list[TableInfo]:
    """What tables a model has and where their parts live; none for a model without tables.

    Example:
        >>> engram_tables(load_with_tables(gemma_folder))[0].rows
        99
    """
    return model.engram_tables() if hasattr(model, "engram_tables") else []


def prefetch(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
    """Begin to bring the rows that a forward over these tokens will read closer, and return at once.

    For servers that know the next request, and for workers of a DataLoader. `forward` and `generate` prefetch by
    themselves. It changes when rows arrive, never which rows.

    Args:
        model: with tables.
        input_ids: (batch, seq) token ids.
        attention_mask: (batch, seq), 0 for padding.

    Example:
        >>> prefetch(load_with_tables(gemma_folder, "cpu+disk"), torch.tensor([[5, 7, 9]]))
    """
    if hasattr(model, "prefetch"):
        model.prefetch(input_ids, attention_mask)


def _refuse_unsupported(where: str, arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: GGUF, or weights that are cut over devices.
    """
    if arguments.get("gguf_file") is not None:
        raise ValueError(
            f"Rows of a GGUF file are packed and cannot be read one by one ({arguments['gguf_file']} of {where}). Load "
            "the safetensors files of the model."
        )
    parallel = [name for name in PARALLEL if arguments.get(name) is not None]
    if parallel:
        raise ValueError(
            f"{parallel[0]} cuts embeddings over devices, and a served table is one on every process. Leave it out, or "
            "load the model with from_pretrained."
        )


def _check_keys(backbone_map: Any, skeleton: Any, embeddings: Mapping[str, nn.Embedding]) -> None:
    """See that keys that speak of an embedding, and name no table, name a part of the backbone.

    Raises:
        ValueError: one is misspelled, or is the weight of a table.
    """
    names = {*dict(skeleton.named_modules()), *dict(skeleton.named_parameters())}
    for key in backbone_map if isinstance(backbone_map, Mapping) else ():
        is_weight = key.removesuffix(".weight") != key and key.removesuffix(".weight") in known_tables(embeddings)
        if is_weight or "embed" in key and key not in names:
            raise ValueError(
                f"device_map names {key}, which is no embedding. Those of this model are: {', '.join(embeddings)}."
            )


def _checkpoint_of(where: str, arguments: Mapping[str, Any]) -> Checkpoint:
    checkpoint = find_checkpoint(where, arguments)
    if checkpoint is None:
        raise ValueError(
            f"{where} has no safetensors files, and tables are served from these alone. Load it with from_pretrained, "
            "save it with save_pretrained, and load that folder."
        )
    return checkpoint


def _tied(model: Any) -> set[str]:
    """The tensors of a model that share memory with another one."""
    keys = model.all_tied_weights_keys
    return {*keys, *keys.values()}


def split_places(
    device_map: Any, embeddings: Mapping[str, nn.Embedding], tied: Iterable[str]
) -> tuple[Any, dict[tuple[str | None, int | None], Any]]:
    """The part of a `device_map` that transformers understands, and the entries of tables.

    Args:
        device_map: as for `load_with_tables`.
        embeddings: of the model, by name.
        tied: tensors that share memory with another one.

    Returns:
        the map without these entries, and (name of an embedding or None for every table, None) to the value.

    Raises:
        ValueError: a key names no embedding, or one that is tied.
    """
    if not isinstance(device_map, Mapping):
        return split_device_map(device_map)
    known, tied = set(known_tables(embeddings)), set(tied)
    backbone: dict[str, Any] = {}
    entries: dict[tuple[str | None, int | None], Any] = {}
    for key, value in device_map.items():
        if key.startswith(ANY_BEGINNING):
            end = f".{key.removeprefix(ANY_BEGINNING).lstrip('.')}"
            found = [name for name in embeddings if f".{name}".endswith(end)]
            if not found:
                raise ValueError(
                    f"device_map names {key}, which is no embedding. Those of this model are: {', '.join(embeddings)}."
                )
        else:
            is_plain = key not in known and (value not in (DISK, HOST, "cpu") or f"{key}.weight" in tied)
            found = [key] if key in embeddings and not (is_plain and value not in (DISK, HOST)) else []
        for name in found:
            if f"{name}.weight" in tied:
                raise ValueError(
                    f"{name} is tied to another weight, such as the head, which reads all of it in every step; it "
                    "cannot be a table. Leave it out of device_map."
                )
            entries[name, None] = value
        if not found:
            backbone[key] = value
    backbone_map, strange = split_device_map(backbone or None)
    if strange:
        raise ValueError(
            f"device_map names {next(iter(strange))[0]}, which is no embedding. Those of this model are: "
            f"{', '.join(embeddings)}."
        )
    return backbone_map, entries


@contextmanager
def _loading(parts: Mapping[str, TableParts]) -> Iterator[None]:
    """Models of a class with tables that are built inside serve these tables, which have no blocks yet."""
    token = _LOADING.set(parts)
    try:
        with tables_without_blocks():
            yield
    finally:
        _LOADING.reset(token)


def _fp8_embedding(module: nn.Embedding) -> nn.Embedding:
    """An embedding of transformers that scales FP8 rows, of the same size."""
    from transformers.integrations.finegrained_fp8 import FP8Embedding

    with torch.device("meta"):
        return FP8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)


def _serve(model: Any, parts: TableParts) -> TableOfParts:
    """Have an embedding of a model take its rows from a table without blocks."""
    module = model.get_submodule(parts.name)
    if parts.dtype == SCALED and type(module) is nn.Embedding:
        module = _fp8_embedding(module)
        model.set_submodule(parts.name, module)
    with tables_without_blocks():
        table = TableOfParts(parts.rows, parts.width, parts.dtype)
    serve(module, table)
    return table


class ModelWithServedTables(ModelWithTables):
    """Part of somebody else's model whose tables are served from tiers.

    served: name of a table's embedding to its parts, as a save of the model names them.
    """

    _has_code = False
    stock_class: type[PreTrainedModel]
    served: dict[str, TableParts]

    def __init__(self, config, *args, **kwargs):
        cast(Any, super()).__init__(config, *args, **kwargs)
        self.begin_serving(_LOADING.get() or {})

    def begin_serving(self, parts: Mapping[str, TableParts]) -> None:
        """Serve tables whose blocks are opened later."""
        self.served = {**getattr(self, "served", {}), **parts}
        for each in parts.values():
            _serve(self, each)
        self._prefetch_in_forwards()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, device_map=None, **kwargs):
        """As `load_with_tables`."""
        return load_with_tables(pretrained_model_name_or_path, device_map, cls.stock_class, **kwargs)

    @classmethod
    def load_backbone(cls, folder_or_repo, **arguments) -> Any:
        """The model as transformers loads it, its tables without blocks."""
        return cast(Any, super(ModelWithTables, cls)).from_pretrained(folder_or_repo, **arguments)

    def open_served_tables(
        self,
        parts: Mapping[str, TableParts],
        checkpoint: Checkpoint,
        places: Mapping[str, TensorPlace],
        entries: Mapping,
        limits: dict | None,
        has_margin: bool,
    ) -> None:
        """Give tables that wait for their blocks what a checkpoint holds, on the tiers that a `device_map` says."""
        tables = self.named_tables()
        paths = {checkpoint.file_of[tensor] for each in parts.values() for tensor in each.tensors}
        files = {path: TableFile(path) for path in sorted(paths)}
        sources = {
            f"{name}.{TABLE_CHILD}": [BlockSource(files[checkpoint.file_of[tensor]], tensor) for tensor in each.tensors]
            for name, each in parts.items()
        }
        sizes = {name: [s.file.places[s.name].nbytes for s in own] for name, own in sources.items()}
        resolved = {
            (name if name is None else f"{name}.{TABLE_CHILD}", number): value
            for (name, number), value in entries.items()
        }
        resolved = resolve_entries(resolved, sizes, "")
        default, _ = self._default_places(tables)
        free = None if limits is None else self._memory_left(limits, has_margin)
        planned = plan_places(sizes, resolved, default, free)
        reader = PageReader()
        for name, own in sources.items():
            tiers, devices = [place.tier for place in planned[name]], [place.device for place in planned[name]]
            tables[name].open_blocks(own, tiers, devices, reader)
            if (changed := open_changes(name, checkpoint, places)) is not None:
                tables[name].changes.bring(name, tables[name], changed)
        self._name_ignored_by_ddp()

    def _prefetch_in_forwards(self) -> None:
        """Put the hooks that prefetch on the modules that see token ids first."""
        whole: Any = self
        hooked: dict[str, list[str]] = {}
        for name in self.served:
            decoder = name.split(".layers.")[0] if name.endswith(NGRAM_TABLE) else ""
            hooked.setdefault(decoder, []).append(name.removeprefix(f"{decoder}."))
        for decoder, names in hooked.items():
            module = whole.get_submodule(decoder)
            if not hasattr(module, "tables_to_prefetch"):
                module.register_forward_pre_hook(prefetch_of_forward, with_kwargs=True)
            module.tables_to_prefetch = names

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return next((each.device for each in self._dense_parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the backbone."""
        floating = (each.dtype for each in self._dense_parameters() if each.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in transformers; the tables count."""
        counted = cast(Any, super()).num_parameters(only_trainable, exclude_embeddings)
        for table in self.named_tables().values():
            # The small parameter that stands for gradients of rows is not a weight.
            left_out = [table.row_gradients.norm, *(table.blocks if exclude_embeddings else [])]
            counted -= sum(each.numel() for each in left_out if each.requires_grad or not only_trainable)
        return counted

    def _dense_parameters(self) -> Iterator[nn.Parameter]:
        of_tables = {id(each) for table in self.named_tables().values() for each in table.parameters()}
        yield from (each for each in cast(nn.Module, self).parameters() if id(each) not in of_tables)

    def named_tables(self) -> dict[str, EngramTable]:
        """The tables by the names of their modules."""
        return {f"{name}.{TABLE_CHILD}": cast(Any, self).get_submodule(name).table for name in self.served}

    def engram_tables(self) -> list[TableInfo]:
        """What tables the model has and where their blocks live, by the names of their embeddings."""
        return [replace(info, name=info.name.removesuffix(f".{TABLE_CHILD}")) for info in super().engram_tables()]

    def place_tables(self, places: Mapping[str, object], hot_rows: int | None = None) -> None:
        """As `engram_hf.place_tables`."""
        given = {name.removesuffix(f".{TABLE_CHILD}"): value for name, value in places.items()}
        backbone, entries = split_places(given, embeddings_of(cast(nn.Module, self)), _tied(self))
        if backbone:
            raise ValueError(
                f"place_tables moves tables only, got {', '.join(map(str, backbone))}. Those of this model are: "
                f"{', '.join(self.served)}."
            )
        new = [name for name, _ in entries if name is not None and name not in self.served]
        if new:
            _take_over(self, new, {name: entries[name, None] for name in new})
        super().place_tables({f"{name}.{TABLE_CHILD}": value for (name, _), value in entries.items()}, hot_rows)

    @torch.no_grad()
    def prefetch(self, input_ids, attention_mask=None, position_ids=None) -> None:
        """As `engram_hf.prefetch`."""
        whole = cast(Any, self)
        for name in self.served:
            owner = whole.get_submodule(name.rpartition(".")[0]) if name.endswith(NGRAM_TABLE) else None
            _bring(whole.get_submodule(name).table, owner, input_ids, attention_mask, None)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """Give the input embeddings, or raise where their number would change.

        Raises:
            ValueError: rows of a table would have to be added or cut off.
        """
        embeddings = cast(Any, self).get_input_embeddings()
        multiple = kwargs.get("pad_to_multiple_of") or (args[0] if args else None) or 1
        wanted = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        if -(-wanted // multiple) * multiple == embeddings.num_embeddings:
            return embeddings
        raise ValueError(
            f"The vocabulary of a model with served tables stays at {embeddings.num_embeddings} ids, got "
            f"{new_num_tokens}: the rows of {next(iter(self.served))} lie in files. Load the model with "
            "from_pretrained, resize it, save it, and load that folder with load_with_tables."
        )

    def _default_places(self, tables) -> tuple[dict[str, Place], torch.device]:
        device_map = getattr(self, "hf_device_map", None) or {"": self.device}
        devices = [torch.device(value) for value in device_map.values() if value != DISK]
        main_device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        values = {name: place_in_map(device_map, name, main_device) for name in tables}
        return {name: place_of_layer(value, main_device) for name, value in values.items()}, main_device

    def _layer_device(self, table_name: str, main_device: torch.device) -> torch.device:
        return main_device

    def _tables_prefix(self) -> str:
        return ""

    def engram_memory(self) -> Memory:
        """No memory: the tables are the model's own."""
        return Memory(None, [])

    def _hashes(self) -> list[NgramHash]:
        return []

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`, with the names and bytes of tables as they are published.

        A checkpoint of a run with `engram_optimizers` has all tensors under the names that they have in the model, by
        which Trainer reads them again, and the rows of tables that have changed. To get the published layout of it,
        load it with `load_with_tables` and save it.
        """
        runs = [table.changes.run for table in self.named_tables().values()]
        if any(run is not None and run.has_checkpoint(Path(save_directory)) for run in runs):
            kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _block_names(self, is_checkpoint: bool) -> Callable[[str, int], str]:
        """A checkpoint of a run has blocks under their own names, with changed rows beside them. Every other save has
        the parts of the layout that the model came in."""
        if is_checkpoint:
            return block_name
        return lambda table, number: self.served[table.removesuffix(f".{TABLE_CHILD}")].layout[number]

    def _check_blocks(self, tables, blocks, names) -> None:
        missing = sorted(names - set(blocks))
        if missing:
            raise ValueError(
                f"The state_dict lacks {len(missing)} blocks of the tables, such as {missing[0]}. Give all of "
                "model.state_dict()."
            )

    def _note_saved(self, table_dtype, with_code) -> None:
        """The config says nothing of tables."""

    def _saved_facts(self) -> dict[str, Any]:
        return {LAYOUT: {name: list(parts.layout) for name, parts in self.served.items()}}

    def _remove_code(self, folder) -> None:
        """No code of this package lies beside such a model."""

    def __reduce_ex__(self, protocol):
        # The class cannot be found by its name, which is that of the model's own class.
        return _restore, (self.stock_class,), self.__dict__


def _restore(stock: Any) -> PreTrainedModel:
    """A model of the class with tables, without its attributes, which copying and unpickling bring."""
    made = class_with_tables(stock)
    return made.__new__(made)


@cache
def class_with_tables(stock: Any) -> Any:
    """The class of a model with served tables, made of the model's own class; one for each class."""
    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "config_class": stock.config_class,
        "stock_class": stock,
        # Parts of tables are opened, not loaded, so transformers finds them in a checkpoint and not in the model.
        "_keys_to_ignore_on_load_unexpected": [
            *(stock._keys_to_ignore_on_load_unexpected or []),
            *(rf"{end.rpartition('.')[2]}\." for end in (NGRAM_TABLE, "embed_tokens_per_layer")),
            rf"\.{TABLE_CHILD}\.(blocks|changed)\.",
        ],
    }
    return type(stock.__name__, (ModelWithServedTables, stock), names)


def _adopt(model: Any, places: Mapping[str, object]) -> None:
    """Make the embeddings that are named tables of a model that somebody else has loaded."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Tables of a {type(model).__name__} cannot be placed; give a model of transformers.")
    backbone, entries = split_places(places, embeddings_of(model), _tied(model))
    if backbone:
        raise ValueError(
            f"place_tables moves tables only, got {', '.join(map(str, backbone))}. Embeddings of this model are: "
            f"{', '.join(embeddings_of(model))}."
        )
    stock: Any = type(model)
    values = {name: value for (name, _), value in entries.items() if name is not None}
    before = {name: (model.get_submodule(name), type(model.get_submodule(name))) for name in values}
    weights = {name: module.weight for name, (module, _) in before.items()}
    model.__class__ = class_with_tables(stock)
    try:
        _take_over(model, list(values), values)
    except BaseException:
        _give_back(model, stock, before, weights)
        raise


def _give_back(model: Any, stock: Any, before: Mapping[str, tuple[Any, type]], weights: Mapping[str, Any]) -> None:
    """Make a model what it was before its embeddings began to become tables."""
    for name, (module, own_class) in before.items():
        module.__class__ = own_class
        module._modules.pop(TABLE_CHILD, None)
        module._parameters["weight"] = weights[name]
        model.set_submodule(name, module)
    for module in model.modules():
        module.__dict__.pop("tables_to_prefetch", None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is prefetch_of_forward]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    model.__dict__.pop("served", None)
    model.__class__ = stock


def _take_over(model: Any, names: list[str], values: Mapping[str, object]) -> None:
    """Make embeddings with a weight tables that hold the same rows: those of the files the model was loaded from where
    one is to go to disk, and the weight itself elsewhere."""
    weights = {name: model.get_submodule(name).weight for name in names}
    from_files = [name for name in names if values[name] == DISK]
    found: dict[str, TableParts] = {}
    checkpoint, places = None, {}
    if from_files:
        checkpoint = _checkpoint_of(model.name_or_path or "this model", {"revision": _commit_of(model)})
        places = read_headers(checkpoint)
        targets = names_in_model(model, checkpoint.names)
        found = {n: find_parts(n, model.get_submodule(n), targets, checkpoint, places) for n in from_files}
        for each in found.values():
            _check_same_rows(weights[each.name], each, checkpoint)
    for name in set(names) - set(found):
        parts = revert_weight_conversion(model, {f"{name}.weight": weights[name].detach()})
        tensors = sorted(parts, key=dot_natural_key)
        rows = tuple(len(parts[tensor]) for tensor in tensors)
        found[name] = TableParts(name, tuple(tensors), rows, weights[name].shape[1], weights[name].dtype)
    model.begin_serving({name: found[name] for name in names})
    tables = model.named_tables()
    for name in names:
        table = tables[f"{name}.{TABLE_CHILD}"]
        if name not in from_files:
            for block, rows in zip(table.block_records, weights[name].detach().split(list(found[name].rows))):
                requires_grad = weights[name].requires_grad and table.stored_as.is_trainable
                table.blocks.append(nn.Parameter(rows, requires_grad=requires_grad))
                block.tier = RESIDENT
            table._move_heads(table.blocks[0].device)
    if checkpoint is not None:
        on_disk = {(name, None): DISK for name in from_files}
        model.open_served_tables({n: found[n] for n in from_files}, checkpoint, places, on_disk, None, True)
        for name in from_files:
            # What was frozen stays so.
            for block in tables[f"{name}.{TABLE_CHILD}"].blocks:
                block.requires_grad_(block.requires_grad and weights[name].requires_grad)


def _commit_of(model: Any) -> str | None:
    return getattr(model.config, "_commit_hash", None)


def _check_same_rows(weight: torch.Tensor, parts: TableParts, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ValueError: the files have other rows than the model.
    """
    first = 0
    for tensor, rows in zip(parts.tensors, parts.rows):
        of_file = TableFile(checkpoint.file_of[tensor]).tensor(tensor)
        ours = weight.detach()[first : first + rows]
        for mine, theirs in zip(ours.split(ROWS_COMPARED), of_file.split(ROWS_COMPARED)):
            if not torch.equal(mine.cpu().view(torch.uint8), theirs.to(weight.dtype).view(torch.uint8)):
                raise ValueError(
                    f"{parts.name} has other rows than {checkpoint.where}, so it cannot live on disk there. Save the "
                    "model with save_pretrained, and load that folder with load_with_tables."
                )
        first += rows


def prefetch_of_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a forward: ask for the pages of the rows that it will read. Advisory; it never changes a forward."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    embeddings = {name: module.get_submodule(name) for name in cast(Any, module).tables_to_prefetch}
    if all(cast(Any, each).table.is_resident for each in embeddings.values()):
        return
    given = (kwargs.get("ple_input_ids"), kwargs.get("input_ids"), *args[:1])
    ids = next((each for each in given if isinstance(each, torch.Tensor) and not each.is_floating_point()), None)
    if ids is None or ids.ndim != 2:
        return
    cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)
    mask = kwargs.get("attention_mask")
    for name, embedding in embeddings.items():
        owner = module.get_submodule(name.rpartition(".")[0]) if f".{name}".endswith(f".{NGRAM_TABLE}") else None
        _bring(cast(Any, embedding).table, owner, ids, mask, cache)


@torch.no_grad()
def _bring(table: TableOfParts, owner: Any, ids: torch.Tensor, mask: Any, cache: Cache | None) -> None:
    """Ask for the pages of the rows of some token ids.

    Args:
        table: of the rows.
        owner: the module that hashes token ids; None where a token id is the row id.
        ids: (batch, seq).
        mask: (batch, keys) with 0 for padding; other masks are passed over.
        cache: that holds the tokens before `ids`.
    """
    if table.is_resident:
        return
    if owner is not None:
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            ids = torch.where(mask[:, -ids.shape[1] :].to(ids.device).bool(), ids, owner.eos_token_id)
        before = None
        if cache is not None and cache.has_previous_state(owner.layer_idx):
            before = cache.get_conv_state(owner.layer_idx, state_idx=STATE_OF_IDS)
        ids = ngram_row_ids(owner, ids, before)
    table.bring_pages(ids)


def ngram_row_ids(owner: Any, ids: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Row ids of n-grams, (batch, seq, heads), as the model's own module computes them.

    The module runs with a stand-in for its table that keeps the ids it is asked for.

    Args:
        owner: Qwen's module around the table.
        ids: (batch, seq).
        before: (batch, tokens) the token ids before them; None at the start of a text.
    """
    asked = _AskedIds()
    twin = copy.copy(owner)
    twin.__dict__["_modules"] = {**owner._modules, "ngram_embedding": asked}
    ids = ids.to(owner.layer_multipliers.device)
    history = ids if before is None else torch.cat([before.to(ids), ids], dim=-1)
    # Hooks of accelerate put a `forward` on the instance, which runs the owner itself.
    type(owner).forward(twin, history, None)
    return asked.ids[:, -ids.shape[1] :]


class _AskedIds(nn.Module):
    """Keeps the ids of a lookup."""

    def __init__(self):
        super().__init__()
        self.weight = torch.empty(0, device="meta")
        self.ids = torch.empty(0, dtype=torch.long)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        return torch.zeros(*ids.shape, 1, device=ids.device)

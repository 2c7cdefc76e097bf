"""The class of somebody else's model whose lookup tables are served: the model's own class, with tables.

Its class is a subclass of the model's own, which can do what every model with tables can: move tables, prefetch, save.
An embedding that is a table takes its rows from the checkpoint's own files (served_embedding.py). transformers loads
and saves everything else, and never sees a table.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.checkpoint_loading import Checkpoint, open_changes, read_headers
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.disk_reading import PageReader
from ..modeling.disk_safetensors import TensorPlace, read_json
from ..modeling.ids_hashing import NgramHash
from ..modeling.ids_reach import check_token_ids
from ..modeling.memory_model import CountsCopies, Memory, ModelWithTables
from ..modeling.table import EngramTable, tables_without_blocks
from ..modeling.table_blocks import DISK, block_name
from ..modeling.table_placement import (
    AUTOMATIC,
    Place,
    TableInfo,
    check_places,
    memory_limits,
    place_in_map,
    place_of_layer,
    plan_places,
    resolve_entries,
)
from .same_name import class_of_same_name, without_attributes
from .served_embedding import TableOfParts, serve
from .served_prefetch import bring_rows, prefetch_of_forward
from .table_parts import (
    LAYOUT,
    NGRAM_TABLE,
    SCALED,
    TABLE_CHILD,
    TABLE_NAMES,
    TableParts,
    checkpoint_of,
    class_and_config,
    config_and_arguments,
    embeddings_of,
    find_parts,
    known_tables,
    names_in_model,
    split_places,
    tied_weights,
)
from .taking_over import take_over


# Arguments of `from_pretrained` that cut weights over devices.
PARALLEL = ("tp_plan", "tp_size", "distributed_config")
# Beside a model that was saved for `transformers serve`, which asks AutoModelForDecision before all others.
CODE_FILE = "engram_tables.py"
CLASS_OF_CODE = "engram_tables.ModelForServing"
CODE = """# The tables of this model are served by the package engram-hf.
from engram_hf.adapters.other_tables import ModelForServing

__all__ = ["ModelForServing"]
"""

# The tables of the model that is being built in this context.
_LOADING: ContextVar[Mapping[str, TableParts] | None] = ContextVar("engram_served_tables", default=None)


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


class ModelWithServedTables(CountsCopies, ModelWithTables):
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
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, device_map=None, config=None, **kwargs) -> Any:
        """As `load_with_tables`, for a model of this class.

        Args:
            config: as for any model of transformers; by default that of the checkpoint.
        """
        where = str(pretrained_model_name_or_path)
        refuse_unsupported(where, kwargs)
        config, arguments = config_and_arguments(where, config, kwargs)
        stock, config = class_and_config(config, cls.stock_class)
        checkpoint = checkpoint_of(where, arguments)
        if checkpoint.commit is not None:
            # The very files that were found, also where the branch moves on meanwhile.
            arguments |= {"revision": checkpoint.commit, "force_download": False}
        with torch.device("meta"):
            skeleton = cast(Any, stock)(copy.deepcopy(config))
        embeddings, tied = embeddings_of(skeleton), tied_weights(skeleton)
        backbone_map, entries = split_places(device_map, embeddings, tied)
        _check_keys(backbone_map, skeleton, embeddings)
        wanted = dict.fromkeys([*known_tables(embeddings), *(name for name, _ in entries if name is not None)])
        if not wanted:
            raise ValueError(
                f"{stock.__name__} has no lookup table that is known by its name. Name an embedding in device_map, "
                f'such as {{"": "cpu", "...{next(reversed(embeddings), "embed_tokens")}": "disk"}}.'
            )
        places = read_headers(checkpoint)
        names = names_in_model(skeleton, checkpoint.names, arguments.get("key_mapping"))
        parts = {name: find_parts(name, embeddings[name], names, checkpoint, places) for name in wanted}
        del skeleton, embeddings
        limits = memory_limits(arguments.get("max_memory")) if backbone_map in AUTOMATIC else None
        with _loading(parts):
            # Past the loading of tables of one's own, to that of transformers.
            model = cast(Any, super(ModelWithTables, cls)).from_pretrained(
                where, *model_args, config=config, device_map=backbone_map, **arguments
            )
        # With `output_loading_info=True` it is a pair.
        model, *told = model if isinstance(model, tuple) else (model,)
        if any(each.saved_as is not None for each in parts.values()) and hasattr(model, "_weight_conversions"):
            # A checkpoint of a run has the names of the model. The next save has those of the published layout.
            del model._weight_conversions
        model.open_served_tables(parts, checkpoint, places, entries, limits, arguments.get("max_memory") is None)
        return (model, *told) if told else model

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
            tables[name].changes.bring(name, tables[name], open_changes(name, checkpoint, places))
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

    def place_tables(self, places: Mapping[str, object], hot_rows: int | None = None, host_nodes: Any = None) -> None:
        """As `engram_hf.place_tables`."""
        check_places(places, self.served)
        given = {name.removesuffix(f".{TABLE_CHILD}"): value for name, value in places.items()}
        backbone, entries = split_places(given, embeddings_of(cast(nn.Module, self)), tied_weights(self))
        if backbone:
            raise ValueError(
                f"place_tables moves tables only, got {', '.join(map(str, backbone))}. Those of this model are: "
                f"{', '.join(self.served)}."
            )
        new = [name for name, _ in entries if name is not None and name not in self.served]
        if new:
            take_over(self, new, {name: entries[name, None] for name in new})
        named = {f"{name}.{TABLE_CHILD}": value for (name, _), value in entries.items()}
        super().place_tables(named, hot_rows, host_nodes)

    @torch.no_grad()
    def prefetch(self, input_ids, attention_mask=None, position_ids=None) -> None:
        """As `engram_hf.prefetch`."""
        check_token_ids(input_ids)
        whole = cast(Any, self)
        for name in self.served:
            owner = whole.get_submodule(name.rpartition(".")[0]) if name.endswith(NGRAM_TABLE) else None
            bring_rows(whole.get_submodule(name).table, owner, input_ids, attention_mask, None)

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

    def save_pretrained(self, save_directory, *args, with_code: bool = False, **kwargs):
        """As `PreTrainedModel.save_pretrained`, with the names and bytes of tables as they are published.

        A checkpoint of a run with `engram_optimizers` has all tensors under the names that they have in the model, by
        which Trainer reads them again, and the rows of tables that have changed. To get the published layout of it,
        load it with `load_with_tables` and save it.

        Args:
            with_code: whether a line of code lies beside the weights, by which `transformers serve FOLDER
                --trust-remote-code --device cpu+disk` finds this package and serves the tables. Everything else loads
                the folder as it is.
        """
        runs = [table.changes.run for table in self.named_tables().values()]
        if any(run is not None and run.has_checkpoint(Path(save_directory)) for run in runs):
            kwargs.setdefault("save_original_format", False)
        result = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if with_code and path.is_file():
            path.with_name(CODE_FILE).write_text(CODE)
            content = {**read_json(path), "auto_map": {"AutoModelForDecision": CLASS_OF_CODE}}
            path.write_text(json.dumps(content, indent=2) + "\n")
        return result

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
        return without_attributes, (class_with_tables, self.stock_class), self.__dict__


@cache
def class_with_tables(stock: Any) -> Any:
    """The class of a model with served tables, made of the model's own class; one for each class."""
    # Parts of tables are opened, not loaded, so transformers finds them in a checkpoint and not in the model.
    ignored = [
        *(stock._keys_to_ignore_on_load_unexpected or []),
        *(rf"{end.rpartition('.')[2]}\." for end in TABLE_NAMES),
        rf"\.{TABLE_CHILD}\.(blocks|changed)\.",
    ]
    return class_of_same_name(
        stock,
        (ModelWithServedTables, stock),
        config_class=stock.config_class,
        stock_class=stock,
        _keys_to_ignore_on_load_unexpected=ignored,
    )


def refuse_unsupported(where: str, arguments: Mapping[str, Any]) -> None:
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

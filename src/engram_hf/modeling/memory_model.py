"""Loading and moving a model whose tables live on tiers: the part of `EngramMoEPreTrainedModel` that does it.

transformers loads the backbone and never sees a block; the blocks are opened and placed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import cached_file, logging

from .checkpoint_loading import (
    HUB_ARGUMENTS,
    INDEX_FILE,
    find_checkpoint,
    match_blocks,
    open_changes,
    open_sources,
    read_headers,
    refuse_foreign_changes,
    refuse_incomplete,
    refuse_integers,
    refuse_missing,
)
from .disk_reading import PageReader
from .engram_refusals import refuse_gguf
from .hot_rows import HotRows
from .ids_hashing import check_fingerprint
from .table import EngramTable, tables_without_blocks
from .table_placement import (
    AUTOMATIC,
    Place,
    check_backbone_keys,
    check_entries,
    known_tables,
    memory_limits,
    place_of_layer,
    plan_places,
    split_device_map,
)


logger = logging.get_logger(__name__)
# Of an accelerator's free memory that an automatic map leaves to activations.
FREE_SHARE = 0.9


@dataclass(frozen=True)
class BlockInfo:
    """A block: its parameter's name, rows, bytes, tier ("resident", "host", "disk"), device, and file if it has one."""

    name: str
    rows: int
    nbytes: int
    tier: str
    device: torch.device
    file: Path | None


@dataclass(frozen=True)
class TableInfo:
    """A table: its module's name, rows, width of a row, type, bytes, blocks, and its hot rows with their counts."""

    name: str
    rows: int
    head_dim: int
    dtype: str
    nbytes: int
    blocks: tuple[BlockInfo, ...]
    hot_rows: HotRows | None

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes on each tier."""
        return {tier: sum(b.nbytes for b in self.blocks if b.tier == tier) for tier in {b.tier for b in self.blocks}}


class TablesOnTiers:
    """Part of `EngramMoEPreTrainedModel`."""

    # Blocks are opened, not loaded, so transformers finds them in a checkpoint and not in the model.
    _keys_to_ignore_on_load_unexpected = [r"\.engram\.table\.(blocks|changed)\."]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        device_map=None,
        tables_from=None,
        hot_rows: int = 0,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`, with tables on tiers.

        Args:
            pretrained_model_name_or_path: folder or repository.
            device_map: as in transformers; an entry for a table ("model.layers.1.engram.table") or for a block of it
                ("model.layers.1.engram.table.blocks.0") is "cpu" (host memory), "disk" (rows are read from the
                checkpoint's own files), or an accelerator. A table without an entry stays with its layer. "auto" gives
                accelerators to the backbone first, then to blocks; the rest goes to host memory, then to disk. Where
                only a string can be given, "cpu+disk" is a map of the backbone and an entry of every table.
            tables_from: folder or repository of the tables, where they are not beside the backbone; by default the
                repository that the config names, if it names one.
            hot_rows: rows per table to keep in a cache, on the device that computes, in front of blocks that are not
                resident; 0 for none.
            output_loading_info: also return transformers' lists; tensors of the backbone may then be missing.

        Raises:
            ValueError, FileNotFoundError: a tensor is missing, misshapen or of an integer type; a file is truncated,
                missing or outside its folder; there is no config.json; the fingerprint differs; an entry names no
                table or part of a layer; weights are in GGUF.
        """
        where = str(pretrained_model_name_or_path)
        refuse_gguf(kwargs.get("gguf_file"))
        backbone_map, entries = split_device_map(device_map)
        limits = memory_limits(kwargs.get("max_memory")) if backbone_map in AUTOMATIC else None
        load = super().from_pretrained
        is_stored = pretrained_model_name_or_path is not None and kwargs.get("use_safetensors") is not False
        checkpoint = find_checkpoint(pretrained_model_name_or_path, kwargs) if is_stored else None
        if checkpoint is not None and checkpoint.commit is not None:
            # The very files that were found, also where the branch moves on meanwhile.
            kwargs = {**kwargs, "revision": checkpoint.commit, "force_download": False}
        if checkpoint is not None and output_loading_info and not (checkpoint.blocks() or tables_from or entries):
            # Who asks for the list of what is missing gets it, and tables drawn at random.
            checkpoint = None
        if checkpoint is None:
            if entries or tables_from or hot_rows:
                raise ValueError(
                    f"Tables can be placed only where they lie in safetensors files, and {where} has none. If it holds "
                    "an adapter, load its base model with these arguments, then model.load_adapter(folder)."
                )
            model, info = load(
                pretrained_model_name_or_path, *model_args, device_map=device_map, output_loading_info=True, **kwargs
            )
            if pretrained_model_name_or_path is not None and not output_loading_info:
                refuse_incomplete(info, where, "", is_same_class=False)
            model.base_model.confirm_hash(where)
            return (model, info) if output_loading_info else model

        places = read_headers(checkpoint)
        with tables_without_blocks():
            model, info = load(
                pretrained_model_name_or_path, *model_args, device_map=backbone_map, output_loading_info=True, **kwargs
            )
        named = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        check_backbone_keys(backbone_map, named, model._tables_prefix(), model.named_tables())
        if getattr(model.config, "quantization_config", None) is None:
            refuse_integers({n: p for n, p in places.items() if n not in info["unexpected_keys"]}, where)
        if not output_loading_info:
            prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
            is_same_class = cls.__name__ in (model.config.architectures or [])
            refuse_incomplete(info, where, prefix, is_same_class)
        tables = checkpoint
        hub = {key: kwargs.get(key) for key in HUB_ARGUMENTS if key not in ("revision", "subfolder")}
        if tables_from is None and not checkpoint.blocks() and model.config.engram_tables_repo is not None:
            tables_from, hub["revision"] = model.config.engram_tables_repo, model.config.engram_tables_revision
        if tables_from is not None:
            found = find_checkpoint(tables_from, hub)
            if found is None:
                if not Path(tables_from).is_dir():
                    # What is wrong with a repository, transformers says best.
                    cached_file(tables_from, INDEX_FILE, **{k: value for k, value in hub.items() if value is not None})
                raise FileNotFoundError(f"{str(tables_from)!r} holds no safetensors files with tables of this model.")
            tables, places = found, read_headers(found)
        model.base_model.confirm_hash(where)
        model._open_tables(tables, places, entries, limits, kwargs.get("max_memory") is None, hot_rows)
        return (model, info) if output_loading_info else model

    def _open_tables(self, checkpoint, places, entries, limits, has_margin: bool, hot_rows: int) -> None:
        tables = self.base_model.named_tables()
        fingerprint = checkpoint.metadata.get("engram_fingerprint")
        if fingerprint is not None and self.config.engram_fingerprint is not None:
            check_fingerprint(self.config.engram_fingerprint, fingerprint, f"the tables of {checkpoint.where}")
        if tables and not checkpoint.blocks():
            refuse_missing(
                (f"{n}.blocks.{i}" for n, t in tables.items() for i in range(len(t.block_shapes))), checkpoint.where
            )
        refuse_foreign_changes(tables, checkpoint)
        sources = open_sources(checkpoint, match_blocks(tables, checkpoint, places, self.config))
        sizes = {name: [source.file.places[source.name].nbytes for source in sources[name]] for name in tables}
        check_entries(entries, sizes, self._tables_prefix())
        default, main_device = self._default_places(tables)
        free = None if limits is None else self._memory_left(limits, has_margin)
        planned = plan_places(sizes, entries, default, free)
        reader = PageReader()
        for name, table in tables.items():
            table.reader = reader
            table.open_blocks(sources[name], [p.tier for p in planned[name]], [p.device for p in planned[name]])
            if (changes := open_changes(name, checkpoint, places)) is not None:
                table.row_changes.bring(table, *changes)
            if hot_rows and not table.is_resident:
                table.keep_hot_rows(hot_rows, self._layer_device(name, main_device))

    def _tables_prefix(self) -> str:
        return "" if self.base_model is self else f"{self.base_model_prefix}."

    def _default_places(self, tables: Mapping[str, EngramTable]) -> tuple[dict[str, Place], torch.device]:
        """For each table the place of blocks without an entry: with its layer; and the device that computes."""
        device_map = getattr(self, "hf_device_map", None) or {"": self.base_model.embed_tokens.weight.device}
        devices = [torch.device(value) for value in device_map.values() if value != "disk"]
        main_device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        default = {}
        for name in tables:
            path = f"{self._tables_prefix()}{name}."
            keys = [key for key in device_map if key == "" or path.startswith(f"{key}.")]
            value = device_map[max(keys, key=len)] if keys else main_device
            default[name] = place_of_layer(value, main_device)
        return default, main_device

    def _layer_device(self, table_name: str, main_device: torch.device) -> torch.device:
        device = self.base_model.get_submodule(table_name.removesuffix(".table")).value_proj.weight.device
        return main_device if device.type == "meta" else device

    def _memory_left(self, limits: dict, has_margin: bool) -> dict:
        """Bytes by device that the backbone leaves."""
        free = {key: int(n * FREE_SHARE) if has_margin and key != "cpu" else n for key, n in limits.items()}
        for tensor in self.state_dict().values():
            key = "cpu" if tensor.device.type == "cpu" else tensor.device.index or 0
            if not tensor.is_meta:
                free[key] = free.get(key, 0) - tensor.nbytes
        return free

    def named_tables(self) -> dict[str, EngramTable]:
        """The tables by their names inside the base model, in the order of layers."""
        return {name: module for name, module in self.base_model.named_modules() if isinstance(module, EngramTable)}

    def engram_tables(self) -> list[TableInfo]:
        """What tables the model has and where their blocks live, in the order of layers."""
        infos = []
        for name, table in self.named_tables().items():
            name = f"{self._tables_prefix()}{name}"
            blocks = tuple(
                BlockInfo(
                    name=f"{name}.blocks.{number}",
                    rows=block.shape[0],
                    nbytes=block.nbytes,
                    tier=table.tiers[number],
                    device=block.device,
                    file=None if table.sources[number] is None else table.sources[number].file.path,
                )
                for number, block in enumerate(table.blocks)
            )
            infos.append(
                TableInfo(
                    name=name,
                    rows=table.num_rows,
                    head_dim=table.head_dim,
                    dtype=table.row_format or str(table.dtype).removeprefix("torch."),
                    nbytes=sum(block.nbytes for block in blocks),
                    blocks=blocks,
                    hot_rows=table.hot_rows,
                )
            )
        return infos

    def place_tables(self, places: Mapping[str, object], hot_rows: int | None = None) -> None:
        """Move tables or blocks to other tiers.

        Args:
            places: as the entries of a `device_map`: name of a table or block to "cpu", "disk" or an accelerator.
            hot_rows: rows per table to keep in a cache from now on (0: none); None leaves the caches as they are.

        Raises:
            ValueError: an entry names no table; or a block that was changed, or comes from no file, is to go to disk.

        Example:
            >>> model.place_tables({"model.layers.1.engram.table": "disk"})
        """
        tables = self.named_tables()
        others, entries = split_device_map(places)
        if others:
            known = known_tables(tables, self._tables_prefix())
            raise ValueError(f"place_tables moves tables and blocks only, got {', '.join(map(str, others))}. {known}")
        check_entries(
            entries, {name: [b.nbytes for b in table.blocks] for name, table in tables.items()}, self._tables_prefix()
        )
        sizes = {name: [block.nbytes for block in tables[name].blocks] for name, _ in entries}
        current = {name: Place("") for name in sizes}
        for name, planned in plan_places(sizes, entries, current).items():
            for number, place in enumerate(planned):
                if place.tier:
                    tables[name].place(number, place.tier, place.device)
            if tables[name].hot_rows is not None:
                tables[name].hot_rows.clear()
        if hot_rows is not None:
            _, main_device = self._default_places(tables)
            for name, table in tables.items():
                table.keep_hot_rows(0 if table.is_resident else hot_rows, self._layer_device(name, main_device))

    @torch.no_grad()
    def prefetch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> None:
        """Begin to bring the rows that a forward over these tokens will read closer, and return at once.

        For servers that know the next request, and for workers of a DataLoader: they share the page cache. `forward`
        and `generate` prefetch by themselves.

        Args:
            input_ids: (batch, seq) raw ids.
            attention_mask: (batch, seq), 0 for padding.
            position_ids: (batch or 1, seq), where documents are packed.
        """
        base = self.base_model
        tables = [layer.engram.table for layer in base.memory_layers()]
        if all(table.is_resident for table in tables):
            return
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        context = base.ngram_context(input_ids, position_ids, attention_mask)
        row_ids = base.all_row_ids(context)
        for layer in base.memory_layers():
            layer.engram.table.prefetch(row_ids[layer.engram.layer_idx])

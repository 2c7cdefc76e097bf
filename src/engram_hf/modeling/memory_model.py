"""What any model with tables can do: load with its tables on tiers, save, move tables, prefetch, bind a tokenizer.

transformers loads and saves the backbone, and never sees a block. Blocks are opened, placed and written here.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging
from transformers.utils.hub import hf_api

from .checkpoint_loading import (
    GENERATION_CONFIG,
    HUB_ARGUMENTS,
    INDEX_FILE,
    OLD_TOKEN_MAP,
    TOKEN_MAP,
    Checkpoint,
    check_changes,
    check_generation_config,
    check_model,
    check_sizes,
    digest_of_tables,
    find_checkpoint,
    find_file,
    match_blocks,
    open_changes,
    open_sources,
    read_headers,
    refuse_incomplete,
    refuse_missing,
    unseen_fields,
)
from .checkpoint_saving import (
    check_blocks,
    is_other_rank,
    publish,
    publishing,
    refuse_model_in,
    remove_code,
    remove_marker,
    save_code,
    set_auto_map,
    staging,
    write_tables,
)
from .configuration_checks import check_source
from .configuration_engram_moe import PRESETS
from .disk_reading import PageReader
from .ids_hashing import NgramHash, check_fingerprint, differing_parts
from .ids_reach import check_token_ids
from .memory_layer import EngramLayer
from .memory_patches import ModelPatches, check_patch
from .table import EngramTable, tables_without_blocks
from .table_blocks import HostNodes, block_name, is_of_table
from .table_cut import open_parts
from .table_patches import (
    PATCH_DTYPES,
    PatchedRows,
    RowPatch,
    RowsInTraining,
    base_digest,
    count_copies,
    describe_patch_in,
    generating,
    read_patch,
    save_trained_patch,
)
from .table_placement import (
    AUTOMATIC,
    Place,
    TableInfo,
    bind_host_blocks,
    check_backbone_keys,
    check_places,
    check_ranks,
    describe_tables,
    known_tables,
    left_by_backbone,
    memory_limits,
    memory_of,
    place_in_map,
    place_of_layer,
    plan_places,
    resolve_entries,
    split_device_map,
)
from .table_ranks import RowService, start_ranks


logger = logging.get_logger(__name__)
# Read by torch's DistributedDataParallel.
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
# What names of parameters begin with in a model of PEFT, with a tuner in between and without one.
PEFT_PREFIXES = ("base_model.model.", "base_model.")
# An attribute of base models.
ROW_PATCHES = "_engram_row_patches"
# Of an accelerator's free memory that an automatic map leaves to activations.
FREE_SHARE = 0.9


class CountsCopies:
    """Part of a model that generates: patches of requests are chosen for sequences, and `generate` may repeat each."""

    def generate(self, *args, **kwargs):
        """As in transformers."""
        with generating():
            return cast(Any, super()).generate(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args, **kwargs):
        """As in transformers, which calls it once, with the number of copies, before the first forward."""
        count_copies(kwargs.get("expand_size", args[0] if args else 1))
        return cast(Any, super())._expand_inputs_for_generation(*args, **kwargs)


class Memory(NamedTuple):
    """The hash of a memory, None where there is none, and its layers in order."""

    ngram_hash: NgramHash | None
    layers: list[EngramLayer]


class ModelWithTables:
    """Part of a `PreTrainedModel` whose base model has tables and an `ngram_hash`."""

    # Whether a save copies the modeling code.
    _has_code = True
    # Blocks are opened, not loaded, so transformers finds them in a checkpoint and not in the model.
    _keys_to_ignore_on_load_unexpected = [r"\.table\.(blocks|changed)\."]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        device_map=None,
        tables_from=None,
        hot_rows: int = 0,
        output_loading_info: bool = False,
        engram_ranks: str | None = None,
        host_nodes: Sequence[int] | str | None = None,
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`, with tables on tiers.

        Args:
            pretrained_model_name_or_path: folder or repository.
            device_map: as in transformers. An entry for a table ("model.layers.1.engram.table"), for a block of it
                ("model.layers.1.engram.table.blocks.0") or for all tables ("...table") is "host" or "cpu" (RAM), "disk"
                (rows are read from the checkpoint's own files), "resident" (with its layer), or an accelerator. A table
                without an entry stays with its layer. "auto" gives accelerators to the backbone first, then to blocks;
                the rest goes to host memory, then to disk. Where only a string can be given, "cpu+disk" is a map of the
                backbone and an entry of every table.
            tables_from: folder or repository of the tables, where they are not beside the backbone; by default the
                repository that the config names, if it names one.
            hot_rows: rows per table to keep in a cache, on the device that computes, in front of blocks that are not
                resident; 0 for none.
            output_loading_info: also return transformers' lists; tensors of the backbone may then be missing.
            engram_ranks: "shard" cuts every table over the processes of this run, so that each holds its part of the
                rows and asks the others for the rest. All processes load the model at the same time. None has every
                process hold whole tables.
            host_nodes: NUMA nodes such as [2], on which blocks in host memory are to lie, or "interleave" for pages on
                all nodes in turn. None leaves it to the system. Linux only.

        Raises:
            ValueError, FileNotFoundError: a tensor is missing, misshapen or of an integer type; a file is truncated,
                missing or outside its folder; there is no config.json; the fingerprint differs; an entry names no
                table or part of a layer; weights are in GGUF; engram_ranks is another word, or there is one process.
            NotImplementedError: engram_ranks goes with hot_rows or with a mesh of devices; host_nodes is given on
                another system than Linux.
            OSError: host_nodes is given, and the system does not let this process bind memory.
        """
        check_ranks(engram_ranks, hot_rows, kwargs)
        nodes = None if host_nodes is None else HostNodes.of(host_nodes)
        where = str(pretrained_model_name_or_path)
        if kwargs.get("gguf_file") is not None:
            raise ValueError(
                f"GGUF has no memory layers, so {kwargs['gguf_file']} cannot hold this model. Load its safetensors "
                "folder. To make it smaller, quantize tables with quantize_tables and the backbone with a "
                "quantization_config."
            )
        if pretrained_model_name_or_path is not None:
            check_source(pretrained_model_name_or_path, PRESETS, kwargs.get("cache_dir"))
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
            if entries or tables_from or hot_rows or engram_ranks or nodes:
                raise ValueError(
                    "Tables can be placed, or cut over ranks, only where they lie in safetensors files, and "
                    f"{where} has none. If it holds an adapter, load its base model with these arguments, then "
                    "model.load_adapter(folder)."
                )
            model, info = load(
                pretrained_model_name_or_path, *model_args, device_map=device_map, output_loading_info=True, **kwargs
            )
            if pretrained_model_name_or_path is not None and not output_loading_info:
                refuse_incomplete(info, where, "", is_same_class=False)
            model._confirm_hash(where)
            return (model, info) if output_loading_info else model

        places = read_headers(checkpoint)
        cls._check_files(checkpoint, places, model_args, kwargs, may_lack=output_loading_info)
        old_name = rf"^((?:{cls.base_model_prefix}\.)?){OLD_TOKEN_MAP}$"
        renamed = any(re.match(old_name, name) for name in checkpoint.file_of)
        if renamed:
            kwargs["key_mapping"] = {**(kwargs.get("key_mapping") or {}), old_name: rf"\1{TOKEN_MAP}"}
        with tables_without_blocks():
            model, info = load(
                pretrained_model_name_or_path, *model_args, device_map=backbone_map, output_loading_info=True, **kwargs
            )
        if renamed:
            # The next save writes the names of today.
            del model._weight_conversions
        named = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        check_backbone_keys(backbone_map, named, model._tables_prefix(), model.named_tables())
        if not output_loading_info:
            prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
            is_same_class = cls.__name__ in (model.config.architectures or [])
            refuse_incomplete(info, where, prefix, is_same_class)
        tables = checkpoint
        hub = {key: kwargs.get(key) for key in HUB_ARGUMENTS if key not in ("revision", "subfolder")}
        if tables_from is None and not checkpoint.blocks():
            tables_from, hub["revision"] = model._tables_repository()
        if tables_from is not None:
            found = find_checkpoint(tables_from, hub)
            if found is None:
                if not Path(tables_from).is_dir():
                    # What is wrong with a repository, transformers says best.
                    cached_file(tables_from, INDEX_FILE, **{k: value for k, value in hub.items() if value is not None})
                raise FileNotFoundError(f"{str(tables_from)!r} holds no safetensors files with tables of this model.")
            tables, places = found, read_headers(found)
        model._confirm_hash(where)
        service = None if engram_ranks is None else start_ranks()
        model._open_tables(tables, places, entries, limits, kwargs.get("max_memory") is None, hot_rows, service, nodes)
        if (beside := describe_patch_in(Path(where))) is not None:
            logger.warning(
                f"{where} holds the row patch {beside[0]!r} beside the model, and loading the model leaves it out. To "
                f"use it: add_patch(model, {where!r})."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_files(cls, checkpoint: Checkpoint, places, model_args, kwargs: Mapping, may_lack: bool) -> None:
        """Compare config and headers before anything is made of them.

        Raises:
            ValueError: as `check_sizes` and `check_model`.
        """
        if kwargs.get("state_dict") is not None or kwargs.get("key_mapping") is not None:
            # The tensors are other ones than those of the files, or have other names.
            return
        config, others = kwargs.get("config"), {k: value for k, value in kwargs.items() if k != "config"}
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            config, _ = cls.config_class.from_pretrained(
                config or checkpoint.where, return_unused_kwargs=True, **others
            )
        if cls.can_generate():
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
            check_generation_config(find_file(checkpoint.where, GENERATION_CONFIG, hub))
        backbone = {name: place for name, place in places.items() if not is_of_table(name)}
        is_any_shape = bool(kwargs.get("ignore_mismatched_sizes"))
        check_sizes(config, backbone, checkpoint.where, cls.base_model_prefix, is_any_shape)
        with torch.device("meta"), tables_without_blocks():
            built = cast(Any, cls)(config, *model_args)
        is_same_class = cls.__name__ in (config.architectures or [])
        check_model(built, backbone, checkpoint.where, is_same_class, may_lack, is_any_shape)

    def _open_tables(
        self,
        checkpoint,
        places,
        entries,
        limits,
        has_margin: bool,
        hot_rows: int,
        service: RowService | None = None,
        nodes: HostNodes | None = None,
    ) -> None:
        tables = self.named_tables()
        fingerprint = checkpoint.metadata.get("engram_fingerprint")
        config = self._memory_config()
        if fingerprint is not None and config.engram_fingerprint is not None:
            check_fingerprint(config.engram_fingerprint, fingerprint, f"the tables of {checkpoint.where}")
        if tables and not checkpoint.blocks():
            refuse_missing(
                (block_name(n, block.number) for n, t in tables.items() for block in t.block_records), checkpoint.where
            )
        sources = open_sources(checkpoint, match_blocks(tables, checkpoint, places, config))
        check_changes(tables, checkpoint, places)
        if service is not None:
            cuts = {name: table.cut_over_ranks(service) for name, table in tables.items()}
            whole = {(name, i): source for name, each in sources.items() for i, source in enumerate(each)}
            parts = open_parts(whole, cuts, service.rank)
            sources = {name: [parts[name, i] for i in range(len(each))] for name, each in sources.items()}
        sizes = {name: [source.file.places[source.name].nbytes for source in sources[name]] for name in tables}
        entries = resolve_entries(entries, sizes, self._tables_prefix())
        default, main_device = self._default_places(tables)
        free = None if limits is None else self._memory_left(limits, has_margin)
        planned = plan_places(sizes, entries, default, free)
        bind_host_blocks(tables, planned, nodes)
        reader = PageReader()
        for name, table in tables.items():
            tiers, devices = [p.tier for p in planned[name]], [p.device for p in planned[name]]
            table.open_blocks(sources[name], tiers, devices, reader)
            table.changes.bring(name, table, open_changes(name, checkpoint, places))
            if hot_rows and not table.is_resident:
                table.keep_hot_rows(hot_rows, self._layer_device(name, main_device))
        self._name_ignored_by_ddp()
        if service is not None and (others := service.meet(digest_of_tables(checkpoint, places))):
            raise ValueError(
                f"Rank {others[0]} has loaded other tables than rank {service.rank}, which has those of "
                f"{checkpoint.where}, and each would read rows of the other. Load the same checkpoint on every rank; "
                "where ranks do not share a disk, copy its folder to every machine."
            )

    def _name_ignored_by_ddp(self) -> None:
        """Tell torch's DistributedDataParallel to leave out blocks off the device: it takes one kind of device only."""
        ours: set[str] = set()
        off_device: set[str] = set()
        for name, table in self.named_tables().items():
            if table.is_in_training:
                # The optimizer has named all of it.
                continue
            name = f"{self._tables_prefix()}{name}"
            ours |= {f"{name}.{parameter}" for parameter, _ in table.named_parameters()}
            blocks = {block_name(name, block.number) for block in table.block_records if block.is_resident}
            if table.ranks is not None:
                # Each process has other rows.
                blocks = set()
            off_device |= {each for each in ours if each.startswith(f"{name}.")} - blocks
        # A model of PEFT around this one passes the list on, and names parameters in its own way.
        ours, off_device = (
            {*names, *(f"{p}{n}" for p in PEFT_PREFIXES for n in names)} for names in (ours, off_device)
        )
        named: set[str] = set(getattr(self, DDP_IGNORES, []))
        ignored = (named - ours) | off_device
        if ignored or named:
            setattr(self, DDP_IGNORES, sorted(ignored))

    def _confirm_hash(self, where: str) -> None:
        """See that rows are addressed as the config says, after everything is loaded."""
        for ngram_hash in self._hashes():
            ngram_hash.confirm(where)
            device = self.base_model.get_input_embeddings().weight.device
            if device.type != "meta":
                ngram_hash.to(device)

    def engram_memory(self) -> Memory:
        """The memory that forwards read."""
        base = self.base_model
        return Memory(base.ngram_hash, [layer.engram for layer in base.memory_layers()])

    def _hashes(self) -> list[NgramHash]:
        """The hashes of all memories that the model has, also of those that forwards do not read."""
        return [module for module in self.base_model.modules() if isinstance(module, NgramHash)]

    def _tables_repository(self) -> tuple[str | None, str | None]:
        """Repository and commit of tables that do not lie beside the backbone."""
        return self.config.engram_tables_repo, self.config.engram_tables_revision

    def _memory_config(self) -> Any:
        """The config with the fields `engram_*`."""
        return self.config

    def bind_tokenizer(self, tokenizer) -> None:
        """Write a tokenizer's compression into a new model, or see that it is the tokenizer of a trained one.

        Args:
            tokenizer: a fast tokenizer with at most `config.vocab_size` ids.

        Raises:
            ValueError: the model has no use for a tokenizer, it is another one than the one that is bound, or it does
                not fit the config.
        """
        ngram_hash = self.engram_memory().ngram_hash
        if ngram_hash is None:
            raise ValueError("This model has no memory, so there is no tokenizer to bind; use it as it is.")
        ngram_hash.bind(tokenizer)

    def _tables_prefix(self) -> str:
        return "" if self.base_model is self else f"{self.base_model_prefix}."

    def _default_places(self, tables: Mapping[str, EngramTable]) -> tuple[dict[str, Place], torch.device]:
        """For each table the place of blocks without an entry: with its layer; and the device that computes."""
        device_map = getattr(self, "hf_device_map", None) or {"": self.base_model.get_input_embeddings().weight.device}
        devices = [torch.device(value) for value in device_map.values() if value != "disk"]
        main_device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        default = {}
        for name in tables:
            value = place_in_map(device_map, f"{self._tables_prefix()}{name}", main_device)
            default[name] = place_of_layer(value, main_device)
        return default, main_device

    def _layer_device(self, table_name: str, main_device: torch.device) -> torch.device:
        device = self.base_model.get_submodule(table_name.removesuffix(".table")).value_proj.weight.device
        return main_device if device.type == "meta" else device

    def _memory_left(self, limits: dict, has_margin: bool) -> dict:
        """Bytes by device that the backbone leaves."""
        limits = {key: int(n * FREE_SHARE) if has_margin and key != "cpu" else n for key, n in limits.items()}
        used: dict = {}
        for name, tensor in self.state_dict().items():
            place = tensor.device
            if tensor.is_meta:
                # accelerate holds it in RAM or on disk, and brings it for its layer.
                place = place_in_map(self.hf_device_map, name, "cpu")
            key = place if place == "disk" else memory_of(Place("", place))
            used[key] = used.get(key, 0) + tensor.nbytes
        return left_by_backbone(limits, used)

    def named_tables(self) -> dict[str, EngramTable]:
        """The tables by their names inside the base model, in the order of layers."""
        return {name: module for name, module in self.base_model.named_modules() if isinstance(module, EngramTable)}

    def engram_tables(self) -> list[TableInfo]:
        """What tables the model has and where their blocks live, in the order of layers."""
        return describe_tables(self.named_tables(), self._tables_prefix())

    def place_tables(
        self,
        places: Mapping[str, object],
        hot_rows: int | None = None,
        host_nodes: Sequence[int] | str | None = None,
    ) -> None:
        """Move tables or blocks to other tiers.

        Args:
            places: as the entries of a `device_map`: name of a table or block, or three dots and its end, to "host" or
                "cpu", "disk", "resident" or an accelerator.
            hot_rows: rows per table to keep in a cache from now on (0: none); None leaves the caches as they are.
            host_nodes: as for `from_pretrained`, for the blocks that these entries put into host memory.

        Raises:
            ValueError: it is no dict; an entry names no table; a block that was changed, or comes from no file, is to
                go to disk; host_nodes names no node, or no entry is for host memory.
            NotImplementedError, OSError: as for `from_pretrained`.

        Example:
            >>> model.place_tables({"model.layers.1.engram.table": "disk"})
        """
        tables = self.named_tables()
        check_places(places, [f"{self._tables_prefix()}{name}" for name in tables])
        others, entries = split_device_map(places)
        if others:
            known = known_tables(tables, self._tables_prefix())
            raise ValueError(f"place_tables moves tables and blocks only, got {', '.join(map(str, others))}. {known}")
        sizes = {name: [block.nbytes for block in table.blocks] for name, table in tables.items()}
        entries = resolve_entries(entries, sizes, self._tables_prefix())
        home, main_device = self._default_places(tables)
        stay = dict.fromkeys(tables, Place(""))
        planned_places = plan_places(sizes, entries, stay, home=home)
        if host_nodes is not None:
            bind_host_blocks(tables, planned_places, HostNodes.of(host_nodes))
        for name, planned in planned_places.items():
            for number, place in enumerate(planned):
                if place.tier:
                    tables[name].place(number, place.tier, place.device)
            hot = tables[name].hot_rows
            if hot is not None and any(place.tier for place in planned):
                hot.clear()
        if hot_rows is not None:
            for name, table in tables.items():
                table.keep_hot_rows(0 if table.is_resident else hot_rows, self._layer_device(name, main_device))
        self._name_ignored_by_ddp()

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

        Raises:
            ValueError: the ids are no integer tensor of this shape.
        """
        check_token_ids(input_ids)
        ngram_hash, layers = self.engram_memory()
        if ngram_hash is None or all(layer.table.is_resident for layer in layers):
            return
        row_ids = ngram_hash(input_ids, position_ids, attention_mask).row_ids
        for layer in layers:
            layer.table.bring_pages(row_ids[layer.layer_idx])

    # Row patches (memory_patches.py).

    def hash_of_table(self, table_name: str) -> NgramHash | None:
        """The hash that finds the rows of a table, by its name inside the base model; None where the model's own code
        finds them.

        Raises:
            ValueError: no tokenizer is bound yet.
        """
        hashes = self._hashes()
        if len(hashes) > 1:
            # Memories that were added by name: tables are `<layer>.engram.<name>.table`.
            of_name = {name.rpartition(".")[2]: module for name, module in self.base_model.named_modules()}
            hashes = [each for each in hashes if each is of_name.get(table_name.split(".")[-2])]
        found = hashes[0] if hashes else None
        if found is not None and not found.is_confirmed:
            raise ValueError(
                "The memory's token map is not bound, so no row can be found. Call model.bind_tokenizer(tokenizer)."
            )
        return found

    def add_patch(self, patch: RowPatch | str | Path, scale: float = 1.0) -> None:
        """Lay a row patch over the tables, on whatever tier they are. It is active at once, behind those that are.

        Args:
            patch: the patch, or a file of it.
            scale: what the difference to the table's own rows is multiplied by.

        Raises:
            ValueError: it is one of another hash, table or width; there is one of this name; the file is damaged.
        """
        patch = read_patch(patch) if isinstance(patch, str | Path) else patch
        tables = self.named_tables()
        check_patch(patch, tables)
        for name, each in patch.tables.items():
            ngram_hash = self.hash_of_table(name)
            differing = differing_parts(patch.fingerprint, {} if ngram_hash is None else ngram_hash.fingerprint())
            if differing:
                raise ValueError(
                    f"The patch {patch.name!r} was made for another hash than that of {name}: it differs in "
                    f"{', '.join(differing)}. Use the patch with the model that it was made for."
                )
            if each.base_digest and each.base_digest != base_digest(tables[name], each.row_ids):
                logger.warning(
                    f"{name} has other rows than the table that the patch {patch.name!r} was made for. What the patch "
                    "says may not fit them."
                )
        self._row_patches().add(tables, patch, scale)

    def remove_patch(self, name: str) -> None:
        """Forget a row patch.

        Raises:
            ValueError: there is none of this name.
        """
        self._row_patches().remove(self.named_tables(), name)

    def set_patches(self, names: Sequence[str]) -> None:
        """Choose the row patches that lie over the tables from now on, in this order; none for the plain tables.

        Raises:
            ValueError: there is none of a name, or a name is there twice.
        """
        self._row_patches().set(self.named_tables(), names)

    def active_patches(self) -> list[str]:
        """Names of the row patches that lie over the tables, in their order."""
        return self._row_patches().seen()

    def disable_patches(self) -> AbstractContextManager[None]:
        """A context in which the tables are plain, in this thread."""
        return self._row_patches().disable(self.named_tables())

    def use_patches(self, names: Sequence[str | Sequence[str] | None]) -> AbstractContextManager[None]:
        """A context in which, in this thread, each sequence of a batch sees its own row patches and no others.

        Args:
            names: one per sequence: a name, a list of names in their order, or None for the plain tables. `generate`
                counts beams and several returned sequences.

        Raises:
            ValueError: there is none of a name.
        """
        return self._row_patches().use(self.named_tables(), names)

    def trained_patch(self) -> RowPatch | None:
        """The patch that a run trains, with `engram_optimizers(args, train_as_patch="name")`; None where there is none.

        It is as it is now, and later steps do not change it.
        """
        found, steps, fingerprint = {}, 0, {}
        for table_name, table in self.named_tables().items():
            if (trained := table.patches.trained) is None:
                continue
            steps, now = 0 if table.changes.run is None else table.changes.run.steps, trained.fixed()
            rows = now.rows if now.rows.dtype in PATCH_DTYPES else now.rows.float()
            found[table_name] = PatchedRows(now.row_ids, rows, table.num_rows, base_digest(table, now.row_ids))
            ngram_hash = self.hash_of_table(table_name)
            fingerprint = {} if ngram_hash is None else ngram_hash.fingerprint()
        name = self._row_patches().trained
        return RowPatch(name, found, fingerprint=fingerprint, provenance={"steps": steps}) if found else None

    def begin_patch_training(self, name: str, rows: Mapping[str, RowsInTraining]) -> None:
        """Before training: have it change the rows of a new patch, which is active, and never the tables.

        Args:
            name: of the patch.
            rows: name of a table inside the base model to its rows in the patch.

        Raises:
            ValueError: there are patches already, or the tables belong to several memories.
        """
        hashes = [self.hash_of_table(table_name) for table_name in rows]
        if any(each is not hashes[0] for each in hashes):
            raise ValueError(
                f"A patch belongs to one memory, and {', '.join(rows)} belong to several. Train one patch after the "
                "other, each over the tables of one memory."
            )
        self._row_patches().train(self.named_tables(), name, rows)

    def end_patch_training(self) -> None:
        """From now on, the patch that was trained is one as any other."""
        self._row_patches().end_training(self.named_tables())

    def forget_lost_patches(self) -> None:
        """Forget the row patches of tables that have been taken out of the model."""
        self._row_patches().forget_lost(self.named_tables())

    def _row_patches(self) -> ModelPatches:
        """The names of row patches, in one place for the base model and for those around it."""
        return self.base_model.__dict__.setdefault(ROW_PATCHES, ModelPatches())

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As `PreTrainedModel.resize_token_embeddings`. Ids that are added count as padding for the memory, so the
        rows of all other n-grams stay where they are.

        Raises:
            ValueError: the memory's pad would be cut off, or the token map has more different ids.
        """
        hashes = self._hashes()
        for config in [each.config for each in hashes]:
            if new_num_tokens is not None and config.engram_pad_token_id >= new_num_tokens:
                raise ValueError(
                    f"The vocabulary cannot shrink to {new_num_tokens} ids: the memory's pad is "
                    f"{config.engram_pad_token_id}."
                )
            compressed = config.engram_compressed_vocab_size
            if new_num_tokens is not None and isinstance(compressed, int) and new_num_tokens < compressed:
                raise ValueError(
                    f"The vocabulary cannot shrink to {new_num_tokens} ids: the memory's token map has {compressed} "
                    "different ones."
                )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for ngram_hash in hashes:
            ngram_hash.config.vocab_size = embeddings.weight.shape[0]
            ngram_hash.resize(embeddings.weight.shape[0])
        return embeddings

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        *args,
        with_code: bool = True,
        tables_to=None,
        **kwargs,
    ):
        """As `PreTrainedModel.save_pretrained`, with blocks in files of their own; also writes the modeling code and an
        `auto_map` of all classes. A save that fails or is killed leaves the checkpoint that was there.

        In a run with `engram_optimizers`, its checkpoints (`checkpoint-N` in `args.output_dir`) hold the file that a
        table came from, which is linked, and its changed rows. Loading puts them together, and `merge_changed_rows`
        does it for good.

        As in transformers, every process of a distributed run calls this, and one of them writes.

        Args:
            save_directory: folder to write.
            is_main_process: whether this process may write.
            state_dict: tensors to write instead of the model's own.
            push_to_hub: also upload the folder, as transformers does. `engram_hf.push_engram` is the careful way, with
                a card, and with tables in a repository of their own if you like.
            max_shard_size: most bytes of a file; a block that is larger has a file of its own.
            variant: written into the names of the backbone's files and of the index.
            token: of the Hub.
            with_code: False leaves code and `auto_map` out; the checkpoint then loads only with this package.
            tables_to: folder for the tables, where they are not to lie beside the backbone; `tables_from` reads them.

        Raises:
            OSError: no space left, for one; nothing has changed then.
        """
        tables, prefix = self.named_tables(), self._tables_prefix()
        state = self.state_dict() if state_dict is None else state_dict
        if state_dict is not None and any(table.ranks is not None for table in tables.values()):
            raise NotImplementedError(
                "Tables are cut over ranks, and a state_dict of one process holds its part of them. Save without "
                "state_dict: the model collects the rows of all ranks while it writes."
            )
        names = {block_name(f"{prefix}{n}", block.number) for n, t in tables.items() for block in t.block_records}
        blocks = {name: state[name] for name in names if name in state}
        backbone = {name: tensor for name, tensor in state.items() if name not in names}
        shared = {"max_shard_size": max_shard_size, "variant": variant, "token": token, **kwargs}
        is_plain = not kwargs.get("distributed_checkpoint") and not getattr(self, "_hf_peft_config_loaded", False)
        if not is_plain:
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **shared)
        folder = Path(save_directory)
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file; save_pretrained needs a folder.")
        if not is_main_process or is_other_rank():
            # Processes gather together what is sharded over them. This one writes nothing.
            return super().save_pretrained(save_directory, False, backbone, False, **shared)
        table_dtype = self._check_blocks(tables, blocks, names)
        apart = tables_to is not None and Path(tables_to).resolve() != folder.resolve()
        if apart:
            refuse_model_in(tables_to)
        self._warn_unbound()
        trained = self.trained_patch()
        if active := [name for name in self.active_patches() if trained is None or name != trained.name]:
            logger.warning(
                f"The row patches {', '.join(active)} are not part of what is saved, which is the tables themselves. "
                "Save a patch with save_patch(patch, file), or make it part of the tables with "
                "engram_hf.merge_patch(model, patch, folder)."
            )
        run = next((table.changes.run for table in tables.values() if table.changes.run is not None), None)
        is_checkpoint = run is not None and state_dict is None and not apart and run.has_checkpoint(folder)
        with_code = with_code and self._has_code
        name_of = self._block_names(is_checkpoint)
        self._note_saved(table_dtype, with_code)
        repository = self._open_repository_to_push(folder, token, kwargs) if push_to_hub else None
        saved, by_base = {}, {}
        if apart:
            with publishing(tables_to), staging(tables_to) as stage:
                written = write_tables(stage, blocks, tables, prefix, max_shard_size, name_of=name_of)
                saved = publish(stage, Path(tables_to), written, self._saved_facts())
        with publishing(folder), staging(folder) as stage:
            if run is not None and is_checkpoint and run.begins_checkpoint(folder):
                remove_marker(folder)
            if with_code:
                save_code(stage)
            ignored = self._keys_to_ignore_on_save
            # Of a quantized model transformers takes all tensors, whatever it is given.
            self._keys_to_ignore_on_save = {*(ignored or ()), *names}
            try:
                super().save_pretrained(stage, True, backbone, False, **shared)
            finally:
                self._keys_to_ignore_on_save = ignored
            if not with_code:
                remove_code(stage)
            self._describe_memory(stage)
            given = {} if apart else blocks
            written = write_tables(stage, given, tables, prefix, max_shard_size, is_checkpoint, name_of)
            if run is not None and is_checkpoint and run.write_row_state is not None:
                written.row_state = run.write_row_state(stage)
            by_base = written.by_base
            saved |= publish(stage, folder, written, self._saved_facts(), variant)
            if not with_code:
                self._remove_code(folder)
        if run is not None and is_checkpoint:
            run.last_checkpoint = (folder.resolve(), run.steps)
        if state_dict is None:
            for name, table in tables.items():
                for block in table.block_records:
                    saved_name = name_of(f"{prefix}{name}", block.number)
                    block.note_save(saved[saved_name], saved_name)
                table.saving.follow(by_base.get(name, ()))
        save_trained_patch(trained, folder)
        if repository is not None:
            self._upload_modified_files(folder, token=token, **repository)
        return None

    def _block_names(self, is_checkpoint: bool) -> Callable[[str, int], str]:
        """What names the tensor of a block in a save, by the name of its table and its number."""
        return block_name

    def _note_saved(self, table_dtype: str | None, with_code: bool) -> None:
        """Write into the config what a save changes: the type of the tables, and where tables and code lie."""
        if table_dtype is not None:
            self.config.engram_table_dtype = table_dtype
        set_auto_map(self.config, with_code)
        # They are saved beside the backbone, or where `tables_from` will be told.
        self.config.engram_tables_repo = self.config.engram_tables_revision = None

    def _saved_facts(self) -> dict[str, Any]:
        """What the index of a save has beside names and digests of files."""
        return {"engram_fingerprint": self._memory_config().engram_fingerprint, "config": unseen_fields(self.config)}

    def _remove_code(self, folder: Path) -> None:
        """Take what an earlier save has left of code out of a folder."""
        remove_code(folder)

    def _describe_memory(self, folder: Path) -> None:
        """Write what a config.json must say of the memory beside the fields of the config."""

    def _warn_unbound(self) -> None:
        if any(each.token_map is not None and not each.is_confirmed for each in self._hashes()):
            logger.warning(
                "No tokenizer was bound to this model, so its memory can read nothing, and neither can the checkpoint. "
                "Call model.bind_tokenizer(tokenizer) before saving."
            )

    def _open_repository_to_push(self, folder: Path, token, kwargs: dict) -> dict:
        """What transformers' upload takes: the repository, made where there is none, and the files as they are now."""
        found = {
            "commit_message": kwargs.pop("commit_message", None),
            "create_pr": kwargs.pop("create_pr", False),
            "revision": kwargs.pop("revision", None),
            "files_timestamps": self._get_files_timestamps(folder) if folder.is_dir() else {},
        }
        repo_id = kwargs.pop("repo_id", folder.name)
        private = kwargs.pop("private", None)
        found["repo_id"] = hf_api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return found

    def _check_blocks(
        self, tables: Mapping[str, EngramTable], blocks: Mapping[str, torch.Tensor], names: set[str]
    ) -> str | None:
        """`check_blocks`, where a class whose tables are served by others has nothing to check in its place."""
        return check_blocks(tables, blocks, names)

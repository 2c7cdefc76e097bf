"""Which tensors of somebody else's checkpoint are the parts of which lookup table.

Names come from transformers' own conversion mapping, and sizes from the headers of the files. A config may promise
another number of parts than its files have. Nothing of a table's contents is read here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto.auto_factory import _get_model_class

from ..modeling.checkpoint_loading import HUB_ARGUMENTS, Checkpoint, find_checkpoint
from ..modeling.configuration_checks import refuse_v41, shorten
from ..modeling.disk_safetensors import TensorPlace
from ..modeling.table_blocks import DISK, HOST, parse_block_name
from ..modeling.table_placement import ANY_BEGINNING, split_device_map


# Ends of the names of modules that are lookup tables in the models of transformers: Qwen's n-grams, and the per-layer
# embeddings of Gemma 3n and Gemma 4.
NGRAM_TABLE = "ple.ple_embedding.ngram_embedding"
TABLE_NAMES = (NGRAM_TABLE, "embed_tokens_per_layer")
# The module of a table's rows inside its embedding; its blocks have these names in the checkpoints of a training run.
TABLE_CHILD = "table"
# Types of the configs of models with such tables.
MODEL_TYPES = (
    *("qwen4_exp", "qwen4_exp_text", "gemma3n", "gemma3n_text"),
    *("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
)
# In the index of a save: the parts of each table in the published layout.
LAYOUT = "table_parts"
SCALED = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, SCALED)


# Arguments of `from_pretrained` by which config.json is found, and those that are not for the config.
OF_CONFIG_FILE = (*HUB_ARGUMENTS, "trust_remote_code", "code_revision")
OF_LOADING = ("dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class TableParts:
    """The tensors of one table, in the order of its rows.

    name: of the embedding module.
    tensors: their names in the checkpoint.
    rows: of each of them.
    width: of a row.
    dtype: of all of them.
    saved_as: their names in a save of the model, where they are the blocks of a training checkpoint of this package.
    """

    name: str
    tensors: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    dtype: torch.dtype
    saved_as: tuple[str, ...] | None = None

    @property
    def layout(self) -> tuple[str, ...]:
        """Names of the parts in the layout in which the model is published."""
        return self.tensors if self.saved_as is None else self.saved_as


def config_and_arguments(where: str, config: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a model and the arguments that are left for `from_pretrained`, as the Auto classes find them:
    arguments that are fields of the config, such as `use_cache`, change it.

    Args:
        where: folder or repository.
        config: given in place of its own: a config, or where one is; or None.
        arguments: of `from_pretrained`.

    Raises:
        NotImplementedError: it is a DeepSeek-V4.1.
    """
    if isinstance(config, PreTrainedConfig):
        return config, dict(arguments)
    hub = {name: arguments[name] for name in OF_CONFIG_FILE if arguments.get(name) is not None}
    refuse_v41(PreTrainedConfig.get_config_dict(config or where, **hub)[0].get("model_type"), where)
    # Loading itself notes these in the config.
    kept = {name: arguments[name] for name in OF_LOADING if arguments.get(name) is not None}
    changes = {name: value for name, value in arguments.items() if name not in (*OF_CONFIG_FILE, *OF_LOADING)}
    found, unused = AutoConfig.from_pretrained(config or where, return_unused_kwargs=True, **hub, **changes)
    return found, {**hub, **kept, **unused}


def class_and_config(config: Any, model_class: type[PreTrainedModel] | None) -> tuple[type[PreTrainedModel], Any]:
    """The class that AutoModelForCausalLM takes for a config, or the given one, and the config of this class."""
    if model_class is None:
        mapping: Any = AutoModelForCausalLM._model_mapping
        if type(config) not in mapping:
            raise ValueError(
                f"AutoModelForCausalLM has no class for {type(config).__name__}; name one with model_class=."
            )
        model_class = cast(type[PreTrainedModel], _get_model_class(config, mapping))
    wanted: Any = getattr(model_class, "stock_class", model_class)
    if wanted.config_class is not None and not isinstance(config, wanted.config_class):
        quantized = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantized is not None:
            # As the Auto classes do: a checkpoint names its quantization in the config of the whole.
            config.quantization_config = quantized
    return wanted, config


def embeddings_of(model: nn.Module) -> dict[str, nn.Embedding]:
    """The embeddings of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def known_tables(embeddings: Iterable[str]) -> list[str]:
    """Those of the named embeddings that are lookup tables in every model that has them."""
    return [name for name in embeddings if any(f".{name}".endswith(f".{end}") for end in TABLE_NAMES)]


def names_in_model(model: PreTrainedModel, names: Iterable[str], key_mapping: dict | None = None) -> dict[str, str]:
    """Tensor of a checkpoint to tensor of the model that it becomes, or becomes a part of, as transformers loads it.

    Args:
        model: with all of its weights, such as a model on meta.
        names: of the tensors.
        key_mapping: as for `from_pretrained`.
    """
    transforms = get_model_conversion_mapping(model, key_mapping, None)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    # Not its state_dict, whose making unpacks the weights of bitsandbytes.
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    prefix, found = model.base_model_prefix, {}
    for name in sorted(names, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, _ = rename_source_key(name, [], [], prefix, state)
        found[name] = renamed
    return found


def all_parts(config: Any, checkpoint: Checkpoint, places: Mapping[str, TensorPlace]) -> list[TableParts]:
    """The tables of a checkpoint that are known by their names.

    Args:
        config: of the model.
        checkpoint, places: where tensors are.

    Raises:
        ValueError: as `find_parts`.
    """
    stock, config = class_and_config(config, None)
    with torch.device("meta"):
        skeleton = cast(Any, stock)(config)
    names, embeddings = names_in_model(skeleton, checkpoint.names), embeddings_of(skeleton)
    return [find_parts(name, embeddings[name], names, checkpoint, places) for name in known_tables(embeddings)]


def find_parts(
    table: str,
    module: nn.Embedding,
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    places: Mapping[str, TensorPlace],
) -> TableParts:
    """The parts of a table.

    Args:
        table: name of its embedding.
        module: the embedding, for its sizes.
        names: as `names_in_model` gives them.
        checkpoint, places: where tensors are.

    Raises:
        ValueError: parts are missing, packed, of several types or of another size than the model's.
    """
    where, weight = checkpoint.where, f"{table}.weight"
    of_run = {block.number: name for name in names if (block := _block_of(name, table)) is not None}
    tensors = [of_run[number] for number in sorted(of_run)] or [n for n, target in names.items() if target == weight]
    scales = {f"{weight}_scale"} if any(places[name].dtype == SCALED for name in tensors) else set()
    strange = [name for name, target in names.items() if target.startswith(f"{table}.") and name not in tensors]
    strange = [name for name in strange if names[name] not in scales and not _is_of_run(name, table)]
    if strange:
        raise ValueError(
            f"{where} holds {table} in a packed format ({strange[0]}), whose rows cannot be read one by one. Load a "
            "checkpoint with tables in bfloat16, float16, float32, or FP8 with one weight_scale."
        )
    if not tensors:
        raise ValueError(
            f"{where} holds no tensor of {weight}. Download it again, or load it with its own config.json."
        )
    shapes, dtypes = [places[name].shape for name in tensors], {places[name].dtype for name in tensors}
    wanted = (module.num_embeddings, module.embedding_dim)
    is_fit = all(len(shape) == 2 and shape[0] > 0 and shape[1] == wanted[1] for shape in shapes)
    if not is_fit or sum(shape[0] for shape in shapes) != wanted[0]:
        raise ValueError(
            f"The {len(tensors)} parts of {table} in {where} have the shapes {', '.join(map(str, shapes[:4]))}"
            f"{', ...' if len(shapes) > 4 else ''}, and must have {wanted[0]} rows of {wanted[1]} together. Load the "
            "checkpoint with its own config.json."
        )
    dtype = dtypes.pop()
    if dtypes or dtype not in DTYPES:
        raise ValueError(
            f"The parts of {table} in {where} are {places[tensors[0]].type_name}"
            f"{' and other types' if dtypes else ''}; tables are served in bfloat16, float16, float32 or FP8 (E4M3)."
        )
    if dtype == SCALED and not of_run and f"{weight}_scale" not in names.values():
        raise ValueError(
            f"{table} in {where} is FP8 without a weight_scale, so its numbers mean nothing. Download it again."
        )
    saved_as = _layout_of_run(table, len(tensors), checkpoint) if of_run else None
    return TableParts(table, tuple(tensors), tuple(shape[0] for shape in shapes), wanted[1], dtype, saved_as)


def _layout_of_run(table: str, parts: int, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the index of a training checkpoint says of the layout that its model came in."""
    layouts = checkpoint.metadata.get(LAYOUT)
    names = layouts.get(table) if isinstance(layouts, dict) else None
    if not isinstance(names, list) or len(names) != parts or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"The index of {checkpoint.where} must name the {parts} parts of {table} under {LAYOUT}, got "
            f"{shorten(names)}. Copy the whole folder of the checkpoint again."
        )
    return tuple(names)


def _block_of(name: str, table: str):
    block = parse_block_name(name)
    return block if block is not None and block.table == f"{table}.{TABLE_CHILD}" else None


def _is_of_run(name: str, table: str) -> bool:
    return name.startswith(f"{table}.{TABLE_CHILD}.")


def tied_weights(model: Any) -> set[str]:
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


def checkpoint_of(where: str, arguments: Mapping[str, Any]) -> Checkpoint:
    checkpoint = find_checkpoint(where, arguments)
    if checkpoint is None:
        raise ValueError(
            f"{where} has no safetensors files, and tables are served from these alone. Load it with from_pretrained, "
            "save it with save_pretrained, and load that folder."
        )
    return checkpoint

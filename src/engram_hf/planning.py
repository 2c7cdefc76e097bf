"""Sizes before anything is allocated: parameters of a config, bytes of a model by place, bytes that a step moves.

Counts a model on the meta device, so a config of any size costs a second and no memory. Automatic maps come from
accelerate and tables are placed by `plan_places`, as when the model is loaded.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import convert_file_size_to_int, get_balanced_memory
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .adapters.memory_files import read_memory_config
from .adapters.served_embedding import TableOfParts, serve
from .adapters.table_parts import (
    MODEL_TYPES,
    NGRAM_TABLE,
    SCALED,
    TABLE_CHILD,
    embeddings_of,
    known_tables,
    split_places,
    tied_weights,
)
from .modeling.checkpoint_loading import find_file
from .modeling.configuration_checks import check_source
from .modeling.configuration_engram_moe import PRESETS, EngramMoEConfig
from .modeling.disk_safetensors import read_json
from .modeling.table import EngramTable, tables_without_blocks
from .modeling.table_blocks import BLOCK_KEY, DISK, HOST, Block
from .modeling.table_cut import DISTINCT_SHARE, RowCut, nbytes_of_step, rows_of_step
from .modeling.table_placement import (
    AUTOMATIC,
    Place,
    as_device,
    check_backbone_keys,
    left_by_backbone,
    memory_limits,
    memory_of,
    place_in_map,
    place_of_layer,
    plan_places,
    resolve_entries,
    split_device_map,
)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, counted as the paper does.

    total: everything, a tied vocabulary matrix once.
    active: what one token computes with: no vocabulary matrix, no table, and of the routed experts the chosen ones.
    tables: rows times width, over all memory layers.
    routed_experts: all experts a router chooses from.
    """

    total: int
    active: int
    tables: int
    routed_experts: int

    @property
    def memory_share(self) -> float:
        """Tables as a part of the sparse budget, which is what a token does not compute with; best at 0.2 to 0.25."""
        sparse = self.total - self.active
        return self.tables / sparse if sparse else 0.0


def config_of(model: PreTrainedConfig | str | os.PathLike, **arguments) -> Any:
    """The config of a preset, a folder or a repository: that of an EngramMoE, of a model with an added memory, or of
    somebody else's model with lookup tables.

    Args:
        model: its name; a config is returned as it is. The folder `tiny` is `./tiny`, since `tiny` is a preset.
        arguments: of `EngramMoEConfig.from_pretrained`.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: the config is damaged, or that of another kind of model.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    if model in PRESETS:
        return EngramMoEConfig.preset(str(model))
    check_source(model, PRESETS)
    path = find_file(str(model), "config.json", arguments)
    is_other = path is not None and read_json(path).get("model_type") in MODEL_TYPES
    if is_other or read_memory_config(str(model), **arguments) is not None:
        return AutoConfig.from_pretrained(model, **arguments)
    return EngramMoEConfig.from_pretrained(model, **arguments)


def count_parameters(config: PreTrainedConfig | str | os.PathLike) -> ParameterCount:
    """Count the parameters of the causal language model of a config, a preset, a folder or a repository.

    Example:
        >>> round(count_parameters("engram-27b").memory_share, 2)
        0.25
    """
    own: Any = copy.deepcopy(config_of(config))
    with torch.device("meta"):
        model, named = _model_of(own)
    sizes = {n: p.numel() for n, p in model.named_parameters() if not _is_norm(n) and BLOCK_KEY.match(n) is None}
    # Blocks of quantized rows hold bytes, of numbers and scales; the numbers are those of a plain table.
    tables = sum(table.num_rows * table.head_dim for table in named.values())
    total = sum(sizes.values()) + tables
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    ends = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    of_vocabulary = {id(parameter) for each in ends for parameter in each.parameters()}
    vocabulary = sum(p.numel() for p in model.parameters() if id(p) in of_vocabulary)
    text = own.get_text_config()
    chosen, experts = getattr(text, "num_experts_per_tok", None) or 0, getattr(text, "num_experts", None)
    experts = experts or getattr(text, "num_local_experts", None) or getattr(text, "n_routed_experts", None)
    unused = routed - routed * chosen // experts if experts else 0
    return ParameterCount(total, total - tables - vocabulary - unused, tables, routed)


def is_served(config: PreTrainedConfig) -> bool:
    """Whether a model is somebody else's, with lookup tables that `load_with_tables` serves."""
    return config.model_type in MODEL_TYPES


def _model_of(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> tuple[Any, dict[str, EngramTable]]:
    """A model as it is loaded, with its tables by name; to be called on the meta device."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not is_served(config):
        return model, model.named_tables()
    tables: dict[str, EngramTable] = {}
    for name in known_tables(embeddings_of(model)):
        module = model.get_submodule(name)
        # Rows are served as they are stored, whatever the type of the backbone.
        table = TableOfParts([module.num_embeddings], module.embedding_dim, _type_of_rows(config, name))
        serve(module, table)
        tables[f"{name}.{TABLE_CHILD}"] = table
    return model, tables


def _type_of_rows(config: PreTrainedConfig, table: str) -> torch.dtype:
    """Type of the rows of somebody else's table, as far as a config says it."""
    quantized = getattr(config, "quantization_config", None) or {}
    if f".{table}".endswith(NGRAM_TABLE) and quantized.get("quant_method") == "fp8":
        return SCALED
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


# The shares of the sparse budget that the paper's best models have in tables (section 3.1 and table 1).
PAPER_SHARES = (0.20, 0.25)


def allocate(config: PreTrainedConfig | str | os.PathLike, memory_share: float) -> EngramMoEConfig:
    """The config of a model of the same size with another share of its sparse budget in tables.

    Experts that a token is not sent to make room for rows, or rows for experts. What a token computes with changes only
    by the router's rows. An expert is whole and rows fill what it leaves, so the share is met as nearly as they allow.

    Args:
        config: an EngramMoE with memory layers and experts; or a preset, a folder, a repository.
        memory_share: tables over the sparse budget, which is what a token does not compute with.

    Raises:
        ValueError: the model has no tables or no experts, or the share is none or leaves too few of either.

    Example:
        >>> config = allocate("engram-27b", 0.20)
        >>> config.n_routed_experts, round(count_parameters(config).memory_share, 3)
        (59, 0.193)
    """
    if not 0 < memory_share < 1:
        raise ValueError(f"memory_share must lie between 0 and 1, such as 0.2 for 20 %, got {memory_share:g}.")
    own = config_of(config)
    layers = getattr(own, "num_hidden_layers", 0) - getattr(own, "first_k_dense_replace", 0)
    if not getattr(own, "engram_layer_ids", None) or not hasattr(own, "n_routed_experts") or layers < 1:
        raise ValueError(
            "Only an EngramMoE with memory layers and experts has a sparse budget to allocate. Start from a preset "
            "such as engram-27b."
        )
    count = count_parameters(own)
    # Three matrices, and a row of the router; one more in each layer with experts.
    of_experts = layers * own.hidden_size * (3 * own.moe_intermediate_size + 1)
    wanted = memory_share * (count.total - count.active)
    experts = own.n_routed_experts - round((wanted - count.tables) / of_experts)
    numbers_of_row = len(own.engram_layer_ids) * own.engram_width
    rows = round((count.tables + (own.n_routed_experts - experts) * of_experts) / numbers_of_row)
    if experts <= own.num_experts_per_tok or rows < 2:
        raise ValueError(
            f"A share of {memory_share:g} leaves {experts} routed experts and {rows} rows a head. It must leave more "
            f"experts than the {own.num_experts_per_tok} that a token is sent to, and at least 2 rows."
        )
    fields = own.to_dict()
    fields.update(n_routed_experts=experts, engram_vocab_size=rows, engram_fingerprint=None)
    return EngramMoEConfig(**fields)


# AdamW: two numbers of four bytes for each that is trained.
OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by place: a device ("cuda:0", "cpu"), "host" (tables in RAM under an accelerator) or "disk".

    backbone, tables: the weights.
    optimizer: AdamW's state and a gradient for every weight of the backbone; for tables what `engram_optimizers(args)`
        keeps of each row, and on disk the copy that is trained.
    step: what the largest moment of a forward without gradients adds, on every device that computes.
    lacking: where memory is limited, bytes of weights and step beyond the limit; under "disk" what of the backbone
        found no place in memory. Empty where the model fits.
    limits: where memory is limited, the bytes that may be used; RAM is under "cpu".
    max_memory: where memory is limited, the argument with which `from_pretrained` leaves room for the step.
    moved_per_forward: bytes of the backbone that every forward copies to the accelerator, by the place they come from.
    read_per_token: bytes of rows that a token reads, by the place they come from.
    rows_per_token: numbers of these rows, each of which is a read of its own.
    ranks: over which tables are cut. Everything above is then of the rank that holds most.
    distinct_share: of the rows of a step, which is assumed for `moved_per_step`.
    moved_per_step: bytes that a rank moves between ranks in a training step: rows, gradients and row ids.
    """

    backbone: dict[str, int] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, int] = field(default_factory=dict)
    step: dict[str, int] = field(default_factory=dict)
    lacking: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    max_memory: dict[object, int] = field(default_factory=dict)
    moved_per_forward: dict[str, int] = field(default_factory=dict)
    read_per_token: dict[str, int] = field(default_factory=dict)
    rows_per_token: dict[str, int] = field(default_factory=dict)
    ranks: int = 1
    distinct_share: float = DISTINCT_SHARE
    moved_per_step: int = 0

    @property
    def places(self) -> list[str]:
        """All places that hold anything, accelerators first."""
        names = {*self.backbone, *self.tables, *self.optimizer, *self.step}
        off_accelerator = ["cpu", "host", "disk"]
        return sorted(names - set(off_accelerator)) + [name for name in off_accelerator if name in names]


def estimate_memory(
    config_or_path,
    device_map=None,
    dtype: torch.dtype | str | None = None,
    max_memory: Mapping | None = None,
    batch_size: int = 1,
    seq_length: int = 2048,
    ranks: int = 1,
) -> MemoryEstimate:
    """What loading a model in this way will take, before anything is allocated.

    Args:
        config_or_path: a config, a preset, a folder or a repository.
        device_map, dtype, max_memory: as for `from_pretrained`. "auto" without an accelerator plans for the CPU;
            without a `dtype` the backbone is in that of the config. Devices in `max_memory` need not be in this
            machine. What is planned leaves room for the step, within `max_memory`.
        batch_size, seq_length: of the forward whose largest moment is counted; of each rank.
        ranks: over which tables are cut, as `engram_ranks="shard"` cuts them. Every rank has the whole backbone.

    Raises:
        FileNotFoundError: there is no such preset, folder or repository.
        NotImplementedError: tables of somebody else's model are to be cut over ranks.
        ValueError: an entry of `device_map` names nothing or means nothing; `dtype` is no floating type; `max_memory`
            is given without an automatic map, which alone makes use of it.

    Example:
        >>> estimate = estimate_memory("tiny", device_map={"": "cpu", "...table": "disk"}, dtype="bfloat16")
        >>> estimate.tables
        {'disk': 1722432}
    """
    config = config_of(config_or_path)
    dtype = _floating_type(dtype if dtype not in (None, "auto") else (getattr(config, "dtype", None) or torch.float32))
    with torch.device("meta"):
        model, tables = _model_of(config, dtype)
    prefix = f"{model.base_model_prefix}."
    backbone_map, entries = _split(device_map, model, config)
    if max_memory is not None:
        _check_limits(max_memory, backbone_map)
    if ranks > 1 and is_served(config):
        raise NotImplementedError(
            f"Tables of somebody else's model are not cut over ranks, and got ranks={ranks}. Leave it out."
        )
    held = {name: _rows_of_first_rank(table, ranks) for name, table in tables.items()}
    blocks = {name: [rows * tables[name].row_nbytes for rows in each] for name, each in held.items()}
    entries = resolve_entries(entries, blocks, "" if is_served(config) else prefix)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = {
        name: _nbytes(name, tensor, model)
        for name, tensor in tensors.items()
        if BLOCK_KEY.match(name) is None and not _is_norm(name)
    }
    check_backbone_keys(backbone_map, tensors, prefix, blocks)

    layers = [] if is_served(config) else model.engram_memory().layers
    step = max(_moments(model, layers, dtype, batch_size * seq_length))
    limits, usable = None, None
    if backbone_map in AUTOMATIC:
        limits = memory_limits(None) if max_memory is None else _bytes_of(max_memory)
        computing = [key for key in limits if key != "cpu"] or ["cpu"]
        usable = {key: max(n - step, 0) if key in computing else n for key, n in limits.items()}
        backbone_map = _automatic_map(config, dtype, backbone_map, usable)
    values = _backbone_devices(backbone_map, sizes)
    devices = {as_device(value) for value in values.values() if value != DISK}
    main_device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    default = {}
    for name in blocks:
        layer = f"{prefix}{name.removesuffix('table')}value_proj.weight"
        of_layer = _device_in(backbone_map, name) if is_served(config) else values[layer]
        default[name] = place_of_layer(of_layer, main_device)
    left = None
    if usable is not None:
        used: dict[object, int] = {}
        for name, nbytes in sizes.items():
            _add(used, DISK if values[name] == DISK else memory_of(Place("", values[name])), nbytes)
        left = left_by_backbone(usable, used)
    planned = plan_places(blocks, entries, default, left)

    moved = sum(_moved_per_step(table, batch_size * seq_length, ranks) for table in tables.values())
    estimate = MemoryEstimate(ranks=ranks, moved_per_step=round(moved))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, nbytes in sizes.items():
        _add(estimate.backbone, str(values[name]), nbytes)
        if name in trained and values[name] != DISK:
            elements = model.get_parameter(name).numel()
            _add(estimate.optimizer, str(values[name]), nbytes + OPTIMIZER_BYTES * elements)
        if values[name] == DISK or main_device.type != "cpu" and values[name] == "cpu":
            _add(estimate.moved_per_forward, str(values[name]), nbytes)
    for name, places in planned.items():
        on_disk = any(place.is_on_disk for place in places)
        for place, block, rows in zip(places, tables[name].block_records, held[name], strict=True):
            is_resident = place.tier not in (HOST, DISK)
            where = str(as_device(place.device)) if is_resident else place.tier
            where = "cpu" if where == HOST and main_device.type == "cpu" else where
            _add_block(estimate, where, block, rows, _reads_per_token(model, name, block), on_disk)
    for device in {main_device, *(device for device in devices if device.type == main_device.type)}:
        _add(estimate.step, str(device), step)
    if limits is not None:
        estimate.max_memory.update(usable or {})
        _add_lacking(estimate, limits)
    return estimate


def _is_norm(name: str) -> bool:
    """Whether a parameter is the number that stands for a table's gradients where they are clipped: no weight."""
    return name.endswith(".row_gradients.norm")


def _floating_type(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is a floating type, such as float32, bfloat16 or float16; got {str(dtype)!r}.")
    return found


def _check_limits(max_memory: Mapping, backbone_map) -> None:
    if backbone_map not in AUTOMATIC:
        raise ValueError(
            f"max_memory limits an automatic device_map ({', '.join(AUTOMATIC)}), and is not used with "
            f'{backbone_map!r}. Give device_map="auto" with it, or leave it out.'
        )
    if not isinstance(max_memory, Mapping) or not all(isinstance(value, int | str) for value in max_memory.values()):
        raise ValueError(f'max_memory is a dict such as {{0: "80GB", "cpu": "64GB"}}, got {max_memory!r}.')


def _bytes_of(max_memory: Mapping) -> dict[object, int]:
    """Limits under the keys of accelerate, accelerators first, whatever devices this machine has."""
    limits: dict[object, int] = {}
    for key, value in max_memory.items():
        try:
            device = torch.device("cuda", key) if isinstance(key, int) else torch.device("cpu" if key == HOST else key)
            nbytes = value if isinstance(value, int) else convert_file_size_to_int(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f'max_memory is a dict such as {{0: "80GB", "cpu": "64GB"}}, got {max_memory!r}.'
            ) from error
        limits["cpu" if device.type == "cpu" else device.index or 0] = nbytes
    accelerators = sorted(key for key in limits if isinstance(key, int))
    return {key: limits[key] for key in [*accelerators, "cpu"] if key in limits}


def _automatic_map(config: PreTrainedConfig, dtype: torch.dtype, kind: str, limits: Mapping[object, int]) -> Mapping:
    """The map that loading makes of "auto" and its like; tables have no part in it."""
    with torch.device("meta"), tables_without_blocks():
        model, _ = _model_of(config, dtype)
    options = {"no_split_module_classes": list(model._no_split_modules)}
    with _without_warnings():
        if kind != "sequential":
            limits = get_balanced_memory(model, dict(limits), low_zero=kind == "balanced_low_0", **options)
        return infer_auto_device_map(model, dict(limits), **options)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """accelerate warns of every planned device that this machine does not have."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _split(device_map, model: Any, config: PreTrainedConfig) -> tuple[Any, Mapping]:
    """The part of a map that is about the backbone, and entries under the names of tables or their ends."""
    if not is_served(config):
        return split_device_map(device_map)
    backbone_map, entries = split_places(device_map, embeddings_of(model), tied_weights(model))
    return backbone_map, {
        (name if name is None else f"{name}.{TABLE_CHILD}", number): value for (name, number), value in entries.items()
    }


def _reads_per_token(model: Any, table: str, block: Block) -> int:
    """Rows of a block that a token reads: one for each hash head, or one by its id."""
    name = table.removesuffix(f".{TABLE_CHILD}")
    if f".{name}".endswith(NGRAM_TABLE):
        return model.get_submodule(name.rpartition(".")[0]).ngram_heads
    return len(block.rows_of_head)


def _rows_of_first_rank(table: EngramTable, ranks: int) -> list[int]:
    """Rows of each block that the first rank holds, which holds most."""
    return RowCut([block.num_rows for block in table.block_records], ranks).rows_of(0)


def _moved_per_step(table: EngramTable, tokens: int, ranks: int) -> float:
    """Bytes that a rank moves for a table in a training step with so many tokens of its own."""
    rows = rows_of_step(sum(len(block.rows_of_head) for block in table.block_records), tokens)
    return nbytes_of_step(rows, table.head_dim, table.row_nbytes, ranks, table.is_trainable)


def _add_block(
    estimate: MemoryEstimate, where: str, block: Block, rows: int, reads: int, is_table_on_disk: bool
) -> None:
    """Count a block of which so many rows are held."""
    nbytes = rows * block.row_nbytes
    _add(estimate.tables, where, nbytes)
    if where in (HOST, DISK, "cpu"):
        _add(estimate.rows_per_token, where, reads)
        _add(estimate.read_per_token, where, reads * block.row_nbytes)
    if block.parameter.requires_grad:
        _add(estimate.optimizer, DISK if is_table_on_disk else where, _row_state_bytes(block.parameter, rows))
        if where == DISK:
            _add(estimate.optimizer, DISK, nbytes)


def _add_lacking(estimate: MemoryEstimate, limits: Mapping) -> None:
    for key, limit in limits.items():
        place = "cpu" if key == "cpu" else str(as_device(key))
        estimate.limits[place] = limit
        # Host memory is the CPU's.
        places = ("cpu", "host") if key == "cpu" else (place,)
        parts = (estimate.backbone, estimate.tables, estimate.step)
        needed = sum(part.get(place, 0) for part in parts for place in places)
        if needed > limit:
            estimate.lacking[place] = needed - limit
    if DISK in estimate.backbone:
        estimate.lacking[DISK] = estimate.backbone[DISK]


def _nbytes(name: str, tensor: torch.Tensor, model: PreTrainedModel) -> int:
    """Bytes of a tensor as `from_pretrained` loads it: some stay in single precision, whatever the `dtype`."""
    single = model._keep_in_fp32_modules_strict or ()
    is_single = tensor.is_floating_point() and any(part.removeprefix(".*") in name for part in single)
    return max(tensor.nbytes, tensor.numel() * 4) if is_single else tensor.nbytes


def _row_state_bytes(block: torch.Tensor, rows: int) -> int:
    """Lazy Adam's of so many rows: two numbers per weight, of two bytes for tables of bfloat16, and the count of a
    row's steps."""
    return rows * (block.shape[1] * 2 * (2 if block.dtype == torch.bfloat16 else 4) + 4)


def _add(bytes_of: dict, where: object, nbytes: int) -> None:
    bytes_of[where] = bytes_of.get(where, 0) + nbytes


def _backbone_devices(device_map, sizes: Mapping[str, int]) -> dict[str, str]:
    """The device, or "disk", of each tensor of the backbone."""
    return {name: _device_in(device_map, name) for name in sizes}


def _device_in(device_map, name: str) -> str:
    if not isinstance(device_map, Mapping):
        device_map = {"": "cpu" if device_map is None else device_map}
    value = place_in_map(device_map, name, "cpu")
    return value if value == DISK else str(as_device(value))


def _moments(model: Any, layers: list[Any], dtype: torch.dtype, tokens: int) -> Iterator[int]:
    """Bytes of what lies beside the residual streams at the widest points of a forward; `layers` of memory."""
    config = model.config.get_text_config()
    streams = tokens * config.hidden_size * getattr(config, "hc_mult", 1) * dtype.itemsize
    # Logits, and their copy in float32 for the loss.
    yield streams + tokens * config.vocab_size * (dtype.itemsize + 4)
    # Rows, keys and values of a memory layer; scores are in float32.
    if layers:
        scores = 2 * layers[0].streams * config.hidden_size * 4
        yield 3 * streams + tokens * (layers[0].value_proj.in_features * (4 + dtype.itemsize) + scores)
    # Gate, up and product of the widest feed-forward layer.
    routed = (getattr(config, "num_experts_per_tok", None) or 0) * (getattr(config, "moe_intermediate_size", None) or 0)
    # Gemma 3n has a width for each layer.
    widths = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widest = max(*(widths if isinstance(widths, list) else [widths]), routed)
    yield 2 * streams + 3 * tokens * widest * dtype.itemsize

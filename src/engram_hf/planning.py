"""Sizes before anything is allocated: parameters of a config, those a token computes with, the share of the memory.

Counts a model on the meta device, so a config of any size costs milliseconds and no memory.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .modeling.checkpoint_loading import BLOCK_KEY
from .modeling.configuration_engram_moe import EngramMoEConfig
from .modeling.modeling_engram_moe import EngramMoEForCausalLM
from .modeling.table_blocks import DISK, HOST
from .modeling.table_placement import (
    AUTOMATIC,
    Place,
    as_device,
    check_backbone_keys,
    check_entries,
    memory_limits,
    memory_of,
    place_of_layer,
    plan_places,
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


def count_parameters(config: EngramMoEConfig) -> ParameterCount:
    """Count the parameters of the causal language model of a config.

    Example:
        >>> round(count_parameters(EngramMoEConfig.preset("engram-27b")).memory_share, 2)
        0.25
    """
    # Blocks of quantized rows hold bytes, of numbers and scales; the numbers are those of a plain table.
    config = copy.deepcopy(config)
    config.engram_table_dtype = None
    with torch.device("meta"):
        model = EngramMoEForCausalLM(config)
    sizes = {n: p.numel() for n, p in model.named_parameters() if not n.endswith(".row_gradients.norm")}
    total = sum(sizes.values())
    tables = sum(size for name, size in sizes.items() if ".table.blocks." in name)
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    vocabulary = sum(size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name)
    unused = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    return ParameterCount(total, total - tables - vocabulary - unused, tables, routed)


# AdamW: two numbers of four bytes for each that is trained.
OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by place: a device ("cuda:0", "cpu"), "host" (tables in RAM under an accelerator) or "disk".

    backbone, tables: the weights.
    optimizer: AdamW's state and a gradient for every weight of the backbone; for tables what `engram_optimizers(args)`
        keeps of each row, and on disk the copy that is trained.
    step: what the largest moment of a forward without gradients adds.
    lacking: where memory is limited, bytes of weights and step beyond the limit; under "disk" what of the backbone
        found no place in memory. Empty where the model fits.
    """

    backbone: dict[str, int] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, int] = field(default_factory=dict)
    step: dict[str, int] = field(default_factory=dict)
    lacking: dict[str, int] = field(default_factory=dict)

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
) -> MemoryEstimate:
    """What loading a model in this way will take, before anything is allocated.

    Args:
        config_or_path: a config, a folder or a repository.
        device_map, dtype, max_memory: as for `from_pretrained`. "auto" without an accelerator plans for the CPU;
            without a `dtype` the backbone is in that of the config.
        batch_size, seq_length: of the forward whose largest moment is counted.

    Raises:
        ValueError: an entry of `device_map` names nothing or means nothing; `dtype` is no floating type; `max_memory`
            is given without an automatic map, which alone makes use of it.

    Example:
        >>> estimate = estimate_memory("output/tiny", device_map={"": "cpu", "model.layers.1.engram.table": "disk"})
        >>> estimate.tables["disk"]
        16781312
    """
    config = config_or_path
    if isinstance(config_or_path, str | Path):
        config = EngramMoEConfig.from_pretrained(config_or_path)
    dtype = _floating_type(dtype if dtype not in (None, "auto") else (getattr(config, "dtype", None) or torch.float32))
    with torch.device("meta"):
        model = EngramMoEForCausalLM._from_config(config, dtype=dtype)
    backbone_map, entries = split_device_map(device_map)
    blocks = {name: [block.nbytes for block in table.blocks] for name, table in model.named_tables().items()}
    prefix = f"{model.base_model_prefix}."
    check_entries(entries, blocks, prefix)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = {name: _nbytes(name, tensor, model) for name, tensor in tensors.items() if BLOCK_KEY.match(name) is None}
    check_backbone_keys(backbone_map, tensors, prefix, blocks)
    if max_memory is not None:
        _check_limits(max_memory, backbone_map)
    limits = memory_limits(max_memory) if backbone_map in AUTOMATIC else None
    values = _backbone_devices(backbone_map, sizes, limits)
    devices = [as_device(value) for value in values.values() if value != DISK]
    main_device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    default = {}
    for name in blocks:
        layer = f"{prefix}{name.removesuffix('table')}value_proj.weight"
        default[name] = place_of_layer(values[layer], main_device)
    left = None if limits is None else dict(limits)
    if left is not None:
        for name, nbytes in sizes.items():
            if values[name] != DISK:
                left[memory_of(Place("", values[name]))] -= nbytes
    planned = plan_places(blocks, entries, default, left)

    estimate = MemoryEstimate()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, nbytes in sizes.items():
        _add(estimate.backbone, str(values[name]), nbytes)
        if name in trained and values[name] != DISK:
            elements = model.get_parameter(name).numel()
            _add(estimate.optimizer, str(values[name]), nbytes + OPTIMIZER_BYTES * elements)
    for name, places in planned.items():
        table, on_disk = model.get_submodule(f"model.{name}"), any(place.tier == DISK for place in places)
        for place, block in zip(places, table.blocks, strict=True):
            is_resident = place.tier not in (HOST, DISK)
            where = str(as_device(place.device)) if is_resident else place.tier
            where = "cpu" if where == HOST and main_device.type == "cpu" else where
            _add(estimate.tables, where, block.nbytes)
            if block.requires_grad:
                _add(estimate.optimizer, DISK if on_disk else where, _row_state_bytes(block))
            if block.requires_grad and where == DISK:
                _add(estimate.optimizer, DISK, block.nbytes)
    _add(estimate.step, str(main_device), max(_moments(config, dtype, batch_size * seq_length)))
    if limits is not None:
        _add_lacking(estimate, limits)
    return estimate


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


def _add_lacking(estimate: MemoryEstimate, limits: Mapping) -> None:
    for key, limit in limits.items():
        # Host memory is the CPU's.
        places = ("cpu", "host") if key == "cpu" else (str(as_device(key)),)
        parts = (estimate.backbone, estimate.tables, estimate.step)
        needed = sum(part.get(place, 0) for part in parts for place in places)
        if needed > limit:
            estimate.lacking[places[0]] = needed - limit
    if DISK in estimate.backbone:
        estimate.lacking[DISK] = estimate.backbone[DISK]


def _nbytes(name: str, tensor: torch.Tensor, model: EngramMoEForCausalLM) -> int:
    """Bytes of a tensor as `from_pretrained` loads it: some stay in single precision, whatever the `dtype`."""
    is_single = tensor.is_floating_point() and any(part in name for part in model.model.single_precision_modules())
    return max(tensor.nbytes, tensor.numel() * 4) if is_single else tensor.nbytes


def _row_state_bytes(block: torch.Tensor) -> int:
    """Lazy Adam's: two numbers per weight, of two bytes for tables of bfloat16, and the count of a row's steps."""
    return block.numel() * 2 * (2 if block.dtype == torch.bfloat16 else 4) + 4 * block.shape[0]


def _add(bytes_of: dict[str, int], where: str, nbytes: int) -> None:
    bytes_of[where] = bytes_of.get(where, 0) + nbytes


def _backbone_devices(device_map, sizes: Mapping[str, int], limits: Mapping | None) -> dict[str, str]:
    """The device, or "disk", of each tensor of the backbone."""
    values: dict[str, str] = {}
    if limits is None:
        if not isinstance(device_map, Mapping):
            device_map = {"": "cpu" if device_map is None else device_map}
        for name in sizes:
            keys = [key for key in device_map if key == "" or name == key or name.startswith(f"{key}.")]
            value = device_map[max(keys, key=len)] if keys else "cpu"
            values[name] = value if value == DISK else str(as_device(value))
        return values
    left = dict(limits)
    for name, nbytes in sizes.items():
        key = next((key for key, free in left.items() if free >= nbytes), None)
        if key is not None:
            left[key] -= nbytes
        values[name] = DISK if key is None else str(as_device(key))
    return values


def _moments(config: EngramMoEConfig, dtype: torch.dtype, tokens: int) -> Iterator[int]:
    """Bytes of what lies beside the residual streams at the widest points of a forward."""
    streams = tokens * config.hidden_size * config.hc_mult * dtype.itemsize
    # Logits, and their copy in float32 for the loss.
    yield streams + tokens * config.vocab_size * (dtype.itemsize + 4)
    # Rows, keys and values of a memory layer; scores are in float32.
    if config.engram_layer_ids:
        scores = 2 * config.hc_mult * config.hidden_size * 4
        yield 3 * streams + tokens * (config.engram_width * (4 + dtype.itemsize) + scores)
    # Gate, up and product of the widest feed-forward layer.
    routed = config.num_experts_per_tok * config.moe_intermediate_size
    yield 2 * streams + 3 * tokens * max(config.intermediate_size, routed) * dtype.itemsize

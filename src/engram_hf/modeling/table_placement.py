"""Which block goes to which tier: `device_map` in, tiers out. Pure functions of names and sizes.

Names of tables are those inside the base model, `layers.1.engram.table`; entries of a `device_map` may have the prefix
of the model around it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from transformers.utils import is_accelerate_available

from .table_blocks import DISK, HOST, RESIDENT


if is_accelerate_available():
    from accelerate.utils import get_max_memory

TABLE_KEY = re.compile(r"^(?:.*\.)?(layers\.\d+\.engram\.table)(?:\.blocks)?(?:\.(\d+))?$")
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# The entry of tables without one of their own.
EVERY_TABLE = (None, None)


class Place(NamedTuple):
    """Where a block goes. device: of a resident block."""

    tier: str
    device: torch.device | str | int = "cpu"


def as_device(value) -> torch.device:
    """A device; a number is an accelerator also where there is none, so that plans can be made anywhere."""
    if isinstance(value, int) and not torch.accelerator.is_available():
        return torch.device("cuda", value)
    return torch.device(value)


def split_device_map(device_map):
    """The part of a `device_map` that transformers understands, and the entries of tables and blocks.

    For command lines that take no dict, "cpu+disk" is a map of the backbone and an entry of every table.

    Returns:
        the map without these entries (None where nothing is left of it), and a dict (table name, number of the block or
        None for all) to the entry's value.

    Raises:
        ValueError: what it gives the backbone is no device.
    """
    if isinstance(device_map, str):
        backbone_map, plus, tables = device_map.partition("+")
        if backbone_map not in AUTOMATIC:
            _check_device(backbone_map)
        return backbone_map, {EVERY_TABLE: tables} if plus else {}
    if not isinstance(device_map, Mapping):
        return device_map, {}
    backbone, entries = {}, {}
    for key, value in device_map.items():
        match = TABLE_KEY.match(key)
        if match is None:
            backbone[key] = value
        else:
            entries[match[1], None if match[2] is None else int(match[2])] = value
    for value in backbone.values():
        if value != DISK:
            _check_device(value)
    return backbone or None, entries


def _check_device(value) -> None:
    try:
        as_device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device_map is one of {", ".join(AUTOMATIC)}, a device such as "cpu" or "cuda:0", or a dict of devices; '
            f'got {value!r}. "cpu+disk" has the backbone on the CPU and every table on disk.'
        ) from error


def check_backbone_keys(device_map, names: Iterable[str], prefix: str, tables: Iterable[str]) -> None:
    """See that keys of a `device_map` that look like parts of layers are parts of the model.

    Args:
        device_map: without the entries of tables, as `split_device_map` gives it.
        names: of the parameters and buffers of the model.
        prefix: of the base model in them, "" for the base model itself.
        tables: names of the tables inside the base model, for the message.

    Raises:
        ValueError: a key is the beginning of no name.
    """
    if not isinstance(device_map, Mapping):
        return
    own = [name.removeprefix(prefix) for name in names] + list(tables)
    for key in device_map:
        # Maps are also made from the names of another head, of which a model may have none.
        within = key.removeprefix(prefix or "model.")
        looks_like_a_part = "engram" in key or "layers." in key
        if looks_like_a_part and not any(name == within or name.startswith(f"{within}.") for name in own):
            raise ValueError(
                f"device_map names {key}, which this model has no part of. {known_tables(tables, prefix)} Parts of the "
                "backbone have the names of model.named_parameters(), or their beginnings."
            )


def known_tables(tables: Iterable[str], prefix: str) -> str:
    """A sentence with the names that entries may have."""
    return f"The tables of this model are: {', '.join(f'{prefix}{name}' for name in tables) or 'none'}."


def place_of_entry(value) -> Place:
    """What an entry of a table or block means: "cpu" is host, "disk" is disk, a device is resident there.

    Raises:
        ValueError: it is none of these.
    """
    if value == "disk":
        return Place(DISK)
    try:
        device = as_device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'A table or block goes to "cpu" (host memory), "disk", or an accelerator such as 0 or "cuda:0"; got '
            f"{value!r}."
        ) from error
    if device.type == "meta":
        raise ValueError('A table cannot be placed on "meta": there it has no rows. "disk" takes no memory either.')
    return Place(HOST) if device.type == "cpu" else Place(RESIDENT, device)


def place_of_layer(value, main_device: torch.device) -> Place:
    """Where a table without an entry goes, from where its layer is: with its layer, on the tier of that name."""
    if value == "disk":
        return Place(DISK)
    device = as_device(value)
    if device.type == "cpu" and main_device.type != "cpu":
        return Place(HOST)
    return Place(RESIDENT, device)


def check_entries(entries: Mapping, blocks: Mapping[str, Sequence[int]], prefix: str) -> None:
    """
    Args:
        entries: as `split_device_map` gives them.
        blocks: table name to the bytes of its blocks.
        prefix: of the names of this model's tables, for the message.

    Raises:
        ValueError: an entry names no table, or no block of one.
    """
    for (table, number), value in entries.items():
        place_of_entry(value)
        if (table, number) == EVERY_TABLE:
            continue
        if table not in blocks:
            raise ValueError(f"device_map names {table}, which is no table. {known_tables(blocks, prefix)}")
        if number is not None and number >= len(blocks[table]):
            raise ValueError(
                f"device_map names block {number} of {table}, which has blocks 0 to {len(blocks[table]) - 1}."
            )


def plan_places(
    blocks: Mapping[str, Sequence[int]],
    entries: Mapping,
    default: Mapping[str, Place],
    free: dict[object, int] | None = None,
) -> dict[str, list[Place]]:
    """A place for every block: its own entry, its table's, or the default; limited by memory where there is a limit.

    Args:
        blocks: table name to the bytes of its blocks.
        entries: as `split_device_map` gives them.
        default: table name to the place of blocks without an entry.
        free: bytes left by device, with "cpu" for RAM; blocks without an entry then go where they fit, in order: their
            default, host, disk. None: they go to their default.
    """
    free = None if free is None else dict(free)
    places: dict[str, list[Place]] = {}
    for table, sizes in blocks.items():
        places[table] = []
        for number, nbytes in enumerate(sizes):
            value = entries.get((table, number), entries.get((table, None), entries.get(EVERY_TABLE)))
            if value is not None:
                place = place_of_entry(value)
            elif free is None:
                place = default[table]
            else:
                place = next(p for p in (default[table], Place(HOST), Place(DISK)) if _fits(p, nbytes, free))
            if free is not None and place.tier != DISK:
                free[memory_of(place)] = free.get(memory_of(place), 0) - nbytes
            places[table].append(place)
    return places


def _fits(place: Place, nbytes: int, free: Mapping[object, int]) -> bool:
    return place.tier == DISK or free.get(memory_of(place), 0) >= nbytes


def memory_of(place: Place) -> object:
    """The key of `max_memory` that a block at this place counts against."""
    if place.tier == HOST:
        return "cpu"
    device = as_device(place.device)
    return "cpu" if device.type == "cpu" else (device.index or 0)


def memory_limits(max_memory: Mapping | None) -> dict[object, int]:
    """Bytes by device, as accelerate counts them, of which an automatic map may make use."""
    if not is_accelerate_available():
        raise ImportError("device_map='auto' needs accelerate: pip install accelerate")
    # accelerate changes the dict that it is given.
    return dict(get_max_memory(None if max_memory is None else dict(max_memory)))

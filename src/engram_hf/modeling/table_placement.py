"""Which block goes to which tier, and where it is now: `device_map` in, tiers out. Plans are made of names and sizes.

A place has these names wherever it is given: "host" or "cpu" (RAM), "disk" (the checkpoint's own files), "resident"
(with its layer), or an accelerator such as 0 or "cuda:0". A key is the name of a table or of a block, with or without
the prefix of the model around it, or three dots and the end of such names: "...table" is every table.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import is_accelerate_available

from .disk_reading import HotRows
from .table import EngramTable
from .table_blocks import DISK, HOST, RESIDENT, HostNodes, block_name
from .table_cut import nbytes_of_step, rows_of_step


if is_accelerate_available():
    from accelerate.utils import get_max_memory

# The name of a table, and of a block in it.
TABLE_KEY = re.compile(r"^((?:.*\.)?table)(?:\.blocks)?(?:\.(\d+))?$")
# Before the end of a name, in a key that matches all names with this end.
ANY_BEGINNING = "..."
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# The entry of tables without one of their own.
EVERY_TABLE = (None, None)


class Place(NamedTuple):
    """Where a block goes. device: of a resident block; rows in host memory are on the CPU."""

    tier: str
    device: torch.device | str | int = "cpu"

    @property
    def is_on_host(self) -> bool:
        return self.tier == HOST

    @property
    def is_on_disk(self) -> bool:
        return self.tier == DISK


def as_device(value) -> torch.device:
    """A device; a number is an accelerator also where there is none, so that plans can be made anywhere."""
    if isinstance(value, int) and not torch.accelerator.is_available():
        return torch.device("cuda", value)
    return torch.device(value)


def split_device_map(device_map):
    """The part of a `device_map` that transformers understands, and the entries of tables and blocks.

    For command lines that take no dict, "cpu+disk" is a map of the backbone and an entry of every table.

    Returns:
        the map without these entries (None where nothing is left of it), and a dict (table name or its end, number of
        the block or None for all) to the entry's value, for `resolve_entries`.

    Raises:
        ValueError: what it gives the backbone is no device.
    """
    if isinstance(device_map, str):
        backbone_map, plus, tables = device_map.partition("+")
        backbone_map = _without_host(backbone_map)
        if backbone_map not in AUTOMATIC:
            _check_device(backbone_map)
        return backbone_map, {EVERY_TABLE: tables} if plus else {}
    if not isinstance(device_map, Mapping):
        return device_map, {}
    backbone: dict[str, Any] = {}
    entries: dict[tuple[str, int | None], Any] = {}
    for key, value in device_map.items():
        match = TABLE_KEY.match(key)
        if match is None and not key.startswith(ANY_BEGINNING):
            backbone[key] = _without_host(value)
        elif match is None:
            entries[key, None] = value
        else:
            entries[match[1], None if match[2] is None else int(match[2])] = value
    for value in backbone.values():
        if value != DISK:
            _check_device(value)
    return backbone or None, entries


def _without_host(value):
    """A place of the backbone, as transformers knows it."""
    return "cpu" if value == HOST else value


def _check_device(value) -> None:
    try:
        as_device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device_map is one of {", ".join(AUTOMATIC)}, a device such as "cpu" or "cuda:0", or a dict of devices; '
            f'got {value!r}. "cpu+disk" has the backbone on the CPU and every table on disk.'
        ) from error


def check_places(places: object, names: Iterable[str]) -> None:
    """
    Args:
        places: what `place_tables` was given.
        names: of what it can move.

    Raises:
        ValueError: it is no dict.
    """
    if not isinstance(places, Mapping):
        known = list(names)
        end = known[0].rpartition(".")[2] if known else "table"
        raise ValueError(
            f'place_tables takes a dict of names to places, such as {{"...{end}": "disk"}}, got {places!r:.80}. Names '
            f"of this model are: {', '.join(known) or 'none'}."
        )


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


def place_in_map(device_map: Mapping, name: str, otherwise):
    """What a `device_map` says of a module or tensor: the value of the longest key that its name begins with."""
    keys = [key for key in device_map if key == "" or name == key or name.startswith(f"{key}.")]
    return device_map[max(keys, key=len)] if keys else otherwise


def place_of_entry(value, home: Place) -> Place:
    """What an entry of a table or block means.

    Args:
        value: "host" or "cpu", "disk", "resident", or an accelerator.
        home: the place of its layer.

    Raises:
        ValueError: it is none of these.
    """
    if value in (DISK, HOST):
        return Place(value)
    if value == RESIDENT:
        return home
    try:
        device = as_device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'A table or block goes to "host" (also called "cpu": RAM), "disk", "resident" (with its layer), or an '
            f'accelerator such as 0 or "cuda:0"; got {value!r}.'
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


def resolve_entries(entries: Mapping, blocks: Mapping[str, Sequence[int]], prefix: str) -> dict:
    """Entries under the names of this model's tables. A longer key counts more than a shorter one.

    Args:
        entries: as `split_device_map` gives them.
        blocks: table name inside the base model to the bytes of its blocks.
        prefix: of the names of this model's tables.

    Returns:
        (table name inside the base model, number of the block or None for all) to the entry's value.

    Raises:
        ValueError: an entry names no table, or no block of one, or its value is no place.
    """
    resolved: dict = {}
    for (key, number), value in sorted(entries.items(), key=lambda item: len(item[0][0] or "")):
        place_of_entry(value, Place(RESIDENT))
        if (key, number) == EVERY_TABLE:
            resolved[EVERY_TABLE] = value
            continue
        if key.startswith(ANY_BEGINNING):
            named = {(table, number): f".{prefix}{table}" for table in blocks}
            if number is None:
                named |= {(t, i): f".{prefix}{t}.blocks.{i}" for t in blocks for i in range(len(blocks[t]))}
            end = f".{key.removeprefix(ANY_BEGINNING).lstrip('.')}"
            found = [entry for entry, name in named.items() if name.endswith(end)]
        else:
            # Whatever model is around this one, the name ends in that of the table.
            found = [(table, number) for table in blocks if f".{key}".endswith(f".{table}")]
        if not found:
            raise ValueError(f"device_map names {key}, which is no table. {known_tables(blocks, prefix)}")
        for table, i in found:
            if i is not None and i >= len(blocks[table]):
                raise ValueError(
                    f"device_map names block {i} of {table}, which has blocks 0 to {len(blocks[table]) - 1}."
                )
        resolved |= dict.fromkeys(found, value)
    return resolved


def plan_places(
    blocks: Mapping[str, Sequence[int]],
    entries: Mapping,
    default: Mapping[str, Place],
    free: dict[object, int] | None = None,
    home: Mapping[str, Place] | None = None,
) -> dict[str, list[Place]]:
    """A place for every block: its own entry, its table's, or the default; limited by memory where there is a limit.

    Args:
        blocks: table name to the bytes of its blocks.
        entries: as `resolve_entries` gives them.
        default: table name to the place of blocks without an entry.
        free: bytes left by device, with "cpu" for RAM; blocks without an entry then go where they fit, in order: their
            default, host, disk. None: they go to their default.
        home: table name to the place of its layer, which "resident" means; None where that is the default.
    """
    home = default if home is None else home
    free = None if free is None else dict(free)
    places: dict[str, list[Place]] = {}
    for table, sizes in blocks.items():
        places[table] = []
        for number, nbytes in enumerate(sizes):
            value = entries.get((table, number), entries.get((table, None), entries.get(EVERY_TABLE)))
            if value is not None:
                place = place_of_entry(value, home[table])
            elif free is None:
                place = default[table]
            else:
                place = next(p for p in (default[table], Place(HOST), Place(DISK)) if _fits(p, nbytes, free))
            if free is not None and not place.is_on_disk:
                free[memory_of(place)] = free.get(memory_of(place), 0) - nbytes
            places[table].append(place)
    return places


def _fits(place: Place, nbytes: int, free: Mapping[object, int]) -> bool:
    return place.is_on_disk or free.get(memory_of(place), 0) >= nbytes


def left_by_backbone(limits: Mapping[object, int], used: Mapping[object, int]) -> dict[object, int]:
    """Bytes that the backbone leaves to tables, by device, with "cpu" for RAM.

    Args:
        limits: bytes that may be used.
        used: bytes of the backbone; "disk" among them.

    Where a part of the backbone found no place on an accelerator, accelerators leave nothing: that part passes through
    what is free there in every forward.
    """
    keys = set(limits) - {"cpu"}
    is_offloaded = bool(keys) and any(used.get(place) for place in ("cpu", DISK))
    free = {key: limit - used.get(key, 0) for key, limit in limits.items()}
    return {key: 0 if is_offloaded and key in keys else nbytes for key, nbytes in free.items()}


def memory_of(place: Place) -> object:
    """The key of `max_memory` that a block at this place counts against."""
    device = as_device(place.device)
    return "cpu" if device.type == "cpu" else (device.index or 0)


def memory_limits(max_memory: Mapping | None) -> dict[object, int]:
    """Bytes by device, as accelerate counts them, of which an automatic map may make use."""
    if not is_accelerate_available():
        raise ImportError("device_map='auto' needs accelerate: pip install accelerate")
    # accelerate changes the dict that it is given.
    return dict(get_max_memory(None if max_memory is None else dict(max_memory)))


def check_ranks(engram_ranks: str | None, hot_rows: int, arguments: Mapping) -> None:
    """
    Raises:
        ValueError: `engram_ranks` is another word.
        NotImplementedError: it goes with an argument that it cannot go with.
    """
    if engram_ranks is None:
        return
    if engram_ranks != "shard":
        raise ValueError(
            f'engram_ranks is "shard", which cuts tables over the processes of a run, or None; got {engram_ranks!r}.'
        )
    mesh = [
        name for name in ("tp_plan", "tp_size", "device_mesh", "distributed_config") if arguments.get(name) is not None
    ]
    if hot_rows or mesh:
        raise NotImplementedError(
            f'engram_ranks="shard" cuts tables over all processes of a run, and cannot go with '
            f"{mesh[0] if mesh else 'hot_rows'}. Leave one of them out."
        )


def bind_host_blocks(
    tables: Mapping[str, EngramTable], planned: Mapping[str, Sequence[Place]], nodes: HostNodes | None
) -> None:
    """Say which NUMA nodes the memory of blocks is to lie on, before they are placed.

    Raises:
        ValueError: nodes are named, and no block goes to host memory.
    """
    on_host = [
        tables[name].block_records[i] for name, each in planned.items() for i, p in enumerate(each) if p.is_on_host
    ]
    if nodes is not None and not on_host:
        raise ValueError(
            "host_nodes is for tables in host memory, and no table goes there. Give device_map an entry such as "
            '"...table": "host", or leave host_nodes out.'
        )
    for block in on_host:
        block.bind_to(nodes)


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
    """A table: its module's name, rows, width of a row, type, bytes, blocks, and its hot rows with their counts.

    ranks: over which it is cut. Bytes, and blocks with their rows, are then those that this process holds.
    moved_per_step: bytes that a rank then moves in a training step of 16,384 tokens, if half of their rows are
        distinct; computed by table_cut.py. `engram-hf plan --ranks` does it for other steps.
    """

    name: str
    rows: int
    head_dim: int
    dtype: str
    nbytes: int
    blocks: tuple[BlockInfo, ...]
    hot_rows: HotRows | None
    ranks: int = 1
    moved_per_step: int = 0

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes on each tier."""
        found: Counter[str] = Counter()
        for block in self.blocks:
            found[block.tier] += block.nbytes
        return dict(found)


def describe_tables(tables: Mapping[str, EngramTable], prefix: str) -> list[TableInfo]:
    """What tables there are and where their blocks live.

    Args:
        tables: by their names inside the base model.
        prefix: of the base model in the names that are told.
    """
    infos = []
    for name, table in tables.items():
        name = f"{prefix}{name}"
        blocks = tuple(
            BlockInfo(
                name=block_name(name, block.number),
                rows=block.num_rows,
                nbytes=block.parameter.nbytes,
                tier=block.tier,
                device=block.parameter.device,
                file=None if block.source is None else block.source.file.path,
            )
            for block in table.block_records
        )
        ranks = 1 if table.ranks is None else table.ranks.cut.ranks
        rows_read = rows_of_step(sum(len(block.rows_of_head) for block in table.block_records))
        moved = nbytes_of_step(rows_read, table.head_dim, table.row_nbytes, ranks, table.is_trainable)
        infos.append(
            TableInfo(
                name=name,
                rows=table.num_rows,
                head_dim=table.head_dim,
                dtype=table.row_format or str(table.dtype).removeprefix("torch."),
                nbytes=sum(block.nbytes for block in blocks),
                blocks=blocks,
                hot_rows=table.hot_rows,
                ranks=ranks,
                moved_per_step=round(moved),
            )
        )
    return infos

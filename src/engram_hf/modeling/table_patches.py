"""Row patches: changed rows of tables as a small file, and the overlay that lays them over a table on any tier.

A patch never writes to a table. A lookup takes the table's own rows, and then those of the patches that are active. The
file is a safetensors file that holds, for each table:

* `<table>.patch.row_ids`, (n,) int64, ascending;
* `<table>.patch.rows`, (n, head_dim) float32 or bfloat16, new rows or what is added to the old ones.

Its metadata has one entry, "engram_patch": JSON with everything else, and a digest of all of it.
"""

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .disk_safetensors import read_header, write_pieces
from .table_blocks import put_rows


PATCH_FILE = "patch.safetensors"
METADATA = "engram_patch"
FORMAT_VERSION = 1
REPLACE, ADD = "replace", "add"
MODES = (REPLACE, ADD)
PATCH_DTYPES = (torch.float32, torch.bfloat16)
ROW_IDS, ROWS = "patch.row_ids", "patch.rows"
# Places of the filter for each patched row. The share of lookups that pass it by chance is at most one in as many.
PLACES_PER_ROW = 64
LONGEST_NAME = 200


class PatchableTable(Protocol):
    """What this file needs of a table."""

    head_dim: int

    @property
    def num_rows(self) -> int: ...
    @property
    def home(self) -> torch.device: ...
    @property
    def patches(self) -> "TablePatches": ...
    def gather_rows(self, row_ids: torch.Tensor) -> torch.Tensor: ...


class PatchedRows(NamedTuple):
    """Changed rows of one table.

    row_ids: (n,) int64 row ids of the table, ascending and distinct.
    rows: (n, head_dim) float32 or bfloat16. Where they require gradients, lookups give them some.
    table_rows: rows of the whole table.
    base_digest: SHA-256 of the rows that the table has there, in hexadecimal; "" where it is not known.
    """

    row_ids: torch.Tensor
    rows: torch.Tensor
    table_rows: int
    base_digest: str = ""


@dataclass(eq=False)
class RowPatch:
    """Changed rows of the tables of one model.

    name: by which a model knows it.
    tables: name of a table inside the base model ("layers.1.engram.table") to its changed rows.
    mode: "replace": the rows take the place of the table's; "add": they are added to them.
    fingerprint: of the hash that says which n-gram reads which row; empty where the model's own code finds its rows.
    provenance: what made the patch: text and numbers.
    """

    name: str
    tables: dict[str, PatchedRows]
    mode: str = REPLACE
    fingerprint: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(len(each.row_ids) for each in self.tables.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its rows and row ids."""
        return sum(each.row_ids.nbytes + each.rows.nbytes for each in self.tables.values())

    def check(self, where: str) -> None:
        """
        Args:
            where: the patch, for messages.

        Raises:
            ValueError: a part is of another type or shape than it must be.
        """
        wrong = self._what_is_wrong()
        if wrong is not None:
            raise ValueError(f"{where} is no sound patch: {wrong}. Make it again, or copy its file again.")

    def _what_is_wrong(self) -> str | None:
        if not isinstance(self.name, str) or not self.name.isprintable() or not 0 < len(self.name) <= LONGEST_NAME:
            return f"its name must be printable text of at most {LONGEST_NAME} characters, got {self.name!r:.80}"
        if self.mode not in MODES:
            return f"its mode must be one of {', '.join(MODES)}, got {self.mode!r:.80}"
        if not isinstance(self.provenance, dict) or not isinstance(self.fingerprint, dict):
            return "fingerprint and provenance must be dicts"
        if not all(isinstance(part, str) for part in self.fingerprint.values()):
            return "its fingerprint must map text to text"
        for table, (row_ids, rows, table_rows, digest) in self.tables.items():
            if row_ids.dtype != torch.int64 or row_ids.ndim != 1:
                return f"row_ids of {table} are {tuple(row_ids.shape)} {row_ids.dtype}, and must be (n,) torch.int64"
            if rows.ndim != 2 or len(rows) != len(row_ids) or rows.dtype not in PATCH_DTYPES:
                return (
                    f"rows of {table} are {tuple(rows.shape)} {rows.dtype}, and must be ({len(row_ids)}, row width) in "
                    "torch.float32 or torch.bfloat16"
                )
            if (row_ids[1:] <= row_ids[:-1]).any():
                return f"row_ids of {table} are not ascending and distinct"
            if type(table_rows) is not int or not isinstance(digest, str):
                return f"the number of rows or the base digest of {table} is missing"
            if len(row_ids) and not 0 <= int(row_ids[0]) <= int(row_ids[-1]) < table_rows:
                return f"row_ids of {table} must lie in [0, {table_rows})"
            if not torch.isfinite(rows).all():
                return f"rows of {table} hold NaN or infinity"
        return None


# The file.


def write_patch(patch: RowPatch, file: str | Path) -> str:
    """Write a patch to a file. What was there under this name stays if that fails.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        ValueError: the patch is not sound.
        OSError: no space or no permission.
    """
    patch.check(f"The patch {patch.name!r}")
    tensors = {}
    for table, each in patch.tables.items():
        tensors[f"{table}.{ROW_IDS}"] = each.row_ids.detach().cpu().contiguous()
        tensors[f"{table}.{ROWS}"] = each.rows.detach().cpu().contiguous()
    facts = {
        "version": FORMAT_VERSION,
        "name": patch.name,
        "mode": patch.mode,
        "fingerprint": patch.fingerprint,
        "tables": {name: {"rows": each.table_rows, "base": each.base_digest} for name, each in patch.tables.items()},
        "provenance": patch.provenance,
    }
    facts["sha256"] = _digest(facts, tensors)
    metadata = {"format": "pt", METADATA: json.dumps(facts, sort_keys=True, allow_nan=False)}
    return write_pieces(file, [save(tensors, metadata)])


def read_patch(file: str | Path) -> RowPatch:
    """Read a patch from a file, or from a folder that holds `patch.safetensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no patch.
    """
    path = Path(file) / PATCH_FILE if Path(file).is_dir() else Path(file)
    read_header(path)
    with safe_open(path, "pt") as opened:
        text, names = (opened.metadata() or {}).get(METADATA), list(opened.keys())
        tensors = {name: opened.get_tensor(name) for name in names}
    if text is None:
        raise ValueError(f"{path} is no row patch: its metadata has no {METADATA}. Write one with save_patch.")
    try:
        facts = json.loads(text)
        if not isinstance(facts, dict) or type(facts.get("version")) is not int:
            raise ValueError("it has no version")
        if facts["version"] > FORMAT_VERSION:
            raise ValueError(f"it is of version {facts['version']}, and this release reads {FORMAT_VERSION}; update it")
        if facts.pop("sha256", None) != _digest(facts, tensors):
            raise ValueError("its digest is another one than that of its content")
        tables = {
            name: PatchedRows(tensors[f"{name}.{ROW_IDS}"], tensors[f"{name}.{ROWS}"], each["rows"], each["base"])
            for name, each in facts["tables"].items()
        }
        patch = RowPatch(facts["name"], tables, facts["mode"], facts["fingerprint"], facts["provenance"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The patch {path} is damaged: {error}. Download or copy it again.") from error
    patch.check(f"The patch {path}")
    return patch


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_digest(table: PatchableTable, row_ids: torch.Tensor) -> str:
    """SHA-256 of the rows that a table itself has there, in hexadecimal, as they are stored."""
    rows = table.gather_rows(row_ids.to(table.home))
    return hashlib.sha256(rows.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


# The overlay.


class Layer:
    """What one patch says of one table. It does not change.

    A filter tells of nearly every lookup that it asks for no patched row. The others are searched for.
    """

    def __init__(self, patched: PatchedRows, mode: str, scale: float, first_row_ids: np.ndarray):
        """
        Args:
            patched: at least one row.
            mode, scale: of the patch.
            first_row_ids: as in `TablePatches`.
        """
        self.mode, self.scale = mode, scale
        self.row_ids, self.rows = patched.row_ids, patched.rows
        places = 1 << math.ceil(math.log2(len(self.row_ids) * PLACES_PER_ROW))
        self._mask = places - 1
        self._filter = np.zeros(places, dtype=np.bool_)
        self._known, self._first_row_ids = self.row_ids.numpy(), first_row_ids
        # One filter for all heads: a lookup asks for row ids of its head, and adding where heads begin takes as long as
        # all else.
        in_head = self._known - first_row_ids[first_row_ids.searchsorted(self._known, side="right") - 1]
        self._filter[in_head & self._mask] = True
        self._copies: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in host memory."""
        return self.row_ids.nbytes + self.rows.nbytes + self._filter.nbytes

    def fixed(self) -> "Layer | None":
        """The same, for a copy of the model; None where it has no rows."""
        return self

    def put(self, numbers: np.ndarray, rows: torch.Tensor) -> None:
        """Write patched rows over those of a lookup.

        Args:
            numbers: (..., heads) row ids of the lookup.
            rows: (..., heads * head_dim).
        """
        asked = np.flatnonzero(self._filter.take(numbers & self._mask))
        if not len(asked):
            return
        maybe = numbers.reshape(-1)[asked] + self._first_row_ids[asked % len(self._first_row_ids)]
        places = self._known.searchsorted(maybe)
        is_hit = self._known.take(places, mode="clip") == maybe
        if not is_hit.any():
            return
        hit, flat = torch.from_numpy(asked[is_hit]), rows.view(numbers.size, -1)
        given = self.rows[torch.from_numpy(places[is_hit])]
        is_plain = self.mode == REPLACE and self.scale == 1
        new = given.to(rows.dtype) if is_plain else patched_rows(flat[hit], given, self.mode, self.scale)
        if flat.requires_grad or new.requires_grad:
            flat.index_copy_(0, hit, new)
        else:
            put_rows(flat, hit, new, is_mapped=False)

    def lay_over_all(self, in_table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(..., heads) row ids of the table and (..., heads, head_dim) rows to the patched rows, without a look at what
        is hit. An accelerator would wait for that, and a graph cannot hold it."""
        row_ids, own = self._on(rows.device)
        is_hit, places = _find(in_table, row_ids)
        return torch.where(is_hit.unsqueeze(-1), patched_rows(rows, own[places], self.mode, self.scale), rows)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row ids and rows on a device."""
        found = self._copies.get(device)
        if found is None:
            found = self.row_ids.to(device), self.rows.to(device)
            can_stay = device.type != "meta" and not self.rows.requires_grad and not torch.compiler.is_compiling()
            if can_stay:
                self._copies[device] = found
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_copies": {}}


class TrainedRows(Layer):
    """A patch that is being trained: it grows by the rows that steps move, and the table is never written to."""

    def __init__(self, head_dim: int, dtype: torch.dtype, home: torch.device, first_row_ids: np.ndarray):
        """
        Args:
            head_dim, dtype: of the rows of the table.
            home: where the table's rows are gathered and updated.
            first_row_ids: as in `TablePatches`.
        """
        self.mode, self.scale, self._first_row_ids = REPLACE, 1.0, first_row_ids
        self.row_ids = torch.zeros(0, dtype=torch.int64, device=home)
        self.rows = torch.zeros(0, head_dim, dtype=dtype, device=home)
        # Made of the rows as they are, for lookups outside of training.
        self._fixed: Layer | None = None

    def clear(self) -> None:
        """Forget all rows."""
        self.row_ids, self.rows, self._fixed = self.row_ids[:0], self.rows[:0], None

    def read(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the rows that are known over those of the table, (n, head_dim), by their row ids, (n,)."""
        if len(self.row_ids):
            is_known, places = _find(row_ids, self.row_ids)
            rows[is_known] = self.rows[places[is_known]]

    def write(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep rows, (n, head_dim), by their row ids, (n,) ascending and distinct."""
        self._fixed = None
        if len(self.row_ids):
            is_known, places = _find(row_ids, self.row_ids)
            self.rows[places[is_known]] = rows[is_known]
            row_ids, rows = row_ids[~is_known], rows[~is_known]
        if len(row_ids):
            self.row_ids, order = torch.cat([self.row_ids, row_ids]).sort()
            self.rows = torch.cat([self.rows, rows])[order]

    def fixed(self) -> Layer | None:
        """The rows as they are now, as those of any patch; None where there are none."""
        if self._fixed is None and len(self.row_ids):
            patched = PatchedRows(self.row_ids.cpu().clone(), self.rows.cpu().clone(), 0)
            self._fixed = Layer(patched, self.mode, self.scale, self._first_row_ids)
        return self._fixed

    def put(self, numbers: np.ndarray, rows: torch.Tensor) -> None:
        if (fixed := self.fixed()) is not None:
            fixed.put(numbers, rows)

    def lay_over_all(self, in_table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        fixed = self.fixed()
        return rows if fixed is None else fixed.lay_over_all(in_table, rows)


def _find(in_table: torch.Tensor, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row id, of any shape, is among those of a patch, (n,), and where: both of the shape of the first."""
    places = torch.searchsorted(row_ids, in_table).clamp_max(len(row_ids) - 1)
    return row_ids[places] == in_table, places


def patched_rows(rows: torch.Tensor, given: torch.Tensor, mode: str, scale: float) -> torch.Tensor:
    """Rows of a table, (..., head_dim), under those of a patch, (..., head_dim); in the type of the former.

    Each patch is laid over rows that have the type of the table, so that merging one patch after the other gives the
    same bits.
    """
    if mode == REPLACE and scale == 1:
        return given.to(rows.dtype)
    wide = torch.promote_types(rows.dtype, torch.float32)
    current, given = rows.to(wide), given.to(wide)
    return (current + scale * (given if mode == ADD else given - current)).to(rows.dtype)


def is_traced(row_ids: torch.Tensor) -> bool:
    """Whether torch makes a graph of this call, by `torch.jit.trace`, `make_fx` or an export."""
    return type(row_ids) is not torch.Tensor or torch.jit.is_tracing() or get_proxy_mode() is not None


Names = tuple[str, ...]
Overlay = tuple[Layer, ...]
_COUNTING = threading.Lock()
# For tables that are asked with patches for each sequence: the names of the patches of each sequence of the batch.
_REQUESTS: ContextVar[Mapping["TablePatches", tuple[Names, ...]]] = ContextVar(
    "engram_patches", default=MappingProxyType({})
)


class TablePatches:
    """The patches that one table knows, and which of them are active.

    scales: name to scale, of all patches of the model, in the order in which they were added.
    active: names, in the order in which they are laid over the table.
    first_row_ids: (heads,) or (1,) int64, what makes row ids of the table out of those of a lookup.
    """

    def __init__(self, first_row_ids: torch.Tensor):
        self.scales: dict[str, float] = {}
        self.active: Names = ()
        self.first_row_ids = first_row_ids if first_row_ids.any() else first_row_ids[:1]
        self._first_on_cpu = self.first_row_ids.numpy()
        self._first_copies: dict[torch.device, torch.Tensor] = {}
        # Whether somebody, in whatever thread, asks with patches for each sequence.
        self.has_requests = False
        self._open_requests = 0
        # Name to what the patch says of this table. Patches of other tables have no entry.
        self._layers: dict[str, Layer] = {}
        # Of the active patches.
        self._overlay: Overlay = ()
        # Of the patch that training writes to; empty where the table itself is trained.
        self.trained_name = ""

    def add(self, name: str, patched: PatchedRows | None, mode: str, scale: float) -> None:
        """Know a patch from now on. None: it says nothing of this table."""
        self.scales[name] = scale
        if patched is not None and len(patched.row_ids):
            self._layers[name] = Layer(patched, mode, scale, self._first_on_cpu)

    def train(self, name: str, head_dim: int, dtype: torch.dtype, home: torch.device) -> None:
        """Know a patch without rows, which training gives it.

        Raises:
            ValueError: there is one of this name, or others lie over the table.
        """
        if name in self.scales or self.active:
            raise ValueError(
                f"A patch {name!r} is to be trained, and the model has the patches {', '.join(map(repr, self.scales))} "
                "already. Remove them first, or merge them into the tables."
            )
        self.scales[name] = 1.0
        self.trained_name = name
        self._layers[name] = TrainedRows(head_dim, dtype, home, self._first_on_cpu)
        self.activate((name,))

    @property
    def trained(self) -> "TrainedRows | None":
        """The patch that is being trained."""
        found = self._layers.get(self.trained_name) if self.trained_name else None
        return found if isinstance(found, TrainedRows) else None

    def remove(self, name: str) -> None:
        self.activate(tuple(each for each in self.active if each != name))
        del self.scales[name]
        self._layers.pop(name, None)

    def activate(self, names: Names) -> None:
        """Lay these patches over the table from now on."""
        self._overlay, self.active = self._overlay_of(names), names

    def _overlay_of(self, names: Names) -> Overlay:
        return tuple(self._layers[name] for name in names if name in self._layers)

    def hits(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Which of the row ids of a lookup, (..., heads), are patched by the active patches: bool, of this shape."""
        in_table = row_ids.cpu().long() + self.first_row_ids
        found = torch.zeros(in_table.shape, dtype=torch.bool)
        for layer in self._overlay:
            if (fixed := layer.fixed()) is not None:
                found |= torch.isin(in_table, fixed.row_ids)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that the patches of this table hold in host memory."""
        fixed = (layer.fixed() for layer in self._layers.values())
        return sum(layer.nbytes for layer in fixed if layer is not None)

    def lay_over(self, row_ids: torch.Tensor, rows: torch.Tensor, is_training: bool = False) -> torch.Tensor:
        """The rows of a lookup under the patches that are to be seen.

        Args:
            row_ids: (batch, ..., heads) of a lookup.
            rows: (batch, ..., heads * head_dim) as the lookup has found them. They may be written to.
            is_training: whether the model is in training mode.
        """
        if self.has_requests:
            return self._lay_over_each(row_ids, rows, is_training)
        return self._lay_over(self._overlay, row_ids, rows) if self._overlay else rows

    def _lay_over(self, overlay: Overlay, row_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if row_ids.device.type != "cpu" or torch.compiler.is_compiling() or is_traced(row_ids):
            in_table = row_ids.long() + self._first_on(row_ids.device)
            found = rows.view(*row_ids.shape, -1)
            for layer in overlay:
                found = layer.lay_over_all(in_table, found)
            return found.view(rows.shape)
        numbers = row_ids.numpy()
        for layer in overlay:
            layer.put(numbers, rows)
        return rows

    def _first_on(self, device: torch.device) -> torch.Tensor:
        found = self._first_copies.get(device)
        if found is None:
            found = self.first_row_ids.to(device)
            if device.type != "meta" and not torch.compiler.is_compiling():
                self._first_copies[device] = found
        return found

    def count_requests(self, more: int) -> None:
        """One more, or one less, context of `use_patches` is open."""
        with _COUNTING:
            self._open_requests += more
            self.has_requests = self._open_requests > 0

    @torch.compiler.disable
    def _lay_over_each(self, row_ids: torch.Tensor, rows: torch.Tensor, is_training: bool) -> torch.Tensor:
        requests = _REQUESTS.get().get(self)
        if requests is None:
            return self._lay_over(self._overlay, row_ids, rows) if self._overlay else rows
        if is_training and torch.is_grad_enabled():
            raise ValueError(
                "use_patches chooses patches for a batch of requests, and a forward that trains cannot use it: what a "
                "backward computes again would not know them. Train with set_patches(model, names), or call eval()."
            )
        batch, copies = row_ids.shape[0], row_ids.shape[0] // len(requests)
        if copies * len(requests) != batch:
            raise ValueError(
                f"use_patches got patches for {len(requests)} sequences, and the batch has {batch}. Give one name (or "
                "None) per sequence; beams and several returned sequences are counted for you."
            )
        for start, end, names in _runs(requests):
            overlay = self._overlay_of(names)
            if overlay:
                part = slice(start * copies, end * copies)
                before = rows[part]
                if (found := self._lay_over(overlay, row_ids[part], before)) is not before:
                    before.copy_(found)
        return rows

    def __deepcopy__(self, memo: dict) -> "TablePatches":
        return self._copy()

    def __reduce__(self):
        return _restore, (self.first_row_ids, dict(self.scales), self._fixed_layers(), self.active)

    def _copy(self) -> "TablePatches":
        return _restore(self.first_row_ids, dict(self.scales), self._fixed_layers(), self.active)

    def _fixed_layers(self) -> dict[str, Layer]:
        """For copies, which share the rows, since those of a patch do not change."""
        fixed = {name: layer.fixed() for name, layer in self._layers.items()}
        return {name: layer for name, layer in fixed.items() if layer is not None}


def _restore(first_row_ids: torch.Tensor, scales: dict, layers: dict, active: Names) -> TablePatches:
    made = TablePatches(first_row_ids)
    made.scales, made._layers = scales, layers
    made.activate(active)
    return made


def _runs(requests: Sequence[Names]) -> Iterator[tuple[int, int, Names]]:
    """Neighbours with the same patches together: first, end, names."""
    start = 0
    for end in range(1, len(requests) + 1):
        if end == len(requests) or requests[end] != requests[start]:
            yield start, end, requests[start]
            start = end


# Patches of all tables of a model together. `tables` are those of one model by their names inside the base model.

Tables = Mapping[str, PatchableTable]


def check_patch(patch: RowPatch, tables: Tables) -> None:
    """
    Raises:
        ValueError: the patch is not sound, or is one of other tables.
    """
    patch.check(f"The patch {patch.name!r}")
    for name, each in patch.tables.items():
        table = tables.get(name)
        if table is None:
            raise ValueError(
                f"The patch {patch.name!r} changes rows of {name}, and the model has no such table; it has "
                f"{', '.join(tables) or 'none'}. Use the patch with the model that it was made for."
            )
        if (each.table_rows, each.rows.shape[1]) != (table.num_rows, table.head_dim):
            raise ValueError(
                f"The patch {patch.name!r} was made for a {name} of {each.table_rows} rows of width "
                f"{each.rows.shape[1]}, and this one has {table.num_rows} of width {table.head_dim}. Use the patch "
                "with the model that it was made for."
            )


def add_patch(tables: Tables, patch: RowPatch, scale: float) -> None:
    """Make a patch that was checked known to all tables, and active behind those that are active.

    Raises:
        ValueError: there is one of this name; the scale is no number.
    """
    known = known_patches(tables)
    if patch.name in known:
        raise ValueError(
            f"The model has a patch {patch.name!r} already. Take it out with remove_patch(model, {patch.name!r}), or "
            "give the new one another name."
        )
    if not math.isfinite(scale):
        raise ValueError(f"The scale of a patch must be a finite number, got {scale}.")
    for name, table in tables.items():
        table.patches.add(patch.name, patch.tables.get(name), patch.mode, float(scale))
    set_patches(tables, [*active_patches(tables), patch.name])


def remove_patch(tables: Tables, name: str) -> None:
    """
    Raises:
        ValueError: there is no patch of this name.
    """
    refuse_unknown(tables, [name])
    for table in tables.values():
        table.patches.remove(name)


def set_patches(tables: Tables, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there is no patch of a name, or a name is there twice.
    """
    refuse_unknown(tables, names)
    for table in tables.values():
        table.patches.activate(tuple(names))


def refuse_unknown(tables: Tables, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there is no patch of a name, or a name is there twice.
    """
    known = known_patches(tables)
    if isinstance(names, str):
        raise ValueError(f"Patches are given as a list of names, got the text {names!r}. Write [{names!r}].")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"The model has no patch {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}. Add it with "
            "add_patch(model, patch)."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"Each patch can be laid over the tables once, got {list(names)}.")


def known_patches(tables: Tables) -> dict[str, float]:
    """Name to scale of the patches of a model, in the order in which they were added."""
    first = next(iter(tables.values()), None)
    return {} if first is None else dict(first.patches.scales)


def active_patches(tables: Tables) -> list[str]:
    """Names of the patches that lie over the tables, in their order."""
    first = next(iter(tables.values()), None)
    return [] if first is None else list(first.patches.active)


@contextmanager
def use_patches(tables: Tables, names: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """In this context, and in this thread, each sequence of a batch sees its own patches and no others.

    Args:
        tables: of a model.
        names: one per sequence: a name, a list of names in their order, or None for the plain table.

    Raises:
        ValueError: there is no patch of a name, or no sequence.
    """
    if isinstance(names, str) or not len(names):
        raise ValueError(f"use_patches takes one name or None per sequence of the batch, got {names!r}.")
    requests = tuple(() if each is None else (each,) if isinstance(each, str) else tuple(each) for each in names)
    for each in dict.fromkeys(requests):
        refuse_unknown(tables, each)
    asked = [table.patches for table in tables.values()]
    token = _REQUESTS.set({**_REQUESTS.get(), **dict.fromkeys(asked, requests)})
    for patches in asked:
        patches.count_requests(1)
    try:
        yield
    finally:
        for patches in asked:
            patches.count_requests(-1)
        _REQUESTS.reset(token)


@contextmanager
def disable_patches(tables: Tables) -> Iterator[None]:
    """In this context the tables are plain, in all threads but for requests with patches of their own."""
    before = active_patches(tables)
    patches = [table.patches for table in tables.values()]
    token = _REQUESTS.set({each: held for each, held in _REQUESTS.get().items() if each not in patches})
    set_patches(tables, [])
    try:
        yield
    finally:
        set_patches(tables, [name for name in before if name in known_patches(tables)])
        _REQUESTS.reset(token)

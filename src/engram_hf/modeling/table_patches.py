"""Row patches: changed rows of tables in a small file, and how they lie over a table on any tier.

The file holds, for each table:

* `<table>.patch.row_ids`, (n,) int64, ascending;
* `<table>.patch.rows`, (n, head_dim) float32 or bfloat16, new rows or what is added to the old ones.

Its metadata has one entry, "engram_patch": JSON with everything else, and a digest of all of it.

A lookup takes the table's own rows, and then those of the patches that are active. A patch never writes to a table. A
context of a thread may see other patches than those that are active, with some of its own for each sequence of a batch.
"""

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
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
LONGEST_NAME = 200
# In the provenance of a patch that a save of its model has written, and a later save may remove.
SAVED_WITH_MODEL = "saved_with_model"
# Bytes of a filter for each patched row.
PLACES_PER_ROW = 64
# A byte of a filter has a bit for each of so many heads. Eight of them are compared in one number.
HEADS_OF_BYTE = 8
BIT_OF_HEAD = bytes(1 << head for head in range(HEADS_OF_BYTE))
# An array, since numpy takes longer over a number.
ONE_BIT_EACH = np.frombuffer(BIT_OF_HEAD, dtype=np.uint64).reshape(())
# So many row ids are searched for faster one by one, and so many bytes compared faster as one number, than by numpy.
FEW_SUSPECTS = 5
FEW_BYTES = 512
ONE_BIT_OF_FEW = int.from_bytes(BIT_OF_HEAD * (FEW_BYTES // HEADS_OF_BYTE), "little")


class TableOfRows(Protocol):
    """What a digest of its rows needs of a table."""

    @property
    def home(self) -> torch.device: ...
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


@dataclass(eq=False, repr=False)
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

    def __repr__(self) -> str:
        sizes = f"{self.num_rows:,} rows of {len(self.tables)} tables, {self.mode}, {self.nbytes:,} bytes"
        return f"RowPatch({self.name!r}: {sizes})"

    def check(self, where: str, what_to_do: str = "Make it again.") -> None:
        """
        Args:
            where, what_to_do: the patch, and the way to a sound one, for messages.

        Raises:
            ValueError: a part is of another type or shape than it must be.
        """
        wrong = self._what_is_wrong()
        if wrong is not None:
            raise ValueError(f"{where} is no sound patch: {wrong}. {what_to_do}")

    def _what_is_wrong(self) -> str | None:
        if not is_patch_name(self.name):
            return f"its name must be printable text of at most {LONGEST_NAME} characters, got {self.name!r:.80}"
        if self.mode not in MODES:
            return f"its mode must be one of {', '.join(MODES)}, got {self.mode!r:.80}"
        if not isinstance(self.provenance, dict) or not isinstance(self.fingerprint, dict):
            return "fingerprint and provenance must be dicts"
        if not all(isinstance(part, str) for part in (*self.fingerprint, *self.fingerprint.values())):
            return "its fingerprint must map text to text"
        if (wrong := _what_json_cannot_hold(self.provenance)) is not None:
            return f"its provenance must be what JSON holds, such as text and numbers under names, and {wrong}"
        if not isinstance(self.tables, dict) or not all(isinstance(table, str) for table in self.tables):
            return f"its tables must be a dict of names to PatchedRows, got {type(self.tables).__name__}"
        for table, patched in self.tables.items():
            if not isinstance(patched, PatchedRows):
                return f"what it holds of {table} must be PatchedRows, got {type(patched).__name__}"
            row_ids, rows, table_rows, digest = patched
            if not isinstance(row_ids, torch.Tensor) or not isinstance(rows, torch.Tensor):
                names = f"{type(row_ids).__name__} and {type(rows).__name__}"
                return f"row_ids and rows of {table} must be tensors, got {names}"
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


def _what_json_cannot_hold(value: Any) -> str | None:
    """What is wrong with a value that is to be written as JSON, and to be read as it was; None where nothing is."""
    if isinstance(value, dict) and (wrong := [key for key in value if not isinstance(key, str)]):
        return f"one of its names is {wrong[0]!r:.80}"
    if isinstance(value, dict | list | tuple):
        inside = value.values() if isinstance(value, dict) else value
        return next((found for each in inside if (found := _what_json_cannot_hold(each)) is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"it has {value}"
    return None if value is None or isinstance(value, str | int | float) else f"it has a {type(value).__name__}"


def is_patch_name(name: object) -> bool:
    """Whether a patch may have this name."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME


def check_scale(scale: Any) -> None:
    """
    Raises:
        ValueError: a patch cannot be multiplied by it.
    """
    try:
        is_finite = isinstance(scale, int | float) and math.isfinite(scale)
    except OverflowError:
        is_finite = False
    if not is_finite:
        raise ValueError(f"The scale of a patch must be a finite number, got {scale!r:.80}.")


# The file.


def write_patch(patch: RowPatch, file: str | Path) -> str:
    """Write a patch to a file, and make the folder for it. What was there under this name stays if that fails.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        ValueError: the patch is not sound.
        OSError: no space or no permission.
    """
    patch.check(f"The patch {patch.name!r}")
    tensors: dict[str, torch.Tensor] = {}
    memory = set()
    for table, each in patch.tables.items():
        for end, given in ((ROW_IDS, each.row_ids), (ROWS, each.rows)):
            tensor = given.detach().cpu().contiguous()
            # safetensors refuses tensors that share memory, such as the same row ids for two tables.
            is_shared = tensor.untyped_storage().data_ptr() in memory
            tensors[f"{table}.{end}"] = tensor = tensor.clone() if is_shared else tensor
            memory.add(tensor.untyped_storage().data_ptr())
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
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    return write_pieces(file, [save(tensors, metadata)])


def read_patch(file: str | Path) -> RowPatch:
    """Read a patch from a file, or from a folder that holds `patch.safetensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of a later version, or holds no patch.
    """
    path = Path(file) / PATCH_FILE if Path(file).is_dir() else Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no patch {path}. Name its file, or the folder that holds {PATCH_FILE}.")
    read_header(path)
    with safe_open(path, "pt") as opened:
        facts, names = _facts_of(opened.metadata(), path), list(opened.keys())
        tensors = {name: opened.get_tensor(name) for name in names}
    try:
        if facts.pop("sha256", None) != _digest(facts, tensors):
            raise ValueError("its digest is another one than that of its content")
        tables = {
            name: PatchedRows(tensors[f"{name}.{ROW_IDS}"], tensors[f"{name}.{ROWS}"], each["rows"], each["base"])
            for name, each in facts["tables"].items()
        }
        patch = RowPatch(facts["name"], tables, facts["mode"], facts["fingerprint"], facts["provenance"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The patch {path} is damaged: {error}. Download or copy it again.") from error
    patch.check(f"The patch {path}", "Make it again, or copy its file again.")
    return patch


def _facts_of(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    """What the metadata of a file say of its patch.

    Raises:
        ValueError: they are damaged, of a later version, or not those of a patch.
    """
    text = (metadata or {}).get(METADATA)
    if text is None:
        raise ValueError(f"{path} is no row patch: its metadata has no {METADATA}. Write one with save_patch.")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The patch {path} is damaged: {error}. Download or copy it again.") from error
    if not isinstance(facts, dict) or type(facts.get("version")) is not int:
        raise ValueError(f"The patch {path} is damaged: it has no version. Download or copy it again.")
    if facts["version"] > FORMAT_VERSION:
        raise ValueError(
            f"The patch {path} is of version {facts['version']}, and this release reads versions up to "
            f"{FORMAT_VERSION}. Update engram-hf, or take the code of a later checkpoint."
        )
    return facts


def describe_patch_in(folder: Path) -> tuple[str, bool] | None:
    """Of the patch in a folder: its name, and whether a save of a model wrote it; None where none can be read."""
    path = folder / PATCH_FILE
    try:
        read_header(path)
        with safe_open(path, "pt") as opened:
            facts = _facts_of(opened.metadata(), path)
        return str(facts["name"]), SAVED_WITH_MODEL in facts["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_trained_patch(patch: RowPatch | None, folder: Path) -> None:
    """Write the patch that a model trains beside the model. Without one, remove what an earlier save has left."""
    if patch is not None:
        write_patch(replace(patch, provenance={**patch.provenance, SAVED_WITH_MODEL: True}), folder / PATCH_FILE)
    elif (found := describe_patch_in(folder)) is not None and found[1]:
        (folder / PATCH_FILE).unlink()


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_digest(table: TableOfRows, row_ids: torch.Tensor) -> str:
    """SHA-256 of the rows that a table itself has there, in hexadecimal, as they are stored."""
    rows = table.gather_rows(row_ids.to(table.home))
    return hashlib.sha256(rows.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


# Over a table.


class RowFilter:
    """Finds the few row ids of a lookup that may be patched, without searching for each of them.

    A row has the place that the last bits of its row id name, and the bit of its head there. The heads of a lookup
    stand side by side, so its place in the lookup says which bit counts. With 8, 16, ... heads, eight neighbours have a
    bit each. With other numbers some share bits.
    """

    def __init__(self, in_head: np.ndarray, heads: np.ndarray, num_heads: int):
        """
        Args:
            in_head: (n,) row ids of their head.
            heads: (n,) their heads.
            num_heads: of the table.
        """
        places = 1 << math.ceil(math.log2(max(1, len(in_head)) * PLACES_PER_ROW))
        self._mask, self._bits = np.array(places - 1), np.zeros(places, dtype=np.uint8)
        # Among eight neighbours of a lookup, a head stands at every so-manieth place.
        period = math.gcd(num_heads, HEADS_OF_BYTE)
        bits = [sum(1 << place for place in range(head, HEADS_OF_BYTE, period)) for head in range(period)]
        np.bitwise_or.at(self._bits, in_head & self._mask, np.array(bits, dtype=np.uint8)[heads % period])

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """Where row ids of a lookup, (..., heads), may be patched: (m,) ascending, in the flattened lookup."""
        found = self._bits.take(np.bitwise_and(numbers, self._mask)).reshape(-1)
        if found.size <= FEW_BYTES and not int.from_bytes(found.tobytes(), "little") & ONE_BIT_OF_FEW:
            return NOWHERE
        if not found.size % HEADS_OF_BYTE:
            eights = found.view(np.uint64)
            np.bitwise_and(eights, ONE_BIT_EACH, out=eights)
        return NOWHERE if found.tobytes() == bytes(found.size) else found.astype(bool).nonzero()[0]


NOWHERE = np.zeros(0, dtype=np.int64)


def heads_of_rows(row_ids: np.ndarray, first_row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) row ids of a table to their heads, and to row ids of these heads."""
    heads = first_row_ids.searchsorted(row_ids, side="right") - 1
    return heads, row_ids - first_row_ids[heads]


class Layer:
    """What one patch says of one table. It does not change."""

    def __init__(self, name: str, patched: PatchedRows, mode: str, scale: float, first_row_ids: np.ndarray):
        """
        Args:
            name, mode, scale: of the patch.
            patched: its rows.
            first_row_ids: as in `TablePatches`.
        """
        self.name, self.mode, self.scale = name, mode, scale
        self.row_ids, self.rows = patched.row_ids, patched.rows
        self._known, self._first_row_ids = self.row_ids.numpy(), first_row_ids
        heads, in_head = heads_of_rows(self._known, first_row_ids)
        self._filter = RowFilter(in_head, heads, len(first_row_ids))
        self._copies: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def fixed(self) -> "Layer":
        """Itself: it does not change."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in host memory."""
        return self.row_ids.nbytes + self.rows.nbytes + self._filter.nbytes

    def put(self, numbers: np.ndarray, rows: torch.Tensor) -> None:
        """Write patched rows over those of a lookup.

        Args:
            numbers: (..., heads) row ids of the lookup.
            rows: (..., heads * head_dim).
        """
        asked = self._filter.find(numbers)
        if len(asked) <= FEW_SUSPECTS and not any(self._knows(numbers, place) for place in asked.tolist()):
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

    def _knows(self, numbers: np.ndarray, place: int) -> bool:
        """Whether the row id at a place of a flattened lookup is patched."""
        row_id = numbers.item(place) + self._first_row_ids.item(place % len(self._first_row_ids))
        at = int(self._known.searchsorted(row_id))
        return at < len(self._known) and self._known.item(at) == row_id

    def lay_over_all(self, in_table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(..., heads) row ids of the table and (..., heads, head_dim) rows to the patched rows, without a look at what
        is hit. An accelerator would wait for that, and a graph cannot hold it."""
        row_ids, own = self._on(rows.device)
        if not len(row_ids):
            return rows
        is_hit, places = find_rows_among(row_ids, in_table)
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

    def __deepcopy__(self, memo: dict) -> "Layer":
        """Copies of a model share rows that do not change. Rows that are trained become rows of their own."""
        if not self.rows.requires_grad:
            return self
        patched = PatchedRows(self.row_ids, self.rows.detach().clone().requires_grad_(), 0)
        return Layer(self.name, patched, self.mode, self.scale, self._first_row_ids)

    def __reduce__(self):
        patched = PatchedRows(self.row_ids, self.rows, 0)
        return Layer, (self.name, patched, self.mode, self.scale, self._first_row_ids)


class Overlaid(Protocol):
    """What lies over a table: a layer, or rows that training changes."""

    name: str

    @property
    def nbytes(self) -> int: ...
    def put(self, numbers: np.ndarray, rows: torch.Tensor) -> None: ...
    def lay_over_all(self, in_table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor: ...
    def fixed(self) -> Layer:
        """As it is now. Later steps do not change it."""


class RowsInTraining(Overlaid, Protocol):
    """Rows of a patch that training changes; the table is never written to."""

    def read(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the rows that are known over those of the table, (n, head_dim), by their row ids, (n,)."""

    def write(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep rows, (n, head_dim), by their row ids, (n,) ascending and distinct."""

    def clear(self) -> None:
        """Forget all rows."""


def find_rows_among(row_ids: torch.Tensor, in_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row id, of any shape, is among those of a patch, (n,) ascending, and where.

    Both are of the shape of `in_table`.
    """
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


def numbers_of(row_ids: torch.Tensor) -> np.ndarray | None:
    """The row ids of a lookup, to look at; None on an accelerator, which would be waited for, and where torch makes a
    graph."""
    if torch.compiler.is_compiling() or not row_ids.is_cpu or is_traced(row_ids):
        return None
    return row_ids.numpy()


Names = tuple[str, ...]
Overlay = tuple[Overlaid, ...]


class TablePatches:
    """What patches say of one table, and what of it is to be seen. Their names and order are in `ModelPatches`.

    layers: name to what the patch says. Patches of other tables have no entry.
    overlay: of the active patches.
    trained: rows that training changes; None where the table itself is trained.
    first_row_ids: (heads,) or (1,) int64, what makes row ids of the table out of those of a lookup.
    """

    def __init__(self, first_row_ids: torch.Tensor):
        self.first_row_ids = first_row_ids if first_row_ids.any() else first_row_ids[:1]
        self.first_on_cpu = self.first_row_ids.numpy()
        self._first_copies: dict[torch.device, torch.Tensor] = {}
        self.layers: dict[str, Overlaid] = {}
        self.overlay: Overlay = ()
        self.trained: RowsInTraining | None = None

    def add(self, name: str, patched: PatchedRows, mode: str, scale: float) -> None:
        """Know a patch from now on."""
        self.layers[name] = Layer(name, patched, mode, scale, self.first_on_cpu)

    def begin_training(self, rows: RowsInTraining) -> None:
        """Have training change these rows, and never the table."""
        self.layers[rows.name] = self.trained = rows

    def end_training(self) -> None:
        """From now on, the patch that was trained is one as any other."""
        if self.trained is not None:
            self.layers[self.trained.name], self.trained = self.trained.fixed(), None

    def forget(self, name: str) -> None:
        """Know a patch no more."""
        if self.trained is not None and self.trained.name == name:
            self.trained = None
        self.layers.pop(name, None)

    def overlay_of(self, names: Names) -> Overlay:
        """What these patches say of the table."""
        return tuple(self.layers[name] for name in names if name in self.layers)

    def hits(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Which of the row ids of a lookup, (..., heads), are patched in what this context sees: bool, as large."""
        in_table = row_ids.cpu().long() + self.first_row_ids
        found = torch.zeros(in_table.shape, dtype=torch.bool)
        asked = asked_of(self)
        runs = [(0, len(in_table), self.overlay)] if asked is None else _runs(asked)
        for start, end, overlay in runs:
            for layer in overlay:
                found[start:end] |= torch.isin(in_table[start:end], layer.fixed().row_ids)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that the patches of this table hold in host memory."""
        return sum(layer.nbytes for layer in self.layers.values())

    def lay_over(self, row_ids: torch.Tensor, rows: torch.Tensor, numbers: np.ndarray | None) -> torch.Tensor:
        """The rows of a lookup under the patches that are to be seen.

        Args:
            row_ids: (batch, ..., heads) of a lookup.
            rows: (batch, ..., heads * head_dim) as the lookup has found them. They may be written to.
            numbers: as `numbers_of` gives them for these row ids.

        Returns:
            the rows, in their type; in float32 where patches lie over FP8 rows, which are not rounded to FP8.
        """
        if has_requests():
            return self._lay_over_each(row_ids, rows)
        overlay = self.overlay
        if not overlay:
            return rows
        return self._lay_over(overlay, row_ids, widened(rows), numbers)

    def _lay_over(
        self, overlay: Overlay, row_ids: torch.Tensor, rows: torch.Tensor, numbers: np.ndarray | None
    ) -> torch.Tensor:
        if numbers is None:
            in_table = row_ids.long() + self._first_on(row_ids.device)
            # A view with -1 could not be of no rows.
            found = rows.unflatten(-1, (row_ids.shape[-1], -1))  # (..., heads, head_dim)
            for layer in overlay:
                found = layer.lay_over_all(in_table, found)
            return found.view(rows.shape)
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

    @torch.compiler.disable
    def _lay_over_each(self, row_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        overlays, numbers = asked_of(self), numbers_of(row_ids)
        if overlays is None:
            return self._lay_over(self.overlay, row_ids, widened(rows), numbers) if self.overlay else rows
        batch, copies = row_ids.shape[0], copies_of_sequence()
        if overlays and batch != len(overlays) * copies:
            beams = f", each {copies} times for beams or several returned sequences" if copies > 1 else ""
            raise ValueError(
                f"use_patches got patches for {len(overlays)} sequences{beams}, and the batch has {batch}. Give one "
                "name (or None) per sequence; generate counts beams and several returned sequences for you."
            )
        if any(overlays):
            rows = widened(rows)
        for start, end, overlay in _runs(overlays):
            if overlay:
                part = slice(start * copies, end * copies)
                before = rows[part]
                own = None if numbers is None else numbers[part]
                if (found := self._lay_over(overlay, row_ids[part], before, own)) is not before:
                    before.copy_(found)
        return rows

    def refuse_to_train_rows(self) -> None:
        """
        Raises:
            ValueError: rows are trained that a forward would not read, because patches lie over them.
        """
        own = self.trained
        is_read = len(self.overlay) == 0 if own is None else len(self.overlay) == 1 and self.overlay[0] is own
        if has_requests() or not is_read:
            self._refuse_to_train_rows(is_read)

    @torch.compiler.disable
    def _refuse_to_train_rows(self, is_read: bool) -> None:
        overlays = asked_of(self)
        if overlays == () and self.trained is None or overlays is None and is_read:
            return
        asked = overlays if overlays is not None else (self.overlay,)
        names = dict.fromkeys(layer.name for overlay in asked for layer in overlay)
        what = "this table" if self.trained is None else f"the patch {self.trained.name!r}"
        alone = [] if self.trained is None else [self.trained.name]
        raise ValueError(
            f"Rows of {what} are being trained, and the patches that lie over the table are "
            f"{', '.join(names) or 'none'}, so what is learned would not be read. Choose before, outside of "
            f"use_patches and disable_patches: set_patches(model, {alone}). To keep what other patches say, make them "
            "part of the table first, with merge_patch."
        )

    def refuse_to_train_requests(self) -> None:
        """
        Raises:
            ValueError: this context has chosen other patches than those that are active.
        """
        if has_requests():
            self._refuse_to_train_requests()

    @torch.compiler.disable
    def _refuse_to_train_requests(self) -> None:
        overlays = asked_of(self)
        if overlays is not None and any(overlay != self.overlay for overlay in overlays or ((),)):
            raise ValueError(
                "use_patches and disable_patches choose patches for requests, and a forward that trains cannot use "
                "them: what a backward computes again would not know them. Train with set_patches(model, names), or "
                "call eval()."
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "trained": None, "_first_copies": {}}


def widened(rows: torch.Tensor) -> torch.Tensor:
    """Rows in a type that one can calculate with, and that holds rows of patches."""
    return rows.float() if rows.dtype.itemsize == 1 else rows


def _runs(overlays: Sequence[Overlay]) -> Iterator[tuple[int, int, Overlay]]:
    """Neighbours with the same patches together: first, end, what they see."""
    start = 0
    for end in range(1, len(overlays) + 1):
        if end == len(overlays) or overlays[end] != overlays[start]:
            yield start, end, overlays[start]
            start = end


# Which patches a request sees.

# What this context has asked to see, the latest last: for the patches of a table one overlay per sequence of a batch,
# for those of a model the names. An empty tuple is the plain table, whatever the batch.
_REQUESTS: ContextVar[tuple[Mapping[Any, tuple], ...]] = ContextVar("engram_patches", default=())
# How often `generate` repeats each sequence of a batch, for beams and for several sequences that it returns.
_COPIES: ContextVar[int] = ContextVar("engram_copies", default=1)


class _OfThread(threading.local):
    """open: contexts with patches of their own that this thread has open. A graph reads it, and no context variable."""

    def __init__(self) -> None:
        # Of the instance, in each thread: a graph does not notice where an attribute hides one of the class.
        self.open = 0


_OF_THREAD = _OfThread()


def has_requests() -> bool:
    """Whether patches are chosen for this context."""
    return _OF_THREAD.open > 0 if torch.compiler.is_compiling() else len(_REQUESTS.get()) > 0


def asked_of(patches: Any) -> tuple | None:
    """What this context asks to see of a table or of a model; None for what is active."""
    return next((each[patches] for each in reversed(_REQUESTS.get()) if patches in each), None)


@contextmanager
def asking(requests: Mapping[Any, tuple]) -> Iterator[None]:
    """In this context these are to be seen. Contexts may end in any order."""
    _REQUESTS.set((*_REQUESTS.get(), requests))
    _OF_THREAD.open += 1
    try:
        yield
    finally:
        _OF_THREAD.open -= 1
        _REQUESTS.set(tuple(each for each in _REQUESTS.get() if each is not requests))


@contextmanager
def generating() -> Iterator[None]:
    """In this context, `count_copies` says how often sequences are repeated."""
    token = _COPIES.set(1)
    try:
        # Requests that have come from another thread, in a copy of its context, are told to graphs of this one.
        with asking({}) if len(_REQUESTS.get()) else nullcontext():
            yield
    finally:
        _COPIES.reset(token)


def count_copies(copies: int) -> None:
    """From now on, in this call of `generate`, each sequence stands `copies` times in a batch, one beside the other."""
    _COPIES.set(copies)


def copies_of_sequence() -> int:
    """How often each sequence stands in a batch of this call of `generate`."""
    return _COPIES.get()

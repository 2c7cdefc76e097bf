"""The file of a row patch: changed rows of tables, as a small safetensors file.

It holds, for each table:

* `<table>.patch.row_ids`, (n,) int64, ascending;
* `<table>.patch.rows`, (n, head_dim) float32 or bfloat16, new rows or what is added to the old ones.

Its metadata has one entry, "engram_patch": JSON with everything else, and a digest of all of it. How a patch lies over
a table is in table_overlay.py.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save

from .disk_safetensors import read_header, write_pieces


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
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"The scale of a patch must be a finite number, got {scale!r:.80}.")


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

"""Checkpoints on their way in: the files of a checkpoint, what of them is refused, and the tensors of the tables.

Holds no model code: it is given names, shapes and folders. transformers loads the backbone; tables are only opened.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import cached_file, logging
from transformers.utils.hub import cached_files, extract_commit_hash

from .disk_files import BlockSource, TableFile
from .disk_safetensors import (
    TensorPlace,
    file_digest,
    read_header,
    read_index,
    read_weight_map,
)
from .table import EngramTable
from .table_blocks import BLOCK_KEY, CHANGED_KEY, parse_block_name, parse_changed_name
from .table_changes import ChangedRows
from .table_formats import QUANTIZED_FORMATS


HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# In the cache's folder of a repository, beside huggingface_hub's own `.no_exist`.
NOTES_FOLDER = ".engram_sound"
# Files below this size are read too fast to need a progress bar.
PROGRESS_BYTES = 2**26
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MEMORY_NAMES = (".engram.", "token_map")


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model on this machine.

    where: folder or repository, as the user named it.
    file_of: tensor name to file.
    metadata: of the index; empty where there is none.
    commit: of the repository; None for a folder.
    """

    where: str
    file_of: Mapping[str, Path]
    metadata: Mapping = field(default_factory=dict)
    commit: str | None = None

    def blocks(self) -> dict[tuple[str, int], str]:
        """(name of the table as its tensors have it, number of the block) to tensor name."""
        parsed = ((name, parse_block_name(name)) for name in self.file_of)
        return {(block.table, block.number): name for name, block in parsed if block is not None}


def find_checkpoint(
    name, arguments: Mapping, is_wanted: Callable[[str], bool] = lambda name: True
) -> Checkpoint | None:
    """The safetensors files of a folder or a repository, downloaded where they are not here.

    Args:
        name: folder or repository.
        arguments: those of `from_pretrained`, of which the Hub's and `variant` matter.
        is_wanted: whether a tensor is to be had; files without such a tensor are not looked at.

    Returns:
        None where there are none: an adapter, or weights in another format.

    Raises:
        FileNotFoundError, ValueError: the index is damaged, or names files that are not there or lie elsewhere.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    where, variant = str(name), arguments.get("variant")
    single = find_file(name, with_variant(SINGLE_FILE, variant), hub)
    if single is not None:
        tensors = filter(is_wanted, read_header(single))
        return Checkpoint(where, dict.fromkeys(tensors, single), commit=commit_of(name, single))
    index = find_file(name, with_variant(INDEX_FILE, variant), hub)
    if index is None:
        return None
    weight_map = {tensor: file for tensor, file in read_weight_map(index).items() if is_wanted(tensor)}
    metadata, commit = read_index(index).get("metadata") or {}, commit_of(name, index)
    if Path(where).is_dir():
        # Not looked for on the Hub: a file that is missing here has a message of its own.
        path_of = {filename: index.parent / filename for filename in weight_map.values()}
    else:
        # All of one commit, also where the branch moves on meanwhile.
        at_commit = hub if commit is None else {**hub, "revision": commit}
        path_of = download_files(name, {*weight_map.values()}, metadata.get("sha256") or {}, at_commit)
    return Checkpoint(where, {tensor: path_of[file] for tensor, file in weight_map.items()}, metadata, commit)


def read_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 by file name, as the checkpoint in a folder gives them; empty where it gives none."""
    folder = Path(folder)
    digests: dict[str, str] = {}
    for path in folder.glob("model.safetensors.index*.json"):
        digests |= (read_index(path).get("metadata") or {}).get("sha256") or {}
    return digests


def with_variant(filename: str, variant: str | None) -> str:
    """transformers' name of a weight file: the variant stands before the last suffix."""
    if variant is None:
        return filename
    stem, _, suffix = filename.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def read_headers(checkpoint: Checkpoint) -> dict[str, TensorPlace]:
    """Where each tensor lies in its file.

    Raises:
        FileNotFoundError, ValueError: a file is missing, truncated, or lacks a tensor that the index promises.
    """
    headers = {path: read_header(path) for path in sorted(set(checkpoint.file_of.values()))}
    lacking = [(name, path) for name, path in checkpoint.file_of.items() if name not in headers[path]]
    if lacking:
        raise ValueError(
            f"The index of {checkpoint.where} promises {lacking[0][0]} in {lacking[0][1].name}, which does not hold it "
            f"({len(lacking)} such tensors). Index and files are of two checkpoints; download it again."
        )
    return {name: headers[path][name] for name, path in checkpoint.file_of.items()}


def refuse_integers(places: Mapping[str, TensorPlace], where: str) -> None:
    """
    Raises:
        ValueError: a tensor of the backbone or of a memory layer holds integers, which would load as wrong numbers.
    """
    for name, place in places.items():
        is_float = place.dtype is not None and place.dtype.is_floating_point
        is_of_table = BLOCK_KEY.match(name) is not None or CHANGED_KEY.match(name) is not None
        if not is_float and not name.endswith("token_map") and not is_of_table:
            raise ValueError(
                f"{name} of {where} is {str(place.dtype).removeprefix('torch.')}, and must be of a floating type. The "
                "checkpoint is damaged or quantized by a tool that left no quantization_config; load the original."
            )


def match_blocks(
    tables: Mapping[str, EngramTable], checkpoint: Checkpoint, places: Mapping[str, TensorPlace], config
) -> dict[str, list[str]]:
    """The tensor of each block of each table; all of them are there, in their shape and type.

    Args:
        tables: by name inside the base model, without blocks yet.
        checkpoint, places: where tensors are.
        config: of the model.

    Raises:
        ValueError: names what is missing, misshapen, of another type, or too much.
    """
    found = {(name_inside(table, tables), i): tensor for (table, i), tensor in checkpoint.blocks().items()}
    where = checkpoint.where
    wanted = {(name, block.number): block.shape for name, table in tables.items() for block in table.block_records}
    missing = [f"{name}.blocks.{i}" for name, i in wanted if (name, i) not in found]
    if missing:
        refuse_missing(missing, where)
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise ValueError(
            f"{where} holds {len(extra)} blocks that the config has no place for, such as {found[extra[0]]}. Load it "
            "with the engram_* fields that it was saved with."
        )
    wrong = [
        f"{found[key]} is {places[found[key]].shape}, needs {shape}"
        for key, shape in wanted.items()
        if places[found[key]].shape != shape
    ]
    if wrong:
        refuse_shapes(wrong, where, config.engram_table_dtype)
    for key in wanted:
        check_block_type(found[key], places[found[key]].dtype, config.engram_table_dtype, where)
    return {name: [found[name, i] for i in range(len(table.block_records))] for name, table in tables.items()}


def check_block_type(name: str, dtype: torch.dtype | None, declared: str | None, where: str) -> None:
    """
    Raises:
        ValueError: a block is of another type than the config declares, or of none that a table can have.
    """
    got = str(dtype).removeprefix("torch.")
    expected = "uint8" if declared in QUANTIZED_FORMATS else declared
    if expected is None and dtype is not None and dtype.is_floating_point or got == expected:
        return
    raise ValueError(
        f"{name} of {where} is {got}, and must be {expected or 'of a floating type'} (engram_table_dtype is "
        f"{declared!r}). Config and files are of two checkpoints; load them from one."
    )


def refuse_missing(names: Iterable[str], where: str) -> None:
    """Raise for tensors of the memory that a checkpoint lacks."""
    names = sorted(names)
    raise ValueError(
        f"{where} lacks {len(names)} tensors of the memory: {', '.join(names[:8])}"
        f"{', ...' if len(names) > 8 else ''}. Download it again, load it with the config it was saved with, or name "
        "the folder or repository of its tables with tables_from=; to add a memory to a model without one, build the "
        "new model from its config and copy the weights over."
    )


def refuse_shapes(descriptions: list[str], where: str, row_format: str | None = None) -> None:
    """Raise for tensors of the memory that have another shape."""
    quantized = ""
    if row_format in QUANTIZED_FORMATS:
        quantized = f" A row of {row_format} is its numbers and their scales; rows without scales mean nothing."
    raise ValueError(
        f"{where} holds a memory of another shape: {'; '.join(descriptions[:8])}.{quantized} Rows cannot be cut or "
        "padded; load the checkpoint with the engram_* fields and hc_mult that it was saved with."
    )


def refuse_incomplete(loading_info: dict, where: str, base_prefix: str, is_same_class: bool) -> None:
    """Raise where a checkpoint lacks a tensor, or has one of the memory in another shape.

    transformers would draw such tensors at random and say so in a notice. Only the head of another task may be new.

    Args:
        loading_info: as `from_pretrained(output_loading_info=True)` gives it.
        where: the folder or repository, for the message.
        base_prefix: what the names of the base model begin with, "" for the base model itself.
        is_same_class: whether the checkpoint was saved from this very class, so that it has all of it.

    Raises:
        ValueError: names the tensors.
    """
    missing = set(loading_info["missing_keys"])
    memory = [name for name in missing if any(part in name for part in MEMORY_NAMES)]
    if memory:
        refuse_missing(memory, where)
    backbone = sorted(name for name in missing if is_same_class or name.startswith(base_prefix))
    if backbone:
        raise ValueError(
            f"{where} lacks {len(backbone)} tensors of the model: {', '.join(backbone[:8])}"
            f"{', ...' if len(backbone) > 8 else ''}. Download it again, or load it with the config it was saved with."
        )
    # Blocks are opened later, and are not among these.
    unused = sorted(n for n in loading_info["unexpected_keys"] if any(part in n for part in MEMORY_NAMES))
    unused = [name for name in unused if BLOCK_KEY.match(name) is None and CHANGED_KEY.match(name) is None]
    if unused:
        raise ValueError(
            f"{where} holds tensors of a memory that this config has no place for: {', '.join(unused[:8])}. Load it "
            "with the config it was saved with."
        )
    wrong = [
        f"{name} is {tuple(got)}, needs {tuple(needed)}"
        for name, got, needed in loading_info["mismatched_keys"]
        if any(part in name for part in MEMORY_NAMES)
    ]
    if wrong:
        refuse_shapes(wrong, where)


def open_sources(checkpoint: Checkpoint, tensors: Mapping[str, list[str]]) -> dict[str, list[BlockSource]]:
    """Open the files of tables, each once.

    Args:
        checkpoint: where they are.
        tensors: as `match_blocks` gives them.
    """
    files = {path: TableFile(path) for path in {checkpoint.file_of[n] for names in tensors.values() for n in names}}
    return {
        table: [BlockSource(files[checkpoint.file_of[name]], name) for name in names]
        for table, names in tensors.items()
    }


def name_inside(table: str, tables: Iterable[str]) -> str:
    """The name that a table of a checkpoint has among those of a base model; the same name where it has none.

    Args:
        table: as its tensors have it, with the prefix of the base model or without it.
        tables: names inside the base model.
    """
    return next((name for name in tables if table == name or table.endswith(f".{name}")), table)


def open_changes(table_name: str, checkpoint: Checkpoint) -> ChangedRows | None:
    """The changed rows that a training checkpoint holds beside the blocks of a table; None where there are none.

    Args:
        table_name: with or without the prefix of the base model.
        checkpoint: where they are.

    Raises:
        ValueError: a part is missing or damaged.
    """
    parsed = ((tensor, parse_changed_name(tensor)) for tensor in checkpoint.file_of)
    names = {p[1]: tensor for tensor, p in parsed if p is not None and name_inside(p[0], [table_name]) == table_name}
    if not names:
        return None
    files = {path: TableFile(path) for path in {checkpoint.file_of[tensor] for tensor in names.values()}}
    parts = {part: files[checkpoint.file_of[tensor]].tensor(tensor) for part, tensor in names.items()}
    return ChangedRows.from_tensors(parts, table_name, checkpoint.where)


def find_file(name: str | Path, filename: str, hub: Mapping) -> Path | None:
    """A file of a folder or repository on this machine, downloaded where it is not here; None where there is none.

    Args:
        name: folder or repository.
        hub: those of `HUB_ARGUMENTS` that are given.
    """
    path = cached_file(
        name,
        filename,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def commit_of(name: str | Path, path: Path) -> str | None:
    """The commit that a file of the Hub's cache belongs to; None for a file of a folder."""
    return None if Path(name).is_dir() else extract_commit_hash(str(path), None)


def download_files(
    name: str | Path, filenames: Iterable[str], promised: Mapping[str, str], hub: Mapping
) -> dict[str, Path]:
    """Files of a repository by name. Each is read once after it has come, and is what its index promises.

    Args:
        name: repository.
        filenames: of the files.
        promised: file name to SHA-256; a file without one is not compared.
        hub: those of `HUB_ARGUMENTS` that are given.

    Raises:
        ValueError: a file is another one than the index promises; it is then removed from the cache.
        OSError: as transformers raises it, where a file cannot be had.
    """
    filenames = sorted(filenames)
    if not filenames:
        return {}
    found = cached_files(name, filenames, **hub) or []
    paths = {filename: Path(path) for filename, path in zip(filenames, found, strict=True)}
    to_read = [f for f in filenames if f in promised and not _was_found_sound(paths[f], promised[f])]
    total = sum(paths[filename].stat().st_size for filename in to_read)
    wrong = []
    with logging.tqdm(
        total=total, desc="Checking downloads", unit="B", unit_scale=True, disable=total < PROGRESS_BYTES
    ) as progress:
        for filename in to_read:
            if file_digest(paths[filename], progress.update) == promised[filename]:
                _note_as_sound(paths[filename], promised[filename])
            else:
                wrong.append(filename)
                # The cache holds a link to the file itself.
                paths[filename].resolve().unlink(missing_ok=True)
                paths[filename].unlink(missing_ok=True)
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(to_read)} files that were downloaded from {name} are not what its index promises: "
            f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}. They have been removed from the cache; load "
            "again. Where that does not help, the repository itself is damaged, and another revision may be sound."
        )
    return paths


def _note_of(path: Path, digest: str) -> Path | None:
    """Where it is noted that a file of the Hub's cache was read and found sound: in the folder of its repository."""
    snapshots = next((parent for parent in path.parents if parent.name == "snapshots"), None)
    return None if snapshots is None else snapshots.parent / NOTES_FOLDER / digest


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _was_found_sound(path: Path, digest: str) -> bool:
    """Whether a file was compared since it has come; True where that cannot be noted, in a cache of others."""
    note = _note_of(path, digest)
    if note is None or not os.access(note.parent if note.parent.exists() else note.parent.parent, os.W_OK):
        return True
    return note.is_file() and note.read_text() == _stamp(path)


def _note_as_sound(path: Path, digest: str) -> None:
    note = _note_of(path, digest)
    if note is not None:
        note.parent.mkdir(exist_ok=True)
        note.write_text(_stamp(path))

"""A folder of weights that is replaced in one step, and the code that is saved beside the weights.

Everything is written beside the old checkpoint, and takes its place by renaming: new files have names that the folder
does not have yet, and the one file that names them is replaced when all of them are on the disk. A reader finds the old
weights or the new ones, never a mixture.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .checkpoint_loading import BLOCK_KEY, INDEX_FILE, SINGLE_FILE, read_digests, with_variant
from .configuration_engram_moe import AUTO_MAP
from .disk_safetensors import file_digest, read_header, read_index, sync_folder, write_pieces


CODE_FILES = (
    "checkpoint_loading.py",
    "checkpoint_saving.py",
    "configuration_checks.py",
    "configuration_engram_moe.py",
    "disk_files.py",
    "disk_reading.py",
    "disk_safetensors.py",
    "engram_binding.py",
    "engram_outputs.py",
    "engram_refusals.py",
    "engram_saving.py",
    "hot_rows.py",
    "ids_hashing.py",
    "ids_reach.py",
    "ids_recovery.py",
    "memory_layer.py",
    "memory_model.py",
    "modeling_engram_moe.py",
    "table.py",
    "table_changes.py",
    "table_formats.py",
    "table_gradients.py",
    "table_placement.py",
    "table_rows.py",
)
STAGE_PREFIX = ".saving-"
# Files that a save of this package or of transformers leaves, and a later one may remove.
WEIGHT_FILE = re.compile(
    r"(model(\.[^.-]+)?(-\d{5}-of-\d{5})?|tables-layer-\d+-\d{5}-of-\d{5}|rows-layer-\d+)(\.\d+)?\.safetensors"
)


def save_code(folder: str | Path) -> None:
    """Copy the modeling files into a checkpoint's folder."""
    source = Path(__file__).parent
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in CODE_FILES:
        shutil.copyfile(source / name, Path(folder) / name)


def remove_code(folder: str | Path) -> None:
    """Take modeling files and `auto_map` out of a checkpoint: transformers copies what a remote model came with."""
    for name in CODE_FILES:
        (Path(folder) / name).unlink(missing_ok=True)
    path = Path(folder) / "config.json"
    if path.exists() and "auto_map" in (config := json.loads(path.read_text())):
        del config["auto_map"]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def set_auto_map(config, with_code: bool) -> None:
    """Name all classes for `trust_remote_code`, or none: a map without its files would break the checkpoint."""
    if with_code:
        config.auto_map = dict(AUTO_MAP)
    elif getattr(config, "auto_map", None) is not None:
        del config.auto_map


@contextmanager
def staging(folder: str | Path) -> Iterator[Path]:
    """A folder inside `folder` to write in, gone afterwards; what an interrupted save has left there is removed.

    Whose stage it is says a lock on it, which ends with its process, also where process numbers are given again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{STAGE_PREFIX}*-*"):
        with _locked(left) as is_ours:
            if is_ours:
                shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=f"{STAGE_PREFIX}{os.getpid()}-", dir=folder))
    try:
        with _locked(stage):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; False where another process does, or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except OSError:
        is_ours = False
    try:
        yield is_ours
    finally:
        os.close(descriptor)


def refuse_model_in(folder: str | Path) -> None:
    """Raise where a folder for tables alone holds a whole model, which they would replace.

    Raises:
        ValueError: weights that are no blocks of tables lie there.
    """
    folder = Path(folder)
    names = {name for index in folder.glob("model.safetensors.index*.json") for name in read_index(index)["weight_map"]}
    if any(folder.glob("model*.safetensors")) or any(BLOCK_KEY.match(name) is None for name in names):
        raise ValueError(f"{folder} holds a model, which tables alone would replace. Name another folder in tables_to.")


def link_file(source: Path, target: Path) -> str:
    """A second name for a file, or a copy where the system has no such names; its SHA-256."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as file:
            return write_pieces(target, iter(lambda: file.read(2**24), b""))
    return read_digests(source.parent).get(source.name) or file_digest(target)


def publish(stage: Path, folder: Path, table_map: Mapping[str, str], digests, config, variant=None) -> dict[str, Path]:
    """Give what lies in `stage` its place in `folder`, and remove the weights that it replaces.

    The replacement of the index is the one step in which the new weights take the place of the old. config.json is a
    second file, renamed next to it. There is always an index: what reads checkpoints by itself, such as Trainer when it
    resumes, would take a single `model.safetensors` for the whole model.

    Args:
        stage: with the files of transformers and of `write_tables`.
        folder: the checkpoint.
        table_map, digests: as `write_tables` gives them.
        config: of the model.
        variant: in the names of the backbone's files.

    Returns:
        name of each block to its file.
    """
    single, index = with_variant(SINGLE_FILE, variant), with_variant(INDEX_FILE, variant)
    if (stage / single).exists():
        shard = stage / f"{single.removesuffix('.safetensors')}-00001-of-00001.safetensors"
        os.replace(stage / single, shard)
        backbone = dict.fromkeys(read_header(shard), shard.name)
    else:
        backbone = read_index(stage / index)["weight_map"] if (stage / index).exists() else {}
    digests = {**digests, **{name: file_digest(stage / name) for name in {*backbone.values()}}}
    names = _free_names(folder, sorted({*backbone.values(), *table_map.values()}))
    weight_map = {tensor: names[name] for tensor, name in sorted({**backbone, **table_map}.items())}
    headers = [read_header(stage / name) for name in names]
    metadata = {
        "total_size": sum(place.nbytes for header in headers for place in header.values()),
        "sha256": {names[name]: digest for name, digest in digests.items()},
        "engram_fingerprint": config.engram_fingerprint,
    }
    (stage / index).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")
    for path in stage.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for name, final in names.items():
        os.replace(stage / name, folder / final)
    sync_folder(folder)
    os.replace(stage / index, folder / index)
    # While a single file is there, it is what a loader takes.
    (folder / single).unlink(missing_ok=True)
    for path in sorted(stage.iterdir()):
        os.replace(path, folder / path.name)
    sync_folder(folder)
    remove_stale_weights(folder, set(names.values()), variant)
    return {tensor: folder / names[name] for tensor, name in table_map.items()}


def _free_names(folder: Path, names: list[str]) -> dict[str, str]:
    """Names that the folder does not have yet: as they are, or all with the same number added."""
    taken = {path.name for path in folder.iterdir()}
    numbered, count = {name: name for name in names}, 1
    while taken & set(numbered.values()):
        count += 1
        numbered = {name: f"{name.removesuffix('.safetensors')}.{count}.safetensors" for name in names}
    return numbered


def remove_stale_weights(folder: Path, kept: set[str], variant: str | None) -> None:
    """Remove weight files of an earlier save of the same variant, and what an interrupted one has left."""
    needed = set(kept)
    for index in folder.glob("model.safetensors.index*.json"):
        if index.name != with_variant(INDEX_FILE, variant):
            needed |= set(read_index(index)["weight_map"].values())
    for path in folder.iterdir():
        match = WEIGHT_FILE.fullmatch(path.name)
        if match is None or path.name in needed:
            continue
        is_other_variant = path.name.startswith("model") and (match[2] or "").lstrip(".") != (variant or "")
        if not is_other_variant or (match[2] or "").lstrip(".").isdigit():
            path.unlink()

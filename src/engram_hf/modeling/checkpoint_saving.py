"""Checkpoints on their way out: tables in files of their own, and a folder of weights that is replaced in one step.

Everything is written beside the old checkpoint, and takes its place by renaming. New files have names that the folder
does not have yet, and the one file that names them is replaced when all of them are on the disk. A reader finds the old
weights or the new ones, never a mixture. transformers writes the backbone; this file writes blocks and publishes.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from .checkpoint_loading import INDEX_FILE, SINGLE_FILE, read_digests, with_variant
from .configuration_checks import TABLE_DTYPES
from .configuration_engram_moe import AUTO_MAP
from .disk_files import BlockSource, MappedFile
from .disk_safetensors import (
    TensorContent,
    file_digest,
    read_header,
    read_index,
    sync_folder,
    write_file,
    write_pieces,
)
from .table import EngramTable
from .table_blocks import BLOCK_KEY, ROW_IDS, Block, block_name, changed_name, layer_of_table
from .table_formats import QUANTIZED_FORMATS


try:
    import fcntl
# Windows has none. transformers demands every import of remote code that is not in a `try`.
except ImportError:
    fcntl = None  # type: ignore[assignment]

# All modeling files: what is saved beside the weights.
CODE_FILES = (
    "checkpoint_loading.py",
    "checkpoint_saving.py",
    "configuration_checks.py",
    "configuration_engram_moe.py",
    "disk_files.py",
    "disk_reading.py",
    "disk_safetensors.py",
    "ids_hashing.py",
    "ids_reach.py",
    "memory_layer.py",
    "memory_model.py",
    "memory_patches.py",
    "modeling_engram_moe.py",
    "table.py",
    "table_blocks.py",
    "table_changes.py",
    "table_cut.py",
    "table_formats.py",
    "table_gradients.py",
    "table_patches.py",
    "table_placement.py",
    "table_ranks.py",
)
# Tables below this size are written too fast to need a progress bar.
PROGRESS_BYTES = 2**26
# A system may refuse to map a file for the safetensors library that is larger than its RAM.
LARGEST_FILE = 5 * 10**9
# The file that Trainer writes last into a checkpoint.
TRAINER_STATE = "trainer_state.json"
STAGE_PREFIX = ".saving-"
# Files that a save of this package or of transformers leaves, and a later one may remove.
WEIGHT_FILE = re.compile(
    r"(model(\.[^.-]+)?(-\d{5}-of-\d{5})?|tables-layer-\d+-\d{5}-of-\d{5}"
    r"|rows-layer-\d+(-\d{5}-of-\d{5})?|row-state-layer-\d+(-\d{5}-of-\d{5})?)(\.\d+)?\.safetensors"
)


@dataclass
class WrittenTables:
    """What a save has written of tables.

    weight_map: tensor name to file name. digests: file name to SHA-256.
    by_base: table name to the numbers of blocks that were left to the file they come from.
    changed_rows: table name, as its tensors have it, to the number of changed rows beside its blocks.
    stamp: of the run and step that the changed rows are of; empty where there are none.
    row_state: files of the optimizer's state of rows, which no index names as tensors, to their SHA-256.
    """

    weight_map: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    by_base: dict[str, list[int]] = field(default_factory=dict)
    changed_rows: dict[str, int] = field(default_factory=dict)
    stamp: str = ""
    row_state: dict[str, str] = field(default_factory=dict)


def write_tables(
    stage: Path,
    blocks: Mapping[str, torch.Tensor],
    tables: Mapping[str, EngramTable],
    prefix: str,
    max_shard_size: str | int,
    is_checkpoint: bool = False,
    name_of: Callable[[str, int], str] = block_name,
) -> WrittenTables:
    """Write the blocks of tables into files of their own.

    Args:
        stage: folder to write in.
        blocks: tensor name to block; in memory, or as a view of its file.
        tables: by name inside the base model.
        prefix: what tensor names have before these names.
        max_shard_size: as in `save_pretrained`; a file is larger only where a single block is.
        is_checkpoint: whether this is a checkpoint of the run that trains the tables: link the files that they came
            from, and write the rows that have changed.
        name_of: names the tensor that is written for a block, by the name of its table and its number.
    """
    limit = min(convert_file_size_to_int(max_shard_size), LARGEST_FILE)
    written = WrittenTables()
    # Of a block that is cut over ranks this is a DTensor, with the bytes of all ranks.
    total = sum(block.nbytes for block in blocks.values())
    numbers = numbers_of_files(tables)
    is_short = total < PROGRESS_BYTES
    with logging.tqdm(total=total, desc="Writing tables", unit="B", unit_scale=True, disable=is_short) as progress:
        for name, table in tables.items():
            full_name, layer = f"{prefix}{name}", numbers[name]
            own = {block: blocks.get(block_name(full_name, block.number)) for block in table.block_records}
            given = {block: tensor for block, tensor in own.items() if tensor is not None}
            if not given:
                continue
            by_rows = is_checkpoint and table.is_in_training
            standing = {
                block: table.saving.base_of(block) if by_rows else table.saving.source_of(block, tensor)
                for block, tensor in given.items()
            }
            nbytes = {block: table.saving.whole_nbytes(block) for block in given}
            groups = list(_group(nbytes, standing, limit))
            left: list[Block] = []
            for number, group in enumerate(groups, 1):
                filename = f"tables-layer-{layer:02d}-{number:05d}-of-{len(groups):05d}.safetensors"
                names = {block: name_of(full_name, block.number) for block in group}
                source = _whole_file({names[block]: standing[block] for block in group})
                if source is not None:
                    left += group if by_rows else []
                    written.digests[filename] = link_file(source, stage / filename)
                    progress.update(sum(nbytes[block] for block in group))
                else:
                    contents = {names[block]: _content(table, block, given[block]) for block in group}
                    written.digests[filename] = write_file(stage / filename, contents, progress.update)
                written.weight_map.update(dict.fromkeys(names.values(), filename))
            if by_rows and table.changes.run is not None:
                changed = table.saving.changed_rows(full_name, left)
                for rank, rows in enumerate(changed):
                    filename = file_of_rank(f"rows-layer-{layer:02d}", rank, len(changed))
                    written.digests[filename] = write_file(stage / filename, rows)
                    written.weight_map.update(dict.fromkeys(rows, filename))
                    count = rows[changed_name(full_name, ROW_IDS, rank)].shape[0]
                    written.changed_rows[full_name] = written.changed_rows.get(full_name, 0) + count
                written.by_base[name] = [block.number for block in left]
                written.stamp = table.changes.run.stamp.hex()
    return written


def file_of_rank(start: str, rank: int, ranks: int) -> str:
    """Name of a file with rows that a rank holds; one process needs no number."""
    return f"{start}.safetensors" if ranks == 1 else f"{start}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def numbers_of_files(tables: Iterable[str]) -> dict[str, int]:
    """The number in the names of a table's files: its layer, or its place among the tables where layers are shared."""
    layers = {name: layer_of_table(name) for name in tables}
    if len(set(layers.values())) == len(layers):
        return layers
    return {name: number for number, name in enumerate(layers)}


def _group(
    nbytes: Mapping[Block, int], standing: Mapping[Block, BlockSource | None], limit: int
) -> Iterator[list[Block]]:
    """Blocks of one file: those of a file that can be linked as it is, else as many as `limit` allows."""
    group: list[Block] = []
    size = 0
    file: MappedFile | None = None
    for block, block_nbytes in nbytes.items():
        source = standing[block]
        here = None if source is None else source.file
        if group and (size + block_nbytes > limit or here is not file):
            yield group
            group, size = [], 0
        group.append(block)
        size, file = size + block_nbytes, here
    if group:
        yield group


def _whole_file(standing: Mapping[str, BlockSource | None]) -> Path | None:
    """The file that holds exactly these tensors, under these names."""
    sources = [source for source in standing.values() if source is not None]
    if len(sources) < len(standing) or any(source.file is not sources[0].file for source in sources):
        return None
    file = sources[0].file
    file.check_unchanged()
    # Where the file's name stands for another file by now, the open one is copied.
    return file.path.resolve() if set(file.places) == set(standing) and file.is_at_its_path() else None


def _content(table: EngramTable, block: Block, tensor: torch.Tensor) -> TensorContent:
    if table.ranks is not None:
        return table.saving.content_of(block, table.ranks.cut)
    source = block.source
    if source is None or not source.is_under(tensor):
        return TensorContent.of(tensor)
    source.file.check_unchanged()
    return TensorContent.of(tensor) if source.was_written() else source.file.content(source.name)


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
def publishing(folder: str | Path) -> Iterator[None]:
    """Hold a folder for one save: another process that saves there waits, and then saves over it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(folder: str | Path) -> Iterator[Path]:
    """A folder inside `folder` to write in, gone afterwards. What an interrupted save has left there is removed.

    A lock tells whether the process of a stage still runs: it ends with the process, and process numbers do not.
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
    if sys.platform == "win32":
        yield False
        return
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


def remove_marker(folder: Path) -> None:
    """Called when a run begins a checkpoint in a folder: until Trainer has written it again, it is not whole."""
    (folder / TRAINER_STATE).unlink(missing_ok=True)


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


def publish(
    stage: Path, folder: Path, written: WrittenTables, facts: Mapping, variant: str | None = None
) -> dict[str, Path]:
    """Give what lies in `stage` its place in `folder`, and remove the weights that it replaces.

    The replacement of the index is the one step in which the new weights take the place of the old. config.json is a
    second file, renamed next to it; where no model was, the index comes last of all. There is always an index: what
    reads checkpoints by itself, such as Trainer when it resumes, would take a single `model.safetensors` for the whole
    model.

    Args:
        stage: with the files of transformers and of `write_tables`.
        folder: the checkpoint.
        written: as `write_tables` gives it.
        facts: what the index has beside names and digests: `engram_fingerprint` and `config`.
        variant: in the names of the backbone's files.

    Returns:
        name of each tensor of a table to its file.
    """
    single, index = with_variant(SINGLE_FILE, variant), with_variant(INDEX_FILE, variant)
    if (stage / single).exists():
        shard = stage / f"{single.removesuffix('.safetensors')}-00001-of-00001.safetensors"
        os.replace(stage / single, shard)
        backbone = dict.fromkeys(read_header(shard), shard.name)
    else:
        backbone = read_index(stage / index)["weight_map"] if (stage / index).exists() else {}
    digests = {**written.digests, **{name: file_digest(stage / name) for name in {*backbone.values()}}}
    file_of = {**backbone, **written.weight_map}
    headers = [read_header(stage / name) for name in {*file_of.values()}]
    total_size = sum(place.nbytes for header in headers for place in header.values())

    def write_index(names: Mapping[str, str]) -> None:
        metadata = {
            "total_size": total_size,
            "sha256": {names[name]: digest for name, digest in digests.items()},
            **facts,
        }
        if written.changed_rows:
            metadata |= {"changed_rows": written.changed_rows, "stamp": written.stamp}
        if written.row_state:
            metadata["row_state"] = written.row_state
        weight_map = {tensor: names[name] for tensor, name in sorted(file_of.items())}
        content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
        (stage / index).write_text(content)

    # What an interrupted first save has left is not looked at: numbered files without an index.
    is_new = not [*folder.glob("model.*"), *folder.glob("pytorch_model.*")]
    names = _free_names(folder, sorted({*file_of.values()}))
    write_index(names)
    # Some libraries write files that only their owner may read.
    mode = (stage / index).stat().st_mode & 0o777
    for path in stage.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        if path.stat().st_nlink == 1:
            path.chmod(mode)
    for name, final in names.items():
        os.replace(stage / name, folder / final)
    beside = sorted(path.name for path in stage.iterdir() if path.name != index)
    before, after = (beside, []) if is_new else ([], beside)
    for name in before:
        os.replace(stage / name, folder / name)
    sync_folder(folder)
    os.replace(stage / index, folder / index)
    # While a single file is there, it is what a loader takes.
    (folder / single).unlink(missing_ok=True)
    for name in after:
        os.replace(stage / name, folder / name)
    sync_folder(folder)
    remove_stale_weights(folder, {*names.values(), *written.row_state}, variant)
    if any(name != final for name, final in names.items()) and _link_names(folder, names):
        write_index({name: name for name in names})
        with (stage / index).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(stage / index, folder / index)
        sync_folder(folder)
        for name, final in names.items():
            if name != final:
                (folder / final).unlink()
        names = {name: name for name in names}
    return {tensor: folder / names[name] for tensor, name in written.weight_map.items()}


def _link_names(folder: Path, names: Mapping[str, str]) -> bool:
    """Give published files the names that every save has, beside those that they have now. A repository to which a
    folder is pushed again and again then keeps no files of earlier saves.

    Returns:
        False where a name is taken (by a file of another variant), or where the system has no second names.
    """
    if any((folder / name).exists() for name, final in names.items() if name != final):
        return False
    linked = []
    try:
        for name, final in names.items():
            if name != final:
                os.link(folder / final, folder / name)
                linked.append(folder / name)
    except OSError:
        for path in linked:
            path.unlink()
        return False
    sync_folder(folder)
    return True


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


def check_blocks(tables: Mapping[str, EngramTable], blocks: Mapping[str, torch.Tensor], names: set[str]) -> str | None:
    """The type of the blocks that are saved, as the config names it; None for a model without tables.

    Raises:
        ValueError: a block is missing, or they are of several types, or of one that tables cannot have.
    """
    missing = sorted(names - set(blocks))
    if missing:
        raise ValueError(
            f"The state_dict lacks {len(missing)} blocks of the tables, such as {missing[0]}; without them what "
            "is saved could not be loaded. Give all of model.state_dict()."
        )
    dtypes = {str(block.dtype).removeprefix("torch.") for block in blocks.values()}
    if not dtypes:
        return None
    if len(dtypes) > 1:
        raise ValueError(f"The blocks of the tables must be of one type, got {sorted(dtypes)}.")
    dtype, plain = next(iter(dtypes)), [name for name in TABLE_DTYPES if name not in QUANTIZED_FORMATS]
    row_format = next(iter(tables.values())).row_format
    if row_format is None and dtype not in plain:
        raise ValueError(
            f"Tables are saved in {', '.join(plain)}, got {dtype}, whose numbers have no scales. Cast the tables "
            "back, save the model, and make them smaller with engram_hf.quantize_tables(source, target)."
        )
    return row_format or dtype


def is_other_rank() -> bool:
    """Whether another process of a distributed run is the one that saves."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0

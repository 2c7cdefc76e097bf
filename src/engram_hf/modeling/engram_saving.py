"""Checkpoints on their way out: everything is written beside the old checkpoint, and takes its place by renaming.

A reader finds the old weights or the new ones, never a mixture: new files have names that the folder does not have yet,
and the one file that names them is replaced in one step, when all of them are on the disk. The blocks of a table lie in
files of their own, written one block at a time, or linked where a file of unchanged blocks exists.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from .configuration_engram_moe import AUTO_MAP
from .engram_loading import BLOCK_KEY, INDEX_FILE, SINGLE_FILE, read_digests, with_variant
from .engram_table import DISK, EngramTable
from .safetensors_files import (
    TensorContent,
    file_digest,
    read_header,
    read_index,
    sync_folder,
    write_file,
    write_pieces,
)


CODE_FILES = (
    "configuration_engram_moe.py",
    "embedding_inversion.py",
    "engram_binding.py",
    "engram_layer.py",
    "engram_loading.py",
    "engram_outputs.py",
    "engram_placement.py",
    "engram_quantization.py",
    "engram_reader.py",
    "engram_saving.py",
    "engram_table.py",
    "engram_tiers.py",
    "hot_rows.py",
    "modeling_engram_moe.py",
    "ngram_hashing.py",
    "packed_documents.py",
    "safetensors_files.py",
)
# Tables below this size are written too fast to need a progress bar.
PROGRESS_BYTES = 2**26
# A system may refuse to map a file for the safetensors library that is larger than its RAM.
LARGEST_FILE = 5 * 10**9
STAGE_PREFIX = ".saving-"
# Files that a save of this package or of transformers leaves, and a later one may remove.
WEIGHT_FILE = re.compile(r"(model(\.[^.-]+)?(-\d{5}-of-\d{5})?|tables-layer-\d+-\d{5}-of-\d{5})(\.\d+)?\.safetensors")

logger = logging.get_logger(__name__)


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


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of the backbone and memory layers, and the blocks of tables."""
    blocks = {name: tensor for name, tensor in state.items() if BLOCK_KEY.match(name) is not None}
    return {name: tensor for name, tensor in state.items() if name not in blocks}, blocks


def make_stage(folder: str | Path) -> Path:
    """A folder inside `folder` to write in; what an interrupted save has left there is removed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{STAGE_PREFIX}*"):
        if not _is_running(int(left.name.split("-")[1])):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{STAGE_PREFIX}{os.getpid()}-", dir=folder))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_tables(
    stage: Path, blocks: Mapping[str, torch.Tensor], tables: Mapping[str, EngramTable], max_shard_size: str | int
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the blocks of tables into files of their own.

    Args:
        stage: folder to write in.
        blocks: tensor name to block; in memory, or as a view of its file.
        tables: by name inside the base model.
        max_shard_size: as in `save_pretrained`; a file is larger only where a single block is.

    Returns:
        tensor name to file name, and file name to SHA-256.
    """
    limit = min(convert_file_size_to_int(max_shard_size), LARGEST_FILE)
    weight_map, digests = {}, {}
    total = sum(block.nbytes for block in blocks.values())
    is_short = total < PROGRESS_BYTES
    with logging.tqdm(total=total, desc="Writing tables", unit="B", unit_scale=True, disable=is_short) as progress:
        for table_name, table in tables.items():
            own = {
                name: int(match[2])
                for name in blocks
                if (match := BLOCK_KEY.match(name)) is not None and match[1] == table_name
            }
            groups = list(_group(own, blocks, table, limit))
            for number, names in enumerate(groups, 1):
                layer = int(table_name.split(".")[1])
                filename = f"tables-layer-{layer:02d}-{number:05d}-of-{len(groups):05d}.safetensors"
                source = _whole_file(names, own, blocks, table)
                if source is not None:
                    digests[filename] = link_file(source, stage / filename)
                    progress.update(source.stat().st_size)
                else:
                    contents = {name: _content(own[name], blocks[name], table) for name in names}
                    digests[filename] = write_file(stage / filename, contents, progress.update)
                weight_map.update(dict.fromkeys(names, filename))
    return weight_map, digests


def _is_in_file(number: int, block: torch.Tensor, table: EngramTable) -> bool:
    """Whether this is the table's own block, on disk and as its file has it."""
    return (
        table.tiers[number] == DISK
        and table.blocks[number]._version == 0
        and block.data_ptr() == table.blocks[number].data_ptr()
    )


def _group(own: dict[str, int], blocks, table: EngramTable, limit: int) -> Iterator[list[str]]:
    """Blocks of one file: those of a file that can be linked as it is, else as many as `limit` allows."""
    group: list[str] = []
    size, file = 0, None
    for name, number in sorted(own.items(), key=lambda item: item[1]):
        here = table.sources[number].file if _is_in_file(number, blocks[name], table) else None
        if group and (size + blocks[name].nbytes > limit or here is not file):
            yield group
            group, size = [], 0
        group.append(name)
        size, file = size + blocks[name].nbytes, here
    if group:
        yield group


def _whole_file(names: list[str], own: dict[str, int], blocks, table: EngramTable) -> Path | None:
    """The file that holds exactly these blocks, unchanged and under these names."""
    if not all(_is_in_file(own[name], blocks[name], table) for name in names):
        return None
    sources = [table.sources[own[name]] for name in names]
    file = sources[0].file
    file.check_unchanged()
    is_whole = all(source.file is file for source in sources) and set(file.places) == set(names)
    # Where the file's name stands for another file by now, the open one is copied.
    return file.path.resolve() if is_whole and file.is_at_its_path() else None


def _content(number: int, block: torch.Tensor, table: EngramTable) -> TensorContent:
    if not _is_in_file(number, block, table):
        return TensorContent.of(block)
    source = table.sources[number]
    source.file.check_unchanged()
    return source.file.content(source.name)


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
    stage.rmdir()
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

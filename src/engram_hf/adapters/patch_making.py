"""Patches out of two models, models out of patches, and two patches beside each other. Block by block, so that tables
may be larger than memory."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from ..checkpoints.checking import Part, check_loadable, read_config
from ..checkpoints.rewriting import open_folder, rewrite_blocks
from ..modeling.checkpoint_loading import (
    PROGRESS_BYTES,
    find_checkpoint,
    match_blocks,
    open_changes,
    open_sources,
    read_headers,
)
from ..modeling.checkpoint_saving import STAGE_PREFIX
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.disk_safetensors import TensorContent
from ..modeling.ids_hashing import check_fingerprint, differing_parts
from ..modeling.memory_patches import check_patch, refuse_overflow
from ..modeling.table import EngramTable
from ..modeling.table_blocks import RESIDENT, Block
from ..modeling.table_changes import rows_of_pieces
from ..modeling.table_patches import (
    PATCH_DTYPES,
    PATCH_FILE,
    REPLACE,
    PatchedRows,
    RowPatch,
    base_digest,
    check_scale,
    describe_patch_in,
    patched_rows,
)
from .memory_files import MemoryFiles
from .row_patches import load_patch, save_patch, with_tables
from .served_model import ModelWithServedTables


PIECE_BYTES = 2**24
logger = logging.get_logger(__name__)


@dataclass
class OpenTables:
    """The tables of a model or of a folder.

    where: for messages.
    tables: by their names inside the base model.
    fingerprints: name of a table to that of its hash; empty where the model's own code finds its rows.
    backbone: file name to SHA-256 of the files without tables, as a folder promises them; empty for a model.
    """

    where: str
    tables: dict[str, EngramTable]
    fingerprints: dict[str, dict[str, str]]
    backbone: dict[str, str]


def open_any(model_or_folder: nn.Module | str | Path) -> OpenTables:
    """The tables of a model, or of a folder, whose files are mapped and not read.

    Raises:
        FileNotFoundError: the folder has no safetensors files or no config.
        ValueError: there are no tables, or loading the folder would refuse it.
    """
    if isinstance(model_or_folder, nn.Module):
        whole = with_tables(model_or_folder)
        tables = whole.named_tables()
        hashes = {name: whole.hash_of_table(name) for name in tables}
        fingerprints = {name: {} if each is None else each.fingerprint() for name, each in hashes.items()}
        return OpenTables(f"this {type(whole).__name__}", tables, fingerprints, {})
    folder = Path(model_or_folder)
    checkpoint = find_checkpoint(str(folder), {"local_files_only": True}) if folder.is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder} is not a folder with the safetensors files of a model and their model.safetensors.index.json."
        )
    if not checkpoint.blocks():
        raise ValueError(
            f"{folder} holds no blocks of an EngramMoE or of an added memory. A table of another model is part of its "
            "backbone: load the model with load_with_tables, and write rows with table.write_rows before it is saved."
        )
    config = read_config(folder)
    places = read_headers(checkpoint)
    tables = check_loadable([Part(checkpoint, places)], config)
    if isinstance(config, MemoryFiles):
        names = _names_in_base_model(config, str(folder))
        tables = {names[name]: table for name, table in tables.items()}
    sources = open_sources(checkpoint, match_blocks(tables, checkpoint, places, config))
    for name, table in tables.items():
        table.open_blocks(sources[name], [RESIDENT] * len(sources[name]), ["cpu"] * len(sources[name]))
        table.changes.bring(name, table, open_changes(name, checkpoint, places))
    table_files = {checkpoint.file_of[tensor].name for tensor in checkpoint.blocks().values()}
    digests = checkpoint.metadata.get("sha256", {})
    backbone = {name: each for name, each in digests.items() if name not in table_files}
    return OpenTables(str(folder), tables, {name: _fingerprint(config, name) for name in tables}, backbone)


def _fingerprint(config: Any, table_name: str) -> dict[str, str]:
    """That of the hash of a table, by its name inside the base model."""
    if isinstance(config, MemoryFiles):
        # `<layer>.engram.<name>.table`
        return dict(config.description.memories[table_name.split(".")[-2]].fingerprint or {})
    return dict(config.engram_fingerprint or {})


def _names_in_base_model(config: MemoryFiles, where: str) -> dict[str, str]:
    """Name of a table in the files of a model with memories to its name inside the base model.

    Raises:
        ValueError: the files hold a memory alone, whose tables have a name in no model.
    """
    if config.description.is_alone:
        raise ValueError(
            f"{where} holds a memory alone. Put it into its model with load_engram(model, folder), and give the model."
        )
    kind = getattr(transformers, next(iter(config.architectures or []), ""), None)
    # In a class without a head, which is its own base model, no name begins so.
    prefix = f"{getattr(kind, 'base_model_prefix', '')}."
    return {name: name.removeprefix(prefix) for name in config.tables()}


def pieces_of(block: Block) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a block in pieces: the row id in the table of the first, and the rows, (n, row width) on the CPU."""
    block.require_memory()
    at_once = max(1, PIECE_BYTES // block.row_nbytes)
    for start in range(0, block.num_rows, at_once):
        yield block.first_row + start, block.rows[start : start + at_once].cpu()


def extract_patch(
    before: nn.Module | str | Path, after: nn.Module | str | Path, target: str | Path, name: str | None = None
) -> RowPatch:
    """Write the rows in which two models differ as a patch for the first one.

    Differences are not exact in floating point, so the patch holds the rows themselves (`mode="replace"`).

    Args:
        before: model, or folder of a checkpoint.
        after: the same model or folder after training. A checkpoint of a run may be given as it is.
        target: file for the patch, as for `save_patch`.
        name: of the patch; by default that of the folder `after`, or "patch".

    Returns:
        the patch.

    Raises:
        FileNotFoundError: a folder holds no model.
        ValueError: the two have other tables or another hash, or all rows are equal.

    Example:
        >>> file = save_patch(patch, "alice.safetensors")
        >>> folder = merge_patch("output/tiny", file, "output/alice")
        >>> extract_patch("output/tiny", folder, "again.safetensors").num_rows
        3
    """
    old, new = open_any(before), open_any(after)
    shapes = [
        {
            name: (table.num_rows, table.head_dim, table.row_format or str(table.dtype))
            for name, table in each.tables.items()
        }
        for each in (old, new)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{old.where} has the tables {shapes[0]}, and {new.where} has {shapes[1]}. A patch can only be made of two "
            "states of one model."
        )
    for table_name, fingerprint in old.fingerprints.items():
        check_fingerprint(fingerprint, new.fingerprints[table_name], new.where)
    changed_files = [each for each in old.backbone if new.backbone.get(each, old.backbone[each]) != old.backbone[each]]
    if changed_files:
        logger.warning(
            f"{new.where} differs from {old.where} in more than its tables ({', '.join(changed_files)}), and a patch "
            "holds rows alone. Freeze the backbone to train a patch, or keep the other changes as an adapter of PEFT."
        )
    total = sum(block.parameter.nbytes for table in old.tables.values() for block in table.block_records)
    found = {}
    with logging.tqdm(
        total=total, desc="Comparing", unit="B", unit_scale=True, disable=total < PROGRESS_BYTES
    ) as progress:
        for table_name, table in old.tables.items():
            patched = _differing_rows(table, new.tables[table_name], progress.update)
            if len(patched.row_ids):
                found[table_name] = patched
    if not found and (trained := _trained_in(after)):
        raise ValueError(
            f"The tables of {new.where} are as they were: the run trains the patch {trained!r} and never writes to "
            "them. Save it with save_patch(model.trained_patch(), file)."
        )
    if not found:
        raise ValueError(f"All rows of {old.where} and {new.where} are equal, so there is no patch to make.")
    if name is None:
        name = "patch" if isinstance(after, nn.Module) else Path(after).resolve().name
    fingerprint = new.fingerprints[next(iter(found))]
    if any(new.fingerprints[each] != fingerprint for each in found):
        raise ValueError(
            f"{new.where} has changed rows of several memories ({', '.join(found)}), and a patch belongs to one. Take "
            "the others out first, with remove_engram."
        )
    patch = RowPatch(name, found, REPLACE, fingerprint, {"before": old.where, "after": new.where})
    save_patch(patch, target)
    return patch


def _differing_rows(before: EngramTable, after: EngramTable, on_bytes) -> PatchedRows:
    digest, row_ids, rows = sha256(), [torch.zeros(0, dtype=torch.int64)], []
    for one, other in zip(before.block_records, after.block_records, strict=True):
        for (first, old), (_, new) in zip(pieces_of(one), pieces_of(other), strict=True):
            differs = (old.view(torch.uint8) != new.view(torch.uint8)).any(-1)
            digest.update(old[differs].view(torch.uint8).numpy().data)
            row_ids.append(differs.nonzero().flatten() + first)
            found = after.stored_as.decode(new[differs], after.head_dim)
            rows.append(found if found.dtype in PATCH_DTYPES else found.float())
            on_bytes(old.nbytes)
    return PatchedRows(torch.cat(row_ids), torch.cat(rows), before.num_rows, digest.hexdigest())


def _trained_in(model_or_folder: nn.Module | str | Path) -> str | None:
    """The name of the patch that a model, or the run that a folder is from, trains."""
    if isinstance(model_or_folder, nn.Module):
        trained = with_tables(model_or_folder).trained_patch()
        return None if trained is None else trained.name
    beside = describe_patch_in(Path(model_or_folder))
    return None if beside is None or not beside[1] else beside[0]


def merge_patch(
    model_or_folder: nn.Module | str | Path, patch: RowPatch | str | Path, target: str | Path, scale: float = 1.0
) -> Path:
    """Write a model whose tables have the rows of a patch. It computes what the overlay computes, bit for bit.

    Quantized tables are the exception: their new rows are quantized. Tables of other models (`load_with_tables`) are
    refused, since they are part of their backbone.

    Args:
        model_or_folder: a model, whose active patches are left out; or its folder, of which one block after the other
            is read.
        patch: a patch, or where `load_patch` finds it.
        target: folder for the model, without weights yet. A patch that lies beside the model is not copied.
        scale: as for `add_patch`.

    Returns:
        `target`.

    Raises:
        ValueError: the patch is one of another model; the folder is damaged, or a checkpoint with changed rows; the
            target holds weights; the type of the table cannot hold the patched rows.
        OSError: no space or no permission. What was in the target stays.

    Example:
        >>> file = save_patch(patch, "alice.safetensors")
        >>> model = AutoModelForCausalLM.from_pretrained(merge_patch("output/tiny", file, "output/alice"))
    """
    given = load_patch(patch) if isinstance(patch, str | Path) else patch
    check_scale(scale)
    target = Path(target)
    if not isinstance(model_or_folder, nn.Module):
        return _merge_folder(Path(model_or_folder), given, target, scale)
    whole = with_tables(model_or_folder)
    if isinstance(whole, ModelWithServedTables):
        raise ValueError(
            f"Tables of {type(whole).__name__} are part of its backbone, and merge_patch writes blocks of an EngramMoE "
            "or of an added memory. Keep the patch beside the model, or write rows with table.write_rows and save it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that files are linked and not copied.
    saved = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=target.parent))
    try:
        with whole.disable_patches():
            whole.save_pretrained(saved)
        return _merge_folder(saved, given, target, scale)
    finally:
        shutil.rmtree(saved, ignore_errors=True)


def _merge_folder(source: Path, patch: RowPatch, target: Path, scale: float) -> Path:
    opened = open_any(source)
    part, config = open_folder(source, target)
    check_patch(patch, opened.tables)
    for name in patch.tables:
        if differing := differing_parts(patch.fingerprint, opened.fingerprints[name]):
            raise ValueError(
                f"The patch {patch.name!r} was made for another hash than that of {name} of {source}: it differs in "
                f"{', '.join(differing)}. Use the patch with the model that it was made for."
            )
    checkpoint, places = part.checkpoint, part.places
    if any(open_changes(name, checkpoint, places) for name in opened.tables):
        raise ValueError(
            f"{source} is a checkpoint of a run, with changed rows beside its blocks. Merge these first: "
            "engram_hf.merge_changed_rows(source, folder)."
        )
    refuse_overflow(patch, scale, opened.tables)
    for name, each in patch.tables.items():
        if each.base_digest and each.base_digest != base_digest(opened.tables[name], each.row_ids):
            logger.warning(
                f"{name} of {source} has other rows than the table that the patch {patch.name!r} was made for. What "
                "the patch says may not fit them."
            )
    tensors = match_blocks(opened.tables, checkpoint, places, config)
    owners = {tensor: (name, i) for name, names in tensors.items() for i, tensor in enumerate(names)}

    def merged(file: TableFile, tensor: str) -> TensorContent | None:
        name, number = owners[tensor]
        table, each = opened.tables[name], patch.tables.get(name)
        block = table.block_records[number]
        if each is None:
            return None
        bounds = torch.tensor([block.first_row, block.first_row + block.num_rows])
        start, end = torch.searchsorted(each.row_ids, bounds).tolist()
        if start == end:
            return None
        wanted = each.row_ids[start:end] - block.first_row
        return _with_patch(table, file, tensor, wanted, each.rows[start:end], patch.mode, scale)

    rewrite_blocks(checkpoint, config, source, target, merged, left_out=(PATCH_FILE,))
    return target


def _with_patch(
    table: EngramTable,
    file: TableFile,
    tensor: str,
    wanted: torch.Tensor,
    given: torch.Tensor,
    mode: str,
    scale: float,
) -> TensorContent:
    """A block with the rows of a patch, (n, head_dim), at `wanted`, (n,) ascending and counted from its first."""
    place = file.places[tensor]

    def pieces():
        for first, part in rows_of_pieces(BlockSource(file, tensor), place.shape[1], file.dtype_of(tensor)):
            start, end = torch.searchsorted(wanted, torch.tensor([first, first + len(part)])).tolist()
            if start < end:
                rows = table.stored_as.decode(part[wanted[start:end] - first], table.head_dim)
                new = patched_rows(rows, given[start:end], mode, scale)
                part[wanted[start:end] - first] = table.stored_as.encode(new)
            yield memoryview(part.view(-1).view(torch.uint8).numpy().data)

    return TensorContent(file.dtype_of(tensor), place.shape, place.nbytes, pieces)


@dataclass(frozen=True)
class ComparedRows:
    """Two patches on one table.

    rows: how many rows each of them changes.
    shared: rows that both change.
    conflicts: of these, those on which the order of the patches matters: they replace a row by different rows, or one
        replaces it and the other adds to it.
    norms: square root of the sum of squares of the rows of each patch, as it holds them.
    largest_difference: of two numbers in a shared row; 0 where they share none.
    """

    table: str
    rows: tuple[int, int]
    shared: int
    conflicts: int
    norms: tuple[float, float]
    largest_difference: float


def compare_patches(a: RowPatch | str | Path, b: RowPatch | str | Path) -> list[ComparedRows]:
    """Which rows two patches share, and whether they can be used together. Without conflicts their order is free; where
    both add to a row, up to rounding.

    Args:
        a, b: patches, or where `load_patch` finds them.

    Returns:
        one for each table that either of them changes.

    Raises:
        ValueError: they belong to different tables or hashes.

    Example:
        >>> [(each.table, each.shared, each.conflicts) for each in compare_patches(patch, patch)]
        [('layers.1.engram.table', 3, 0)]
    """
    a, b = (load_patch(each) if isinstance(each, str | Path) else each for each in (a, b))
    if differing := differing_parts(a.fingerprint, b.fingerprint):
        raise ValueError(
            f"The patches {a.name!r} and {b.name!r} were made for different hashes: they differ in "
            f"{', '.join(differing)}. Compare patches of one model."
        )
    compared = []
    for table in dict.fromkeys([*a.tables, *b.tables]):
        known = [each.tables[table] for each in (a, b) if table in each.tables]
        sizes = {(each.table_rows, each.rows.shape[1]) for each in known}
        if len(sizes) > 1:
            raise ValueError(f"The patches {a.name!r} and {b.name!r} were made for a {table} of different sizes.")
        one, other = (_part(each, table, known[0].rows.shape[1]) for each in (a, b))
        is_shared = torch.isin(one[0], other[0])
        left, right = one[1][is_shared], other[1][torch.isin(other[0], one[0])]
        is_conflict = torch.full((len(left),), a.mode != b.mode)
        if a.mode == b.mode == REPLACE:
            is_conflict = (left != right).any(-1)
        largest = float((left - right).abs().max()) if left.numel() else 0.0
        norms = float(one[1].norm()), float(other[1].norm())
        compared.append(
            ComparedRows(table, (len(one[0]), len(other[0])), len(left), int(is_conflict.sum()), norms, largest)
        )
    return compared


def _part(patch: RowPatch, table: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row ids and float32 rows of a table; none where the patch leaves it alone."""
    if table not in patch.tables:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, width)
    each = patch.tables[table]
    return each.row_ids, each.rows.detach().float()

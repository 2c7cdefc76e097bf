"""Merges a checkpoint of a training run: blocks, and the rows that have changed since, become blocks again."""

import hashlib
import shutil
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from transformers.utils import logging

from ..adapters.other_tables import load_with_tables
from ..adapters.table_parts import MODEL_TYPES
from ..modeling.checkpoint_loading import PROGRESS_BYTES, open_changes
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.disk_safetensors import TensorContent, read_json
from ..modeling.table_changes import ChangedRows, rows_of_pieces
from .rewriting import files_beside, open_folder, refuse_weights, rewrite_blocks


def merge_changed_rows(source: str | Path, target: str | Path) -> Path:
    """Write a training checkpoint as a model of its own, block by block, without the state of the run.

    One of somebody else's model, whose tables `load_with_tables` serves, gets the layout in which it was published.

    Args:
        source: folder of a checkpoint. One without changed rows may be given too.
        target: folder for the model, without weights yet. Files without changed rows are linked.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: `source` has no safetensors files, or one is missing.
        ValueError: `source` is damaged, or has no tables, or a link in it leads elsewhere; `target` holds weights.
        OSError: no space or no permission in `target`.

    Example:
        >>> folder = merge_changed_rows("output/run/checkpoint-500", "output/model")
    """
    source, target = Path(source), Path(target)
    if (source / "config.json").is_file() and read_json(source / "config.json").get("model_type") in MODEL_TYPES:
        _merge_served(source, target)
        return target
    part, config = open_folder(source, target)
    checkpoint, places, blocks = part.checkpoint, part.places, part.checkpoint.blocks()
    changes = {table: open_changes(table, checkpoint, places) for table, _ in blocks}
    owners = {name: owner for owner, name in blocks.items()}
    first_rows: dict[str, list[int]] = {}
    for table in changes:
        names = [name for (owner, _), name in sorted(blocks.items()) if owner == table]
        first_rows[table] = list(accumulate((places[name].shape[0] for name in names), initial=0))

    def rows_for(name: str) -> list[tuple[ChangedRows, slice]]:
        """Which changed rows lie in a block: those of each rank that has some there."""
        table, number = owners[name]
        bounds = torch.tensor(first_rows[table][number : number + 2])
        found = [(each, slice(*torch.searchsorted(each.row_ids, bounds).tolist())) for each in changes[table]]
        return [(each, part) for each, part in found if part.start < part.stop]

    parts = {name: rows_for(name) for name in blocks.values()}
    total = sum(places[name].nbytes for name, found in parts.items() if found)
    with logging.tqdm(
        total=total, desc="Merging", unit="B", unit_scale=True, disable=total < PROGRESS_BYTES
    ) as progress:

        def merged(file: TableFile, name: str) -> TensorContent | None:
            table, number = owners[name]
            if not (found := parts[name]):
                return None
            row_ids = torch.cat([each.row_ids[part] for each, part in found]) - first_rows[table][number]
            row_ids, order = row_ids.sort()
            rows = [each.rows[part] for each, part in found]
            # Of one file nothing is copied.
            merged_rows = rows[0] if len(rows) == 1 else torch.cat(rows)[order]
            digest = bytes(found[0][0].digests[number].tolist())
            return _with_rows(file, name, row_ids, merged_rows, digest, progress.update)

        rewrite_blocks(checkpoint, config, source, target, merged)
    return target


def _merge_served(source: Path, target: Path) -> None:
    """Load with tables on disk, where changed rows are all that takes memory, and save."""
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the source itself, which is not changed; name another folder.")
    refuse_weights(target)
    beside = files_beside(source, {path.name for path in source.glob("*.safetensors*")}, target)
    load_with_tables(source, "cpu+disk").save_pretrained(target)
    for path in beside:
        copy = target / path.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _with_rows(
    file: TableFile,
    name: str,
    wanted: torch.Tensor,
    rows: torch.Tensor,
    expected: bytes,
    on_bytes: Callable[[int], object],
) -> TensorContent:
    """A block in which the rows `wanted`, (n,) ascending, are replaced by `rows`, (n, width).

    expected: SHA-256 of the block before that.
    on_bytes: called with the number of bytes after each piece.
    """
    place = file.places[name]

    def pieces():
        digest = hashlib.sha256()
        for first, part in rows_of_pieces(BlockSource(file, name), place.shape[1], file.dtype_of(name)):
            digest.update(part.view(-1).view(torch.uint8).numpy().data)
            start, end = torch.searchsorted(wanted, torch.tensor([first, first + len(part)])).tolist()
            part[wanted[start:end] - first] = rows[start:end]
            merged = part.view(-1).view(torch.uint8).numpy().data
            yield memoryview(merged)
            on_bytes(merged.nbytes)
        if digest.digest() != expected:
            raise ValueError(
                f"{name} in {file.path} is not the block that the changed rows of this checkpoint belong to. Somebody "
                "wrote to that file, which other checkpoints share by hard links, or to the file of rows. Take both "
                "from a copy of the checkpoint."
            )

    return TensorContent(file.dtype_of(name), place.shape, place.nbytes, pieces)

"""Merges a checkpoint of a training run: blocks, and the rows that have changed since, become blocks again."""

import hashlib
from itertools import accumulate
from pathlib import Path

import torch

from ..modeling.checkpoint_loading import open_changes
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.disk_safetensors import TensorContent
from ..modeling.table_changes import rows_of_pieces
from .rewriting import open_folder, rewrite_blocks


def merge_changed_rows(source: str | Path, target: str | Path) -> Path:
    """Write a training checkpoint as a model of its own, block by block, without the state of the run.

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
    part, config = open_folder(source, target)
    checkpoint, places, blocks = part.checkpoint, part.places, part.checkpoint.blocks()
    changes = {table: open_changes(table, checkpoint, places) for table, _ in blocks}
    first_rows: dict[str, list[int]] = {}
    for table in changes:
        names = [name for (owner, _), name in sorted(blocks.items()) if owner == table]
        first_rows[table] = list(accumulate((places[name].shape[0] for name in names), initial=0))

    def merged(file: TableFile, name: str) -> TensorContent | None:
        table, number = next(key for key, tensor in blocks.items() if tensor == name)
        brought = changes[table]
        if brought is None:
            return None
        row_ids, rows, digests = brought.row_ids, brought.rows, brought.digests
        bounds = torch.tensor(first_rows[table][number : number + 2])
        start, end = torch.searchsorted(row_ids, bounds).tolist()
        if start == end:
            return None
        digest = bytes(digests[number].tolist())
        return _with_rows(file, name, row_ids[start:end] - int(bounds[0]), rows[start:end], digest)

    rewrite_blocks(checkpoint, config, source, target, merged)
    return target


def _with_rows(file: TableFile, name: str, wanted: torch.Tensor, rows: torch.Tensor, expected: bytes) -> TensorContent:
    """A block in which the rows `wanted`, (n,) ascending, are replaced by `rows`, (n, width).

    expected: SHA-256 of the block before that.
    """
    place = file.places[name]

    def pieces():
        digest = hashlib.sha256()
        for first, part in rows_of_pieces(BlockSource(file, name), place.shape[1], file.dtype_of(name)):
            digest.update(part.view(-1).view(torch.uint8).numpy().data)
            start, end = torch.searchsorted(wanted, torch.tensor([first, first + len(part)])).tolist()
            part[wanted[start:end] - first] = rows[start:end]
            yield memoryview(part.view(-1).view(torch.uint8).numpy().data)
        if digest.digest() != expected:
            raise ValueError(
                f"{name} in {file.path} is not the block that the changed rows of this checkpoint belong to. Somebody "
                "wrote to that file, which other checkpoints share by hard links, or to the file of rows. Take both "
                "from a copy of the checkpoint."
            )

    return TensorContent(file.dtype_of(name), place.shape, place.nbytes, pieces)

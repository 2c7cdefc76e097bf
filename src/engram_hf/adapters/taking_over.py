"""Makes embeddings of a model that is loaded already tables with the same rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from ..modeling.checkpoint_loading import Checkpoint, read_headers
from ..modeling.disk_files import BlockSource, TableFile
from ..modeling.table_blocks import DISK
from .table_parts import TABLE_CHILD, TableParts, checkpoint_of, find_parts, names_in_model


ROWS_COMPARED = 2**16


def take_over(model: Any, names: list[str], values: Mapping[str, object]) -> None:
    """Make embeddings with a weight tables that hold the same rows: those of the files that the model was loaded from
    where one is to go to disk, and the weight itself elsewhere.

    A table has the parts of these files where they are found, so that it may go to disk later.

    Args:
        model: of a class with tables.
        names: of the embeddings.
        values: name to the tier it is to go to.

    Raises:
        ValueError: a table is to go to disk, and no file holds its rows.
    """
    weights = {name: model.get_submodule(name).weight for name in names}
    on_disk = [name for name in names if values[name] == DISK]
    found, checkpoint, places = _parts_of_files(model, names, on_disk)
    for name in on_disk:
        _check_same_rows(weights[name], found[name], checkpoint)
    for name in names:
        if name not in found:
            parts = revert_weight_conversion(model, {f"{name}.weight": weights[name].detach()})
            tensors = sorted(parts, key=dot_natural_key)
            rows = tuple(len(parts[tensor]) for tensor in tensors)
            found[name] = TableParts(name, tuple(tensors), rows, weights[name].shape[1], weights[name].dtype)
    model.begin_serving({name: found[name] for name in names})
    tables = {name: model.named_tables()[f"{name}.{TABLE_CHILD}"] for name in names}
    files: dict[Path, TableFile] = {}
    for name in [name for name in names if name not in on_disk]:
        sources: list[BlockSource | None] = []
        for tensor in found[name].tensors:
            path = None if checkpoint is None else checkpoint.file_of.get(tensor)
            if path is not None:
                files[path] = files.get(path) or TableFile(path)
            sources.append(None if path is None else BlockSource(files[path], tensor))
        parts = weights[name].detach().split(list(found[name].rows))
        tables[name].take_over(parts, sources, weights[name].requires_grad)
    if on_disk:
        entries = {(name, None): DISK for name in on_disk}
        model.open_served_tables({n: found[n] for n in on_disk}, checkpoint, places, entries, None, True)
        for name in on_disk:
            # What was frozen stays so.
            for block in tables[name].blocks:
                block.requires_grad_(block.requires_grad and weights[name].requires_grad)


def _parts_of_files(model: Any, names: list[str], on_disk: list[str]) -> tuple[dict[str, TableParts], Any, Any]:
    """The parts of tables in the files that a model was loaded from, the checkpoint and the places of its tensors.

    Raises:
        ValueError: those of a table that is to go to disk are not there.
    """
    found: dict[str, TableParts] = {}
    arguments = {"revision": _commit_of(model), "local_files_only": not on_disk}
    try:
        checkpoint = checkpoint_of(model.name_or_path or "this model", arguments)
        places = read_headers(checkpoint)
    except (ValueError, OSError):
        if on_disk:
            raise
        return found, None, {}
    targets = names_in_model(model, checkpoint.names)
    for name in names:
        module = model.get_submodule(name)
        try:
            parts = find_parts(name, module, targets, checkpoint, places)
        except ValueError:
            if name in on_disk:
                raise
            continue
        if name in on_disk or (parts.dtype == module.weight.dtype and parts.saved_as is None):
            found[name] = parts
    return found, checkpoint, places


def _commit_of(model: Any) -> str | None:
    return getattr(model.config, "_commit_hash", None)


def _check_same_rows(weight: torch.Tensor, parts: TableParts, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ValueError: the files have other rows than the model.
    """
    first = 0
    for tensor, rows in zip(parts.tensors, parts.rows):
        of_file = TableFile(checkpoint.file_of[tensor]).tensor(tensor)
        ours = weight.detach()[first : first + rows]
        for mine, theirs in zip(ours.split(ROWS_COMPARED), of_file.split(ROWS_COMPARED)):
            if not torch.equal(mine.cpu().view(torch.uint8), theirs.to(weight.dtype).view(torch.uint8)):
                raise ValueError(
                    f"{parts.name} has other rows than {checkpoint.where}, so it cannot live on disk there. Save the "
                    "model with save_pretrained, and load that folder with load_with_tables."
                )
        first += rows

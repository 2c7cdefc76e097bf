"""A checkpoint written anew with other blocks, one block at a time, so that it may be larger than memory."""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..modeling.checkpoint_loading import (
    INDEX_FILE,
    Checkpoint,
    check_saved_config,
    find_checkpoint,
    read_headers,
    unseen_fields,
)
from ..modeling.checkpoint_saving import WrittenTables, link_file, publish, publishing, staging
from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import (
    TensorContent,
    file_digest,
    read_json,
    refuse_outside,
    write_file,
    write_pieces,
)
from ..modeling.table_blocks import parse_block_name, parse_changed_name
from .checking import Part, backbone_config, check_loadable, read_config


# What a Trainer leaves in the folder of a model.
TRAINING_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state*.pth",
    "row-state-*.safetensors",
)


def open_folder(source: Path, target: Path) -> tuple[Part, Any]:
    """The checkpoint in a folder that is to be rewritten into another one, and its config.

    Raises:
        ValueError: source and target are one folder; the source could not be loaded, or has no tables, or a link in it
            leads elsewhere; the target has weights.
        FileNotFoundError: the source has no safetensors files or no config.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the source itself, which is not changed; name another folder.")
    checkpoint = find_checkpoint(str(source), {"local_files_only": True}) if source.is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(
            f"{source} is not a folder with the safetensors files of a model and their model.safetensors.index.json."
        )
    if not checkpoint.blocks():
        raise ValueError(
            f"{source} holds no tables. If they were saved to a folder of their own, load the model with tables_from=, "
            "save it once with save_pretrained(folder), and start from that folder."
        )
    refuse_weights(target)
    config = read_config(source)
    part = Part(checkpoint, read_headers(checkpoint))
    check_loadable([part], config)
    # What is written promises it anew.
    check_saved_config(backbone_config(config), checkpoint)
    for path in sorted(set(checkpoint.file_of.values())):
        refuse_outside(source, path)
        if path.parent != source:
            raise ValueError(
                f"{path} lies in a folder below {source}. Load the model, save it once with save_pretrained(folder), "
                "and start from that folder."
            )
    return part, config


def refuse_weights(target: Path) -> None:
    """
    Raises:
        ValueError: a folder that is to be written has weights already.
    """
    there = sorted(path.name for path in target.glob("*.safetensors*"))
    if there:
        raise ValueError(
            f"{target} holds weights already ({there[0]}{', ...' if len(there) > 1 else ''}), which would be replaced. "
            "Name a folder that is new or empty, or remove that one first."
        )


def rewrite_blocks(
    checkpoint: Checkpoint,
    config: Any,
    source: Path,
    target: Path,
    content_of: Callable[[TableFile, str], TensorContent | None],
    config_content: dict | None = None,
    left_out: Collection[str] = (),
) -> None:
    """Write a checkpoint with other blocks. Whatever else the folder holds is copied or linked.

    Args:
        checkpoint, config: as `open_folder` gives them.
        source: folder that they are in.
        target: folder to write.
        content_of: for a block of a file, what takes its place; None keeps it.
        config_content: of config.json, where it is another one.
        left_out: names of files that are neither copied nor linked.

    Raises:
        ValueError: a file holds tables and other tensors; a file that is read is not what the index promises; or a
            link leads out of the folder.
        OSError: no space or no permission in the target.
    """
    files = sorted(set(checkpoint.file_of.values()))
    beside = files_beside(source, {path.name for path in files} | {INDEX_FILE, *left_out}, target)
    with publishing(target), staging(target) as stage:
        table_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        backbone: dict[str, str] = {}
        for path in files:
            names = [name for name, file in checkpoint.file_of.items() if file == path]
            names = [name for name in names if parse_changed_name(name) is None]
            blocks = [name for name in names if parse_block_name(name) is not None]
            if blocks and len(blocks) != len(names):
                raise ValueError(f"{path} holds tables and other tensors; load the model and save it once first.")
            file = TableFile(path)
            contents = {name: content_of(file, name) for name in blocks}
            is_rewritten = any(content is not None for content in contents.values())
            if is_rewritten:
                whole = {name: content or file.content(name) for name, content in contents.items()}
                digests[path.name] = write_file(stage / path.name, whole)
            elif names:
                digests[path.name] = link_file(path, stage / path.name)
            if is_rewritten or not names:
                _refuse_other_bytes(checkpoint, path)
            (table_map if blocks else backbone).update(dict.fromkeys(names, path.name))
        for path in beside:
            copy = stage / path.name if path.parent == source else target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        content = read_json(source / "config.json") if config_content is None else config_content
        _write_json(stage / "config.json", dict(sorted(content.items())))
        _write_json(stage / INDEX_FILE, {"metadata": {}, "weight_map": backbone})
        facts = {"engram_fingerprint": config.engram_fingerprint, "config": unseen_fields(backbone_config(config))}
        publish(stage, target, WrittenTables(table_map, digests), facts)


def _write_json(path: Path, content: dict) -> None:
    write_pieces(path, [f"{json.dumps(content, indent=2)}\n".encode()])


def _refuse_other_bytes(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a file with other bytes than its index promises: what is made of it would be promised anew."""
    promised = checkpoint.metadata.get("sha256", {}).get(path.name)
    if promised is not None and file_digest(path) != promised:
        raise ValueError(
            f"{path} is not what the index of {checkpoint.where} promises, so nothing was written. Download or copy it "
            "again."
        )


def files_beside(source: Path, weights: set[str], target: Path) -> list[Path]:
    """Files that belong to the model and are not its weights: those beside them, and those in folders below.

    What a training run needs to go on is left out, and so are hidden folders, and folders with weights of their own.

    Raises:
        ValueError: a file is a link that leads out of the folder.
    """
    own = (target.resolve(), *target.resolve().parents)
    found = []
    for path in sorted(source.iterdir()):
        if path.is_file():
            is_left_out = path.name in weights or any(map(path.match, TRAINING_FILES))
            found += [] if is_left_out else [path]
        elif path.is_dir() and not path.name.startswith(".") and path.resolve() not in own:
            inside = [each for each in sorted(path.rglob("*")) if each.is_file()]
            found += [] if any(each.suffix == ".safetensors" for each in inside) else inside
    for path in found:
        refuse_outside(source, path)
    return found

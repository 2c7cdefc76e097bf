"""A checkpoint written anew with other blocks, one at a time, so that its size is of no account."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ..hub.uploading import TRAINING_FILES
from ..modeling.checkpoint_loading import BLOCK_KEY, INDEX_FILE, Checkpoint, find_checkpoint, read_headers
from ..modeling.checkpoint_saving import WrittenTables, link_file, publish, staging
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import TensorContent, write_file
from ..modeling.table_blocks import CHANGED_KEY


def open_folder(source: Path, target: Path) -> Checkpoint:
    """The checkpoint in a folder, which is not the one to write; it has tables, and the other one has no weights yet.

    Raises:
        ValueError: source and target are one folder; no tables are in the source; weights are in the target.
        FileNotFoundError: no safetensors files are there.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the source itself, which is to stay as it is; name another folder.")
    checkpoint = find_checkpoint(str(source), {"local_files_only": True}) if source.is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(f"{source} is no folder with the safetensors files of a model.")
    if not checkpoint.blocks():
        raise ValueError(
            f"{source} holds no tables. If they were saved to a folder of their own, load the model with tables_from=, "
            "save it once with save_pretrained(folder), and start from that folder."
        )
    there = sorted(path.name for path in target.glob("*.safetensors*"))
    if there:
        raise ValueError(
            f"{target} holds weights already ({there[0]}{', ...' if len(there) > 1 else ''}), which would be replaced. "
            "Name a folder that is new or empty, or remove that one first."
        )
    return checkpoint


def rewrite_blocks(
    checkpoint: Checkpoint,
    source: Path,
    target: Path,
    content_of: Callable[[TableFile, str], TensorContent | None],
    config_changes: dict,
) -> None:
    """Write a checkpoint with other blocks, and whatever else it holds as it is.

    Args:
        checkpoint, source: what is there.
        target: folder to write.
        content_of: for the tensor of a file what takes its place; None for the same.
        config_changes: fields of config.json that become other ones.

    Raises:
        ValueError: a file holds tables and other tensors.
    """
    config = EngramMoEConfig.from_pretrained(source)
    read_headers(checkpoint)
    with staging(target) as stage:
        _copy_rest(source, stage, {path.name for path in checkpoint.file_of.values()}, config_changes)
        table_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        backbone: dict[str, str] = {}
        for path in sorted(set(checkpoint.file_of.values())):
            names = [name for name, file in checkpoint.file_of.items() if file == path and not CHANGED_KEY.match(name)]
            blocks = [name for name in names if BLOCK_KEY.match(name)]
            if not names:
                continue
            if blocks and len(blocks) != len(names):
                raise ValueError(f"{path} holds tables and other tensors; load the model and save it once first.")
            file = TableFile(path)
            contents = {name: content_of(file, name) for name in blocks}
            if any(content is not None for content in contents.values()):
                whole = {name: content or file.content(name) for name, content in contents.items()}
                digests[path.name] = write_file(stage / path.name, whole)
            else:
                digests[path.name] = link_file(path, stage / path.name)
            (table_map if blocks else backbone).update(dict.fromkeys(names, path.name))
        (stage / INDEX_FILE).write_text(json.dumps({"weight_map": backbone}))
        _copy_folders(source, target)
        publish(stage, target, WrittenTables(table_map, digests), config)


def _copy_folders(source: Path, target: Path) -> None:
    """Folders that belong to the model, such as additional_chat_templates: none with weights, none that is hidden."""
    for path in sorted(source.iterdir()):
        is_of_model = path.is_dir() and not path.name.startswith(".") and not any(path.rglob("*.safetensors"))
        if is_of_model and path.resolve() not in (target.resolve(), *target.resolve().parents):
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def _copy_rest(source: Path, stage: Path, weights: set[str], config_changes: dict) -> None:
    # What is written anew is no place to resume training from.
    for path in source.iterdir():
        is_left_out = path.name in weights or path.name == INDEX_FILE or any(map(path.match, TRAINING_FILES))
        if path.is_file() and not is_left_out:
            shutil.copyfile(path, stage / path.name)
    content = json.loads((source / "config.json").read_text())
    (stage / "config.json").write_text(json.dumps({**content, **config_changes}, indent=2, sort_keys=True) + "\n")

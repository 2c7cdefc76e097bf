"""A checkpoint pushed with its card; its tables beside it, or in a repository of their own that the config names."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.utils import logging

from ..insight.plotting import plot_training
from ..modeling.engram_loading import BLOCK_KEY, INDEX_FILE, find_checkpoint
from ..modeling.engram_uploading import CARD_FILE, UploadFile, card_of, files_to_upload, upload_files
from ..modeling.safetensors_files import read_header, read_index
from .card import update_card
from .card_facts import CardFacts
from .card_gathering import gather_facts
from .verifying import check_tokenizer, read_tokenizer


logger = logging.get_logger(__name__)
CURVES_FILE = "training.png"
TABLES_CARD = """---
library_name: transformers
tags:
- engram
---

Tables of [{repo_id}](https://huggingface.co/{repo_id}), whose config names a commit of this repository. Load that one.
"""
# Stands in a dry run for the commit that the push will make.
NO_COMMIT = "0" * 40


@dataclass(frozen=True, repr=False)
class Push:
    """What is pushed: files by repository, in the order of the commits, and the commits; none after a dry run.

    Printed, it is a line for every file with its bytes.
    """

    files: dict[str, list[UploadFile]]
    commits: dict[str, CommitInfo]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes by file by repository, and the address of each commit."""
        sizes = {repo_id: {file.name: file.nbytes for file in files} for repo_id, files in self.files.items()}
        return {"files": sizes, "commits": {repo_id: commit.commit_url for repo_id, commit in self.commits.items()}}

    def __repr__(self) -> str:
        sizes = self.as_dict()["files"]
        lines = [f"{size:>18,} bytes  {repo_id}/{name}" for repo_id in sizes for name, size in sizes[repo_id].items()]
        total = sum(sum(files.values()) for files in sizes.values())
        return "\n".join([*lines, f"{total:>18,} bytes  in {len(lines)} files"])


def push_engram(
    model,
    repo_id: str,
    tables_repo: str | None = None,
    *,
    tokenizer=None,
    card: dict | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    max_shard_size: str | int = "5GB",
    dry_run: bool = False,
) -> Push:
    """Push a model or the folder of one: weights, tables, code, config, tokenizer and a card, in one commit.

    A reader never sees an index without its files: tables that have a repository of their own are committed first, and
    the config names that commit. After a break, call it again: files that are there are not sent again.

    Args:
        model: a model, or the folder of a checkpoint, from which files are sent as they are. A model is saved to a
            temporary folder first; for tables of many gigabytes, save it where there is room and give that folder.
        repo_id: repository, made where there is none. Its README is edited in our section only.
        tables_repo: repository for the tables, if they are not to lie beside the backbone.
        tokenizer: to go with the model; by default the one in the folder, or where the model was loaded from.
        card: facts that a checkpoint does not hold, as `gather_facts` takes them: training, data, evaluation, license,
            base_model. Of a training run, curves are drawn, unless a picture is named.
        token, private, revision, create_pr, commit_message, max_shard_size: as in `push_to_hub`.
        dry_run: send nothing. What is returned lists every file with its size, `print` shows it.

    Raises:
        FileNotFoundError, ValueError: the folder holds no whole checkpoint; files are damaged, or too large; the
            tokenizer is another one than the model's.
        OSError: of the connection, or of rights; what was committed before stays.

    Example:
        >>> push_engram("output/tiny", "user/engram-tiny", card={"license": "apache-2.0"}, dry_run=True)
    """
    if tables_repo == repo_id:
        raise ValueError(f"tables_repo is {repo_id} itself; leave it out to keep tables beside the backbone.")
    target: dict[str, Any] = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
    with tempfile.TemporaryDirectory() as scratch:
        folder, files = _files(model, tokenizer, max_shard_size, Path(scratch))
        config = json.loads((folder / "config.json").read_text())
        _check_tables(folder, config, tables_repo)
        facts = gather_facts(folder, repo_id=repo_id, tables_repo=tables_repo, **(card or {}))
        added = _curves(card or {}, Path(scratch))
        facts = replace(facts, picture=added[0].name) if added else facts
        existing = None if dry_run else card_of(repo_id, revision, token)
        added.append(UploadFile(CARD_FILE, _card(folder, facts, existing)))
        push = Push({}, {})
        if tables_repo is not None:
            config |= {"engram_tables_repo": None, "engram_tables_revision": None}
            tables, files = _split(files, folder)
            push.files[tables_repo] = [*tables, _json("config.json", config)]
            if dry_run or card_of(tables_repo, revision, token) is None:
                readme = UploadFile(CARD_FILE, TABLES_CARD.format(repo_id=repo_id).encode())
                push.files[tables_repo].append(readme)
            if not dry_run:
                message = f"{commit_message} (tables of {repo_id})"
                push.commits[tables_repo] = upload_files(
                    tables_repo, push.files[tables_repo], commit_message=message, **target
                )
            commit = NO_COMMIT if dry_run else push.commits[tables_repo].oid
            config |= {"engram_tables_repo": tables_repo, "engram_tables_revision": commit}
            added.append(_json("config.json", config))
        replaced = {file.name for file in added}
        push.files[repo_id] = [*(file for file in files if file.name not in replaced), *added]
        if not dry_run:
            push.commits[repo_id] = upload_files(repo_id, push.files[repo_id], commit_message=commit_message, **target)
    return push


def _curves(card: dict, scratch: Path) -> list[UploadFile]:
    """A picture of the training run, where one is named and no picture of it is."""
    if card.get("training") is None or card.get("picture") is not None:
        return []
    try:
        return [UploadFile(CURVES_FILE, plot_training(card["training"], scratch / CURVES_FILE))]
    except (ImportError, ValueError) as error:
        logger.warning(f"The card shows no curves: {error}")
        return []


def _check_tables(folder: Path, config: dict, tables_repo: str | None) -> None:
    """
    Raises:
        ValueError: the folder holds no tables, and names no repository that does.
    """
    checkpoint = find_checkpoint(str(folder), {"local_files_only": True})
    has_tables = checkpoint is not None and bool(checkpoint.blocks())
    if config.get("engram_layer_ids") and not has_tables:
        named = config.get("engram_tables_repo")
        if named is None or tables_repo is not None:
            raise ValueError(
                f"{folder} holds no tables{'' if named is None else f', they are in {named}'}. Load the model (with "
                "tables_from=, where they lie in a folder of their own), and push the model itself."
            )


def _card(folder: Path, facts: CardFacts, existing: bytes | None) -> bytes:
    """The README that there is, or the folder's, with our section in it; or a new one."""
    if existing is None and (folder / CARD_FILE).is_file():
        existing = (folder / CARD_FILE).read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CARD_FILE
        if existing is not None:
            path.write_bytes(existing)
        update_card(path, facts)
        return path.read_bytes()


def _files(model, tokenizer, max_shard_size, scratch: Path) -> tuple[Path, list[UploadFile]]:
    """The folder of the checkpoint, which is made where a model is given, and its files, with the tokenizer's."""
    if not isinstance(model, str | Path):
        folder = scratch / "model"
        tokenizer = model.tokenizer_to_push(tokenizer)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder, files_to_upload(folder)
    folder = Path(model)
    files = {file.name: file for file in files_to_upload(folder)}
    if tokenizer is None and "tokenizer_config.json" not in files:
        logger.warning(f"{folder} holds no tokenizer, so none is pushed. Give it as push_engram(..., tokenizer=...).")
        return folder, list(files.values())
    check_tokenizer(folder, tokenizer or read_tokenizer(folder))
    if tokenizer is None:
        return folder, list(files.values())
    tokenizer.save_pretrained(scratch / "tokenizer")
    files |= {path.name: UploadFile(path.name, path) for path in (scratch / "tokenizer").iterdir()}
    return folder, list(files.values())


def _split(files: list[UploadFile], folder: Path) -> tuple[list[UploadFile], list[UploadFile]]:
    """The files of the tables and those of the backbone, each with an index of its own.

    Raises:
        ValueError: a file holds blocks and other tensors.
    """
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder} has no {INDEX_FILE}; load the model and save it once with save_pretrained.")
    index = read_index(folder / INDEX_FILE)
    weights = set(index["weight_map"].values())
    blocks = {tensor: file for tensor, file in index["weight_map"].items() if BLOCK_KEY.match(tensor)}
    others = {tensor: file for tensor, file in index["weight_map"].items() if tensor not in blocks}
    if mixed := set(blocks.values()) & set(others.values()):
        raise ValueError(f"{sorted(mixed)[0]} holds tables and other tensors; load the model and save it once first.")
    tables = [file for file in files if file.name in blocks.values()]
    backbone = [file for file in files if file.name not in blocks.values() and file.name != INDEX_FILE]

    def part(weight_map: dict[str, str], part_files: list[UploadFile]) -> UploadFile:
        own = [file for file in part_files if file.name in weights]
        metadata = {
            **(index.get("metadata") or {}),
            "total_size": sum(place.nbytes for file in own for place in read_header(folder / file.name).values()),
            "sha256": {file.name: file.promised for file in own if file.promised is not None},
        }
        return _json(INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})

    return [*tables, part(blocks, tables)], [*backbone, part(others, backbone)]


def _json(name: str, content: dict) -> UploadFile:
    return UploadFile(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

"""`push_engram`: a checkpoint with its card in one commit, its tables beside it or in a repository of their own.

`model.push_to_hub` and `trainer.push_to_hub` are those of transformers. They neither check files nor write this card.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer
from transformers.utils import logging

from ..adapters.memory_files import MODEL_TYPE
from ..checkpoints.verifying import TOKENIZER_FILES, check_tokenizer, read_tokenizer
from ..insight.memory_layers import memory_of
from ..insight.plotting import plot_training
from ..modeling.checkpoint_loading import BLOCK_KEY, INDEX_FILE, find_checkpoint
from ..modeling.disk_safetensors import read_header, read_index, read_json
from .card import facts_in, gather_facts, keep_known, read_card, updated_card
from .uploading import (
    CARD_FILE,
    INDEX_FILES,
    Repository,
    UploadFile,
    files_beside,
    files_to_upload,
    open_repository,
    prepare,
    refuse_model_in_repository,
    upload,
)


logger = logging.get_logger(__name__)
CURVES_FILE = "training.png"
# What `card=` of a push may hold.
CARD_FACTS = {"training", "data", "evaluation", "ablation", "license", "base_model", "name", "limits"}
CARD_FACTS |= {"picture", "gates"}
TABLES_CARD = """---
library_name: transformers
tags:
- engram
---

Tables of [{repo_id}](https://huggingface.co/{repo_id}). Load that repository: its config names a commit of this one.
"""
# In a dry run this stands for the commit that a push would make.
NO_COMMIT = "0" * 40


@dataclass(frozen=True, repr=False)
class Push:
    """The files by repository, in the order of the commits, and the commits; there are none after a dry run.

    Printed, it is one line for each file, with its bytes.
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
    """Push a model, or the folder of a checkpoint: weights, tables, code, config, tokenizer and card in one commit.

    A reader never sees an index without its files. Tables in a repository of their own are committed first, and the
    config names that commit. If a push breaks off, call it again: files that arrived are not sent again.

    If a process group is initialised, call this on every rank. Rank 0 pushes; the others return an empty `Push`.

    Args:
        model: a model, or a folder, whose files are sent as they are: that of a model, or of a memory that was saved
            alone with `save_engram`. A model is saved to a temporary folder first. If
            its tables are large, save it to a disk with room and give that folder.
        repo_id: repository; it is created if it does not exist. Only our section of its README is changed.
        tables_repo: repository for the tables, if they should not lie beside the backbone.
        tokenizer: goes with the model; by default the one in the folder, or where the model was loaded from.
        card: facts that a checkpoint does not hold, as arguments of `gather_facts`: training, data, evaluation,
            ablation, license, base_model, name, picture, gates, limits. Without a picture, the curves of `training` are
            drawn.
        token, private, revision, create_pr, commit_message, max_shard_size: as in `push_to_hub`.
        dry_run: send nothing. Print the result to see every file with its size.

    Raises:
        FileNotFoundError, ValueError: the folder holds no whole checkpoint; a file is damaged, too large or outside the
            folder; the tokenizer is not the model's.
        OSError, huggingface_hub.errors.HTTPError: the connection broke or a right is missing. Commits that were made
            stay.

    Example:
        >>> plan = push_engram("output/tiny", "user/engram-tiny", card={"license": "apache-2.0"}, dry_run=True)
        >>> list(plan.files)
        ['user/engram-tiny']
    """
    card = card or {}
    for name in filter(None, (repo_id, tables_repo)):
        validate_repo_id(name)
    if unknown := sorted(set(card) - CARD_FACTS):
        raise ValueError(f"card may hold {', '.join(sorted(CARD_FACTS))}, but not {unknown[0]}.")
    target: dict[str, Any] = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder, tokenizer = _save(model, tokenizer, max_shard_size, scratch)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return Push({}, {})
        files = _files(folder, tokenizer, scratch)
        config = read_json(folder / "config.json")
        _check_tables(folder, config, tables_repo)
        tables: list[UploadFile] = []
        if tables_repo is not None:
            config |= {"engram_tables_repo": None, "engram_tables_revision": None}
            files, tables = _split([file for file in files if file.name != "config.json"], folder)
            # Without classes: tables alone are not a model.
            of_tables = {key: value for key, value in config.items() if key not in ("architectures", "auto_map")}
            tables.append(_json("config.json", of_tables))
        files += _curves(card, scratch)
        # Every file is read and compared with its digest before a repository is created.
        additions, table_additions = ([], []) if dry_run else (prepare(files), prepare(tables))

        repository = None if dry_run else open_repository(repo_id, **target)
        tables_repository = None if dry_run or tables_repo is None else open_repository(tables_repo, **target)
        # The Hub adds the user's namespace to a bare name.
        repo_id = repo_id if repository is None else repository.repo_id
        tables_repo = tables_repo if tables_repository is None else tables_repository.repo_id
        if tables_repo == repo_id:
            raise ValueError(f"tables_repo is {repo_id} itself. Leave it out to keep tables beside the backbone.")
        if tables_repository is not None:
            refuse_model_in_repository(tables_repository)
        late = [_card(folder, card, repo_id, tables_repo, repository, files)]

        push = Push({}, {})
        if tables_repo is not None:
            if tables_repository is None or CARD_FILE not in tables_repository.files:
                tables.append(UploadFile(CARD_FILE, TABLES_CARD.format(repo_id=repo_id).encode()))
                table_additions += prepare(tables[-1:])
            push.files[tables_repo] = tables
            if tables_repository is not None:
                message = f"{commit_message} (tables of {repo_id})"
                push.commits[tables_repo] = upload(tables_repository, table_additions, message)
            commit = NO_COMMIT if dry_run else push.commits[tables_repo].oid
            config |= {"engram_tables_repo": tables_repo, "engram_tables_revision": commit}
            late.append(_json("config.json", config))
        push.files[repo_id] = files + late
        if repository is not None:
            push.commits[repo_id] = upload(repository, additions + prepare(late), commit_message)
    return push


def _save(model, tokenizer, max_shard_size: str | int, scratch: Path) -> tuple[Path, Any]:
    """The folder to push and the tokenizer to add to it. All ranks save, since a model may be spread over them."""
    if isinstance(model, str | Path):
        return Path(model), tokenizer
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "This model has an adapter. Its own push_to_hub pushes the adapter. To push the whole model, merge the "
            "adapter (merge_and_unload) and push the result."
        )
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
        except (OSError, ValueError):
            logger.debug(f"No tokenizer lies in {model.name_or_path!r}.")
    ngram_hash, _ = memory_of(model)
    if tokenizer is not None and ngram_hash is not None and ngram_hash.token_map is not None:
        model.bind_tokenizer(tokenizer)
    model.save_pretrained(scratch / "model", max_shard_size=max_shard_size)
    return scratch / "model", tokenizer


def _files(folder: Path, tokenizer, scratch: Path) -> list[UploadFile]:
    """The files of the checkpoint and of its tokenizer; the card is made later."""
    files = {file.name: file for file in files_to_upload(folder) if file.name != CARD_FILE}
    if tokenizer is not None:
        check_tokenizer(folder, tokenizer)
        tokenizer.save_pretrained(scratch / "tokenizer")
        files |= {file.name: file for file in files_beside(scratch / "tokenizer")}
    elif TOKENIZER_FILES & set(files):
        check_tokenizer(folder, read_tokenizer(folder))
    else:
        logger.warning("The model has no tokenizer beside it, so none is pushed. Pass push_engram(..., tokenizer=...).")
    return list(files.values())


def _check_tables(folder: Path, config: dict, tables_repo: str | None) -> None:
    """
    Raises:
        ValueError: the folder holds no tables, and names no repository that does.
    """
    if config.get("model_type") == MODEL_TYPE:
        if tables_repo is not None:
            raise ValueError(f"An added memory keeps its tables beside it. Leave tables_repo={tables_repo!r} out.")
        return
    if not config.get("engram_layer_ids"):
        if tables_repo is not None:
            raise ValueError(f"{folder} is a model without memory layers: it has no tables for {tables_repo}.")
        return
    checkpoint = find_checkpoint(str(folder), {"local_files_only": True})
    named = config.get("engram_tables_repo")
    if not (checkpoint and checkpoint.blocks()) and (named is None or tables_repo is not None):
        raise ValueError(
            f"{folder} holds no tables{'' if named is None else f', they are in {named}'}. Load the model (with "
            "tables_from=, if they lie in a folder of their own), and push the model itself."
        )


def _split(files: list[UploadFile], folder: Path) -> tuple[list[UploadFile], list[UploadFile]]:
    """The files of the backbone and those of the tables, each with an index of its own.

    Raises:
        ValueError: there is no index, or a file holds blocks and other tensors.
    """
    indices = {path.name: read_index(path) for path in sorted(folder.glob(INDEX_FILES))}
    if not indices:
        raise ValueError(f"{folder} has no {INDEX_FILE}. Load the model and save it once with save_pretrained.")
    named = [entry for index in indices.values() for entry in index["weight_map"].items()]
    tables = {file for tensor, file in named if BLOCK_KEY.match(tensor)}
    if mixed := sorted(tables & {file for tensor, file in named if not BLOCK_KEY.match(tensor)}):
        raise ValueError(f"{mixed[0]} holds tables and other tensors. Load the model and save it once first.")

    def part(index: dict, is_tables: bool) -> dict:
        weight_map = {tensor: file for tensor, file in index["weight_map"].items() if (file in tables) is is_tables}
        own, metadata = sorted(set(weight_map.values())), {**(index.get("metadata") or {})}
        digests = metadata.get("sha256") or {}
        metadata["total_size"] = sum(place.nbytes for file in own for place in read_header(folder / file).values())
        metadata["sha256"] = {file: digests[file] for file in own if file in digests}
        return {"metadata": metadata, "weight_map": weight_map}

    rest = [file for file in files if file.name not in indices]
    return (
        [file for file in rest if file.name not in tables] + [_json(n, part(i, False)) for n, i in indices.items()],
        [file for file in rest if file.name in tables] + [_json(n, part(i, True)) for n, i in indices.items()],
    )


def _json(name: str, content: dict) -> UploadFile:
    return UploadFile(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _curves(card: dict, scratch: Path) -> list[UploadFile]:
    """A picture of the training run, if `card` names the run and no picture."""
    if card.get("training") is None or card.get("picture") is not None:
        return []
    try:
        return [UploadFile(CURVES_FILE, plot_training(card["training"], scratch / CURVES_FILE))]
    except (ImportError, ValueError) as error:
        logger.warning(f"The card shows no curves: {error}")
        return []


def _card(
    folder: Path,
    card: dict,
    repo_id: str,
    tables_repo: str | None,
    repository: Repository | None,
    files: list[UploadFile],
) -> UploadFile:
    """The README of the repository, else of the folder, else a new one, with our section."""
    facts = gather_facts(folder, repo_id=repo_id, tables_repo=tables_repo, **card)
    there = {file.name for file in files}
    if card.get("training") is not None and card.get("picture") is None and CURVES_FILE in there:
        facts = replace(facts, picture=CURVES_FILE)
    cards: list[tuple[object, bytes]] = [read_card(folder)]
    if repository is not None and (pushed := repository.read(CARD_FILE)) is not None:
        there |= repository.files
        cards.append((f"{CARD_FILE} of {repo_id}", pushed))
    for where, content in cards:
        if (known := facts_in(content, where)) is not None:
            facts = keep_known(facts, known)
    picture, gates = (file if file in there else None for file in (facts.picture, facts.gates))
    facts = replace(facts, picture=picture, gates=gates)
    return UploadFile(CARD_FILE, updated_card(content, facts, where))

"""A checkpoint pushed with its card; its tables beside it, or in a repository of their own that the config names."""

import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer
from transformers.utils import logging

from ..checkpoints.verifying import TOKENIZER_FILES, check_tokenizer, read_tokenizer
from ..insight.plotting import plot_training
from ..modeling.checkpoint_loading import BLOCK_KEY, INDEX_FILE, SINGLE_FILE
from ..modeling.disk_safetensors import read_header, read_index
from .card import update_card
from .card_facts import CardFacts, facts_in
from .card_gathering import gather_facts
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
CARD_FACTS = {"training", "data", "evaluation", "license", "base_model", "name", "picture", "limits"}
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
        OSError, huggingface_hub.errors.HTTPError: of the connection, or of rights; what was committed before stays.

    Example:
        >>> push_engram("output/tiny", "user/engram-tiny", card={"license": "apache-2.0"}, dry_run=True)
    """
    for name in (repo_id, tables_repo):
        if name is not None:
            validate_repo_id(name)
    if unknown := set(card or {}) - CARD_FACTS:
        raise ValueError(f"card may hold {', '.join(sorted(CARD_FACTS))}, and no {sorted(unknown)[0]}.")
    target: dict[str, Any] = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
    with tempfile.TemporaryDirectory() as scratch:
        folder, files = _files(model, tokenizer, max_shard_size, Path(scratch))
        config = json.loads((folder / "config.json").read_text())
        _check_tables(folder, config, tables_repo)
        curves = _curves(card or {}, Path(scratch))
        tables: list[UploadFile] = []
        if tables_repo is not None:
            config |= {"engram_tables_repo": None, "engram_tables_revision": None}
            tables, files = _split(files, folder)
            tables.append(_json("config.json", _config_of_tables(config)))
        files = [
            file for file in files if file.name != CARD_FILE and (tables_repo is None or file.name != "config.json")
        ]
        # Read, and found to be whole, before anything is made or sent.
        ready, ready_tables = prepare([]) if dry_run else prepare(files + curves), prepare([] if dry_run else tables)
        repository = None if dry_run else open_repository(repo_id, **target)
        place_of_tables = None if dry_run or tables_repo is None else open_repository(tables_repo, **target)
        if repository is not None:
            repo_id = repository.repo_id
        if place_of_tables is not None:
            tables_repo = place_of_tables.repo_id
        if tables_repo == repo_id:
            raise ValueError(f"tables_repo is {repo_id} itself; leave it out to keep tables beside the backbone.")
        if place_of_tables is not None:
            refuse_model_in_repository(place_of_tables)
        facts = gather_facts(folder, repo_id=repo_id, tables_repo=tables_repo, **(card or {}))
        facts = replace(facts, picture=curves[0].name) if curves else facts
        readme = UploadFile(CARD_FILE, _card(folder, facts, repository))

        push = Push({}, {})
        if tables_repo is not None:
            if place_of_tables is None or CARD_FILE not in place_of_tables.files:
                tables.append(UploadFile(CARD_FILE, TABLES_CARD.format(repo_id=repo_id).encode()))
                ready_tables += prepare(tables[-1:])
            push.files[tables_repo] = tables
            commit = NO_COMMIT
            if place_of_tables is not None:
                message = f"{commit_message} (tables of {repo_id})"
                push.commits[tables_repo] = upload(place_of_tables, ready_tables, message)
                commit = push.commits[tables_repo].oid
            config |= {"engram_tables_repo": tables_repo, "engram_tables_revision": commit}
            files.append(_json("config.json", config))
            ready += prepare(files[-1:])
        push.files[repo_id] = [*files, *curves, readme]
        if repository is not None:
            push.commits[repo_id] = upload(repository, [*ready, *prepare([readme])], commit_message)
    return push


def _config_of_tables(config: dict) -> dict:
    """The config for a repository of tables: what its rows are, and no classes, which would load no model."""
    return {key: value for key, value in config.items() if key not in ("architectures", "auto_map")}


def _check_tables(folder: Path, config: dict, tables_repo: str | None) -> None:
    """
    Raises:
        ValueError: the folder holds no tables, and names no repository that does.
    """
    tensors = [tensor for index in folder.glob(INDEX_FILES) for tensor in read_index(index)["weight_map"]]
    tensors += [tensor for path in folder.glob(SINGLE_FILE) for tensor in read_header(path)]
    if not config.get("engram_layer_ids") and tables_repo is not None:
        raise ValueError(f"{folder} is a model without memory layers: it has no tables for {tables_repo}.")
    if config.get("engram_layer_ids") and not any(map(BLOCK_KEY.match, tensors)):
        named = config.get("engram_tables_repo")
        if named is None or tables_repo is not None:
            raise ValueError(
                f"{folder} holds no tables{'' if named is None else f', they are in {named}'}. Load the model (with "
                "tables_from=, where they lie in a folder of their own), and push the model itself."
            )


def _curves(card: dict, scratch: Path) -> list[UploadFile]:
    """A picture of the training run, where one is named and no picture of it is."""
    if card.get("training") is None or card.get("picture") is not None:
        return []
    try:
        return [UploadFile(CURVES_FILE, plot_training(card["training"], scratch / CURVES_FILE))]
    except (ImportError, ValueError) as error:
        logger.warning(f"The card shows no curves: {error}")
        return []


def _card(folder: Path, facts: CardFacts, repository: Repository | None) -> bytes:
    """The README that the repository has, else the folder's, with our section in it; or a new one."""
    existing = None if repository is None else repository.read(CARD_FILE)
    if existing is None and (folder / CARD_FILE).is_file():
        existing = (folder / CARD_FILE).read_bytes()
    elif existing is not None and repository is not None:
        facts = _with_earlier_facts(facts, facts_in(existing.decode("utf-8", "replace")), repository.files)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CARD_FILE
        if existing is not None:
            path.write_bytes(existing)
        update_card(path, facts)
        return path.read_bytes()


def _with_earlier_facts(facts: CardFacts, earlier: CardFacts | None, files: Collection[str]) -> CardFacts:
    """The facts, with those of the last push that are not given again: all where the weights are the same, otherwise
    those that are not of the weights."""
    if earlier is None:
        return facts
    kept: dict[str, Any] = {"license": earlier.license, "base_model": earlier.base_model}
    of_weights = {name: getattr(earlier, name) for name in ("data", "training", "evaluation", "limits")}
    if earlier.picture in files:
        of_weights["picture"] = earlier.picture
    if earlier.weights is not None and earlier.weights == facts.weights:
        kept |= of_weights
    elif lost := sorted(name for name, value in of_weights.items() if value and not getattr(facts, name)):
        logger.warning(
            f"The weights are other ones than those that the card was written for, so it says nothing any more of "
            f"{', '.join(lost)}. Give what holds for them too: push_engram(..., card={{...}})."
        )
    return replace(facts, **{name: value for name, value in kept.items() if value and not getattr(facts, name)})


def _files(model, tokenizer, max_shard_size, scratch: Path) -> tuple[Path, list[UploadFile]]:
    """The folder of the checkpoint, which is made where a model is given, and its files, with the tokenizer's."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "This model has an adapter. Its own push_to_hub pushes the adapter; to push the whole model, merge it "
            "(merge_and_unload) and push what that gives."
        )
    if not isinstance(model, str | Path):
        folder = scratch / "model"
        tokenizer = _tokenizer_of(model, tokenizer)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder, files_to_upload(folder)
    folder = Path(model)
    files = {file.name: file for file in files_to_upload(folder)}
    if tokenizer is None and not TOKENIZER_FILES & set(files):
        logger.warning(f"{folder} holds no tokenizer, so none is pushed. Give it as push_engram(..., tokenizer=...).")
        return folder, list(files.values())
    check_tokenizer(folder, tokenizer or read_tokenizer(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch / "tokenizer")
        files |= {file.name: file for file in files_beside(scratch / "tokenizer")}
    return folder, list(files.values())


def _tokenizer_of(model, tokenizer):
    """The given tokenizer, or the one beside the weights that the model was loaded from; None, with a warning, if there
    is neither."""
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
        except (OSError, ValueError):
            logger.warning(
                "There is no tokenizer where this model was loaded from, so none is pushed. Give it as "
                "push_engram(..., tokenizer=tokenizer)."
            )
            return None
    if model.config.engram_layer_ids and model.base_model.ngram_hash.token_map is not None:
        model.bind_tokenizer(tokenizer)
    return tokenizer


def _split(files: list[UploadFile], folder: Path) -> tuple[list[UploadFile], list[UploadFile]]:
    """The files of the tables and those of the backbone, each with an index of its own.

    Raises:
        ValueError: there is no index, or a file holds blocks and other tensors.
    """
    indices = {path.name: read_index(path) for path in sorted(folder.glob(INDEX_FILES))}
    if not indices:
        raise ValueError(f"{folder} has no {INDEX_FILE}; load the model and save it once with save_pretrained.")
    tables = {f for index in indices.values() for t, f in index["weight_map"].items() if BLOCK_KEY.match(t)}
    others = {f for index in indices.values() for t, f in index["weight_map"].items() if not BLOCK_KEY.match(t)}
    if mixed := tables & others:
        raise ValueError(f"{sorted(mixed)[0]} holds tables and other tensors; load the model and save it once first.")

    def part(index: dict, names: set[str]) -> dict:
        weight_map = {tensor: file for tensor, file in index["weight_map"].items() if file in names}
        own = sorted(set(weight_map.values()))
        metadata = {**(index.get("metadata") or {})}
        digests = metadata.get("sha256") or {}
        metadata["total_size"] = sum(place.nbytes for file in own for place in read_header(folder / file).values())
        metadata["sha256"] = {file: digests[file] for file in own if file in digests}
        return {"metadata": metadata, "weight_map": weight_map}

    of_tables = [file for file in files if file.name in tables]
    of_backbone = [file for file in files if file.name not in tables and file.name not in indices]
    of_tables += [_json(name, part(index, tables)) for name, index in indices.items()]
    return of_tables, of_backbone + [_json(name, part(index, others)) for name, index in indices.items()]


def _json(name: str, content: dict) -> UploadFile:
    return UploadFile(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

"""A checkpoint on its way to the Hub: one commit, made when all large files are there.

A reader of the repository finds the old checkpoint or the new one, never an index without its files. What an upload
that broke has brought is not sent again.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils.hub import hf_api

from .engram_loading import INDEX_FILE, SINGLE_FILE, read_digests
from .row_changes import CHANGED_KEY
from .safetensors_files import read_header, read_weight_map


# What a Trainer leaves in the folder of a model.
TRAINING_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state*.pth",
)
CARD_FILE = "README.md"
# What the Hub recommends as the most for a file.
LARGEST_UPLOAD = 20 * 10**9


@dataclass(frozen=True)
class UploadFile:
    """A file of a repository: its name there, the file or bytes that it is made of, and the SHA-256 that the index of
    the checkpoint promises for it, if it promises one."""

    name: str
    content: Path | bytes
    promised: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def files_to_upload(folder: str | Path) -> list[UploadFile]:
    """The files of a checkpoint's folder that belong on the Hub: weights that an index names, and what lies beside them
    but for what a Trainer needs to go on.

    Raises:
        FileNotFoundError: no checkpoint is there, or not all of one.
        ValueError: a file is damaged or too large, or rows of a training checkpoint wait to be merged.
    """
    folder = Path(folder)
    indices = sorted(folder.glob("model.safetensors.index*.json"))
    weight_map = {key: name for index in indices for key, name in read_weight_map(index).items()}
    weights = {*weight_map.values()} or {path.name for path in folder.glob(SINGLE_FILE)}
    if not weights or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder of a checkpoint: it needs config.json and safetensors files. Save the model with "
            "save_pretrained first."
        )
    if any(map(CHANGED_KEY.match, weight_map)):
        raise ValueError(
            f"{folder} is a checkpoint of a training run, with changed rows beside the blocks. Make a model of it with "
            "merge_changed_rows(folder, another_folder) (engram-hf merge), and push that."
        )
    for name in sorted(weights):
        read_header(folder / name)
        if (size := (folder / name).stat().st_size) > LARGEST_UPLOAD:
            raise ValueError(
                f"{folder / name} has {size / 1e9:.1f} GB, and files on the Hub should have at most "
                f"{LARGEST_UPLOAD / 1e9:.0f}. Save with a smaller max_shard_size; where a single block is larger, only "
                "more engram_n_heads or a smaller engram_block_elements help, in a new model."
            )
    digests = read_digests(folder)
    names = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in weights or not _stays_here(path.name))
    ]
    return [UploadFile(name, folder / name, digests.get(name)) for name in names]


def _stays_here(name: str) -> bool:
    is_weight = name.endswith(".safetensors")
    return is_weight or name.startswith(".") or any(fnmatch.fnmatch(name, pattern) for pattern in TRAINING_FILES)


def upload_files(
    repo_id: str,
    files: Iterable[UploadFile],
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a checkpoint in one commit, which also removes the weights of the one that it replaces.

    Run it again after a break: files that are there are not sent again.

    Args:
        repo_id: repository, made where there is none.
        files: of the checkpoint.
        token, private, revision, create_pr, commit_message, commit_description: as in `push_to_hub`.

    Returns:
        the commit; where nothing has changed, the one that was there.

    Raises:
        ValueError: a file is not what the index promises; nothing is committed.
        OSError: of the connection, or of rights.
    """
    api = hf_api()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    before = api.model_info(repo_id, revision=revision, token=token)
    files = list(files)
    additions = [
        CommitOperationAdd(
            path_in_repo=file.name,
            path_or_fileobj=file.content if isinstance(file.content, bytes) else str(file.content),
        )
        for file in files
    ]
    target: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "create_pr": create_pr, "token": token}
    api.preupload_lfs_files(additions=additions, free_memory=False, **target)
    damaged = [
        file.name
        for file, addition in zip(files, additions, strict=True)
        if file.promised not in (None, addition.upload_info.sha256.hex())
    ]
    if damaged:
        raise ValueError(
            f"{', '.join(damaged[:4])}: not what the index of the checkpoint promises, so nothing was committed to "
            f"{repo_id}. Save the model again, or copy the files again (verify_tables names the tensors)."
        )
    there = {sibling.rfilename for sibling in before.siblings or []}
    stale = (_weights_of(repo_id, before.sha, there, token) & there) - {file.name for file in files}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
    operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
    return api.create_commit(
        operations=operations,
        commit_message=commit_message,
        commit_description=commit_description,
        # Another commit meanwhile is an error, and no mixture.
        parent_commit=before.sha,
        **target,
    )


def card_of(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> bytes | None:
    """The README of a repository; None where there is none."""
    try:
        return Path(hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)).read_bytes()
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _weights_of(repo_id: str, commit: str | None, there: set[str], token) -> set[str]:
    """Names of the weight files of a repository. A single file counts: where there is one, no index is looked at."""
    if INDEX_FILE not in there:
        return {SINGLE_FILE}
    try:
        index = hf_hub_download(repo_id, INDEX_FILE, revision=commit, token=token)
    except EntryNotFoundError:
        return {SINGLE_FILE}
    return {SINGLE_FILE, *read_weight_map(index).values()}

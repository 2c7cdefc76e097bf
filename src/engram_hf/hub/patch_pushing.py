"""`push_patch`: a row patch and a card of its own, in one commit."""

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import hf_api

from ..adapters.row_patches import load_patch
from ..modeling.disk_safetensors import file_digest
from ..modeling.table_patches import PATCH_FILE, RowPatch, write_patch
from .card import updated_readme
from .uploading import CARD_FILE, open_repository


def push_patch(
    patch: RowPatch | str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload row patch",
) -> CommitInfo:
    """Push a patch, with a card that says what it is for. A reader finds the old patch with its card, or the new one.

    Args:
        patch: a patch, or its file or folder.
        repo_id: repository; it is created if it does not exist. Only our section of its README is changed.
        base_model: repository of the model that the patch is for; by default the one that the card names.
        license: as the Hub writes it; by default that of the card.
        token, private, revision, create_pr, commit_message: as in `push_to_hub`.

    Returns:
        the commit.

    Raises:
        FileNotFoundError, ValueError: there is no patch, or it is damaged; the README cannot be read.
        OSError, huggingface_hub.errors.HTTPError: the connection broke or a right is missing; nothing is committed.

    Example:
        >>> push_patch(patch, "user/alice", base_model="user/engram-tiny")  # doctest: +SKIP
    """
    validate_repo_id(repo_id)
    patch = load_patch(patch) if isinstance(patch, str | Path) else patch
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PATCH_FILE
        write_patch(patch, file)
        repository = open_repository(repo_id, token, private, revision, create_pr)
        before = repository.read(CARD_FILE) or b""
        values: dict[str, Any] = {
            "patch": patch,
            "repo_id": repository.repo_id,
            "base_model": base_model,
            "license": license,
            "nbytes": file.stat().st_size,
            # The same text in JSON and in Python.
            "name_in_code": json.dumps(patch.name, ensure_ascii=False),
            "file": PATCH_FILE,
            "sha256": file_digest(file),
        }
        given = [name for name in ("base_model", "license") if values[name] is not None]
        where = f"{CARD_FILE} of {repo_id}"
        card = updated_readme(before, where, "patch_card_template.md", values, None, replaced=given)
        operations = [
            CommitOperationAdd(path_in_repo=PATCH_FILE, path_or_fileobj=str(file)),
            CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card),
        ]
        return hf_api().create_commit(
            repository.repo_id,
            operations=operations,
            revision=repository.revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message,
            parent_commit=repository.commit,
        )

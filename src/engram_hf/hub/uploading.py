"""A checkpoint on its way to the Hub: one commit, which is made when all large files have arrived.

A reader of the repository finds the old checkpoint or the new one, never an index without its files. After a broken
upload, files that arrived are not sent again.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, hf_hub_download
from transformers.utils import CHAT_TEMPLATE_DIR, logging
from transformers.utils.hub import hf_api

from ..checkpoints.rewriting import TRAINING_FILES
from ..modeling.checkpoint_loading import BLOCK_KEY, INDEX_FILE, PROGRESS_BYTES, SINGLE_FILE, read_digests
from ..modeling.disk_safetensors import read_header, read_index, read_json, read_weight_map, refuse_outside
from ..modeling.table_blocks import CHANGED_KEY


CARD_FILE = "README.md"
INDEX_FILES = "model.safetensors.index*.json"
# What belongs to a model beside its weights: code, configs, tokenizers, cards, pictures and licences, but no logs, data
# or keys, and no weights that no index names.
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.py", "*.png", "*.jpg", "*.svg", "LICENSE*")
# Weight files of a save without a variant. They are of no use in a repository whose indices do not name them.
NAMED_BY_AN_INDEX = re.compile(
    r"(model-\d{5}-of-\d{5}|tables-layer-\d+-\d{5}-of-\d{5}|rows-layer-\d+(-\d{5}-of-\d{5})?)(\.\d+)?\.safetensors"
)
# The Hub recommends no larger files.
LARGEST_UPLOAD = 20 * 10**9


@dataclass(frozen=True)
class UploadFile:
    """A file of a repository: its name there, the file or bytes to send, and the SHA-256 that the index promises."""

    name: str
    content: Path | bytes
    promised: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Repository:
    """A repository before an upload.

    repo_id: with its namespace. revision: branch; None for the main one. commit: the last one of the branch. files:
    names at that commit. token, create_pr: as in `push_to_hub`.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: frozenset[str]
    token: str | bool | None
    create_pr: bool

    def read(self, name: str) -> bytes | None:
        """A file at that commit; None if it does not exist.

        Raises:
            OSError: it exists and could not be downloaded.
        """
        return None if (path := self._path(name)) is None else path.read_bytes()

    def weight_map(self, index: str) -> dict[str, str]:
        """Tensor name to file name, from an index of the repository; empty if it does not exist."""
        return {} if (path := self._path(index)) is None else read_index(path)["weight_map"]

    def _path(self, name: str) -> Path | None:
        if name not in self.files:
            return None
        return Path(hf_hub_download(self.repo_id, name, revision=self.commit, token=self.token))


def open_repository(
    repo_id: str,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Repository:
    """A repository and its branch. Both are created if they do not exist."""
    api = hf_api()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    found = api.model_info(repo_id, revision=revision, token=token)
    names = frozenset(sibling.rfilename for sibling in found.siblings or [])
    return Repository(repo_id, revision, str(found.sha), names, token, create_pr)


def refuse_model_in_repository(repository: Repository) -> None:
    """Refuse to replace a whole model by tables alone.

    Raises:
        ValueError: the repository holds weights that are not blocks of tables.
    """
    indices = [name for name in repository.files if fnmatch.fnmatch(name, INDEX_FILES)]
    tensors = [tensor for index in indices for tensor in repository.weight_map(index)]
    if SINGLE_FILE in repository.files or not all(map(BLOCK_KEY.match, tensors)):
        raise ValueError(
            f"{repository.repo_id} holds a model, which tables alone would replace. Name another repository for them."
        )


def files_to_upload(folder: str | Path) -> list[UploadFile]:
    """The files of a checkpoint's folder that belong on the Hub: weights that an index names, and code, configs,
    tokenizer, card, pictures and licences.

    Raises:
        FileNotFoundError: there is no checkpoint, or a part of it is missing.
        ValueError: a file is damaged, too large or a link to outside; or changed rows of a training run are not merged.
    """
    folder = Path(folder)
    maps = [read_weight_map(index) for index in sorted(folder.glob(INDEX_FILES))]
    weights = {name for weight_map in maps for name in weight_map.values()}
    weights |= {path.name for path in folder.glob(SINGLE_FILE)}
    if not weights and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter. PEFT's own push_to_hub pushes it. To push the whole model, merge the adapter "
            "(merge_and_unload) and push the result."
        )
    if not weights or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder of a checkpoint: it needs config.json and safetensors files. Save the model with "
            "save_pretrained first."
        )
    read_json(folder / "config.json")
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        raise ValueError(
            f"{folder} holds only a variant, and loaders ask for the weights without one first. Save the model there "
            "without variant= too."
        )
    if any(CHANGED_KEY.match(tensor) for weight_map in maps for tensor in weight_map):
        raise ValueError(
            f"{folder} is a checkpoint of a training run, with changed rows beside the blocks. Make a model of it with "
            "merge_changed_rows(folder, another_folder) (engram-hf merge), and push that."
        )
    for name in sorted(weights):
        read_header(folder / name)
        refuse_outside(folder, folder / name)
        if (size := (folder / name).stat().st_size) > LARGEST_UPLOAD:
            raise ValueError(
                f"{folder / name} has {size / 1e9:.1f} GB, and files on the Hub should have at most "
                f"{LARGEST_UPLOAD / 1e9:.0f}. Save with a smaller max_shard_size. If a single block is larger, make a "
                "new model with more engram_n_heads or a smaller engram_block_elements."
            )
    digests = read_digests(folder)
    return [*(UploadFile(name, folder / name, digests.get(name)) for name in sorted(weights)), *files_beside(folder)]


def files_beside(folder: Path) -> list[UploadFile]:
    """The files of a model that are not weights, with further chat templates, which lie in a folder of their own.

    Raises:
        ValueError: a file is a link to outside of the folder.
    """
    paths = [path for path in folder.iterdir() if any(map(path.match, BESIDE_WEIGHTS)) and path.name[0] != "."]
    paths = [path for path in paths if not any(map(path.match, TRAINING_FILES))]
    paths = sorted(path for path in [*paths, *(folder / CHAT_TEMPLATE_DIR).glob("*.jinja")] if path.is_file())
    for path in paths:
        refuse_outside(folder, path)
    return [UploadFile(path.relative_to(folder).as_posix(), path) for path in paths]


def prepare(files: Iterable[UploadFile]) -> list[CommitOperationAdd]:
    """The parts of a commit. Every file is read and compared with the digest in its index.

    Raises:
        ValueError: a file is not what its index promises.
    """
    files, additions, damaged = list(files), [], []
    total = sum(file.nbytes for file in files if file.promised is not None)
    is_short = total < PROGRESS_BYTES
    with logging.tqdm(total=total, desc="Checking", unit="B", unit_scale=True, disable=is_short) as progress:
        for file in files:
            content = file.content if isinstance(file.content, bytes) else str(file.content)
            additions.append(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=content))
            if file.promised is not None:
                damaged += [file.name] * (file.promised != additions[-1].upload_info.sha256.hex())
                progress.update(file.nbytes)
    if damaged:
        raise ValueError(
            f"{', '.join(damaged[:4])}: not what the index of the checkpoint promises, so nothing was sent. Save the "
            "model again, or copy the files again (verify_tables names the tensors)."
        )
    return additions


def upload(
    repository: Repository, additions: Sequence[CommitOperationAdd], commit_message: str = "Upload model"
) -> CommitInfo:
    """Upload a checkpoint in one commit, which also removes the weights that it replaces.

    Args:
        repository: as `open_repository` found it. If somebody else commits meanwhile, this raises and mixes nothing.
        additions: as `prepare` makes them.
        commit_message: of the commit.

    Returns:
        the commit; if nothing changed, the one that was there.

    Raises:
        OSError, huggingface_hub.errors.HTTPError: the connection broke or a right is missing; nothing is committed.
    """
    new = {addition.path_in_repo for addition in additions}
    indices = [name for name in repository.files if fnmatch.fnmatch(name, INDEX_FILES)]
    replaced = {name for index in indices if index in new for name in repository.weight_map(index).values()}
    kept = {name for index in indices if index not in new for name in repository.weight_map(index).values()}
    # Trainer's push leaves files that no index names any more. A single file is stale too: loaders prefer it.
    unnamed = {name for name in repository.files if NAMED_BY_AN_INDEX.fullmatch(name)}
    stale = ((replaced | unnamed | {SINGLE_FILE}) & repository.files) - kept - new
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
    operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
    return hf_api().create_commit(
        repository.repo_id,
        operations=operations,
        revision=repository.revision,
        create_pr=repository.create_pr,
        token=repository.token,
        commit_message=commit_message,
        parent_commit=repository.commit,
    )

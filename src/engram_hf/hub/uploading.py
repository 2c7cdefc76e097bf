"""A checkpoint on its way to the Hub: one commit, made when all large files are there.

A reader of the repository finds the old checkpoint or the new one, never an index without its files. What an upload
that broke has brought is not sent again.
"""

import fnmatch
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, hf_hub_download
from transformers.utils import CHAT_TEMPLATE_DIR, logging
from transformers.utils.hub import hf_api

from ..modeling.checkpoint_loading import BLOCK_KEY, INDEX_FILE, PROGRESS_BYTES, SINGLE_FILE, read_digests
from ..modeling.disk_safetensors import read_header, read_index, read_weight_map
from ..modeling.table_blocks import CHANGED_KEY


CARD_FILE = "README.md"
INDEX_FILES = "model.safetensors.index*.json"
# What a Trainer leaves in the folder of a model.
TRAINING_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state*.pth",
)
# What lies beside weights and belongs to a model: code, configs, tokenizers, cards, pictures, licences. Logs, data,
# keys and weights that no index names do not.
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.py", "*.png", "*.jpg", "*.svg", "LICENSE*")
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


@dataclass(frozen=True)
class Repository:
    """A repository as it is before an upload.

    repo_id: with its namespace. revision: branch, None for the main one. commit: its last one. files: names at that
    commit. token, create_pr: as in `push_to_hub`.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: frozenset[str]
    token: str | bool | None
    create_pr: bool

    def read(self, name: str) -> bytes | None:
        """A file at that commit; None where there is none.

        Raises:
            OSError: it is there, and could not be had.
        """
        return None if (path := self._path(name)) is None else path.read_bytes()

    def weight_map(self, index: str) -> dict[str, str]:
        """Tensor name to file name, as an index of the repository gives them; empty where there is none."""
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
    """A repository and its branch, made where there are none."""
    api = hf_api()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    found = api.model_info(repo_id, revision=revision, token=token)
    names = frozenset(sibling.rfilename for sibling in found.siblings or [])
    return Repository(repo_id, revision, str(found.sha), names, token, create_pr)


def refuse_model_in_repository(repository: Repository) -> None:
    """Raise where a repository for tables alone holds a whole model, which they would replace.

    Raises:
        ValueError: weights that are no blocks of tables are there.
    """
    indices = [name for name in repository.files if fnmatch.fnmatch(name, INDEX_FILES)]
    tensors = [tensor for index in indices for tensor in repository.weight_map(index)]
    if SINGLE_FILE in repository.files or not all(map(BLOCK_KEY.match, tensors)):
        raise ValueError(
            f"{repository.repo_id} holds a model, which tables alone would replace. Name another repository for them."
        )


def files_to_upload(folder: str | Path) -> list[UploadFile]:
    """The files of a checkpoint's folder that belong on the Hub: weights that an index names, and of what lies beside
    them code, configs, tokenizer, card, pictures and licences.

    Raises:
        FileNotFoundError: no checkpoint is there, or not all of one.
        ValueError: a file is damaged or too large, or rows of a training checkpoint wait to be merged.
    """
    folder = Path(folder)
    maps = [read_weight_map(index) for index in sorted(folder.glob(INDEX_FILES))]
    weights = {name for weight_map in maps for name in weight_map.values()}
    weights |= {path.name for path in folder.glob(SINGLE_FILE)}
    if not weights and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter. PEFT's own push_to_hub pushes it; to push the whole model, merge it first "
            "(merge_and_unload) and push that."
        )
    if not weights or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder of a checkpoint: it needs config.json and safetensors files. Save the model with "
            "save_pretrained first."
        )
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}). Save or copy it again.") from error
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        raise ValueError(
            f"{folder} holds a variant only, and loaders ask for the weights without one first. Save the model there "
            "without variant= too."
        )
    if any(CHANGED_KEY.match(tensor) for weight_map in maps for tensor in weight_map):
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
    return [*(UploadFile(name, folder / name, digests.get(name)) for name in sorted(weights)), *files_beside(folder)]


def files_beside(folder: Path) -> list[UploadFile]:
    """What belongs to a model and is no weight, with further chat templates, which lie in a folder of their own."""
    paths = [path for path in folder.iterdir() if any(map(path.match, BESIDE_WEIGHTS)) and path.name[0] != "."]
    paths = [path for path in paths if not any(map(path.match, TRAINING_FILES))]
    paths += (folder / CHAT_TEMPLATE_DIR).glob("*.jinja")
    return [UploadFile(path.relative_to(folder).as_posix(), path) for path in sorted(paths) if path.is_file()]


def prepare(files: Iterable[UploadFile]) -> list[CommitOperationAdd]:
    """What a commit is made of, after each file has been read and compared with what its index promises.

    Raises:
        ValueError: a file is another one.
    """
    files = list(files)
    additions = [
        CommitOperationAdd(
            path_in_repo=file.name,
            path_or_fileobj=file.content if isinstance(file.content, bytes) else str(file.content),
        )
        for file in files
    ]
    damaged = []
    total = sum(file.nbytes for file in files if file.promised is not None)
    with logging.tqdm(
        total=total, desc="Checking", unit="B", unit_scale=True, disable=total < PROGRESS_BYTES
    ) as progress:
        for file, addition in zip(files, additions, strict=True):
            if file.promised is not None:
                damaged += [file.name] * (file.promised != addition.upload_info.sha256.hex())
                progress.update(file.nbytes)
    if damaged:
        raise ValueError(
            f"{', '.join(damaged[:4])}: not what the index of the checkpoint promises, so nothing was sent. Save the "
            "model again, or copy the files again (verify_tables names the tensors)."
        )
    return additions


def upload(
    repository: Repository,
    additions: Sequence[CommitOperationAdd],
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a checkpoint in one commit, which also removes the weights of the one that it replaces.

    Run it again after a break: files that are there are not sent again.

    Args:
        repository: as `open_repository` found it; another commit meanwhile is an error, and no mixture.
        additions: as `prepare` makes them.
        commit_message, commit_description: of the commit.

    Returns:
        the commit; where nothing has changed, the one that was there.

    Raises:
        OSError, huggingface_hub.errors.HTTPError: of the connection, or of rights; nothing is committed.
    """
    new = {addition.path_in_repo for addition in additions}
    indices = [name for name in repository.files if fnmatch.fnmatch(name, INDEX_FILES)]
    replaced = {name for index in indices if index in new for name in repository.weight_map(index).values()}
    kept = {name for index in indices if index not in new for name in repository.weight_map(index).values()}
    # A single file too: where there is one, loaders look at no index.
    stale = ((replaced | {SINGLE_FILE}) & repository.files) - kept - new
    api = hf_api()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
    operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
    return api.create_commit(
        repository.repo_id,
        operations=operations,
        revision=repository.revision,
        create_pr=repository.create_pr,
        token=repository.token,
        commit_message=commit_message,
        commit_description=commit_description,
        parent_commit=repository.commit,
    )

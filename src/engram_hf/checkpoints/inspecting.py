"""What a checkpoint holds, from its headers alone: of a folder, or of a repository whose files are not downloaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..modeling.checkpoint_loading import BLOCK_KEY, find_checkpoint, read_headers
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.disk_safetensors import NAMES
from ..modeling.table_blocks import CHANGED_KEY, OLD_ROW_IDS, ROW_IDS, layer_of_table


@dataclass(frozen=True)
class FoundTensor:
    """A tensor of a checkpoint: its type as safetensors calls it, its shape, bytes and file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True)
class FoundBlock:
    """A block: tensor name, rows, bytes, file."""

    name: str
    rows: int
    nbytes: int
    file: str


@dataclass(frozen=True)
class FoundTable:
    """A table: name inside the base model, rows, numbers of a row, type of its rows, bytes, blocks, and changed rows
    that a training checkpoint holds beside them."""

    name: str
    rows: int
    head_dim: int
    dtype: str
    nbytes: int
    blocks: tuple[FoundBlock, ...]
    changed_rows: int


@dataclass(frozen=True)
class Inspection:
    """What was found. vocab_size, compressed_vocab_size: ids of the tokenizer, and what the memory makes of them."""

    where: str
    tables: tuple[FoundTable, ...]
    tables_nbytes: int
    backbone_nbytes: int
    fingerprint: dict[str, str] | None
    vocab_size: int
    compressed_vocab_size: int | str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_checkpoint(
    path_or_repo: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Inspection:
    """Tables, blocks, sizes and fingerprint of a checkpoint; reads config and headers, and no tensor.

    Args:
        path_or_repo: folder, or repository of the Hub, or of its cache where the Hub cannot be reached; tables in a
            repository of their own are found by its config.
        revision, token: of the repository.

    Raises:
        FileNotFoundError: no such folder, repository or revision; or no config or safetensors files are there.
        ValueError: a file is damaged, or the config is none of an EngramMoE.
        OSError: the Hub cannot be reached, and the files are not in its cache; or they are not for everybody.

    Example:
        >>> inspect_checkpoint("output/tiny").tables[0].rows
        53800
    """
    where = str(path_or_repo)
    hub = _at_one_commit(where, revision, token)
    config = EngramMoEConfig.from_pretrained(where, **hub)
    found = _tensors(where, hub)
    if config.engram_tables_repo is not None and not any(map(BLOCK_KEY.match, found)):
        apart = config.engram_tables_repo
        found |= _tensors(apart, _at_one_commit(apart, config.engram_tables_revision, token))
    tables = _tables(found, config)
    in_tables = sum(table.nbytes for table in tables)
    in_changes = sum(tensor.nbytes for name, tensor in found.items() if CHANGED_KEY.match(name))
    return Inspection(
        where=str(path_or_repo),
        tables=tables,
        tables_nbytes=in_tables,
        backbone_nbytes=sum(tensor.nbytes for tensor in found.values()) - in_tables - in_changes,
        fingerprint=config.engram_fingerprint,
        vocab_size=config.vocab_size,
        compressed_vocab_size=config.engram_compressed_vocab_size,
    )


def _at_one_commit(where: str, revision: str | None, token: str | bool | None) -> dict[str, Any]:
    """Arguments that read a folder, or a repository at the commit that it is at; without a connection, the cache."""
    if Path(where).is_dir():
        return {"local_files_only": True}
    try:
        return {"revision": HfApi(token=token).model_info(where, revision=revision).sha, "token": token}
    except HFValidationError as error:
        raise FileNotFoundError(f"{where} is no folder, and no name of a repository, such as user/model.") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{where} is gated. Ask for access at https://huggingface.co/{where}, then hf auth login."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} is no folder, and no repository of the Hub that you may read. Is the name right? A private one "
            "needs hf auth login, or a token."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no revision {revision!r}. Branches and tags are at https://huggingface.co/{where}/tree/main."
        ) from error
    except (HTTPError, ConnectionError) as error:
        hub = {"revision": revision, "local_files_only": True}
        if find_checkpoint(where, hub) is None:
            raise ConnectionError(
                f"{where} is no folder; as a repository it cannot be asked for ({error}), and its weights are not in "
                "the cache of this machine."
            ) from error
        return hub


def _tensors(where: str, hub: dict[str, Any]) -> dict[str, FoundTensor]:
    """From the headers, of which the Hub sends no more than the beginning of each file."""
    if hub.get("local_files_only"):
        checkpoint = find_checkpoint(where, hub)
        if checkpoint is None:
            raise FileNotFoundError(f"{where} holds no safetensors files of a model.")
        return {
            name: FoundTensor(
                "?" if place.dtype is None else NAMES[place.dtype],
                place.shape,
                place.nbytes,
                checkpoint.file_of[name].name,
            )
            for name, place in read_headers(checkpoint).items()
        }
    try:
        metadata = HfApi(token=hub["token"]).get_safetensors_metadata(where, revision=hub["revision"])
    except NotASafetensorsRepoError as error:
        raise FileNotFoundError(f"{where} holds no safetensors files of a model.") from error
    except SafetensorsParsingError as error:
        raise ValueError(f"A safetensors file of {where} is damaged: {error}") from error
    return {
        name: FoundTensor(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0], file)
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    }


def _tables(found: Mapping[str, FoundTensor], config: EngramMoEConfig) -> tuple[FoundTable, ...]:
    blocks: dict[str, list[tuple[int, FoundBlock, str]]] = {}
    changed: dict[str, int] = {}
    for name, tensor in found.items():
        if (match := BLOCK_KEY.match(name)) is not None:
            block = FoundBlock(name, tensor.shape[0], tensor.nbytes, tensor.file)
            blocks.setdefault(match[1], []).append((int(match[2]), block, tensor.dtype))
        elif (match := CHANGED_KEY.match(name)) is not None and match[2] in (ROW_IDS, OLD_ROW_IDS):
            changed[match[1]] = tensor.shape[0]
    tables = []
    for name, own in sorted(blocks.items(), key=lambda item: layer_of_table(item[0])):
        own.sort(key=lambda each: each[0])
        tables.append(
            FoundTable(
                name=name,
                rows=sum(block.rows for _, block, _ in own),
                head_dim=config.engram_head_dim,
                dtype=config.engram_table_dtype or own[0][2],
                nbytes=sum(block.nbytes for _, block, _ in own),
                blocks=tuple(block for _, block, _ in own),
                changed_rows=changed.get(name, 0),
            )
        )
    return tuple(tables)

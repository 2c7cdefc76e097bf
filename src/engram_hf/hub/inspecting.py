"""What a checkpoint holds, from its headers alone: of a folder, or of a repository whose files are not downloaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.engram_loading import BLOCK_KEY, find_checkpoint, read_headers
from ..modeling.row_changes import CHANGED_KEY
from ..modeling.safetensors_files import NAMES


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
        path_or_repo: folder, or repository of the Hub; tables in a repository of their own are found by its config.
        revision, token: of the repository.

    Raises:
        FileNotFoundError: no safetensors files are there.
        ValueError: a file is damaged, or the config is none of an EngramMoE.

    Example:
        >>> inspect_checkpoint("output/tiny").tables[0].rows
        53800
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        found, config_file = _in_folder(folder), folder / "config.json"
    else:
        found = _in_repository(str(path_or_repo), revision, token)
        config_file = Path(hf_hub_download(str(path_or_repo), "config.json", revision=revision, token=token))
    content = json.loads(config_file.read_text())
    if content.get("model_type") != EngramMoEConfig.model_type:
        raise ValueError(f"{path_or_repo} is a {content.get('model_type')!r}, and no {EngramMoEConfig.model_type}.")
    config = EngramMoEConfig.from_dict(content)
    if config.engram_tables_repo is not None and not any(map(BLOCK_KEY.match, found)):
        found |= _in_repository(config.engram_tables_repo, config.engram_tables_revision, token)
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


def _in_folder(folder: Path) -> dict[str, FoundTensor]:
    checkpoint = find_checkpoint(str(folder), {"local_files_only": True})
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} holds no safetensors files of a model.")
    return {
        name: FoundTensor(
            "?" if place.dtype is None else NAMES[place.dtype], place.shape, place.nbytes, checkpoint.file_of[name].name
        )
        for name, place in read_headers(checkpoint).items()
    }


def _in_repository(repo_id: str, revision: str | None, token: str | bool | None) -> dict[str, FoundTensor]:
    """From the headers, of which the Hub sends no more than the beginning of each file."""
    metadata = HfApi(token=token).get_safetensors_metadata(repo_id, revision=revision)
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
        elif (match := CHANGED_KEY.match(name)) is not None and match[2] == "keys":
            changed[match[1]] = tensor.shape[0]
    tables = []
    for name, own in sorted(blocks.items(), key=lambda item: int(item[0].split(".")[1])):
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

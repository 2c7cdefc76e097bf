"""What a checkpoint holds, by the headers of its files. Of a repository nothing else is downloaded."""

from collections import Counter
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
from transformers import AutoConfig

from ..adapters.table_parts import MODEL_TYPES, TABLE_CHILD, all_parts
from ..modeling.checkpoint_loading import Checkpoint, find_checkpoint, find_file, name_inside, read_headers
from ..modeling.configuration_checks import check_source
from ..modeling.configuration_engram_moe import PRESETS
from ..modeling.disk_safetensors import TensorPlace, read_json, read_places
from ..modeling.modeling_engram_moe import EngramMoEModel
from ..modeling.table import EngramTable
from ..modeling.table_blocks import ROW_IDS, is_of_table, layer_of_table, parse_changed_name
from .checking import Part, check_loadable, read_config


@dataclass(frozen=True)
class FoundBlock:
    """A block: tensor name, rows, bytes, file."""

    name: str
    rows: int
    nbytes: int
    file: str


@dataclass(frozen=True)
class FoundTable:
    """A table: name inside the base model, rows, numbers of a row, type of its rows, bytes, blocks, and how many
    changed rows a training checkpoint holds beside them."""

    name: str
    rows: int
    head_dim: int
    dtype: str
    nbytes: int
    blocks: tuple[FoundBlock, ...]
    changed_rows: int


@dataclass(frozen=True)
class Inspection:
    """What was found. compressed_vocab_size: how many of the vocab_size ids are different ones for the memory."""

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
    path_or_repo: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    tables_from: str | Path | None = None,
) -> Inspection:
    """Tables, blocks, sizes and fingerprint of a checkpoint. Refuses what `from_pretrained` would refuse.

    Of a folder it reads config, headers, token map and the ids of changed rows; of a repository, config and headers.

    Args:
        path_or_repo: folder or repository. Where the Hub cannot be reached, the repository is read from the cache.
        revision, token: of the repository.
        tables_from: folder or repository of the tables, as in `from_pretrained`. By default they lie beside the
            backbone, or in the repository that the config names.

    Raises:
        FileNotFoundError: there is no such folder, repository or revision, or it has no config or safetensors files.
        ValueError: a file is damaged, or does not fit the config; or the config is that of a model without tables.
        OSError: the Hub cannot be reached, and the files are not in its cache; or access is denied.

    Example:
        >>> inspect_checkpoint("output/tiny").tables[0].rows
        53826
    """
    where = str(path_or_repo)
    hub = _at_one_commit(where, revision, token)
    if (other := _inspect_other_tables(where, hub)) is not None:
        return other
    config = read_config(where, **hub)
    parts = [_open(where, hub)]
    revision_of_tables = None
    if tables_from is None and not parts[0].checkpoint.blocks():
        tables_from, revision_of_tables = config.engram_tables_repo, config.engram_tables_revision
    if tables_from is not None:
        parts.append(_open(str(tables_from), _at_one_commit(str(tables_from), revision_of_tables, token)))
    named = check_loadable(parts, config, has_contents=all(part.checkpoint.is_here for part in parts))
    tables = _tables(parts[-1], config, named)
    in_tables = sum(table.nbytes for table in tables)
    beside = [name for name in parts[0].places if not is_of_table(name)]
    if config.architectures and not beside:
        # A repository of tables alone has a config without classes.
        raise ValueError(
            f"config.json of {where} is that of a whole model ({config.architectures[0]}), and its files hold no "
            "tensor of the backbone. Load weights and config of one checkpoint; download or copy it again."
        )
    return Inspection(
        where=where,
        tables=tables,
        tables_nbytes=in_tables,
        backbone_nbytes=sum(parts[0].places[name].nbytes for name in beside),
        fingerprint=config.engram_fingerprint,
        vocab_size=config.vocab_size,
        compressed_vocab_size=config.engram_compressed_vocab_size,
    )


def _inspect_other_tables(where: str, hub: dict[str, Any]) -> Inspection | None:
    """What a checkpoint of somebody else's model with lookup tables holds; None for other models."""
    path = find_file(where, "config.json", hub)
    if path is None or read_json(path).get("model_type") not in MODEL_TYPES:
        return None
    config, part = AutoConfig.from_pretrained(where, **hub), _open(where, hub)
    tables = []
    for each in all_parts(config, part.checkpoint, part.places):
        sizes = [(name, part.places[name], part.checkpoint.file_of[name].name) for name in each.tensors]
        blocks = tuple(FoundBlock(name, place.shape[0], place.nbytes, file) for name, place, file in sizes)
        nbytes, dtype = sum(block.nbytes for block in blocks), str(each.dtype).removeprefix("torch.")
        num_changed = _count_changed(part).get(f"{each.name}.{TABLE_CHILD}", 0)
        tables.append(FoundTable(each.name, sum(each.rows), each.width, dtype, nbytes, blocks, num_changed))
    in_tables = sum(table.nbytes for table in tables)
    of_tables = {block.name for table in tables for block in table.blocks}
    beside = [place.nbytes for name, place in part.places.items() if name not in of_tables and not is_of_table(name)]
    vocab_size = config.get_text_config().vocab_size
    return Inspection(where, tuple(tables), in_tables, sum(beside), None, vocab_size, None)


def _count_changed(part: Part) -> Counter[str]:
    """How many changed rows lie beside the blocks of each table."""
    changed: Counter[str] = Counter()
    for name, place in part.places.items():
        table, kind, _ = parse_changed_name(name) or ("", "", 0)
        if kind == ROW_IDS:
            changed[table] += place.shape[0]
    return changed


def _at_one_commit(where: str, revision: str | None, token: str | bool | None) -> dict[str, Any]:
    """Arguments that read a folder, or a repository at its present commit, or without a connection from the cache."""
    check_source(where, PRESETS)
    if Path(where).is_dir():
        return {"local_files_only": True}
    try:
        return {"revision": HfApi(token=token).model_info(where, revision=revision).sha, "token": token}
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{where} is no folder, and not the name of a repository, such as user/model."
        ) from error
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


def _open(where: str, hub: dict[str, Any]) -> Part:
    """A checkpoint by its headers. The Hub sends no more than the beginning of each file."""
    if hub.get("local_files_only"):
        checkpoint = find_checkpoint(where, hub)
        if checkpoint is None:
            raise FileNotFoundError(
                f"{where} holds no safetensors files of a model, or not their model.safetensors.index.json."
            )
        return Part(checkpoint, read_headers(checkpoint))
    try:
        metadata = HfApi(token=hub["token"]).get_safetensors_metadata(where, revision=hub["revision"])
    except NotASafetensorsRepoError as error:
        raise FileNotFoundError(
            f"{where} holds no safetensors files of a model, or not their model.safetensors.index.json."
        ) from error
    except SafetensorsParsingError as error:
        raise ValueError(f"A safetensors file of {where} is damaged: {error}") from error
    places: dict[str, TensorPlace] = {}
    file_of: dict[str, Path] = {}
    for file, header in metadata.files_metadata.items():
        entries = {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [*info.data_offsets]}
            for name, info in header.tensors.items()
        }
        try:
            places |= read_places(entries)
        except ValueError as error:
            raise ValueError(f"{file} of {where} is damaged: {error} Another revision may be sound.") from error
        file_of |= dict.fromkeys(entries, Path(file))
    return Part(Checkpoint(where, file_of, frozenset(file_of), is_here=False), places)


def _tables(part: Part, config: Any, named: Mapping[str, EngramTable]) -> tuple[FoundTable, ...]:
    found: dict[str, list[FoundBlock]] = {}
    changed = _count_changed(part)
    for (table, _), name in sorted(part.checkpoint.blocks().items()):
        place = part.places[name]
        block = FoundBlock(name, place.shape[0], place.nbytes, part.checkpoint.file_of[name].name)
        found.setdefault(table, []).append(block)
    prefix = f"{EngramMoEModel.base_model_prefix}."
    return tuple(
        FoundTable(
            name=name.removeprefix(prefix),
            rows=sum(block.rows for block in blocks),
            head_dim=named[name_inside(name, named)].head_dim,
            dtype=config.engram_table_dtype or part.places[blocks[0].name].type_name,
            nbytes=sum(block.nbytes for block in blocks),
            blocks=tuple(blocks),
            changed_rows=changed.get(name, 0),
        )
        for name, blocks in sorted(found.items(), key=lambda item: layer_of_table(item[0]))
    )

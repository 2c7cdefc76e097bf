"""Is a checkpoint what it was when it was saved, and do its parts belong together?

Every byte is read: a forward does not notice a flipped one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from ..adapters.table_parts import MODEL_TYPES, all_parts
from ..modeling.checkpoint_loading import Checkpoint, check_saved_config, find_checkpoint, name_inside, read_headers
from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import file_digest, read_json
from ..modeling.ids_hashing import check_fingerprint, digest, map_tokens
from ..modeling.table import EngramTable
from ..modeling.table_blocks import ROWS, parse_block_name, parse_changed_name
from ..modeling.table_formats import QUANTIZED_FORMATS, dequantize_rows
from ..modeling.table_patches import PATCH_FILE, read_patch
from .checking import Part, backbone_config, check_loadable, read_config


TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
# Rows are looked at in parts of this size.
PART_BYTES = 2**24


@dataclass(frozen=True)
class VerifiedFile:
    """A weight file: its name, bytes, SHA-256 as promised (None: nothing is promised) and as found, and its tensors."""

    name: str
    nbytes: int
    promised: str | None
    found: str
    tensors: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        return self.promised == self.found


def verify_tables(path_or_repo: str | Path, tables_from: str | Path | None = None) -> list[VerifiedFile]:
    """Compare a checkpoint with what saving wrote. What passes is what `from_pretrained` loads, with the same numbers.

    Compared are every weight file with its SHA-256 in the index, all shapes and types with the config, and token map,
    tokenizer and index with the fingerprint of the config. All rows must be finite. A file without a SHA-256 in the
    index cannot be compared, and is refused. A row patch that lies beside the model is read whole.

    Of somebody else's model with lookup tables (Qwen, Gemma), the weight files are compared with the SHA-256 in the
    index, and the parts of the tables with the config. Their rows must be finite. The backbone's shapes are not
    compared. Published checkpoints promise no SHA-256: `load_with_tables` and `save_pretrained` write one.

    Args:
        path_or_repo: folder of a checkpoint, or of tables alone; or a repository whose files were downloaded.
        tables_from: folder or repository of the tables, as in `from_pretrained`. By default they lie beside the
            backbone, or in the repository that the config names.

    Returns:
        the files, all of them sound.

    Raises:
        FileNotFoundError: there are no safetensors files, or one is missing.
        ValueError: a file is damaged, changed or without a digest; a tensor is missing, misshapen or of another type;
            a row or scale is not finite; a fingerprint differs. Names files and tensors.

    Example:
        >>> verify_tables("output/tiny")
        [VerifiedFile(name='model-00001-of-00001.safetensors', ...), ...]
    """
    is_there = Path(path_or_repo).is_dir() or not Path(path_or_repo).is_absolute()
    checkpoint = _find(str(path_or_repo)) if is_there else None
    if checkpoint is None or not checkpoint.file_of:
        raise FileNotFoundError(
            f"{path_or_repo} is no folder with safetensors files and their model.safetensors.index.json, and no "
            "repository whose files are on this machine; nothing can be verified."
        )
    folder = next(iter(checkpoint.file_of.values())).parent
    if (folder / "config.json").exists() and read_json(folder / "config.json").get("model_type") in MODEL_TYPES:
        return _verify_other_tables(path_or_repo, folder, Part(checkpoint, read_headers(checkpoint)))
    config = read_config(folder) if (folder / "config.json").exists() else None
    if config is None and len(checkpoint.blocks()) < len(checkpoint.file_of):
        raise FileNotFoundError(f"{path_or_repo} has weights and no config.json. Copy or download it again.")
    parts = [Part(checkpoint, read_headers(checkpoint))]
    if config is not None and (tables_from is not None or config.engram_layer_ids and not checkpoint.blocks()):
        tables = _find_tables(path_or_repo, config, tables_from)
        parts.append(Part(tables, read_headers(tables)))
    named: Mapping[str, EngramTable] = {}
    if config is not None:
        named = check_loadable(parts, config)
        check_saved_config(backbone_config(config), checkpoint)
        if any((folder / name).exists() for name in TOKENIZER_FILES):
            check_tokenizer(folder, read_tokenizer(folder))
    files = [file for part in parts for file in _verify_files(part.checkpoint)]
    _refuse_changed(files, path_or_repo)
    for part in parts:
        _verify_total(part)
        _verify_rows(part, config, named)
    if unknown := [file.name for file in files if file.promised is None]:
        raise ValueError(
            f"{path_or_repo} holds no SHA-256 for {_some(unknown)}, so nothing can be said of them. Load the model and "
            "save it once with save_pretrained, which writes them."
        )
    # A run with `train_as_patch` has trained this file alone.
    if (folder / PATCH_FILE).exists():
        read_patch(folder / PATCH_FILE)
    return files


def _verify_other_tables(path_or_repo: str | Path, folder: Path, part: Part) -> list[VerifiedFile]:
    """The files of somebody else's model with lookup tables; errors as of `verify_tables`."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tables = all_parts(config, part.checkpoint, part.places)
    files = _verify_files(part.checkpoint)
    _refuse_changed(files, path_or_repo)
    _verify_total(part)
    for tensor in (tensor for table in tables for tensor in table.tensors):
        path = part.checkpoint.file_of[tensor]
        # Whether a number of 8 bits is finite, only a wider type can say.
        _check_finite(tensor, path, TableFile(path).tensor(tensor), part.checkpoint.where, torch.Tensor.float)
    if unknown := [file.name for file in files if file.promised is None]:
        raise ValueError(
            f"{path_or_repo} holds no SHA-256 for {_some(unknown)}, so their bytes cannot be compared. The tables "
            f"{_some(table.name for table in tables)} fit the config, and all their rows are finite. Load the model "
            "with load_with_tables and save it once, which writes the SHA-256 of every file."
        )
    return files


def _refuse_changed(files: list[VerifiedFile], where: str | Path) -> None:
    """
    Raises:
        ValueError: a file has another SHA-256 than the index promises.
    """
    if changed := [file for file in files if file.promised is not None and not file.is_sound]:
        raise ValueError(
            f"{len(changed)} of {len(files)} files of {where} are not what was saved: "
            + "; ".join(f"{file.name} (with {_some(file.tensors)})" for file in changed)
            + ". Download or copy them again."
        )


def _find(path_or_repo: str, revision: str | None = None) -> Checkpoint | None:
    """A checkpoint on this machine.

    Raises:
        FileNotFoundError: it is a repository of which some files are not here.
    """
    try:
        return find_checkpoint(path_or_repo, {"local_files_only": True, "revision": revision})
    except OSError as error:
        if Path(path_or_repo).is_dir():
            raise
        raise FileNotFoundError(
            f"Not all files of {path_or_repo} are on this machine, and verifying downloads none. Load the model once, "
            f"or `hf download {path_or_repo}`."
        ) from error


def _find_tables(where: str | Path, config: Any, tables_from: str | Path | None) -> Checkpoint:
    """The tables of a model that has them elsewhere.

    Raises:
        FileNotFoundError: nobody says where, or they are not there.
    """
    revision = None if tables_from is not None else config.engram_tables_revision
    place = tables_from or config.engram_tables_repo
    tables = None if place is None else _find(str(place), revision)
    if tables is None or not tables.blocks():
        raise FileNotFoundError(
            f"{where} has a memory in the layers {config.engram_layer_ids} and holds no tables"
            + (
                ". Say where they are: tables_from=folder."
                if place is None
                else f", and those of {place} are not on this machine. Load the model once, which downloads them."
            )
        )
    return tables


def check_tokenizer(folder: str | Path, tokenizer) -> None:
    """See that a tokenizer is the one that the tables of a checkpoint were made with.

    Raises:
        ValueError: it is another one.
    """
    config = read_config(folder)
    if config.engram_fingerprint is None or config.engram_fingerprint["map"] == "none":
        return
    token_map, identity = map_tokens(tokenizer, config)
    actual = {**config.engram_fingerprint, "map": digest(token_map.numpy().tobytes()), **identity}
    check_fingerprint(config.engram_fingerprint, actual, f"the tokenizer for {folder}")


def read_tokenizer(folder: str | Path):
    """The tokenizer in a folder.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # A damaged file is met deep inside tokenizers, by errors of any type.
    except Exception as error:
        names = " or ".join(sorted(name for name in TOKENIZER_FILES if Path(folder, name).exists()))
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({error!r}): {names} is damaged. Copy or download it again."
        ) from error


def _verify_files(checkpoint: Checkpoint) -> list[VerifiedFile]:
    digests = checkpoint.metadata.get("sha256", {})
    tensors: dict[Path, list[str]] = {}
    for name, file in checkpoint.file_of.items():
        tensors.setdefault(file, []).append(name)
    # A model may be copied without what its training run goes on from.
    folder, of_run = next(iter(tensors)).parent, checkpoint.metadata.get("row_state", {})
    digests = {**digests, **of_run}
    tensors |= {folder / name: [] for name in of_run if (folder / name).exists()}
    total = sum(file.stat().st_size for file in tensors)
    files = []
    with logging.tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=total < 2**26) as progress:
        for file, names in sorted(tensors.items()):
            found = file_digest(file, progress.update)
            files.append(VerifiedFile(file.name, file.stat().st_size, digests.get(file.name), found, tuple(names)))
    return files


def _verify_total(part: Part) -> None:
    """The index names as many bytes of tensors as it did when it was saved."""
    promised, found = part.checkpoint.metadata.get("total_size"), sum(place.nbytes for place in part.places.values())
    if promised is not None and promised != found:
        raise ValueError(
            f"The tensors that the index of {part.checkpoint.where} names have {found:,} bytes, and it promises "
            f"{promised:,} (total_size): it is not the index that was saved. Download or copy it again."
        )


def _verify_rows(part: Part, config: Any, tables: Mapping[str, EngramTable]) -> None:
    """All rows are finite numbers, those of blocks and the changed ones, and so are the scales of quantized rows."""
    is_quantized = config is not None and config.engram_table_dtype in QUANTIZED_FORMATS
    files: dict[Path, TableFile] = {}
    for name, path in part.checkpoint.file_of.items():
        changed, block = parse_changed_name(name), parse_block_name(name)
        if block is None and (changed is None or changed.part != ROWS):
            continue
        table = block.table if block is not None else changed.table if changed is not None else ""
        file = files.setdefault(path, TableFile(path))
        rows = file.tensor(name)
        if not is_quantized and not rows.is_floating_point():
            # Tables alone, without the config that says what their bytes mean.
            continue
        if config is None or not is_quantized:
            _check_finite(name, path, rows, part.checkpoint.where)
            continue
        head_dim = tables[name_inside(table, tables)].head_dim
        numbers_of = partial(dequantize_rows, name=str(config.engram_table_dtype), width=head_dim)
        _check_finite(name, path, rows, part.checkpoint.where, numbers_of, " (a number or its scale)")


def _check_finite(
    name: str,
    path: Path,
    rows: torch.Tensor,
    where: str,
    numbers_of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
    which: str = "",
) -> None:
    """
    Args:
        name, path, where: tensor, file and folder, for the message.
        rows: (rows, row width), as they are stored.
        numbers_of: of some rows their numbers.
        which: of them, for the message.

    Raises:
        ValueError: a number of a row is none.
    """
    count = max(1, PART_BYTES // (rows.shape[1] * rows.dtype.itemsize))
    for number, part_of_rows in enumerate(rows.split(count)):
        is_finite = torch.isfinite(numbers_of(part_of_rows)).all(-1)
        if not is_finite.all():
            row = number * count + int((~is_finite).nonzero()[0])
            raise ValueError(
                f"{name} in {path.name} of {where} holds NaN or infinity, first in row {row}{which}. It was saved this "
                "way: take an earlier checkpoint, or find what made the training diverge."
            )


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")

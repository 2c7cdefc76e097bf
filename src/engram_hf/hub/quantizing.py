"""Tables in 8 or 4 bits: converts a checkpoint block by block, so that its size is of no account."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import logging

from ..modeling.engram_loading import BLOCK_KEY, INDEX_FILE, find_checkpoint, read_headers
from ..modeling.engram_publishing import link_file, publish, staging
from ..modeling.engram_quantization import QUANTIZED_FORMATS, quantize_rows, row_bytes
from ..modeling.safetensors_files import TensorContent, write_file
from ..modeling.table_files import TableFile


ROWS_AT_ONCE = 2**16


def quantize_tables(source: str | Path, target: str | Path, row_format: str = "float8_e4m3fn") -> Path:
    """Write a checkpoint whose tables are quantized, and whatever else it holds as it is.

    Args:
        source: folder of a checkpoint with floating tables.
        target: folder for the new one; another one than `source`.
        row_format: "float8_e4m3fn" (a scale per 32 channels), "int8" or "int4" (a scale per row).

    Returns:
        `target`.

    Raises:
        ValueError: tables are quantized already, hold NaN or infinity, or the format is none of these.
        FileNotFoundError: no safetensors files are there.
    """
    source, target = Path(source), Path(target)
    if row_format not in QUANTIZED_FORMATS:
        raise ValueError(f"row_format must be one of {QUANTIZED_FORMATS}, got {row_format!r}.")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the source itself; quantizing loses digits, so name another folder.")
    checkpoint = find_checkpoint(str(source), {"local_files_only": True}) if source.is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(f"{source} is no folder with the safetensors files of a model.")
    config = AutoConfig.from_pretrained(source)
    if config.engram_table_dtype in QUANTIZED_FORMATS:
        raise ValueError(f"The tables of {source} are {config.engram_table_dtype} already; start from the original.")
    places = read_headers(checkpoint)
    with staging(target) as stage:
        _copy_rest(source, stage, {path.name for path in checkpoint.file_of.values()}, row_format)
        table_map, digests, backbone = {}, {}, {}
        rows = sum(place.shape[0] for name, place in places.items() if BLOCK_KEY.match(name))
        with logging.tqdm(total=rows, desc="Quantizing", unit=" rows", disable=rows < ROWS_AT_ONCE) as progress:
            for path in sorted(set(checkpoint.file_of.values())):
                names = [name for name, file in checkpoint.file_of.items() if file == path]
                blocks = [name for name in names if BLOCK_KEY.match(name)]
                if not blocks:
                    link_file(path, stage / path.name)
                    backbone.update(dict.fromkeys(names, path.name))
                    continue
                if len(blocks) != len(names):
                    raise ValueError(f"{path} holds tables and other tensors; load the model and save it once first.")
                file = TableFile(path)
                contents = {name: _quantized(file, name, row_format, progress.update) for name in blocks}
                digests[path.name] = write_file(stage / path.name, contents)
                table_map.update(dict.fromkeys(blocks, path.name))
        (stage / INDEX_FILE).write_text(json.dumps({"weight_map": backbone}))
        publish(stage, target, table_map, digests, config)
    return target


def _quantized(file: TableFile, name: str, row_format: str, on_rows: Callable[[int], object]) -> TensorContent:
    rows, width = file.places[name].shape
    packed = row_bytes(row_format, width)

    def pieces() -> Iterator[memoryview]:
        for part in file.tensor(name).split(ROWS_AT_ONCE):
            yield memoryview(quantize_rows(part, row_format).view(-1).numpy().data)
            on_rows(part.shape[0])

    return TensorContent(torch.uint8, (rows, packed), rows * packed, pieces)


def _copy_rest(source: Path, stage: Path, weights: set[str], row_format: str) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in weights and path.name != INDEX_FILE:
            shutil.copyfile(path, stage / path.name)
    content = json.loads((source / "config.json").read_text())
    (stage / "config.json").write_text(
        json.dumps({**content, "engram_table_dtype": row_format}, indent=2, sort_keys=True) + "\n"
    )

"""Quantizes tables to 8 or 4 bits, block by block, so that a checkpoint may be larger than memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..adapters.memory_files import MemoryFiles
from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import TensorContent, read_json
from ..modeling.table_blocks import parse_changed_name
from ..modeling.table_formats import QUANTIZED_FORMATS, quantize_rows, row_bytes
from .rewriting import open_folder, rewrite_blocks


ROWS_AT_ONCE = 2**16


def quantize_tables(source: str | Path, target: str | Path, row_format: str = "float8_e4m3fn") -> Path:
    """Write a checkpoint with quantized tables. Whatever else the folder holds is copied or linked.

    Args:
        source: folder of a checkpoint with floating tables.
        target: folder for the new one, without weights yet.
        row_format: "float8_e4m3fn" (a scale per 32 channels), "int8" or "int4" (a scale per row).

    Returns:
        `target`.

    Raises:
        ValueError: the format is not one of these; `source` is damaged, has no tables, or has tables that are quantized
            already or hold NaN or infinity; a link in it leads elsewhere; `target` holds weights.
        FileNotFoundError: `source` has no safetensors files, or one is missing.
        OSError: no space or no permission in `target`.
    """
    source, target = Path(source), Path(target)
    if row_format not in QUANTIZED_FORMATS:
        raise ValueError(f"row_format must be one of {QUANTIZED_FORMATS}, got {row_format!r}.")
    part, config = open_folder(source, target)
    checkpoint = part.checkpoint
    if config.engram_table_dtype in QUANTIZED_FORMATS:
        raise ValueError(f"The tables of {source} are {config.engram_table_dtype} already; start from the original.")
    if any(parse_changed_name(name) is not None for name in checkpoint.file_of):
        raise ValueError(
            f"{source} was saved in training, and holds changed rows beside its blocks. Put them together first: "
            "engram_hf.merge_changed_rows(source, target)."
        )
    rows = sum(part.places[name].shape[0] for name in checkpoint.blocks().values())
    with logging.tqdm(total=rows, desc="Quantizing", unit=" rows", disable=rows < ROWS_AT_ONCE) as progress:
        rewrite_blocks(
            checkpoint,
            config,
            source,
            target,
            lambda file, name: _quantized(file, name, row_format, progress.update),
            with_table_dtype(config, source, row_format),
        )
    return target


def with_table_dtype(config: Any, source: Path, row_format: str) -> dict[str, Any]:
    """The content of a config.json for the same model with quantized tables."""
    if isinstance(config, MemoryFiles):
        return config.with_table_dtype(row_format)
    return {**read_json(source / "config.json"), "engram_table_dtype": row_format}


def _quantized(file: TableFile, name: str, row_format: str, on_rows: Callable[[int], object]) -> TensorContent:
    rows, width = file.places[name].shape
    packed = row_bytes(row_format, width)

    def pieces() -> Iterator[memoryview]:
        for part in file.tensor(name).split(ROWS_AT_ONCE):
            yield memoryview(quantize_rows(part, row_format).view(-1).numpy().data)
            on_rows(part.shape[0])

    return TensorContent(torch.uint8, (rows, packed), rows * packed, pieces)

"""Tables in 8 or 4 bits: converts a checkpoint block by block, so that its size is of no account."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from ..modeling.checkpoint_loading import BLOCK_KEY, read_headers
from ..modeling.configuration_engram_moe import EngramMoEConfig
from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import TensorContent
from ..modeling.table_blocks import CHANGED_KEY
from ..modeling.table_formats import QUANTIZED_FORMATS, quantize_rows, row_bytes
from .rewriting import open_folder, rewrite_blocks


ROWS_AT_ONCE = 2**16


def quantize_tables(source: str | Path, target: str | Path, row_format: str = "float8_e4m3fn") -> Path:
    """Write a checkpoint whose tables are quantized, and whatever else it holds as it is.

    Args:
        source: folder of a checkpoint with floating tables.
        target: folder for the new one, without weights yet.
        row_format: "float8_e4m3fn" (a scale per 32 channels), "int8" or "int4" (a scale per row).

    Returns:
        `target`.

    Raises:
        ValueError: `source` holds no tables, or they are quantized already, or hold NaN or infinity; `target` holds
            weights; the format is none of these.
        FileNotFoundError: no safetensors files are there.
    """
    source, target = Path(source), Path(target)
    if row_format not in QUANTIZED_FORMATS:
        raise ValueError(f"row_format must be one of {QUANTIZED_FORMATS}, got {row_format!r}.")
    checkpoint = open_folder(source, target)
    config = EngramMoEConfig.from_pretrained(source)
    if config.engram_table_dtype in QUANTIZED_FORMATS:
        raise ValueError(f"The tables of {source} are {config.engram_table_dtype} already; start from the original.")
    if any(map(CHANGED_KEY.match, checkpoint.file_of)):
        raise ValueError(
            f"{source} was saved in training, and holds changed rows beside its blocks. Put them together first: "
            "engram_hf.merge_changed_rows(source, target)."
        )
    rows = sum(place.shape[0] for name, place in read_headers(checkpoint).items() if BLOCK_KEY.match(name))
    with logging.tqdm(total=rows, desc="Quantizing", unit=" rows", disable=rows < ROWS_AT_ONCE) as progress:
        rewrite_blocks(
            checkpoint,
            source,
            target,
            lambda file, name: _quantized(file, name, row_format, progress.update),
            {"engram_table_dtype": row_format},
        )
    return target


def _quantized(file: TableFile, name: str, row_format: str, on_rows: Callable[[int], object]) -> TensorContent:
    rows, width = file.places[name].shape
    packed = row_bytes(row_format, width)

    def pieces() -> Iterator[memoryview]:
        for part in file.tensor(name).split(ROWS_AT_ONCE):
            yield memoryview(quantize_rows(part, row_format).view(-1).numpy().data)
            on_rows(part.shape[0])

    return TensorContent(torch.uint8, (rows, packed), rows * packed, pieces)

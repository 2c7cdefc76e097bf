"""Files of a training run: the training copy of a table on disk, and the state of its rows.

They have no name, so they are gone when the process ends, however it ends. Their space is reserved when they are made,
because a mapped file that finds the disk full later kills the process.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import logging

from ..modeling.disk_files import PAGE, BlockSource, MappedFile, TableFile
from ..modeling.disk_safetensors import TensorContent, TensorPlace
from ..modeling.table import EngramTable


PROGRESS_BYTES = 2**28

logger = logging.get_logger(__name__)


class WorkFile(MappedFile):
    """Tensors of zeros in an unnamed file, which the kernel writes back when memory gets short."""

    is_shared = True

    def __init__(self, folder: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        """
        Args:
            folder: on the disk that is to hold them. It is made if it is missing.
            tensors: name to shape and type.

        Raises:
            OSError: the folder cannot be made, or the disk has no room for them.
        """
        self.path = Path(folder).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"work_folder {self.path} cannot be made ({error.strerror})") from error
        self.places, end = {}, 0
        for name, (shape, dtype) in tensors.items():
            nbytes = math.prod(shape) * dtype.itemsize
            self.places[name] = TensorPlace(dtype, shape, end, nbytes)
            end += -(-nbytes // PAGE) * PAGE
        # A rank may hold no row of a table, and a file without a byte cannot be mapped.
        end = max(end, PAGE)
        # Kept open for as long as its mapping.
        self.file = tempfile.TemporaryFile(dir=self.path, buffering=0)  # noqa: SIM115
        try:
            os.posix_fallocate(self.file.fileno(), 0, end)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path} has no room for {end:,} bytes of a table in training ({error.strerror})"
            ) from error
        self._map()
        for name in self.places:
            self.expect_random_reads(name)

    def was_written(self, name: str) -> bool:
        """False: writing to a tensor changes the file."""
        return False

    def fill(self, name: str, content: TensorContent) -> None:
        """Copy a tensor into this file.

        One page is written at a time. From longer pieces the kernel makes large pages, and a step that changes one row
        would have all of a large page written back.
        """
        start = self.places[name].start
        is_short = content.nbytes < PROGRESS_BYTES
        with logging.tqdm(
            total=content.nbytes, desc=f"Copying {name} to train it", unit="B", unit_scale=True, disable=is_short
        ) as progress:
            for piece in content.pieces():
                view = memoryview(piece)
                for page in range(0, len(piece), PAGE):
                    os.pwrite(self.file.fileno(), view[page : page + PAGE], start + page)
                start += len(piece)
                progress.update(len(piece))


def open_training_copy(table: EngramTable, folder: str | Path) -> None:
    """Copy the blocks of a table that are on disk, so that training writes to the copies.

    Raises:
        OSError: the disk has no room for them.
    """
    for block in table.block_records:
        source = block.source
        if not block.is_on_disk or source is None or source.file.is_shared:
            continue
        source.file.check_unchanged()
        copy = WorkFile(folder, {source.name: (block.shape, block.rows.dtype)})
        is_as_in_file = source.holds(block.parameter)
        copy.fill(source.name, source.file.content(source.name) if is_as_in_file else TensorContent.of(block.rows))
        block.read_from(BlockSource(copy, source.name))
        if isinstance(source.file, TableFile):
            # Nobody looks at the old mapping any more.
            source.file.forget_pages(source.name)

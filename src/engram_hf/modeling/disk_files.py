"""Files with tables in them, mapped and left open: the tensors of a checkpoint, or of a run that trains them.

What is read of them when is the reader's business (disk_reading.py).
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .disk_safetensors import PIECE_BYTES, TensorContent, TensorPlace, read_header


PAGE = mmap.PAGESIZE
PAGES_LOOKED_AT = 2**20
MAP_NORESERVE = 0x4000
# What this process has mapped where, on Linux.
MAPS = "/proc/self/maps"


class MappedFile:
    """An open file under a mapping, and the tensors in it."""

    # Whether a second name of the file may stand for a tensor of it, in a checkpoint.
    can_be_linked = False
    # Whether what is written to a tensor of it is written to the file.
    is_shared = False

    def map_again(self) -> "MappedFile":
        """The same open file under a mapping of its own, where what was written to the first one does not show."""
        raise NotImplementedError

    path: Path
    places: dict[str, TensorPlace]
    file: BinaryIO

    def _map(self) -> None:
        # Copy on write, and not counted as memory that may be needed: a table may be larger than RAM and swap.
        private = mmap.MAP_PRIVATE | (MAP_NORESERVE if sys.platform == "linux" else 0)
        flags = mmap.MAP_SHARED if self.is_shared else private
        self.mapping = mmap.mmap(self.file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = torch.frombuffer(self.mapping, dtype=torch.uint8).data_ptr()

    def check_unchanged(self) -> None:
        """Raise where somebody else has changed the file."""

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to the open file, and not to one that has taken its place."""
        return True

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the file as a view of the mapping; nothing is read."""
        place, dtype = self.places[name], self.dtype_of(name)
        if not place.nbytes:
            return torch.empty(place.shape, dtype=dtype)
        count = place.nbytes // dtype.itemsize
        return torch.frombuffer(self.mapping, dtype=dtype, count=count, offset=place.start).view(place.shape)

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of a tensor that torch can hold."""
        dtype = self.places[name].dtype
        if dtype is None:
            raise ValueError(f"{name} of {self.path} has a type that torch does not have. Update torch, or convert it.")
        return dtype

    def was_written(self, name: str) -> bool:
        """Whether this process has written to a tensor of its mapping, in whatever way: the kernel keeps such pages
        apart from the file. A page counts for all tensors on it; True where the system does not tell."""
        place = self.places[name]
        if not place.nbytes:
            return False
        first = (self.address + place.start) // PAGE
        pages = (self.address + place.start + place.nbytes - 1) // PAGE - first + 1
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                for start in range(0, pages, PAGES_LOOKED_AT):
                    pagemap.seek(8 * (first + start))
                    entries = np.frombuffer(pagemap.read(8 * min(PAGES_LOOKED_AT, pages - start)), dtype=np.uint64)
                    in_memory, of_file = entries >> np.uint64(62) != 0, (entries >> np.uint64(61)) & np.uint64(1) != 0
                    if (in_memory & ~of_file).any():
                        return True
        except OSError:
            return True
        return False

    def content(self, name: str, piece_bytes: int = PIECE_BYTES) -> TensorContent:
        """A tensor of the file, to be written to another one; read from the file, not through the mapping."""
        place = self.places[name]

        def pieces():
            for start in range(0, place.nbytes, piece_bytes):
                piece = bytearray(min(piece_bytes, place.nbytes - start))
                self.read_bytes(name, start, memoryview(piece))
                yield piece

        return TensorContent(self.dtype_of(name), place.shape, place.nbytes, pieces)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor of the file into memory that is there already, without mapping its pages."""
        self.read_bytes(name, 0, memoryview(target.view(-1).view(torch.uint8).numpy().data))

    def read_bytes(self, name: str, start: int, target: memoryview) -> None:
        """Read bytes of a tensor of the file, from `start` of it on, as many as the target holds."""
        done, first = 0, self.places[name].start + start
        while done < len(target):
            count = os.preadv(self.file.fileno(), [target[done : done + PIECE_BYTES]], first + done)
            if not count:
                raise ValueError(f"{self.path} ends in the middle of {name}. Download it again.")
            done += count

    def cached_share(self, pages: np.ndarray, least: float = 0.0) -> float:
        """Share of some pages that are in the page cache; 0 where the system does not tell.

        Args:
            pages: (n,) page numbers of the mapping.
            least: where the share cannot reach this any more, it is not counted to the end.
        """
        if not hasattr(os, "RWF_NOWAIT"):
            return 0.0
        found, buffer = 0, bytearray(1)
        for number, page in enumerate(pages.tolist()):
            try:
                found += os.preadv(self.file.fileno(), [buffer], page * PAGE - self.address, os.RWF_NOWAIT)
            except OSError:
                if number + 1 - found > (1 - least) * len(pages):
                    break
        return found / max(1, len(pages))

    def share_in_memory(self, pages: np.ndarray) -> float:
        """Share of some pages that are in the page cache, by looking and not by reading; 0 where nobody tells.

        Args:
            pages: (n,) page numbers of the mapping.
        """
        is_here, found = ctypes.c_ubyte(), 0
        try:
            mincore = ctypes.CDLL(None).mincore
        except (AttributeError, TypeError, OSError):
            return 0.0
        for page in pages.tolist():
            if not mincore(ctypes.c_void_p(page * PAGE), ctypes.c_size_t(PAGE), ctypes.byref(is_here)):
                found += is_here.value & 1
        return found / max(1, len(pages))

    def expect_random_reads(self, name: str) -> None:
        """Tell the kernel to read nothing beside the pages that are asked for."""
        place = self.places[name]
        if not place.nbytes:
            return
        start = place.start // PAGE * PAGE
        self.mapping.madvise(mmap.MADV_RANDOM, start, place.start + place.nbytes - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), start, place.nbytes, os.POSIX_FADV_RANDOM)


class TableFile(MappedFile):
    """A safetensors file.

    Nobody writes to it through this mapping: what is written there is the writer's own copy, in memory.
    """

    can_be_linked = True

    def __init__(self, path: str | Path):
        """
        Raises:
            FileNotFoundError, ValueError: as `read_header`.
        """
        self.path = Path(path).absolute()
        self.places = read_header(path)
        self.file = self.path.open("rb")
        self.state = self._state()
        self._map()

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """Whether the open file is what it was. A change between this look and the read that follows is not seen.

        Raises:
            ValueError: size or time of the file have changed.
        """
        state = self._state()
        if state != self.state:
            raise ValueError(
                f"{self.path} was changed while a table was open: {state[0]} bytes, {self.state[0]} when it was opened"
                f"{'' if state[0] != self.state[0] else ', and a later time of change'}. Load the model again; never "
                "write into the files of a loaded checkpoint (save_pretrained replaces them instead)."
            )

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to the open file, and not to one that has taken its place."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except OSError:
            return False

    def forget_pages(self, name: str | None = None) -> None:
        """Give back the memory of pages that were read or written through the mapping, of a tensor or of all. What was
        written to them is lost."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        place = TensorPlace(None, (), 0, len(self.mapping)) if name is None else self.places[name]
        # Pages that have nothing else on them.
        first, end = -(-place.start // PAGE) * PAGE, (place.start + place.nbytes) // PAGE * PAGE
        if first < end:
            self.mapping.madvise(mmap.MADV_DONTNEED, first, end - first)

    def map_again(self) -> "TableFile":
        """The same open file, under a mapping of its own."""
        twin = object.__new__(TableFile)
        twin.__dict__.update(self.__dict__)
        twin._map()
        return twin

    def __deepcopy__(self, memo):
        return self.map_again()

    def __reduce__(self):
        return _open_again, (self.path, self.state)


def _open_again(path: Path, state: tuple[int, int]) -> TableFile:
    file = TableFile(path)
    if file.state != state:
        raise ValueError(f"{path} is not the file that was open when the model was pickled. Load the model again.")
    return file


@dataclass(frozen=True)
class BlockSource:
    """The tensor of a file that a block comes from."""

    file: MappedFile
    name: str

    def tensor(self) -> torch.Tensor:
        return self.file.tensor(self.name)

    def is_under(self, block: torch.Tensor) -> bool:
        """Whether a block is still a view of this mapping, so that it changes where the file does."""
        address = self.file.address + self.file.places[self.name].start
        # A rank may hold no row of a block, and no rows have no address.
        return block.device.type == "cpu" and (block.data_ptr() == address or not block.numel())

    def was_written(self) -> bool:
        return self.file.was_written(self.name)

    def holds(self, block: torch.Tensor) -> bool:
        """Whether the file has the bytes of a block; reads it only where nothing else can tell."""
        if self.is_under(block) and not self.was_written():
            return True
        return not block.is_meta and same_bytes(block, self.file.content(self.name).pieces())


def source_behind(tensor: torch.Tensor) -> BlockSource | None:
    """The file that a tensor is a mapped view of, to be read from there: pages of its mapping that are read count as
    memory of this process. None where it is something else, was written to, or the system does not tell."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.nbytes or not os.path.exists(MAPS):
        return None
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    with open(MAPS) as maps:
        for line in maps:
            span, _, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            start, stop = (int(part, 16) for part in span.split("-"))
            if start <= first and end <= stop:
                break
    is_file = bool(path) and Path(path[0]).is_file() and Path(path[0]).stat().st_ino == int(inode)
    if not is_file:
        return None
    file = object.__new__(MappedFile)
    file.path, start_in_file = Path(path[0]), int(offset, 16) + first - start
    file.places = {"": TensorPlace(tensor.dtype, tuple(tensor.shape), start_in_file, tensor.nbytes)}
    file.address, file.file = first - start_in_file, file.path.open("rb")
    return None if file.was_written("") else BlockSource(file, "")


def same_bytes(tensor: torch.Tensor, pieces: Iterable[bytes | bytearray | memoryview]) -> bool:
    """Whether a tensor has these bytes; compares piece by piece."""
    ours, start = tensor.detach().reshape(-1).view(torch.uint8), 0
    for piece in pieces:
        here = ours[start : start + len(piece)].cpu()
        if len(here) != len(piece) or not torch.equal(here, torch.frombuffer(piece, dtype=torch.uint8)):
            return False
        start += len(piece)
    return start == len(ours)

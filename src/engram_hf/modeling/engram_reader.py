"""Rows out of files: a mapping that is opened once, and advice to the kernel in batches, so that the pages of many rows
are read at once and nothing else is.

Knows files, addresses and pages; nothing of tables or models. What it measures up to: scripts/bench_reads.py.
"""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .safetensors_files import PIECE_BYTES, TensorContent, TensorPlace, read_header


PAGE = mmap.PAGESIZE
PAGE_SHIFT = PAGE.bit_length() - 1
# Ranges of one system call (the kernel's IOV_MAX).
RANGES_OF_A_CALL = 1024
# A device takes about 256 requests before it blocks who asks, so more than that is another thread's work.
PAGES_AT_ONCE = 128
SAMPLED_PAGES = 256
ASKING_THREADS = 4
READING_THREADS = 32
PAGES_LOOKED_AT = 2**20
# Lookups that may be prefetched and not yet made.
PREFETCHES_KEPT = 8
PROCESS_MADVISE, MAP_NORESERVE = 440, 0x4000


class TableFile:
    """A safetensors file, mapped and left open.

    Nobody writes to it through this mapping: what is written there is the writer's own copy, in memory.
    """

    def __init__(self, path: str | Path):
        """
        Raises:
            FileNotFoundError, ValueError: as `read_header`.
        """
        self.path = Path(path).absolute()
        self.places: dict[str, TensorPlace] = read_header(path)
        self.file = self.path.open("rb")
        self.state = self._state()
        self._map()

    def _map(self) -> None:
        # Copy on write, and not counted as memory that may be needed: a table may be larger than RAM and swap.
        flags = mmap.MAP_PRIVATE | (MAP_NORESERVE if sys.platform == "linux" else 0)
        self.mapping = mmap.mmap(self.file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = torch.frombuffer(self.mapping, dtype=torch.uint8).data_ptr()

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

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the file as a view of the mapping; nothing is read."""
        place, dtype = self.places[name], self.dtype_of(name)
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

    def content(self, name: str) -> TensorContent:
        """A tensor of the file, to be written to another one; read from the file, not through the mapping."""
        place = self.places[name]

        def pieces():
            for start in range(0, place.nbytes, PIECE_BYTES):
                piece = bytearray(min(PIECE_BYTES, place.nbytes - start))
                self._read(name, start, memoryview(piece))
                yield piece

        return TensorContent(self.dtype_of(name), place.shape, place.nbytes, pieces)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor of the file into memory that is there already, without mapping its pages."""
        self._read(name, 0, memoryview(target.view(-1).view(torch.uint8).numpy().data))

    def _read(self, name: str, start: int, target: memoryview) -> None:
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

    def expect_random_reads(self, name: str) -> None:
        """Tell the kernel to read nothing beside the pages that are asked for."""
        place = self.places[name]
        start = place.start // PAGE * PAGE
        self.mapping.madvise(mmap.MADV_RANDOM, start, place.start + place.nbytes - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), start, place.nbytes, os.POSIX_FADV_RANDOM)

    def __deepcopy__(self, memo):
        """The same open file, under a mapping of its own."""
        twin = object.__new__(TableFile)
        twin.__dict__.update(self.__dict__)
        twin._map()
        return twin

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

    file: TableFile
    name: str

    def tensor(self) -> torch.Tensor:
        return self.file.tensor(self.name)

    def is_under(self, block: torch.Tensor) -> bool:
        """Whether a block is still a view of this mapping, so that it changes where the file does."""
        address = self.file.address + self.file.places[self.name].start
        return block.device.type == "cpu" and block.data_ptr() == address

    def was_written(self) -> bool:
        return self.file.was_written(self.name)

    def holds(self, block: torch.Tensor) -> bool:
        """Whether the file has the bytes of a block; reads it only where nothing else can tell."""
        if self.is_under(block) and not self.was_written():
            return True
        return not block.is_meta and same_bytes(block, self.file.content(self.name).pieces())


def same_bytes(tensor: torch.Tensor, pieces: Iterable[bytes | bytearray | memoryview]) -> bool:
    """Whether a tensor has these bytes; compares piece by piece."""
    ours, start = tensor.detach().reshape(-1).view(torch.uint8), 0
    for piece in pieces:
        here = ours[start : start + len(piece)].cpu()
        if len(here) != len(piece) or not torch.equal(here, torch.frombuffer(piece, dtype=torch.uint8)):
            return False
        start += len(piece)
    return start == len(ours)


def pages_of_rows(addresses: np.ndarray, row_bytes: int) -> np.ndarray:
    """Distinct page numbers, ascending, that hold the rows at these addresses, (n,) int64.

    Addresses differ by multiples of `row_bytes`. Few steps: beside a busy thread each one may wait for the interpreter.
    """
    pages = addresses >> PAGE_SHIFT
    if len(addresses) and not (PAGE % row_bytes == 0 and int(addresses[0]) % row_bytes == 0):
        last = (addresses + row_bytes - 1) // PAGE
        steps = range(1, (row_bytes - 1) // PAGE + 2)
        pages = np.concatenate([pages, *(np.minimum(pages + step, last) for step in steps)])
    pages.sort()
    is_new = np.empty(len(pages), dtype=bool)
    is_new[:1] = True
    np.not_equal(pages[1:], pages[:-1], out=is_new[1:])
    return pages[is_new]


class PageReader:
    """Brings pages of mapped files into the page cache, many at once."""

    def __init__(self):
        self._process = 0
        self._process_handle = -1
        self._batched = sys.platform == "linux" and hasattr(os, "pidfd_open")
        self._libc = ctypes.CDLL(None, use_errno=True) if self._batched else None
        self._thread: ThreadPoolExecutor | None = None
        self._started: list[tuple[torch.Tensor, list[Future]]] = []
        self._lock = threading.Lock()

    def remember(self, row_ids: torch.Tensor, futures: list[Future]) -> None:
        """Keep what has been started for a lookup, until `take`; of many that nobody takes the oldest are let go."""
        with self._lock:
            self._started = [*self._started, (row_ids, futures)][-PREFETCHES_KEPT:]

    def take(self, row_ids: torch.Tensor) -> list[Future] | None:
        """What has been started for a lookup with this very tensor; None for nothing."""
        with self._lock:
            found = next((futures for ids, futures in self._started if ids is row_ids), None)
            self._started = [each for each in self._started if each[0] is not row_ids]
            return found

    def read(self, pages: np.ndarray, file: TableFile) -> None:
        """Have pages read; returns when the device has been asked for all of them, or later.

        Args:
            pages: (n,) page numbers (address // page size) of `file`'s mapping.
            file: what they belong to.

        Raises:
            OSError: the kernel refuses the pages themselves.
        """
        if (
            len(pages) > 4 * SAMPLED_PAGES
            and file.cached_share(pages[:: len(pages) // SAMPLED_PAGES], least=1.0) == 1.0
        ):
            # Asking for each of many costs more than reading it.
            return
        if self._batched and self._advise(pages):
            return
        self._touch(pages, file)

    def start(self, pages: np.ndarray, file: TableFile) -> Future | None:
        """As `read`, but a long one goes on in the reading thread: then its future, which tells of errors."""
        if len(pages) <= PAGES_AT_ONCE:
            self.read(pages, file)
            return None
        return self.in_background(lambda: self.read(pages, file))

    def in_background(self, work: Callable) -> Future:
        """Run in the one reading thread of this reader, in the order of calls."""
        self._belong_to_this_process()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-reader")
        return self._thread.submit(work)

    def _belong_to_this_process(self) -> None:
        if self._process != os.getpid():
            # A forked child has neither its parent's thread nor its parent's handle.
            self._process, self._thread, self._process_handle = os.getpid(), None, -1

    def _advise(self, pages: np.ndarray) -> bool:
        """process_madvise(MADV_WILLNEED): False where the system does not have it, or forbids it."""
        self._belong_to_this_process()
        try:
            if self._process_handle < 0:
                self._process_handle = os.pidfd_open(self._process)
        except OSError:
            self._batched = False
            return False
        ranges = np.empty((len(pages), 2), dtype=np.uint64)
        ranges[:, 0] = pages * PAGE
        ranges[:, 1] = PAGE
        parts = [ranges[start : start + RANGES_OF_A_CALL] for start in range(0, len(pages), RANGES_OF_A_CALL)]
        if len(parts) <= ASKING_THREADS:
            is_done = all(map(self._call, parts))
        else:
            # While one waits for the interpreter, beside a busy thread, another is asking.
            with ThreadPoolExecutor(ASKING_THREADS) as threads:
                is_done = all(threads.map(self._call, parts))
        self._batched = is_done
        return is_done

    def _call(self, part: np.ndarray) -> bool:
        syscall = self._libc.syscall
        syscall.restype = ctypes.c_long
        done = syscall(
            ctypes.c_long(PROCESS_MADVISE),
            ctypes.c_long(self._process_handle),
            ctypes.c_void_p(part.ctypes.data),
            ctypes.c_size_t(len(part)),
            ctypes.c_long(mmap.MADV_WILLNEED),
            ctypes.c_long(0),
        )
        return done == len(part) * PAGE

    @staticmethod
    def _touch(pages: np.ndarray, file: TableFile) -> None:
        """Read a byte of every page in many threads: where the kernel takes no batches."""
        content = torch.frombuffer(file.mapping, dtype=torch.uint8)
        offsets = torch.from_numpy(pages * PAGE - file.address)
        parts = [part for part in offsets.chunk(READING_THREADS) if len(part)]
        with ThreadPoolExecutor(READING_THREADS) as threads:
            list(threads.map(lambda part: content.index_select(0, part), parts))

    def __deepcopy__(self, memo):
        return PageReader()

    def __reduce__(self):
        return PageReader, ()

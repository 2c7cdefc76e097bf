"""Rows out of files: a mapping that is opened once, and advice to the kernel in batches, so that the pages of many rows
are read at once and nothing else is. Rows that are read often may be kept in front of it.

Knows files, addresses and pages; nothing of tables or models. See scripts/benchmarks/bench_reads.py.
"""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, starmap

import numpy as np
import torch

from .disk_files import PAGE, MappedFile


PAGE_SHIFT = PAGE.bit_length() - 1
# Ranges of one system call (the kernel's IOV_MAX).
RANGES_OF_A_CALL = 1024
# A device takes about 256 requests before it blocks who asks, so more than that is another thread's work.
PAGES_AT_ONCE = 128
SAMPLED_PAGES = 64
ASKING_THREADS = 4
# Of a read of many, so many pages are asked for, and then mapped, while the next are asked for.
PAGES_AT_A_TIME = ASKING_THREADS * RANGES_OF_A_CALL
READING_THREADS = 32
# Lookups of one table that may be prefetched and not yet made.
PREFETCHES_KEPT = 8
# What is read aside, for a step to come, gives way to the step before it. So few pages at a time leave room in the
# device's queue; a full one is emptied by threads of the kernel, before whom everybody has to wait.
PAGES_ASIDE = 64
LOWEST_PRIORITY = 19
PROCESS_MADVISE = 440
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23


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


def touch(file: MappedFile, pages: np.ndarray) -> bool:
    """Read a byte of every page, (n,) page numbers, in this thread; True, when they are here and mapped."""
    content = torch.frombuffer(file.mapping, dtype=torch.uint8)
    content.index_select(0, torch.from_numpy(pages * PAGE - file.address))
    return True


def are_here(pages: np.ndarray, file: MappedFile) -> bool:
    """Whether a sample of many pages is in the page cache; False for few, which are as soon asked for."""
    if len(pages) <= 4 * SAMPLED_PAGES:
        return False
    return file.cached_share(pages[:: len(pages) // SAMPLED_PAGES], least=1.0) == 1.0


def ranges_of_calls(pages: np.ndarray, at_a_time: int = RANGES_OF_A_CALL) -> list[np.ndarray]:
    """(n,) page numbers as what system calls take: start and length in bytes, each (at most `at_a_time`, 2)."""
    ranges = np.empty((len(pages), 2), dtype=np.uint64)
    ranges[:, 0] = pages * PAGE
    ranges[:, 1] = PAGE
    return [ranges[start : start + at_a_time] for start in range(0, len(pages), at_a_time)]


class Prefetches:
    """What has been started for lookups of one table that are still to come."""

    def __init__(self):
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

    def __deepcopy__(self, memo):
        return Prefetches()

    def __reduce__(self):
        return Prefetches, ()


class PageReader:
    """Brings pages of mapped files into the page cache, many at once."""

    def __init__(self):
        self._process = 0
        self._process_handle = -1
        self._batched = sys.platform == "linux" and hasattr(os, "pidfd_open")
        if self._batched:
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._libc.syscall.restype = ctypes.c_long
            long = ctypes.c_long
            self._libc.syscall.argtypes = [long, long, ctypes.c_void_p, ctypes.c_size_t, long, long]
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def read(self, pages: np.ndarray, file: MappedFile) -> None:
        """Have pages read for one who waits for them; many are mapped while those behind them are read.

        Args:
            pages: (n,) page numbers (address // page size) of `file`'s mapping, ascending.
            file: what they belong to.

        Raises:
            OSError: the kernel refuses the pages themselves.
        """
        self._bring(pages, file, partial(touch, file))

    def read_aside(self, pages: np.ndarray, file: MappedFile) -> Future:
        """Have pages read and mapped while others work, and return at once; arguments as of `read`.

        The reading thread goes behind all others from then on. Pages of a file that is written through its mapping are
        mapped for that where the kernel can (Linux 6.13), and count as changed.
        """
        return self.in_background(partial(self._read_aside, pages, file))

    def start(self, pages: np.ndarray, file: MappedFile) -> Future | None:
        """Have pages read for one who comes later, and return when the device has been asked for them. Asking for many
        goes on in the reading thread: then its future, which tells of errors."""
        if len(pages) <= PAGES_AT_ONCE:
            self._bring(pages, file)
            return None
        return self.in_background(partial(self._bring, pages, file))

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The one stream of this reader on a GPU: memory that a stream has used is kept for that stream."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def in_background(self, work: Callable) -> Future:
        """Run in the one reading thread of this reader, in the order of calls."""
        self._belong_to_this_process()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-reader")
        return self._thread.submit(work)

    def _belong_to_this_process(self) -> None:
        """A forked child has neither its parent's thread nor its parent's handle."""
        if self._process == os.getpid():
            return
        try:
            self._process_handle = os.pidfd_open(os.getpid()) if self._batched else -1
        except OSError:
            self._batched = False
        self._process, self._thread = os.getpid(), None

    def _bring(self, pages: np.ndarray, file: MappedFile, map_piece: Callable | None = None) -> None:
        # Asking for each of many costs more than reading it.
        if not are_here(pages, file) and not self._advise(pages, map_piece):
            with ThreadPoolExecutor(READING_THREADS) as threads:
                list(threads.map(partial(touch, file), np.array_split(pages, READING_THREADS)))

    def _read_aside(self, pages: np.ndarray, file: MappedFile) -> None:
        if sys.platform == "linux":
            # There a thread has a priority of its own.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        pieces = ranges_of_calls(pages, PAGES_ASIDE)
        populate = MADV_POPULATE_WRITE if file.is_shared else MADV_POPULATE_READ
        calls = [(populate, piece.ctypes.data, len(piece)) for piece in pieces]
        if not are_here(pages, file):
            asked = [(mmap.MADV_WILLNEED, address, count) for _, address, count in calls]
            # Each piece is asked for while the one before it is on its way.
            calls = [*asked[:1], *chain.from_iterable(zip(asked[1:], calls)), *calls[-1:]]
        # Nothing is left to do between these calls, so that others hardly ever wait for the interpreter.
        if not (self._batched and all(starmap(self._call, calls))):
            self.read(pages, file)
            touch(file, pages)

    def _advise(self, pages: np.ndarray, map_piece: Callable | None = None) -> bool:
        """process_madvise(MADV_WILLNEED): False where the system does not have it, or forbids it."""
        self._belong_to_this_process()
        if not self._batched:
            return False

        def ask(part: np.ndarray) -> bool:
            return self._call(mmap.MADV_WILLNEED, part.ctypes.data, len(part))

        if len(pages) <= PAGES_AT_A_TIME:
            self._batched = all(map(ask, ranges_of_calls(pages)))
            return self._batched
        work: list[Callable[[], bool]] = []
        behind: list[Callable[[], bool]] = []
        for piece in np.split(pages, range(PAGES_AT_A_TIME, len(pages), PAGES_AT_A_TIME)):
            # What was asked for before this piece has come when it is mapped.
            work += [partial(ask, part) for part in ranges_of_calls(piece)] + behind
            behind = [partial(map_piece, piece)] if map_piece is not None else []
        # While one waits for the interpreter, beside a busy thread, another is asking.
        with ThreadPoolExecutor(ASKING_THREADS) as threads:
            self._batched = all(threads.map(lambda call: call(), work + behind))
        return self._batched

    def _call(self, advice: int, address: int, count: int) -> bool:
        """process_madvise for as many ranges as lie at an address."""
        return self._libc.syscall(PROCESS_MADVISE, self._process_handle, address, count, advice, 0) == count * PAGE

    def __deepcopy__(self, memo):
        return PageReader()

    def __reduce__(self):
        return PageReader, ()


class HotRows:
    """A direct-mapped cache: the row of key k can lie in one place, k modulo the size; a newer row takes it.

    Against least-recently-used that loses 2 to 11 % of the hits, and costs no bookkeeping.

    hits, misses: rows asked for, counted once for each time they are asked for in a call.
    bytes_read: of the distinct rows that were not there.
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        """
        Args:
            size: rows it holds, at least 1.
            width: elements of a row.
            dtype: of the rows as they are stored.
            device: where they are kept.
        """
        if size < 1:
            raise ValueError(f"hot_rows must be at least 1 row per table, got {size}; leave it out for no cache.")
        self.keys = np.full(size, -1, dtype=np.int64)
        # Tensors that are made in inference mode could never be written outside of it.
        with torch.inference_mode(False):
            self.rows = torch.zeros(size, width, dtype=dtype, device=device)
        self.hits = self.misses = self.bytes_read = 0
        self._lock = threading.Lock()
        # On a GPU, the end of the last work with `rows`: prefetches and forwards come on streams of their own.
        self._last_use: torch.cuda.Event | None = None
        self._end_use()

    def __repr__(self) -> str:
        return (
            f"HotRows({self.size} rows, {self.rows.nbytes} bytes on {self.rows.device}; {self.hits} hits, "
            f"{self.misses} misses, {self.bytes_read} bytes read)"
        )

    @property
    def size(self) -> int:
        return len(self.keys)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """The keys that are not here."""
        return keys[self.keys[keys % self.size] != keys]

    def lookup(self, keys: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]) -> torch.Tensor:
        """Rows of keys, from here or by `read`, which is called once with the distinct keys that are missing.

        Args:
            keys: (n,) int64, none negative.
            read: (m,) keys to (m, width) rows on the device of this cache.

        Returns:
            (n, width).
        """
        with self._lock:
            self._begin_use()
            try:
                return self._lookup(keys, read)
            finally:
                self._end_use()

    def _begin_use(self) -> None:
        if self._last_use is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self._last_use)

    def _end_use(self) -> None:
        if self.rows.is_cuda:
            stream = torch.cuda.current_stream(self.rows.device)
            self.rows.record_stream(stream)
            self._last_use = stream.record_event()

    def _lookup(self, keys: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]) -> torch.Tensor:
        slots = keys % self.size
        is_hit = self.keys[slots] == keys
        rows = self.rows.index_select(0, self._index(slots))
        self.hits += int(is_hit.sum())
        if is_hit.all():
            return rows
        where = np.flatnonzero(~is_hit)
        self.misses += len(where)
        missing, back = np.unique(keys[where], return_inverse=True)
        fresh = read(missing)
        self.bytes_read += fresh.nbytes
        rows.index_copy_(0, self._index(where), fresh.index_select(0, self._index(back)))
        # Of several new rows for one place the first is kept, and key and row stay together.
        places, first = np.unique(missing % self.size, return_index=True)
        self.keys[places] = -1
        self.rows.index_copy_(0, self._index(places), fresh.index_select(0, self._index(first)))
        self.keys[places] = missing[first]
        return rows

    def forget(self, keys: np.ndarray) -> None:
        """Forget rows that have changed."""
        with self._lock:
            slots = keys % self.size
            self.keys[slots[self.keys[slots] == keys]] = -1

    def _index(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.rows.device)

    def clear(self) -> None:
        """Forget all rows; the counts stay."""
        with self._lock:
            self.keys.fill(-1)

    def __deepcopy__(self, memo):
        return HotRows(self.size, self.rows.shape[1], self.rows.dtype, self.rows.device)

    def __reduce__(self):
        return HotRows, (self.size, self.rows.shape[1], self.rows.dtype, self.rows.device)

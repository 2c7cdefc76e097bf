"""How much memory there is to use, what this process takes, and running a command with less.

The page cache counts towards a limit.
"""

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path


# Memory cgroups of version 1 and 2, and the files of a limit and of what counts against it.
LIMITS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
)
NO_LIMIT = 2**62


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[list[str]]:
    """Make a memory cgroup, which needs root.

    Yields:
        The arguments to put in front of a command that runs within the limit, none where no cgroup can be made.
    """
    for root, file, _ in LIMITS:
        group = Path(root) / f"engram-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "-"]
        finally:
            group.rmdir()
        return
    yield []


@contextlib.contextmanager
def limited_memory(limit_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """Make a memory cgroup, or else lock the rest of the machine's memory. Both need root.

    Yields:
        How memory is limited, in words, and the arguments to put in front of a command.
    """
    with memory_cgroup(limit_bytes) as before:
        if before:
            yield f"a memory cgroup of {limit_bytes / 1e9:.2f} GB", before
            return
    locked = mmap.mmap(-1, max(free_bytes() - limit_bytes, mmap.PAGESIZE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(locked))
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(locked))):
        raise SystemExit("Memory can neither be limited by a cgroup nor be locked. Run this as root.")
    yield f"{len(locked) / 1e9:.1f} GB locked, {limit_bytes / 1e9:.2f} GB left", []


def bytes_of(file: str, field: str) -> int:
    """What a file of /proc says of a field, in kilobytes there."""
    with open(file) as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def free_bytes() -> int:
    """What the machine has free or can free."""
    return bytes_of("/proc/meminfo", "MemAvailable")


def own_bytes(field: str) -> int:
    """What this process takes: now "VmRSS", without files "RssAnon", at most "VmHWM"."""
    return bytes_of("/proc/self/status", field)


class MemoryWatch:
    """Looks a hundred times a second at what this process has in memory that no file holds.

    most_bytes: the most that was seen.
    """

    most_bytes = 0

    def __enter__(self) -> "MemoryWatch":
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.ended.is_set():
            self.most_bytes = max(self.most_bytes, own_bytes("RssAnon"))
            self.ended.wait(0.01)


def own_limits() -> Iterator[tuple[int, int]]:
    """The limit of each memory cgroup that this process is in and that has one, and what counts against it."""
    with open("/proc/self/cgroup") as file:
        paths = {Path(line.rstrip("\n").split(":", 2)[2].lstrip("/")) for line in file}
    for root, limit, used in LIMITS:
        for path in paths:
            # A container sees its own group as the root, and every group above has a limit too.
            for group in {Path(root), *(Path(root) / each for each in (path, *path.parents))}:
                with contextlib.suppress(OSError, ValueError):
                    most, taken = ((group / name).read_text().strip() for name in (limit, used))
                    # Version 2 says "max" for no limit, which is no number, and version 1 the largest one.
                    if int(most) < NO_LIMIT:
                        yield int(most), int(taken)


def available_bytes() -> int:
    """What this process can still take: what the machine has free, or what its memory cgroups leave of their limits."""
    return max(0, min([free_bytes(), *(most - taken for most, taken in own_limits())]))

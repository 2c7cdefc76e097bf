"""How much memory there is to use, and running a command with less. The page cache counts towards a limit."""

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path


# Memory cgroups of version 1 and 2, and the file that takes the limit.
CGROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
# Where version 1 and 2 have a limit and what counts against it.
LIMITS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
)


@contextlib.contextmanager
def limited_memory(limit_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """Make a memory cgroup, or else lock the rest of the machine's memory. Both need root.

    Yields:
        How memory is limited, in words, and the arguments to put in front of a command.
    """
    for root, file in CGROUPS:
        group = Path(root) / f"engram-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
            yield f"a memory cgroup of {limit_bytes / 1e9:.2f} GB", ["sh", "-c", enter, "-"]
        finally:
            group.rmdir()
        return
    with open("/proc/meminfo") as file:
        available_bytes = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    locked = mmap.mmap(-1, max(available_bytes - limit_bytes, mmap.PAGESIZE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(locked))
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(locked))):
        raise SystemExit("Memory can neither be limited by a cgroup nor be locked. Run this as root.")
    yield f"{len(locked) / 1e9:.1f} GB locked, {limit_bytes / 1e9:.2f} GB left", []


def available_bytes() -> int:
    """What this process can still take: what the machine has free, or what its memory cgroups leave of their limits."""
    with open("/proc/meminfo") as file:
        found = [1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))]
    with open("/proc/self/cgroup") as file:
        paths = {Path(line.rstrip("\n").split(":", 2)[2].lstrip("/")) for line in file}
    for root, limit, used in LIMITS:
        for path in paths:
            # A container sees its own group as the root, and every group above has a limit too.
            for group in {Path(root), *(Path(root) / each for each in (path, *path.parents))}:
                with contextlib.suppress(OSError, ValueError):
                    most, taken = ((group / name).read_text().strip() for name in (limit, used))
                    # Version 2 says "max" for no limit, which is no number.
                    found.append(int(most) - int(taken))
    return max(0, min(found))

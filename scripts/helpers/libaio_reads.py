"""Random 4K reads at a depth of 128 through the kernel's asynchronous reads. Measures what fio measures."""

import ctypes
import mmap
import os
import platform
import time
from pathlib import Path

import numpy as np


DEPTH = 128
PAGE = 4096
SECONDS = 2.0
# io_setup, io_destroy, io_getevents, io_submit.
NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
REQUEST = np.dtype(
    [("data", "u8"), ("key", "u4"), ("flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("file", "u4")]
    + [("buffer", "u8"), ("bytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("flags2", "u4"), ("event_file", "u4")]
)
EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])


def reads_a_second(path: Path) -> float | None:
    """Random direct reads of pages a second; None where the system does not allow them."""
    if platform.machine() not in NUMBERS or not hasattr(os, "O_DIRECT"):
        return None
    setup, destroy, getevents, submit = NUMBERS[platform.machine()]
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long

    def call(number: int, *arguments: int) -> int:
        return syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))

    context = ctypes.c_ulong(0)
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    if call(setup, DEPTH, ctypes.addressof(context)) < 0:
        os.close(file)
        return None
    memory = mmap.mmap(-1, DEPTH * PAGE)
    buffers = np.frombuffer(memory, dtype=np.uint8).ctypes.data + PAGE * np.arange(DEPTH, dtype=np.uint64)
    requests, events = np.zeros(DEPTH, REQUEST), np.zeros(DEPTH, EVENT)
    requests["file"], requests["buffer"], requests["bytes"] = file, buffers, PAGE
    requests["data"] = np.arange(DEPTH)
    addresses = requests.ctypes.data + REQUEST.itemsize * np.arange(DEPTH, dtype=np.uint64)
    pages = os.path.getsize(path) // PAGE
    generator = np.random.default_rng()
    done, free, start = 0, np.arange(DEPTH), time.perf_counter()
    try:
        while (elapsed := time.perf_counter() - start) < SECONDS:
            requests["offset"][free] = generator.integers(0, pages, len(free)) * PAGE
            pointers = np.ascontiguousarray(addresses[free])
            if call(submit, context.value, len(pointers), pointers.ctypes.data) != len(pointers):
                return None
            count = call(getevents, context.value, 1, DEPTH, events.ctypes.data, 0)
            if count < 1 or (events["result"][:count] != PAGE).any():
                return None
            free = events["data"][:count].astype(np.int64)
            done += count
        return done / elapsed
    finally:
        call(destroy, context.value)
        os.close(file)

"""Host memory on chosen NUMA nodes. A CXL memory expander is such a node, without processors of its own.

Memory of blocks is mapped page by page, and bound by the system call mbind(2) before anything is written to it. libnuma
is not needed. Nothing here says how fast a node is.
"""

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch


INTERLEAVE = "interleave"
# Policies of linux/mempolicy.h, and the flag of get_mempolicy that asks for the policy of an address.
MPOL_BIND, MPOL_INTERLEAVE, MPOL_F_ADDR = 2, 3, 2
# Numbers of mbind and get_mempolicy.
SYSCALLS = {"x86_64": (237, 239), "aarch64": (235, 236)}
# Bits of a set of nodes; the kernel takes no larger one.
LARGEST_SET = 1024
WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
NODES_WITH_MEMORY = Path("/sys/devices/system/node/has_memory")


class HostNodes(NamedTuple):
    """Where pages of host memory may lie: on any of some nodes, or on all of them in turn.

    nodes: numbers of NUMA nodes, ascending.
    is_interleaved: whether neighbouring pages go to different nodes.
    """

    nodes: tuple[int, ...]
    is_interleaved: bool = False

    @classmethod
    def of(cls, host_nodes: Sequence[int] | str) -> "HostNodes":
        """What an argument `host_nodes` means: a list of nodes, or "interleave" for all nodes that have memory.

        Raises:
            ValueError: it is neither, or this machine has no such node.
            NotImplementedError: this system is not Linux, or the processor is not known here.
        """
        if sys.platform != "linux" or platform.machine() not in SYSCALLS:
            raise NotImplementedError(
                f"host_nodes binds memory by Linux's mbind on {' and '.join(SYSCALLS)}, and this is {sys.platform} on "
                f"{platform.machine()}. Leave host_nodes out."
            )
        known = nodes_with_memory()
        if host_nodes == INTERLEAVE:
            return cls(known, is_interleaved=True)
        given = tuple(host_nodes) if isinstance(host_nodes, list | tuple) else ()
        if not given or not all(type(node) is int for node in given):
            raise ValueError(f'host_nodes is a list of NUMA nodes such as [2], or "interleave"; got {host_nodes!r}.')
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                f"host_nodes names node {unknown[0]}, on which this process can have no memory. It can on: "
                f"{', '.join(map(str, known))}."
            )
        return cls(tuple(sorted(set(given))))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in memory that is bound to these nodes, with pages of its own.

        Raises:
            OSError: the system does not let this process bind memory.
        """
        nbytes = prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        # The tensor keeps the mapping.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        words = (ctypes.c_ulong * (LARGEST_SET // WORD_BITS))()
        for node in self.nodes:
            words[node // WORD_BITS] |= 1 << node % WORD_BITS
        policy = MPOL_INTERLEAVE if self.is_interleaved else MPOL_BIND
        size = ctypes.c_ulong(nbytes)
        _call(0, ctypes.c_void_p(tensor.data_ptr()), size, policy, words, ctypes.c_ulong(LARGEST_SET), 0)
        return tensor.view(dtype).view(*shape)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor on the CPU is bound to these nodes already."""
        return not tensor.nbytes or policy_at(tensor.data_ptr()) == self


def nodes_with_memory() -> tuple[int, ...]:
    """Numbers of the NUMA nodes on which this process can have memory, ascending."""
    status = Path("/proc/self/status").read_text()
    allowed = next((line.split()[1] for line in status.splitlines() if line.startswith("Mems_allowed_list:")), "0")
    here = _numbers(NODES_WITH_MEMORY.read_text()) if NODES_WITH_MEMORY.exists() else {0}
    return tuple(sorted(here & _numbers(allowed)))


def policy_at(address: int) -> HostNodes | None:
    """What the memory at an address is bound to; None where the process's own policy counts."""
    policy, words = ctypes.c_int(-1), (ctypes.c_ulong * (LARGEST_SET // WORD_BITS))()
    size = ctypes.c_ulong(LARGEST_SET)
    _call(1, ctypes.byref(policy), words, size, ctypes.c_void_p(address), ctypes.c_ulong(MPOL_F_ADDR))
    nodes = tuple(node for node in range(LARGEST_SET) if words[node // WORD_BITS] >> node % WORD_BITS & 1)
    is_interleaved = policy.value == MPOL_INTERLEAVE
    return HostNodes(nodes, is_interleaved) if is_interleaved or policy.value == MPOL_BIND else None


def _numbers(text: str) -> set[int]:
    """Of a list such as "0-1,4"."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {number for part in ranges for number in range(int(part[0]), int(part[-1]) + 1)}


def _call(number: int, *arguments) -> None:
    """One of SYSCALLS.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYSCALLS[platform.machine()][number], *arguments):
        error = ctypes.get_errno()
        raise OSError(
            error,
            f"The system does not bind memory to nodes ({os.strerror(error)}). Containers may forbid it: give this one "
            "the capability SYS_NICE, or leave host_nodes out.",
        )

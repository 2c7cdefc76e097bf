"""A block: a run of whole hash heads of one table. It is one parameter, one tensor in a checkpoint, and has one tier.

A tensor's name comes from the name of its table's module: `<table>.blocks.<number>`. Rows that a training checkpoint
keeps beside its blocks are `<table>.changed.<part>`, and those of a further rank have its number behind that. A table
may sit anywhere in any model.

Tiers, which never change a row:

* `resident`: on the device that computes (on a CPU that is the file's mapping, as in any transformers model);
* `host`: in RAM;
* `disk`: in its file; a lookup reads the pages of its rows and nothing else.
"""

import copy
import ctypes
import mmap
import os
import platform
import re
import sys
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .disk_files import BlockSource, MappedFile, TableFile, same_bytes
from .table_formats import RowFormat


DRAWN_BYTES = 2**26
# Of a file, read at once to be compared with rows. What is made of it takes several times as much.
COMPARED_BYTES = 2**21
RESIDENT, HOST, DISK = "resident", "host", "disk"
# Parts of the rows that a training checkpoint keeps beside its blocks.
ROW_IDS, ROWS, DIGESTS, STAMP = "row_ids", "rows", "digests", "stamp"
# What ROW_IDS was called before version 0.2.
OLD_ROW_IDS = "keys"
BLOCK_KEY = re.compile(r"^(.+)\.blocks\.(0|[1-9]\d*)$")
CHANGED_KEY = re.compile(rf"^(.+)\.changed\.({ROW_IDS}|{OLD_ROW_IDS}|{ROWS}|{DIGESTS}|{STAMP})(?:\.([1-9]\d*))?$")
INTERLEAVE = "interleave"
# Policies of linux/mempolicy.h, and the flag of get_mempolicy that asks for the policy of an address.
MPOL_BIND, MPOL_INTERLEAVE, MPOL_F_ADDR = 2, 3, 2
# Numbers of mbind and get_mempolicy.
SYSCALLS = {"x86_64": (237, 239), "aarch64": (235, 236)}
# Bits of a set of nodes; the kernel takes no larger one.
LARGEST_SET = 1024
WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
NODES_WITH_MEMORY = Path("/sys/devices/system/node/has_memory")

logger = logging.get_logger(__name__)


class BlockName(NamedTuple):
    """Which block of which table a tensor is."""

    table: str
    number: int


def parse_block_name(tensor: str) -> BlockName | None:
    """The table and the number of a block's tensor; None for any other tensor.

    Example:
        >>> parse_block_name("transformer.h.3.engram.table.blocks.12")
        BlockName(table='transformer.h.3.engram.table', number=12)
    """
    match = BLOCK_KEY.match(tensor)
    return None if match is None else BlockName(match[1], int(match[2]))


class ChangedName(NamedTuple):
    """Which part of the changed rows of which table a tensor is, and the rank that held these rows."""

    table: str
    part: str
    rank: int


def parse_changed_name(tensor: str) -> ChangedName | None:
    """The table, and which part of its changed rows a tensor is; None for any other tensor.

    Example:
        >>> parse_changed_name("model.layers.1.engram.table.changed.rows.3")
        ChangedName(table='model.layers.1.engram.table', part='rows', rank=3)
    """
    match = CHANGED_KEY.match(tensor)
    if match is None:
        return None
    return ChangedName(match[1], ROW_IDS if match[2] == OLD_ROW_IDS else match[2], int(match[3] or 0))


def is_of_table(tensor: str) -> bool:
    """Whether a tensor is a block, or a part of the changed rows of a table."""
    return BLOCK_KEY.match(tensor) is not None or CHANGED_KEY.match(tensor) is not None


def block_name(table: str, number: int) -> str:
    """The tensor of a block, by the name of its table's module."""
    return f"{table}.blocks.{number}"


def changed_name(table: str, part: str, rank: int = 0) -> str:
    """A tensor of the changed rows of a table that a rank held; one process is rank 0."""
    return f"{table}.changed.{part}" + (f".{rank}" if rank else "")


def layer_of_table(table: str) -> int:
    """The layer that a table belongs to: the last number in its name.

    Example:
        >>> layer_of_table("transformer.h.3.engram.table")
        3
    """
    numbers = [int(part) for part in table.split(".") if part.isdigit()]
    return numbers[-1] if numbers else 0


def split_into_blocks(rows_of_head: Sequence[int], head_dim: int, block_elements: int) -> list[list[int]]:
    """Rows of the heads of each block: consecutive whole heads while they fit into `block_elements`, at least one.

    Example:
        >>> split_into_blocks([101, 103, 211], head_dim=4, block_elements=1000)
        [[101, 103], [211]]
    """
    blocks: list[list[int]] = [[]]
    for rows in rows_of_head:
        if blocks[-1] and (sum(blocks[-1]) + rows) * head_dim > block_elements:
            blocks.append([])
        blocks[-1].append(rows)
    return blocks


class RowBlocks(nn.ParameterList):
    """The parameters of a table's blocks."""

    def __init__(self, stored_as: RowFormat, head_dim: int):
        super().__init__()
        self.stored_as, self.head_dim = stored_as, head_dim

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw all rows from a normal distribution, in place."""
        for block in self:
            if self.stored_as.is_trainable:
                init.normal_(block, mean=0.0, std=std)
            elif not block.is_meta and not getattr(block, "_is_hf_initialized", False):
                for part in block.split(max(1, DRAWN_BYTES // (block.shape[1] * block.element_size()))):
                    rows = torch.empty(part.shape[0], self.head_dim, device=block.device).normal_(0.0, std)
                    part.copy_(self.stored_as.encode(rows))


# Host memory on chosen NUMA nodes. It is mapped page by page, and bound by the system call mbind(2) before anything is
# written to it. A CXL memory expander is such a node, without processors of its own.


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
        _ask_kernel(0, ctypes.c_void_p(tensor.data_ptr()), size, policy, words, ctypes.c_ulong(LARGEST_SET), 0)
        return tensor.view(dtype).view(*shape)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor on the CPU is bound to these nodes already."""
        return not tensor.nbytes or policy_at(tensor.data_ptr()) == self


def nodes_with_memory() -> tuple[int, ...]:
    """Numbers of the NUMA nodes on which this process can have memory, ascending."""
    status = Path("/proc/self/status").read_text()
    allowed = next((line.split()[1] for line in status.splitlines() if line.startswith("Mems_allowed_list:")), "0")
    here = _numbers_in(NODES_WITH_MEMORY.read_text()) if NODES_WITH_MEMORY.exists() else {0}
    return tuple(sorted(here & _numbers_in(allowed)))


def policy_at(address: int) -> HostNodes | None:
    """What the memory at an address is bound to; None where the process's own policy counts."""
    policy, words = ctypes.c_int(-1), (ctypes.c_ulong * (LARGEST_SET // WORD_BITS))()
    size = ctypes.c_ulong(LARGEST_SET)
    _ask_kernel(1, ctypes.byref(policy), words, size, ctypes.c_void_p(address), ctypes.c_ulong(MPOL_F_ADDR))
    nodes = tuple(node for node in range(LARGEST_SET) if words[node // WORD_BITS] >> node % WORD_BITS & 1)
    is_interleaved = policy.value == MPOL_INTERLEAVE
    return HostNodes(nodes, is_interleaved) if is_interleaved or policy.value == MPOL_BIND else None


def _numbers_in(text: str) -> set[int]:
    """Of a list such as "0-1,4"."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {number for part in ranges for number in range(int(part[0]), int(part[-1]) + 1)}


def _ask_kernel(number: int, *arguments) -> None:
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


# One block.


class Block:
    """One block of a table. Other files read what it holds, and change it by its methods alone.

    number: its place in the table.
    first_row, num_rows: the row ids in the table that it holds.
    rows_of_head: rows of each of its heads. The last block may hold more rows, which nobody reads.
    tier: where it lives.
    source: the tensor of a file that it comes from; None for a block that was drawn.
    base: what the next checkpoint of a training run may stand on; see table_changes.py.
    saved_in: the file and the tensor that the last save has put it in.
    host_nodes: where its memory is bound to when it goes to the host tier; None leaves that to the system.
    digest_of_loaded: SHA-256 of the whole block that a state dict has brought, where this process holds a part of it.
    """

    def __init__(self, parameters: nn.ParameterList, number: int, first_row: int, rows_of_head: list[int], width: int):
        self._parameters = parameters
        self.number, self.first_row, self.rows_of_head = number, first_row, rows_of_head
        self.num_rows, self.row_width = sum(rows_of_head), width
        self.tier = RESIDENT
        self.source: BlockSource | None = None
        self.base: Base | None = None
        self.saved_in: tuple[Path, str] | None = None
        self.host_nodes: HostNodes | None = None
        self.digest_of_loaded: bytes | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return self._parameters[self.number]

    @parameter.setter
    def parameter(self, value: nn.Parameter) -> None:
        self._parameters[self.number] = value

    @property
    def rows(self) -> torch.Tensor:
        """(rows, row width), without a graph."""
        return self.parameter.detach()

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.row_width

    @property
    def row_nbytes(self) -> int:
        return self.row_width * self.parameter.dtype.itemsize

    @property
    def is_resident(self) -> bool:
        return self.tier == RESIDENT

    @property
    def is_on_disk(self) -> bool:
        return self.tier == DISK

    def goes_to_disk(self, tier: str) -> bool:
        """Whether moving to a tier takes the rows out of memory."""
        return tier == DISK and not self.is_on_disk

    def require_memory(self) -> None:
        """
        Raises:
            ValueError: something that does not know tables has moved the block away.
        """
        if self.parameter.is_meta:
            raise ValueError(
                f"Block {self.number} of this table has no memory: accelerate's hooks, which move whole weights in "
                "every forward, cannot serve a table. Load the model with from_pretrained(folder, device_map={...}), "
                'where a table or a block has an entry of its own, such as "model.layers.1.engram.table": "disk".'
            )

    def mapped_file(self) -> MappedFile | None:
        """The file that the block is mapped from; None for a block in memory.

        Raises:
            ValueError: the block is on disk and no longer lies under its file.
        """
        if self.source is None or self.parameter.is_meta:
            return None
        if self.source.is_under(self.parameter):
            return self.source.file
        if self.is_on_disk:
            raise ValueError(
                f"Block {self.number} of this table was on disk ({self.source.file.path}), and something has replaced "
                f"it by a copy in memory ({self.parameter.dtype}, {self.parameter.nbytes:,} bytes). Load the model "
                "again and leave the table alone: prepare_model_for_kbit_training, for one, casts every parameter; "
                "place tables on disk after it, with model.place_tables."
            )
        return None

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of this block, (n,) counted from its first, lie in this process."""
        return self.parameter.data_ptr() + rows * self.row_nbytes

    def place(self, tier: str, device: torch.device | str | int | None = None) -> None:
        """Move to a tier; `device` is for RESIDENT.

        Raises:
            ValueError: to disk, and no file holds these rows.
        """
        if tier == DISK:
            source = self._source_that_holds()
            moved = self.rows if source.is_under(self.parameter) else source.tensor()
            source.file.expect_random_reads(source.name)
        else:
            moved = self._in_memory() if tier == HOST else self.rows.to(device)
        self._set(moved)
        self.tier = tier

    def _set(self, tensor: torch.Tensor) -> None:
        self.parameter = nn.Parameter(tensor, requires_grad=self.parameter.requires_grad)

    def _in_memory(self) -> torch.Tensor:
        """The rows in host memory of their own; not copied where they are there already."""
        is_mapped = self.source is not None and self.source.is_under(self.parameter)
        is_in_place = self.host_nodes is None or (self.rows.device.type == "cpu" and self.host_nodes.hold(self.rows))
        if self.rows.device.type == "cpu" and not is_mapped and is_in_place:
            return self.rows
        copied = self._host_memory()
        if self.source is None or not is_mapped:
            return copied.copy_(self.rows)
        self.source.file.check_unchanged()
        if self.source.was_written():
            return copied.copy_(self.rows)
        self.source.file.read_into(self.source.name, copied)
        return copied

    def _host_memory(self) -> torch.Tensor:
        """Memory for the rows, on the nodes that they are to lie on."""
        if self.host_nodes is None:
            return torch.empty(self.rows.shape, dtype=self.rows.dtype, device="cpu")
        return self.host_nodes.empty(self.rows.shape, self.rows.dtype)

    def _source_that_holds(self) -> BlockSource:
        """The file that the block comes from, or that the last save has put it in, whichever has its rows."""
        known = [] if self.source is None else [self.source]
        if self.saved_in is not None and self.saved_in[0].exists():
            known.append(BlockSource(TableFile(self.saved_in[0]), self.saved_in[1]))
        if not known:
            raise ValueError(
                f"Block {self.number} comes from no file, so it cannot live on disk. Save the model with "
                "save_pretrained and load it again, or place the tables of a loaded model."
            )
        for source in known:
            source.file.check_unchanged()
            if source.holds(self.parameter):
                self.source = source
                return source
        raise ValueError(
            f"Block {self.number} has other rows than {known[0].file.path}, so that file cannot stand for it: it was "
            "changed, or comes from a training checkpoint, which holds changed rows apart. Save the model with "
            "save_pretrained, which makes a file that can."
        )

    def open(self, source: BlockSource, tier: str, device: torch.device | str | int | None = None) -> None:
        """Begin with the rows of a file, whose tensor is the parameter now, and move to a tier as `place` does."""
        self.source = source
        self.place(tier, device)

    def begin_in_memory(self, source: BlockSource | None) -> None:
        """Begin with rows that are the parameter now, and that a file may hold as well."""
        self.tier, self.source = RESIDENT, source

    def hold(self, first_row: int, num_rows: int) -> None:
        """Hold a part of these rows alone, counted as this process counts its rows. Call it before `open`."""
        self.first_row, self.num_rows = first_row, num_rows

    def bind_to(self, nodes: HostNodes | None) -> None:
        """Where its memory is to lie from the next move to the host tier on."""
        self.host_nodes = nodes

    def write(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows, (n, row width), over those at `places`, (n,) int64 counted from its first.

        Its base stays compared: who writes this way marks these rows as changed.
        """
        self.require_memory()
        before = self.parameter._version
        put_rows(self.rows, places, rows, is_mapped=self.is_on_disk)
        if self.base is not None and self.base.version == before:
            self.base = self.base._replace(version=self.parameter._version)

    def stand_on(self, base: "Base | None") -> None:
        """What the next checkpoint of a training run may leave it to; None has it written whole."""
        self.base = base

    def note_save(self, path: Path, tensor: str) -> None:
        """A save has put it into this tensor of a file."""
        self.saved_in = (path, tensor)

    def forget_save(self) -> None:
        """Where the last save has put it is not asked for again."""
        self.saved_in = None

    def note_digest(self, digest: bytes) -> None:
        """SHA-256 of the whole block that a state dict has brought, of which this process holds a part."""
        self.digest_of_loaded = digest

    def read_from(self, source: BlockSource) -> None:
        """Live on disk, in another file that holds these rows."""
        self.source = source
        self._set(source.tensor())
        source.file.expect_random_reads(source.name)

    def load(self, given: torch.Tensor, name: str) -> torch.Tensor:
        """What a state dict has to hold for this block: on disk, the same rows stay there, and others go to memory.
        It stands on no file from then on.

        Args:
            given: what the state dict holds.
            name: of the tensor, for the message.
        """
        source, self.base = self.source, None
        if not self.is_on_disk or source is None or given.shape != self.parameter.shape or source.file.is_shared:
            return given
        if given.dtype != self.parameter.dtype or not source.holds(given):
            logger.warning(
                f"{name} gets other rows than its file has, and moves from disk to host memory. To resume a run on "
                "disk, load the model from the checkpoint that is resumed."
            )
            self._set(self._host_memory())
            self.tier = HOST
            return given
        if not source.holds(self.parameter):
            # What was written lies under the old mapping.
            self.read_from(BlockSource(source.file.map_again(), source.name))
        return self.parameter

    def load_part(self, given: BlockSource, begin: int) -> bool:
        """Take the rows from `begin` on of a whole block in a file, without mapping its pages. A block on disk stays
        there, and takes no other rows than it has; whether it has taken them.

        Args:
            given: the whole block.
            begin: of the rows that this process holds.
        """
        source = self.source
        if not self.is_on_disk or source is None or source.file.is_shared:
            self._read_rows(given, begin)
            return True
        if given.file.dtype_of(given.name) != self.parameter.dtype:
            return False
        nbytes, start = source.file.places[source.name].nbytes, begin * self.row_nbytes
        buffers = bytearray(COMPARED_BYTES), bytearray(COMPARED_BYTES)
        for first in range(0, nbytes, COMPARED_BYTES):
            ours, theirs = (memoryview(each)[: nbytes - first] for each in buffers)
            source.file.read_bytes(source.name, first, ours)
            given.file.read_bytes(given.name, start + first, theirs)
            if ours != theirs:
                return False
        if not source.holds(self.parameter):
            self.read_from(BlockSource(source.file.map_again(), source.name))
        return True

    def _read_rows(self, source: BlockSource, begin: int) -> None:
        """Write those rows from `begin` on of a whole block in a file that differ from this block's."""
        dtype = source.file.dtype_of(source.name)
        row_nbytes = self.row_width * dtype.itemsize
        at_once = max(1, COMPARED_BYTES // row_nbytes)
        for start in range(0, self.num_rows, at_once):
            rows = self.rows[start : start + at_once]
            found = torch.empty(rows.shape, dtype=dtype)
            target = memoryview(found.view(-1).view(torch.uint8).numpy().data)
            source.file.read_bytes(source.name, (begin + start) * row_nbytes, target)
            if rows.dtype != dtype or not same_bytes(rows, [target]):
                rows.copy_(found)

    def copy_with(self, parameters: nn.ParameterList) -> "Block":
        """This record for a copy or a pickle of the model, whose parameters these will be.

        A block on disk is opened there again by the copy, unless it was written. A written one is copied, and so is a
        block of a file that only this run has.
        """
        source = self.source if self.source is not None and self.source.file.can_be_linked else None
        stays_on_disk = self.is_on_disk and source is not None and source.holds(self.parameter)
        tier = HOST if self.is_on_disk and not stays_on_disk else self.tier
        twin = object.__new__(Block)
        twin.__dict__.update({**self.__dict__, "_parameters": parameters, "source": source, "tier": tier, "base": None})
        return twin

    def __deepcopy__(self, memo: dict) -> "Block":
        twin = memo[id(self)] = object.__new__(Block)
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __getstate__(self) -> dict:
        """For pickles: a block in memory brings its rows, and needs no file."""
        return self.__dict__ if self.is_on_disk else {**self.__dict__, "source": None}


class Base(NamedTuple):
    """A tensor of a file that a block in training has come from.

    digest: its SHA-256; None before all rows that have not changed were compared.
    version: of the block's parameter, as torch counts what is written to it, when they were compared.
    known_as: what all ranks call it, after a save over ranks; a rank may have the same rows in a file of its own disk.
    """

    source: BlockSource
    digest: bytes | None = None
    version: int = -1
    known_as: str = ""


def make_blocks(
    parameters: nn.ParameterList,
    rows_of_head: Sequence[int],
    head_dim: int,
    block_elements: int,
    row_width: int,
    rows_behind_heads: int = 0,
) -> list[Block]:
    """The records of a table's blocks, whether their parameters are there yet or not."""
    heads = split_into_blocks(rows_of_head, head_dim, block_elements)
    firsts = accumulate((sum(rows) for rows in heads[:-1]), initial=0)
    blocks = [Block(parameters, i, first, rows, row_width) for i, (first, rows) in enumerate(zip(firsts, heads))]
    blocks[-1].num_rows += rows_behind_heads
    return blocks


def put_rows(target: torch.Tensor, row_ids: torch.Tensor, rows: torch.Tensor, is_mapped: bool) -> None:
    """`target[row_ids] = rows`, for (rows, ...) contiguous and row ids (n,) int64.

    In a CPU's memory by numpy, a row as one element: that takes a fourth of the time of index_copy_. Where a file is
    mapped, the time goes into the kernel's page faults, and index_copy_ has several threads meet them.
    """
    if target.device.type != "cpu" or is_mapped:
        target.index_copy_(0, row_ids.to(target.device), rows.to(target.device))
        return
    row = np.dtype((np.void, target[0].nbytes))
    bytes_of_target, bytes_of_rows = (
        tensor.view(torch.uint8).numpy().reshape(-1).view(row) for tensor in (target, rows.cpu().contiguous())
    )
    bytes_of_target[row_ids.cpu().numpy()] = bytes_of_rows

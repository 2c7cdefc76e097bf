"""All rows of one memory layer, in blocks. The one seam between a model and its rows: row ids in, rows out.

A block is a run of whole hash heads: one parameter, one tensor in the checkpoint. Blocks are independent, so they are
mapped, placed, sharded and saved one by one, and each has a tier of its own:

* `resident`: on the device that computes (on a CPU that is the file's mapping, as in any transformers model);
* `host`: in RAM, pinned where there is a GPU;
* `disk`: in its file; a lookup reads the pages of its rows, and nothing else.

A tier never changes a row. This file knows nothing of models, hashing or gates.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .disk_files import BlockSource, MappedFile, TableFile
from .disk_reading import PageReader, pages_of_rows
from .engram_refusals import refuse_export
from .hot_rows import HotRows
from .table_changes import DIGESTS, KEYS, ROWS, RowChanges
from .table_formats import QUANTIZED_FORMATS, dequantize_rows, quantize_rows, row_bytes
from .table_gradients import RowGradients
from .table_rows import DISK, HOST, RESIDENT, ROW_GRADIENT_NORM, RowsByNumber


DRAWN_BYTES = 2**26

logger = logging.get_logger(__name__)

_BUILDS_BLOCKS: ContextVar[bool] = ContextVar("engram_table_builds_blocks", default=True)


@contextmanager
def tables_without_blocks() -> Iterator[None]:
    """Tables that are built inside have no blocks yet; `EngramTable.open_blocks` gives them theirs."""
    token = _BUILDS_BLOCKS.set(False)
    try:
        yield
    finally:
        _BUILDS_BLOCKS.reset(token)


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


class EngramTable(RowsByNumber, nn.Module):
    """Rows of all heads of one memory layer, each (head_dim,).

    Parameters: `blocks.0`, `blocks.1`, ..., each (rows of its heads, row width), in the table's own dtype. A row is
    head_dim numbers wide, or the bytes of a quantized row.
    """

    def __init__(
        self,
        rows_of_head: Sequence[int],
        head_dim: int,
        block_elements: int,
        dtype: torch.dtype | None = None,
        row_format: str | None = None,
    ):
        """
        Args:
            rows_of_head: rows of each head, in the order of the last axis of row ids.
            head_dim: width of a row.
            block_elements: most elements of a block that holds more than one head.
            dtype: type of the rows; None is torch's default at this moment.
            row_format: one of QUANTIZED_FORMATS for rows of 8 or 4 bits; `dtype` is then of no account.
        """
        super().__init__()
        self.head_dim = head_dim
        self.row_format = row_format
        self.row_width = head_dim if row_format is None else row_bytes(row_format, head_dim)
        self.rows_of_block = split_into_blocks(rows_of_head, head_dim, block_elements)
        self.first_rows = list(accumulate((rows for rows, _ in self.block_shapes[:-1]), initial=0))
        storage = dtype if row_format is None else torch.uint8
        shapes = self.block_shapes if _BUILDS_BLOCKS.get() else []
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.empty(shape, dtype=storage), requires_grad=row_format is None) for shape in shapes
        )
        self.tiers = [RESIDENT] * len(shapes)
        self.sources: list[BlockSource | None] = [None] * len(shapes)
        # Where the last save put a block: a file that may stand for it later.
        self.saved_in: dict[int, tuple[Path, str]] = {}
        self.reader = PageReader()
        self.hot_rows: HotRows | None = None
        # Where it is trained row by row.
        self.row_gradients: RowGradients | None = None
        self.row_changes = RowChanges()
        # Put around the reading of a lookup in training, with the numbers of its rows.
        self.watch: Callable[[torch.Tensor], AbstractContextManager] | None = None
        self.given_blocks: list[int] = []
        self.register_load_state_dict_post_hook(_write_changed_rows)
        # First row of each head inside its block, and the number of its rows: where the model is, and for lookups on
        # the CPU.
        offsets = [offset for rows in self.rows_of_block for offset in accumulate(rows[:-1], initial=0)]
        self.offsets_on_cpu, self.rows_on_cpu = np.array(offsets), np.array(rows_of_head)
        self.head_offsets = nn.Buffer(self.make_head_offsets(), persistent=False)
        self.head_rows = nn.Buffer(self.make_head_rows(), persistent=False)

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """(rows, row width) of each block, whether it is here yet or not."""
        return [(sum(rows), self.row_width) for rows in self.rows_of_block]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the blocks; uint8 where rows are quantized."""
        return self.blocks[0].dtype

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.block_shapes)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of one head."""
        return self.row_width * self.dtype.itemsize

    @property
    def is_resident(self) -> bool:
        return all(tier == RESIDENT for tier in self.tiers)

    @property
    def is_trainable(self) -> bool:
        """Whether rows are to be trained, on whatever tier; frozen by `requires_grad_(False)`."""
        return any(block.requires_grad for block in self.blocks)

    def make_head_offsets(self) -> torch.Tensor:
        """(heads,) int64: first row of each head inside its block."""
        return torch.tensor(self.offsets_on_cpu)

    def make_head_rows(self) -> torch.Tensor:
        """(heads,) int64: rows of each head."""
        return torch.tensor(self.rows_on_cpu)

    @torch.no_grad()
    def write_heads(self) -> None:
        """Write what no checkpoint holds: where heads begin, and how many rows they have."""
        self.head_offsets.copy_(self.make_head_offsets())
        self.head_rows.copy_(self.make_head_rows())

    @torch.no_grad()
    def draw_rows(self, std: float) -> None:
        """Draw all rows from a normal distribution, in place."""
        for block in self.blocks:
            if self.row_format is None:
                init.normal_(block, mean=0.0, std=std)
            elif not block.is_meta and not getattr(block, "_is_hf_initialized", False):
                for part in block.split(max(1, DRAWN_BYTES // self.row_nbytes)):
                    rows = torch.empty(part.shape[0], self.head_dim, device=block.device).normal_(0.0, std)
                    part.copy_(quantize_rows(rows, self.row_format))

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Args:
            row_ids: (..., heads) int64, each in [0, rows of its head).

        Returns:
            (..., heads * head_dim) in the dtype of the table (float32 where rows are quantized), on the device of
            `row_ids`.

        Raises:
            IndexError: a row id is out of range (on an accelerator with resident blocks, its own assertion).
            ValueError: a block's file has changed, a block was moved away by something that does not know tables, a
                trainable table off the device has nobody who updates its rows, or torch exports what it cannot.
        """
        refuse_export(self.is_resident)
        if self.row_gradients is not None and torch.is_grad_enabled():
            return self._look_up_to_train(row_ids).flatten(-2)
        if self.is_resident:
            self._check_row_ids(row_ids)
            if not torch.compiler.is_compiling():
                self._check_files()
            rows = [F.embedding(ids, self._block(i, row_ids)) for i, ids in enumerate(self._rows_of_blocks(row_ids))]
        else:
            if self.training and torch.is_grad_enabled() and self.is_trainable:
                raise ValueError(
                    "This table can be trained (its blocks require gradients), and is off the device, where only row "
                    "updates reach it. Give Trainer optimizer_cls_and_kwargs=engram_optimizers(args), or freeze the "
                    "table: table.requires_grad_(False)."
                )
            rows = self._read(row_ids)
        found = torch.cat(rows, dim=-2)  # (..., heads, row width)
        if self.row_format is not None:
            found = dequantize_rows(found, self.row_format, self.head_dim)
        return found.flatten(-2)

    def _rows_of_blocks(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each block the rows that are asked of it, (..., heads of the block), in [0, rows of the block)."""
        block_rows = row_ids + self.head_offsets.to(row_ids.device)
        return block_rows.split([len(rows) for rows in self.rows_of_block], dim=-1)

    def _block(self, number: int, row_ids: torch.Tensor) -> torch.Tensor:
        block = self.blocks[number]
        if block.is_meta and not row_ids.is_meta:
            raise ValueError(
                f"Block {number} of this table has no memory: accelerate's hooks, which move whole weights in every "
                "forward, cannot serve a table. Load the model with from_pretrained(folder, device_map={...}), where "
                'a table or a block has an entry of its own, such as "model.layers.1.engram.table": "disk".'
            )
        return block

    def _check_row_ids(self, row_ids: torch.Tensor) -> None:
        # On an accelerator looking would wait for it, and the kernel looks by itself.
        if torch.compiler.is_compiling() or row_ids.device.type != "cpu":
            return
        # As unsigned numbers negative ones are too large.
        numbers = row_ids.detach().numpy().astype(np.int64, copy=False).view(np.uint64)
        bounds = self.rows_on_cpu.view(np.uint64)
        if (numbers.max(axis=tuple(range(numbers.ndim - 1)), initial=0) >= bounds).any():
            where = np.argwhere(numbers >= bounds)[0].tolist()
            raise IndexError(
                f"Row id {int(row_ids[tuple(where)])} at {where} is out of range: head {where[-1]} has "
                f"{self.rows_on_cpu[where[-1]]} rows. Row ids come from this layer's own hash."
            )

    def _check_files(self) -> None:
        """Every file that a block is still mapped from is what it was when it was opened."""
        self.row_changes.settle(self)
        sources = zip(self.blocks, self.sources)
        for file in {source.file for block, source in sources if source is not None and source.is_under(block)}:
            file.check_unchanged()

    # Lookups that leave the device. Every one is right without a prefetch, which only brings pages closer.

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begin to read rows that a lookup with this very tensor, or with equal ids, will ask for; returns at once.

        Args:
            row_ids: as in `forward`.
        """
        if self.is_resident or torch.compiler.is_compiling():
            return
        self._prefetch(row_ids)

    @torch.compiler.disable
    def _prefetch(self, row_ids: torch.Tensor) -> None:
        block_rows = self._rows_on_cpu(row_ids)
        if row_ids.is_cuda and self.row_gradients is None:
            started = [self.reader.in_background(lambda: self._stage(block_rows, row_ids.device))]
        else:
            started = [self.reader.start(pages, file) for pages, file in self._pages_on_disk(block_rows)]
        self.reader.remember(row_ids, [future for future in started if future is not None])

    def _rows_on_cpu(self, row_ids: torch.Tensor) -> list[torch.Tensor]:
        """As `_rows_of_blocks`, on the CPU, of ids and files that have been checked. In few steps: beside a busy thread
        each one may wait for the interpreter."""
        self._check_files()
        on_cpu = row_ids if row_ids.device.type == "cpu" else row_ids.cpu()
        self._check_row_ids(on_cpu)
        rows, ends = on_cpu.numpy() + self.offsets_on_cpu, list(accumulate(map(len, self.rows_of_block), initial=0))
        return [torch.from_numpy(rows[..., start:end]) for start, end in zip(ends, ends[1:])]

    def _pages_on_disk(self, block_rows: Sequence[torch.Tensor]) -> Iterator[tuple[np.ndarray, MappedFile]]:
        for number, rows in enumerate(block_rows):
            if self.tiers[number] != DISK:
                continue
            file, block = self.sources[number].file, self._block(number, rows)
            wanted = rows.reshape(-1).numpy()
            if self.hot_rows is not None:
                start = self.first_rows[number]
                wanted = self.hot_rows.missing(wanted + start) - start
            yield pages_of_rows(block.data_ptr() + wanted * self.row_nbytes, self.row_nbytes), file

    @torch.compiler.disable
    def _read(self, row_ids: torch.Tensor) -> list[torch.Tensor]:
        """For each block (..., heads of the block, row width), on the device of `row_ids`."""
        started = self.reader.take(row_ids)
        if started is not None:
            results = [future.result() for future in started]
            if row_ids.is_cuda and self.row_gradients is None:
                rows, event = results[0]
                return self._arrived(rows, event, torch.cuda.current_stream(row_ids.device))
        block_rows = self._rows_on_cpu(row_ids)
        if started is None:
            for pages, file in self._pages_on_disk(block_rows):
                self.reader.read(pages, file)
        return [self._gather(number, rows, row_ids.device) for number, rows in enumerate(block_rows)]

    def _gather(self, number: int, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """(..., heads of the block) CPU row numbers to (..., heads of the block, row width) on a device."""
        block = self._block(number, rows)
        if self.tiers[number] == RESIDENT:
            return F.embedding(rows.to(block.device), block.detach()).to(device)
        if self.hot_rows is None:
            return self._copy_out(block, rows, device)
        start = self.first_rows[number]
        found = self.hot_rows.lookup(
            rows.reshape(-1).numpy() + start,
            lambda missing: self._copy_out(block, torch.from_numpy(missing - start), self.hot_rows.rows.device),
        )
        return found.view(*rows.shape, -1).to(device)

    def _copy_out(self, block: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            return F.embedding(rows, block.detach()).to(device)
        staging = torch.empty((rows.numel(), self.row_width), dtype=block.dtype, pin_memory=True)
        torch.index_select(block.detach(), 0, rows.reshape(-1), out=staging)
        return staging.view(*rows.shape, -1).to(device, non_blocking=True)

    def _stage(self, block_rows: Sequence[torch.Tensor], device: torch.device):
        """In the reading thread: all rows, on their way to the GPU on a stream of their own, and their arrival."""
        for pages, file in self._pages_on_disk(block_rows):
            self.reader.read(pages, file)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(device)):
            rows = [self._gather(number, ids, device) for number, ids in enumerate(block_rows)]
            return rows, torch.cuda.current_stream(device).record_event()

    @staticmethod
    def _arrived(rows: list[torch.Tensor], event, stream) -> list[torch.Tensor]:
        stream.wait_event(event)
        for tensor in rows:
            tensor.record_stream(stream)
        return rows

    # Placing.

    def open_blocks(self, sources: Sequence[BlockSource], tiers: Sequence[str], devices: Sequence) -> None:
        """Give a table that was built without blocks its own.

        Args:
            sources: the tensor of each block; dtype and shape have been compared with this table.
            tiers: one per block.
            devices: where a resident block goes.
        """
        self.blocks = nn.ParameterList(
            nn.Parameter(source.tensor(), requires_grad=self.row_format is None) for source in sources
        )
        self.sources, self.tiers = list(sources), [RESIDENT] * len(sources)
        for number, (tier, device) in enumerate(zip(tiers, devices, strict=True)):
            self.place(number, tier, device)

    def place(self, number: int, tier: str, device: torch.device | str | int | None = None) -> None:
        """Move a block to a tier.

        Args:
            number: of the block.
            tier: RESIDENT, HOST or DISK.
            device: for RESIDENT.

        Raises:
            ValueError: to disk, and no file holds these rows; or the table is in training, where its file would be
                another one with every step.
        """
        if tier == DISK and self.row_gradients is not None and self.tiers[number] != DISK:
            raise ValueError(
                f"Block {number} is in training and cannot move to disk now. Place tables before Trainer makes its "
                "optimizer, with engram_optimizers(args, work_folder=...), or load the trained model anew."
            )
        if tier == DISK:
            source = self._source_that_holds(number)
            moved = source.tensor() if not source.is_under(self.blocks[number]) else self.blocks[number].detach()
            source.file.expect_random_reads(source.name)
        else:
            moved = self._in_memory(number) if tier == HOST else self.blocks[number].detach().to(device)
        self.blocks[number] = nn.Parameter(moved, requires_grad=self.blocks[number].requires_grad)
        self.tiers[number] = tier

    def _in_memory(self, number: int) -> torch.Tensor:
        """A block in host memory of its own, as it is; it is not copied where it has that already."""
        block, source = self.blocks[number].detach(), self.sources[number]
        is_mapped = source is not None and source.is_under(block)
        if block.device.type == "cpu" and not is_mapped:
            return block
        copied = torch.empty(block.shape, dtype=block.dtype, pin_memory=torch.cuda.is_available())
        if not is_mapped:
            return copied.copy_(block)
        source.file.check_unchanged()
        if source.was_written():
            return copied.copy_(block)
        source.file.read_into(source.name, copied)
        return copied

    def _source_that_holds(self, number: int) -> BlockSource:
        """The file that a block comes from, or that the last save has put it in, whichever has its rows."""
        block, sources = self.blocks[number], [self.sources[number]]
        if number in self.saved_in and self.saved_in[number][0].exists():
            path, name = self.saved_in[number]
            sources.append(BlockSource(TableFile(path), name))
        known = [source for source in sources if source is not None]
        if not known:
            raise ValueError(
                f"Block {number} comes from no file, so it cannot live on disk. Save the model with save_pretrained "
                "and load it again, or place the tables of a loaded model."
            )
        for source in known:
            source.file.check_unchanged()
            if source.holds(block):
                self.sources[number] = source
                return source
        raise ValueError(
            f"Block {number} has other rows than {known[0].file.path}, so that file cannot stand for it: it was "
            "changed, or comes from a training checkpoint, which holds changed rows apart. Save the model with "
            "save_pretrained, which makes a file that can."
        )

    def follow_save(self, saved_in: dict[int, tuple[Path, str]]) -> None:
        """Know where a save has put each block, and read those on disk from there if their own file is gone.

        Args:
            saved_in: number of a block to the file that holds it now, and its name there.
        """
        self.saved_in = saved_in
        opened: dict[Path, TableFile] = {}
        is_trained = self.row_gradients is not None
        for number, (path, name) in saved_in.items():
            is_gone = self.tiers[number] == DISK and not self.sources[number].file.is_at_its_path()
            # The file of a base lacks the rows that have changed.
            is_gone = is_gone and not (is_trained and number in self.row_changes.kept)
            if is_gone or is_trained:
                source = BlockSource(opened.setdefault(path, TableFile(path)), name)
                if is_gone:
                    self.read_from(number, source)
                if is_trained:
                    self.row_changes.follow_save(self, number, source)

    def read_from(self, number: int, source: BlockSource) -> None:
        """Have a block on disk read from another file that holds its rows."""
        self.sources[number] = source
        self.blocks[number] = nn.Parameter(source.tensor(), requires_grad=self.blocks[number].requires_grad)
        source.file.expect_random_reads(source.name)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.row_changes.settle(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ROW_GRADIENT_NORM, None)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args):
        """As in any module, but a block on disk that gets its own rows again stays there, unwritten; one that gets
        other rows has them in host memory."""
        fresh: dict[MappedFile, MappedFile] = {}
        for number, block in enumerate(self.blocks):
            name = f"{prefix}blocks.{number}"
            given, source = state_dict.get(name), self.sources[number]
            is_here = given is not None and given.shape == block.shape and self.tiers[number] == DISK
            if not is_here or source.file.is_shared:
                continue
            if given.dtype == block.dtype and source.holds(given):
                if not source.holds(block):
                    # What was written is under the old mapping.
                    if source.file not in fresh:
                        fresh[source.file] = copy.deepcopy(source.file)
                    self.read_from(number, BlockSource(fresh[source.file], source.name))
                state_dict[name] = self.blocks[number]
            else:
                logger.warning(
                    f"{name} gets other rows than its file has, and moves from disk to host memory. To resume a run on "
                    "disk, load the model from the checkpoint that is resumed."
                )
                self.blocks[number] = nn.Parameter(torch.empty_like(block), requires_grad=block.requires_grad)
                self.tiers[number] = HOST
        if self.hot_rows is not None:
            self.hot_rows.clear()
        self.given_blocks = [n for n in range(len(self.blocks)) if f"{prefix}blocks.{n}" in state_dict]
        for number in self.given_blocks:
            self.row_changes.bases.pop(number, None)
        changes = [state_dict.pop(prefix + name, None) for name in (KEYS, ROWS, DIGESTS)]
        if all(part is not None for part in changes):
            self.row_changes.expect(self, *changes)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if prefix + ROW_GRADIENT_NORM in missing_keys:
            missing_keys.remove(prefix + ROW_GRADIENT_NORM)

    def keep_hot_rows(self, size: int, device: torch.device | str) -> None:
        """Keep a cache of `size` rows in front of the blocks that are not resident; 0 keeps none."""
        self.hot_rows = HotRows(size, self.row_width, self.dtype, device) if size else None

    def _apply(self, fn, recurse=True):
        """Move resident blocks, never convert them; leave the others where they are."""
        staying = {id(block) for block, tier in zip(self.blocks, self.tiers) if tier != RESIDENT}
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.blocks[0].device)) if len(self.blocks) else None
        converts = probe is not None and probe.dtype != self.dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in staying:
                return tensor
            return tensor.to(probe.device) if converts else fn(tensor)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict:
        """For copies and pickles, which nobody trains: blocks on disk are opened there again, unless they were written;
        those are copied, and so are blocks of a file that only this run has."""
        on_disk = [
            tier == DISK and source.file.can_be_linked and source.holds(block)
            for tier, source, block in zip(self.tiers, self.sources, self.blocks)
        ]
        kept = [nn.Parameter(b[:0].clone(), b.requires_grad) if d else b for d, b in zip(on_disk, self.blocks)]
        return {
            **self.__dict__,
            "tiers": [HOST if t == DISK and not d else t for t, d in zip(self.tiers, on_disk)],
            "sources": [s if s is None or s.file.can_be_linked else None for s in self.sources],
            "row_gradients": None,
            "row_changes": RowChanges(),
            "watch": None,
            "_parameters": {name: p for name, p in self._parameters.items() if name != ROW_GRADIENT_NORM},
            "_modules": {**self._modules, "blocks": nn.ParameterList(kept)},
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for number, source in enumerate(self.sources):
            if self.tiers[number] == DISK and source is not None:
                self.read_from(number, source)

    def extra_repr(self) -> str:
        parts = [f"rows={self.num_rows}, head_dim={self.head_dim}, blocks={len(self.rows_of_block)}"]
        parts.append(self.row_format or (str(self.dtype) if len(self.blocks) else "no blocks yet"))
        parts += sorted(set(self.tiers) - {RESIDENT})
        return ", ".join(parts)


def _write_changed_rows(table: EngramTable, incompatible_keys) -> None:
    """After a state dict has been loaded: rows of it that are changes of blocks, in whatever order they come."""
    table.row_changes.follow_blocks(table, table.given_blocks)
    table.given_blocks = []


__all__ = ["DISK", "HOST", "RESIDENT", "QUANTIZED_FORMATS", "EngramTable", "tables_without_blocks"]

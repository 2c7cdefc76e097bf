"""All rows of one memory layer. The one seam between a model and its rows: row ids in, rows out.

A table is a list of blocks (table_blocks.py), each on a tier of its own. A tier never changes a row. This file knows
nothing of models, hashing or gates.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .disk_files import BlockSource, MappedFile, source_behind
from .disk_reading import HotRows, PageReader, Prefetches, pages_of_rows
from .table_blocks import RESIDENT, Block, RowBlocks, block_name, make_blocks, parse_changed_name
from .table_changes import ChangedRows, RowChanges, TableSaving, TrainingRun, digest_of, digest_of_content
from .table_cut import RowCut, local_part
from .table_formats import RowFormat, row_format
from .table_gradients import Exchange, Grouping, RowGradients, group
from .table_patches import TablePatches, is_traced, numbers_of
from .table_ranks import PendingRows, RowService, TableRanks


Watch = Callable[[torch.Tensor], AbstractContextManager]

_BUILDS_BLOCKS: ContextVar[bool] = ContextVar("engram_table_builds_blocks", default=True)


@contextmanager
def tables_without_blocks() -> Iterator[None]:
    """Tables that are built inside have no blocks yet; `EngramTable.open_blocks` gives them theirs."""
    token = _BUILDS_BLOCKS.set(False)
    try:
        yield
    finally:
        _BUILDS_BLOCKS.reset(token)


class EngramTable(nn.Module):
    """Rows of all heads of one memory layer, each (head_dim,).

    Parameters: `blocks.0`, `blocks.1`, ..., each (rows of its heads, row width), in the table's own type. A row is
    head_dim numbers wide, or the bytes of a quantized row. A *row id* of a head counts from the head's first row, as
    the hash gives it; a row id of the table counts through all heads, block by block.
    """

    def __init__(
        self,
        rows_of_head: Sequence[int],
        head_dim: int,
        block_elements: int,
        stored_as: RowFormat | None = None,
        reader: PageReader | None = None,
        rows_behind_heads: int = 0,
    ):
        """
        Args:
            rows_of_head: rows of each head, in the order of the last axis of row ids.
            head_dim: width of a row.
            block_elements: most elements of a block that holds more than one head.
            stored_as: format of the rows; None is torch's default type at this moment.
            reader: brings pages of blocks on disk; several tables may share one.
            rows_behind_heads: rows that the last block has behind those of its heads; nobody reads them.
        """
        super().__init__()
        self.head_dim = head_dim
        self.stored_as = row_format(None) if stored_as is None else stored_as
        self.row_width = self.stored_as.row_elements(head_dim)
        self.blocks = RowBlocks(self.stored_as, head_dim)
        self.block_records = make_blocks(
            self.blocks, rows_of_head, head_dim, block_elements, self.row_width, rows_behind_heads
        )
        if _BUILDS_BLOCKS.get():
            self.blocks.extend(
                nn.Parameter(
                    torch.empty(block.shape, dtype=self.stored_as.storage), requires_grad=self.stored_as.is_trainable
                )
                for block in self.block_records
            )
        self.row_gradients = RowGradients()
        self.changes = RowChanges()
        self.hot_rows: HotRows | None = None
        self._reader = PageReader() if reader is None else reader
        self._prefetches = Prefetches()
        self._watch: Watch | None = None
        # Where this process holds some of the rows, and asks other ranks for the rest.
        self.ranks: TableRanks | None = None
        # First row of each head inside its block, and the number of its rows: on the CPU, and where the model is.
        offsets = [i for block in self.block_records for i in accumulate(block.rows_of_head[:-1], initial=0)]
        self._offsets_on_cpu, self._rows_on_cpu = np.array(offsets), np.array(rows_of_head)
        # No buffers: what averages or casts the buffers of a model must not change where a head begins.
        self.head_offsets = torch.tensor(self._offsets_on_cpu, device="cpu")
        self.head_rows = torch.tensor(self._rows_on_cpu, device="cpu")
        self.patches = TablePatches(self._row_ids_in_table(torch.zeros_like(self.head_rows)))
        self._loaded: list[Block] = []
        self._has_loaded_rows = False
        self.register_load_state_dict_post_hook(_write_arrived_rows)

    @property
    def reader(self) -> PageReader:
        """What brings pages of blocks on disk."""
        return self._reader

    @property
    def row_format(self) -> str | None:
        """Name of the format of quantized rows; None for floating numbers."""
        return None if self.stored_as.is_trainable else self.stored_as.name

    @property
    def dtype(self) -> torch.dtype:
        """Type of the blocks; uint8 where rows are quantized."""
        return self.blocks[0].dtype

    @property
    def num_rows(self) -> int:
        """Rows of the whole table, also where other ranks hold some of them."""
        return self.held_rows if self.ranks is None else self.ranks.cut.num_rows

    @property
    def held_rows(self) -> int:
        """Rows that this process holds."""
        return sum(block.num_rows for block in self.block_records)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of one head."""
        return self.row_width * self.dtype.itemsize

    @property
    def is_resident(self) -> bool:
        """Whether all rows are on the device that computes."""
        return self.ranks is None and self._are_blocks_resident()

    def _are_blocks_resident(self) -> bool:
        return all(block.is_resident for block in self.block_records)

    @property
    def is_trainable(self) -> bool:
        """Whether rows are to be trained, on whatever tier; frozen by `requires_grad_(False)`."""
        return any(block.requires_grad for block in self.blocks)

    @property
    def is_in_training(self) -> bool:
        """Whether an optimizer updates the table row by row."""
        return self.row_gradients.is_collecting

    @property
    def home(self) -> torch.device:
        """Where rows are gathered and updated: the device of a resident table, else the CPU."""
        return self.blocks[0].device if self._are_blocks_resident() else torch.device("cpu")

    @property
    def first_rows_of_heads(self) -> torch.Tensor:
        """(heads,) int64: the row id in the table of the first row of each head."""
        return self.head_rows.cumsum(0) - self.head_rows

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Look rows up, with the row patches that lie over the table.

        Args:
            row_ids: (..., heads) int64, each in [0, rows of its head).

        Returns:
            (..., heads * head_dim) in the dtype of the table (float32 where rows are quantized), on the device of
            `row_ids`.

        Raises:
            IndexError, ValueError: as `look_up`; a table is being trained under a patch; or a forward trains under
                patches of a request.
        """
        if self.is_in_training and torch.is_grad_enabled():
            self.patches.refuse_to_train_rows()
            return self.look_up(row_ids)
        if self.training and torch.is_grad_enabled():
            self.patches.refuse_to_train_requests()
        numbers = numbers_of(row_ids)
        return self.patches.lay_over(row_ids, self.look_up(row_ids, numbers), numbers)

    def look_up(self, row_ids: torch.Tensor, numbers: np.ndarray | None = None) -> torch.Tensor:
        """Look the table's own rows up; as `forward`, without patches.

        Args:
            row_ids: as in `forward`.
            numbers: of `numbers_of`, where somebody has asked it already.

        Raises:
            IndexError: a row id is out of range (on an accelerator with resident blocks, its own assertion).
            ValueError: a block's file has changed; something that does not know tables has moved a block; a trainable
                table off the device has nobody who updates its rows; torch exports what it cannot.
        """
        refuse_export(self.is_resident, row_ids)
        if self.is_in_training and torch.is_grad_enabled():
            return self._look_up_to_train(row_ids).flatten(-2)
        if self.ranks is not None:
            self._refuse_dense_gradients()
            return self._look_up_over_ranks(self.ranks, row_ids).flatten(-2)
        if self.is_resident:
            self._check_row_ids(numbers_of(row_ids) if numbers is None else numbers)
            if not torch.compiler.is_compiling():
                self._check_files()
            rows = [self._look_up(block, ids) for block, ids in zip(self.block_records, self._split(row_ids))]
        else:
            self._refuse_dense_gradients()
            rows = self._read(row_ids)
        found = rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)  # (..., heads, row width)
        return self.stored_as.decode(found, self.head_dim).flatten(-2)

    def _refuse_dense_gradients(self) -> None:
        if self.training and torch.is_grad_enabled() and self.is_trainable:
            raise ValueError(
                "This table can be trained (its blocks require gradients), and is off the device or cut over ranks, "
                "where only row updates reach it. Give Trainer optimizer_cls_and_kwargs=engram_optimizers(args), or "
                "freeze the table: table.requires_grad_(False)."
            )

    def _split(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each block the rows that are asked of it, (..., heads of the block), counted from its first."""
        rows = row_ids + self.head_offsets.to(row_ids.device)
        return rows.split([len(block.rows_of_head) for block in self.block_records], dim=-1)

    @staticmethod
    def _look_up(block: Block, rows: torch.Tensor) -> torch.Tensor:
        """(..., heads of the block, row width) on the device of the ids, which may be another one than the block's."""
        if not rows.is_meta:
            block.require_memory()
        return F.embedding(rows.to(block.parameter.device), block.parameter).to(rows.device)

    def _check_row_ids(self, numbers: np.ndarray | None) -> None:
        """Look at row ids as `numbers_of` gives them. Where it gives none, the kernel looks by itself."""
        if numbers is None:
            return
        # As unsigned numbers negative ones are too large.
        is_wrong = numbers.astype(np.int64, copy=False).view(np.uint64) >= self._rows_on_cpu.view(np.uint64)
        if is_wrong.any():
            where = np.argwhere(is_wrong)[0].tolist()
            raise IndexError(
                f"Row id {int(numbers[tuple(where)])} at {where} is out of range: head {where[-1]} has "
                f"{self._rows_on_cpu[where[-1]]} rows. Row ids come from this layer's own hash."
            )

    def _check_files(self) -> None:
        """Every file that a block is still mapped from is what it was when it was opened."""
        self.changes.settle()
        files = [block.mapped_file() for block in self.block_records]
        for file in {file for file in files if file is not None}:
            file.check_unchanged()

    # Lookups that leave the device. Every one is right without a prefetch, which only brings pages closer.

    def prefetch(self, row_ids: torch.Tensor, on_cpu: torch.Tensor | None = None) -> None:
        """Begin to read rows for a lookup with this very tensor; returns at once.

        Args:
            row_ids: as in `forward`.
            on_cpu: the same, where somebody has copied them already.
        """
        if self.is_resident or torch.compiler.is_exporting():
            return
        # A compiled forward leaves its graph here, as it does for the lookup.
        if not torch.compiler.is_compiling() and is_traced(row_ids):
            return
        self._prefetch(row_ids, row_ids if on_cpu is None else on_cpu)

    @torch.compiler.disable
    def _prefetch(self, row_ids: torch.Tensor, on_cpu: torch.Tensor) -> None:
        if self.ranks is not None:
            if self.ranks.find_kept(row_ids) is None:
                groups, pending = self._ask_ranks(self.ranks, on_cpu)
                for pages, file in self._pages_of_held(pending.own):
                    self._reader.start(pages, file)
                self.ranks.remember(row_ids, groups, pending)
            return
        block_rows = self._split_on_cpu(on_cpu)
        if row_ids.is_cuda and not self.is_in_training:
            started: list[Future | None] = [self._reader.in_background(lambda: self._stage(block_rows, row_ids.device))]
        else:
            started = [self._reader.start(pages, file) for pages, file in self._pages_on_disk(block_rows)]
        self._prefetches.remember(row_ids, [future for future in started if future is not None])

    def bring_pages(self, row_ids: torch.Tensor) -> None:
        """Begin to read the pages of rows that somebody may look up later, and return at once.

        Unlike `prefetch` it keeps nothing for a lookup, and moves nothing to a GPU. Where the table is cut over ranks,
        the owners read these pages, and a lookup of the same rows sends no row ids any more.

        Args:
            row_ids: as in `forward`.
        """
        if self.ranks is not None:
            on_cpu = row_ids.cpu()
            self._check_row_ids(numbers_of(on_cpu))
            self.ranks.announce(group(self._row_ids_in_table(on_cpu).flatten()).distinct)
        elif not self.is_resident:
            for pages, file in self._pages_on_disk(self._split_on_cpu(row_ids)):
                self._reader.start(pages, file)

    def _split_on_cpu(self, row_ids: torch.Tensor) -> list[torch.Tensor]:
        """As `_split`, on the CPU, of ids and files that have been checked. It takes few steps, since each one may wait
        for the interpreter beside a busy thread."""
        self._check_files()
        on_cpu = row_ids if row_ids.device.type == "cpu" else row_ids.cpu()
        self._check_row_ids(numbers_of(on_cpu))
        rows = on_cpu.numpy() + self._offsets_on_cpu
        ends = list(accumulate((len(block.rows_of_head) for block in self.block_records), initial=0))
        return [torch.from_numpy(rows[..., start:end]) for start, end in zip(ends, ends[1:])]

    def _pages_on_disk(self, block_rows: Sequence[torch.Tensor]) -> Iterator[tuple[np.ndarray, MappedFile]]:
        for block, rows in zip(self.block_records, block_rows):
            if not block.is_on_disk or block.source is None:
                continue
            block.require_memory()
            wanted, hot = rows.reshape(-1).numpy(), self.hot_rows
            if hot is not None:
                wanted = hot.missing(wanted + block.first_row) - block.first_row
            yield pages_of_rows(block.addresses(wanted), self.row_nbytes), block.source.file

    @torch.compiler.disable
    def _read(self, row_ids: torch.Tensor) -> list[torch.Tensor]:
        """For each block (..., heads of the block, row width), on the device of `row_ids`."""
        started = self._prefetches.take(row_ids)
        if started is not None:
            results = [future.result() for future in started]
            if row_ids.is_cuda and not self.is_in_training:
                rows, event = results[0]
                return self._arrived(rows, event, torch.cuda.current_stream(row_ids.device))
        block_rows = self._split_on_cpu(row_ids)
        if started is None:
            for pages, file in self._pages_on_disk(block_rows):
                self._reader.read(pages, file)
        return [self._gather(block, rows, row_ids.device) for block, rows in zip(self.block_records, block_rows)]

    def _gather(self, block: Block, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """(..., heads of the block) rows on the CPU to (..., heads of the block, row width) on a device."""
        block.require_memory()
        hot = self.hot_rows
        if block.is_resident:
            return F.embedding(rows.to(block.rows.device), block.rows).to(device)
        if hot is None:
            return self._copy_out(block, rows, device)
        found = hot.lookup(
            rows.reshape(-1).numpy() + block.first_row,
            lambda missing: self._copy_out(block, torch.from_numpy(missing - block.first_row), hot.rows.device),
        )
        return found.view(*rows.shape, -1).to(device)

    def _copy_out(self, block: Block, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            return F.embedding(rows, block.rows).to(device)
        staging = torch.empty((rows.numel(), self.row_width), dtype=self.dtype, device="cpu", pin_memory=True)
        torch.index_select(block.rows, 0, rows.reshape(-1), out=staging)
        return staging.view(*rows.shape, -1).to(device, non_blocking=True)

    def _stage(self, block_rows: Sequence[torch.Tensor], device: torch.device):
        """In the reading thread: all rows on their way to the GPU, on the reader's own stream, and their arrival."""
        for pages, file in self._pages_on_disk(block_rows):
            self._reader.read(pages, file)
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(self._reader.stream(device)):
            rows = [self._gather(block, ids, device) for block, ids in zip(self.block_records, block_rows)]
            return rows, torch.cuda.current_stream(device).record_event()

    @staticmethod
    def _arrived(rows: list[torch.Tensor], event, stream) -> list[torch.Tensor]:
        stream.wait_event(event)
        for tensor in rows:
            tensor.record_stream(stream)
        return rows

    # Lookups over ranks.

    def cut_over_ranks(self, service: RowService) -> RowCut:
        """Of a table that has no blocks yet, hold the rows of this rank alone: what `open_blocks` is to open.

        Every rank calls it for the same tables in the same order.
        """
        cut = RowCut([block.num_rows for block in self.block_records], service.ranks)
        first = 0
        for block, rows in zip(self.block_records, cut.rows_of(service.rank)):
            block.hold(first, rows)
            first += rows
        # The table knows its type when its blocks are open.
        self.ranks = TableRanks(cut, service, 0, self._read_for_ranks)
        self.saving.answer()
        self.register_state_dict_post_hook(_show_parts)
        self.ranks.bring["rows"] = partial(self._bring_held, PageReader())
        return cut

    def held_ids(self, row_ids: torch.Tensor) -> torch.Tensor:
        """(n,) ids of rows that this process holds, as its own blocks count them."""
        return row_ids if self.ranks is None else self.ranks.cut.to_held(row_ids, self.ranks.rank)

    def row_ids_of(self, held: torch.Tensor) -> torch.Tensor:
        """(n,) held ids as row ids of the table."""
        return held if self.ranks is None else self.ranks.cut.to_table(held, self.ranks.rank)

    def are_held(self, row_ids: torch.Tensor) -> torch.Tensor | None:
        """Which of (n,) row ids this process holds, bool; None for all."""
        return None if self.ranks is None else self.ranks.cut.owner(row_ids) == self.ranks.rank

    def _read_for_ranks(self, held: torch.Tensor) -> torch.Tensor:
        """(n,) held ids to (n, row width); another rank may have asked for them, in another thread."""
        return self.gather_held(held.to(self.home))

    def _bring_held(self, reader: PageReader, held: torch.Tensor) -> None:
        """Read the pages of rows that a step to come needs, (n,) held ids, behind everything else; returns at once."""
        for pages, file in self._pages_of_held(held):
            reader.read_aside(pages, file)

    def _pages_of_held(self, held: torch.Tensor) -> Iterator[tuple[np.ndarray, MappedFile]]:
        """The pages of rows that this process holds, (n,) held ids, ascending, and the files on disk that have them."""
        for block, _, wanted in self.parts(held):
            if block.is_on_disk and block.source is not None:
                yield pages_of_rows(block.addresses(wanted.numpy()), self.row_nbytes), block.source.file

    def _ask_ranks(self, ranks: TableRanks, on_cpu: torch.Tensor) -> tuple[Grouping, PendingRows]:
        """Ask for the rows of a lookup, (..., heads) on the CPU; returns at once."""
        self._check_files()
        self._check_row_ids(numbers_of(on_cpu))
        groups = group(self._row_ids_in_table(on_cpu.cpu()).flatten())
        return groups, ranks.begin(groups.distinct, self._may_leave_gradients)

    def _rows_of_ranks(self, ranks: TableRanks, row_ids: torch.Tensor) -> tuple[Grouping, torch.Tensor]:
        """Which row ids of a lookup are equal, and the distinct rows, (m, row width), on the CPU."""
        kept = ranks.find_kept(row_ids)
        if kept is not None:
            return group(self._row_ids_in_table(row_ids.cpu()).flatten()), kept
        groups, pending = ranks.take(row_ids) or self._ask_ranks(ranks, row_ids.cpu())
        with self._watched(groups.distinct):
            rows = pending.result()
        if self._may_leave_gradients:
            ranks.keep(row_ids, rows)
        return groups, rows

    @property
    def _may_leave_gradients(self) -> bool:
        """Whether a lookup may be one of a backward, also where a forward without gradients comes first."""
        return self.training and self.is_in_training

    @torch.compiler.disable
    def _look_up_over_ranks(self, ranks: TableRanks, row_ids: torch.Tensor) -> torch.Tensor:
        """(..., heads) to (..., heads, head_dim), on the device of the ids."""
        ranks.meets_later = False
        groups, rows = self._rows_of_ranks(ranks, row_ids)
        found = rows.to(row_ids.device).index_select(0, groups.back.to(row_ids.device))
        return self.stored_as.decode(found.view(*row_ids.shape, self.row_width), self.head_dim)

    # Rows by their ids in the table: what training, checkpoints and instruments use.

    def parts(self, row_ids: torch.Tensor) -> Iterator[tuple[Block, slice, torch.Tensor]]:
        """For each block that is asked for: the block, which of the row ids, and their rows counted from its first.

        Args:
            row_ids: (n,) int64 held ids, ascending: the row ids of the table, where one process holds all of it.
        """
        firsts = torch.tensor([block.first_row for block in self.block_records], device=row_ids.device)
        bounds = torch.searchsorted(row_ids, firsts).tolist() + [len(row_ids)]
        for block, start, end in zip(self.block_records, bounds, bounds[1:]):
            if end > start:
                yield block, slice(start, end), row_ids[start:end] - block.first_row

    def gather_rows(self, row_ids: torch.Tensor, are_read: bool = False) -> torch.Tensor:
        """Rows by their ids in the table, whichever rank holds them.

        Args:
            row_ids: (n,) int64, ascending, on `home`.
            are_read: whether their pages have been asked for already.

        Returns:
            (n, row width) in the type of the table, on `home`; a copy.

        Raises:
            RuntimeError: another rank could not read its rows.
        """
        if self.ranks is None:
            return self.gather_held(row_ids, are_read)
        # Nobody else may come to where a failure of training is raised: one rank saves alone.
        self.ranks.meets_later = False
        groups = group(row_ids.cpu())
        rows = self.ranks.begin(groups.distinct).result()
        return rows.index_select(0, groups.back).to(self.home)

    @torch.no_grad()
    def gather_held(self, row_ids: torch.Tensor, are_read: bool = False) -> torch.Tensor:
        """As `gather_rows`, of rows that this process holds, by their held ids."""
        self.changes.settle()
        rows = torch.empty(len(row_ids), self.row_width, dtype=self.dtype, device=row_ids.device)
        for block, part, wanted in self.parts(row_ids):
            block.require_memory()
            if block.is_on_disk and block.source is not None and not are_read:
                self._reader.read(pages_of_rows(block.addresses(wanted.numpy()), self.row_nbytes), block.source.file)
            if block.rows.device == rows.device:
                torch.index_select(block.rows, 0, wanted, out=rows[part])
            else:
                rows[part] = block.rows.index_select(0, wanted.to(block.rows.device)).to(rows.device)
        return rows

    @torch.no_grad()
    def write_rows(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Replace rows, where they live.

        Args:
            row_ids: (n,) int64 held ids, ascending and distinct, on `home`.
            rows: (n, row width) in the type of the table.
        """
        for block, part, wanted in self.parts(row_ids):
            block.write(wanted, rows[part])
        self.changes.mark(row_ids)
        if self.hot_rows is not None:
            self.hot_rows.forget(row_ids.cpu().numpy())

    # Training.

    def collect_row_gradients(self, run: TrainingRun | None = None, exchange: Exchange | None = None) -> RowGradients:
        """From now on, leave gradients of rows behind for whoever updates them; blocks get no gradient any more.

        Args:
            run: the training run, whose checkpoints hold the changed rows of this table beside its blocks. A later
                run takes the place of an earlier one.
            exchange: makes the rows of all processes out of those of this one.
        """
        if not self.is_in_training:
            dtype = torch.promote_types(self.dtype, torch.float32)
            self.row_gradients.begin(self.blocks[0].device, dtype, self.row_width)
            self.changes.settle()
            self.changes.begin(self, TrainingRun() if run is None else run)
        elif run is not None:
            self.changes.run = run
        self.row_gradients.exchange = exchange
        return self.row_gradients

    def gather_trained(self, row_ids: torch.Tensor, are_read: bool = False) -> torch.Tensor:
        """As `gather_held`, with the rows that training has changed, whether they are the table's or a patch's."""
        rows, trained = self.gather_held(row_ids, are_read), self.patches.trained
        if trained is not None:
            trained.read(row_ids, rows)
        return rows

    def write_trained(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """As `write_rows`, into the patch that is trained, where there is one."""
        trained = self.patches.trained
        if trained is None:
            self.write_rows(row_ids, rows)
        else:
            trained.write(row_ids, rows)

    def watch_lookups(self, watch: Watch | None) -> None:
        """Put a context around the reading of every lookup in training; it gets the distinct row ids. None ends it."""
        self._watch = watch

    def _watched(self, distinct: torch.Tensor) -> AbstractContextManager:
        """What somebody has put around the reading of rows in training, (n,) row ids."""
        return nullcontext() if self._watch is None or not self.is_in_training else self._watch(distinct)

    @torch.compiler.disable
    def _look_up_to_train(self, row_ids: torch.Tensor) -> torch.Tensor:
        """(..., heads) to (..., heads, head_dim); its graph begins at the distinct rows."""
        if self.ranks is None:
            groups, rows = self._rows_of_here(row_ids)
        else:
            self.ranks.meets_later = True
            groups, rows = self._rows_of_ranks(self.ranks, row_ids)
            # An alias: the graph of each forward begins at a leaf of its own.
            rows = rows.detach()
        rows = rows.to(row_ids.device, torch.promote_types(self.dtype, torch.float32))
        looked_up = self.row_gradients.look_up(rows, groups, self._are_trained(groups.distinct), self.is_trainable)
        return looked_up.view(*row_ids.shape, self.head_dim).to(self.dtype)

    def _rows_of_here(self, row_ids: torch.Tensor) -> tuple[Grouping, torch.Tensor]:
        """Which row ids of a lookup are equal, and the distinct rows, (m, row width), on `home`."""
        self._check_files()
        home = row_ids.to(self.home)
        self._check_row_ids(numbers_of(home))
        groups = group(self._row_ids_in_table(home).flatten())
        with self._watched(groups.distinct):
            started = self._prefetches.take(row_ids)
            for future in started or []:
                future.result()
            return groups, self.gather_trained(groups.distinct, are_read=started is not None)

    def _row_ids_in_table(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Row ids of a lookup, as `forward` takes them, to row ids of the table, of the same shape."""
        return row_ids + self.first_rows_of_heads.to(row_ids.device)

    def _are_trained(self, row_ids: torch.Tensor) -> torch.Tensor | None:
        """Which rows are of blocks that are not frozen; None for all."""
        if all(block.requires_grad for block in self.blocks):
            return None
        is_trained = torch.tensor([block.requires_grad for block in self.blocks], device=row_ids.device)
        if self.ranks is not None:
            return is_trained[self.ranks.cut.block_of(row_ids)]
        bounds = torch.tensor([block.first_row for block in self.block_records[1:]], device=row_ids.device)
        return is_trained[torch.bucketize(row_ids, bounds, right=True)]

    # Placing, saving, loading, copying.

    def open_blocks(
        self, sources: Sequence[BlockSource], tiers: Sequence[str], devices: Sequence, reader: PageReader | None = None
    ) -> None:
        """Give a table that was built without blocks its own.

        Args:
            sources: the tensor of each block; dtype and shape have been compared with this table.
            tiers: one per block.
            devices: where a resident block goes.
            reader: as for the constructor.
        """
        self._reader = self._reader if reader is None else reader
        self.blocks.extend(
            nn.Parameter(source.tensor(), requires_grad=self.stored_as.is_trainable) for source in sources
        )
        for block, source, tier, device in zip(self.block_records, sources, tiers, devices, strict=True):
            block.open(source, tier, device)
        if self.ranks is not None:
            self.ranks.row_nbytes = self.row_nbytes
        self._move_heads(self.blocks[0].device)

    def _move_heads(self, device: torch.device) -> None:
        if device.type != "meta":
            self.head_offsets, self.head_rows = self.head_offsets.to(device), self.head_rows.to(device)

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
        block = self.block_records[number]
        self.changes.settle()
        if self.is_in_training and block.goes_to_disk(tier):
            raise ValueError(
                f"Block {number} is in training and cannot move to disk now. Place tables before Trainer makes its "
                "optimizer, with engram_optimizers(args, work_folder=...), or load the trained model again."
            )
        block.place(tier, device)
        self._move_heads(self.blocks[0].device)

    def keep_hot_rows(self, size: int, device: torch.device | str) -> None:
        """Keep a cache of `size` rows in front of the blocks that are not resident; 0 keeps none.

        Raises:
            NotImplementedError: the table is cut over ranks.
        """
        if size and self.ranks is not None:
            raise NotImplementedError(
                f"A table that is cut over ranks keeps no hot rows, and got hot_rows={size}. Leave it out."
            )
        self.hot_rows = HotRows(size, self.row_width, self.dtype, device) if size else None

    @property
    def saving(self) -> TableSaving:
        """What a save takes of this table."""
        return TableSaving(self)

    def _part_of(self, block: Block, given: torch.Tensor) -> torch.Tensor:
        """What this process holds of a whole block that a state dict brings."""
        if self.ranks is None or given.shape == block.parameter.shape:
            return given
        begin, end = self.ranks.cut.part(block.number, self.ranks.rank)
        behind = source_behind(given)
        is_whole = given.shape == (self.ranks.cut.rows_of_block[block.number], self.row_width)
        if not is_whole:
            return given
        if behind is None:
            block.note_digest(digest_of(given))
            return given[begin:end]
        block.note_digest(digest_of_content(behind.file.content(behind.name)))
        return block.parameter if block.load_part(behind, begin) else given[begin:end]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.changes.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As in any module. Changed rows of a checkpoint are written over the blocks, in whatever order they come."""
        loaded = []
        for block in self.block_records[: len(self.blocks)]:
            name = f"{prefix}blocks.{block.number}"
            if name in state_dict:
                given = self._part_of(block, local_part(state_dict[name]))
                state_dict[name] = block.load(given, name)
                loaded.append(block)
        if self.hot_rows is not None:
            self.hot_rows.clear()
        name, found = prefix.removesuffix("."), dict[int, dict[str, torch.Tensor]]()
        for key in [key for key in state_dict if key.startswith(f"{prefix}changed.")]:
            if (changed := parse_changed_name(key)) is not None and changed.table == name:
                found.setdefault(changed.rank, {})[changed.part] = state_dict.pop(key)
        for rank, parts in sorted(found.items()):
            rows = ChangedRows.from_tensors(parts, name, "the loaded state dict")
            self.changes.arrive(name, self, rows, rank)
        if loaded and not found:
            self.changes.forget_stamp(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The blocks themselves are loaded after this, by their ParameterList.
        self._loaded, self._has_loaded_rows = loaded, bool(loaded or found)

    def _apply(self, fn, recurse=True):
        """Move resident blocks, never convert them; leave the others where they are."""
        staying = {id(block.parameter) for block in self._present() if not block.is_resident}
        if not len(self.blocks):
            return super()._apply(fn, recurse)
        before = torch.empty(0, dtype=self.dtype, device=self.blocks[0].device)
        probe = fn(before)
        converts = probe.dtype != self.dtype
        if probe is not before and probe.device == before.device and not converts and not probe.is_pinned():
            # torch takes "cpu:0", where Trainer wants its model, for another device than "cpu", and would copy rows
            # that are still in their file.
            in_files = [(block.source, block.parameter) for block in self._present() if block.source is not None]
            staying |= {id(parameter) for source, parameter in in_files if source.is_under(parameter)}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in staying:
                return tensor
            return tensor.to(probe.device) if converts else fn(tensor)

        super()._apply(move, recurse)
        self._move_heads(probe.device)
        if self.hot_rows is not None:
            # They stand where the model computes, and the blocks behind them stay where they are.
            device = fn(self.hot_rows.rows[:0]).device
            if device.type != "meta" and device != self.hot_rows.rows.device:
                self.keep_hot_rows(self.hot_rows.size, device)
        return self

    def _present(self) -> list[Block]:
        """The blocks that are there; none of a table that waits for `open_blocks`."""
        return self.block_records[: len(self.blocks)]

    def __getstate__(self) -> dict:
        """For copies and pickles, which nobody trains."""
        if self.ranks is not None:
            raise NotImplementedError(
                "A table that is cut over ranks cannot be copied or pickled: this process holds a part of it. Load the "
                'model once more with engram_ranks="shard".'
            )
        self.changes.settle()
        kept = RowBlocks(self.stored_as, self.head_dim)
        records = [block.copy_with(kept) for block in self.block_records]
        for block, copied in zip(self._present(), records):
            # A block that stays on disk is opened there again; its rows are not copied.
            rows = block.rows[:0].clone() if copied.is_on_disk else block.rows
            kept.append(nn.Parameter(rows, requires_grad=block.parameter.requires_grad))
        return {
            **self.__dict__,
            "block_records": records,
            "changes": RowChanges(),
            "_watch": None,
            "_modules": {**self._modules, "blocks": kept},
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for block in self._present():
            if block.is_on_disk and block.source is not None:
                block.read_from(block.source)

    def extra_repr(self) -> str:
        parts = [f"rows={self.num_rows}, head_dim={self.head_dim}, blocks={len(self.block_records)}"]
        parts.append(self.row_format or (str(self.dtype) if len(self.blocks) else "no blocks yet"))
        parts += sorted({block.tier for block in self.block_records} - {RESIDENT})
        return ", ".join(parts)


def prefetch_rows(tables: Sequence[EngramTable], row_ids: Sequence[torch.Tensor]) -> None:
    """`EngramTable.prefetch` for the tables of one forward, which waits for an accelerator once and not once a table.

    Args:
        tables: in the order of their lookups.
        row_ids: one tensor for each, all of one shape.
    """
    waiting = [(table, ids) for table, ids in zip(tables, row_ids, strict=True) if not table.is_resident]
    if not waiting or torch.compiler.is_exporting():
        return
    if len({ids.device for _, ids in waiting}) == 1 and waiting[0][1].is_cuda:
        on_cpu = torch.stack([ids for _, ids in waiting]).cpu().unbind()
    else:
        on_cpu = tuple(ids for _, ids in waiting)
    for (table, ids), copied in zip(waiting, on_cpu):
        table.prefetch(ids, copied)


def _write_arrived_rows(table: EngramTable, incompatible_keys) -> None:
    """After a state dict was loaded, with the blocks in it: write the rows that are changes of blocks."""
    table.changes.follow_load(table, table._loaded)
    has_rows, table._loaded, table._has_loaded_rows = table._has_loaded_rows, [], False
    if table.ranks is not None and has_rows:
        # All ranks load the same rows, and one that is done must not get rows of one that is not. What is not of this
        # table one rank may load alone.
        table.ranks.service.after_step(table.ranks)


def _show_parts(table: EngramTable, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """In a state dict, a block that is cut over ranks is a DTensor, so that nobody takes a part for the whole."""
    if table.ranks is not None:
        for block in table._present():
            name = block_name(prefix.removesuffix("."), block.number)
            state_dict[name] = table.ranks.as_sharded(state_dict[name], block.number)


def refuse_export(is_resident: bool, row_ids: torch.Tensor) -> None:
    """
    Raises:
        ValueError: torch is exporting or tracing the model in a way that cannot hold this table.
    """
    # Where `torch.onnx.export` fails it tries `strict=True`, under which nothing tells that it is asking.
    is_strict = torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()
    if torch.onnx.is_in_onnx_export() or is_strict:
        raise ValueError(
            "torch.onnx.export knows no cummax and no grouped products, which this model needs. transformers' own "
            "exporter does: OnnxExporter().export(model, inputs), from transformers.exporters.exporter_onnx. "
            "torch.export.export works with strict=False."
        )
    if is_resident:
        return
    # A compiled model leaves its graph to read rows. A graph for elsewhere would hold the rows of one example.
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and is_traced(row_ids)):
        raise ValueError(
            "A table in host memory or on disk cannot be exported or traced: its rows are read outside of the graph. "
            "Load the model without entries for tables in device_map, and the graph holds them."
        )

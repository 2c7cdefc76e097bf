"""Prefetching rows from disk for the batches to come: a batch's row ids are known as soon as it is collated.

The pages of the rows go into the page cache, which all processes share, so this works in the workers of a DataLoader.
Where a table is cut over ranks, their owners are told which rows will be asked for, and read the pages.
"""

import copy
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ...insight.memory_layers import find_memory_layers, memory_of
from ...modeling.disk_files import PAGE, BlockSource, MappedFile
from ...modeling.disk_reading import PageReader, pages_of_rows
from ...modeling.ids_hashing import NgramHash
from ...modeling.table import EngramTable
from ...modeling.table_ranks import TableRanks
from .reporting import EngramCallback


# Rows of a lookup whose pages are looked for in the page cache.
SAMPLED_ROWS = 128
# Lookups that workers have announced and nobody has taken; of more, the last are not announced.
LOOKUPS_WAITING = 64
# How long the thread that takes them waits for one, and how long it is waited for in the end.
PAUSE_SECONDS, LAST_SECONDS = 0.2, 5.0

logger = logging.get_logger(__name__)


class Column(NamedTuple):
    """A tensor on disk with an entry for each of some consecutive rows: the rows themselves, or their state.

    first, rows: row id in the table of the first one, and how many they are.
    source: the tensor.
    row_nbytes: bytes of one entry.
    """

    first: int
    rows: int
    source: BlockSource
    row_nbytes: int

    def addresses(self, row_ids: np.ndarray) -> np.ndarray:
        """The addresses in this process of those of the row ids, ascending, that have an entry here."""
        start, end = np.searchsorted(row_ids, [self.first, self.first + self.rows])
        place = self.source.file.places[self.source.name]
        return self.source.file.address + place.start + (row_ids[start:end] - self.first) * self.row_nbytes


class RowPrefetcher:
    """Asks the kernel for the pages of the rows that token ids read. It works in any process and holds no weights."""

    def __init__(self, model: nn.Module, optimizer: Any = None):
        """
        Args:
            model: a model with tables; nothing happens for those that are neither on disk nor cut over ranks.
            optimizer: the optimizer of the tables, to prefetch the state of their rows too.
        """
        ngram_hash, layers = memory_of(model)
        self.ngram_hash: NgramHash = copy.deepcopy(ngram_hash).cpu()
        updates = getattr(getattr(optimizer, "optimizer", optimizer), "rows", {})
        work_files = {id(each.table): each for each in updates.values() if each.work_file is not None}
        self.columns: dict[int, list[Column]] = {}
        self.first_rows: dict[int, torch.Tensor] = {}
        self.ranks: dict[int, TableRanks] = {}
        for layer in layers:
            table, layer_id = layer.table, layer.layer_idx
            self.first_rows[layer_id] = table.first_rows_of_heads.cpu()
            self.columns[layer_id] = list(columns_on_disk(table, work_files.get(id(table))))
            if table.ranks is not None:
                self.ranks[layer_id] = table.ranks
        # What forked workers announce.
        self._lookups: Any = multiprocessing.get_context("fork").Queue(LOOKUPS_WAITING) if self.ranks else None
        self._is_over = threading.Event()
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self.reader = PageReader()
        # Shared by all processes that have a copy of this.
        self.bytes_read = torch.zeros(1, dtype=torch.int64).share_memory_()

    @torch.no_grad()
    def prefetch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> None:
        """Begin to read what a step over these tokens will read, and return. Arguments are those of a forward."""
        if not self.ranks and not any(self.columns.values()):
            return
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        for layer_id, row_ids in self.ngram_hash(input_ids, position_ids, mask).row_ids.items():
            of_table = np.unique((row_ids + self.first_rows[layer_id]).numpy())
            if layer_id in self.ranks:
                self._announce(layer_id, of_table)
            for column in self.columns[layer_id]:
                file = column.source.file
                pages = pages_of_rows(column.addresses(of_table), column.row_nbytes)
                self.reader.in_background(partial(self._count, pages, file))
                self.reader.read_aside(pages, file)

    def _announce(self, layer_id: int, row_ids: np.ndarray) -> None:
        """Tell the owners of rows, (n,) ascending row ids, that they will be asked for them."""
        if os.getpid() == self._process:
            self.ranks[layer_id].announce(torch.from_numpy(row_ids))
        else:
            # A worker has no connection to other ranks, and must not wait for this process when it ends.
            self._lookups.cancel_join_thread()
            with suppress(queue.Full):
                self._lookups.put_nowait((layer_id, row_ids))

    def start(self) -> None:
        """Take what the workers of a DataLoader announce, until `stop`."""
        self._thread = threading.Thread(target=self._take_lookups, name="engram-announcements", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more from workers. What they have announced by now is sent.

        A worker may have ended in the middle of a message, for whose rest the thread then waits. It is left behind.
        """
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)
            self._thread = None

    def _take_lookups(self) -> None:
        while True:
            try:
                self._announce(*self._lookups.get(timeout=PAUSE_SECONDS))
            except queue.Empty:
                if self._is_over.is_set():
                    return

    def _count(self, pages: np.ndarray, file: MappedFile) -> None:
        self.bytes_read += int((1 - file.share_in_memory(sample(pages))) * len(pages) * PAGE)


def columns_on_disk(table: EngramTable, updates: Any = None) -> Iterator[Column]:
    """What a step reads from disk for a table: rows, and their state if they are trained there.

    Nothing for a table that is cut over ranks: its owners read its rows, when they know which.
    """
    if table.ranks is not None:
        return
    for block in table.block_records:
        if block.is_on_disk and block.source is not None:
            yield Column(block.first_row, block.num_rows, block.source, table.row_nbytes)
    for name, store in (updates.stores if updates is not None else {}).items():
        yield Column(0, table.num_rows, BlockSource(updates.work_file, name), store[0].nbytes)


def sample(pages: np.ndarray) -> np.ndarray:
    return pages[:: max(1, len(pages) // SAMPLED_ROWS)]


class PrefetchingCollator:
    """A collator that prefetches the rows of each batch it has made."""

    def __init__(self, collate: Callable, prefetcher: RowPrefetcher | None):
        self.collate, self.prefetcher = collate, prefetcher

    def __call__(self, features):
        batch = self.collate(features)
        ids = batch.get("input_ids") if hasattr(batch, "get") else None
        if self.prefetcher is None or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return batch
        # The model raises for ids outside the vocabulary when the step comes.
        if int(ids.max()) < self.prefetcher.ngram_hash.config.vocab_size:
            self.prefetcher.prefetch(ids, batch.get("attention_mask"), batch.get("position_ids"))
        return batch

    def __reduce__(self):
        # A worker that is not a fork cannot open files without a name.
        if self.prefetcher is not None:
            logger.warning_once(
                "Prefetching needs forked DataLoader workers; these were spawned, so they read no rows ahead. Use "
                "dataloader_num_workers=0, or torch.multiprocessing.set_start_method('fork')."
            )
        return PrefetchingCollator, (self.collate, None)


class EngramPrefetchCallback(EngramCallback):
    """Reads the rows of coming batches from disk while earlier batches are trained on, and reports:

    * `engram/prefetch_in_time`: share of the rows that were in memory when they were looked up (on the console too);
    * `engram/prefetch_waited_ms`: milliseconds per step that were spent on fetching rows from tables on disk, or from
      other ranks;
    * `engram/prefetch_bytes`: bytes that were read per step.

    Of a table that is cut over ranks, the owners are told which rows a coming batch will ask for. They read these rows
    early, and the row ids need not travel again. Only `engram/prefetch_waited_ms` is reported for it.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EngramPrefetchCallback()])
    """

    on_console = ("engram/prefetch_in_time",)

    def __init__(self, enabled: bool = True):
        """
        Args:
            enabled: False reports the same figures and reads nothing ahead.
        """
        self.enabled = enabled
        self._reset()
        self._wrapped: list[tuple[Any, Callable]] = []
        self._watched: list[EngramTable] = []
        self.prefetcher: RowPrefetcher | None = None

    def _reset(self) -> None:
        self._rows = self._rows_there = self._bytes = 0.0
        self._seconds = 0.0
        self._steps = 0

    def arguments(self):
        return {"enabled": self.enabled}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        layers = find_memory_layers(model, type(self).__name__)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.on_train_end(args, state, control)
        self._reset()
        self.prefetcher = RowPrefetcher(model, optimizer)
        for layer_id, layer in layers.items():
            columns = self.prefetcher.columns[layer_id]
            if columns or layer_id in self.prefetcher.ranks:
                layer.table.watch_lookups(lambda row_ids, columns=columns: self._watch(row_ids, columns))
                self._watched.append(layer.table)
        if not self._watched:
            logger.info("No table is on disk or cut over ranks, so there is nothing to prefetch.")
        elif self.enabled:
            loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
            self._wrapped = [(loader, loader.collate_fn)]
            loader.collate_fn = PrefetchingCollator(loader.collate_fn, self.prefetcher)
            workers: int = getattr(loader, "num_workers", 0)
            if self.prefetcher.ranks and workers:
                self.prefetcher.start()

    @contextmanager
    def _watch(self, row_ids: torch.Tensor, columns: list[Column]) -> Iterator[None]:
        """Measure one lookup of rows, (n,) row ids in the table, ascending."""
        numbers = row_ids.cpu().numpy()
        for column in columns:
            addresses = column.addresses(numbers)
            pages = pages_of_rows(sample(addresses), column.row_nbytes)
            share = column.source.file.share_in_memory(pages)
            self._rows += len(addresses)
            self._rows_there += share * len(addresses)
            self._bytes += (1 - share) * len(addresses) * PAGE
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1

    def figures(self):
        if not self._watched or self.prefetcher is None:
            return {}
        if not self._rows:
            figures = {"engram/prefetch_waited_ms": 1000 * self._seconds / max(self._steps, 1)}
            self._reset()
            return figures
        steps, read = max(self._steps, 1), int(self.prefetcher.bytes_read)
        self.prefetcher.bytes_read.zero_()
        figures = {
            "engram/prefetch_in_time": self._rows_there / self._rows,
            "engram/prefetch_waited_ms": 1000 * self._seconds / steps,
            "engram/prefetch_bytes": (read + self._bytes) / steps,
        }
        self._reset()
        return figures

    def on_train_end(self, args, state, control, **kwargs):
        for loader, collate in self._wrapped:
            loader.collate_fn = collate
        for table in self._watched:
            table.watch_lookups(None)
        if self.prefetcher is not None:
            self.prefetcher.stop()
        self._wrapped, self._watched = [], []

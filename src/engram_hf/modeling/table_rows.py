"""Rows of a table by their number in it: gathered, replaced, looked up to be trained. The part of `EngramTable` that
row updates and checkpoints of changed rows use.

A number counts through all heads, block by block.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from .disk_reading import pages_of_rows
from .table_gradients import RowGradients, RowsOfLookups, group


RESIDENT, HOST, DISK = "resident", "host", "disk"
# Stands for the rows where gradients of a model are clipped; no part of the model, so no checkpoint has it.
ROW_GRADIENT_NORM = "row_gradient_norm"


def put_rows(target: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, is_mapped: bool) -> None:
    """`target[keys] = rows`, for (rows, ...) contiguous and keys (n,) int64.

    In a CPU's memory by numpy, a row as one element: a fourth of the time that index_copy_ takes. Where a file is
    mapped, what takes the time is the kernel's faults, and index_copy_ has several threads meet them.
    """
    if target.device.type != "cpu" or is_mapped:
        target.index_copy_(0, keys.to(target.device), rows.to(target.device))
        return
    row = np.dtype((np.void, target[0].nbytes))
    bytes_of_target, bytes_of_rows = (
        tensor.view(torch.uint8).numpy().reshape(-1).view(row) for tensor in (target, rows.cpu().contiguous())
    )
    bytes_of_target[keys.cpu().numpy()] = bytes_of_rows


class RowsByNumber:
    """Part of `EngramTable`."""

    row_gradients: RowGradients | None

    def collect_row_gradients(self) -> RowGradients:
        """From now on, leave gradients of rows behind for whoever updates them; blocks get no gradient any more."""
        if self.row_gradients is None:
            self.row_gradients = RowGradients()
            exact = torch.promote_types(self.dtype, torch.float32)
            self.row_gradients.norm.data = self.row_gradients.norm.data.to(self.blocks[0].device, exact)
            self.register_parameter(ROW_GRADIENT_NORM, self.row_gradients.norm)
            self.row_changes.settle(self)
            self.row_changes.begin(self)
        return self.row_gradients

    @torch.compiler.disable
    def _look_up_to_train(self, row_ids: torch.Tensor) -> torch.Tensor:
        """(..., heads) to (..., heads, head_dim); its graph begins at the distinct rows."""
        self._check_files()
        home = row_ids.to(self.home)
        self._check_row_ids(home)
        groups = group((home + self.first_rows_of_heads.to(home.device)).flatten())
        distinct = groups.distinct
        with nullcontext() if self.watch is None else self.watch(distinct):
            started = self.reader.take(row_ids)
            for future in started or []:
                future.result()
            rows = self.gather_rows(distinct, are_read=started is not None)
        rows = rows.to(row_ids.device, torch.promote_types(self.dtype, torch.float32))
        if self.is_trainable:
            rows.requires_grad_()
            self.row_gradients.follow(rows, distinct, self._are_trained(distinct))
        looked_up = RowsOfLookups.apply(rows, groups.to(row_ids.device))
        return looked_up.view(*row_ids.shape, self.head_dim).to(self.dtype)

    def _are_trained(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Which rows are of blocks that are not frozen; None for all."""
        if all(block.requires_grad for block in self.blocks):
            return None
        bounds = torch.tensor([*self.first_rows[1:]], device=keys.device)
        is_trained = torch.tensor([block.requires_grad for block in self.blocks], device=keys.device)
        return is_trained[torch.bucketize(keys, bounds, right=True)]

    @property
    def first_rows_of_heads(self) -> torch.Tensor:
        """(heads,) int64: the number in the table of the first row of each head."""
        return self.head_rows.cumsum(0) - self.head_rows

    @property
    def home(self) -> torch.device:
        """Where rows are gathered and updated: the device of a resident table, else the CPU."""
        return self.blocks[0].device if self.is_resident else torch.device("cpu")

    def parts(self, keys: torch.Tensor) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """For each block that is asked for: its number, which of the keys, and their rows inside it."""
        bounds = torch.searchsorted(keys, torch.tensor(self.first_rows, device=keys.device)).tolist() + [len(keys)]
        for number, (start, end) in enumerate(zip(bounds, bounds[1:])):
            if end > start:
                yield number, slice(start, end), keys[start:end] - self.first_rows[number]

    @torch.no_grad()
    def gather_rows(self, keys: torch.Tensor, are_read: bool = False) -> torch.Tensor:
        """Rows by their number in the table.

        Args:
            keys: (n,) int64, ascending, on `home`.
            are_read: whether their pages have been asked for already.

        Returns:
            (n, row width) in the type of the table, on `home`; a copy.
        """
        rows = torch.empty(len(keys), self.row_width, dtype=self.dtype, device=keys.device)
        for number, part, wanted in self.parts(keys):
            block = self._block(number, keys)
            if self.tiers[number] == DISK and not are_read:
                addresses = block.data_ptr() + wanted.numpy() * self.row_nbytes
                self.reader.read(pages_of_rows(addresses, self.row_nbytes), self.sources[number].file)
            if block.device == rows.device:
                torch.index_select(block.detach(), 0, wanted, out=rows[part])
            else:
                rows[part] = block.detach().index_select(0, wanted.to(block.device)).to(rows.device)
        return rows

    @torch.no_grad()
    def write_rows(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        """Replace rows, where they live.

        Args:
            keys: (n,) int64, ascending and distinct, on `home`.
            rows: (n, row width) in the type of the table.
        """
        for number, part, wanted in self.parts(keys):
            block = self._block(number, keys).detach()
            put_rows(block, wanted, rows[part], is_mapped=self.tiers[number] == DISK)
            self.row_changes.follow_write(number, block)
        self.row_changes.mark(keys)
        if self.hot_rows is not None:
            self.hot_rows.forget(keys.cpu().numpy())

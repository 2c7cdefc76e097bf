"""The rows of a patch while training changes them."""

import numpy as np
import torch

from ..modeling.table import EngramTable
from ..modeling.table_patches import REPLACE, Layer, PatchedRows, find_rows_among


class TrainedRows:
    """Rows of a patch: it grows by the rows that steps move, and the table is never written to.

    New rows are added behind those that are there. Row ids are kept in runs that ascend, each more than twice as long
    as the next, so a step sorts and copies few of them.
    """

    def __init__(self, name: str, table: EngramTable):
        """
        Args:
            name: of the patch.
            table: that it lies over. Rows are kept in its type, where it gathers and updates its own.
        """
        self.name, self._first_row_ids = name, table.patches.first_on_cpu
        self._rows = torch.zeros(0, table.head_dim, dtype=table.dtype, device=table.home)
        self._count = 0
        # Row ids, ascending, and where their rows are.
        self._runs: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Made of the rows as they are, for lookups outside of training.
        self._fixed: Layer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of rows, row ids and places."""
        return self._rows.nbytes + sum(row_ids.nbytes + places.nbytes for row_ids, places in self._runs)

    def clear(self) -> None:
        """Forget all rows."""
        self._rows, self._count, self._runs, self._fixed = self._rows[:0], 0, [], None

    def read(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the rows that are known over those of the table, (n, head_dim), by their row ids, (n,)."""
        places = self._places(row_ids)
        is_known = places >= 0
        rows[is_known] = self._rows[places[is_known]]

    def write(self, row_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep rows, (n, head_dim), by their row ids, (n,) ascending and distinct."""
        self._fixed = None
        places = self._places(row_ids)
        is_new = places < 0
        added = row_ids[is_new]
        places[is_new] = new = torch.arange(self._count, self._count + len(added), device=row_ids.device)
        self._count += len(added)
        if self._count > len(self._rows):
            room = self._rows.new_zeros(max(self._count, 2 * len(self._rows)), self._rows.shape[1])
            room[: len(self._rows)] = self._rows
            self._rows = room
        self._rows[places] = rows
        if len(added):
            self._add_run(added, new)

    def _add_run(self, row_ids: torch.Tensor, places: torch.Tensor) -> None:
        while self._runs and len(self._runs[-1][0]) <= 2 * len(row_ids):
            longer, of_longer = self._runs.pop()
            row_ids, order = torch.cat([longer, row_ids]).sort()
            places = torch.cat([of_longer, places])[order]
        self._runs.append((row_ids, places))

    def _places(self, row_ids: torch.Tensor) -> torch.Tensor:
        """(n,): where the rows are; -1 for those that are not known."""
        found = torch.full_like(row_ids, -1)
        for known, places in self._runs:
            is_known, where = find_rows_among(known, row_ids)
            found[is_known] = places[where[is_known]]
        return found

    def fixed(self) -> Layer:
        """The rows as they are now, as those of any patch. Later steps do not change them."""
        if self._fixed is None:
            row_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(each.cpu() for each, _ in self._runs)])
            places = torch.cat([torch.zeros(0, dtype=torch.int64), *(each.cpu() for _, each in self._runs)])
            row_ids, order = row_ids.sort()
            rows = self._rows[places[order].to(self._rows.device)].cpu()
            self._fixed = Layer(self.name, PatchedRows(row_ids, rows, 0), REPLACE, 1.0, self._first_row_ids)
        return self._fixed

    def put(self, numbers: np.ndarray, rows: torch.Tensor) -> None:
        """As `Layer.put`."""
        self.fixed().put(numbers, rows)

    def lay_over_all(self, in_table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """As `Layer.lay_over_all`."""
        return self.fixed().lay_over_all(in_table, rows)

    def __deepcopy__(self, memo: dict) -> Layer:
        return self.fixed()

    def __reduce__(self):
        return self.fixed().__reduce__()

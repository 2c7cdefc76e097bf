"""The row patches of a model: their names and order, over all of its tables.

What a patch says of one table is in table_patches.py.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from .table_formats import RowFormat
from .table_patches import (
    REPLACE,
    Names,
    RowPatch,
    RowsInTraining,
    TablePatches,
    asked_of,
    asking,
    check_scale,
    patched_rows,
    widened,
)


class PatchableTable(Protocol):
    """What this file needs of a table."""

    head_dim: int
    row_width: int
    stored_as: RowFormat

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def home(self) -> torch.device: ...
    @property
    def patches(self) -> "TablePatches": ...
    def gather_rows(self, row_ids: torch.Tensor) -> torch.Tensor: ...


# Those of one model by their names inside the base model.
Tables = Mapping[str, PatchableTable]
# Rows of a patch that are looked through at a time.
ROWS_AT_ONCE = 2**16


def check_patch(patch: RowPatch, tables: Tables) -> None:
    """
    Raises:
        TypeError: it is no patch.
        ValueError: the patch is not sound, or is one of other tables.
    """
    if not isinstance(patch, RowPatch):
        raise TypeError(
            f"A patch is a RowPatch, as load_patch and make_patch give it, or its file; got {type(patch).__name__}. "
            "memorize and forget give two: patch, report = memorize(...)."
        )
    patch.check(f"The patch {patch.name!r}")
    for name, each in patch.tables.items():
        table = tables.get(name)
        if table is None:
            raise ValueError(
                f"The patch {patch.name!r} changes rows of {name}, and the model has no such table; it has "
                f"{', '.join(tables) or 'none'}. Use the patch with the model that it was made for."
            )
        if (each.table_rows, each.rows.shape[1]) != (table.num_rows, table.head_dim):
            raise ValueError(
                f"The patch {patch.name!r} was made for a {name} of {each.table_rows} rows of width "
                f"{each.rows.shape[1]}, and this one has {table.num_rows} of width {table.head_dim}. Use the patch "
                "with the model that it was made for."
            )


def refuse_overflow(patch: RowPatch, scale: float, tables: Tables) -> None:
    """
    Raises:
        ValueError: a row of the patch, laid over the row of the table, is too large for the type of lookups.
    """
    for name, (row_ids, rows, *_) in patch.tables.items():
        table = tables[name]
        for part, given in zip(row_ids.split(ROWS_AT_ONCE), rows.detach().cpu().split(ROWS_AT_ONCE), strict=True):
            if patch.mode == REPLACE and scale == 1:
                own = torch.zeros(1, table.row_width, dtype=table.dtype)
            else:
                own = table.gather_rows(part.to(table.home)).cpu()
            own = widened(table.stored_as.decode(own, table.head_dim))
            if not torch.isfinite(patched_rows(own, given, patch.mode, scale)).all():
                dtype = str(own.dtype).removeprefix("torch.")
                raise ValueError(
                    f"Under the patch {patch.name!r} with the scale {scale:g}, rows of {name} would be infinite: "
                    f"lookups are {dtype}, whose largest number is {torch.finfo(own.dtype).max:.4g}. Use a smaller "
                    "scale or smaller rows, or a table of another type."
                )


class ModelPatches:
    """The row patches that a model knows, in the order in which they were added, and which of them are active.

    known: name to the names of the tables that the patch says something of.
    active: names, in the order in which they are laid over tables.
    trained: name of the patch that training changes; empty where there is none.
    """

    def __init__(self) -> None:
        self.known: dict[str, Names] = {}
        self.active: Names = ()
        self.trained = ""

    def add(self, tables: Tables, patch: RowPatch, scale: float) -> None:
        """Know a patch that was checked, and make it active behind those that are.

        Raises:
            ValueError: there is one of this name; the scale is no number; rows would be infinite.
        """
        if patch.name in self.known:
            raise ValueError(
                f"The model has a patch {patch.name!r} already. Take it out with remove_patch(model, {patch.name!r}), "
                "or give the new one another name."
            )
        check_scale(scale)
        refuse_overflow(patch, scale, tables)
        for name, each in patch.tables.items():
            tables[name].patches.add(patch.name, each, patch.mode, float(scale))
        self.known[patch.name] = tuple(patch.tables)
        self._activate(tables, (*self.active, patch.name))

    def remove(self, tables: Tables, name: str) -> None:
        """Know a patch no more. Requests that have begun with it go on with it.

        Raises:
            ValueError: there is no patch of this name.
        """
        self._refuse_unknown([name])
        self._activate(tables, tuple(each for each in self.active if each != name))
        self.trained = "" if name == self.trained else self.trained
        for table in tables.values():
            table.patches.forget(name)
        del self.known[name]

    def forget_lost(self, tables: Tables) -> None:
        """Know those patches no more whose tables have all gone."""
        for name in [name for name, own in self.known.items() if own and not any(each in tables for each in own)]:
            self.remove(tables, name)

    def set(self, tables: Tables, names: Sequence[str]) -> None:
        """Lay these patches over the tables from now on.

        Raises:
            ValueError: there is no patch of a name, or a name is there twice.
        """
        self._refuse_unknown(names)
        self._activate(tables, tuple(names))

    def _activate(self, tables: Tables, names: Names) -> None:
        for table in tables.values():
            table.patches.overlay = table.patches.overlay_of(names)
        self.active = names

    def seen(self) -> list[str]:
        """Names of the patches that lie over the tables; in a context of `disable`, none."""
        return [] if asked_of(self) == () else list(self.active)

    def train(self, tables: Tables, name: str, rows: Mapping[str, RowsInTraining]) -> None:
        """Know a patch whose rows training changes, and make it active.

        Args:
            tables: of the model.
            name: of the patch.
            rows: name of a table to its rows in the patch.

        Raises:
            ValueError: there is one of this name, or others are active.
        """
        if name in self.known or self.active:
            raise ValueError(
                f"A patch {name!r} is to be trained, and the model has the patches {', '.join(map(repr, self.known))} "
                "already. Remove them first, or merge them into the tables."
            )
        for table_name, each in rows.items():
            tables[table_name].patches.begin_training(each)
        self.known[name], self.trained = tuple(rows), name
        self._activate(tables, (name,))

    def end_training(self, tables: Tables) -> None:
        """From now on, the patch that was trained is one as any other."""
        for table in tables.values():
            table.patches.end_training()
        self.trained = ""
        self._activate(tables, self.active)

    def use(self, tables: Tables, names: Sequence[str | Sequence[str] | None]) -> AbstractContextManager[None]:
        """A context in which each sequence of a batch sees its own patches and no others, as they are now.

        Args:
            tables: of the model.
            names: one per sequence: a name, a list of names in their order, or None for the plain table.

        Raises:
            ValueError: there is no patch of a name, or no sequence.
        """
        if not isinstance(names, list | tuple) or not names:
            raise ValueError(f"use_patches takes one name or None per sequence of the batch, got {names!r:.80}.")
        if wrong := [each for each in names if not isinstance(each, str | list | tuple | None)]:
            raise ValueError(f"use_patches takes a name, a list of names or None per sequence, got {wrong[0]!r:.80}.")
        asked = tuple(() if each is None else (each,) if isinstance(each, str) else tuple(each) for each in names)
        for each in dict.fromkeys(asked):
            self._refuse_unknown(each)
        found = {table.patches: tuple(table.patches.overlay_of(each) for each in asked) for table in tables.values()}
        return asking({**found, self: asked})

    def disable(self, tables: Tables) -> AbstractContextManager[None]:
        """A context in which the tables are plain, for any batch."""
        return asking({self: (), **{table.patches: () for table in tables.values()}})

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise ValueError(f"Patches are given as a list of names, got the text {names!r}. Write [{names!r}].")
        if unknown := [name for name in names if not isinstance(name, str) or name not in self.known]:
            raise ValueError(
                f"The model has no patch {unknown[0]!r}; it has {', '.join(map(repr, self.known)) or 'none'}. Add it "
                "with add_patch(model, patch)."
            )
        if len(set(names)) < len(names):
            raise ValueError(f"Each patch can be laid over the tables once, got {list(names)}.")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "trained": ""}

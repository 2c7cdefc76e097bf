"""An embedding of somebody else's model whose rows come from a table on a tier.

The embedding becomes an instance of a subclass of its own class. The owner's `forward` still runs, with its scale; only
the gather below it is this file's. Rows, tiers and files are those of every table of this package.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..modeling.table import EngramTable
from ..modeling.table_blocks import BlockSource
from ..modeling.table_formats import FloatRows
from ..modeling.table_patches import numbers_of
from .rows_in_memory import RowsInMemory, addresses_of
from .same_name import class_of_same_name, without_attributes
from .table_parts import SCALED, TABLE_CHILD


class ScaledRows(FloatRows):
    """FP8 rows whose scale belongs to the embedding. They are read as they are stored, and are not trained."""

    is_trainable = False


class TableOfParts(EngramTable):
    """A table that lies in a checkpoint as parts, each a run of rows and a block here.

    Row ids count through the whole table, so a lookup may ask any part for any number of rows.
    """

    def __init__(self, rows_of_part: Sequence[int], width: int, dtype: torch.dtype):
        """
        Args:
            rows_of_part: rows of each part, in their order.
            width: of a row.
            dtype: of the rows as they are stored.
        """
        name = str(dtype).removeprefix("torch.")
        stored_as = ScaledRows(name) if dtype == SCALED else FloatRows(name)
        super().__init__(rows_of_part, width, block_elements=1, stored_as=stored_as)
        self._first_rows = np.array(list(accumulate(rows_of_part[:-1], initial=0)))
        self._rows: RowsInMemory | None = None

    def take_over(self, parts: Sequence[torch.Tensor], sources: Sequence[BlockSource | None], train: bool) -> None:
        """Begin with rows that are in memory, whatever file they came from.

        Args:
            parts: the rows of each part, (rows, width).
            sources: where each part lies in a file, if it does. Rows are compared before a part goes to disk.
            train: whether they may be trained.
        """
        for block, rows, source in zip(self.block_records, parts, sources, strict=True):
            self.blocks.append(nn.Parameter(rows, requires_grad=train and self.stored_as.is_trainable))
            block.begin_in_memory(source)
        self._move_heads(self.blocks[0].device)

    def look_up(self, row_ids: torch.Tensor, numbers: np.ndarray | None = None) -> torch.Tensor:
        """Look the table's own rows up.

        Args:
            row_ids: (...), integers in [0, rows of the table).
            numbers: as in `EngramTable.look_up`.

        Returns:
            (..., width) in the type of the table, on the device of `row_ids`.

        Raises:
            IndexError, ValueError: as `EngramTable.look_up`.
        """
        flat = row_ids.reshape(-1).long()
        if self._takes_any_order():
            found = super().look_up(flat, numbers).view(-1, self.head_dim)
        else:
            ascending, order = flat.sort()
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            found = super().look_up(ascending).view(-1, self.head_dim).index_select(0, back)
        return found.view(*row_ids.shape, self.head_dim)

    def _takes_any_order(self) -> bool:
        """Whether a lookup goes to no block after the other."""
        if len(self.block_records) == 1 or (self.is_in_training and torch.is_grad_enabled()):
            return True
        return not self.is_resident and not torch.compiler.is_compiling() and self._in_memory() is not None

    def bring_pages(self, row_ids: torch.Tensor) -> None:
        """As `EngramTable.bring_pages`, for row ids of the table in any order. Ids that it lacks are skipped, and
        looking them up raises."""
        # Over ranks, the owner of a row reads it when it is asked.
        if self.is_resident or self.ranks is not None:
            return
        flat = row_ids.detach().reshape(-1).cpu().long()
        flat = flat[(flat >= 0) & (flat < self.num_rows)]
        self._check_files()
        if (rows := self._in_memory()) is None:
            super().bring_pages(flat.unique())
            return
        for pages, file in rows.pages(rows.find(flat)):
            self._reader.start(pages, file)

    def _in_memory(self) -> RowsInMemory | None:
        """All rows as one tensor; None where a block is on an accelerator, or hot rows stand before the blocks."""
        if self.hot_rows is not None:
            return None
        if self._rows is None or self._rows.addresses != addresses_of(self.blocks.parameters()):
            can_hold = RowsInMemory.can_hold(self.block_records)
            self._rows = RowsInMemory(self.block_records) if can_hold else None
        return self._rows

    def _row_ids_in_table(self, row_ids: torch.Tensor) -> torch.Tensor:
        return row_ids

    def _check_row_ids(self, numbers: np.ndarray | None) -> None:
        if numbers is None or not numbers.size:
            return
        least, largest = int(numbers.min()), int(numbers.max())
        if least < 0 or largest >= self.num_rows:
            raise IndexError(
                f"Row id {least if least < 0 else largest} is out of range: the table has {self.num_rows} rows. Token "
                "ids come from the tokenizer of this very model."
            )

    def _split(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each block the rows that are asked of it, counted from its first; the row ids, (n,), ascend where there
        is more than one block."""
        if len(self.block_records) == 1:
            return (row_ids,)
        firsts = torch.from_numpy(self._first_rows).to(row_ids.device)
        counts = torch.searchsorted(row_ids, firsts).diff(append=row_ids.new_tensor([len(row_ids)]))
        parts = row_ids.split(counts.tolist())
        return tuple(part - first for part, first in zip(parts, self._first_rows.tolist(), strict=True))

    def _split_on_cpu(self, row_ids: torch.Tensor) -> list[torch.Tensor]:
        self._check_files()
        on_cpu = row_ids.detach().cpu()
        self._check_row_ids(numbers_of(on_cpu))
        return list(self._split(on_cpu))

    def _check_files(self) -> None:
        self.changes.settle()
        if (rows := self._in_memory()) is None:
            super()._check_files()
            return
        for file in rows.files:
            file.check_unchanged()

    @torch.compiler.disable(
        reason="Rows of a table off the device are read outside of the graph. Compile without fullgraph=True, or place "
        'the table on the device: place_tables(model, {"...": "resident"}).'
    )
    def _read(self, row_ids: torch.Tensor) -> list[torch.Tensor]:
        self._check_files()
        if (rows := self._in_memory()) is None:
            return super()._read(row_ids)
        on_cpu = row_ids.detach().cpu()
        self._check_row_ids(numbers_of(on_cpu))
        found = rows.find(on_cpu)
        for pages, file in rows.pages(found):
            self._reader.read(pages, file)
        if not row_ids.is_cuda:
            return [rows.gather(found).to(row_ids.device)]
        staging = torch.empty((len(on_cpu), self.row_width), dtype=self.dtype, device="cpu", pin_memory=True)
        return [rows.gather(found, out=staging).to(row_ids.device, non_blocking=True)]

    def place(self, number: int, tier: str, device: torch.device | str | int | None = None) -> None:
        """As `EngramTable.place`."""
        self._rows = None
        super().place(number, tier, device)

    def _apply(self, fn, recurse=True):
        self._rows = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_rows": None}


class ServedEmbedding(nn.Embedding):
    """The part below the owner's class: `nn.Embedding` without a weight of its own.

    table: the rows.
    given_dtype: type in which rows are given; None for that of the table.
    """

    table: TableOfParts
    given_dtype: torch.dtype | None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Shape and type of the weight, without memory. The rows are in `table`."""
        dtype = self.given_dtype or self.table.stored_as.storage
        return torch.empty(self.num_embeddings, self.embedding_dim, dtype=dtype, device="meta")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) ids to (..., width)."""
        rows = self.table(input)
        rows = rows if self.given_dtype is None else rows.to(self.given_dtype)
        if self.padding_idx is None or not rows.requires_grad:
            return rows
        # As in every embedding, the row of the padding takes no gradient.
        return torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.given_dtype is not None:
            self.given_dtype = fn(torch.empty(0, dtype=self.given_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As in any module; the weight of the owner's class may stand for the blocks."""
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            if weight.shape != (self.num_embeddings, self.embedding_dim):
                raise ValueError(
                    f"{prefix}weight is {tuple(weight.shape)}, needs {(self.num_embeddings, self.embedding_dim)}."
                )
            rows = [block.num_rows for block in self.table.block_records]
            for number, part in enumerate(weight.split(rows)):
                state_dict[f"{prefix}{TABLE_CHILD}.blocks.{number}"] = part
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol):
        return without_attributes, (served_class, owner_of(type(self))), self.__dict__


@cache
def served_class(owner: Any) -> Any:
    """The class of an embedding whose rows come from a table, made of its own class; one for each class."""
    bases = (ServedEmbedding,) if owner is nn.Embedding else (owner, ServedEmbedding)
    return class_of_same_name(owner, bases, owner=owner)


def owner_of(served: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class that an embedding had before."""
    return served.owner  # type: ignore[attr-defined]


def serve(module: nn.Embedding, table: TableOfParts) -> None:
    """Have the rows of an embedding come from a table, from now on.

    Raises:
        ValueError: the embedding does more than to look rows up.
    """
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            "An embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be served from a tier; only a "
            "plain one can."
        )
    if hasattr(module, "_old_forward"):
        raise ValueError(
            "accelerate has put hooks on this embedding, which run its old forward. Load the model with "
            "load_with_tables in place of from_pretrained."
        )
    dtype = module.weight.dtype
    del module._parameters["weight"]
    module.__class__ = served_class(cast(Any, type(module)))
    module.add_module(TABLE_CHILD, table.train(module.training))
    module.given_dtype = None if dtype == SCALED else dtype  # type: ignore[assignment]

"""All rows of one memory layer, in blocks. The one seam between a model and its rows: row ids in, rows out.

A block is a run of whole hash heads: one parameter, one tensor in the checkpoint. Blocks are independent, so they are
mapped, placed, sharded and saved one by one. This file knows nothing of models, hashing or gates.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn


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


class EngramTable(nn.Module):
    """Rows of all heads of one memory layer, each (head_dim,).

    Parameters: `blocks.0`, `blocks.1`, ..., each (rows of its heads, head_dim), in the table's own dtype.
    """

    def __init__(self, rows_of_head: Sequence[int], head_dim: int, block_elements: int, dtype: torch.dtype | None):
        """
        Args:
            rows_of_head: rows of each head, in the order of the last axis of row ids.
            head_dim: width of a row.
            block_elements: most elements of a block that holds more than one head.
            dtype: type of the rows; None is torch's default at this moment.
        """
        super().__init__()
        self.head_dim = head_dim
        self.rows_of_block = split_into_blocks(rows_of_head, head_dim, block_elements)
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.empty(sum(rows), head_dim, dtype=dtype)) for rows in self.rows_of_block
        )
        # First row of each head inside its block.
        self.head_offsets = nn.Buffer(self.make_head_offsets(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def num_rows(self) -> int:
        return sum(block.shape[0] for block in self.blocks)

    def make_head_offsets(self) -> torch.Tensor:
        """(heads,) int64: first row of each head inside its block."""
        offsets = [offset for rows in self.rows_of_block for offset in accumulate(rows[:-1], initial=0)]
        return torch.tensor(offsets, dtype=torch.int64)

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Args:
            row_ids: (..., heads) int64, each in [0, rows of its head).

        Returns:
            (..., heads * head_dim) in the dtype of the table, on the device of `row_ids`.
        """
        block_rows = row_ids + self.head_offsets.to(row_ids.device)  # (..., heads), in [0, rows of the block)
        heads_of_block = [len(rows) for rows in self.rows_of_block]
        rows = [F.embedding(ids, block) for ids, block in zip(block_rows.split(heads_of_block, dim=-1), self.blocks)]
        return torch.cat(rows, dim=-2).flatten(-2)

    def _apply(self, fn, recurse=True):
        """Move the table, never convert it: `.to(bfloat16)` and `.half()` leave its bytes as they are."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.blocks[0].device))
        if probe.dtype == self.dtype:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: tensor.to(probe.device), recurse)

    def extra_repr(self) -> str:
        return f"rows={self.num_rows}, head_dim={self.head_dim}, blocks={len(self.blocks)}, dtype={self.dtype}"

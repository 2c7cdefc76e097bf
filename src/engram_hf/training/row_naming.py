"""How a message of gradients says which rows they are of. This file makes and reads it, and sends nothing.

Where a table is cut over ranks, a rank has asked for the rows that it trains. Each owner remembers the row ids of such
a lookup until its next step (modeling/table_ranks.py), so they need not travel again. The message to an owner is

* int64: how many lookups it names;
* int64 for each of them: its number;
* for each of them, one bit for each row that was asked for: whether its gradient comes. They fill whole bytes;
* the row ids of other rows, as `RowCut.pack` makes them. There are none unless a backward comes behind a step, or many
  lookups come ahead of one.

Gradients travel in this order, one for each distinct row: the first lookup that has asked for a row names it. Where no
row has a gradient the message is empty. Where every process holds whole tables nobody has asked, so row ids travel.
"""

from typing import NamedTuple

import numpy as np
import torch

from ..modeling.table_cut import RowCut, check_number
from ..modeling.table_ranks import TableRanks


class NamedRows(NamedTuple):
    """Rows with gradients as they travel to their owners.

    order: (n,) int64, where each of them is among the rows that were given.
    row_ids: for each owner (n,) int64, in the order in which they travel.
    messages: for each owner, uint8.
    """

    order: torch.Tensor
    row_ids: tuple[torch.Tensor, ...]
    messages: list[torch.Tensor]

    def heads(self) -> torch.Tensor:
        """(owners, 3) int64: how many rows there are, the check number of their row ids, and bytes of the message."""
        checks = torch.stack([check_number(ids) for ids in self.row_ids]).cpu()
        counts, nbytes = (torch.tensor([len(each) for each in tensors]) for tensors in (self.row_ids, self.messages))
        return torch.stack([counts, checks, nbytes], dim=-1)


def list_rows(cut: RowCut, row_ids: torch.Tensor) -> NamedRows:
    """Rows, (n,) ascending, of a table that every process holds: their ids travel."""
    order, of_owner = cut.by_owner(row_ids)
    return NamedRows(order, of_owner, [cut.pack(ids, owner) for owner, ids in enumerate(of_owner)])


def name_rows(ranks: TableRanks, row_ids: torch.Tensor) -> NamedRows:
    """Rows, (n,) ascending and distinct, on the CPU, of a table over ranks: by the lookups that have asked for them."""
    owners, lookups = ranks.cut.owner(row_ids), ranks.lookups if len(row_ids) else []
    # Which lookup names a row. Rows of this rank travel nowhere.
    turns, is_left = torch.full_like(row_ids, len(lookups)), owners != ranks.rank
    have_gradients = []
    for turn, lookup in enumerate(lookups):
        asked = torch.cat(lookup.asked)
        places = torch.searchsorted(row_ids, asked).clamp_(max=len(row_ids) - 1)
        are_named = (row_ids[places] == asked) & is_left[places]
        turns[places[are_named]], is_left[places[are_named]] = turn, False
        have_gradients.append(are_named.split([len(ids) for ids in lookup.asked]))
    order = (owners * (len(lookups) + 1) + turns).argsort(stable=True)
    of_owner = row_ids[order].split(owners.bincount(minlength=ranks.cut.ranks).tolist())
    messages = []
    for owner, ids in enumerate(of_owner):
        pairs = zip(lookups, have_gradients, strict=True)
        named = [(lookup.number, bits[owner]) for lookup, bits in pairs if bits[owner].any()]
        others = ids[sum(int(bits.sum()) for _, bits in named) :]
        if owner != ranks.rank and len(others):
            ranks.service.moved.update(ids=len(others), again=len(others))
        messages.append(_message(named, ranks.cut.pack(others, owner) if len(others) else None))
    return NamedRows(order, of_owner, messages)


def _message(named: list[tuple[int, torch.Tensor]], others: torch.Tensor | None) -> torch.Tensor:
    """See the top of this file. others: packed row ids."""
    if not named and others is None:
        return torch.empty(0, dtype=torch.uint8)
    head = torch.tensor([len(named), *(number for number, _ in named)]).view(torch.uint8)
    bits = [torch.from_numpy(np.packbits(each.numpy())) for _, each in named]
    return torch.cat([head, *bits, *([] if others is None else [others])])


def find_named(ranks: TableRanks, asker: int, message: torch.Tensor, check: int) -> torch.Tensor | None:
    """What `name_rows` of another rank has said, to held ids of this one, (n,).

    Args:
        ranks: of the table.
        asker: the rank that the message, (bytes,) uint8 on the CPU, comes from.
        check: `check_number` of the row ids.

    Returns:
        None where they do not stand for the row ids that were meant.
    """
    answered, parts = ranks.answered[asker], [torch.zeros(0, dtype=torch.int64)]
    count = int(message[:8].clone().view(torch.int64)) if len(message) >= 8 else 0
    if not 0 <= 8 * count <= len(message):
        return None
    start = 8 * (1 + count)
    for number in message[8:start].clone().view(torch.int64).tolist():
        # Without the lock: a rank names its newest lookups, and the thread that answers forgets only older ones.
        known = answered.get(number)
        if known is None:
            return None
        _, asked = known
        end = start + -(-len(asked) // 8)
        bits = np.unpackbits(message[start:end].numpy(), count=len(asked))
        parts.append(asked[torch.from_numpy(bits.astype(bool))])
        start = end
    if len(message) > start:
        others = ranks.cut.unpack(message[start:], ranks.rank)
        if others is None:
            return None
        parts.append(others)
    held = torch.cat(parts)
    return held if ranks.cut.are_meant(held, check, ranks.rank) else None

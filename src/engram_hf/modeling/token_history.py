"""Which tokens before it each token may see, and what a cache keeps of them.

The one rule behind padding, packing and chunks. Knows ids and positions, nothing of hashing.
"""

import torch


# A compressed id below zero carries no memory: padding, image spans, everything before the start.
NO_MEMORY = -1
# In a cache, the bits from this one on hold the run of real tokens, those below it the id.
RUN_SHIFT = 32


def token_reach(ids: torch.Tensor, positions: torch.Tensor, run_before: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens directly before it each token may see: the one rule behind padding, packing and chunks.

    A token sees its predecessor `j` where its own position is at least `j` (so documents in one row stay apart) and
    where every id from `t - j` to `t` is a real one (so it never looks past padding or a token without memory).

    Args:
        ids: (batch, history + seq) compressed ids, negative for "no memory".
        positions: (batch or 1, seq) position of each token in its own document, from 0 on.
        run_before: (batch,) how many real tokens without a gap end right before `ids`; none by default.

    Returns:
        (batch, seq) int64; -1 for a token without memory.
    """
    seq = positions.shape[1]
    run = (ids.new_zeros(ids.shape[0]) if run_before is None else run_before).unsqueeze(1)
    if ids.shape[1] > 1:
        places = torch.arange(ids.shape[1], device=ids.device)
        last_gap = torch.where(ids >= 0, -1 - run, places).cummax(1)[0]
        run, ids = (places - 1 - last_gap)[:, -seq:], ids[:, -seq:]
    return torch.minimum(run, positions).masked_fill(ids < 0, NO_MEMORY)


def pack_history(ids: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """What a cache keeps of each token: its id, and how many real tokens in a row end with it.

    The zeros of a cache that is new, padded or reset then mean "nothing before the start".

    Args:
        ids: (batch, seq) compressed ids below 2**32 - 1.
        reach: (batch, seq) as `token_reach` gives it.

    Returns:
        (batch, seq) int64, 0 for a token without memory.
    """
    return torch.where(ids >= 0, (ids + 1) + ((reach + 1) << RUN_SHIFT), 0)


def unpack_history(history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (batch, kept), negative for "nothing", and the run (batch,) of real tokens that ends with the last one."""
    return (history & ((1 << RUN_SHIFT) - 1)) - 1, history[:, -1] >> RUN_SHIFT

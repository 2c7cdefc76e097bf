"""Which tokens before it each token may see, and what a cache keeps of them.

The one rule behind padding, packing and chunks. Knows ids and positions, nothing of hashing.
"""

import torch


# In a cache, the bits from this one on hold the run of real tokens, those below it the id.
RUN_SHIFT = 40


def token_reach(
    ids: torch.Tensor, positions: torch.Tensor, window: int, run_before: torch.Tensor | None = None
) -> torch.Tensor:
    """How many tokens directly before it each token may see: the one rule behind padding, packing and chunks.

    A token sees its predecessor `j` where its own position is at least `j` (so documents in one row stay apart) and
    where every id from `t - j` to `t` is a real one (so it never looks past padding or a token without memory).

    Args:
        ids: (batch, history + seq) compressed ids, negative for "no memory".
        positions: (batch or 1, seq) position of each token in its own document.
        window: how far anybody will look.
        run_before: (batch,) how many real tokens without a gap end right before `ids`; none by default.

    Returns:
        (batch, seq) int64 in [0, window]; 0 for a token without memory.
    """
    seq = positions.shape[1]
    run_before = ids.new_zeros(ids.shape[0]) if run_before is None else run_before
    if ids.shape[1] == 1:
        run = run_before.unsqueeze(1)
    else:
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        last_gap = torch.where(ids >= 0, 0, places).cummax(1)[0]  # (batch, ids), 1-based, 0 for none
        run = places - 1 - last_gap + torch.where(last_gap == 0, run_before.unsqueeze(1), 0)
        run, ids = run[:, -seq:], ids[:, -seq:]
    reach = torch.minimum(run.clamp_max(window), positions.clamp_min(0))
    return torch.where(ids >= 0, reach, 0)


def pack_history(ids: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """What a cache keeps of each token: its id, and how many real tokens in a row end with it.

    The zeros of a cache that is new, padded or reset then mean "nothing before the start".

    Args:
        ids: (batch, seq) compressed ids below 2**40.
        reach: (batch, seq) as `token_reach` gives it.

    Returns:
        (batch, seq) int64, 0 for a token without memory.
    """
    return torch.where(ids >= 0, (ids + 1) + ((reach + 1) << RUN_SHIFT), 0)


def unpack_history(history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (batch, kept), negative for "nothing", and the run (batch,) of real tokens that ends with the last one."""
    return (history & ((1 << RUN_SHIFT) - 1)) - 1, history[:, -1] >> RUN_SHIFT

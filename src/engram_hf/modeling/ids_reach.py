"""Which earlier tokens each token may see: padding, packed documents, masks, and what a cache keeps of the past.

Knows ids, positions and masks; nothing of hashing.
"""

import torch
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing


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


def positions_in_documents(cumulative_lengths: torch.Tensor, seq: int) -> torch.Tensor:
    """(1, seq) position of each token in its document, from the borders (documents + 1,) of a padding-free batch."""
    places = torch.arange(seq, device=cumulative_lengths.device)
    document = torch.searchsorted(cumulative_lengths[1:].contiguous(), places, right=True)
    return (places - cumulative_lengths[document]).unsqueeze(0)


BESIDE_PADDING = (
    "Packed documents (position_ids that do not count up by one) need attention_mask=None: transformers does not keep "
    "them apart beside a mask with padding, and a compiled forward cannot look whether a mask hides anything. Give "
    "padding at the end of a row position 0 and leave the mask out."
)
BESIDE_A_CACHE = (
    "Packed documents (position_ids that do not count up by one, or do not go on where the cache ends) cannot share a "
    "cache: transformers' attention would mix them. Leave the cache out."
)


def find_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: int | torch.Tensor | None = None
) -> tuple[torch.Tensor | None, bool]:
    """Whether a row holds several documents, and the mask to go on with: transformers keeps documents apart only where
    there is none, so one that hides nothing is dropped.

    A traced forward cannot look: there a row without mask and cache may hold several, and elsewhere an assertion in
    the graph refuses them.

    Args:
        position_ids: (batch or 1, seq).
        attention_mask: (batch, seen), 0 for padding; masks of other shapes are their maker's affair.
        past_seen: tokens in the caller's cache; None for no cache.

    Raises:
        ValueError: several documents beside real padding, which transformers' masks cannot express, or with a cache;
            RuntimeError of the same text from a traced forward.
    """
    has_cache = past_seen is not None
    if attention_mask is not None and attention_mask.ndim != 2:
        return attention_mask, False
    if is_tracing(position_ids):
        if attention_mask is not None:
            torch._assert_async(~_restarts_beside_padding(position_ids, attention_mask).any(), BESIDE_PADDING)
        elif has_cache:
            torch._assert_async(~_does_not_go_on(position_ids, past_seen).any(), BESIDE_A_CACHE)
        return attention_mask, attention_mask is None and not has_cache and position_ids.shape[1] > 1
    if attention_mask is None or bool((attention_mask > 0).all()):
        if has_cache and _does_not_go_on(position_ids, past_seen).any():
            raise ValueError(BESIDE_A_CACHE)
        return None, not has_cache and find_packed_sequence_indices(position_ids) is not None
    if _restarts_beside_padding(position_ids, attention_mask).any():
        raise ValueError(BESIDE_PADDING)
    return attention_mask, False


def _does_not_go_on(position_ids: torch.Tensor, past_seen) -> torch.Tensor:
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    return position_ids != places + past_seen


def _restarts_beside_padding(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, seq) bool: where a document begins behind another one. Padding between tokens may count or not."""
    is_token = attention_mask > 0
    rank = is_token.long().cumsum(-1)[:, -position_ids.shape[1] :]
    here = is_token[:, -position_ids.shape[1] :]
    follows = torch.nn.functional.pad(here[:, 1:] & here[:, :-1], (1, 0))
    jumps = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0)) & follows
    return here & (rank > 1) & (jumps | (position_ids == 0))


def document_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """(batch or 1, seq), none negative: the same positions, but counted from where a piece begins that does not go on
    by one."""
    begins = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0))
    places = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    start = (places * begins).cummax(-1)[0]
    return torch.where(begins.long().cumsum(-1) > 0, places - start, position_ids.clamp_min(0))


def positions_under_mask(mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Positions of tokens under a mask that says for each whom it sees: one that does not see the token before it
    begins a document.

    Args:
        mask: (batch, 1, seq, seen), bool with True for "sees", or floats that are added to scores.
        position_ids: (batch or 1, seq), as they would be without the mask.
    """
    seq = position_ids.shape[1]
    sees = mask if mask.dtype == torch.bool else mask == 0
    before = sees[:, 0, 1:, :].diagonal(sees.shape[-1] - seq, dim1=1, dim2=2)  # (batch, seq - 1)
    begins = torch.nn.functional.pad(~before, (1, 0))
    places = torch.arange(seq, device=mask.device).expand_as(begins)
    start = (places * begins).cummax(-1)[0]
    return torch.where(begins.long().cumsum(-1) > 0, places - start, position_ids)

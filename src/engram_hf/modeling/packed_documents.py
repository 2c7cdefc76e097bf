"""Several documents in one row: where each begins, and which mask keeps transformers' attention from mixing them."""

import torch
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing


def positions_in_documents(cumulative_lengths: torch.Tensor, seq: int) -> torch.Tensor:
    """(1, seq) position of each token in its document, from the borders (documents + 1,) of a padding-free batch."""
    places = torch.arange(seq, device=cumulative_lengths.device)
    document = torch.searchsorted(cumulative_lengths[1:].contiguous(), places, right=True)
    return (places - cumulative_lengths[document]).unsqueeze(0)


BESIDE_PADDING = (
    "Packed documents (position_ids that restart) need attention_mask=None: transformers does not keep them apart "
    "beside a mask with padding. Give padding at the end of a row position 0 and leave the mask out."
)
BESIDE_A_CACHE = (
    "Packed documents (position_ids that restart) cannot share a cache: transformers' attention would mix them. Leave "
    "past_key_values out."
)


def find_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, has_cache: bool = False
) -> tuple[torch.Tensor | None, bool]:
    """Whether a row holds several documents, and the mask to go on with: transformers keeps documents apart only where
    there is none, so one that hides nothing is dropped.

    A traced forward cannot look: there a row without mask and cache may hold several, and elsewhere an assertion in
    the graph refuses them.

    Args:
        position_ids: (batch or 1, seq).
        attention_mask: (batch, seen), 0 for padding; masks of other shapes are their maker's affair.
        has_cache: whether the caller gave a cache.

    Raises:
        ValueError: several documents beside real padding, which transformers' masks cannot express, or with a cache;
            RuntimeError of the same text from a traced forward.
    """
    if position_ids.shape[1] == 1 or (attention_mask is not None and attention_mask.ndim != 2):
        return attention_mask, False
    if is_tracing(position_ids):
        if attention_mask is None and not has_cache:
            return None, True
        message = BESIDE_PADDING if attention_mask is not None else BESIDE_A_CACHE
        torch._assert_async(~restarts(position_ids, attention_mask).any(), message)
        return attention_mask, False
    if attention_mask is None or bool((attention_mask > 0).all()):
        is_packed = find_packed_sequence_indices(position_ids) is not None
        if is_packed and has_cache:
            raise ValueError(BESIDE_A_CACHE)
        return None, is_packed
    if restarts(position_ids, attention_mask).any():
        raise ValueError(BESIDE_PADDING)
    return attention_mask, False


def restarts(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch or 1, seq - 1 or seq) bool: where a document begins behind another one."""
    if attention_mask is None:
        return position_ids.diff(dim=1) != 1
    token_mask = attention_mask[:, -position_ids.shape[1] :] > 0
    return token_mask & (position_ids == 0) & (token_mask.long().cumsum(-1) > 1)

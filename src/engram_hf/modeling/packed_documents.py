"""Several documents in one row: where each begins, and which mask keeps transformers' attention from mixing them."""

import torch
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing


def positions_in_documents(cumulative_lengths: torch.Tensor, seq: int) -> torch.Tensor:
    """(1, seq) position of each token in its document, from the borders (documents + 1,) of a padding-free batch."""
    places = torch.arange(seq, device=cumulative_lengths.device)
    document = torch.searchsorted(cumulative_lengths[1:].contiguous(), places, right=True)
    return (places - cumulative_lengths[document]).unsqueeze(0)


def find_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
    """Whether a row holds several documents, and the mask to go on with: transformers keeps documents apart only where
    there is none, so one that hides nothing is dropped.

    Raises:
        ValueError: several documents beside real padding, which transformers' masks cannot express.
    """
    is_one_token = position_ids.shape[1] == 1
    if is_one_token or is_tracing(position_ids) or (attention_mask is not None and attention_mask.ndim != 2):
        return attention_mask, False
    if attention_mask is None or bool((attention_mask > 0).all()):
        return None, find_packed_sequence_indices(position_ids) is not None
    token_mask = attention_mask[:, -position_ids.shape[1] :] > 0
    starts = token_mask & (position_ids == 0)
    if (starts & (token_mask.long().cumsum(-1) > 1)).any():
        raise ValueError(
            "Packed documents (position_ids that restart) need attention_mask=None: transformers does not keep them "
            "apart beside a mask with padding. Give padding at the end of a row position 0 and leave the mask out."
        )
    return attention_mask, False

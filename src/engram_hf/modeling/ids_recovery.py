"""Which token ids a batch of input embeddings was made of, by exact match. Needed where a caller gives only embeddings.

Memory is bounded: rows are compared by a 64-bit key first, and only one candidate row for each position in full.
"""

import torch


# Bounds the int64 copy of a slice of the embedding matrix to 64 MiB.
ELEMENTS_AT_ONCE = 2**23


def recover_token_ids(inputs_embeds: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Token ids whose rows of the embedding matrix are, bit for bit, the given embeddings.

    Args:
        inputs_embeds: (batch, seq, hidden), as the embedding gave them.
        weight: (vocabulary, hidden).

    Returns:
        (batch, seq) int64.

    Raises:
        ValueError: a position matches no row, or two rows that are equal; names it and what to pass instead.
    """
    batch, seq, hidden = inputs_embeds.shape
    queries = inputs_embeds.detach().reshape(-1, hidden).to(weight.dtype)
    keys, order = torch.sort(_row_keys(weight.detach()), stable=True)
    query_keys = _row_keys(queries)
    places = torch.searchsorted(keys, query_keys).clamp_max(len(keys) - 1)
    token_ids = order[places]
    # A sum of bits can collide, equal rows cannot differ: the candidate is compared in full.
    matches = (weight.detach()[token_ids] == queries).all(-1) & (inputs_embeds.reshape(-1, hidden) == queries).all(-1)
    repeated = (keys[(places + 1).clamp_max(len(keys) - 1)] == query_keys) & (places + 1 < len(keys))
    for problem, what in ((~matches, "matches no row"), (repeated, "matches more than one row")):
        if problem.any():
            row, column = divmod(int(problem.nonzero()[0]), seq)
            raise ValueError(
                f"The memory needs token ids, and the embedding at batch {row}, position {column} {what} of the "
                "embedding matrix. Pass the token ids beside the embeddings as engram_input_ids, of shape "
                f"({batch}, {seq}), with -1 for positions that are no tokens. Prompt tuning of PEFT puts embeddings "
                "of no token in front, and is not supported beside a memory: train LoRA instead."
            )
    return token_ids.view(batch, seq)


def _row_keys(rows: torch.Tensor) -> torch.Tensor:
    """A 64-bit key of the bits of each row, (n,) int64; overflow wraps, the same on every device."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    # Odd 64-bit factors, one per channel, from a multiplicative congruence.
    odd = (torch.arange(1, rows.shape[1] + 1, device=rows.device) * 0x1E3779B97F4A7C15).mul(2).add(1)
    step = max(1, ELEMENTS_AT_ONCE // rows.shape[1])
    # Adding zero makes -0.0 and 0.0 one value, as `==` has it.
    return torch.cat([((part + 0.0).view(integer).long() * odd).sum(-1) for part in rows.split(step)])

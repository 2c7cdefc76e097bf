"""Which tokens the memory sees: the earlier ones that each token may see, and those that embeddings stand for.

An n-gram and a tap of the convolution both look at the tokens before the current one. The *reach* of a token says how
many of those it may see: padding, packed documents, masks and what a cache keeps of the past decide. Where a caller
gives only embeddings, ids are found by exact match. This file knows nothing of hashing or tables.
"""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing


# A compressed id below zero carries no memory: padding, image spans, everything before the start.
NO_MEMORY = -1
# In a cache, the bits from this one on hold the run of real tokens; those below hold the id.
RUN_SHIFT = 32
# A number below this one, added to a score, leaves a weight of 0.
HIDING_SCORE = -1e3
# Bounds the int64 copy of a slice of the embedding matrix to 64 MiB.
ELEMENTS_AT_ONCE = 2**23

BESIDE_PADDING = (
    "Packed documents (position_ids that do not count up by one) need attention_mask=None: transformers does not keep "
    "documents apart beside a mask with padding, and a compiled forward cannot see whether a mask hides anything. Give "
    "padding at the end of a row position 0 and leave the mask out."
)
BESIDE_A_CACHE = (
    "Packed documents (position_ids that do not count up by one, or do not continue where the cache ends) cannot share "
    "a cache: transformers' attention would mix them. Leave the cache out."
)
NOT_THE_ONE_BEFORE = (
    "attention_mask lets a token see earlier tokens but not the one directly before it, as masks of a shared prefix "
    "with several answers do. {why}. Give every answer a row of its own, with the prefix in front."
)
IN_A_GRAPH = NOT_THE_ONE_BEFORE.format(why="A traced or compiled forward reads neighbours only")
BEYOND_THE_CACHE = NOT_THE_ONE_BEFORE.format(
    why="Here it looks past padding, or past tokens of the cache, of which the memory keeps only the last"
)


class Seen(NamedTuple):
    """Which tokens before it each token may look at.

    reach: (batch, seq) int64, how many of them.
    before: (batch, seq, furthest) int64, where the first of them is, the second and so on, counted from the first token
        of this forward; negative in the cache. None where they are always those directly before it.
    """

    reach: torch.Tensor
    before: torch.Tensor | None = None


def token_reach(ids: torch.Tensor, positions: torch.Tensor, run_before: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens directly before it each token may see: the one rule behind padding, packing and chunks.

    A token sees its predecessor `j` if its own position is at least `j` (documents in one row stay apart) and if every
    id from `t - j` to `t` is a real one (a token never looks past padding or past a token without memory).

    Args:
        ids: (batch, history + seq) compressed ids, negative for "no memory".
        positions: (batch or 1, seq) position of each token in its own document, from 0 on.
        run_before: (batch,) how many real tokens in a row end right before `ids`; none by default.

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


def reach_along(
    ids: torch.Tensor, seen: torch.Tensor, before: torch.Tensor, run_before: torch.Tensor | None = None
) -> torch.Tensor:
    """As `token_reach`, where a mask says which tokens each token sees before itself.

    Args:
        ids: (batch, seq) compressed ids, negative for "no memory".
        seen, before: as `Seen` has them.
        run_before: as for `token_reach`.
    """
    run = (ids.new_zeros(ids.shape[0]) if run_before is None else run_before).view(-1, 1, 1)
    nth = torch.arange(before.shape[-1], device=ids.device)
    in_row = ids.unsqueeze(1).expand(-1, ids.shape[1], -1).gather(-1, before.clamp_min(0)) >= 0
    is_real = torch.where(before >= 0, in_row, -before <= run) & (nth < seen.unsqueeze(-1))
    return is_real.long().cumprod(-1).sum(-1).masked_fill(ids < 0, NO_MEMORY)


def end_ngrams(ngrams: torch.Tensor, end_id: int | torch.Tensor) -> torch.Tensor:
    """N-grams that begin anew after every token that ends a document. That token itself still sees its own document.

    The convolution looks past such a token all the same, as it does in the models of this kind.

    Args:
        ngrams: (batch, N, seq), the oldest id first, with `end_id` where a token may not look.
        end_id: the token that ends a document.

    Returns:
        (batch, N, seq), with `end_id` for all that lies before such a token.
    """
    earlier = ngrams[:, :-1]
    has_ended = (earlier == end_id).flip(1).cumsum(1).flip(1) > 0
    return torch.cat([torch.where(has_ended, end_id, earlier), ngrams[:, -1:]], dim=1)


def pack_history(ids: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """What a cache keeps of each token: its id, and how many real tokens in a row end with it.

    A cache that is new, padded or reset holds zeros, and zeros mean "nothing before the start".

    Args:
        ids: (batch, seq) compressed ids below 2**32 - 1.
        reach: (batch, seq), from `token_reach`.

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


def document_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """(batch or 1, seq), none negative: the same positions, but a piece that does not continue by one starts at 0."""
    begins = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0))
    places = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    start = (places * begins).cummax(-1)[0]
    return torch.where(begins.long().cumsum(-1) > 0, places - start, position_ids.clamp_min(0))


def find_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_seen: int | torch.Tensor | None = None
) -> tuple[torch.Tensor | None, bool]:
    """Whether a row holds several documents, and the mask to go on with.

    transformers keeps documents apart only where there is no mask, so a mask that hides nothing is dropped. A traced
    forward cannot look: there a row without mask and cache may hold several documents, and elsewhere an assertion in
    the graph refuses them.

    Args:
        position_ids: (batch or 1, seq).
        attention_mask: (batch, seen), 0 for padding. A mask of another shape is returned as it is.
        past_seen: tokens in the caller's cache; None for no cache.

    Raises:
        ValueError: several documents beside real padding, which transformers' masks cannot express, or with a cache. A
            traced forward raises RuntimeError with the same text.
    """
    has_cache = past_seen is not None
    if attention_mask is not None and attention_mask.ndim != 2:
        return attention_mask, False
    if is_tracing(position_ids):
        if attention_mask is not None:
            torch._assert_async(~_restarts_beside_padding(position_ids, attention_mask).any(), BESIDE_PADDING)
        elif has_cache:
            torch._assert_async(~_does_not_continue(position_ids, past_seen).any(), BESIDE_A_CACHE)
        return attention_mask, attention_mask is None and not has_cache and position_ids.shape[1] > 1
    if attention_mask is None or bool((attention_mask > 0).all()):
        if has_cache and _does_not_continue(position_ids, past_seen).any():
            raise ValueError(BESIDE_A_CACHE)
        return None, not has_cache and find_packed_sequence_indices(position_ids) is not None
    if _restarts_beside_padding(position_ids, attention_mask).any():
        raise ValueError(BESIDE_PADDING)
    return attention_mask, False


def _does_not_continue(position_ids: torch.Tensor, past_seen) -> torch.Tensor:
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    return position_ids != places + past_seen


def _restarts_beside_padding(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, seq) bool: where a document begins behind another one. Positions may or may not count padding."""
    is_token = attention_mask > 0
    rank = is_token.long().cumsum(-1)[:, -position_ids.shape[1] :]
    here = is_token[:, -position_ids.shape[1] :]
    follows = torch.nn.functional.pad(here[:, 1:] & here[:, :-1], (1, 0))
    jumps = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0)) & follows
    return here & (rank > 1) & (jumps | (position_ids == 0))


def tokens_under_mask(
    mask: torch.Tensor | BlockMask | None, seq: int, past_seen: int | torch.Tensor | None, furthest: int
) -> tuple[torch.Tensor | None, Seen | None]:
    """What a mask of any kind says of the tokens of a forward.

    Args:
        mask: (batch, at least seen), 0 for padding; or as in `reach_under_mask`; None hides nothing.
        seq, past_seen, furthest: as in `reach_under_mask`; None for a cache that does not count its tokens.

    Returns:
        (batch, seq), 0 for padding, and which tokens before it each sees; None for all.

    Raises:
        ValueError: as `reach_under_mask`.
    """
    if mask is None:
        return None, None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        # Beside a static cache a mask may be as wide as the cache.
        if isinstance(past_seen, torch.Tensor):
            columns = torch.arange(seq, device=mask.device) + past_seen.to(mask.device)
            return mask.gather(1, columns.expand(len(mask), -1)), None
        if past_seen is not None and mask.shape[1] > past_seen + seq:
            return mask[:, past_seen : past_seen + seq], None
        return mask[:, -seq:], None
    return reach_under_mask(mask, seq, 0 if past_seen is None else past_seen, furthest)


def reach_under_mask(
    mask: torch.Tensor | BlockMask, seq: int, past_seen: int | torch.Tensor, furthest: int
) -> tuple[torch.Tensor, Seen]:
    """What a mask with a row for each token says: which positions hold tokens, and how far back each may look.

    A position that does not see itself is padding.

    Args:
        mask: (batch, heads or 1, seq, seen), bool with True for "sees", or floats that are added to scores; or the
            `BlockMask` of flex attention.
        seq: number of tokens.
        past_seen: tokens in the cache before these.
        furthest: how far back anything looks.

    Returns:
        (batch, seq) bool, and what each token sees, at most `furthest` tokens.

    Raises:
        ValueError: a token sees earlier tokens, but not the one directly before them, and looks past padding or past
            tokens of the cache. A traced forward raises RuntimeError wherever a token looks past another one.
    """
    sees = _seen_columns(mask, seq)  # (batch, seq, seen)
    lags = torch.arange(furthest + 1, device=sees.device)
    columns = (torch.arange(seq, device=sees.device) + past_seen).unsqueeze(1) - lags  # (seq, 1 + furthest)
    near = sees.gather(-1, columns.clamp_min(0).expand(len(sees), -1, -1)) & (columns >= 0)
    run = near[..., 1:].long().cumprod(-1).sum(-1)  # (batch, seq)
    # The first token that it does not see, if that is one of these and no padding, hides everything before it.
    hidden = columns[:, 0] - 1 - run - past_seen
    is_token = near[..., 0]
    hides_a_token = is_token.gather(-1, hidden.clamp_min(0)) & (hidden >= 0) & (run < furthest)
    first_seen = torch.where(sees.any(-1), sees.to(torch.uint8).argmax(-1), sees.shape[-1])
    looks_past_one = is_token & hides_a_token & (first_seen < hidden + past_seen)
    if is_tracing(sees):
        torch._assert_async(~looks_past_one.any(), IN_A_GRAPH)
    elif looks_past_one.any():
        return is_token, _tokens_before(sees, is_token, int(past_seen), furthest)
    return is_token, Seen(run)


def _tokens_before(sees: torch.Tensor, is_token: torch.Tensor, past_seen: int, furthest: int) -> Seen:
    """The last tokens that each token sees before itself, wherever they are.

    Raises:
        ValueError: between two of them is padding, or they are apart in the cache.
    """
    places = torch.arange(sees.shape[-1], device=sees.device)
    own = torch.arange(is_token.shape[1], device=sees.device).unsqueeze(1) + past_seen
    earlier = torch.where(sees & (places < own), places, -1)
    before = earlier.topk(min(furthest, len(places)), -1).values  # (batch, seq, at most furthest)
    before = torch.nn.functional.pad(before, (0, furthest - before.shape[-1]), value=-1)
    after = torch.cat([own.expand(len(sees), -1, -1), before[..., :-1]], -1)
    skips = (before >= 0) & (after - before > 1) & is_token.unsqueeze(-1)
    padding = torch.nn.functional.pad((~is_token).long(), (past_seen, 0)).cumsum(-1)  # (batch, seen)
    padding = padding.unsqueeze(1).expand(-1, sees.shape[1], -1)
    skipped_padding = padding.gather(-1, (after - 1).clamp_min(0)) - padding.gather(-1, before.clamp_min(0))
    if (skips & ((skipped_padding > 0) | (before < past_seen - 1))).any():
        raise ValueError(BEYOND_THE_CACHE)
    return Seen((before >= 0).sum(-1), before - past_seen)


def _seen_columns(mask: torch.Tensor | BlockMask, seq: int) -> torch.Tensor:
    """(batch, seq, seen) bool, of the first head."""
    if not isinstance(mask, BlockMask):
        sees = mask if mask.dtype == torch.bool else mask > HIDING_SCORE
        if sees.shape[1] > 1 and not is_tracing(sees) and (sees != sees[:, :1]).any():
            raise ValueError("The heads of attention_mask differ, and the memory reads one. Give a mask with one head.")
        return sees[:, 0]
    batch, _, _, seen = mask.shape
    rows = torch.arange(batch, device=mask.kv_num_blocks.device).view(-1, 1, 1)
    queries = torch.arange(seq, device=rows.device).view(1, -1, 1)
    keys = torch.arange(seen, device=rows.device).view(1, 1, -1)
    return mask.mask_mod(rows, torch.zeros_like(rows), queries, keys).expand(batch, seq, seen)


def check_token_ids(token_ids: object) -> None:
    """
    Raises:
        ValueError: they are no integer tensor of shape (batch, seq).
    """
    if isinstance(token_ids, torch.Tensor) and token_ids.dim() == 2 and not token_ids.is_floating_point():
        return
    got = f"a {type(token_ids).__name__}"
    if isinstance(token_ids, torch.Tensor):
        got = f"{token_ids.dtype} of shape {tuple(token_ids.shape)}"
    raise ValueError(
        f"Token ids are an integer tensor of shape (batch, seq), got {got}. Of one text they are torch.tensor([ids]), "
        'or tokenizer(text, return_tensors="pt")["input_ids"].'
    )


def recover_token_ids(inputs_embeds: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Token ids whose rows of the embedding matrix are, bit for bit, the given embeddings.

    Memory is bounded: rows are compared by a 64-bit key first, and only one candidate row for each position in full.

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

"""Asks for the rows of served tables before a forward reads them: by token ids, or as Qwen's own module hashes them.

Advisory: it changes when rows arrive, never which rows.
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache

from .served_embedding import TableOfParts
from .table_parts import NGRAM_TABLE


# Conv state of Qwen's cache in which a layer keeps the last token ids.
STATE_OF_IDS = 2


def prefetch_of_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a forward: ask for the pages of the rows that it will read. Advisory; it never changes a forward."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    embeddings = {name: module.get_submodule(name) for name in cast(Any, module).tables_to_prefetch}
    if all(cast(Any, each).table.is_resident for each in embeddings.values()):
        return
    given = (kwargs.get("ple_input_ids"), kwargs.get("input_ids"), *args[:1])
    ids = next((each for each in given if isinstance(each, torch.Tensor) and not each.is_floating_point()), None)
    if ids is None or ids.ndim != 2:
        return
    cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)
    mask = kwargs.get("attention_mask")
    # The first table is looked up at once. To ask for the rows of one token before that costs a hash and hides nothing.
    is_decoding = cache is not None and ids.shape[1] == 1
    for name, embedding in list(embeddings.items())[int(is_decoding) :]:
        owner = module.get_submodule(name.rpartition(".")[0]) if f".{name}".endswith(f".{NGRAM_TABLE}") else None
        bring_rows(cast(Any, embedding).table, owner, ids, mask, cache)


@torch.no_grad()
def bring_rows(table: TableOfParts, owner: Any, ids: torch.Tensor, mask: Any, cache: Cache | None) -> None:
    """Ask for the pages of the rows of some token ids.

    Args:
        table: of the rows.
        owner: the module that hashes token ids; None where a token id is the row id.
        ids: (batch, seq).
        mask: (batch, keys) with 0 for padding; other masks are passed over.
        cache: that holds the tokens before `ids`.
    """
    if table.is_resident:
        return
    if owner is not None:
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            ids = torch.where(mask[:, -ids.shape[1] :].to(ids.device).bool(), ids, owner.eos_token_id)
        before = None
        if cache is not None and cache.has_previous_state(owner.layer_idx):
            before = cache.get_conv_state(owner.layer_idx, state_idx=STATE_OF_IDS)
        ids = ngram_row_ids(owner, ids, before)
    table.bring_pages(ids)


def ngram_row_ids(owner: Any, ids: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Row ids of n-grams, (batch, seq, heads), as the model's own module computes them.

    The module runs with a stand-in for its table that keeps the ids it is asked for.

    Args:
        owner: Qwen's module around the table.
        ids: (batch, seq).
        before: (batch, tokens) the token ids before them; None at the start of a text.
    """
    asked = _AskedIds()
    twin = copy.copy(owner)
    twin.__dict__["_modules"] = {**owner._modules, "ngram_embedding": asked}
    ids = ids.to(owner.layer_multipliers.device)
    history = ids if before is None else torch.cat([before.to(ids), ids], dim=-1)
    # Hooks of accelerate put a `forward` on the instance, which runs the owner itself.
    type(owner).forward(twin, history, None)
    return asked.ids[:, -ids.shape[1] :]


class _AskedIds(nn.Module):
    """Keeps the ids of a lookup."""

    def __init__(self):
        super().__init__()
        self.weight = torch.empty(0, device="meta")
        self.ids = torch.empty(0, dtype=torch.long)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        return torch.zeros(*ids.shape, 1, device=ids.device)

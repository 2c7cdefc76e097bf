"""Silencing a memory, or a part of it, for a while: what would the model say without it?

Everything is done by forward hooks on the modules of one model, and undone when the context ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .memory_layers import find_memory_layers


@contextmanager
def silenced(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    positions: Sequence[int] | torch.Tensor | None = None,
    heads: Sequence[int] | None = None,
    orders: Sequence[int] | None = None,
    rows: Mapping[int, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Inside this context the memory of a model, or the part that is named, says nothing.

    Without `heads`, `orders` and `rows`, a silenced memory layer adds zeros to the residual stream. Its gates and its
    convolution are still computed, so a later token whose memory is not silenced reads what it always reads. With one
    of the three, the rows that are named are read as zeros, before the gate and the value are made of them.

    Args:
        model: with a memory: an EngramMoE, or a model after `add_engram`, inside of PEFT's or not.
        layers: ids of memory layers; all of them by default.
        positions: which tokens of a forward: their places in its input, counted from 0, or a bool tensor (batch or 1,
            seq) with True for "silenced"; all of them by default.
        heads: hash heads of a layer, counted over all orders: those of order 2 come first.
        orders: sizes of n-grams, such as 3 for all heads that read 3-grams.
        rows: layer id to the row ids of its table, counted through all heads as in `RowCounts`.

    Raises:
        ValueError: the model has no memory, or is compiled; it has no such layer, head, order or row; more than one of
            `heads`, `orders` and `rows` is given. A forward raises it where `positions` do not fit the input.

    Example:
        >>> ids = tokenizer("def __init__(self", return_tensors="pt").input_ids
        >>> with silenced(model, layers=[1], orders=[3]):
        ...     logits = model(ids).logits  # (1, seq, vocabulary)
    """
    known = find_memory_layers(model, "silenced")
    refuse_compiled(model)
    if sum(part is not None for part in (heads, orders, rows)) > 1:
        raise ValueError("Silence heads, orders or rows, one of them at a time; contexts may stand inside each other.")
    chosen = list(known if layers is None else layers)
    if rows is not None:
        chosen = [layer_id for layer_id in rows if layers is None or layer_id in chosen]
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"Layer {unknown[0]} has no memory; memory layers (zero-based) are {sorted(known)}.")
    hooks = []
    try:
        for layer_id in chosen:
            layer = known[layer_id]
            if heads is None and orders is None and rows is None:
                hooks.append(layer.register_forward_hook(_layer_hook(positions)))
                continue
            silent_rows = None if rows is None else _checked_rows(layer, rows[layer_id])
            silent_heads = None if rows is not None else heads_of(layer, heads, orders)
            hooks.append(layer.table.register_forward_hook(_table_hook(layer, positions, silent_heads, silent_rows)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_compiled(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model is compiled. Compiled forwards do not see hooks that come or go.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()) or hasattr(model, "_orig_mod"):
        raise ValueError(
            "This model is compiled, so nothing can look into its forward or silence a part of it. Load it again, and "
            "do not compile it."
        )


def heads_of(layer: Any, heads: Sequence[int] | None = None, orders: Sequence[int] | None = None) -> list[int]:
    """The hash heads of a memory layer that are named by number or by the size of their n-grams; all by default.

    Raises:
        ValueError: the layer has no such head or order.
    """
    count = len(layer.table.head_rows)
    per_order = count // (layer.max_ngram_size - 1)
    if orders is not None:
        if unknown := [order for order in orders if not 2 <= order <= layer.max_ngram_size]:
            raise ValueError(
                f"No head reads n-grams of {unknown[0]} tokens; orders go from 2 to {layer.max_ngram_size}."
            )
        return [head for head in range(count) if head // per_order + 2 in orders]
    if unknown := [head for head in heads or () if not 0 <= head < count]:
        raise ValueError(f"Layer {layer.layer_idx} has no head {unknown[0]}; its heads go from 0 to {count - 1}.")
    return list(range(count) if heads is None else heads)


def _checked_rows(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Distinct row ids, sorted, on the CPU."""
    rows = torch.as_tensor(rows, dtype=torch.int64).cpu().unique()
    if len(rows) and not 0 <= rows[0] <= rows[-1] < layer.table.num_rows:
        wrong = int(rows[0] if rows[0] < 0 else rows[-1])
        raise ValueError(
            f"Layer {layer.layer_idx} has no row {wrong}; its rows go from 0 to {layer.table.num_rows - 1}."
        )
    return rows


def _mask(positions: Sequence[int] | torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """(batch, seq) bool, True for "silenced".

    Args:
        shape: (batch, seq) of the forward.
    """
    if positions is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(positions, torch.Tensor) and positions.dtype == torch.bool:
        if positions.ndim != 2 or positions.shape[1] != shape[1] or positions.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"positions is a mask of shape {tuple(positions.shape)}, and the input has the shape {tuple(shape)}. "
                "Give one True or False per token, (batch or 1, seq)."
            )
        return positions.to(device).expand(shape)
    places = torch.as_tensor(positions, dtype=torch.int64, device=device)
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < shape[1]:
        raise ValueError(f"positions must lie in [0, {shape[1]}) for this input, got {places.tolist()}.")
    return torch.zeros(shape, dtype=torch.bool, device=device).index_fill(1, places, True)


def _layer_hook(positions: Sequence[int] | torch.Tensor | None):
    def silence(layer: nn.Module, args: tuple, output: tuple) -> tuple:
        added, gates = output
        mask = _mask(positions, added.shape[:2], added.device)
        return added.masked_fill(mask[..., None, None], 0.0), gates

    return silence


def _table_hook(layer: Any, positions, heads: list[int] | None, rows: torch.Tensor | None):
    """
    Args:
        heads: that are silent; None where rows are.
        rows: sorted row ids of the table that are silent.
    """
    first_rows = layer.table.first_rows_of_heads
    count = len(first_rows)

    def silence(table: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        row_ids = args[0]  # (batch, seq, heads)
        mask = _mask(positions, row_ids.shape[:2], output.device).unsqueeze(-1)
        if rows is None:
            is_silent = torch.zeros(count, dtype=torch.bool, device=output.device)
            is_silent[heads] = True
        else:
            is_silent = torch.isin(row_ids + first_rows.to(row_ids.device), rows.to(row_ids.device))
        mask = mask & is_silent.to(output.device)
        return output.unflatten(-1, (count, -1)).masked_fill(mask.unsqueeze(-1), 0.0).flatten(-2)

    return silence

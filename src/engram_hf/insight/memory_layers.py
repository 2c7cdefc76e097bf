"""Which memory a model has. Classes of remote code are not this package's, so a model is recognised by its methods."""

from typing import Any

import torch
from torch import nn


def memory_of(model: nn.Module) -> tuple[Any, list[Any]]:
    """The hash and the memory layers of a model, inside of PEFT's; None and no layers where it has none."""
    whole: Any = model
    whole = whole.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.engram_memory() if hasattr(whole, "engram_memory") else (None, [])


def find_memory_layers(model: nn.Module, who: str) -> dict[int, Any]:
    """Layer id to memory layer: a module with a table.

    Raises:
        ValueError: the model has none.
    """
    found = {layer.layer_idx: layer for layer in memory_of(model)[1]}
    if not found:
        raise ValueError(
            f"{who} found no memory layer in {type(model).__name__}. It needs a model with a memory: an EngramMoE "
            "whose config lists engram_layer_ids, or a model after add_engram, with its memory enabled."
        )
    return dict(sorted(found.items()))


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter that has one. Offloaded parameters have none."""
    return next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")

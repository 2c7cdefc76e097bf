"""What the forwards of EngramMoE return: transformers' outputs of a mixture of experts, and the gates of the memory;
and the name that the cache has there."""

from dataclasses import dataclass

import torch
from transformers import __version__
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


# What transformers calls the cache in forwards, outputs and `generate`; ours accept both.
CACHE_NAME = "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"


def find_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, under whichever of its names it was given.

    Raises:
        ValueError: it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "Both `cache` and `past_key_values` were given, which are names of one argument. Give one of them to a "
            f"forward; to generate() of transformers {__version__} give `{CACHE_NAME}`."
        )
    return past_key_values if cache is None else cache


@dataclass
class EngramMoEModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    [`MoeModelOutputWithPast`] with the gates of the memory.

    Args:
        engram_gates (`tuple(torch.FloatTensor)`, *optional*, returned when `output_engram_gates=True`):
            One tensor of shape `(batch_size, sequence_length, hc_mult)` per memory layer: how much of what was read
            enters each residual stream, in [0, 1].
    """

    engram_gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class EngramMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    [`MoeCausalLMOutputWithPast`] with the gates of the memory.

    Args:
        engram_gates (`tuple(torch.FloatTensor)`, *optional*, returned when `output_engram_gates=True`):
            One tensor of shape `(batch_size, sequence_length, hc_mult)` per memory layer: how much of what was read
            enters each residual stream, in [0, 1].
    """

    engram_gates: tuple[torch.FloatTensor, ...] | None = None

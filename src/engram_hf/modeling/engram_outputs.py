"""What the forwards of EngramMoE return: transformers' outputs of a mixture of experts, and the gates of the memory."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


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

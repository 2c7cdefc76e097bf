"""The memory layer: rows of the token's n-grams -> a gate per residual stream -> a short convolution -> what is added.

Knows nothing of attention, experts or where rows live. Source: arXiv 2601.07372, sections 2.3 and 2.4.
Every fast form here has its slow twin in tests/naive.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .ids_hashing import find_primes
from .ids_reach import pack_history
from .table import EngramTable
from .table_formats import QUANTIZED_FORMATS


# States of a hybrid cache layer.
IDS_STATE = 0
CONV_STATE = 1


class NgramContext(NamedTuple):
    """What a memory layer needs to know of the tokens: the same for all memory layers of a forward.

    ids: (batch, seq) compressed ids; negative carries no memory.
    reach: (batch, seq) tokens directly before it that each token may see; -1 for a token without memory.
    ngrams: (batch, N, seq) ids of the longest n-gram that ends at each token, the oldest first.
    """

    ids: torch.Tensor
    reach: torch.Tensor
    ngrams: torch.Tensor


class EngramRMSNorm(nn.Module):
    """RMS norm over the hidden size with a gain per residual stream: (..., streams, hidden) to the same."""

    def __init__(self, streams: int, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(streams, hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_streams: torch.Tensor) -> torch.Tensor:
        hidden = hidden_streams.float()
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * hidden.to(hidden_streams.dtype)).to(hidden_streams.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ShortConvolution(nn.Conv1d):
    """Depthwise, causal and dilated, tap by tap, since each token has its own reach."""

    def forward(self, channels: torch.Tensor, history: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """
        Args:
            channels: (batch, seq, channels), the tokens themselves.
            history: (batch, at least reach of the convolution + seq, channels), ends with them.
            reach: (batch, seq) tokens before it that each may see.
        """
        weight = self.weight.squeeze(1)  # (channels, kernel size), the current token last
        seq, end = channels.shape[1], history.shape[1]
        mixed = channels * weight[:, -1]
        for tap in range(1, self.kernel_size[0]):
            shift = tap * self.dilation[0]
            shifted = history[:, end - seq - shift : end - shift].masked_fill((reach < shift).unsqueeze(-1), 0.0)
            mixed = mixed + shifted * weight[:, -1 - tap]
        return mixed


class EngramLayer(nn.Module):
    """The memory of one decoder layer."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.streams = config.hc_mult
        self.hidden_size = config.hidden_size
        self.max_ngram_size = config.engram_max_ngram_size
        self.kernel_size = config.engram_kernel_size
        self.conv_reach = config.engram_conv_reach

        is_quantized = config.engram_table_dtype in QUANTIZED_FORMATS
        primes = find_primes(config.engram_layer_ids, config.engram_vocab_sizes, config.engram_n_heads)[layer_idx]
        self.table = EngramTable(
            [rows for order in primes for rows in order],
            config.engram_head_dim,
            config.engram_block_elements,
            dtype=getattr(torch, config.engram_table_dtype or "", None),
            row_format=config.engram_table_dtype if is_quantized else None,
        )
        self.value_proj = nn.Linear(config.engram_width, self.hidden_size, bias=False)
        self.key_proj = nn.Linear(config.engram_width, self.streams * self.hidden_size, bias=False)
        self.key_norm = EngramRMSNorm(self.streams, self.hidden_size, config.rms_norm_eps)
        self.query_norm = EngramRMSNorm(self.streams, self.hidden_size, config.rms_norm_eps)
        self.conv_norm = self.conv = None
        if self.kernel_size:
            channels = self.streams * self.hidden_size
            self.conv_norm = EngramRMSNorm(self.streams, self.hidden_size, config.rms_norm_eps)
            self.conv = ShortConvolution(
                channels, channels, self.kernel_size, groups=channels, dilation=self.max_ngram_size, bias=False
            )

    def forward(
        self,
        hidden_streams: torch.Tensor,
        row_ids: torch.Tensor,
        context: NgramContext,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_streams: (batch, seq, streams, hidden).
            row_ids: (batch, seq, heads).
            context: ids and reach of the tokens.
            cache: a cache whose layer `layer_idx` is hybrid.

        Returns:
            what is added to the residual streams, (batch, seq, streams, hidden), and the gates, (batch, seq, streams)
            in float32, 0 for a token without memory.
        """
        weight = self.value_proj.weight
        # Quantized by bitsandbytes, the weight is of integers.
        dtype = weight.dtype if weight.is_floating_point() else hidden_streams.dtype
        rows = self.table(row_ids).to(dtype)  # (batch, seq, heads * head_dim)
        value = self.value_proj(rows)  # (batch, seq, hidden)
        key = self.key_proj(rows).unflatten(-1, (self.streams, self.hidden_size))
        score = (self.key_norm(key).float() * self.query_norm(hidden_streams).float()).sum(-1) * self.hidden_size**-0.5
        score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
        gates = torch.sigmoid(score) * (context.ids >= 0).unsqueeze(-1)  # (batch, seq, streams)
        gated = gates.unsqueeze(-1).to(value.dtype) * value.unsqueeze(-2)  # (batch, seq, streams, hidden)

        if cache is not None:
            cache.update_conv_state(
                pack_history(context.ids, context.reach),
                self.layer_idx,
                state_idx=IDS_STATE,
                conv_kernel_size=self.max_ngram_size - 1,
            )
        if self.conv is None:
            return gated, gates
        return gated + F.silu(self.short_convolution(self.conv_norm(gated), context.reach, cache)), gates

    def short_convolution(self, normed: torch.Tensor, reach: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Depthwise, causal, dilated; tap by tap, since each token has its own reach: (batch, seq, streams, hidden)."""
        channels = normed.flatten(-2)  # (batch, seq, streams * hidden)
        if cache is not None and self.conv_reach:
            states = cache.update_conv_state(
                channels.transpose(1, 2), self.layer_idx, state_idx=CONV_STATE, conv_kernel_size=self.conv_reach
            )
            history = states.transpose(1, 2)
        else:
            history = channels
        return self.conv(channels, F.pad(history, (0, 0, self.conv_reach, 0)), reach).unflatten(-1, normed.shape[2:])

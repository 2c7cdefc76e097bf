"""Rows to a change of the residual stream: the gate, the short convolution, and their state in the cache.

The table gives rows; this file never asks where they live. Every fast form has its slow twin in tests/naive.py. Source:
arXiv 2601.07372, section 2.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache, StaticLayer

from .ids_hashing import HashedTokens, NgramHash, family_of, find_primes, rows_behind_heads
from .ids_reach import Seen, pack_history
from .table import EngramTable, prefetch_rows
from .table_formats import row_format


# Tokens that `crop` can always take back (candidates of assisted decoding that were refused, for one).
CROPPABLE_TOKENS = 64
IDS = "ids"


class StateWindow:
    """The last tokens of one state, (batch, time, ...). Zeros stand for "before the start".

    A dynamic window is written in place until it is full. A static one is shifted, so that its address never changes
    and a compiled forward can use it.
    """

    def __init__(self, first: torch.Tensor, kept_tokens: int, is_static: bool):
        """
        Args:
            first: (batch, time, ...) any tokens of this state, for their shape, type and device.
            kept_tokens: how many tokens the next forward needs.
            is_static: whether the cache is one that compiled forwards use.
        """
        self.kept_tokens, self.is_static = kept_tokens, is_static
        self.records_all = False
        length = kept_tokens + CROPPABLE_TOKENS * (1 if is_static else 2)
        self.buffer = first.new_zeros(first.shape[0], length, *first.shape[2:])
        self.end = length if is_static else kept_tokens
        self._cropped_tokens = 0
        # A tensor where forwards are compiled: another number in an attribute would make torch compile again.
        self.seen_tokens = torch.zeros((), dtype=torch.int64, device=first.device) if is_static else 0
        if is_static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.buffer)
            torch._dynamo.mark_static_address(self.seen_tokens)

    def past(self) -> torch.Tensor:
        """(batch, kept tokens, ...)."""
        return self.buffer[:, self.end - self.kept_tokens : self.end]

    @torch.no_grad()
    def append(self, new: torch.Tensor) -> None:
        """Add tokens, (batch, time, ...)."""
        self._own()
        length, seq = self.buffer.shape[1], new.shape[1]
        self.seen_tokens += seq
        if self.is_static:
            self.buffer.copy_(torch.cat([self.buffer, new], 1)[:, -length:])
            self._cropped_tokens = 0
            return
        if self.end + seq <= length:
            self.buffer[:, self.end : self.end + seq] = new
            self.end += seq
            return
        kept = torch.cat([self.buffer[:, : self.end], new], 1)
        if not self.records_all:
            kept = kept[:, -(self.kept_tokens + CROPPABLE_TOKENS) :]
        self.end = kept.shape[1]
        self.buffer = _pad_time(kept, 0, self.end)

    def _own(self) -> None:
        """A buffer that was made in inference mode can be written in inference mode alone."""
        if not torch.compiler.is_compiling() and self.buffer.is_inference() and not torch.is_inference_mode_enabled():
            self.buffer = self.buffer.clone()
            self.seen_tokens = self.seen_tokens + 0

    def crop(self, tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: more than can be taken back.
        """
        self._own()
        self.seen_tokens -= tokens
        self._cropped_tokens += tokens
        most = CROPPABLE_TOKENS if self.is_static else self.end - self.kept_tokens
        if (self._cropped_tokens if self.is_static else tokens) > most:
            raise ValueError(
                f"The cache cannot be cropped by {tokens} tokens: the memory can take back at most {most}. Call "
                "cache.activate_past_recording() after the first forward to be able to take back all, or compute the "
                "tokens again from an empty cache."
            )
        if self.is_static:
            self.buffer.copy_(_pad_time(self.buffer, tokens, 0)[:, : self.buffer.shape[1]])
        else:
            self.end -= tokens

    def reset(self) -> None:
        self._own()
        self.buffer.zero_()
        self.seen_tokens -= self.seen_tokens
        self.end = self.end if self.is_static else self.kept_tokens


def _pad_time(states: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Zeros around (batch, time, ...) in time."""
    return F.pad(states, (*(0, 0) * (states.ndim - 2), before, after))


class MemoryCacheLayer:
    """What the memory of a model keeps while decoding: the last ids, and for each memory layer the last inputs of its
    convolution. It stands behind the model's own cache layers, and follows the batch through beams and crops."""

    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, is_static: bool = False, memory_name: str = "", is_sliding: bool = False):
        self.memory_name = memory_name
        # transformers takes the first layer that does not slide for one of full attention.
        self.is_sliding = is_sliding
        self.is_initialized = True
        self.keys = self.values = None
        self.is_static = is_static
        # Whether a crop has failed, after the attention layers were cropped.
        self.is_behind = False
        self.windows: dict[str | int, StateWindow] = {}

    def update(self, key_states=None, value_states=None, *args, **kwargs):
        """Keys and values are kept by other layers."""
        return None, None

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_max_length(self) -> int:
        return -1

    def past(self, name: str | int) -> torch.Tensor | None:
        """(batch, kept tokens, ...) of a state; None before its first tokens."""
        if self.is_behind:
            raise ValueError("This cache was cropped further than the memory can follow. Start from an empty cache.")
        return self.windows[name].past() if name in self.windows else None

    def append(self, name: str | int, new: torch.Tensor, kept_tokens: int) -> None:
        """Add tokens, (batch, time, ...), to a state."""
        if name not in self.windows:
            self.windows[name] = StateWindow(new, kept_tokens, self.is_static)
        self.windows[name].append(new)

    def _replace(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for window in self.windows.values():
            window.buffer = select(window.buffer)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._replace(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace(lambda buffer: buffer[indices.to(buffer.device), ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers: a number below zero removes as many tokens. Releases before 5.24 give the length that is
        to stay, which is above zero."""
        self.is_behind, was_behind = bool(self.windows), self.is_behind
        for window in self.windows.values():
            window.crop(-tokens_to_remove if tokens_to_remove <= 0 else int(window.seen_tokens) - tokens_to_remove)
        self.is_behind = was_behind

    def activate_past_recording(self) -> None:
        for window in self.windows.values():
            window.records_all = not window.is_static

    def reset(self) -> None:
        self.is_behind = False
        for window in self.windows.values():
            window.reset()


def memory_cache_layer(cache: Cache, num_model_layers: int, memory_name: str = "") -> MemoryCacheLayer:
    """The memory's layer of a cache, appended behind the layers of the model where it is missing.

    Args:
        cache: the caller's.
        num_model_layers: cache layers that the model itself needs.
        memory_name: of the memory, where a model has several.

    Raises:
        ValueError: it is no `Cache`, or it holds tokens that the memory has not read.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"The memory keeps its state in a transformers Cache, and got {type(cache).__name__}. Give "
            "DynamicCache(config=model.config), or leave the cache out."
        )
    found = find_state(cache, memory_name)
    _refuse_unread(cache, None if found is None else found.windows.get(IDS))
    if found is not None:
        return found
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_model_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    is_static = isinstance(cache, StaticCache) or any(isinstance(layer, StaticLayer) for layer in cache.layers)
    layers = zip(cache.layers, cache.is_sliding)
    attends_to_all = [isinstance(layer, CacheLayerMixin) and not is_sliding for layer, is_sliding in layers]
    added = MemoryCacheLayer(is_static, memory_name, is_sliding=not any(attends_to_all))
    # Known by what it can do: the base class for such layers is newer than the oldest release that is supported.
    cache.layers.append(cast(Any, added))
    return added


def find_state(cache: Cache, memory_name: str = "") -> MemoryCacheLayer | None:
    """The memory's layer of a cache; None where it has none yet."""
    layers = (layer for layer in reversed(cache.layers) if isinstance(layer, MemoryCacheLayer))
    return next((layer for layer in layers if layer.memory_name == memory_name), None)


def counts_tokens(cache: Cache) -> bool:
    """Whether a cache knows how many tokens it holds; one with layers of linear attention alone does not."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def _refuse_unread(cache: Cache, read: StateWindow | None) -> None:
    """
    Args:
        read: the ids that the memory keeps; None before its first tokens.
    """
    if counts_tokens(cache):
        held = cache.get_seq_length()
        # The count of a static cache is a tensor, which is looked at once, and a compiled forward looks at none.
        if torch.compiler.is_compiling() or (isinstance(held, torch.Tensor) and read is not None):
            return
        is_read, tokens = int(held) == (0 if read is None else int(read.seen_tokens)), f"{int(held)} tokens"
    else:
        is_read = (read is not None and int(read.seen_tokens) > 0) or not cache.has_previous_state()
        tokens = "tokens"
    if not is_read:
        raise ValueError(
            f"The cache holds {tokens} that the memory has not read, so n-grams across its end would be wrong. Start "
            "from an empty cache. Prefix tuning of PEFT begins with such a cache, and is not supported beside a "
            "memory: train LoRA instead."
        )


def keep_ids(state: MemoryCacheLayer, hashed: HashedTokens) -> None:
    """Keep the ids of a forward for the n-grams of the next one."""
    state.append(IDS, pack_history(hashed.ids, hashed.reach), hashed.ngrams.shape[1] - 1)


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
    """Depthwise, causal and dilated. It works tap by tap, since each token has its own reach."""

    # Under another signature than Conv1d's: each token brings its history and its reach.
    def forward(  # type: ignore[override]
        self,
        channels: torch.Tensor,
        history: torch.Tensor,
        reach: torch.Tensor,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            channels: (batch, seq, channels), the tokens themselves.
            history: (batch, at least reach of the convolution + seq, channels), ends with them.
            reach: (batch, seq) tokens before it that each may look at.
            before: of `Seen`: where these are; None for directly before it.
        """
        weight = self.weight.squeeze(1)  # (channels, kernel size), the current token last
        seq, end = channels.shape[1], history.shape[1]
        mixed = channels * weight[:, -1]
        for tap in range(1, self.kernel_size[0]):
            shift = tap * self.dilation[0]
            if before is None:
                shifted = history[:, end - seq - shift : end - shift]
            else:
                places = (before[..., shift - 1 : shift].to(history.device) + end - seq).clamp_min(0)
                shifted = history.gather(1, places.expand(-1, -1, history.shape[-1]))
            mixed = mixed + shifted.masked_fill((reach < shift).unsqueeze(-1), 0.0) * weight[:, -1 - tap]
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

        primes = find_primes(config.engram_layer_ids, config.engram_vocab_sizes, config.engram_n_heads)[layer_idx]
        rows_of_head = [rows for order in primes for rows in order]
        self.table = EngramTable(
            rows_of_head,
            config.engram_head_dim,
            config.engram_block_elements,
            row_format(config.engram_table_dtype),
            rows_behind_heads=rows_behind_heads(family_of(config), rows_of_head),
        )
        self.value_proj = nn.Linear(config.engram_width, self.hidden_size, bias=False)
        self.key_proj = nn.Linear(config.engram_width, self.streams * self.hidden_size, bias=False)
        self.key_norm = EngramRMSNorm(self.streams, self.hidden_size, config.rms_norm_eps)
        self.query_norm = EngramRMSNorm(self.streams, self.hidden_size, config.rms_norm_eps)
        self.conv_norm: EngramRMSNorm | None = None
        self.conv: ShortConvolution | None = None
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
        hashed: HashedTokens,
        state: MemoryCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_streams: (batch, seq, streams, hidden).
            row_ids: (batch, seq, heads).
            hashed: ids and reach of the tokens.
            state: what the cache keeps for the memory.

        Returns:
            what is added to the residual streams, (batch, seq, streams, hidden), and the gates, (batch, seq, streams)
            in float32, 0 for a token without memory.
        """
        rows = self.table(row_ids).to(self._compute_dtype(hidden_streams))  # (batch, seq, heads * head_dim)
        value = self.value_proj(rows)  # (batch, seq, hidden)
        key = self.key_proj(rows).unflatten(-1, (self.streams, self.hidden_size))
        score = (self.key_norm(key).float() * self.query_norm(hidden_streams).float()).sum(-1) * self.hidden_size**-0.5
        score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
        gates = torch.sigmoid(score) * (hashed.ids >= 0).unsqueeze(-1)  # (batch, seq, streams)
        gated = gates.unsqueeze(-1).to(value.dtype) * value.unsqueeze(-2)  # (batch, seq, streams, hidden)
        if self.conv is None or self.conv_norm is None:
            return gated, gates
        normed = self.conv_norm(gated)
        return gated + F.silu(self.short_convolution(self.conv, normed, hashed, state)), gates

    def to_device(self, row_ids: torch.Tensor) -> torch.Tensor:
        """The row ids on the device of this layer; the same tensor where they are there."""
        device = self.key_norm.weight.device
        return row_ids if device.type == "meta" else row_ids.to(device)

    def _compute_dtype(self, hidden_streams: torch.Tensor) -> torch.dtype:
        """The type of the projections; where their weights are quantized, the type of what comes in."""
        weight = getattr(self.value_proj, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
            return weight.dtype
        return hidden_streams.dtype

    def short_convolution(
        self, conv: ShortConvolution, normed: torch.Tensor, hashed: HashedTokens, state: MemoryCacheLayer | None
    ) -> torch.Tensor:
        """Depthwise, causal and dilated: (batch, seq, streams, hidden) to the same."""
        channels = normed.flatten(-2)  # (batch, seq, streams * hidden)
        past = None if state is None else state.past(self.layer_idx)
        if past is None:
            history = F.pad(channels, (0, 0, self.conv_reach, 0))
        else:
            history = torch.cat([past.to(channels), channels], dim=1)
        if state is not None and self.conv_reach:
            state.append(self.layer_idx, channels, self.conv_reach)
        return conv(channels, history, hashed.reach, hashed.before).unflatten(-1, normed.shape[2:])


def find_rows(
    ngram_hash: NgramHash,
    memories: Sequence[EngramLayer],
    token_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    seen: Seen | None = None,
    state: MemoryCacheLayer | None = None,
) -> tuple[HashedTokens, dict[int, torch.Tensor]]:
    """Hash the tokens of a forward, and begin to bring their rows. It comes before anything else of the forward.

    Args:
        ngram_hash: of the memory.
        memories: its layers, in order.
        token_ids, position_ids, token_mask, seen: as `NgramHash` takes them.
        state: what the cache keeps for the memory. Only `keep_ids` changes it.

    Returns:
        what is known of the tokens, and the row ids of each layer by its id, (batch, seq, heads) on its device.
    """
    history = None if state is None else state.past(IDS)
    hashed = ngram_hash(token_ids, position_ids, token_mask, history, seen)
    # On the device of their layer, since a lookup knows its prefetch by the tensor.
    row_ids = {memory.layer_idx: memory.to_device(hashed.row_ids[memory.layer_idx]) for memory in memories}
    prefetch_rows([memory.table for memory in memories], list(row_ids.values()))
    return hashed, row_ids

"""Slow references, written from the specification and sharing nothing with the package."""

import math

import torch


def naive_row_ids(ids, positions, multipliers, primes, pad, ends=None):
    """One document row: `ids` and `positions` are lists, `primes` one list per order; a list of rows per token.

    No n-gram looks past a token `ends` before its last one."""
    rows = []
    for t in range(len(ids)):
        taps, open_ = [ids[t] if ids[t] >= 0 else pad], ids[t] >= 0
        for k in range(1, len(multipliers)):
            open_ = open_ and t - k >= 0 and positions[t] >= k and ids[t - k] >= 0 and ids[t - k] != ends
            taps.append(ids[t - k] if open_ else pad)
        mix = [taps[0] * multipliers[0]]
        for tap, multiplier in zip(taps[1:], multipliers[1:], strict=True):
            mix.append(mix[-1] ^ (tap * multiplier))
        rows.append([mix[n] % prime for n, heads in enumerate(primes, start=1) for prime in heads])
    return rows


def naive_rms_norm(x, weight, eps):
    return weight * x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps)


def naive_memory(layer, hidden, row_ids, eps):
    """One row without padding, token by token and stream by stream: hidden (seq, streams, hidden)."""
    table, streams, size = torch.cat(list(layer.table.blocks)), layer.streams, hidden.shape[-1]
    starts = [0]
    for prime in layer.table.head_rows.tolist():
        starts.append(starts[-1] + prime)
    gated = torch.zeros_like(hidden)
    for t, m in ((t, m) for t in range(hidden.shape[0]) for m in range(streams)):
        read = torch.cat([table[start + row] for start, row in zip(starts, row_ids[t], strict=False)])
        key = naive_rms_norm((layer.key_proj.weight @ read)[m * size : (m + 1) * size], layer.key_norm.weight[m], eps)
        s = float(key @ naive_rms_norm(hidden[t, m], layer.query_norm.weight[m], eps)) / math.sqrt(size)
        s = math.copysign(math.sqrt(max(abs(s), 1e-6)), s)
        gated[t, m] = (layer.value_proj.weight @ read) / (1 + math.exp(-s))
    out = gated.clone()
    for t, m in ((t, m) for t in range(hidden.shape[0]) for m in range(streams) if layer.conv is not None):
        mixed = torch.zeros(size)
        for tap in range(layer.kernel_size):
            back = t - (layer.kernel_size - 1 - tap) * layer.max_ngram_size
            if back >= 0:
                weight = layer.conv.weight[m * size : (m + 1) * size, 0, tap]
                mixed += weight * naive_rms_norm(gated[back, m], layer.conv_norm.weight[m], eps)
        out[t, m] += mixed / (1 + torch.exp(-mixed))
    return out

"""What train_tiny.py looks at in a trained model: its gates, and itself without its memory. Not a script."""

import copy

import torch
from datasets import Dataset
from tiny_recipe import ROWS_PER_STEP


def silence_memory(model):
    """A copy whose memory reads its rows as before and adds nothing: the projection of the values is zero."""
    silent = copy.deepcopy(model)
    for layer in silent.base_model.memory_layers():
        torch.nn.init.zeros_(layer.engram.value_proj.weight)
    return silent


@torch.no_grad()
def read_gates(model, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, (rows, seq), and the gate of each token, averaged over streams, (memory layers, rows, seq)."""
    ids, gates = [], []
    for batch in rows.with_format("torch", ["input_ids"]).iter(ROWS_PER_STEP):
        ids.append(batch["input_ids"].to(model.device))
        outputs = model(input_ids=ids[-1], output_engram_gates=True, use_cache=False)
        gates.append(torch.stack(outputs.engram_gates).mean(-1))
    return torch.cat(ids), torch.cat(gates, dim=1)


def strongest_ngrams(ids: torch.Tensor, gates: torch.Tensor, token_map: torch.Tensor, count: int = 8):
    """The 3-grams, one per last token and seen a few times, whose gates open widest: pairs of ids and mean gate.

    Args:
        ids: (rows, seq).
        gates: (rows, seq).
        token_map: (vocab_size,) compressed ids; n-grams that are one for the memory count as one here.
    """
    ngrams = ids.unfold(1, 3, 1).flatten(0, 1)  # (positions, 3)
    distinct, which, seen = token_map[ngrams].unique(dim=0, return_inverse=True, return_counts=True)
    mean_gates = torch.zeros(len(seen), device=gates.device).index_add(0, which, gates[:, 2:].flatten()) / seen
    strongest = {}
    for index in mean_gates.masked_fill(seen < 4, 0.0).argsort(descending=True):
        last_token = int(distinct[index, -1])
        if last_token not in strongest:
            strongest[last_token] = ngrams[(which == index).nonzero()[0, 0]].tolist(), float(mean_gates[index])
        if len(strongest) == count:
            break
    return list(strongest.values())

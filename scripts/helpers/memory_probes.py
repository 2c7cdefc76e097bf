"""What the demo shows of a trained model: its loss with and without memory, and its gates."""

import copy

import torch
from datasets import Dataset

from helpers.tiny_recipe import ROWS_PER_STEP


def silence_memory(model):
    """A copy whose memory adds nothing: its value projections are zero."""
    silent = copy.deepcopy(model)
    for layer in silent.base_model.memory_layers():
        torch.nn.init.zeros_(layer.engram.value_proj.weight)
    return silent


@torch.no_grad()
def probe(model, rows: Dataset) -> tuple[float, torch.Tensor]:
    """Mean loss per token, and the gate of each token averaged over streams, (memory layers, rows, seq)."""
    model.eval()
    loss_sum, gates = 0.0, []
    for batch in rows.with_format("torch", ["input_ids"]).iter(ROWS_PER_STEP):
        ids = batch["input_ids"].to(model.device)
        outputs = model(input_ids=ids, labels=ids, output_engram_gates=True, use_cache=False)
        loss_sum += float(outputs.loss) * len(ids)
        gates.append(torch.stack(outputs.engram_gates).mean(-1))
    return loss_sum / len(rows), torch.cat(gates, dim=1)


def strongest_ngrams(ids: torch.Tensor, gates: torch.Tensor, token_map: torch.Tensor, count: int = 8):
    """The 3-grams whose gates open widest, as pairs of ids and mean gate.

    At most one per last token, and only 3-grams that occur at least four times.

    Args:
        ids: (rows, seq).
        gates: (rows, seq).
        token_map: (vocab_size,) compressed ids. N-grams that are equal for the memory count as one.
        count: of n-grams at most.
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

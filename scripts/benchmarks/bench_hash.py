"""The hash of all memory layers against the numpy hash of DeepSeek's demo.

    python scripts/benchmarks/bench_hash.py         half a minute on 2 cores

Two layers, orders 2 and 3, eight heads each: 32 row ids a token. Both ways must give the same row ids before they are
timed. The demo's way is written anew from its description: products and XOR of shifted ids, then one remainder per
head. How fast one way gets memory depends on what ran before it, so each is timed in a process of its own, and then
both are timed in one process.

What is compared with the demo gets compressed ids and hashes them, with the borders of documents. The last column is
the whole of `NgramHash`, which also checks raw ids and reads positions and the cache.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import EngramMoEConfig, NgramHash
from engram_hf.modeling.ids_hashing import find_ngrams, hash_layers, stack_constants
from engram_hf.modeling.ids_reach import pack_history, token_reach


SHAPES = {"prefill, 8 x 4,096": (8, 4096), **{f"decode, {n} sequences": (n, 1) for n in (1, 8, 64)}}
BLOCKS, WARM_UP, ROUNDS = 5, 5, 7
PAD = 2
OURS, DEMO, WHOLE = "engram-hf", "demo", "the whole module"


def demo_row_ids(ids: np.ndarray, multipliers: np.ndarray, primes: list[list[int]], pad: int) -> np.ndarray:
    """(batch, seq, heads), as the demo computes them for whole sequences."""
    orders = len(multipliers)
    shifted = [ids]
    for shift in range(1, orders):
        shifted.append(np.pad(ids, ((0, 0), (shift, 0)), constant_values=pad)[:, : ids.shape[1]])
    found = []
    for order in range(2, orders + 1):
        mix = shifted[0] * multipliers[0]
        for shift in range(1, order):
            mix = np.bitwise_xor(mix, shifted[shift] * multipliers[shift])
        found += [mix % prime for prime in primes[order - 2]]
    return np.stack(found, axis=2)


def our_layers(ids: torch.Tensor, positions: torch.Tensor, run: torch.Tensor, constants) -> list[torch.Tensor]:
    reach = token_reach(ids[:, -positions.shape[1] :], positions, run)
    return list(hash_layers(find_ngrams(ids, reach, 3, PAD), *constants))


def demo_layers(ids: np.ndarray, history: int, constants) -> list[np.ndarray]:
    return [demo_row_ids(ids, m, p, PAD)[:, history:] for m, p in constants]


@cache
def ways(label: str) -> dict[str, Callable]:
    """Functions that give the row ids of all layers; they hash the same ids in every process."""
    torch.set_num_threads(2)
    config = EngramMoEConfig(
        vocab_size=129_280,
        engram_layer_ids=[1, 14],
        engram_compressed_vocab_size=None,
        engram_pad_token_id=PAD,
    )
    hashing = NgramHash.from_config(config)
    hashing.confirm("this benchmark")
    arrays = [(np.asarray(hashing.multipliers(i)), hashing.primes(i)) for i in config.engram_layer_ids]
    batch, seq = SHAPES[label]
    # In decode the demo hashes the last N ids; the first two are then thrown away.
    history = 0 if seq > 1 else config.engram_max_ngram_size - 1
    ids = torch.randint(config.vocab_size, (batch, history + seq), generator=torch.Generator().manual_seed(0))
    new, past = ids[:, history:], ids[:, :history]
    kept = pack_history(past, token_reach(past, torch.arange(history).unsqueeze(0))) if history else None
    positions, run = torch.arange(seq).unsqueeze(0) + history, torch.full((batch,), history)
    layers = config.engram_layer_ids
    constants = stack_constants([hashing.multipliers(i) for i in layers], [hashing.primes(i) for i in layers])
    return {
        OURS: lambda: our_layers(ids, positions, run, constants),
        WHOLE: lambda: list(hashing(new, history=kept).row_ids.values()),
        DEMO: lambda: demo_layers(ids.numpy(), history, arrays),
    }


def milliseconds(label: str, name: str) -> list[float]:
    """Times of some calls of one way, after a few that are not timed."""
    way, repeats, times = ways(label)[name], 1 if SHAPES[label][1] > 1 else 200, []
    for _ in range(WARM_UP):
        way()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            way()
        times.append(1e3 * (time.perf_counter() - start) / repeats)
    return times


def one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def milliseconds_elsewhere(processes: dict[str, ProcessPoolExecutor], label: str, name: str) -> list[float]:
    return processes[name].submit(milliseconds, label, name).result()


def measure(label: str, call: Callable) -> dict[str, float]:
    """Way to its median over blocks of calls; the ways take turns."""
    times: dict[str, list[float]] = {OURS: [], WHOLE: [], DEMO: []}
    for _ in range(BLOCKS):
        for name, found in times.items():
            found += call(label, name)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Hashing", about(__doc__))
    rows = []
    for label in SHAPES:
        ours, whole, theirs = (way() for way in ways(label).values())
        for each in (ours, whole):
            if not all(np.array_equal(a.numpy(), b) for a, b in zip(each, theirs, strict=True)):
                raise RuntimeError(f"{label}: the ways differ; nothing is timed.")
        with one_process() as first, one_process() as second, one_process() as third:
            apart = measure(label, partial(milliseconds_elsewhere, {OURS: first, WHOLE: second, DEMO: third}))
        together = measure(label, milliseconds)
        ratio, ratio_together = apart[DEMO] / apart[OURS], together[DEMO] / together[OURS]
        rows.append([label, apart[OURS], apart[DEMO], ratio, ratio_together, apart[WHOLE]])
    columns = {
        "": "",
        "engram-hf, ms": ".3f",
        "demo's numpy, ms": ".3f",
        "times as fast": ".2f",
        "times as fast in one process": ".2f",
        "the whole module, ms": ".3f",
    }
    results.tables = [Table(columns, rows)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

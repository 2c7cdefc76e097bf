"""One hash of all memory layers against the numpy way of DeepSeek's demo, and against a decode step.

    python scripts/bench_hash.py         half a minute on 2 cores

Two layers, orders 2 and 3, eight heads each: 32 row ids a token. First both ways are compared, row id by row id. The
demo's way, written anew from its description: products and XOR of shifted ids, then one remainder per head.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch

from engram_hf import EngramMoEConfig, NgramHash
from engram_hf.modeling.ngram_hashing import hash_layers, ngram_taps
from engram_hf.modeling.token_history import token_reach


SHAPES = {"prefill, 8 x 4,096": (8, 4096), **{f"decode, {n} sequences": (n, 1) for n in (1, 8, 64)}}
BLOCKS, WARM_UP, ROUNDS = 5, 5, 7
PAD = 2


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


def our_row_ids(ids, positions, run, multipliers, primes, config) -> list[torch.Tensor]:
    seq = positions.shape[1]
    reach = token_reach(ids[:, -seq:], positions, config.engram_reach, run)
    taps = ngram_taps(ids, reach, config.engram_max_ngram_size, config.engram_pad_token_id)
    return hash_layers(taps, multipliers, primes)


def demo_layers(ids: np.ndarray, history: int, constants) -> list[np.ndarray]:
    return [demo_row_ids(ids, m, p, PAD)[:, history:] for m, p in constants.values()]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(2)
    config = EngramMoEConfig(
        vocab_size=129_280,
        engram_layer_ids=[1, 14],
        engram_compressed_vocab_size=None,
        engram_pad_token_id=PAD,
    )
    hashing = NgramHash.from_config(config)
    constants = {i: (hashing.multipliers(i), hashing.primes(i)) for i in config.engram_layer_ids}
    multipliers = [torch.as_tensor(m) for m, _ in constants.values()]
    primes = [torch.as_tensor(p) for _, p in constants.values()]
    arrays = {i: (np.asarray(m), [list(map(int, heads)) for heads in p]) for i, (m, p) in constants.items()}
    print("| | engram-hf, ms | demo's numpy, ms | times as fast |\n|---|---|---|---|")
    for label, (batch, seq) in SHAPES.items():
        # In decode the demo hashes the last N ids; the first two are then thrown away.
        history = 0 if seq > 1 else config.engram_max_ngram_size - 1
        ids = torch.randint(config.vocab_size, (batch, history + seq))
        positions = torch.arange(seq).unsqueeze(0) + history

        run = torch.full((batch,), history)
        ours = partial(our_row_ids, ids, positions, run, multipliers, primes, config)
        demo = partial(demo_layers, ids.numpy(), history, arrays)

        if not all(np.array_equal(a.numpy(), b) for a, b in zip(ours(), demo(), strict=True)):
            raise RuntimeError(f"{label}: the two ways differ; nothing is timed.")
        repeats = 1 if seq > 1 else 200
        times: dict = {ours: [], demo: []}
        for _ in range(BLOCKS):
            for way in times:
                # What the other way allocated and freed decides how fast the first calls get memory.
                for _ in range(WARM_UP):
                    way()
                for _ in range(ROUNDS):
                    start = time.perf_counter()
                    for _ in range(repeats):
                        way()
                    times[way].append(1e3 * (time.perf_counter() - start) / repeats)
        mine, theirs = (statistics.median(times[way]) for way in (ours, demo))
        print(f"| {label} | {mine:.3f} | {theirs:.3f} | {theirs / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Updating rows: 65,536 Zipf lookups with forward, backward and step, on tables of 1, 3 and 10 million rows of 64.

    python scripts/bench_rows.py                              thirteen minutes on 2 cores, 16 GB of RAM
    python scripts/bench_rows.py --fbgemm ENV/bin/python      also FBGEMM's CPU kernel, from an environment of its own
                                                              (pip install fbgemm-gpu-cpu torch numpy)

Before anything is timed, each rule is compared with torch's own optimizer or with its formula. Every way runs in a
process of its own, in three turns, so that a slow minute meets all ways; milliseconds are medians of medians of turns,
at 10 million rows with the lowest and the highest, and memory is the peak of a process over its weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np


WIDTH, LOOKUPS, STEPS, WARM, TURNS = 64, 65_536, 9, 4, 3
SIZES = (1_000_000, 3_000_000, 10_000_000)
RULES = ("adam", "rowwise_adam", "adagrad", "sgd")
DENSE = ("dense AdamW", "dense AdamW, fused", "sparse=True, SparseAdam")


def batches(rows: int, count: int):
    """Numbers of rows, (LOOKUPS,), Zipf over a random order of the table."""
    random = np.random.default_rng(0)
    order = random.permutation(rows)
    weights = 1 / np.arange(1, rows + 1)
    cumulated = np.cumsum(weights / weights.sum())
    return [order[np.searchsorted(cumulated, random.random(LOOKUPS))] for _ in range(count)]


def peak_bytes() -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def made_step(way: str, rows: int):
    """A function that makes one step on (LOOKUPS,) row numbers."""
    import torch

    pull = torch.randn(LOOKUPS, WIDTH, generator=torch.Generator().manual_seed(0))
    if way in RULES:
        from engram_hf import RowAdam, RowSGD, RowwiseAdagrad, RowwiseAdam
        from engram_hf.modeling.engram_table import EngramTable
        from engram_hf.training.row_updates import RowUpdates

        rules = {"adam": RowAdam(), "rowwise_adam": RowwiseAdam(), "adagrad": RowwiseAdagrad(), "sgd": RowSGD()}
        table = EngramTable([rows], WIDTH, rows * WIDTH, torch.float32)
        torch.nn.init.normal_(table.blocks[0])
        updates = RowUpdates("table", table, rules[way])

        def step(ids):
            table(ids.view(1, -1, 1)).view(-1, WIDTH).backward(pull)
            updates.step(1e-3)

        return step
    weights = torch.nn.Parameter(torch.randn(rows, WIDTH))
    is_sparse = way.startswith("sparse")
    if is_sparse:
        optimizer = torch.optim.SparseAdam([weights], lr=1e-3)
    else:
        optimizer = torch.optim.AdamW([weights], lr=1e-3, weight_decay=0.0, fused="fused" in way)

    def step(ids):
        torch.nn.functional.embedding(ids, weights, sparse=is_sparse).backward(pull)
        optimizer.step()
        optimizer.zero_grad()

    return step


def made_fbgemm_step(rows: int):
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    pull = torch.randn(LOOKUPS, WIDTH)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=1e-3,
        pooling_mode=PoolingMode.SUM,
    )
    # One row per bag, which is a lookup.
    offsets = torch.arange(LOOKUPS + 1)
    return lambda ids: table(ids, offsets).backward(pull)


def measure(way: str, rows: int) -> None:
    """In a process of its own: print median milliseconds and peak bytes."""
    import torch

    ids = [torch.from_numpy(each) for each in batches(rows, WARM + STEPS)]
    before = peak_bytes()
    step = made_fbgemm_step(rows) if way == "fbgemm" else made_step(way, rows)
    seconds = []
    for each in ids:
        start = time.perf_counter()
        step(each)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([1000 * statistics.median(seconds[WARM:]), peak_bytes() - before]))


def check() -> None:
    """Raise unless rules move rows as torch's optimizers do, where every step touches every row."""
    import torch

    from engram_hf import RowAdam, RowSGD
    from engram_hf.modeling.engram_table import EngramTable
    from engram_hf.training.row_updates import RowUpdates

    for rule, kind, options in (
        (RowAdam(), torch.optim.Adam, {}),
        (RowSGD(), torch.optim.SGD, {"momentum": 0.9}),
    ):
        table = EngramTable([999], WIDTH, 999 * WIDTH, torch.float32)
        torch.nn.init.normal_(table.blocks[0])
        dense = torch.nn.Parameter(table.blocks[0].detach().clone())
        updates, optimizer = RowUpdates("table", table, rule), kind([dense], lr=1e-2, **options)
        for _ in range(20):
            pull = torch.randn(999, WIDTH)
            table(torch.arange(999).view(1, -1, 1)).view(-1, WIDTH).backward(pull)
            updates.step(1e-2)
            dense.grad = pull
            optimizer.step()
        if not torch.allclose(table.blocks[0], dense, rtol=1e-5, atol=1e-6):
            raise RuntimeError(f"{rule} moves rows otherwise than {kind.__name__}; nothing is timed.")


def run(way: str, rows: int, python: str = sys.executable) -> tuple[float, float]:
    """Milliseconds, and peak memory over weights."""
    ran = subprocess.run([python, __file__, "--measure", way, str(rows)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{way} with {rows:,} rows failed:\n{ran.stderr[-2000:]}")
    milliseconds, peak = json.loads(ran.stdout.splitlines()[-1])
    return milliseconds, peak / (rows * WIDTH * 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fbgemm", metavar="PYTHON", help="interpreter of an environment with fbgemm-gpu-cpu")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], int(arguments.measure[1]))
    check()
    ways = [*RULES, *DENSE] + ["fbgemm"] * bool(arguments.fbgemm)
    print("| way | 1M rows, ms | 3M | 10M | 10M to 1M | peak memory / weights at 10M | dense AdamW takes ... times |")
    print("|---|---|---|---|---|---|---|")
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(way, rows): [] for way in ways for rows in SIZES}
    for _ in range(TURNS):
        for (way, rows), own in found.items():
            own.append(run(way, rows, arguments.fbgemm if way == "fbgemm" else sys.executable))
    times = {key: statistics.median(milliseconds for milliseconds, _ in own) for key, own in found.items()}
    small, *_, large = SIZES
    for way in ways:
        own = sorted(milliseconds for milliseconds, _ in found[way, large])
        peak = max(peak for _, peak in found[way, large])
        cells = " | ".join(f"{times[way, rows]:.1f}" for rows in SIZES)
        growth, dense = times[way, large] / times[way, small], times["dense AdamW", large] / times[way, large]
        print(f"| {way} | {cells} ({own[0]:.1f} to {own[-1]:.1f}) | {growth:.2f} | {peak:.2f} | {dense:.0f} |")


if __name__ == "__main__":
    main()

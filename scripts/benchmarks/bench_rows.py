"""Updating rows: forward, backward and step of 65,536 Zipf lookups, on tables of 1, 3 and 10 million rows of 64.

    python scripts/benchmarks/bench_rows.py          thirteen minutes on 2 cores, 16 GB of RAM

With `--fbgemm ENV/bin/python` it also times FBGEMM's CPU kernel, which needs an environment of its own (pip install
fbgemm-gpu-cpu torch numpy).

Before a rule of ours or FBGEMM's is timed, it is compared with its formula, written out dense. Every way runs in a
process of its own and has three turns, so that a slow minute meets all ways. Milliseconds are medians of the medians of
turns. Memory is the peak of a process over the size of its weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.memory_limit import own_bytes


WIDTH, LOOKUPS, STEPS, WARM, TURNS = 64, 65_536, 9, 4, 3
SIZES = (1_000_000, 3_000_000, 10_000_000)
RULES = ("adam", "rowwise_adam", "adagrad", "sgd")
DENSE = ("dense AdamW", "dense AdamW, fused", "sparse=True, SparseAdam")


def batches(rows: int, count: int):
    """Row ids of each batch, (LOOKUPS,), drawn by Zipf's law over a random order of the table."""
    random = np.random.default_rng(0)
    order = random.permutation(rows)
    weights = 1 / np.arange(1, rows + 1)
    cumulated = np.cumsum(weights / weights.sum())
    return [order[np.searchsorted(cumulated, random.random(LOOKUPS))] for _ in range(count)]


def made_rows(rows: int, way: str):
    """A table and what updates its rows."""
    import torch

    from engram_hf import RowAdam, RowSGD, RowwiseAdagrad, RowwiseAdam
    from engram_hf.modeling.table import EngramTable
    from engram_hf.modeling.table_formats import row_format
    from engram_hf.training.row_updates import RowUpdates

    rules = {"adam": RowAdam(), "rowwise_adam": RowwiseAdam(), "adagrad": RowwiseAdagrad(), "sgd": RowSGD()}
    table = EngramTable([rows], WIDTH, rows * WIDTH, row_format("float32"))
    torch.nn.init.normal_(table.blocks[0])
    return table, RowUpdates("table", table, rules[way])


def made_step(way: str, rows: int):
    """A function that makes one step on (LOOKUPS,) row ids."""
    import torch

    pull = torch.randn(LOOKUPS, WIDTH, generator=torch.Generator().manual_seed(0))
    if way in RULES:
        table, updates = made_rows(rows, way)

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


def made_fbgemm_table(rows: int, lr: float):
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=lr,
        pooling_mode=PoolingMode.SUM,
    )


def made_fbgemm_step(rows: int):
    import torch

    pull = torch.randn(LOOKUPS, WIDTH)
    table = made_fbgemm_table(rows, 1e-3)
    # One row per bag, which is a lookup.
    offsets = torch.arange(LOOKUPS + 1)
    return lambda ids: table(ids, offsets).backward(pull)


def measure(way: str, rows: int) -> None:
    """In a process of its own: print median milliseconds and peak bytes."""
    import torch

    if way not in DENSE:
        check(way)
    ids = [torch.from_numpy(each) for each in batches(rows, WARM + STEPS)]
    before = own_bytes("VmHWM")
    step = made_fbgemm_step(rows) if way == "fbgemm" else made_step(way, rows)
    seconds = []
    for each in ids:
        start = time.perf_counter()
        step(each)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([1000 * statistics.median(seconds[WARM:]), own_bytes("VmHWM") - before]))


def moved_by_formula(way: str, rows, pulls, lr: float):
    """(n, width) rows after one step for each gradient in `pulls`, dense and in float64."""
    import torch

    rows, first, second = rows.double(), 0.0, 0.0
    for step, pull in enumerate((each.double() for each in pulls), 1):
        square = pull.square()
        if way == "sgd":
            first = 0.9 * first + pull
            rows = rows - lr * first
        elif way == "adagrad":
            second = second + square.mean(-1, keepdim=True)
            rows = rows - lr * pull / second.sqrt()
        else:
            first = 0.9 * first + 0.1 * pull
            second = 0.999 * second + 0.001 * (square if way == "adam" else square.mean(-1, keepdim=True))
            size = torch.sqrt(second / (1 - 0.999**step)) + 1e-8
            rows = rows - lr * first / (1 - 0.9**step) / size
    return rows


def check(way: str) -> None:
    """Raise unless a way moves rows by its formula."""
    import torch

    ids, lr = torch.randperm(999), 1e-2
    pulls = [torch.randn(999, WIDTH) for _ in range(20)]
    if way == "fbgemm":
        table = made_fbgemm_table(999, lr)
        weights = table.split_embedding_weights()[0]
        torch.nn.init.normal_(weights)
        start = weights.detach().clone()
        for pull in pulls:
            table(ids, torch.arange(1000)).backward(pull[ids])
        weights = table.split_embedding_weights()[0]
    else:
        table, updates = made_rows(999, way)
        weights = table.blocks[0].detach()
        start = weights.clone()
        for pull in pulls:
            table(ids.view(1, -1, 1)).view(-1, WIDTH).backward(pull[ids])
            updates.step(lr)
    expected = moved_by_formula("adagrad" if way == "fbgemm" else way, start, pulls, lr)
    if not torch.allclose(weights.double(), expected, rtol=1e-5, atol=1e-5):
        raise RuntimeError(f"{way} does not move rows by its formula; nothing is timed.")


def run(way: str, rows: int, python: str = sys.executable) -> tuple[float, float]:
    """Milliseconds, and peak memory over weights."""
    ran = subprocess.run(
        [python, str(Path(__file__).resolve()), "--measure", way, str(rows)], capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"{way} with {rows:,} rows failed:\n{ran.stderr[-2000:]}")
    milliseconds, peak = json.loads(ran.stdout.splitlines()[-1])
    return milliseconds, peak / (rows * WIDTH * 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fbgemm", metavar="PYTHON", help="interpreter of an environment with fbgemm-gpu-cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="of each table (default: 1, 3, 10 million)")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "ROWS"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="folder for the figures (default: results)")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], int(arguments.measure[1]))
    # Not above: an environment with FBGEMM only measures.
    from helpers.results import FOLDER, Results, Table, about

    results = Results("Updating rows", about(__doc__))
    ways = [*RULES, *DENSE] + ["fbgemm"] * bool(arguments.fbgemm)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(way, n): [] for way in ways for n in arguments.rows}
    for _ in range(TURNS):
        for (way, num_rows), own in found.items():
            own.append(run(way, num_rows, arguments.fbgemm if way == "fbgemm" else sys.executable))
    times = {key: statistics.median(milliseconds for milliseconds, _ in own) for key, own in found.items()}
    small, large = arguments.rows[0], arguments.rows[-1]
    rows = []
    for way in ways:
        own = sorted(milliseconds for milliseconds, _ in found[way, large])
        cells = [times[way, num_rows] for num_rows in arguments.rows]
        peak = max(peak for _, peak in found[way, large])
        dense = times["dense AdamW", large] / times[way, large]
        spread = f"{own[0]:.1f} to {own[-1]:.1f}"
        rows.append([way, *cells, spread, times[way, large] / times[way, small], peak, dense])
    columns = {
        "way": "",
        **{f"{num_rows:,} rows, ms": ".1f" for num_rows in arguments.rows},
        "spread at the largest, ms": "",
        "time at the largest to the smallest": ".2f",
        "peak memory to weights": ".2f",
        "times as fast as dense AdamW": ".0f",
    }
    results.tables = [Table(columns, rows)]
    results.write(arguments.results or FOLDER)


if __name__ == "__main__":
    main()

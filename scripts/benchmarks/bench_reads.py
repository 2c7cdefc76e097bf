"""Cold random rows from a file larger than the page cache, against fio and the ways other libraries read.

    python scripts/benchmarks/bench_reads.py         two minutes on 2 cores; writes a file of 0.93 of RAM and removes it

fio reads random 4K pages at depth 128 (apt install fio; without it, a libaio loop does the same). The rows that a
lookup gives are compared with the bytes of the file before anything is timed. The file is larger than what the page
cache can hold, and a little smaller than RAM, because the safetensors library cannot map a larger one. Rows a second
are medians over interleaved rounds. Each round asks for rows of its own, and the file is taken out of the page cache
before it.
"""

import argparse
import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.libaio_reads import reads_a_second
from helpers.made_tables import check, forget, open_table, write_table
from helpers.results import Results, Table, about, add_results_argument

from engram_hf.modeling.table_blocks import DISK


WIDTH = 64
ROW_BYTES = 4 * WIDTH
# What a prefill of 4,096 tokens asks of 16 heads.
ROWS_OF_A_CALL = 65_536
# The slow ways are asked for fewer rows, or a round would take minutes.
ROWS_OF_SLOW_WAYS = 128


def seconds(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


@contextlib.contextmanager
def busy_thread():
    """Another Python thread that never rests."""
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def device_reads(path: Path) -> tuple[str, float | None]:
    """Who read, and how many random 4K pages a second at depth 128."""
    if shutil.which("fio") is not None:
        for engine in ("io_uring", "libaio"):
            command = ["fio", "--name=r", f"--filename={path}", "--readonly", "--rw=randread", "--bs=4k"]
            command += ["--iodepth=128", f"--ioengine={engine}", "--direct=1", "--runtime=2", "--time_based"]
            run = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True, check=False)
            if run.returncode == 0:
                return f"fio ({engine})", json.loads(run.stdout)["jobs"][0]["read"]["iops"]
    return "libaio loop", reads_a_second(path)


def plain_gather(path: Path, start: int, ids: np.ndarray) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        for i in ids:
            mapping[start + int(i) * ROW_BYTES : start + int(i + 1) * ROW_BYTES]


def accelerate_offload(path: Path, rows: int) -> torch.nn.Module:
    """An embedding whose weights accelerate reads from the same file."""
    with torch.device("meta"):
        embedding = torch.nn.Embedding(rows, WIDTH)
    index = {"weight": {"safetensors_file": str(path), "weight_name": "blocks.0", "dtype": "float32"}}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=OffloadedWeightsLoader(index=index))
    return add_hook_to_module(embedding, hook)


def slices(path: Path, ids: np.ndarray) -> None:
    with safe_open(path, "pt") as file:
        rows = file.get_slice("blocks.0")
        for i in ids:
            rows[int(i) : int(i) + 1].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parser.add_argument("--gib", type=int, default=int(0.93 * ram / 2**30), help="of the file (default: 0.93 of RAM)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write it (default: the temporary folder)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Cold reads", about(__doc__))
    torch.set_num_threads(2)
    generator = np.random.default_rng(1)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        big = Path(name) / "table.safetensors"
        num_rows = arguments.gib * 2**30 // ROW_BYTES
        write_table(big, num_rows, WIDTH, torch.float32)
        table, offloaded = open_table(big, [num_rows], WIDTH, torch.float32, DISK), accelerate_offload(big, num_rows)
        start = table.block_records[0].source.file.places["blocks.0"].start

        def draw(count: int) -> np.ndarray:
            return generator.integers(0, num_rows, count)

        def look_up(ids: np.ndarray) -> torch.Tensor:
            return table(torch.from_numpy(ids).view(1, -1, 1))

        check(table, draw(1000))
        rates: dict[str, list[float]] = {}
        for _ in tqdm(range(arguments.rounds), desc="Rounds"):
            forget([table.block_records[0].source.file])
            who, rate = device_reads(big)
            if rate is not None:
                rates.setdefault(f"{who}, 4K random reads at depth 128", []).append(rate)
            forget([table.block_records[0].source.file])
            rates.setdefault("engram-hf", []).append(ROWS_OF_A_CALL / seconds(look_up, draw(ROWS_OF_A_CALL)))
            forget([table.block_records[0].source.file])
            with busy_thread():
                rate = ROWS_OF_A_CALL / seconds(look_up, draw(ROWS_OF_A_CALL))
            rates.setdefault("engram-hf beside a busy Python thread", []).append(rate)
            forget([table.block_records[0].source.file])
            rate = ROWS_OF_SLOW_WAYS / seconds(plain_gather, big, start, draw(ROWS_OF_SLOW_WAYS))
            rates.setdefault("plain mapping", []).append(rate)
            forget([table.block_records[0].source.file])
            rate = ROWS_OF_SLOW_WAYS / seconds(slices, big, draw(ROWS_OF_SLOW_WAYS))
            rates.setdefault("safetensors slices", []).append(rate)
            forget([table.block_records[0].source.file])
            ids = torch.from_numpy(draw(ROWS_OF_SLOW_WAYS))
            with torch.no_grad():
                rate = ROWS_OF_SLOW_WAYS / seconds(offloaded, ids)
            rates.setdefault("accelerate's disk offload", []).append(rate)

    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        [name, median, f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}", medians["engram-hf"] / median]
        for name, median in medians.items()
    ]
    title = f"A file of {arguments.gib} GiB, rows of {ROW_BYTES} bytes, {ROWS_OF_A_CALL:,} rows a call"
    columns = {"way": "", "rows a second": ",.0f", "spread": "", "engram-hf reads ... times as many": ",.2f"}
    results.tables = [Table(columns, rows, title)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

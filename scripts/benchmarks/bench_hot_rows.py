"""Does a cache of hot rows pay? N bytes of rows in RAM against N bytes more of page cache.

    python scripts/benchmarks/bench_hot_rows.py      about ten minutes on 2 cores, 16 GB of disk; needs root

Every way runs in a process of its own, inside a memory cgroup. The limit counts the page cache too, so the page cache
loses what the cache of rows takes. The text is the Python standard library, in the order of its files. All ways must
read the same bytes, and they take turns in another order each round. There are two settings:

* A table of 16 GB on disk under a limit of 2 GB, with rows of 256 bytes, 16 heads and a vocabulary of 32,000.
* The demo's table and text, where the page cache holds the whole table.

A control has neither the cache of rows nor as much page cache. A run that was stopped goes on where it was: table, ids
and figures stay in --folder until all is done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import open_table, write_table
from helpers.memory_limit import limited_memory
from helpers.results import Results, Table, about, add_results_argument
from helpers.text import gather_documents, train_tokenizer

from engram_hf import EngramMoEConfig, NgramHash, build_token_map
from engram_hf.modeling.hot_rows import HotRows
from engram_hf.modeling.table import DISK


LIMIT_BYTES = 2_000_000_000
# Tokens before anything is timed, tokens in lookups of a prefill, tokens in lookups of a decode step.
WARM_UP, PREFILL, DECODE = 300_000, 100_000, 30_000
TOKENS_OF_PREFILL, SEQUENCES_OF_DECODE = 2048, 16
ROUNDS = 3
# Vocabulary, heads of an order, rows of a head, width of a row, its type, bytes of the cache of rows.
SETTINGS = {
    "16 GB table, 2 GB limit": (32_000, 8, 3_906_250, 128, torch.bfloat16, 2**30),
    "demo's table": (4096, 4, 6700, 16, torch.float32, 2**22),
}
PAGE_CACHE, HOT_ROWS, CONTROL = "page cache", "hot rows", "neither"


def make_hash(setting: str) -> NgramHash:
    vocab_size, heads, rows_of_head, width, *_ = SETTINGS[setting]
    return NgramHash.from_config(
        EngramMoEConfig(
            vocab_size=vocab_size,
            engram_layer_ids=[1],
            engram_vocab_size=rows_of_head,
            engram_n_heads=heads,
            engram_head_dim=width,
            engram_compressed_vocab_size=None,
            engram_pad_token_id=0,
        )
    )


def rows_of_heads(setting: str) -> list[int]:
    return [rows for order in make_hash(setting).primes(1) for rows in order]


def prepare(folder: Path, setting: str, tokens: int) -> None:
    """Compressed ids of the text, and the table, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ids.npy").exists():
        documents = gather_documents()
        tokenizer = train_tokenizer(documents, SETTINGS[setting][0])
        ids: list[int] = []
        for _, text in documents:
            ids += tokenizer(text)["input_ids"]
            if len(ids) >= tokens:
                break
        if len(ids) < tokens:
            raise SystemExit(f"The standard library has only {len(ids):,} tokens, and {tokens:,} are needed.")
        np.save(folder / "ids.npy", build_token_map(tokenizer).numpy()[np.array(ids[:tokens])])
    if not (folder / "table.safetensors").exists():
        rows = rows_of_heads(setting)
        write_table(folder / "table.safetensors", sum(rows), *SETTINGS[setting][3:5])


def bytes_read_from_disk() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def lookups(setting: str, ids: np.ndarray, sequences: int, tokens: int):
    """Row ids of consecutive lookups, each (sequences, tokens, heads), of texts that lie one behind the other."""
    hashing = make_hash(setting)
    texts = torch.from_numpy(ids[: len(ids) // sequences * sequences]).view(sequences, -1)
    for start in range(0, texts.shape[1] - tokens + 1, tokens):
        # Two tokens before it belong to its n-grams.
        seen = min(start, 2)
        yield hashing.row_ids(1, texts[:, start - seen : start + tokens])[:, seen:].contiguous()


def measure(folder: Path, setting: str, way: str, tokens: tuple[int, int, int]) -> None:
    """In a process of its own: print seconds, rows asked for, pages read, hits and a checksum of each part."""
    torch.set_num_threads(2)
    _, _, _, width, dtype, cache_bytes = SETTINGS[setting]
    table = open_table(folder / "table.safetensors", rows_of_heads(setting), width, dtype, DISK)
    if way == HOT_ROWS:
        table.hot_rows = HotRows(cache_bytes // table.row_nbytes, width, dtype)
    ids = np.load(folder / "ids.npy")
    warm_up, prefill, decode = np.split(ids, np.cumsum(tokens[:2]))
    found = {}
    for part, text, sequences, tokens_at_once in (
        ("warm-up", warm_up, 1, TOKENS_OF_PREFILL),
        ("prefill", prefill, 1, TOKENS_OF_PREFILL),
        ("decode", decode[: tokens[2]], SEQUENCES_OF_DECODE, 1),
    ):
        seconds, cpu_seconds, asked, checksum = 0.0, 0.0, 0, 0
        hits = table.hot_rows.hits if way == HOT_ROWS else 0
        pages = bytes_read_from_disk()
        for row_ids in lookups(setting, text, sequences, tokens_at_once):
            start, cpu_start = time.perf_counter(), time.process_time()
            rows = table(row_ids)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            asked += row_ids.numel()
            checksum = (checksum + int(rows.view(torch.int32).sum(dtype=torch.int64))) % 2**61
        found[part] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "rows": asked,
            "pages": (bytes_read_from_disk() - pages) // 4096,
            "hits": (table.hot_rows.hits if way == HOT_ROWS else 0) - hits,
            "checksum": checksum,
        }
    print(json.dumps(found))


def run(folder: Path, setting: str, way: str, tokens: tuple[int, int, int]) -> dict:
    """What `measure` prints, with the table out of the page cache at the start."""
    with (folder / "table.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    work = [str(folder), setting, way, *map(str, tokens)]
    with limited_memory(LIMIT_BYTES - (SETTINGS[setting][-1] if way == CONTROL else 0)) as (_, before):
        command = [*before, sys.executable, str(Path(__file__).resolve()), "--measure", *work]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{setting}, {way} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def tables(found: dict[str, list]) -> list[Table]:
    made = []
    for setting, (*_, cache_bytes) in SETTINGS.items():
        rows = []
        for part in ("prefill", "decode"):
            base = [each[part] for each in found[f"{setting}: {PAGE_CACHE}"]]
            for way in (PAGE_CACHE, HOT_ROWS, CONTROL):
                own = [each[part] for each in found[f"{setting}: {way}"]]
                if {each["checksum"] for each in own} != {each["checksum"] for each in base}:
                    raise RuntimeError(f"{setting}: {way} gives other rows than {PAGE_CACHE}; nothing is shown.")
                ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(base, own, strict=True))
                asked = own[0]["rows"]
                rows.append(
                    [
                        part,
                        way,
                        asked / statistics.median(each["seconds"] for each in own),
                        1e6 * statistics.median(each["cpu_seconds"] for each in own) / asked,
                        statistics.median(each["hits"] / asked for each in own) if way == HOT_ROWS else None,
                        statistics.median(each["pages"] for each in own),
                        statistics.median(ratios),
                        ", ".join(f"{ratio:.2f}" for ratio in ratios),
                    ]
                )
        columns = {
            "lookups": "",
            "what N bytes are": "",
            "rows a second": ",.0f",
            "CPU us a row": ".2f",
            "hits of hot rows": ".3f",
            "pages read": ",.0f",
            "times as fast as page cache": ".2f",
            "each round": "",
        }
        made.append(Table(columns, rows, f"{setting}, N = {cache_bytes / 2**20:,.0f} MiB"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/hot_rows"), help="for the tables and what is found")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default: {ROUNDS})")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    add_results_argument(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, setting, way, *tokens = arguments.measure
        return measure(Path(folder), setting, way, tuple(map(int, tokens)))
    results = Results("Hot rows against page cache", about(__doc__))
    state = arguments.folder / "found.json"
    found = json.loads(state.read_text()) if state.exists() else {}
    tokens = (WARM_UP, PREFILL, DECODE)
    ways = [PAGE_CACHE, HOT_ROWS, CONTROL]
    for number, setting in enumerate(SETTINGS):
        folder = arguments.folder / str(number)
        prepare(folder, setting, sum(tokens))
        for round_ in range(arguments.rounds):
            for way in ways[round_ % 3 :] + ways[: round_ % 3]:
                own = found.setdefault(f"{setting}: {way}", [])
                if len(own) <= round_:
                    own.append(run(folder, setting, way, tokens))
                    state.write_text(json.dumps(found))
                    print(f"{setting}, {way}: {own[-1]['prefill']['seconds']:.1f} s of prefill", flush=True)
    results.tables = tables(found)
    results.write(arguments.results)
    # Only what this script has written.
    for number in range(len(SETTINGS)):
        for name in ("ids.npy", "table.safetensors"):
            (arguments.folder / str(number) / name).unlink()
        (arguments.folder / str(number)).rmdir()
    state.unlink()


if __name__ == "__main__":
    main()

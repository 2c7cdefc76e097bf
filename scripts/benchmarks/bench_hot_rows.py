"""Does a cache of hot rows pay? N bytes of rows in RAM against N bytes more of page cache.

    python scripts/benchmarks/bench_hot_rows.py      about eight minutes on 2 cores, 32 GB of disk; needs root

Both ways run in processes of their own, each with its own copy of the table and inside its own memory cgroup. The limit
counts the page cache too, so the page cache loses what the cache of rows takes. They take turns of a few seconds, and
both must read the same bytes. The text is the Python standard library, in the order of its files. There are two
settings:

* A table of 16 GB on disk under a limit of 2 GB, with rows of 256 bytes, 16 heads and a vocabulary of 32,000. N is half
  of the limit. Before the first turn both ways look up 300,000 tokens, and the cache begins with the rows that it would
  hold after all of the text before them (1.9 million tokens).
* The demo's table and text, where the page cache holds the whole table. N is the size of the table.

A run that was stopped goes on where it was: tables, ids and figures stay in --folder until all is done.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import open_table, write_table
from helpers.memory_limit import limited_memory
from helpers.results import Results, Table, about, add_results_argument
from helpers.text import gather_documents, train_tokenizer
from helpers.turns import run_in_turns, wait_for_turn

from engram_hf import EngramMoEConfig, NgramHash, build_token_map
from engram_hf.modeling.disk_reading import HotRows
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_blocks import DISK


LIMIT_BYTES = 2_000_000_000
# Tokens at the end of the text: looked up before the first turn, in lookups of a prefill, in lookups of a decode step.
WARM_UP, PREFILL, DECODE = 300_000, 120_000, 32_000
TOKENS_OF_PREFILL, SEQUENCES_OF_DECODE = 2048, 16
LOOKUPS_OF_A_TURN = {"prefill": 10, "decode": 200}
# Vocabulary, heads of an order, rows of a head, width of a row, its type, bytes of the cache of rows.
SETTINGS = {
    "16 GB table, 2 GB limit": (32_000, 8, 3_906_250, 128, torch.bfloat16, 2**30),
    "demo's table": (4096, 4, 6700, 16, torch.float32, 2**22),
}
PAGE_CACHE, HOT_ROWS = "page cache", "hot rows"
CHUNK_BYTES = 2**26


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


def table_path(folder: Path, way: str) -> Path:
    return folder / f"{way.replace(' ', '-')}.safetensors"


def prepare(folder: Path, setting: str) -> None:
    """Compressed ids of the text, and a table for each way, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ids.npy").exists():
        documents = gather_documents()
        tokenizer = train_tokenizer(documents, SETTINGS[setting][0])
        ids = np.concatenate([tokenizer(text)["input_ids"] for _, text in documents])
        np.save(folder / "ids.npy", build_token_map(tokenizer).numpy()[ids.astype(np.int64)])
    page_cache, hot_rows = table_path(folder, PAGE_CACHE), table_path(folder, HOT_ROWS)
    if not page_cache.exists():
        write_table(page_cache, sum(rows_of_heads(setting)), *SETTINGS[setting][3:5])
    if not hot_rows.exists():
        half = hot_rows.with_suffix(".half")
        shutil.copyfile(page_cache, half)
        half.replace(hot_rows)
    for path in (page_cache, hot_rows):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read_from_disk() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def lookups(setting: str, ids: np.ndarray, sequences: int, tokens: int):
    """Row ids of consecutive lookups, each (sequences, tokens, heads), of texts that follow one another."""
    hashing = make_hash(setting)
    texts = torch.from_numpy(ids[: len(ids) // sequences * sequences]).view(sequences, -1)
    for start in range(0, texts.shape[1] - tokens + 1, tokens):
        # The two tokens before it belong to its n-grams.
        seen = min(start, 2)
        yield hashing.row_ids(1, texts[:, start - seen : start + tokens])[:, seen:].contiguous()


def fill(cache: HotRows, table: EngramTable, setting: str, past: np.ndarray) -> None:
    """Put the rows into the cache that it would hold after looking up a text: for each place the last one."""
    first_rows = np.cumsum([0, *rows_of_heads(setting)[:-1]])
    for row_ids in lookups(setting, past, 1, TOKENS_OF_PREFILL):
        keys = (row_ids.numpy() + first_rows).reshape(-1)
        cache.keys[keys % cache.size] = keys
    keys = np.sort(cache.keys[cache.keys >= 0])
    source = table.block_records[0].source
    place, row_bytes = source.file.places[source.name], table.row_nbytes
    with source.file.path.open("rb", buffering=0) as file:
        rows_of_chunk = CHUNK_BYTES // row_bytes
        for first in range(0, table.num_rows, rows_of_chunk):
            start = place.start + first * row_bytes
            chunk = torch.frombuffer(bytearray(os.pread(file.fileno(), CHUNK_BYTES, start)), dtype=cache.rows.dtype)
            os.posix_fadvise(file.fileno(), 0, start + CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
            own = keys[np.searchsorted(keys, first) : np.searchsorted(keys, first + rows_of_chunk)]
            rows = chunk[: len(chunk) // table.row_width * table.row_width].view(-1, table.row_width)
            cache.rows[torch.from_numpy(own % cache.size)] = rows[torch.from_numpy(own - first)]


def measure(folder: Path, setting: str, way: str) -> None:
    """In a process of its own: print turns, rows asked for, pages read, hits and a checksum of each part."""
    torch.set_num_threads(2)
    _, _, _, width, dtype, cache_bytes = SETTINGS[setting]
    table = open_table(table_path(folder, way), rows_of_heads(setting), width, dtype, DISK)
    past, warm_up, prefill, decode = np.split(np.load(folder / "ids.npy"), -np.cumsum([DECODE, PREFILL, WARM_UP])[::-1])
    if way == HOT_ROWS:
        table.hot_rows = HotRows(cache_bytes // table.row_nbytes, width, dtype)
        fill(table.hot_rows, table, setting, past)
    for row_ids in lookups(setting, warm_up, 1, TOKENS_OF_PREFILL):
        table(row_ids)
    found = {}
    for part, text, sequences, tokens in (
        ("prefill", prefill, 1, TOKENS_OF_PREFILL),
        ("decode", decode, SEQUENCES_OF_DECODE, 1),
    ):
        turns, cpu_seconds, asked, checksum = [], 0.0, 0, 0
        pages, hits = bytes_read_from_disk(), table.hot_rows.hits if way == HOT_ROWS else 0
        for number, row_ids in enumerate(lookups(setting, text, sequences, tokens)):
            if number % LOOKUPS_OF_A_TURN[part] == 0:
                wait_for_turn()
                turns.append(0.0)
            start, cpu_start = time.perf_counter(), time.process_time()
            rows = table(row_ids)
            turns[-1] += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            asked += row_ids.numel()
            checksum = (checksum + int(rows.view(torch.int32).sum(dtype=torch.int64))) % 2**61
        found[part] = {
            "turns": turns,
            "cpu_seconds": cpu_seconds,
            "rows": asked,
            "pages": (bytes_read_from_disk() - pages) // 4096,
            "hits": (table.hot_rows.hits if way == HOT_ROWS else 0) - hits,
            "checksum": checksum,
        }
    print(json.dumps(found))


def run(folder: Path, setting: str) -> dict[str, dict]:
    """Way to what `measure` prints."""
    with ExitStack() as stack:
        commands = {}
        for way in (PAGE_CACHE, HOT_ROWS):
            _, before = stack.enter_context(limited_memory(LIMIT_BYTES))
            command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(folder), setting, way]
            commands[way] = [*before, *command]
        return {way: json.loads(line) for way, line in run_in_turns(commands).items()}


def table_of(setting: str, found: dict[str, dict]) -> Table:
    rows = []
    for part in LOOKUPS_OF_A_TURN:
        base = found[PAGE_CACHE][part]
        for way, own in ((way, found[way][part]) for way in (PAGE_CACHE, HOT_ROWS)):
            if own["checksum"] != base["checksum"]:
                raise RuntimeError(f"{setting}: hot rows give other bytes than the file; nothing is shown.")
            ratios = [a / b for a, b in zip(base["turns"], own["turns"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append(
                [
                    part,
                    way,
                    own["rows"] / sum(own["turns"]),
                    1e6 * own["cpu_seconds"] / own["rows"],
                    own["hits"] / own["rows"] if way == HOT_ROWS else None,
                    own["pages"],
                    sum(base["turns"]) / sum(own["turns"]),
                    f"{low:.2f} to {high:.2f}",
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
        "middle half of the turns": "",
    }
    return Table(columns, rows, f"{setting}, N = {SETTINGS[setting][-1] / 2**20:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/hot_rows"), help="for the tables and what is found")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    add_results_argument(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(Path(arguments.measure[0]), *arguments.measure[1:])
    results = Results("Hot rows against page cache", about(__doc__).rsplit("\n\n", 1)[0])
    state = arguments.folder / "found.json"
    found = json.loads(state.read_text()) if state.exists() else {}
    for number, setting in enumerate(SETTINGS):
        if setting not in found:
            prepare(arguments.folder / str(number), setting)
            found[setting] = run(arguments.folder / str(number), setting)
            state.write_text(json.dumps(found))
    results.tables = [table_of(setting, found[setting]) for setting in SETTINGS]
    results.write(arguments.results)
    # Only what this script has written.
    for number in range(len(SETTINGS)):
        folder = arguments.folder / str(number)
        for path in (folder / "ids.npy", table_path(folder, PAGE_CACHE), table_path(folder, HOT_ROWS)):
            path.unlink()
        folder.rmdir()
    state.unlink()


if __name__ == "__main__":
    main()

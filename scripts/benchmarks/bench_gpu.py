"""How many tokens a second a dense backbone on a GPU loses to a memory layer whose table is in host memory.

    python scripts/benchmarks/bench_gpu.py --seconds 210     about four minutes on one GPU of 80 GB
    python scripts/benchmarks/bench_gpu.py --sizes tiny      a minute on any machine, to see that it runs

Backbones of 4 and of 8 billion parameters with random weights, each with and without a memory layer at index 1. Its
rows in FP8 take a fourth of the host memory that is available, and at most 32 GiB. The models read 512 sequences of 100
to 1,024 tokens, in batches of similar length, and generate 32 tokens for each. They take turns, and each figure is the
median of the rounds. The rows that a lookup brings to the GPU, with a prefetch and without one, are compared with those
in host memory before anything is timed. The paper (arXiv 2601.07372) reports penalties of 1.9 % and 2.8 % for tables of
100 billion parameters on an H800.

The second table adds up the gradients of 200,000 lookups of width 160, with the kernel that training uses and with the
backward of torch's embedding: once with distinct row ids, and once with a single row id, as padding has.
"""

import argparse
import bisect
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.memory_limit import available_bytes
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, count_parameters
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_blocks import HOST
from engram_hf.modeling.table_gradients import group


FORMAT, HEAD_DIM, HEADS = "float8_e4m3fn", 160, 8
DENSE = {"num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 129_280, "tie_word_embeddings": True}
SIZES = {
    "4b": {**DENSE, "hidden_size": 2560, "intermediate_size": 9728},
    "8b": {**DENSE, "hidden_size": 4096, "intermediate_size": 12_800},
    "tiny": {**DENSE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 1000},
}
# Sequences, the shortest and the longest, tokens written to each, sequences of a batch.
WORK = {"4b": (512, 100, 1024, 32, 64), "8b": (512, 100, 1024, 32, 64), "tiny": (8, 10, 40, 4, 4)}
ROWS_DRAWN = 2**16
MOST_TABLE_BYTES = 2**35
LOOKUPS = 200_000


def bytes_of_table(size: str) -> int:
    return 2**20 if size == "tiny" else min(available_bytes() // 4, MOST_TABLE_BYTES)


def make_config(size: str, layer_ids: list[int], table_bytes: int) -> EngramMoEConfig:
    """A dense backbone, with a memory whose tables are about as large as asked for."""
    # FP8 takes a byte a number and one for each 32 of them; two orders of heads.
    rows_of_head = max(101, int(table_bytes / (2 * HEADS * HEAD_DIM * 33 / 32)))
    return EngramMoEConfig(
        **SIZES[size],
        num_key_value_heads=SIZES[size]["num_attention_heads"],
        first_k_dense_replace=SIZES[size]["num_hidden_layers"],
        q_lora_rank=None,
        hc_mult=1,
        pad_token_id=0,
        eos_token_id=None,
        engram_layer_ids=layer_ids,
        engram_vocab_size=rows_of_head,
        engram_n_heads=HEADS,
        engram_head_dim=HEAD_DIM,
        engram_table_dtype=FORMAT,
        engram_compressed_vocab_size=None,
    )


def build(config: EngramMoEConfig, device: str) -> EngramMoEForCausalLM:
    """Random weights on the device, random rows in host memory."""
    with torch.device(device), tables_without_blocks():
        model = EngramMoEForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for table in model.model.tables():
        drawn = table.stored_as.encode(torch.randn(ROWS_DRAWN, HEAD_DIM))
        shapes = [block.shape for block in table.block_records]
        blocks = [torch.empty(shape, dtype=torch.uint8, device="cpu") for shape in shapes]
        for block in tqdm(blocks, desc="Filling the table", leave=False):
            for part in block.split(ROWS_DRAWN):
                part.copy_(drawn[: len(part)])
        table.blocks.extend(nn.Parameter(block, requires_grad=False) for block in blocks)
        for block in table.block_records:
            block.place(HOST)
    return model


@torch.no_grad()
def check(table: EngramTable, device: str) -> None:
    """Raise unless a lookup gives the rows that are in host memory, with a prefetch and without one."""
    row_ids = torch.stack([torch.randint(rows, (1, 100)) for rows in table.head_rows.tolist()], dim=-1)
    keys = (row_ids + table.first_rows_of_heads.cpu()).flatten()
    firsts = [block.first_row for block in table.block_records]
    rows = []
    for key in keys.tolist():
        number = bisect.bisect_right(firsts, key) - 1
        rows.append(table.blocks[number][key - firsts[number]])
    expected = table.stored_as.decode(torch.stack(rows), HEAD_DIM)
    for is_prefetched in (False, True):
        on_device = row_ids.to(device, copy=True)
        if is_prefetched:
            table.prefetch(on_device)
        if not torch.equal(table(on_device).cpu().view(-1, HEAD_DIM), expected):
            way = "with" if is_prefetched else "without"
            raise RuntimeError(f"The rows on the device {way} a prefetch are not those in host memory; stopped.")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work, device: str, times: int = 5) -> float:
    """The median of a few calls after one that warms up."""
    found = []
    for _ in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[1:])


def time_sums(device: str, lookups: int) -> Table:
    """Adding up the gradients of lookups, by the two kernels of torch that can."""
    gradients, rows = torch.randn(lookups, HEAD_DIM, device=device), []
    for name, ids in {
        "all distinct": torch.randperm(lookups, device=device),
        "all equal": torch.zeros(lookups, dtype=torch.int64, device=device),
    }.items():
        groups = group(ids)
        count = len(groups.distinct)

        def of_embedding(back=groups.back, count=count):
            return torch.ops.aten.embedding_dense_backward(gradients, back, count, -1, False)

        exact = torch.zeros(count, HEAD_DIM, dtype=torch.float64, device=device)
        exact.index_add_(0, groups.back, gradients.double())
        for sums in (groups.sum(gradients), of_embedding()):
            torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=0.1)
        rows.append([name, milliseconds(partial(groups.sum, gradients), device), milliseconds(of_embedding, device)])
    columns = {"row ids": "", "embedding_bag, ms": ",.2f", "embedding_dense_backward, ms": ",.2f"}
    return Table(columns, rows, title=f"Gradients of {lookups:,} lookups, added up")


@torch.no_grad()
def tokens_a_second(model: EngramMoEForCausalLM, size: str, seed: int, share: float = 1.0) -> float:
    """Of `share` of the sequences, spread over all lengths."""
    count, shortest, longest, written, batch_size = WORK[size]
    count = max(batch_size, int(count * share))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).sort()[0]
    tokens, start = 0, time.perf_counter()
    for batch in lengths.split(batch_size):
        ids = torch.randint(3, SIZES[size]["vocab_size"], (len(batch), int(batch.max())), generator=generator)
        mask = torch.arange(ids.shape[1]) >= (ids.shape[1] - batch).unsqueeze(1)
        prompt = {"input_ids": ids.where(mask, 0).to(model.device), "attention_mask": mask.long().to(model.device)}
        model.generate(**prompt, max_new_tokens=written, do_sample=False)
        tokens += int(batch.sum()) + written * len(batch)
    synchronize(model.device.type)
    return tokens / (time.perf_counter() - start)


def compare(size: str, device: str, rounds: int, until: float) -> list:
    """A row of the results: both models of a size in turns, until the rounds or the seconds are over."""
    table_bytes = bytes_of_table(size)
    configs = {name: make_config(size, ids, table_bytes) for name, ids in {"without": [], "with": [1]}.items()}
    models = {name: build(config, device) for name, config in configs.items()}
    (table,) = models["with"].model.tables()
    check(table, device)
    for model in models.values():
        # The longest batch too, whose memory the allocator keeps.
        tokens_a_second(model, size, seed=0, share=0.25)
    rates: dict[str, list[float]] = {name: [] for name in models}
    for round_ in tqdm(range(1, rounds + 1), desc=size, leave=False):
        started = time.perf_counter()
        # Who begins is another one each time.
        for name in list(models)[:: 1 if round_ % 2 else -1]:
            rates[name].append(tokens_a_second(models[name], size, seed=round_))
        if 2 * time.perf_counter() - started > until:
            break
    plain, remembering = (statistics.median(rates[name]) for name in models)
    parameters, gib = count_parameters(configs["without"]).total, table.num_rows * table.row_nbytes / 2**30
    return [parameters / 1e9, gib, len(rates["with"]), plain, remembering, 1 - remembering / plain]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["4b", "8b"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600, help="no round begins that would end later")
    add_results_argument(parser)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.sizes != ["tiny"]:
        print("There is no GPU here: nothing is measured. (--sizes tiny runs anywhere.)")
        return
    results = Results("A table in host memory beside a GPU", about(__doc__))
    start, rows = time.perf_counter(), []
    for number, size in enumerate(arguments.sizes, start=1):
        until = start + arguments.seconds * number / len(arguments.sizes)
        rows.append(compare(size, device, arguments.rounds, until))
        # The models are gone with the function, and their memory goes back before the next size asks for its own.
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    columns = {
        "backbone, billion parameters": ".1f",
        "table, GiB": ".1f",
        "rounds": "d",
        "tokens a second without": ",.0f",
        "tokens a second with memory": ",.0f",
        "penalty": ".1%",
    }
    results.tables = [Table(columns, rows), time_sums(device, LOOKUPS if device == "cuda" else 2000)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

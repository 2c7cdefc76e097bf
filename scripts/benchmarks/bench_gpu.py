"""How many tokens a second a dense backbone on a GPU loses to a memory layer whose table is in host memory.

    python scripts/benchmarks/bench_gpu.py                   about ten minutes on one GPU of 80 GB
    python scripts/benchmarks/bench_gpu.py --sizes tiny      a minute on any machine, to see that it runs

Backbones of 4 and of 8 billion parameters with random weights, each with and without a memory layer at index 1. Its
rows in FP8 take half of the free host memory. The models read 512 sequences of 100 to 1,024 tokens, in batches of
similar length, and generate 32 tokens for each. The rows that a lookup brings to the GPU are compared with those in
host memory before anything is timed. The paper reports penalties of 1.9 % and 2.8 % for tables of 100 billion
parameters on an H800.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, count_parameters
from engram_hf.modeling.table import EngramTable, tables_without_blocks
from engram_hf.modeling.table_blocks import HOST


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


def free_host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


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
        blocks = [torch.empty(shape, dtype=torch.uint8, pin_memory=device == "cuda") for shape in shapes]
        for block in tqdm(blocks, desc="Filling the table", leave=False):
            for part in block.split(ROWS_DRAWN):
                part.copy_(drawn[: len(part)])
        table.blocks.extend(nn.Parameter(block, requires_grad=False) for block in blocks)
        for block in table.block_records:
            block.tier = HOST
    return model


def check(table: EngramTable, device: str) -> None:
    """Raise unless a lookup gives the rows that are in host memory."""
    row_ids = torch.stack([torch.randint(rows, (1, 100)) for rows in table.head_rows.tolist()], dim=-1)
    keys = row_ids.flatten(0, 1) + table.first_rows_of_heads.cpu()
    expected = table.stored_as.decode(table.gather_rows(keys.flatten().sort()[0]), HEAD_DIM)
    found = table(row_ids.to(device)).cpu().view(-1, HEAD_DIM)[keys.flatten().argsort()]
    if not torch.equal(found, expected):
        raise RuntimeError("The rows on the device are not those in host memory; nothing is timed.")


@torch.no_grad()
def tokens_a_second(model: EngramMoEForCausalLM, size: str, seed: int) -> float:
    count, shortest, longest, written, batch_size = WORK[size]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).sort()[0]
    tokens, start = 0, time.perf_counter()
    for batch in lengths.split(batch_size):
        ids = torch.randint(3, SIZES[size]["vocab_size"], (len(batch), int(batch.max())), generator=generator)
        mask = torch.arange(ids.shape[1]) >= (ids.shape[1] - batch).unsqueeze(1)
        prompt = {"input_ids": ids.where(mask, 0).to(model.device), "attention_mask": mask.long().to(model.device)}
        model.generate(**prompt, max_new_tokens=written, do_sample=False)
        tokens += int(batch.sum()) + written * len(batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["4b", "8b"])
    parser.add_argument("--rounds", type=int, default=3)
    add_results_argument(parser)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.sizes != ["tiny"]:
        print("There is no GPU here: nothing is measured. (--sizes tiny runs anywhere.)")
        return
    results = Results("A table in host memory beside a GPU", about(__doc__))
    rows = []
    for size in arguments.sizes:
        table_bytes = 2**20 if size == "tiny" else free_host_bytes() // 2
        configs = {name: make_config(size, ids, table_bytes) for name, ids in {"without": [], "with": [1]}.items()}
        models = {name: build(config, device) for name, config in configs.items()}
        (table,) = models["with"].model.tables()
        check(table, device)
        rates: dict[str, list[float]] = {name: [] for name in models}
        for round_ in tqdm(range(arguments.rounds + 1), desc=size, leave=False):
            for name, model in models.items():
                rate = tokens_a_second(model, size, seed=round_)
                # The first round warms up.
                rates[name] += [rate] * (round_ > 0)
        plain, remembering = (statistics.median(rates[name]) for name in models)
        parameters, gib = count_parameters(configs["without"]).total, table.num_rows * table.row_nbytes / 2**30
        rows.append([parameters / 1e9, gib, plain, remembering, 1 - remembering / plain])
        del models, model, table
    columns = {
        "backbone, billion parameters": ".1f",
        "table, GiB": ".1f",
        "tokens a second without": ",.0f",
        "tokens a second with memory": ",.0f",
        "penalty": ".1%",
    }
    results.tables = [Table(columns, rows)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

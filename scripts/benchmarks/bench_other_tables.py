"""Tables of somebody else's model on tiers: lookup, decoding and loading against stock transformers.

    python scripts/benchmarks/bench_other_tables.py         three minutes on 2 cores; writes 2 GB and removes them

A tiny Qwen3.8-Flash-Next (`qwen4_exp`) has one n-gram table of 2 GB in 128 parts. All ways must give the same bits
before anything is timed. A lookup is of 2,048 tokens, 16 rows each; shown is the median of interleaved rounds. Loads
run each in a process of its own, with the files out of the page cache; what a process reads from the disk is what the
kernel counts for it. "Cold" decoding begins with the files out of the
page cache.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen4ExpForCausalLM, Qwen4ExpTextConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import forget
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import load_with_tables, place_tables


TABLE = "model.layers.1.ple.ple_embedding.ngram_embedding"
ROWS_OF_2_GB = 390_000
ROUNDS, TOKENS, NEW_TOKENS = 15, 2048, 32
LOAD = """
import json, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM
from engram_hf import load_with_tables
way, folder = sys.argv[1:]
def figure(file, name):
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(name)).split()[1])
before, read = 1024 * figure("/proc/self/status", "VmHWM"), figure("/proc/self/io", "read_bytes")
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder) if way == "stock" else load_with_tables(folder, "cpu+disk")
seconds = time.perf_counter() - start
read = figure("/proc/self/io", "read_bytes") - read
print(json.dumps({"seconds": seconds, "peak": 1024 * figure("/proc/self/status", "VmHWM") - before, "read": read}))
"""


def build(folder: Path, rows_of_head: int) -> None:
    """A model whose table has 16 hash heads of rows 160 wide, as the published one, with random rows."""
    config = Qwen4ExpTextConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        ple_layer_ids=[2],
        ple_embed_dim=2560,
        ngram_vocab_size_base=rows_of_head,
        split_ngram_parts=128,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=32,
        indexer_budget=64,
        indexer_compress_ratio=4,
        hc_count=2,
        hc_lowrank=8,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    with torch.device("meta"):
        model = Qwen4ExpForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(min(parameter.numel(), 2**20))
            for part in parameter.view(-1).split(2**20):
                part.copy_(noise[: len(part)])
    model.save_pretrained(folder, max_shard_size="1GB")


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(way: str, folder: Path) -> dict:
    drop_from_page_cache(folder)
    run = subprocess.run([sys.executable, "-c", LOAD, way, str(folder)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


@torch.no_grad()
def time_lookups(ways: dict, ids: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a lookup, by way."""
    expected = next(iter(ways.values()))(ids)
    if not all(torch.equal(way(ids), expected) for way in ways.values()):
        raise RuntimeError("the ways do not give the same rows")
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way(ids)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(each) for name, each in seconds.items()}


def time_decoding(model, ids: torch.Tensor, is_cold: bool) -> float:
    """Milliseconds a token, the median of three runs."""
    found = []
    for _ in range(3):
        if is_cold:
            blocks = [block for table in model.named_tables().values() for block in table.block_records]
            forget(list({block.source.file for block in blocks}))
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(1000 * (time.perf_counter() - start) / NEW_TOKENS)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--rows-of-head", type=int, default=ROWS_OF_2_GB, help=f"(default: {ROWS_OF_2_GB})")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Tables of other models", about(__doc__))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        build(folder, arguments.rows_of_head)
        loads = {
            way: sorted((load(way, folder) for _ in range(3)), key=lambda one: one["seconds"])[1]
            for way in ("stock", "served from disk")
        }
        prompt = torch.randint(3, 1000, (1, 64))
        stock = AutoModelForCausalLM.from_pretrained(folder)
        on_disk, in_ram = load_with_tables(folder, "cpu+disk"), load_with_tables(folder, "cpu+disk")
        place_tables(in_ram, {"...ngram_embedding": "host"})
        with torch.no_grad():
            if not torch.equal(stock(prompt).logits, on_disk(prompt).logits):
                raise RuntimeError("the logits are not the same")
        ids = torch.randint(0, stock.get_submodule(TABLE).num_embeddings, (1, TOKENS, 16))
        models = {"nn.Embedding, in RAM": stock, "host": in_ram, "disk, warm": on_disk}
        lookups = time_lookups({way: model.get_submodule(TABLE) for way, model in models.items()}, ids)
        decoding = {"stock, in RAM": time_decoding(stock, prompt, False)}
        del stock, in_ram, models
        gc.collect()
        decoding["disk, warm"] = time_decoding(on_disk, prompt, False)
        decoding["disk, cold, with prefetch"] = time_decoding(on_disk, prompt, True)
        for module in on_disk.modules():
            if hasattr(module, "tables_to_prefetch"):
                module.tables_to_prefetch = []
        decoding["disk, cold, without"] = time_decoding(on_disk, prompt, True)
        nbytes = sum(table.nbytes for table in on_disk.engram_tables())
    base, first = loads["stock"]["seconds"], next(iter(lookups.values()))
    begin = next(iter(decoding.values()))
    results.tables = [
        Table(
            {"lookup of 2,048 tokens": "", "ms": ".2f", "time to nn.Embedding": ".2f"},
            [[name, ms, ms / first] for name, ms in lookups.items()],
        ),
        Table(
            {"decoding": "", "ms a token": ".2f", "time to stock": ".2f"},
            [[name, ms, ms / begin] for name, ms in decoding.items()],
        ),
        Table(
            {
                "load, cold": "",
                "seconds": ".2f",
                "time to stock": ".3f",
                "memory at most, MB": ",.0f",
                "read from disk, MB": ",.1f",
                "of the table": ".2%",
            },
            [
                [
                    name,
                    one["seconds"],
                    one["seconds"] / base,
                    one["peak"] / 1e6,
                    one["read"] / 1e6,
                    one["read"] / nbytes,
                ]
                for name, one in loads.items()
            ],
        ),
    ]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

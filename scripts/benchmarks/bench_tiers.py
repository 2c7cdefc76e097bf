"""Decode and prefill of one model with its tables resident, in host memory and on disk, side by side.

    python scripts/benchmarks/bench_tiers.py         about four minutes on 2 cores; writes 5 GB and removes them

The backbone has about 140M active parameters and 16 layers, of which 1 and 14 have a memory. While a token is decoded,
its rows can be read during the layers before the memory layer only. All tiers must give the same bits before anything
is timed. Times are medians over interleaved rounds. "Cold" means that the tables' files are out of the page cache and
that no round asks for another one's rows.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.made_tables import forget
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM


CONFIG = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "kv_lora_rank": 256,
    "intermediate_size": 3072,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "hc_mult": 1,
    "engram_layer_ids": [1, 14],
    "engram_vocab_size": 400_000,
    "engram_head_dim": 64,
    "engram_compressed_vocab_size": None,
}
PREFILL_TOKENS = 1024
STEPS = 12
RESIDENT, HOST, WARM, COLD, COLD_BARE, NONE = (
    "resident",
    "host",
    "disk, warm",
    "disk, cold, with prefetch",
    "disk, cold, without",
    "no memory layers",
)


def forget_tables(models: dict) -> None:
    """Take the files of all tables out of the page cache, whichever model has them mapped."""
    tables = [table for model in models.values() for table in model.model.tables()]
    forget([block.source.file for table in tables for block in table.block_records if block.source is not None])


def decode_seconds(model, ids: torch.Tensor) -> float:
    """Seconds of one step, the median over the steps after a prompt of 8 tokens. ids: (batch, 8 + STEPS)."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], cache=cache)
    times = []
    for t in range(8, ids.shape[1]):
        start = time.perf_counter()
        model(ids[:, t : t + 1], cache=cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prefill_seconds(model, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, logits_to_keep=1, use_cache=False)
    return time.perf_counter() - start


def reading_seconds(model, ids: torch.Tensor) -> float:
    """Of reading all rows that a prefill asks for, and nothing else."""
    row_ids = model.model.ngram_hash(ids).row_ids.values()
    start = time.perf_counter()
    for table, rows in zip(model.model.tables(), row_ids, strict=True):
        table(rows)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    rows_of_head = CONFIG["engram_vocab_size"]
    parser.add_argument("--rows-of-head", type=int, default=rows_of_head, help=f"(default: {rows_of_head})")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Inference by tier", about(__doc__))
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        config = EngramMoEConfig(**{**CONFIG, "engram_vocab_size": arguments.rows_of_head})
        built = EngramMoEForCausalLM(config)
        for layer in built.model.memory_layers():
            # It starts at zero, which would hide differences between tiers.
            torch.nn.init.normal_(layer.engram.conv.weight, std=0.1)
        names = [table.name for table in built.engram_tables()]
        built.save_pretrained(folder)
        del built
        none = EngramMoEForCausalLM(EngramMoEConfig(**{**CONFIG, "engram_layer_ids": []})).eval()
        none.save_pretrained(folder + "/none")
        on_disk = {"": "cpu", **dict.fromkeys(names, "disk")}
        maps = {RESIDENT: None, HOST: {"": "cpu", **dict.fromkeys(names, "cpu")}}
        models = {name: AutoModelForCausalLM.from_pretrained(folder, device_map=maps[name]) for name in maps}
        for table in models[RESIDENT].model.tables():
            # Mapped blocks would keep the pages of the files in the page cache.
            for block in table.blocks:
                block.data = block.data.clone()
        for name in (WARM, COLD, COLD_BARE):
            models[name] = AutoModelForCausalLM.from_pretrained(folder, device_map=on_disk)
        models[NONE] = none
        for table in models[COLD_BARE].model.tables():
            table.prefetch = lambda row_ids, on_cpu=None: None

        ids = torch.randint(CONFIG["vocab_size"], (2, 40))
        expected = models[RESIDENT](ids).logits
        for name in (HOST, WARM, COLD, COLD_BARE):
            if not torch.equal(models[name](ids).logits, expected):
                raise RuntimeError(f"{name} gives other logits than resident; nothing is timed.")

        lengths = {"decode, 1 sequence": (1, 8 + STEPS), "decode, 8 sequences": (8, 8 + STEPS)}
        shapes = {**lengths, "prefill": (1, PREFILL_TOKENS)}
        times: dict[tuple[str, str], list[float]] = {}
        reading = []
        for _ in tqdm(range(arguments.rounds), desc="Rounds"):
            for what, shape in shapes.items():
                measure = prefill_seconds if what == "prefill" else decode_seconds
                for name, model in models.items():
                    ids = torch.randint(CONFIG["vocab_size"], shape)
                    if name in (COLD, COLD_BARE):
                        forget_tables(models)
                    elif name != NONE:
                        # The rows of these ids, in memory and in the page cache.
                        reading_seconds(model, ids)
                    times.setdefault((what, name), []).append(measure(model, ids))
            ids = torch.randint(CONFIG["vocab_size"], shapes["prefill"])
            forget_tables(models)
            reading.append(reading_seconds(models[COLD], ids))

    columns = {"tables": ""}
    for what in shapes:
        columns |= {f"{what}, ms": ",.1f", f"{what}, time to resident": ".3f"}
    rows = []
    for name in models:
        row = [name]
        for what in shapes:
            ratios = [a / b for a, b in zip(times[what, name], times[what, RESIDENT], strict=True)]
            row += [1e3 * statistics.median(times[what, name]), statistics.median(ratios)]
        rows.append(row)
    larger = max(statistics.median(reading), statistics.median(times["prefill", RESIDENT]))
    note = (
        "Ratios are medians of the ratios of each round. A cold prefill takes "
        f"{statistics.median(times['prefill', COLD]) / larger:.3f} of the larger of computing and reading "
        f"({1e3 * statistics.median(reading):,.0f} ms)."
    )
    results.tables = [Table(columns, rows, note=note)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

"""What the memory costs at inference: one model with and without it, and the hash alone, side by side.

    python scripts/benchmarks/bench_memory.py        about a minute on 2 cores

Decoding with a cache must give the logits of the plain forward before anything is timed. Ratios are of medians over
interleaved rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM


SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 128,
    "engram_vocab_size": 100_000,
    "engram_head_dim": 32,
    "engram_compressed_vocab_size": None,
}
PREFILL_TOKENS = 1024
DECODE_TOKENS = 16


def build(**overrides) -> EngramMoEForCausalLM:
    torch.manual_seed(0)
    model = EngramMoEForCausalLM(EngramMoEConfig(**{**SIZES, **overrides})).eval()
    for layer in model.model.memory_layers():
        torch.nn.init.normal_(layer.engram.conv.weight, std=0.1)
    return model


def check(model: EngramMoEForCausalLM, ids: torch.Tensor) -> None:
    """Raise unless decoding with a cache gives the logits of the plain forward."""
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :50], cache=cache).logits]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(50, 60)]
    full = model(ids[:, :60]).logits
    difference = (torch.cat(parts, dim=1) - full).abs().max() / full.abs().max()
    if difference > 1e-5:
        raise RuntimeError(f"Cached decoding differs from the forward by {difference:.1e} of the largest logit.")


def prefill_seconds(model: EngramMoEForCausalLM, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def decode_seconds(model: EngramMoEForCausalLM, ids: torch.Tensor) -> float:
    cache = DynamicCache(config=model.config)
    model(ids[:, :64], cache=cache, logits_to_keep=1)
    start = time.perf_counter()
    for t in range(64, 64 + DECODE_TOKENS):
        model(ids[:, t : t + 1], cache=cache)
    return (time.perf_counter() - start) / DECODE_TOKENS


def hash_seconds(model: EngramMoEForCausalLM, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model.model.ngram_hash(ids)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("A model with and without memory", about(__doc__))
    ids = torch.randint(SIZES["vocab_size"], (1, PREFILL_TOKENS))
    models = {
        "without memory": build(engram_layer_ids=[]),
        "2 memory layers": build(engram_layer_ids=[1, 5]),
        "2 memory layers, a block per head": build(engram_layer_ids=[1, 5], engram_block_elements=1),
    }
    for name, model in models.items():
        if name != "without memory":
            check(model, ids)

    measures = {"prefill": prefill_seconds, "decode": decode_seconds}
    seconds: dict[tuple[str, str], list[float]] = {(name, what): [] for name in models for what in measures}
    hashing = []
    for _ in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for name, model in models.items():
            for what, measure in measures.items():
                seconds[name, what].append(measure(model, ids))
        hashing.append(hash_seconds(models["2 memory layers"], ids))

    # The first round warms up.
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    rows = []
    for name in models:
        prefill, decode = median[name, "prefill"], median[name, "decode"]
        base = [median["without memory", what] for what in ("prefill", "decode")]
        rows.append([name, 1e3 * prefill, prefill / base[0], 1e3 * decode, decode / base[1]])
    columns = {
        "model": "",
        f"prefill of {PREFILL_TOKENS} tokens, ms": ".0f",
        "prefill, time to no memory": ".2f",
        "decode step, ms": ".1f",
        "decode, time to no memory": ".2f",
    }
    share = statistics.median(hashing[1:]) / median["2 memory layers", "prefill"]
    note = f"Hashing takes {share:.1%} of the prefill with 2 memory layers."
    results.tables = [Table(columns, rows, note=note)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

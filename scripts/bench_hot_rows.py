"""Hit rate against the number of hot rows, on real text: a curve as CSV and PNG.

    python scripts/bench_hot_rows.py       a minute on 2 cores; writes output/hot_rows.csv and .png

The text is the Python standard library's: prose (pydoc_data and docstrings, as far as files of text go) and code, in
the order of its files, in lookups of 2,048 tokens. Two orders of eight heads each; every cache is asked the same.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from gather_text import DATASET_HELP, gather_documents, load_documents, train_tokenizer
from tqdm import tqdm

from engram_hf import EngramMoEConfig, NgramHash, build_token_map
from engram_hf.modeling.hot_rows import HotRows


TOKENS_OF_A_LOOKUP = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the text (default 1,000,000)")
    parser.add_argument("--rows-of-head", type=int, default=2_262_400)
    parser.add_argument("--output", type=Path, default=Path("output/hot_rows.csv"))
    arguments = parser.parse_args()
    documents = load_documents(arguments.dataset) if arguments.dataset else gather_documents()
    tokenizer = train_tokenizer(documents, 32_000)
    token_map = build_token_map(tokenizer).numpy()
    ids: list[int] = []
    for _, text in tqdm(documents, desc="Tokenizing"):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= arguments.tokens:
            break
    compressed = token_map[np.array(ids[: arguments.tokens])]
    config = EngramMoEConfig(
        vocab_size=len(tokenizer),
        engram_layer_ids=[1],
        engram_vocab_size=arguments.rows_of_head,
        engram_compressed_vocab_size=int(token_map.max()) + 1,
        engram_pad_token_id=0,
    )
    hashing = NgramHash.from_config(config, int(token_map[0]))
    row_ids = hashing.row_ids(1, torch.from_numpy(compressed).unsqueeze(0))[0].numpy()
    primes = np.array(hashing.primes(1)).reshape(-1)
    keys = row_ids + np.concatenate([[0], np.cumsum(primes)[:-1]])

    sizes = [2**power for power in range(10, 25, 2)]
    lines = []
    for size in tqdm(sizes, desc="Sizes"):
        cache = HotRows(size, 1, torch.uint8)
        for start in range(0, len(keys), TOKENS_OF_A_LOOKUP):
            part = keys[start : start + TOKENS_OF_A_LOOKUP].reshape(-1)
            rows = cache.lookup(part, lambda missing: torch.from_numpy((missing % 251).astype(np.uint8)[:, None]))
            if not np.array_equal(rows[:, 0].numpy(), (part % 251).astype(np.uint8)):
                raise RuntimeError("The cache gives other rows than were read; nothing is counted.")
        lines.append((size, cache.hits / (cache.hits + cache.misses), cache.bytes_read))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["hot_rows", "hit_rate", "distinct_rows_read"])
        writer.writerows(lines)
    distinct = len(np.unique(keys))
    print(
        f"\n{len(compressed):,} tokens, {keys.size:,} rows asked for, {distinct:,} of them different "
        f"(a cache that never forgets hits {1 - distinct / keys.size:.3f})"
    )
    print("| hot rows | hit rate |\n|---|---|")
    for size, rate, _ in lines:
        print(f"| {size:,} | {rate:.3f} |")

    import matplotlib.pyplot as plt

    plt.semilogx([line[0] for line in lines], [line[1] for line in lines], marker="o")
    plt.axhline(1 - distinct / keys.size, linestyle="--", label="a cache that never forgets")
    plt.xlabel("hot rows")
    plt.ylabel("hit rate")
    plt.legend()
    plt.savefig(arguments.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

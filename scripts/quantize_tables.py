"""Quantize the tables of a checkpoint, block by block, and print the loss before and after.

    python scripts/quantize_tables.py output/tiny output/tiny-int8 --format int8      half a minute

The loss is that of held-out text: the Python standard library's by default, as scripts/train_tiny.py holds it out.
"""

import argparse
from pathlib import Path

import torch
from gather_text import DATASET_HELP, gather_documents, load_documents, packed_dataset, split_documents
from tiny_recipe import SEQ_LENGTH, held_out_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_hf import quantize_tables
from engram_hf.modeling.table_formats import QUANTIZED_FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a checkpoint, with its tokenizer")
    parser.add_argument("target", type=Path, help="folder for the quantized one")
    parser.add_argument("--format", choices=QUANTIZED_FORMATS, default="float8_e4m3fn")
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of 128 tokens (default 64)")
    arguments = parser.parse_args()

    quantize_tables(arguments.source, arguments.target, arguments.format)
    documents = load_documents(arguments.dataset) if arguments.dataset else gather_documents()
    _, held_out = split_documents(documents)
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    rows = packed_dataset(tokenizer, held_out, SEQ_LENGTH)
    rows = rows.select(range(min(arguments.rows, len(rows))))
    print("| tables | bytes | held-out loss |\n|---|---|---|")
    for folder in (arguments.source, arguments.target):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tables = model.engram_tables()
        with torch.no_grad():
            loss = held_out_loss(model, rows)
        print(f"| {tables[0].dtype} | {sum(table.nbytes for table in tables):,} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()

"""What quantized tables cost: bytes of the tables, and held-out loss, for each row format.

    python scripts/benchmarks/bench_quantized.py output/tiny      a minute on 2 cores; `make demo` trains output/tiny

The held-out text is that of scripts/train_tiny.py: documents of the Python standard library that the demo's model has
not been trained on.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.memory_probes import probe
from helpers.results import Results, Table, about, add_results_argument
from helpers.text import DATASET_HELP, gather_documents, load_documents, packed_dataset, split_documents
from helpers.tiny_recipe import HELD_OUT_ROWS, SEQ_LENGTH

from engram_hf import quantize_tables
from engram_hf.modeling.table_formats import QUANTIZED_FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a checkpoint, with its tokenizer")
    parser.add_argument("--dataset", help=f"{DATASET_HELP} (default: the Python standard library)")
    rows_help = f"held-out rows of {SEQ_LENGTH} tokens (default: {HELD_OUT_ROWS})"
    parser.add_argument("--rows", type=int, default=HELD_OUT_ROWS, help=rows_help)
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Quantized tables", about(__doc__))
    documents = load_documents(arguments.dataset) if arguments.dataset else gather_documents()
    _, held_out = split_documents(documents)
    data = packed_dataset(AutoTokenizer.from_pretrained(arguments.source), held_out, SEQ_LENGTH).shuffle(seed=0)
    data = data.select(range(min(arguments.rows, len(data))))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folders = {"as trained": arguments.source}
        for row_format in QUANTIZED_FORMATS:
            folders[row_format] = Path(name) / row_format
            quantize_tables(arguments.source, folders[row_format], row_format)
        for row_format, folder in folders.items():
            model = AutoModelForCausalLM.from_pretrained(folder)
            nbytes = sum(table.nbytes for table in model.engram_tables())
            rows.append([row_format, nbytes, probe(model, data)[0]])
    trained = rows[0]
    rows = [[name, nbytes, nbytes / trained[1], loss, loss - trained[2]] for name, nbytes, loss in rows]
    columns = {
        "tables": "",
        "bytes": ",",
        "of the trained": ".3f",
        "held-out loss": ".4f",
        "difference": "+.4f",
    }
    results.tables = [Table(columns, rows)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

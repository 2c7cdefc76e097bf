"""Bytes and seconds of a training checkpoint, which holds changed rows only, against a full save.

    python scripts/benchmarks/bench_checkpoints.py         two minutes on 2 cores, 6 GB of RAM, 8 GB of disk

The table has 1.3 GB (5 million rows of 64). A step sees 2,048 tokens of Python's standard library, and every 20 steps
there is a checkpoint. The last one is loaded and compared with the model, bit for bit, before anything is shown.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument
from helpers.text import gather_documents, packed_dataset, train_tokenizer
from helpers.timed_training import BATCH, CONFIG, SEQ

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, engram_optimizers, merge_changed_rows


CHECKPOINTS, STEPS_BETWEEN = 4, 20


def own_bytes(folder: Path) -> int:
    """Of files that have no other name: a linked table is counted where it was written."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.stat().st_nlink == 1)


class TimedTrainer(Trainer):
    """The stock Trainer, which also counts the seconds of each checkpoint."""

    seconds: list[float]

    def _save_checkpoint(self, *args, **kwargs):
        start = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--rows-of-head", type=int, default=312_500, help="16 heads (default: 312500)")
    parser.add_argument("--row-optimizer", default="adam", choices=("adam", "rowwise_adam", "adagrad", "sgd"))
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Training checkpoints", about(__doc__))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    documents = gather_documents()
    tokenizer = train_tokenizer(documents, CONFIG["vocab_size"])
    data = packed_dataset(tokenizer, documents, SEQ).shuffle(seed=0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = EngramMoEConfig(**CONFIG, engram_layer_ids=[1], engram_vocab_size=arguments.rows_of_head)
        EngramMoEForCausalLM(config).save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        args = TrainingArguments(
            str(folder / "run"),
            max_steps=CHECKPOINTS * STEPS_BETWEEN,
            save_steps=STEPS_BETWEEN,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        optimizers = engram_optimizers(args, arguments.row_optimizer)
        trainer = TimedTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizers)
        trainer.seconds = []
        trainer.train()
        last = folder / "run" / f"checkpoint-{CHECKPOINTS * STEPS_BETWEEN}"
        loaded = AutoModelForCausalLM.from_pretrained(last).state_dict()
        wrong = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, loaded[key])]
        if wrong:
            raise RuntimeError(f"the last checkpoint is not the model: {wrong[:3]}")
        rows = []
        for number, seconds in enumerate(trainer.seconds, 1):
            own = own_bytes(folder / "run" / f"checkpoint-{number * STEPS_BETWEEN}")
            rows.append([f"checkpoint {number}: changed rows and their state", own / 1e6, seconds])
        start = time.perf_counter()
        model.save_pretrained(folder / "full")
        torch.save([rows.state for rows in trainer.optimizer.optimizer.rows.values()], folder / "full" / "optimizer.pt")
        seconds = time.perf_counter() - start
        rows.append(["all rows and the state of all rows", own_bytes(folder / "full") / 1e6, seconds])
        start = time.perf_counter()
        merge_changed_rows(last, folder / "merged")
        seconds = time.perf_counter() - start
        rows.append(["merging the last checkpoint", own_bytes(folder / "merged") / 1e6, seconds])
    results.tables = [Table({"what is saved": "", "MB written": ",.0f", "seconds": ".2f"}, rows)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

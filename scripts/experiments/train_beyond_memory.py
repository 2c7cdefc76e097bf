"""Train a table that has, with its optimizer state, three times as many bytes as there is memory.

    python scripts/experiments/train_beyond_memory.py        eight minutes on 2 cores, 6 GB of RAM and disk; needs root

A memory cgroup, which counts the page cache too, limits the process that trains on disk to a third of table and state.
(Where no cgroup can be made, the rest of the machine's memory is locked instead.) A second process trains the same
table resident and without a limit. Both see the same text in the same order with one thread each, so that their losses
must be the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.memory_limit import limited_memory
from helpers.results import Results, Table, about, add_results_argument
from helpers.timed_training import CONFIG, TABLE, made_arguments

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, EngramPrefetchCallback, engram_optimizers


# 16 heads of 400,000 rows of 64 have 1.6 GB, and lazy Adam's state has twice as much.
ROWS_OF_HEAD = 400_000
STEPS, BATCH, SEQ, EVERY = 200, 8, 128, 10

# What Python, torch and transformers need by themselves.
LEAST_BYTES = 1_000_000_000


def train(folder: Path, tier: str, steps: int) -> None:
    """In a process of its own: print losses and seconds."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    device_map = {"": "cpu", TABLE: "disk"} if tier == "disk" else None
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    # What can be learnt are the n-grams of a few thousand random sentences.
    generator = torch.Generator().manual_seed(0)
    sentences = torch.randint(0, CONFIG["vocab_size"], (4000, SEQ), generator=generator)
    order = torch.randint(0, len(sentences), (steps * BATCH,), generator=generator)
    args = made_arguments(
        folder / "run", steps, per_device_train_batch_size=BATCH, learning_rate=2e-3, logging_steps=EVERY
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": sentences[i], "labels": sentences[i]} for i in order],
        callbacks=[EngramPrefetchCallback()],
        optimizer_cls_and_kwargs=engram_optimizers(args, work_folder=folder / "work"),
    )
    start = time.perf_counter()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps([losses, time.perf_counter() - start]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    parser.add_argument("--rows-of-head", type=int, default=ROWS_OF_HEAD, help=f"(default: {ROWS_OF_HEAD})")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    add_results_argument(parser)
    arguments = parser.parse_args()
    if arguments.train:
        folder, tier, steps = arguments.train
        return train(Path(folder), tier, int(steps))
    measured = Results("Training with less memory than the table needs", about(__doc__))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = EngramMoEConfig(**CONFIG, engram_layer_ids=[1], engram_vocab_size=arguments.rows_of_head)
        model = EngramMoEForCausalLM(config)
        table_bytes = model.engram_tables()[0].nbytes
        model.save_pretrained(folder)
        del model
        # Lazy Adam keeps two numbers for each weight of a row.
        limit = max(table_bytes, LEAST_BYTES)
        command = [sys.executable, str(Path(__file__).resolve()), "--train", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        results = {}
        with limited_memory(limit) as (how, before):
            for tier, prefix in (("disk", before), ("resident", [])):
                ran = subprocess.run(
                    [*prefix, *command, tier, str(arguments.steps)], capture_output=True, text=True, env=environment
                )
                if ran.returncode:
                    raise RuntimeError(f"training with the table {tier} failed:\n{ran.stderr[-2000:]}")
                results[tier] = json.loads(ran.stdout.splitlines()[-1])
    if results["disk"][0] != results["resident"][0]:
        raise RuntimeError("the losses differ")
    title = f"Table {table_bytes / 1e9:.2f} GB, with its state {3 * table_bytes / 1e9:.2f} GB; {how}"
    columns = {"step": "", "loss, on disk within the limit": ".6f", "loss, resident without a limit": ".6f"}
    losses = zip(*(results[tier][0] for tier in ("disk", "resident")))
    rows = [[EVERY * number, *pair] for number, pair in enumerate(losses, 1)]
    seconds = " and ".join(f"{results[tier][1]:.0f} s {tier}" for tier in ("disk", "resident"))
    measured.tables = [Table(columns, rows, title, f"{arguments.steps} steps took {seconds}.")]
    measured.write(arguments.results)


if __name__ == "__main__":
    main()

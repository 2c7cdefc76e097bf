"""Train a table that is, with its state, three times as large as the memory there is; compare with a resident one.

    python scripts/train_beyond_memory.py        about eight minutes on 2 cores, 6 GB of RAM and of disk; needs root

The process that trains on disk is held to a third of table and state by a memory cgroup, which counts the page cache
too. Where none can be made, another process locks the rest of the machine's memory. Both runs see the same rows in the
same order, in one thread each, so their losses must be the same.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_training import CONFIG, TABLE, made_arguments
from transformers import AutoModelForCausalLM, Trainer
from transformers.utils import logging

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, EngramPrefetchCallback, engram_optimizers


# 16 heads of 400,000 rows of 64: 1.6 GB, and as much again twice for lazy Adam's state.
ROWS_OF_HEAD = 400_000
STEPS, BATCH, SEQ = 200, 8, 128
CGROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))


def train(folder: Path, tier: str) -> None:
    """In a process of its own: print losses and seconds."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    device_map = {"": "cpu", TABLE: "disk"} if tier == "disk" else None
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    # Text of a kind: what is to be learnt are the n-grams of a few thousand sentences.
    generator = torch.Generator().manual_seed(0)
    sentences = torch.randint(0, CONFIG["vocab_size"], (4000, SEQ), generator=generator)
    order = torch.randint(0, len(sentences), (STEPS * BATCH,), generator=generator)
    args = made_arguments(
        folder / "run", STEPS, per_device_train_batch_size=BATCH, learning_rate=2e-3, logging_steps=10
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


@contextlib.contextmanager
def limited_memory(limit: int) -> Iterator[tuple[str, list[str]]]:
    """How memory is limited, and what stands before a command that is to run within it."""
    for root, file in CGROUPS:
        group = Path(root) / f"engram-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield (
                f"a memory cgroup of {limit / 1e9:.2f} GB",
                ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "-"],
            )
        finally:
            group.rmdir()
        return
    with open("/proc/meminfo") as file:
        available = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    locked = mmap.mmap(-1, max(available - limit, mmap.PAGESIZE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(locked))
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(locked))):
        raise SystemExit("Memory can neither be limited by a cgroup nor be locked; run this as root.")
    yield f"{len(locked) / 1e9:.1f} GB locked, {limit / 1e9:.2f} GB left", []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        return train(Path(arguments.train[0]), arguments.train[1])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = EngramMoEConfig(**CONFIG, engram_layer_ids=[1], engram_vocab_size=ROWS_OF_HEAD)
        model = EngramMoEForCausalLM(config)
        table_bytes = model.engram_tables()[0].nbytes
        model.save_pretrained(folder)
        del model
        limit = table_bytes  # of three times as much: the rows, and two numbers of state for each of their weights
        command = [sys.executable, __file__, "--train", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        results = {}
        with limited_memory(limit) as (how, before):
            print(f"table {table_bytes / 1e9:.2f} GB, with its state {3 * table_bytes / 1e9:.2f} GB; {how}", flush=True)
            for tier, prefix in (("disk", before), ("resident", [])):
                ran = subprocess.run([*prefix, *command, tier], capture_output=True, text=True, env=environment)
                if ran.returncode:
                    raise RuntimeError(f"training with the table {tier} failed:\n{ran.stderr[-2000:]}")
                results[tier] = json.loads(ran.stdout.splitlines()[-1])
    print("| step | loss, on disk within the limit | loss, resident without one |\n|---|---|---|")
    for number, (one, other) in enumerate(zip(results["disk"][0], results["resident"][0]), 1):
        print(f"| {10 * number} | {one:.6f} | {other:.6f} |")
    if results["disk"][0] != results["resident"][0]:
        raise RuntimeError("the losses differ")
    print(f"seconds for {STEPS} steps: {results['disk'][1]:.0f} on disk, {results['resident'][1]:.0f} resident")


if __name__ == "__main__":
    main()

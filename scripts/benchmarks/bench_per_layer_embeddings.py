"""Training Gemma's per-layer embeddings: dense AdamW, 8-bit AdamW and row-wise Adam, memory and time side by side.

    python scripts/benchmarks/bench_per_layer_embeddings.py    4 minutes on 2 cores; 8 GB of RAM, 5 GB of disk

With bitsandbytes installed (0.50 runs its 8-bit AdamW on a CPU) it is measured too; otherwise its rows say why not.

A small Gemma 3n has 262,144 per-layer embeddings of 256 numbers for each of its layers, in float32, as the question of
peft#3371 has them. The stock Trainer trains them and the layers; the input embeddings are frozen. A step is of 2,048
tokens, drawn by Zipf's law, and computes the loss of the last tokens of each sequence. Every way runs in a process of
its own. Memory is the most that the process had in RAM beyond what it had before the model was loaded; "of its own" is
without pages of files, which the kernel may take back. The time is the median over steps, without the first two.

Checked before a time counts: all tiers of row-wise Adam have the same losses, bit for bit, and so do all ways in their
first step. In the second step dense AdamW and row-wise Adam have the same loss to 1e-4: without weight decay their
first updates are the same. Later ones differ, since a row that no token reads keeps its momentum under row-wise Adam.
8-bit AdamW rounds its state, so nothing else is checked of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.memory_limit import MemoryWatch, own_bytes
from helpers.results import Results, Table, about, add_results_argument

from engram_hf import engram_optimizers, load_with_tables


ROWS, WIDTH, LAYERS = 262_144, 256, 4
BATCH, SEQ, STEPS, KEPT = 4, 512, 8, 16
TABLE = "embed_tokens_per_layer"
DENSE, OF_TRAINER, OF_EVERYTHING = "AdamW", "8-bit AdamW, as the Trainer sets it up", "8-bit AdamW of the table too"
BY_ROWS = {f"row-wise Adam, {tier}": tier for tier in ("resident", "host", "disk")}
WAYS = (DENSE, OF_TRAINER, OF_EVERYTHING, *BY_ROWS)


def build(folder: Path, rows: int) -> None:
    config = Gemma3nTextConfig(
        vocab_size=rows,
        vocab_size_per_layer_input=rows,
        hidden_size=64,
        hidden_size_per_layer_input=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        activation_sparsity_pattern=[0.0] * LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_kv_shared_layers=0,
        laurel_rank=8,
        altup_num_inputs=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Gemma3nForCausalLM(config).save_pretrained(folder)


class Clock(TrainerCallback):
    def __init__(self):
        self.milliseconds, self.start = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.milliseconds.append(1000 * (time.perf_counter() - self.start))


def loss_of_last_tokens(outputs, labels, **kwargs) -> torch.Tensor:
    logits = outputs.logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batches(rows: int) -> list[dict]:
    """Token ids by Zipf's law, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, rows, dtype=torch.float64)
    drawn = torch.multinomial(1 / ranks, STEPS * BATCH * SEQ, replacement=True, generator=generator) + 1
    return [{"input_ids": row} for row in drawn.view(-1, SEQ)]


def collate(features: list[dict]) -> dict:
    ids = torch.stack([each["input_ids"] for each in features])
    return {"input_ids": ids, "labels": ids[:, -KEPT:], "logits_to_keep": KEPT}


def measure(folder: Path, way: str, rows: int) -> None:
    """In a process of its own: print figures as JSON."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    data = batches(rows)
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_bnb_8bit" if way == OF_TRAINER else "adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    options: dict = {}
    before = own_bytes("VmRSS"), own_bytes("RssAnon")
    with MemoryWatch() as watched:
        if way in BY_ROWS:
            model = load_with_tables(folder, {"": "cpu", f"...{TABLE}": BY_ROWS[way]})
            options["optimizer_cls_and_kwargs"] = engram_optimizers(
                args, table_lr_scale=1.0, work_folder=folder / "work"
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        model.get_input_embeddings().requires_grad_(False)
        if way == OF_EVERYTHING:
            import bitsandbytes

            trained = [each for each in model.parameters() if each.requires_grad]
            options["optimizers"] = (
                bitsandbytes.optim.AdamW8bit(trained, lr=args.learning_rate, weight_decay=0.0),
                None,
            )
        clock = Clock()
        trainer = Trainer(
            model,
            args,
            train_dataset=data,
            data_collator=collate,
            compute_loss_func=loss_of_last_tokens,
            callbacks=[clock],
            **options,
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(
        json.dumps(
            {
                "step_ms": statistics.median(clock.milliseconds[2:]),
                "peak": own_bytes("VmHWM") - before[0],
                "own": watched.most_bytes - before[1],
                "losses": losses,
            }
        )
    )


def run(way: str, folder: Path, rows: int) -> dict | str:
    """Figures of a way, or why it has none."""
    command = [sys.executable, __file__, "--measure", way, "--folder", str(folder), "--rows", str(rows)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if ran.returncode == 0:
        return json.loads(ran.stdout.splitlines()[-1])
    if way in (OF_TRAINER, OF_EVERYTHING):
        return ran.stderr.strip().splitlines()[-1]
    raise RuntimeError(ran.stderr[-2000:])


def check(found: dict[str, dict]) -> None:
    """Raise where ways that must learn the same do not."""
    by_rows = [found[way]["losses"] for way in BY_ROWS]
    if any(losses != by_rows[0] for losses in by_rows):
        raise RuntimeError(f"the tiers do not learn the same: {by_rows}")
    if any(each["losses"][0] != by_rows[0][0] for each in found.values()):
        raise RuntimeError("the ways do not begin with the same loss")
    if abs(found[DENSE]["losses"][1] - by_rows[0][1]) > 1e-4:
        raise RuntimeError(f"the first update is not AdamW's: {found[DENSE]['losses']}, {by_rows[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of the table (default: {ROWS})")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    add_results_argument(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.folder, arguments.measure, arguments.rows)
        return
    results = Results("Per-layer embeddings, trained", about(__doc__))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        build(Path(name), arguments.rows)
        ran = {way: run(way, Path(name), arguments.rows) for way in WAYS}
    found = {way: each for way, each in ran.items() if isinstance(each, dict)}
    check(found)
    nbytes, dense = 4 * arguments.rows * WIDTH * LAYERS, found[DENSE]
    not_run = [f"{way} did not run: {each}" for way, each in ran.items() if isinstance(each, str)]
    results.tables = [
        Table(
            {
                "way": "",
                "memory at most, GB": ".2f",
                "of its own, GB": ".2f",
                "memory to the table": ".2f",
                "ms a step": ",.0f",
                "time to AdamW": ".3f",
            },
            [
                [
                    way,
                    each["peak"] / 1e9,
                    each["own"] / 1e9,
                    each["peak"] / nbytes,
                    each["step_ms"],
                    each["step_ms"] / dense["step_ms"],
                ]
                for way, each in found.items()
            ],
            note=" ".join([f"The table has {nbytes / 1e9:.2f} GB.", *not_run]),
        )
    ]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

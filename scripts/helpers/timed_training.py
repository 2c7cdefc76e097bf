"""The model, sizes and clock of timed training runs. Imports nothing that an environment of engram-peft lacks."""

import mmap
import os
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from helpers.turns import wait_for_turn


CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "hc_mult": 1,
    "engram_n_heads": 8,
    "engram_head_dim": 64,
    "engram_compressed_vocab_size": None,
}
TABLE = "model.layers.1.engram.table"
# Four turns, and a last step that is not timed: nothing is prefetched during it.
BATCH, SEQ, STEPS, TURN = 16, 128, 17, 4
# Rows of a head.
SMALL = 125_000


class Watch(TrainerCallback):
    """Milliseconds of each timed step, counted from the end of the step before."""

    def __init__(self, is_cold: bool):
        self.is_cold, self.milliseconds, self.last = is_cold, [], 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.is_cold:
            for block in model.model.tables()[0].block_records:
                file = block.source.file
                os.fsync(file.file.fileno())
                file.mapping.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % TURN == 0:
            wait_for_turn()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        # In the first step of a turn the caches hold other programs' data, and its rows were prefetched while other
        # programs ran.
        if state.global_step > TURN and state.global_step % TURN != 1:
            self.milliseconds.append(1000 * (now - self.last))
        self.last = now


def made_arguments(folder: str | Path, steps: int, **changes) -> TrainingArguments:
    """Of every timed training run."""
    fields = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "logging_steps": 1, **changes}
    return TrainingArguments(
        str(folder), max_steps=steps, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **fields
    )


def random_tokens() -> torch.Tensor:
    """(rows, SEQ), the same in every process. Nearly every n-gram of it is new."""
    return torch.randint(0, CONFIG["vocab_size"], (STEPS * BATCH, SEQ), generator=torch.Generator().manual_seed(0))

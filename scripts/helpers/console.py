"""What a training script shows: a bar with the time left, and one line per log with the loss and three figures."""

import math
import os
import sys
import time
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


# A figure in the history of a run, the words for it, and how it is written. Layers are averaged.
MEMORY_FIGURES = (
    ("engram/gate_mean", "gate", ".2f"),
    ("engram/memory_share", "memory in the stream", ".1%"),
    ("engram/rows_touched", "rows touched", ".1%"),
)


def choose_threads() -> int:
    """Let torch use the cores that other programs leave free, and return their number.

    Threads of one operation wait for each other: two threads that share a core with another program are slower than
    one. `OMP_NUM_THREADS`, where it is set, decides instead.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        is_linux = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
        busy = math.floor(os.getloadavg()[0] + 0.5) if hasattr(os, "getloadavg") else 0
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - busy)))
    return torch.get_num_threads()


@contextmanager
def stage(name: str, seconds_of_stage: dict[str, float]):
    """A part of a script: its name as a heading, and afterwards how long it took."""
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds_of_stage[name] = time.perf_counter() - start


class OneLineCallback(TrainerCallback):
    """Shows a bar on a terminal, and a line per log everywhere. Trackers and the history keep all figures."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.perf_counter(), state.global_step
        # A bar in a log file is noise.
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not sys.stderr.isatty())

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        seconds_a_step = (time.perf_counter() - self.start) / max(state.global_step - self.first_step, 1)
        left = tqdm.format_interval(seconds_a_step * (state.max_steps - state.global_step))
        parts = [f"step {state.global_step} of {state.max_steps}", f"loss {float(logs['loss']):.3f}"]
        for key, words, spec in MEMORY_FIGURES:
            found = [value for name, value in state.log_history[-1].items() if name.startswith(f"{key}/layer")]
            if found:
                parts.append(f"{words} {format(sum(found) / len(found), spec)}")
        tqdm.write(", ".join([*parts, f"{left} left"]))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def show_one_line(trainer: Trainer) -> None:
    """Replace the console output of a Trainer by `OneLineCallback`."""
    for stock in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(OneLineCallback())

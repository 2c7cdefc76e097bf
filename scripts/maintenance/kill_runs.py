"""Kill training runs at random moments, resume them, and compare the end with a run that nobody killed.

    python scripts/maintenance/kill_runs.py              50 kills in about two minutes

Children fork after the imports and train with tables resident, in host memory or on disk; each resumed run draws a tier
again. A run is killed and resumed from its last complete checkpoint until it is done. Its weights must then be those of
the run that nobody killed, bit for bit.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from kill_saves import CONFIG
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, engram_optimizers, last_complete_checkpoint


TABLES = ("model.layers.0.engram.table", "model.layers.1.engram.table")
TIERS = {
    "resident": None,
    "host": {"": "cpu", **dict.fromkeys(TABLES, "cpu")},
    "disk": {"": "cpu", **dict.fromkeys(TABLES, "disk")},
}
STEPS = 24


def train(base: Path, run: Path, tier: str, row_optimizer: str) -> dict[str, torch.Tensor]:
    """Train to the end from the last complete checkpoint, and return the weights."""
    model = AutoModelForCausalLM.from_pretrained(base, device_map=TIERS[tier])
    ids = torch.randint(0, CONFIG["vocab_size"], (64, 24), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(run),
        max_steps=STEPS,
        save_steps=2,
        save_total_limit=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=engram_optimizers(args, row_optimizer, work_folder=run.parent / "work"),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(run))
    return model.state_dict()


def start_child(work, *arguments) -> int:
    """Fork a process that does some work, prints nothing, and ends."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            status = 1
            try:
                work(*arguments)
                status = 0
            finally:
                os._exit(status)
    return child


def kill_until_done(folder: Path, number: int, seconds: float, row_optimizer: str, most_kills: int) -> tuple[int, int]:
    """Kill and resume one run until it is done.

    Returns:
        Number of kills, and how many of them left a half-written checkpoint.
    """
    run, done = folder / f"run{number}", folder / f"done{number}.pt"
    kills = halves = 0

    def work(tier: str) -> None:
        half = done.with_suffix(".half")
        torch.save(train(folder / "base", run, tier, row_optimizer), half)
        half.replace(done)

    while not done.exists():
        child = start_child(work, random.choice(list(TIERS)))
        if kills < most_kills:
            time.sleep(random.uniform(0.2, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError("a resumed run ended with an error; run it by itself to see which")
        if os.WIFSIGNALED(status):
            kills += 1
            found = [int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")]
            last = last_complete_checkpoint(run)
            complete = int(Path(last).name.removeprefix("checkpoint-")) if last else 0
            halves += max(found, default=0) > complete
            if not last and len(found) > 1:
                raise RuntimeError(f"{len(found)} checkpoints, and none is complete")
    return kills, halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Before the fork: a child has no threads but its own.
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    kills = halves = runs = 0
    with tempfile.TemporaryDirectory() as name, tqdm(total=arguments.kills, desc="Kills", file=sys.stderr) as progress:
        folder = Path(name)
        torch.manual_seed(0)
        EngramMoEForCausalLM(EngramMoEConfig(**CONFIG)).save_pretrained(folder / "base")
        while kills < arguments.kills:
            row_optimizer = ("adam", "rowwise_adam", "adagrad", "sgd")[runs % 4]
            whole = folder / f"whole{runs}"
            start = time.perf_counter()
            child = start_child(
                lambda whole=whole, rule=row_optimizer: torch.save(
                    train(folder / "base", whole / "run", "resident", rule), whole / "state.pt"
                )
            )
            if os.waitpid(child, 0)[1]:
                raise RuntimeError("the unbroken run ended with an error")
            seconds = time.perf_counter() - start
            killed, half = kill_until_done(folder, runs, seconds, row_optimizer, arguments.kills - kills)
            expected, found = torch.load(whole / "state.pt"), torch.load(folder / f"done{runs}.pt")
            wrong = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
            if wrong:
                raise RuntimeError(f"a run that was killed {killed} times ended with other weights: {wrong[:3]}")
            kills, halves, runs = kills + killed, halves + half, runs + 1
            progress.update(killed)
    print(f"{kills} kills of {runs} runs of {STEPS} steps, {halves} of which left a half-written checkpoint;")
    print("each run was resumed from its last complete one, on another tier, and ended with the unbroken run's weights")


if __name__ == "__main__":
    main()

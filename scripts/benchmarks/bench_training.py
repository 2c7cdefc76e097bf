"""Training steps with tables resident, in host memory and on disk, against dense gradients, side by side.

    python scripts/bench_training.py                              twenty minutes on 2 cores, 12 GB of RAM, 15 of disk
    python scripts/bench_training.py --engram-peft ENV/bin/python also engram-peft, from an environment of its own
                                                                  (Python 3.12, pip install engram-peft==1.2.7)

A model as small as the demo's, with a memory layer at index 1; 2,048 tokens a step, under the stock Trainer with
clipping. It is checked that all tiers train to the same bits, and that our ways begin with the same loss. Every
way runs in a process of its own, four steps at a time in turn with the others; milliseconds are medians over steps, of
which the first turn and the first step of each are left out. Cold: the demo's own two streams and eight heads, in pairs
with a resident table; the files of the table are out of the page cache when training begins, and the table is so large
that a step finds few of its rows there: with the demo's own text, and with random tokens, of which every n-gram is new.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_recipe import prepare_text
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging
from turns import run_in_turns, wait_for_turn


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
IDS = "ids.pt"
# Four turns, and a last step that is not timed: nothing is read ahead during it.
BATCH, SEQ, STEPS, TURN = 16, 128, 17, 4
SMALL, LARGE = 125_000, 2_500_000
# What the demo has, and engram-peft cannot be put into.
STREAMS_OF_DEMO = {"hc_mult": 2, "engram_n_heads": 4}
ROUNDS = 4


class Watch(TrainerCallback):
    """Milliseconds of each step that is timed, from the end of the one before."""

    def __init__(self, is_cold: bool):
        self.is_cold, self.milliseconds, self.last = is_cold, [], 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.is_cold:
            for source in model.model.tables()[0].sources:
                os.fsync(source.file.file.fileno())
                source.file.mapping.madvise(4)  # MADV_DONTNEED
                os.posix_fadvise(source.file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % TURN == 0:
            wait_for_turn()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        # The first step of a turn finds caches full of others' data, and its own rows read while others had their turn.
        if state.global_step > TURN and state.global_step % TURN != 1:
            self.milliseconds.append(1000 * (now - self.last))
        self.last = now


def made_arguments(folder: str | Path, steps: int, **changes) -> TrainingArguments:
    """Of every training run that is timed here or beside this."""
    fields = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "logging_steps": 1, **changes}
    return TrainingArguments(
        str(folder), max_steps=steps, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **fields
    )


def trained(model, folder: Path, way: str, rule: str, steps: int):
    """Milliseconds of the steps that are timed, losses, and shares of rows in time."""
    from engram_hf import EngramPrefetchCallback, engram_optimizers

    ids = torch.load(folder / IDS)
    args = made_arguments(folder / "run", steps)
    watch = Watch("cold" in way)
    callbacks = [EngramPrefetchCallback(enabled="without" not in way)] if "cold" in way else []
    rows = None if way == "dense" else engram_optimizers(args, rule, table_lr_scale=1.0, work_folder=folder / "work")
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[*callbacks, watch],
        optimizer_cls_and_kwargs=rows,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    in_time = [line["engram/prefetch_in_time"] for line in lines if "engram/prefetch_in_time" in line]
    return watch.milliseconds, [line["loss"] for line in lines], in_time[1:]


def measure(folder: Path, way: str, rule: str, steps: str, threads: str) -> None:
    """In a process of its own: print what `trained` gives, and where nothing is timed sums over the table's blocks."""
    logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    import engram_hf  # noqa: F401 (makes the Auto classes know the model)

    tier = "cpu" if way == "host" else "disk"
    device_map = {"": "cpu", TABLE: tier} if way not in ("resident", "dense") else None
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    if device_map is None:
        # Mapped from the checkpoint, a page would be copied when a step first writes to it.
        for block in model.model.tables()[0].blocks:
            block.data = block.data.clone()
    milliseconds, losses, in_time = trained(model, folder, way, rule, int(steps))
    sums = [float(block.detach().double().sum()) for block in model.model.tables()[0].blocks if not milliseconds]
    print(json.dumps([milliseconds, losses, in_time, sums]))


def run(
    folder: Path, ways: tuple[str, ...], rule: str, steps: int = STEPS, threads: int = 2, others: dict | None = None
):
    """What `measure` prints, by way."""
    own = {
        way: [sys.executable, __file__, "--measure", str(folder), way, rule, str(steps), str(threads)] for way in ways
    }
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    lines = run_in_turns(own | (others or {}), environment)
    return {way: json.loads(line) for way, line in lines.items()}


def check(folder: Path, ways: tuple[str, ...], rule: str) -> None:
    """Raise unless some steps end with the same bits; with one thread, since transformers' experts add up in any order
    with more."""
    found = [*run(folder, ways, rule, steps=3, threads=1).values()]
    if any(own[1] != found[0][1] or own[3] != found[0][3] for own in found):
        raise RuntimeError(f"{ways} do not train to the same weights by {rule}; nothing is timed.")


def check_first_losses(rounds: list[dict], ways: tuple[str, ...]) -> None:
    """Raise unless ways begin with the same loss; with two threads, later ones differ in their last digits."""
    for found in rounds:
        if any(abs(found[way][1][0] - found[ways[0]][1][0]) > 1e-4 for way in ways):
            raise RuntimeError(f"{ways} begin with different losses; nothing is shown.")


def build(folder: Path, rows_of_head: int, **changes) -> None:
    from engram_hf import EngramMoEConfig, EngramMoEForCausalLM

    torch.manual_seed(0)
    EngramMoEForCausalLM(
        EngramMoEConfig(**{**CONFIG, **changes}, engram_layer_ids=[1], engram_vocab_size=rows_of_head)
    ).save_pretrained(folder)
    # Or it is written to the disk while others are timed.
    os.sync()


def random_tokens() -> torch.Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (STEPS * BATCH, SEQ), generator=torch.Generator().manual_seed(0))


def tokens_of_text() -> torch.Tensor:
    return torch.tensor(prepare_text(None, "tiny")[1].shuffle(seed=0)[: STEPS * BATCH]["input_ids"])


def show(title: str, rounds: list[dict]) -> None:
    """`rounds`: what `run` has found, the resident way first; medians are of the steps of all rounds together."""
    print(f"\n| {title} | ms a step | tokens a second | time to resident | each round, sorted | rows in time |")
    print("|---|---|---|---|---|---|")
    for way in rounds[0]:
        each = [statistics.median(found[way][0]) / statistics.median(found["resident"][0]) for found in rounds]
        here, resident = (statistics.median(sum((found[w][0] for found in rounds), [])) for w in (way, "resident"))
        in_time = sum((found[way][2] for found in rounds), [])
        share = f"{statistics.mean(in_time):.2f}" if in_time else ""
        ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(each))
        print(f"| {way} | {here:.0f} | {BATCH * SEQ / here * 1000:,.0f} | {here / resident:.2f} | {ratios} | {share} |")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engram-peft", metavar="PYTHON", help="interpreter of an environment with engram-peft")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(Path(arguments.measure[0]), *arguments.measure[1:])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        build(Path(name), SMALL)
        torch.save(random_tokens(), Path(name) / IDS)
        for rule in ("adam", "adagrad"):
            check(Path(name), ("resident", "host", "disk"), rule)
        others = {}
        if arguments.engram_peft:
            others["engram-peft"] = [arguments.engram_peft, str(Path(__file__).with_name("time_engram_peft.py"))]
        ways = ("resident", "host", "disk", "dense")
        rounds = [run(Path(name), ways, "adam", others=others) for _ in range(ROUNDS)]
        check_first_losses(rounds, ways)
        show(f"{16 * SMALL:,} rows of 64, lazy Adam", rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        build(Path(name), LARGE, **STREAMS_OF_DEMO)
        for kind, make in (("text", tokens_of_text), ("random tokens", random_tokens)):
            torch.save(make(), Path(name) / IDS)
            for way in ("disk, cold, with the callback", "disk, cold, without"):
                rounds = [run(Path(name), ("resident", way), "adagrad") for _ in range(ROUNDS)]
                check_first_losses(rounds, ("resident", way))
                show(f"{8 * LARGE:,} rows of 64, row-wise Adagrad, as the demo, {kind}", rounds)


if __name__ == "__main__":
    main()

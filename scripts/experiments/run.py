"""Run an experiment of docs/evidence.md: train what it lists, several runs at a time, each on one thread.

    python scripts/experiments/gather_knowledge.py      once: the text
    python scripts/experiments/run.py                   lists the experiments, what is done and what is left
    python scripts/experiments/run.py controls          trains what is left of one
    python scripts/experiments/run.py controls --scale 100m      on a GPU

Killed at any point, the same command goes on. Finished runs are read from scripts/experiments/results/, and a run that
was stopped goes on from its last checkpoint in output/experiments/. Every arm sees the same tokens in the same order.
The learning rate of a family of models is chosen first, on a seed that is not reported.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from helpers.experiment_measures import MEASURES, measure, measured_runs
from helpers.experiment_runs import RESULTS, Run, read_results, train, tuning_runs
from helpers.experiments import EXPERIMENTS, SCALES, TUNING_SEED, Experiment, maker
from helpers.experiments_text import KNOWLEDGE, prepare
from helpers.pretrained_runs import PretrainedRun, pretrained_runs, text_for, train_pretrained
from helpers.smollm import fetch_smollm


def runs_of(experiment: Experiment, scale: str) -> list[Run | PretrainedRun]:
    """Tuning first, then the runs in the order of the experiment."""
    if experiment.name == "pretrained":
        return list(pretrained_runs())
    arms = [arm for arm, _ in experiment.runs]
    families = list(dict.fromkeys(arm.family for arm in arms))
    tuning = [run for family in families for run in tuning_runs(family, scale)]
    return tuning + [Run(arm, seed, scale) for arm, seed in experiment.runs]


def vocab_size(scale: str) -> int:
    no_tokens = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return maker(SCALES[scale], no_tokens)().vocab_size


def train_here(run: Run | PretrainedRun, knowledge: Path) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if isinstance(run, PretrainedRun):
        content = train_pretrained(run, knowledge)
    else:
        content = train(run, prepare(SCALES[run.scale].tokens, vocab_size(run.scale), knowledge))
    if content is None:
        print(f"{run.name}: another process works on it", flush=True)
    else:
        print(f"{run.name}: held-out loss {content['loss']:.4f}, {content['cpu_hours']:.2f} CPU hours", flush=True)


def train_all(runs: list[Run | PretrainedRun], scale: str, processes: int, knowledge: Path) -> None:
    """Each in a process of its own, so many at a time. Tuning ends before what it is for begins.

    Raises:
        RuntimeError: a run failed. The others of its turn go on to their ends.
    """
    # Once, before many processes would.
    if isinstance(runs[0], PretrainedRun):
        text_for(fetch_smollm(), knowledge)
    else:
        prepare(SCALES[scale].tokens, vocab_size(scale), knowledge)
    for is_tuning in (True, False):
        waiting = [run for run in runs if run.is_tuning == is_tuning]
        running: dict[str, subprocess.Popen] = {}
        failed: list[str] = []
        try:
            while waiting or running:
                while waiting and len(running) < processes and not failed:
                    run = waiting.pop(0)
                    running[run.name] = start(run, scale, knowledge)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if running.pop(name).returncode:
                        failed.append(name)
                if failed and not running:
                    raise RuntimeError(f"{', '.join(failed)} failed; its error is above. The same command goes on.")
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.terminate()


def start(run: Run | PretrainedRun, scale: str, knowledge: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--scale", scale, "--knowledge", str(knowledge), "--one", run.name]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})


def measure_all(name: str, scale: str, knowledge: Path) -> None:
    """Models that are trained, in the order of their seeds; says which are not."""
    text = prepare(SCALES[scale].tokens, vocab_size(scale), knowledge)
    for run in measured_runs(scale):
        try:
            content = measure(name, run, text, knowledge)
        except ValueError as error:
            print(f"{run.name} is left out. {error}", flush=True)
        else:
            print(f"{content['name']}: {content['cpu_hours']:.3f} CPU hours", flush=True)


def find_run(name: str, scale: str) -> Run | PretrainedRun:
    for experiment in EXPERIMENTS:
        for run in runs_of(experiment, scale):
            if run.name == name:
                return run
    raise SystemExit(f"There is no run {name}. Runs are named SCALE-ARM-seedSEED, such as tiny-engram-seed0.")


def show_state(scale: str) -> None:
    done = read_results()
    for experiment in EXPERIMENTS:
        names = [run.name for run in runs_of(experiment, scale) if not run.is_tuning]
        finished = sum(name in done for name in names)
        state = f"{finished:>3} of {len(names):>2} runs" if names else "   no own runs"
        print(f"{experiment.number}. {experiment.name:<12}{state}   {experiment.title}")
    hours = SCALES[scale].hours_per_run
    if hours is not None:
        print(f"A run takes about {hours:.2f} CPU hours. Seed {TUNING_SEED} tunes learning rates. Results: {RESULTS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("name", nargs="?", choices=names, help="experiment (default: list them)")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="size of the models (default: tiny)")
    parser.add_argument("--processes", type=int, help="runs at a time (default: one per core; one on a GPU)")
    parser.add_argument("--knowledge", type=Path, default=KNOWLEDGE, help="folder of gather_knowledge.py")
    parser.add_argument("--one", help="train the run of this name in this process, such as tiny-engram-seed0")
    arguments = parser.parse_args()
    processes = arguments.processes or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    if processes < 1:
        parser.error(f"--processes must be at least 1, got {processes}")
    try:
        if arguments.one is not None:
            return train_here(find_run(arguments.one, arguments.scale), arguments.knowledge)
        if arguments.name is None:
            return show_state(arguments.scale)
        experiment = next(each for each in EXPERIMENTS if each.name == arguments.name)
        if experiment.name in MEASURES:
            return measure_all(experiment.name, arguments.scale, arguments.knowledge)
        runs = runs_of(experiment, arguments.scale)
        if not runs:
            raise SystemExit(f"{experiment.name} has no runs at this size. {experiment.why_not}")
        done = read_results()
        left = [run for run in runs if run.name not in done]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are done, tuning among them.", flush=True)
        if left:
            train_all(left, arguments.scale, processes, arguments.knowledge)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

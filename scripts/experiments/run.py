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
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from helpers.experiment_files import RESULTS, AnyRun, read_results
from helpers.experiment_measures import MEASURES, measure, measured_runs, name_of
from helpers.experiment_plan import count_reported, hours_of_run, runs_of
from helpers.experiment_runs import text_of
from helpers.experiments import EXPERIMENTS, SCALES, TUNING_SEED, Experiment
from helpers.experiments_text import KNOWLEDGE
from helpers.memory_limit import memory_cgroup


def train_here(run: AnyRun, knowledge: Path) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        # A quarter of the time of a step is saved where the CPU multiplies bfloat16, as a GPU's mixed precision does.
        torch.set_float32_matmul_precision("medium")
    show(run.name, run.train(knowledge))


def show(name: str, content: dict | None) -> None:
    if content is None:
        print(f"{name}: another process works on it", flush=True)
    else:
        loss = f"held-out loss {content['loss']:.4f}, " if "loss" in content else ""
        print(f"{name}: {loss}{content['cpu_hours']:.2f} CPU hours", flush=True)


def train_all(runs: list[AnyRun], scale: str, processes: int, knowledge: Path) -> None:
    """Each in a process of its own, so many at a time. Tuning ends before what it is for begins.

    Raises:
        RuntimeError: a run failed. The others of its turn go on to their ends.
    """
    runs[0].prepare(knowledge)
    for is_tuning in (True, False):
        waiting = [run for run in runs if run.is_tuning == is_tuning]
        running: dict[str, subprocess.Popen] = {}
        failed: list[str] = []
        limits = contextlib.ExitStack()
        try:
            while waiting or running:
                while waiting and len(running) < processes and not failed:
                    run = waiting.pop(0)
                    running[run.name] = start(run, scale, knowledge, limits)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if running.pop(name).returncode:
                        failed.append(name)
                if failed and not running:
                    raise RuntimeError(f"{', '.join(failed)} failed; its error is above. The same command goes on.")
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            limits.close()


ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Memory for speed. glibc keeps the memory of freed tensors: without it, every step asks the system for pages anew,
# which takes a sixth of the time. oneDNN keeps a kernel for each number of tokens that an expert got: with its default
# of 1,024 kernels a step takes a quarter longer, and these need 5 GB.
MUCH_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**28),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(2**14),
}


def start(run: AnyRun, scale: str, knowledge: Path, limits: contextlib.ExitStack) -> subprocess.Popen:
    """In a process of its own, within its limit of memory where it has one."""
    command = [sys.executable, __file__, "--scale", scale, "--knowledge", str(knowledge), "--one", run.name]
    if run.memory_limit_bytes is None:
        return subprocess.Popen(command, env={**os.environ, **ONE_THREAD, **MUCH_MEMORY})
    before = limits.enter_context(memory_cgroup(run.memory_limit_bytes))
    return subprocess.Popen([*before, *command], env={**os.environ, **ONE_THREAD})


def measure_all(name: str, scale: str, knowledge: Path) -> None:
    """Models that are trained, in the order of their seeds; says which are not."""
    text = text_of(scale, knowledge)
    for run in measured_runs(scale):
        try:
            content = measure(name, run, text, knowledge)
        except ValueError as error:
            print(f"{run.name} is left out. {error}", flush=True)
        else:
            show(name_of(name, run), content)


def find_run(name: str, scale: str) -> AnyRun:
    results = read_results()
    for experiment in EXPERIMENTS:
        for run in runs_of(experiment, scale, results):
            if run.name == name:
                return run
    raise SystemExit(f"There is no run {name}. Runs are named SCALE-ARM-seedSEED, such as tiny-engram-seed0.")


def show_state(scale: str) -> None:
    results = read_results()
    for experiment in EXPERIMENTS:
        runs = [run for run in runs_of(experiment, scale, results) if not run.is_tuning]
        finished, count = sum(run.name in results for run in runs), count_reported(experiment, scale, results)
        state = f"{finished:>3} of {count:>2} runs" if count else "   no own runs"
        hours = hours_of_run(experiment, scale)
        costs = f", about {hours:.2f} CPU hours each" if count and hours is not None else ""
        print(f"{experiment.number}. {experiment.name:<12}{state}   {experiment.title}{costs}")
    print(f"Seed {TUNING_SEED} tunes learning rates. Results: {RESULTS}")


def train_experiment(experiment: Experiment, scale: str, processes: int, knowledge: Path) -> None:
    """What is left of it. Each run is tried once; which come last may depend on the results of others."""
    tried: set[str] = set()
    while True:
        results = read_results()
        left = [run for run in runs_of(experiment, scale, results) if run.name not in {*results, *tried}]
        if not left:
            return
        print(f"{len(left)} runs are left, tuning among them.", flush=True)
        tried |= {run.name for run in left}
        train_all(left, scale, processes, knowledge)


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
        train_experiment(experiment, arguments.scale, processes, arguments.knowledge)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

"""Several processes save tiny models into folders. Not a test: `test_saving_on_ranks.py` reads what is left."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch.multiprocessing import start_processes


WAYS = ("every", "main", "alone")


def save(model, folder: Path, way: str) -> None:
    """As transformers means it, as accelerate calls it, and as Trainer does."""
    if way == "every":
        model.save_pretrained(folder)
    elif way == "main":
        model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    elif dist.get_rank() == 0:
        model.save_pretrained(folder)


def copy_of(folder: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        shutil.copytree(folder, target)
    dist.barrier()


def save_on_ranks(rank: int, processes: int, out: Path, rounds: list[int]) -> None:
    """All ranks of one job save the same model: into a folder that is new, and into one that holds a checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{processes}", rank=rank, world_size=processes)
    for each in rounds:
        model = tiny_model(seed=each)
        for way in WAYS if processes == 2 else WAYS[:1]:
            for kind in ("new", "existing"):
                folder = out / f"{way}-{kind}-{processes}" / ("model" if kind == "existing" else str(each))
                save(model, folder, way)
                dist.barrier()
                if kind == "existing":
                    copy_of(folder, folder.with_name(str(each)))
    dist.destroy_process_group()


def save_as_strangers(rank: int, out: Path, rounds: list[int]) -> None:
    """Processes that know nothing of each other save different models into one folder."""
    for each in rounds:
        model = tiny_model(seed=each + rank)
        ready = out / f"ready-{each}-{rank}"
        ready.touch()
        while not all((out / f"ready-{each}-{other}").exists() for other in range(2)):
            pass
        model.save_pretrained(out / "strangers" / str(each))


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Forked, so that torch is imported once.
    for processes in options["processes"]:
        start_processes(
            save_on_ranks, (processes, out, options["rounds"]), nprocs=processes, start_method="fork", join=True
        )
    start_processes(save_as_strangers, (out, options["rounds"]), nprocs=2, start_method="fork", join=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()

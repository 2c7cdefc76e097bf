"""Three processes, of which the last one fails in the middle of a run, or which all rest. Not a test:
`test_ranks_death.py` starts it.

Arguments: a folder, what they do, how the last one fails, and in how many seconds the process group gives up.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from run_ranks import Task, batch, open_table, write_table
from torch.multiprocessing import start_processes

from engram_hf import RowSGD
from engram_hf.modeling.table_ranks import start_ranks
from engram_hf.training.row_exchange import RowExchange
from engram_hf.training.row_updates import RowUpdates


RANKS = 3
WAYS = {"dies": signal.SIGKILL, "stops": signal.SIGSTOP}


def run(rank: int, out: Path, task: str, way: str, seconds: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=RANKS, timeout=limit)
    service = start_ranks()
    table = open_table(out / "table.safetensors", "host", "float64", service)
    exchange = RowExchange()
    updates = RowUpdates("table", table, RowSGD(), exchange=exchange)
    model = Task(table)
    exchange.add(table)
    exchange.follow(model, [model.scale])
    service.meet()
    message = ""
    try:
        for step in range(4):
            if step == 2 and way == "rests":
                time.sleep(1.5 * seconds)
            elif step == 2 and rank == RANKS - 1:
                (out / "gone").touch()
                os.kill(os.getpid(), WAYS[way])
            elif step == 2 and task == "evaluates":
                # These wait for nobody, and might come to their end before.
                while not (out / "gone").exists():
                    time.sleep(0.01)
                time.sleep(0.5)
            if task == "evaluates":
                with torch.no_grad():
                    model.eval()(*batch(step, 1 + rank, RANKS))
            else:
                model.train()(*batch(step, 1 + rank, RANKS)).backward()
                updates.step(0.5)
                updates.gradients.norm.grad = None
    except RuntimeError as error:
        # As Python does for an error that ends a program.
        message, sys.last_value = str(error), error
    (out / f"message{rank}").write_text(message)
    service.leave()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_table(folder / "table.safetensors", "float64")
    options = (folder, *sys.argv[2:4], float(sys.argv[4]))
    started = start_processes(run, options, nprocs=RANKS, start_method="fork", join=False)
    for process in started.processes[:-1]:
        process.join()
    started.processes[-1].kill()

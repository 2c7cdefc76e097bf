"""One of several processes that hold a table together, of which the first one comes to its end before the others. Not a
test: `test_ranks_death.py` starts it.

Arguments: a folder, and what is done.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from run_ranks import batch, open_table, task_over_ranks
from torch.nn.parallel import DistributedDataParallel

from engram_hf.modeling.table_ranks import start_ranks


folder, task = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
# A rank at its end answers for longer than this.
dist.init_process_group("gloo", timeout=timedelta(seconds=3 if task == "evaluates" else 1800))
rank, ranks = dist.get_rank(), dist.get_world_size()
path = folder / "table.safetensors"
if task == "evaluates":
    # The first rank has fewer texts than the others, and ends as it should.
    service = start_ranks()
    table = open_table(path, "host", "float64", service).eval()
    service.meet()
    # Gloo counts these as collectives, and the first rank has none of them.
    if rank == 1 and ranks == 3:
        dist.recv(torch.zeros(1), 2)
    elif rank == 2:
        dist.send(torch.zeros(1), 1)
    for step in range(1 if rank == 0 else 6):
        with torch.no_grad():
            table(batch(step, 1 + rank, ranks)[0])
        # For longer than a rank at its end waits between two messages.
        time.sleep(1.5)
else:
    model = task_over_ranks(path)
    if task == "waits":
        # The wrapper averages `scale` in a collective inside the backward, ahead of the exchange of rows.
        model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_parameters() if name != "scale"]
        model = DistributedDataParallel(model)
    for step in range(4):
        loss = model(*batch(step, 1 + rank, ranks))
        if step == 2 and rank == 0:
            # Where the others wait, they are in the backward already.
            time.sleep(2 * (task == "waits"))
            sys.exit(1)
        # Else they come to it when the first one has left.
        time.sleep(2 * (task == "comes" and step == 2))
        loss.backward()

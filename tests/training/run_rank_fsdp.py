"""FSDP2 for the backbone and tables over ranks, in a loop of one's own. Not a test: `test_rank_fsdp.py` starts it."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from joining import join
from tiny import tiny_config, tiny_ids, tiny_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import engram_optimizers


STEPS, SAVED_AT = 4, 2
# Ranks of a run, the run that it goes on from, and whether its tables are cut over the ranks.
RUNS = {
    "whole": (2, None, False),
    "cut": (2, None, True),
    "by2": (2, "cut", True),
    "by1": (1, "cut", True),
    "by3": (3, "cut", True),
}
SMALL_RUNS = ("whole", "cut", "by2")


def run(rank: int, out: Path, name: str) -> None:
    ranks, begun, is_cut = RUNS[name]
    join(rank, ranks, out / f"store-{name}")
    model = AutoModelForCausalLM.from_pretrained(out / "base", engram_ranks="shard" if is_cut else None)
    model = model.double().train()
    model.set_experts_implementation("eager")
    tables = model.named_tables().values()
    # FSDP must see nothing of a table: its rows have a step of their own.
    ignored = {parameter for table in tables for parameter in table.parameters()}
    mesh = init_device_mesh("cpu", (ranks,))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    args = TrainingArguments(str(out / name), learning_rate=1e-2, report_to=[], use_cpu=True)
    factory, options = engram_optimizers(args, "adam")
    optimizer = factory()(model, **options)
    result = {}
    if begun is not None:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=out / begun / "saved")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        result["saved"] = whole(model, optimizer)
    for step in range(0 if begun is None else SAVED_AT, STEPS):
        ids = tiny_ids(12, 9, seed=step)[rank::ranks]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == SAVED_AT and is_cut:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(states, checkpoint_id=out / name / "saved")
            result["saved"] = whole(model, optimizer)
    result["end"] = whole(model, optimizer)
    result["is_sharded"] = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if is_cut:
        result["refused"] = refusal(optimizer, rank, ranks)
    if rank == 0:
        torch.save(result, out / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


def whole(model, optimizer) -> dict[str, torch.Tensor]:
    """All weights, rows and state, of all processes."""
    found = {}
    for name, table in model.named_tables().items():
        found[name] = table.gather_rows(torch.arange(table.num_rows))
    of_tables = {id(parameter) for table in model.named_tables().values() for parameter in table.parameters()}
    found |= {name: in_full(each) for name, each in model.named_parameters() if id(each) not in of_tables}
    for number, state in enumerate(optimizer.state_dict()["state"].values()):
        if "held_by" in state:
            found |= {f"{number}/{key}": in_full(each) for key, each in state.items() if hasattr(each, "full_tensor")}
        elif "row_ids" not in state:
            found |= {f"{number}/{key}": in_full(each) for key, each in state.items() if torch.is_tensor(each)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def refusal(optimizer, rank: int, ranks: int) -> str:
    """What loading the state of another rank raises."""
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        if "held_by" in state:
            state |= {name: each.clone() for name, each in state.items() if hasattr(each, "full_tensor")}
            state["held_by"] = ((rank + 1, ranks + 1),)
    try:
        optimizer.load_state_dict({name: saved[name] for name in ("state", "param_groups")})
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tiny_model(tiny_config(engram_table_dtype="float64")).save_pretrained(folder / "base")
    for each in sys.argv[2:]:
        # A fork has imported everything already.
        start_processes(run, (folder, each), nprocs=RUNS[each][0], start_method="fork")

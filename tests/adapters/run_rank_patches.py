"""Row patches over tables that are cut over two processes; each process leaves what it found.

python tests/adapters/run_rank_patches.py FOLDER, where FOLDER/model holds a model
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_ids
from transformers import AutoModelForCausalLM

from engram_hf import add_patch, disable_patches, load_patch, make_patch, remove_patch, set_patches, use_patches


RANKS = 2


@torch.no_grad()
def logits_under_patches(model, folder: Path) -> list[torch.Tensor]:
    """What a model computes while patches come and go."""
    ids, rank, found = tiny_ids(3, 9, seed=dist.get_rank()), dist.get_rank(), []

    def see() -> None:
        found.append(model(ids).logits)

    see()
    add_patch(model, load_patch(folder / "alice.safetensors"))
    see()
    add_patch(model, load_patch(folder / "bob.safetensors"), scale=0.5)
    see()
    with disable_patches(model):
        see()
    set_patches(model, ["bob"])
    see()
    # Each process has its own requests, and its own number of forwards.
    for names in (["alice", None, "bob"], [["bob", "alice"], None, None])[: 1 + rank]:
        with use_patches(model, names):
            see()
    rows = {name: (torch.arange(5), torch.ones(5, table.head_dim)) for name, table in model.named_tables().items()}
    add_patch(model, make_patch(model, "made here", rows, "add"))
    see()
    for name in ("bob", "alice", "made here"):
        remove_patch(model, name)
    see()
    return found


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    whole = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    cut = AutoModelForCausalLM.from_pretrained(folder / "model", engram_ranks="shard").eval()
    held = [table.held_rows < table.num_rows for table in cut.named_tables().values()]
    found = {"whole": logits_under_patches(whole, folder), "cut": logits_under_patches(cut, folder), "held": held}
    torch.save(found, folder / f"result{rank}.pt")
    # Whoever is done first still answers the other.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (Path(sys.argv[1]),), RANKS)

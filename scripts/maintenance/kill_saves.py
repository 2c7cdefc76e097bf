"""Kill a process while it saves, at random moments. A whole checkpoint must be left each time.

    python scripts/maintenance/kill_saves.py             200 kills in about two minutes

Children fork after the imports, save two models in turn into one folder, and are killed. What is left must load, must
be exactly one of the two models, and every file must have its digest.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, verify_tables


CONFIG = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "engram_layer_ids": [0, 1],
    "engram_vocab_size": 4000,
    "engram_head_dim": 16,
    "engram_block_elements": 200_000,
    "engram_compressed_vocab_size": None,
}


def build(seed: int) -> EngramMoEForCausalLM:
    torch.manual_seed(seed)
    return EngramMoEForCausalLM(EngramMoEConfig(**CONFIG))


def save_for_ever(models: list, folder: str) -> None:
    torch.set_num_threads(1)
    for turn in range(10**9):
        models[turn % 2].save_pretrained(folder, max_shard_size=("2MB", "5GB")[turn % 3 == 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    # Before the fork: a child has no threads but its own.
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    models = [build(1), build(2)]
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]

    found = [0, 0]
    leftovers = 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        models[0].save_pretrained(folder)
        length = time.perf_counter() - start
        for _ in tqdm(range(arguments.kills), desc="Kills"):
            child = os.fork()
            if child == 0:
                save_for_ever(models, folder)
            time.sleep(random.uniform(0, 4 * length))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            leftovers += len(list(Path(folder).glob(".saving*")))
            verify_tables(folder)
            state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            matches = [all(torch.equal(state[name], tensor) for name, tensor in each.items()) for each in states]
            if sum(matches) != 1:
                raise RuntimeError("what was left is neither of the two models")
            found[matches.index(True)] += 1
    print(f"{arguments.kills} kills, {leftovers} of them in the middle of a save, which takes {1e3 * length:.0f} ms:")
    print(f"{found[0]} times the first model was left whole, {found[1]} times the second")


if __name__ == "__main__":
    main()

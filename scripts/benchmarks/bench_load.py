"""Time and memory to load a model with tables of 8 GiB, by tier, against the same model without memory layers.

    python scripts/bench_load.py         a minute and a half on 2 cores; writes 12 GB and removes them

Each load runs in a process of its own; the middle one of five is printed. Memory is what the process holds more than
before, and the most it ever held.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_tiers import CONFIG

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM


ROWS_OF_8_GIB = 1_049_000
LOAD = """
import json, sys, time, resource
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import engram_hf
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
folder, device_map = sys.argv[1], json.loads(sys.argv[2])
before, start = rss(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
seconds = time.perf_counter() - start
tables = sum(table.nbytes for table in model.engram_tables())
status = Path("/proc/self/status").read_text()
peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
print(json.dumps({"seconds": seconds, "now": rss() - before, "peak": peak - before, "tables": tables}))
"""


def load(folder: str, device_map) -> dict:
    command = [sys.executable, "-c", LOAD, folder, json.dumps(device_map)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        large, none = f"{folder}/large", f"{folder}/none"
        built = EngramMoEForCausalLM(EngramMoEConfig(**{**CONFIG, "engram_vocab_size": ROWS_OF_8_GIB}))
        names = [table.name for table in built.engram_tables()]
        built.save_pretrained(large)
        del built
        EngramMoEForCausalLM(EngramMoEConfig(**{**CONFIG, "engram_layer_ids": []})).save_pretrained(none)
        ways = {
            "no memory layers": (none, None),
            "disk": (large, {"": "cpu", **dict.fromkeys(names, "disk")}),
            "resident (mapped)": (large, None),
            "host": (large, {"": "cpu", **dict.fromkeys(names, "cpu")}),
        }
        loads: dict[str, list[dict]] = {}
        for _ in range(5):
            for name, (path, device_map) in ways.items():
                loads.setdefault(name, []).append(load(path, device_map))
        print("\n| load | seconds | to no memory layers | memory after, MB | at most, MB |\n|---|---|---|---|---|")
        for name, each in loads.items():
            middle = sorted(each, key=lambda one: one["seconds"])[2]
            base = sorted(one["seconds"] for one in loads["no memory layers"])[2]
            memory = f"{middle['now'] / 1e6:,.0f} | {middle['peak'] / 1e6:,.0f}"
            print(f"| {name} | {middle['seconds']:.3f} | {middle['seconds'] / base:.2f} | {memory} |")
        print(f"tables: {middle['tables'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()

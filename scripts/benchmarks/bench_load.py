"""Time and memory to load a model with tables of 8 GiB, by tier, against the same model without memory layers.

    python scripts/benchmarks/bench_load.py         a minute and a half on 2 cores; writes 12 GB and removes them

Each load runs in a process of its own. Shown is the middle one of five: how much more memory the process holds after
the load than before it, and the most it held on the way.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_tiers import CONFIG


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, about, add_results_argument

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
    parser.add_argument("--rows-of-head", type=int, default=ROWS_OF_8_GIB, help=f"(default: {ROWS_OF_8_GIB})")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Loading by tier", about(__doc__))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        large, none = f"{folder}/large", f"{folder}/none"
        built = EngramMoEForCausalLM(EngramMoEConfig(**{**CONFIG, "engram_vocab_size": arguments.rows_of_head}))
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
    base = sorted(one["seconds"] for one in loads["no memory layers"])[2]
    rows = []
    for name, each in loads.items():
        middle = sorted(each, key=lambda one: one["seconds"])[2]
        memory = [middle[figure] / 1e6 for figure in ("tables", "now", "peak")]
        rows.append([name, middle["seconds"], middle["seconds"] / base, *memory])
    columns = {
        "load": "",
        "seconds": ".3f",
        "time to no memory layers": ".2f",
        "tables, MB": ",.0f",
        "memory after, MB": ",.0f",
        "memory at most, MB": ",.0f",
    }
    results.tables = [Table(columns, rows)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

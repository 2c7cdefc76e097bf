"""What a model will take, by tier, before anything is allocated: weights, tables, optimizer state, the largest step.

python scripts/print_memory.py engram-27b --device-map '{"": 0, "model.layers.1.engram.table": "disk"}'    seconds
"""

import argparse
import json

from engram_hf import EngramMoEConfig, count_parameters, estimate_memory
from engram_hf.modeling.configuration_engram_moe import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, a repository, or one of the paper's models: {', '.join(PRESETS)}")
    parser.add_argument("--device-map", help='as for from_pretrained: "auto", a device, or JSON (default: the CPU)')
    parser.add_argument("--max-memory", type=json.loads, help='as for from_pretrained, in JSON: {"cpu": "16GB"}')
    parser.add_argument("--dtype", help="of the backbone (default: as in its config; bfloat16 for the paper's models)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=2048)
    arguments = parser.parse_args()

    device_map = arguments.device_map
    if device_map and device_map.lstrip().startswith("{"):
        device_map = json.loads(device_map)
    model = arguments.model
    if model in PRESETS:
        model, arguments.dtype = EngramMoEConfig.preset(model), arguments.dtype or "bfloat16"
    estimate = estimate_memory(
        model, device_map, arguments.dtype, arguments.max_memory, arguments.batch_size, arguments.seq_length
    )
    print("| GB | backbone | tables | optimizer state and gradients | largest step |\n|---|---|---|---|---|")
    for place in estimate.places:
        parts = (estimate.backbone, estimate.tables, estimate.optimizer, estimate.step)
        print(f"| {place} | " + " | ".join(f"{part.get(place, 0) / 1e9:.3f}" for part in parts) + " |")
    if isinstance(model, EngramMoEConfig):
        print(f"\ntables are {100 * count_parameters(model).memory_share:.1f} % of the sparse budget (best: 20 to 25)")


if __name__ == "__main__":
    main()

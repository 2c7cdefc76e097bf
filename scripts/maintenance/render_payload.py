"""Write the top-level folder modeling/: the files that a push puts beside the weights of every EngramMoE model.

    python scripts/maintenance/render_payload.py            a few seconds

config.json is that of the default architecture, with the whole auto_map. Every Python file is a relative link to its
source. A test fails when the folder is not what this script writes.
"""

import argparse
import json
from pathlib import Path

from engram_hf import EngramMoEConfig
from engram_hf.modeling.checkpoint_saving import CODE_FILES
from engram_hf.modeling.configuration_engram_moe import AUTO_MAP


ROOT = Path(__file__).resolve().parents[2]


def render_config() -> str:
    """config.json of a model with the default architecture: its type, and where each Auto class finds its code."""
    config = {"architectures": ["EngramMoEForCausalLM"], "auto_map": AUTO_MAP, "model_type": EngramMoEConfig.model_type}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = ROOT / "modeling"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(render_config())
    for stale in folder.glob("*.py"):
        stale.unlink()
    for name in CODE_FILES:
        (folder / name).symlink_to(Path("../src/engram_hf/modeling") / name)
    print(f"wrote config.json and {len(CODE_FILES)} links to {folder}")


if __name__ == "__main__":
    main()

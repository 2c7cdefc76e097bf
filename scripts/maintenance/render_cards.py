"""Write hub_cards/: the model card of each of the paper's models, and that of the demo's model.

    python scripts/maintenance/render_cards.py                       five seconds
    python scripts/maintenance/render_cards.py --demo output/tiny    takes facts and curves of the demo's last run

Without --demo, the demo's card is rendered from the facts in hub_cards/. A test fails when the folder is not what this
script writes.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from engram_hf import CardFacts, EngramMoEConfig, estimate_memory, read_facts, render_card
from engram_hf.hub.card import facts_of_architecture


FOLDER = Path(__file__).resolve().parents[2] / "hub_cards"
DEMO = "engram-tiny"
PAPER_PRESETS = ("dense-4b", "moe-27b", "engram-27b", "engram-40b")
# The paper does not print them. configuration_engram_moe.py says how they were inferred.
INFERRED = (
    "The ranks of MLA and the widths of the feed-forward layers are inferred: they fit every total the paper prints."
)


def take_demo(folder: Path) -> None:
    """Copy facts and pictures of a model that train_tiny.py saved. Few colours make them four times smaller."""
    facts = read_facts(folder)
    if facts is None or facts.picture is None or facts.gates is None:
        raise ValueError(f"{folder} has no card with pictures; run `make demo` first, with matplotlib installed.")
    pictures = {"picture": f"{DEMO}.png", "gates": f"{DEMO}-gates.png"}
    for name, picture in pictures.items():
        drawn = Image.open(folder / getattr(facts, name))
        drawn.convert("RGB").quantize(48).save(FOLDER / picture, optimize=True)
    content = asdict(replace(facts, name=DEMO, **pictures))
    (FOLDER / f"{DEMO}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def facts_of_preset(name: str) -> CardFacts:
    """Facts of a model of the paper, of which there are no weights; bytes are counted in bfloat16."""
    config = EngramMoEConfig.preset(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(EngramMoEConfig.preset(name), dtype=torch.bfloat16)
    return CardFacts(
        name=name,
        preset=name,
        dtype="bfloat16",
        backbone_nbytes=sum(estimate_memory(config, "cpu", "bfloat16").backbone.values()),
        limits=[INFERRED],
        **facts_of_architecture(config, config, model.base_model.engram_tables()),
    )


def rendered_cards() -> dict[str, str]:
    """Name of each file to its content."""
    demo = CardFacts(**json.loads((FOLDER / f"{DEMO}.json").read_text()))
    presets = [facts_of_preset(name) for name in PAPER_PRESETS]
    return {f"{facts.name}.md": render_card(facts) for facts in (demo, *presets)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder that train_tiny.py has written")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        take_demo(arguments.demo)
    cards = rendered_cards()
    for name, card in cards.items():
        (FOLDER / name).write_text(card, encoding="utf-8")
    print(f"wrote {', '.join(cards)} in {FOLDER}")


if __name__ == "__main__":
    main()

"""Write hub_cards/: the model cards of the paper's models and of the demo's model.

    python scripts/render_cards.py                       # the demo's card from hub_cards/engram-tiny.json; 5 seconds
    python scripts/render_cards.py --demo output/tiny    # first take its facts and curves from this folder

A test fails if the folder differs from what this script writes.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from engram_hf import CardFacts, EngramMoEConfig, gather_facts, render_card
from engram_hf.modeling.configuration_engram_moe import PRESETS


FOLDER = Path(__file__).resolve().parent.parent / "hub_cards"
DEMO = "engram-tiny"
# The paper prints neither, as the config says.
INFERRED = (
    "The ranks of MLA and the widths of the feed-forward layers are inferred: they fit every total the paper prints."
)


def take_demo(folder: Path) -> None:
    """Keep the facts and the picture of a model that train_tiny.py has saved; the picture in 48 colours is smaller."""
    facts = gather_facts(folder)
    if facts.picture is None:
        raise ValueError(f"The card in {folder} has no curves. Run `make demo` first, with matplotlib installed.")
    Image.open(folder / facts.picture).convert("RGB").quantize(48).save(FOLDER / f"{DEMO}.png", optimize=True)
    content = asdict(replace(facts, name=DEMO, picture=f"{DEMO}.png"))
    (FOLDER / f"{DEMO}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def rendered_cards() -> dict[str, str]:
    """File name to content."""
    demo = CardFacts(**json.loads((FOLDER / f"{DEMO}.json").read_text()))
    presets = [gather_facts(EngramMoEConfig.preset(name), limits=[INFERRED]) for name in PRESETS]
    return {f"{facts.name}.md": render_card(facts) for facts in (demo, *presets)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder that train_tiny.py wrote")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        take_demo(arguments.demo)
    cards = rendered_cards()
    for name, card in cards.items():
        (FOLDER / name).write_text(card, encoding="utf-8")
    print(f"wrote {', '.join(cards)} in {FOLDER}")


if __name__ == "__main__":
    main()

"""No rank ever holds a whole table that is cut over ranks: not from loading on, not while it saves, not while it
resumes. Each measurement is the high-water mark of a fresh process."""

import json
from pathlib import Path

import pytest
from processes import run_ranks
from tiny import tiny_config, tiny_model

from engram_hf.modeling.disk_safetensors import read_header


SCRIPT = Path(__file__).parent / "run_rank_memory.py"
RANKS, SLACK_BYTES = 2, 64 * 2**20
# Four heads of this many rows of 256 bytes, about 200 MiB.
ROWS_OF_HEAD, HEAD_DIM = 205_000, 64


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a model with a large table, and of the same model with a table of a few rows."""
    folder = tmp_path_factory.mktemp("bases")
    for name, rows in (("large", ROWS_OF_HEAD), ("small", 53)):
        fields = {"engram_head_dim": HEAD_DIM, "engram_layer_ids": [0], "engram_block_elements": 2**24}
        tiny_model(tiny_config(engram_vocab_size=rows, **fields)).save_pretrained(folder / name)
    return folder


def measure(out: Path, base: Path, tier: str) -> list[dict]:
    """What each rank had at most: in a run that saves, and in one that resumes and saves again."""
    found = []
    resume = None
    for steps in (2, 3):
        out.mkdir(parents=True, exist_ok=True)
        options = {"base": str(base), "tier": tier, "steps": steps, "resume": resume}
        for ran in run_ranks([SCRIPT, out, json.dumps(options)], RANKS):
            assert ran.returncode == 0, ran.stderr[-3000:]
        found += [json.loads((out / f"memory{rank}.json").read_text()) for rank in range(RANKS)]
        resume = str(out / "run" / f"checkpoint-{steps}")
    return found


@pytest.fixture(scope="module")
def without(bases, tmp_path_factory):
    return measure(tmp_path_factory.mktemp("without"), bases / "small", "resident")


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_no_rank_holds_more_than_its_part_while_it_loads_trains_saves_and_resumes(bases, without, tier, tmp_path):
    results = measure(tmp_path, bases / "large", tier)
    files = sorted((bases / "large").glob("tables-*"))
    table_bytes = sum(place.nbytes for file in files for place in read_header(file).values())
    state_bytes = results[0]["state_bytes"] + results[1]["state_bytes"]
    assert table_bytes > 190 * 2**20 and state_bytes > 2 * table_bytes
    allowed = (table_bytes + state_bytes) / RANKS + SLACK_BYTES
    for result, small in zip(results, without, strict=True):
        # Every row had a state, also in the run that has read it.
        assert min(result["touched_rows"]) > 0.99 * table_bytes / (4 * HEAD_DIM) / RANKS
        more = result["most_bytes"] - small["most_bytes"]
        print(f"{tier}: {more / 2**20:.0f} MiB of {allowed / 2**20:.0f} MiB")
        assert more <= allowed

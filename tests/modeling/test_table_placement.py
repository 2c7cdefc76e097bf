"""Names of places and keys of maps: one meaning wherever a place is given. A key without a table lists the tables."""

import pytest
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import estimate_memory


FIRST, SECOND = "model.layers.0.engram.table", "model.layers.2.engram.table"
TABLES = f"The tables of this model are: {FIRST}, {SECOND}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def load(folder, device_map):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


def tiers(model):
    return [[block.tier for block in table.blocks] for table in model.engram_tables()]


# Each table has four blocks.
DISK, HOST, RESIDENT = ["disk"] * 4, ["host"] * 4, ["resident"] * 4
MAPS = [
    ({"...table": "disk"}, [DISK, DISK]),
    ({"...engram.table": "host"}, [HOST, HOST]),
    ({"...2.engram.table": "disk"}, [RESIDENT, DISK]),
    ({"...model.layers.0.engram.table": "disk"}, [DISK, RESIDENT]),
    ({"...table": "disk", SECOND: "resident"}, [DISK, RESIDENT]),
    ({SECOND: "cpu", "...table": "disk"}, [DISK, HOST]),
    ({"...table": "disk", "...table.blocks.1": "host"}, [["disk", "host", "disk", "disk"]] * 2),
    ({"...blocks.3": "disk"}, [["resident"] * 3 + ["disk"]] * 2),
    ({f"base_model.model.{FIRST}": "disk"}, [DISK, RESIDENT]),
]


@pytest.mark.parametrize(("places", "expected"), MAPS)
def test_three_dots_match_every_table_or_block_with_this_end(folder, places, expected):
    assert tiers(load(folder, {"": "cpu", **places})) == expected
    model = load(folder, "cpu")
    model.place_tables(places)
    assert tiers(model) == expected
    nbytes = {tier: sum(tiers.count(tier) for tiers in expected) for tier in ("disk", "host", "resident")}
    estimate = estimate_memory(folder, {"": "cpu", **places})
    one = sum(estimate.tables.values()) / 8
    assert estimate.tables.get("disk", 0) == pytest.approx(nbytes["disk"] * one, rel=0.2)


@pytest.mark.parametrize(("name", "expected"), [("host", HOST), ("cpu", HOST), ("disk", DISK), ("resident", RESIDENT)])
def test_a_place_has_one_meaning_wherever_it_is_given(folder, name, expected):
    assert tiers(load(folder, {"": "cpu", FIRST: name})) == [expected, RESIDENT]
    assert tiers(load(folder, f"cpu+{name}")) == tiers(load(folder, f"host+{name}")) == [expected] * 2
    model = load(folder, "cpu+disk")
    model.place_tables({FIRST: name})
    assert tiers(model) == [expected, DISK]
    assert estimate_memory(folder, f"host+{name}") == estimate_memory(folder, f"cpu+{name}")
    assert tiers(load(folder, {"": "host", FIRST: name})) == [expected, RESIDENT]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"...tabel": "disk"}, rf"names \.\.\.tabel, which is no table. {TABLES}"),
        ({"...1.engram.table": "disk"}, TABLES),
        ({"...": "disk"}, TABLES),
        ({"...mlp": "disk"}, TABLES),
        ({"model.layers.3.engram.table": "disk"}, TABLES),
        ({"...table.blocks.4": "disk"}, "names block 4 of layers.0.engram.table, which has blocks 0 to 3"),
        ({"...table": "disc"}, '"host" .also called "cpu": RAM., "disk", "resident" .* got .disc.'),
        ({"...table": "meta"}, "cannot be placed on .meta."),
    ],
)
def test_a_key_that_matches_nothing_lists_the_tables(folder, places, message):
    for use in (load, estimate_memory):
        with pytest.raises(ValueError, match=message):
            use(folder, {"": "cpu", **places})
    with pytest.raises(ValueError, match=message):
        load(folder, "cpu").place_tables(places)

"""Parameter counts against the paper's table, and against a model that is really there."""

import pytest
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import EngramMoEConfig, NgramHash
from engram_hf.planning import allocate, count_parameters, estimate_memory
from engram_hf.training.optimizers import engram_optimizers


# arXiv 2601.07372, table 1, in billions: total, active, memory.
PAPER = {
    "dense-4b": (4.1, 3.8, 0.0),
    "moe-27b": (26.7, 3.8, 0.0),
    "engram-27b": (26.7, 3.8, 5.7),
    "engram-40b": (39.5, 3.8, 18.5),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_papers_sizes(name):
    config = EngramMoEConfig.preset(name, engram_compressed_vocab_size=None)
    counted = count_parameters(config)
    total, active, memory = PAPER[name]
    assert counted.total / 1e9 == pytest.approx(total, rel=0.015)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.015)
    assert counted.tables / 1e9 == pytest.approx(memory, rel=0.02)
    if config.engram_layer_ids:
        hashing = NgramHash.from_config(config)
        rows = sum(hashing.num_rows(layer) for layer in config.engram_layer_ids)
        assert counted.tables == rows * config.engram_head_dim


def test_the_papers_memory_has_a_quarter_of_the_sparse_budget():
    assert count_parameters(EngramMoEConfig.preset("engram-27b")).memory_share == pytest.approx(0.25, abs=0.01)
    assert count_parameters(EngramMoEConfig.preset("moe-27b")).memory_share == 0


def test_counts_are_those_of_a_real_model():
    model = tiny_model()
    counted = count_parameters(tiny_config())
    # The number that stands for gradients of rows is no weight.
    assert counted.total == sum(p.numel() for n, p in model.named_parameters() if "row_gradients" not in n)
    assert counted.tables == sum(block.numel() for table in model.model.tables() for block in table.blocks)
    # Two expert layers; two of four experts, each three matrices of 32 x 16, are not computed with.
    unused = 2 * 2 * 3 * 32 * 16
    assert counted.active == counted.total - counted.tables - unused - 2 * 99 * 32


@pytest.mark.parametrize("row_format", ["int4", "float8_e4m3fn"])
def test_quantized_tables_have_as_many_parameters_as_plain_ones(row_format):
    assert count_parameters(tiny_config(engram_table_dtype=row_format)) == count_parameters(tiny_config())


def test_the_estimate_is_what_a_loaded_model_takes(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    first, second = (table.name for table in model.engram_tables())
    for device_map in (
        None,
        "cpu",
        {"": "cpu", first: "disk"},
        {"": "cpu", f"{first}.blocks.1": "disk", second: "cpu"},
    ):
        estimate = estimate_memory(tmp_path, device_map)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        tables = {"cpu": 0, "disk": 0}
        for table in loaded.engram_tables():
            for block in table.blocks:
                tables["disk" if block.tier == "disk" else "cpu"] += block.nbytes
        assert estimate.tables == {place: nbytes for place, nbytes in tables.items() if nbytes}
        backbone = [p for n, p in loaded.named_parameters() if ".table." not in n] + list(loaded.buffers())
        assert estimate.backbone == {"cpu": sum(tensor.nbytes for tensor in backbone)}
        trained = sum(p.nbytes + 8 * p.numel() for n, p in loaded.named_parameters() if ".table." not in n)
        arguments = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
        factory, options = engram_optimizers(arguments, work_folder=tmp_path / "work")
        optimizer = factory()(loaded, **options)
        state = {"cpu": trained, "disk": 0}
        for table in loaded.engram_tables():
            kept = sum(tensor.nbytes for tensor in optimizer.rows[table.name].state.values())
            state["disk" if "disk" in table.tiers else "cpu"] += kept
            state["disk"] += table.tiers.get("disk", 0)
        assert estimate.optimizer == {place: nbytes for place, nbytes in state.items() if nbytes}


@pytest.mark.parametrize("ranks", [3, 64])
def test_a_plan_over_ranks_is_of_the_rank_that_holds_most(ranks):
    config = tiny_config(dtype="bfloat16", engram_table_dtype="bfloat16")
    one, many = estimate_memory(config), estimate_memory(config, ranks=ranks, batch_size=2, seq_length=50)
    blocks = [block for table in tiny_model(config).model.tables() for block in table.blocks]
    rows = sum(-(-len(block) // ranks) for block in blocks)
    # Eight numbers of two bytes; two moments of as many, and a count of steps.
    assert many.tables == {"cpu": rows * 16} and many.backbone == one.backbone
    assert many.optimizer["cpu"] == one.optimizer["cpu"] - sum(map(len, blocks)) * 36 + rows * 36
    # Two tables of four heads, half of whose rows are distinct; gradients in float32, and a row id and a bit.
    foreign = 2 * 4 * 100 / 2 * (ranks - 1) / ranks
    assert many.moved_per_step == round(foreign * (16 + 32 + 4 + 1 / 8)) and many.ranks == ranks
    frozen = estimate_memory(tiny_config(engram_table_dtype="int8"), ranks=ranks, batch_size=2, seq_length=50)
    # Eight bytes and a scale; nothing comes back.
    assert frozen.moved_per_step == round(foreign * (10 + 4))
    assert one.moved_per_step == 0 and one.ranks == 1


GIGABYTE = 10**9


def test_the_backbone_gets_accelerators_before_tables():
    limits = {0: "48GB", "cpu": "4GB"}
    estimate = estimate_memory("engram-27b", "auto", "bfloat16", limits)
    assert estimate.backbone == {"cuda:0": pytest.approx(41.9e9, rel=0.01)} and not estimate.lacking
    assert estimate.tables.keys() == {"cuda:0", "host", "disk"} and not estimate.moved_per_forward
    assert sum(estimate.tables.values()) == pytest.approx(11.58e9, rel=0.01)
    roomy = estimate_memory("engram-27b", "auto", "bfloat16", max_memory={0: "80GB", "cpu": "8GB"})
    assert roomy.tables.keys() == {"cuda:0"} and not roomy.rows_per_token


def test_a_model_that_fits_in_part_is_planned_with_room_for_the_step_and_says_what_it_moves():
    estimate = estimate_memory("engram-27b", "auto", "bfloat16", max_memory={0: "24GB", "cpu": "64GB"})
    assert not estimate.lacking and estimate.limits == {"cuda:0": 24 * GIGABYTE, "cpu": 64 * GIGABYTE}
    assert 20 * GIGABYTE < estimate.backbone["cuda:0"] <= 24 * GIGABYTE - estimate.step["cuda:0"]
    # What passes through the accelerator needs what is free there, so no table does.
    assert estimate.tables.keys() == {"host"}
    assert estimate.moved_per_forward == {"cpu": estimate.backbone["cpu"]}
    # Two tables of 16 heads; a row has 80 numbers of two bytes.
    assert estimate.rows_per_token == {"host": 32} and estimate.read_per_token == {"host": 32 * 160}
    assert estimate.max_memory == {0: 24 * GIGABYTE - estimate.step["cuda:0"], "cpu": 64 * GIGABYTE}


@pytest.mark.parametrize("part", [0.7, 1.2, 2.0])
def test_an_automatic_plan_is_what_loading_does(tmp_path, part):
    tiny_model().save_pretrained(tmp_path)
    free = estimate_memory(tmp_path, "cpu")
    limit = int(part * sum(free.backbone.values())) + free.step["cpu"]
    estimate = estimate_memory(tmp_path, "auto", max_memory={"cpu": limit})
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=estimate.max_memory, offload_folder=tmp_path / "offload"
    )
    on_cpu = [p for n, p in loaded.named_parameters() if ".table." not in n] + list(loaded.buffers())
    # Buffers of layers on disk stay here.
    assert sum(tensor.nbytes for tensor in on_cpu if not tensor.is_meta) == pytest.approx(
        estimate.backbone["cpu"], 0.01
    )
    tables = {"cpu": 0, "disk": 0}
    for table in loaded.engram_tables():
        for block in table.blocks:
            tables["disk" if block.tier == "disk" else "cpu"] += block.nbytes
    assert estimate.tables == {place: nbytes for place, nbytes in tables.items() if nbytes}


def test_planning_says_nothing_of_the_devices_of_this_machine(caplog, recwarn):
    estimate_memory("tiny", "auto", max_memory={0: "1GB", 3: "1GB", "cpu": "64GB"})
    estimate_memory("tiny", "auto", max_memory={0: "100KB", "cpu": "64GB"})
    assert not caplog.records and not recwarn.list


def test_a_plan_says_how_much_memory_it_lacks():
    config = tiny_config()
    free = estimate_memory(config, "cpu")
    weights, step = sum(free.backbone.values()), free.step["cpu"]
    # accelerate keeps a little more free than nothing.
    enough = weights + step + 1000
    assert not estimate_memory(config, "auto+disk", max_memory={"cpu": enough}).lacking
    tables = sum(free.tables.values())
    beside = estimate_memory(config, "auto+host", max_memory={"cpu": enough})
    assert beside.lacking == {"cpu": tables - 1000}
    tight = estimate_memory(config, "auto", max_memory={"cpu": weights // 2 + step})
    assert tight.lacking["disk"] == tight.backbone["disk"] == tight.moved_per_forward["disk"] > 0
    hopeless = estimate_memory(config, "auto", max_memory={"cpu": step - 1})
    assert hopeless.lacking == {"cpu": 1, "disk": weights}


@pytest.mark.parametrize("name", ["tiny", "engram-27b"])
def test_a_preset_is_planned_by_its_name(name):
    config = EngramMoEConfig.preset(name)
    assert estimate_memory(name, dtype="bfloat16") == estimate_memory(config, dtype="bfloat16")
    assert count_parameters(name) == count_parameters(config)
    with pytest.raises(FileNotFoundError, match="engram-28b is no folder, no repository .user/model. and no preset"):
        estimate_memory("engram-28b")


def test_the_backbone_is_planned_in_the_type_that_it_has():
    single, half = (estimate_memory(tiny_config(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert single.backbone["cpu"] > 1.8 * half.backbone["cpu"]
    assert estimate_memory(tiny_config(dtype="float32"), dtype="bfloat16").backbone == half.backbone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"device_map": {"": "cpu", "model.layers.3.engram.table": "disk"}},
            "names model.layers.3.*: model.layers.0.engram",
        ),
        ({"device_map": {"": "cpu", "model.layers.0.engram.tabel": "disk"}}, "tabel.*: model.layers.0.engram.table"),
        ({"device_map": "disc"}, "got 'disc'"),
        ({"device_map": {"": "disc"}}, "got 'disc'"),
        ({"dtype": "bf16"}, "such as float32, bfloat16 .* got 'bf16'"),
        ({"dtype": "int8"}, "got 'int8'"),
        ({"max_memory": {"cpu": "1GB"}}, "not used with None. Give device_map="),
        ({"max_memory": [1], "device_map": "auto"}, "is a dict such as"),
        ({"max_memory": {"cpu": [1]}, "device_map": "auto"}, "is a dict such as"),
        ({"max_memory": {"cpu": "24 apples"}, "device_map": "auto"}, "is a dict such as"),
        ({"max_memory": {"gpu": "24GB"}, "device_map": "auto"}, "is a dict such as"),
    ],
)
def test_an_argument_that_means_nothing_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(tiny_config(), **arguments)


@pytest.mark.parametrize("name", ["tiny", "100m", "engram-27b"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.4])
def test_another_share_in_tables_leaves_the_size_of_a_model_as_it_is(name, share):
    before, config = count_parameters(name), allocate(name, share)
    count = count_parameters(config)
    assert count.total == pytest.approx(before.total, rel=2e-3)
    assert count.active == pytest.approx(before.active, rel=5e-3)
    # Experts are whole.
    assert count.memory_share == pytest.approx(share, abs=0.04 if name == "tiny" else 0.02)
    assert config.engram_layer_ids == EngramMoEConfig.preset(name).engram_layer_ids


def test_a_share_that_leaves_too_little_is_refused():
    with pytest.raises(ValueError, match="A share of 0.9 leaves 1 routed experts and .* more experts than the 2"):
        allocate(tiny_config(), 0.9)
    with pytest.raises(ValueError, match="must lie between 0 and 1, such as 0.2 for 20 %, got 0"):
        allocate(tiny_config(), 0.0)
    with pytest.raises(ValueError, match="Start from a preset such as engram-27b"):
        allocate("moe-27b", 0.2)

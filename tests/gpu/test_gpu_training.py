"""Training rows on a GPU: the weights of the same run on a CPU, on every tier."""

import dataclasses
import warnings

import pytest
import torch
from devices import DEVICES, SLEEP_CYCLES, device_map, needs_gpu
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import RowAdam, RowSGD, engram_optimizers
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_formats import row_format
from engram_hf.training.row_updates import RowUpdates


# Its name in transformers 6, where this release has it already.
IS_RENAMED = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
ENABLE_CHECKPOINTING = f"{'activation' if IS_RENAMED else 'gradient'}_checkpointing_enable"
ON_EVERY_TIER = ["resident", "host", "disk"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In double precision: rounding, which experts and Adam magnify, would hide what is wrong."""
    model = tiny_model(tiny_config(engram_table_dtype="float64")).double()
    model.save_pretrained(tmp_path_factory.mktemp("model"))
    return tmp_path_factory.getbasetemp() / "model0"


def loaded(folder, device, tier):
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map(device, tier), dtype=torch.float64, experts_implementation="eager"
    )
    return model.train()


def made_optimizer(model, rule, work_folder):
    args = TrainingArguments(
        str(work_folder / "run"), learning_rate=1e-2, adam_epsilon=1e-4, use_cpu=True, report_to=[]
    )
    factory, options = engram_optimizers(args, rule, work_folder=work_folder)
    return factory()(model, **options)


def step(model, optimizer, number, accumulated=1):
    for part in range(accumulated):
        ids = tiny_ids(2, 9, seed=10 * number + part).to(model.device)
        (model(input_ids=ids, labels=ids).loss / accumulated).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3, foreach=False)
    optimizer.step()
    optimizer.zero_grad()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def trained(folder, device, tier, rule, work_folder, accumulated=1, is_checkpointed=False):
    model = loaded(folder, device, tier)
    if is_checkpointed:
        getattr(model, ENABLE_CHECKPOINTING)()
    optimizer = made_optimizer(model, rule, work_folder)
    for number in range(3):
        step(model, optimizer, number, accumulated)
    return weights(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tier", ON_EVERY_TIER)
@pytest.mark.parametrize("rule", ["adam", "rowwise_adam", "adagrad", "sgd"])
def test_three_steps_of_every_rule_give_the_cpu_s_weights(folder, tmp_path, device, tier, rule):
    if device == "cpu" and (tier, rule) not in (("host", "adam"), ("disk", "sgd")):
        pytest.skip("needs a GPU: tests/training has this case on a CPU")
    expected = trained(folder, "cpu", "resident", rule, tmp_path / "expected", accumulated=2)
    actual = trained(folder, device, tier, rule, tmp_path / "actual", accumulated=2, is_checkpointed=True)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


@needs_gpu
@pytest.mark.parametrize("tier", ON_EVERY_TIER)
def test_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path, tier):
    whole = loaded(folder, "cuda", tier)
    optimizer = made_optimizer(whole, "adam", tmp_path / "whole")
    for number in range(2):
        step(whole, optimizer, number)
    whole.save_pretrained(tmp_path / "saved")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    step(whole, optimizer, 2)
    resumed = loaded(tmp_path / "saved", "cuda", tier)
    optimizer = made_optimizer(resumed, "adam", tmp_path / "resumed")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=False))
    step(resumed, optimizer, 2)
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


@needs_gpu
@pytest.mark.parametrize("tier", ["resident", "host"])
def test_a_loss_scale_reaches_rows_also_behind_a_busy_stream(folder, tmp_path, tier):
    plain, scaled = (loaded(folder, "cuda", tier) for _ in range(2))
    plain_optimizer = made_optimizer(plain, RowSGD(momentum=0.5), tmp_path / "plain")
    scaled_optimizer = made_optimizer(scaled, RowSGD(momentum=0.5), tmp_path / "scaled")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for number in range(3):
        step(plain, plain_optimizer, number)
        ids = tiny_ids(2, 9, seed=10 * number).cuda()
        scaler.scale(scaled(input_ids=ids, labels=ids).loss).backward()
        torch.cuda._sleep(10 * SLEEP_CYCLES)
        scaler.unscale_(scaled_optimizer)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.3, foreach=False)
        scaler.step(scaled_optimizer)
        scaler.update()
        scaled_optimizer.zero_grad()
    expected = weights(plain)
    for name, weight in weights(scaled).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)


@needs_gpu
@pytest.mark.parametrize("tier", ON_EVERY_TIER)
def test_a_step_waits_for_the_gpu_a_few_times_a_table(folder, tmp_path, tier, record_property):
    model = loaded(folder, "cuda", tier)
    optimizer = made_optimizer(model, "adam", tmp_path)
    for number in range(2):
        step(model, optimizer, number)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, optimizer, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    record_property("waits", waits)
    # The model itself waits too: its experts are computed one by one here.
    assert waits < 100, waits


@needs_gpu
def test_a_step_of_a_million_rows_takes_little_more_than_its_gradients():
    rows, width = 1_000_003, 512
    with torch.device("cuda"):
        table = EngramTable([rows], width, 2**31, row_format("float32"))
    torch.nn.init.zeros_(table.blocks[0])
    updates = RowUpdates("table", table, RowSGD(momentum=0.5))
    table(torch.arange(1_000_000, device="cuda").view(1, -1, 1)).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert updates.step(lr=1.0) == 1_000_000
    # The gradients have 2 GB. All rows at once would take ten times as much; a part of them has 0.3 GB.
    assert torch.cuda.max_memory_allocated() - before < 10 * 2**30
    assert torch.equal(table.blocks[0][:1_000_000].amax(), torch.tensor(-1.0, device="cuda"))


@needs_gpu
def test_the_state_of_a_million_rows_is_saved_and_loaded_in_pieces():
    rows, width = 1_000_003, 256
    with torch.device("cuda"):
        tables = [EngramTable([rows], width, 2**31, row_format("float32")) for _ in range(2)]
    for table in tables:
        torch.nn.init.zeros_(table.blocks[0])
    saved, loaded = (RowUpdates("table", table, RowAdam()) for table in tables)
    tables[0](torch.arange(1_000_000, device="cuda").view(1, -1, 1)).sum().backward()
    saved.step(lr=1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded.load_state_dict(loaded.checked(saved.state_dict()))
    # The state has 2 GB on each side, and is on the CPU in between.
    assert torch.cuda.max_memory_allocated() - before < 2**30
    assert all(torch.equal(loaded.stores[name], store) for name, store in saved.stores.items())

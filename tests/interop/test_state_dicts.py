"""State dicts as others take, store and give them back: torch's distributed checkpoints, safetensors, accelerate."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from tiers import TIERS, load, logits_of
from tiny import tiny_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(params=TIERS)
def tier(request):
    return request.param


def assert_is(model, seed: int) -> None:
    assert torch.equal(logits_of(model), logits_of(tiny_model(seed=seed)))


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True, "cpu_offload": True}])
def test_a_distributed_state_dict_is_the_plain_one(folder, tier, options):
    model = load(folder, tier)
    state = get_model_state_dict(model, options=StateDictOptions(**options))
    expected = tiny_model().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    other = tiny_model(seed=1)
    set_model_state_dict(other, state)
    assert_is(other, 0)


def test_a_distributed_state_dict_is_put_into_a_model_on_a_tier(folder, tier):
    model = load(folder, tier)
    set_model_state_dict(model, get_model_state_dict(tiny_model(seed=1)))
    assert_is(model, 1)
    assert_is(load(folder), 0)


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_saved_and_loaded(folder, tier, tmp_path):
    model = load(folder, tier)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
    other = tiny_model(seed=1)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other, state["model"])
    assert_is(other, 0)


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_loaded_in_place(folder, tier, tmp_path):
    """As `dcp.load` does with a state dict whose tensors are the model's own: no file of the model changes."""
    dcp.save({"model": tiny_model(seed=1).state_dict()}, checkpoint_id=tmp_path)
    model = load(folder, tier)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state["model"])
    assert_is(model, 1)
    assert_is(load(folder), 0)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded(folder, tier, assign):
    model = load(folder, tier)
    model.load_state_dict(tiny_model(seed=1).state_dict(), assign=assign)
    assert_is(model, 1)
    model.load_state_dict(load(folder).state_dict(), assign=assign)
    assert_is(model, 0)
    assert_is(load(folder), 0)


def test_a_state_dict_is_torn_off_before_it_is_changed(folder, tier):
    """A snapshot of one's own, taken before training and given back after it."""
    model = load(folder, tier)
    snapshot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.load_state_dict(snapshot)
    assert_is(model, 0)


def test_safetensors_saves_a_model_and_loads_it(folder, tier, tmp_path):
    model = load(folder, tier)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = tiny_model(seed=1)
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert_is(other, 0)


def test_accelerate_saves_a_model_that_loads(folder, tier, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(load(folder, tier))
    expected = tiny_model().state_dict()
    state = accelerator.get_state_dict(model)
    assert state.keys() == expected.keys()
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "pretrained",
        state_dict=state,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )
    assert_is(load(tmp_path / "pretrained"), 0)
    accelerator.save_model(model, str(tmp_path / "plain"))
    other = tiny_model(seed=1)
    load_model(other, str(tmp_path / "plain" / "model.safetensors"))
    assert_is(other, 0)


def test_accelerate_saves_the_state_of_a_run(folder, tier, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(load(folder, tier))
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    accelerator.load_state(str(tmp_path))
    assert_is(model, 0)

"""Copies and pickles of a model, on every tier: the same logits, and nothing shared that is written to."""

import copy
import io
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from tiers import TIERS, load, logits_of, right_or_refused
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from torch.func import functional_call


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
    "twice": lambda model: copy.deepcopy(through_torch(copy.deepcopy(model))),
}


@pytest.fixture(scope="module", params=[None, "int8"], ids=["float", "int8"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config(engram_table_dtype=request.param)).save_pretrained(folder)
    return folder


def blocks(model) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if ".table.blocks." in name]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_same_model_on_the_same_tier(folder, way, tier):
    model = load(folder, tier)
    expected = logits_of(model)
    copied = WAYS[way](model)
    assert torch.equal(logits_of(copied), expected)
    assert [table.tiers for table in copied.engram_tables()] == [table.tiers for table in model.engram_tables()]
    ids = tiny_ids(1, 5)
    assert torch.equal(copied.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pickle_of_a_model_in_memory_needs_no_files(folder, way, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    model = load(tmp_path / "model", "resident")
    expected, pickled = logits_of(model), pickle.dumps(model)
    if way == "torch.save":
        pickled = io.BytesIO()
        torch.save(model, pickled)
    del model
    shutil.rmtree(tmp_path / "model")
    if way == "torch.save":
        pickled.seek(0)
    copied = pickle.loads(pickled) if way == "pickle" else torch.load(pickled, weights_only=False)
    assert torch.equal(logits_of(copied), expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("way", WAYS)
def test_writing_into_a_copy_changes_no_other_model_and_no_file(folder, way, tier):
    model = load(folder, tier)
    expected = logits_of(model)
    copied = WAYS[way](model)
    with torch.no_grad():
        for block in blocks(copied):
            block.zero_()
    assert not torch.equal(logits_of(copied), expected)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(load(folder)), expected)
    # And a copy of what was written has what was written.
    again = WAYS[way](copied)
    assert torch.equal(logits_of(again), logits_of(copied))


@pytest.mark.parametrize("tier", TIERS)
def test_a_copy_of_a_model_that_was_written_to_has_what_was_written(folder, tier):
    model = load(folder, tier)
    before = logits_of(model)
    with torch.no_grad():
        blocks(model)[0][::2] = blocks(model)[1][0]
    changed = logits_of(model)
    assert not torch.equal(changed, before)
    for copied in (copy.deepcopy(model), through_torch(model)):
        assert torch.equal(logits_of(copied), changed)


@pytest.mark.parametrize("tier", TIERS)
def test_a_copy_is_saved_as_the_model_is(folder, tier, tmp_path):
    model = load(folder, tier)
    copied = copy.deepcopy(model)
    del model
    copied.save_pretrained(tmp_path / "copied")
    assert torch.equal(logits_of(load(tmp_path / "copied")), logits_of(load(folder)))
    copied.save_pretrained(tmp_path / "copied")
    assert torch.equal(logits_of(copied), logits_of(load(folder)))


@pytest.mark.slow
def test_a_pickle_is_read_by_another_process(folder, tmp_path):
    model = load(folder, "disk")
    torch.save({"model": model, "ids": tiny_ids(2, 11), "logits": logits_of(model)}, tmp_path / "model.pt")
    code = (
        "import sys, torch, engram_hf\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.equal(saved['model'](saved['ids']).logits, saved['logits'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("tier", TIERS)
def test_a_call_with_other_parameters_reads_their_rows(tmp_path, tier):
    """`functional_call`, as meta-learning and influence functions use it."""
    tiny_model().save_pretrained(tmp_path)
    model, ids, other = load(tmp_path, tier), tiny_ids(2, 11), tiny_model(seed=1)
    with torch.no_grad():
        same = functional_call(model, dict(model.named_parameters()), (ids,))
        assert_same_logits(same.logits, logits_of(model))

    def replaced():
        with torch.no_grad():
            return functional_call(model, dict(other.named_parameters()), (ids,)).logits

    right_or_refused(replaced, logits_of(other), "was on disk .* replaced it by a copy in memory")
    assert_same_logits(logits_of(model), logits_of(tiny_model()))


@pytest.mark.parametrize("tier", TIERS)
def test_rows_that_are_replaced_through_data_are_the_ones_that_are_read(tmp_path, tier):
    """What optimizers, mergers and PEFT write to: `parameter.data = ...`."""
    tiny_model().save_pretrained(tmp_path)
    model, other = load(tmp_path, tier), tiny_model(seed=1)
    for parameter, replacement in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = replacement.data.clone()
    right_or_refused(lambda: logits_of(model), logits_of(other), "was on disk .* replaced it by a copy in memory")
    model.save_pretrained(tmp_path / "replaced")
    assert_same_logits(logits_of(load(tmp_path / "replaced")), logits_of(other))
    assert_same_logits(logits_of(load(tmp_path)), logits_of(tiny_model()))

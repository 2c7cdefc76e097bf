"""transformers 5.24 calls `save_pretrained` on every rank: one whole checkpoint is left, whoever calls it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from run_saves import WAYS
from run_saves_patch import model_that_trains
from tiers import load
from tiny import tiny_model

from engram_hf import load_patch, verify_tables


def save_in_processes(out: Path, **options) -> None:
    ran = run_processes([sys.executable, Path(__file__).with_name("run_saves.py"), out, json.dumps(options)])
    assert ran.returncode == 0, ran.stderr[-3000:]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def assert_is_whole(folder: Path, expected_names: list[str], seeds: list[int]) -> None:
    """The folder holds the files of one save, and the model of one of the seeds."""
    assert names(folder) == expected_names
    verify_tables(folder)
    found = load(folder).state_dict()
    models = [tiny_model(seed=seed).state_dict() for seed in seeds]
    assert any(all(torch.equal(found[name], model[name]) for name in model) for model in models), folder


@pytest.fixture(scope="module")
def expected_names(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("one") / "model"
    tiny_model().save_pretrained(folder)
    return names(folder)


def save_and_read(out: Path, processes: list[int], rounds: list[int], expected_names: list[str]) -> None:
    ways = [(way, number) for number in processes for way in (WAYS if number == 2 else WAYS[:1])]
    for way, number in ways:
        tiny_model(seed=99).save_pretrained(out / f"{way}-existing-{number}" / "model")
    save_in_processes(out, processes=processes, rounds=rounds)
    for each in rounds:
        for way, number in ways:
            for kind in ("new", "existing"):
                assert_is_whole(out / f"{way}-{kind}-{number}" / str(each), expected_names, [each])
        assert_is_whole(out / "strangers" / str(each), expected_names, [each, each + 1])


def test_processes_that_save_at_once_leave_one_whole_checkpoint(tmp_path, expected_names):
    save_and_read(tmp_path, [2, 3, 4], [0], expected_names)


@pytest.mark.slow
def test_a_patch_in_training_that_every_process_saves_is_left_whole(tmp_path):
    ran = run_processes([sys.executable, Path(__file__).with_name("run_saves_patch.py"), tmp_path])
    assert ran.returncode == 0, ran.stderr[-3000:]
    for seed, file in enumerate((tmp_path / "0.safetensors", tmp_path / "1.safetensors", tmp_path / "model")):
        found, expected = load_patch(file), model_that_trains(seed).trained_patch()
        assert found.name == "alice" and list(found.tables) == list(expected.tables)
        for name, each in expected.tables.items():
            assert torch.equal(found.tables[name].row_ids, each.row_ids)
            assert torch.equal(found.tables[name].rows, each.rows)
    verify_tables(tmp_path / "model")
    left = names(tmp_path / "plain")
    assert names(tmp_path / "model") == sorted([*left, "patch.safetensors"]) and "patch.safetensors" not in left


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_fifty_saves_at_once_leave_a_whole_checkpoint_each_time(tmp_path, expected_names, processes):
    save_and_read(tmp_path, [processes], list(range(50)), expected_names)

"""Checkpoints of tables over ranks: any number of processes goes on from them, bit for bit."""

import json
import os
import shutil
import signal
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from cases import slow
from processes import run_processes, run_ranks
from run_rank_saves import RUNS, SAVED_AT, SMALL_RUNS, STEPS, optimizer_of
from safetensors.torch import load_file
from transformers.trainer_utils import load_sharded_checkpoint

from engram_hf import EngramMoEForCausalLM, last_complete_checkpoint, merge_changed_rows, verify_tables
from engram_hf.modeling.disk_safetensors import file_digest
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_blocks import changed_name
from engram_hf.modeling.table_changes import digest_of


SCRIPT = Path(__file__).parent / "run_rank_saves.py"
TRAINS = Path(__file__).parent / "run_distributed.py"


def start(folder: Path, names) -> Path:
    ran = run_processes([sys.executable, SCRIPT, folder, *names])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Runs of one and two processes."""
    return start(tmp_path_factory.mktemp("small"), SMALL_RUNS)


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    return start(tmp_path_factory.mktemp("all"), RUNS)


def rows_of(checkpoint: Path) -> list[torch.Tensor]:
    tables = EngramMoEForCausalLM.from_pretrained(checkpoint).named_tables().values()
    return [torch.cat([block.detach() for block in table.blocks]) for table in tables]


def state_of(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    """For each table the state of its rows, in the order of row ids, wherever it is."""
    found = []
    for saved in torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values():
        if "files" in saved:
            parts = [load_file(checkpoint / name) for name in sorted(saved["files"][0])]
        else:
            parts = [{name: saved[name][0] for name in ("row_ids", "wide", "narrow")}]
        state = {name: torch.cat([part[name] for part in parts]) for name in ("row_ids", "wide", "narrow")}
        order = state["row_ids"].argsort()
        found.append({name: tensor[order] for name, tensor in state.items()})
    return found


def assert_same(checkpoint: Path, expected: Path) -> None:
    torch.testing.assert_close(rows_of(checkpoint), rows_of(expected), rtol=0, atol=0)
    torch.testing.assert_close(state_of(checkpoint), state_of(expected), rtol=0, atol=0)


def last(folder: Path, name: str) -> Path:
    return folder / name / f"checkpoint-{STEPS}"


def test_two_processes_save_what_one_does_and_one_goes_on_from_it_bit_for_bit(small):
    for step in (SAVED_AT, STEPS):
        assert_same(small / "two" / f"checkpoint-{step}", small / "one" / f"checkpoint-{step}")
    assert_same(last(small, "one after two"), last(small, "two"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("by")])
def test_what_four_processes_have_saved_any_number_goes_on_from_bit_for_bit(all_runs, name):
    assert_same(last(all_runs, "four"), last(all_runs, "one"))
    assert_same(last(all_runs, name), last(all_runs, "four"))


@pytest.mark.parametrize("runs, many", [("small", "two"), slow("all_runs", "four")])
def test_blocks_that_are_written_whole_are_the_files_of_one_process(runs, many, request):
    folder = request.getfixturevalue(runs)
    names = sorted(path.name for path in last(folder, "one").glob("tables-layer-*"))
    digests = [[file_digest(last(folder, each) / name) for name in names] for each in ("one", many)]
    assert digests[0] == digests[1]
    # The table whose rows have changed is another file than it was, and the other one is the same.
    changed = [file_digest(folder / "base" / name) != digest for name, digest in zip(names, digests[0], strict=True)]
    assert any(changed) and not all(changed)


def test_tables_on_disk_that_nobody_trains_are_linked_unless_a_process_has_changed_them(small):
    names = sorted(path.name for path in (small / "base").glob("tables-*.safetensors"))
    assert len(names) == 2
    for name in names:
        assert (small / "untouched" / name).samefile(small / "base" / name)
    assert (small / "touched" / names[1]).samefile(small / "base" / names[1])
    files = list((small / "touched").glob("tables-layer-00-*"))
    assert files and not any(file.samefile(small / "base" / names[0]) for file in files)
    (before, _), (after, _) = rows_of(small / "base"), rows_of(small / "touched")
    table = next(iter(EngramMoEForCausalLM.from_pretrained(small / "base").named_tables().values()))
    # The first row of the second process: half of the first block lies ahead of it.
    before[-(-len(table.blocks[0]) // 2)] = 1
    assert torch.equal(before, after)


@pytest.mark.parametrize("runs, many", [("small", "two"), slow("all_runs", "four")])
def test_changed_rows_and_the_state_of_rows_have_a_file_for_each_rank(runs, many, request, tmp_path):
    folder = request.getfixturevalue(runs)
    ranks, checkpoint = RUNS[many][0], last(folder, many)
    for start_of_name in ("rows-layer-00", "row-state-layer-00", "row-state-layer-02"):
        names = sorted(path.name for path in checkpoint.glob(f"{start_of_name}-*"))
        assert names == [f"{start_of_name}-{rank + 1:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]
    parts = [load_file(path) for path in sorted(checkpoint.glob("rows-layer-00-*"))]
    found = [part[next(name for name in part if ".changed.row_ids" in name)] for part in parts]
    one = load_file(last(folder, "one") / "rows-layer-00.safetensors")
    assert torch.equal(torch.cat(found).sort().values, one["model.layers.0.engram.table.changed.row_ids"])
    assert all(len(row_ids) for row_ids in found)
    # The index knows all of it, and so does whoever reads a checkpoint.
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert set(index["metadata"]["row_state"]) == {path.name for path in checkpoint.glob("row-state-*")}
    assert {file.name for file in verify_tables(checkpoint)} >= set(index["metadata"]["row_state"])
    merged = merge_changed_rows(checkpoint, tmp_path / "merged")
    torch.testing.assert_close(rows_of(merged), rows_of(last(folder, "one")), rtol=0, atol=0)
    assert not list(merged.glob("row*"))


@pytest.mark.parametrize("runs, many", [("small", "two"), slow("all_runs", "four")])
def test_the_progress_of_the_rank_that_saves_is_that_of_whole_tables(runs, many, request):
    """Of files that it writes, and of files that it links."""
    folder = request.getfixturevalue(runs)
    tables = [load_file(path).values() for path in (folder / "base").glob("tables-*.safetensors")]
    nbytes = sum(block.nbytes for blocks in tables for block in blocks)
    steps = [folder / name / f"checkpoint-{step}.bars" for name in ("one", many) for step in (SAVED_AT, STEPS)]
    idle = [folder / "untouched.bars", folder / "touched.bars"] if many == "two" else []
    for path in [*steps, *idle]:
        assert torch.load(path) == [(nbytes, nbytes)], path


@pytest.mark.skipif(sys.platform != "linux", reason="one path leads to two folders by Linux's /proc")
def test_ranks_without_a_shared_disk_save_what_others_do(small):
    folder = small / "apart" / "disk0"
    assert not list((small / "apart" / "disk1").iterdir())
    for step in (SAVED_AT, STEPS):
        checkpoint, expected = folder / f"checkpoint-{step}", small / "two" / f"checkpoint-{step}"
        assert_same(checkpoint, expected)
        # The table of which few rows change is left to the file that the run began with, both times.
        name = "tables-layer-00-00001-of-00001.safetensors"
        assert os.path.samefile(checkpoint / name, small / "base" / name)


def test_no_wrapper_makes_the_parts_of_ranks_equal(small):
    for rank in range(2):
        # The model itself, and an adapter around it.
        for is_wrapped, *are_kept in torch.load(small / f"wrapped{rank}.pt"):
            assert is_wrapped and are_kept and all(are_kept)


def test_a_state_whose_files_are_gone_or_of_another_step_is_refused(small, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(small / "two" / "checkpoint-2", checkpoint)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for each in saved["state"].values():
        each["folder"] = ("/nowhere",)
    # A copy of a checkpoint is found where the model was loaded from.
    optimizer = optimizer_of(EngramMoEForCausalLM.from_pretrained(checkpoint), tmp_path / "run")
    optimizer.load_state_dict(saved)
    gone = checkpoint / "row-state-layer-02-00002-of-00002.safetensors"
    shutil.copy(small / "two" / "checkpoint-4" / gone.name, gone)
    with pytest.raises(ValueError, match="another run or step than optimizer.pt"):
        optimizer.load_state_dict(saved)
    gone.unlink()
    with pytest.raises(ValueError, match="leaves the state of model.layers.2.engram.table to 2 files beside it"):
        optimizer.load_state_dict(saved)


def test_a_run_that_began_from_a_checkpoint_of_an_earlier_one_finds_the_state_of_its_own(small, tmp_path):
    """Files of both have the same names."""
    resumed = small / "two" / "checkpoint-2"
    model = EngramMoEForCausalLM.from_pretrained(small / "two" / "checkpoint-4")
    load_sharded_checkpoint(model, resumed, strict=False)
    optimizer = optimizer_of(model, tmp_path / "run")
    optimizer.load_state_dict(torch.load(resumed / "optimizer.pt", weights_only=True))
    found = [each["row_ids"][0] for each in optimizer.state_dict()["state"].values()]
    assert len(found) == 2 and all(map(torch.equal, found, [each["row_ids"] for each in state_of(resumed)]))


@pytest.mark.parametrize("order", list(permutations(["blocks.0", "blocks.1", "rank 0", "rank 1"])))
def test_files_of_a_checkpoint_over_ranks_may_be_loaded_in_any_order(order):
    """As `load_sharded_checkpoint` of transformers, which goes through a set. The second block was written whole."""
    blocks = {f"blocks.{number}": torch.randn(rows, 4) for number, rows in enumerate((10, 12))}
    digests = torch.stack([torch.tensor(list(digest_of(block)), dtype=torch.uint8) for block in blocks.values()])
    files, expected = {name: {f"table.{name}": block} for name, block in blocks.items()}, torch.cat([*blocks.values()])
    for rank, row_ids in enumerate(([1, 3], [6, 7])):
        expected[row_ids] = rows = torch.randn(2, 4)
        parts = {"row_ids": torch.tensor(row_ids), "rows": rows, "digests": digests, "stamp": digests[0, :16]}
        files[f"rank {rank}"] = {changed_name("table", part, rank): tensor for part, tensor in parts.items()}
    model = torch.nn.ModuleDict({"table": EngramTable([10, 12], head_dim=4, block_elements=40)})
    # It has the blocks already, as where a run is loaded from the model that it began with.
    model.load_state_dict({f"table.{name}": block for name, block in blocks.items()}, strict=False)
    model.table.gather_rows(torch.arange(1))
    # The second time over the rows that the first has brought.
    for name in [*order, *order]:
        model.load_state_dict(files[name], strict=False)
    changes = model.table.changes
    assert torch.equal(model.table.gather_rows(torch.arange(22)), expected)
    # The next checkpoint stands on the same blocks.
    model.table.collect_row_gradients()
    assert changes.changed_between(0, 22, model.table.block_records).tolist() == [1, 3, 6, 7]
    assert changes.stamp == bytes(digests[0, :16].tolist())


# The stock Trainer, over two processes that nobody ends when one of them fails.


def train(out: Path, **options) -> tuple[list, list[dict]]:
    """How the processes ended, and what those have left that came to their end."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = {
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        **options.pop("trainer", {}),
    }
    options = {"rule": "sgd", "tier": "resident", "shard": True, "steps": 3, "trainer": trainer, **options}
    ran = run_ranks([TRAINS, out, json.dumps(options)], 2)
    files = [out / f"result{rank}of2.pt" for rank in range(2)]
    return ran, [torch.load(file) for file in files if file.exists()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing has broken, and what it has left."""
    folder = tmp_path_factory.mktemp("unbroken")
    ran, results = train(folder, trainer={"save_total_limit": 2})
    assert [each.returncode for each in ran] == [0, 0], ran[0].stderr[-3000:]
    return folder, results


def assert_goes_on(folder: Path, checkpoint: str, results: list[dict]) -> None:
    """A run of Trainer that resumes is the unbroken one, bit for bit."""
    ran, resumed = train(folder, base=checkpoint, resume=checkpoint)
    assert [each.returncode for each in ran] == [0, 0], ran[0].stderr[-3000:]
    for result, expected in zip(resumed, results, strict=True):
        for name in ("tables", "rest"):
            torch.testing.assert_close(result[name], expected[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank, how", [(0, "killed"), (1, "killed"), (0, "killed in a write"), (0, "full")])
def test_a_run_that_is_broken_while_it_saves_goes_on_from_its_last_whole_checkpoint(unbroken, tmp_path, rank, how):
    ran, results = train(tmp_path, breaks=[rank, 2, how])
    # None of them waits for the other one for ever.
    assert not results and all(each.returncode for each in ran)
    signals = {"killed": signal.SIGKILL, "killed in a write": signal.SIGXFSZ}
    if how == "full":
        assert "rows-layer-00-00001-of-00002.safetensors could not be written" in ran[0].stderr
    else:
        assert ran[rank].returncode == -signals[how]
    last_one = last_complete_checkpoint(tmp_path / "run")
    assert last_one is not None and last_one.endswith("checkpoint-1")
    assert_goes_on(tmp_path, last_one, unbroken[1])


@pytest.mark.slow
def test_no_more_checkpoints_are_kept_than_were_asked_for_and_the_last_of_them_is_whole(unbroken, tmp_path):
    run = unbroken[0] / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "checkpoint-3" / "row-state-layer-02-00002-of-00002.safetensors").unlink()
    assert last_complete_checkpoint(copied) == str(copied / "checkpoint-2")
    assert_goes_on(tmp_path, str(run / "checkpoint-2"), unbroken[1])


@pytest.mark.slow
def test_a_checkpoint_of_the_model_alone_has_no_state_of_rows(unbroken, tmp_path):
    ran, results = train(tmp_path, trainer={"save_only_model": True, "save_steps": 3}, saves_last=True)
    assert [each.returncode for each in ran] == [0, 0], ran[0].stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert not list(checkpoint.glob("row-state-*")) and not (checkpoint / "optimizer.pt").exists()
    for folder in (checkpoint, tmp_path / "last"):
        torch.testing.assert_close(rows_of(folder), results[0]["tables"], rtol=0, atol=0)
    assert last_complete_checkpoint(tmp_path / "run") == str(checkpoint)

"""Two processes train what one does with the joint batch: rows are exchanged as rows, nothing of a table's size is."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cases import slow
from processes import run_processes

from engram_hf import EngramMoEForCausalLM


SCRIPT = Path(__file__).parent / "run_distributed.py"


def launch(out, processes, **options):
    """What each process ended with."""
    out.mkdir(parents=True, exist_ok=True)
    # What accelerate calls multi_gpu is torchrun; `use_cpu` of the arguments makes it gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--num_processes", str(processes), "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    ran = run_processes([*command, SCRIPT, out, json.dumps(options)])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(out / f"result{i}of{processes}.pt") for i in range(processes)]


@pytest.mark.parametrize("rule, accumulation", [slow("sgd", 1), slow("adam", 2)])
def test_two_processes_train_what_one_does_with_the_joint_batch(tmp_path, rule, accumulation):
    shared = {"gradient_accumulation_steps": accumulation}
    one = launch(tmp_path / "one", 1, rule=rule, trainer={"per_device_train_batch_size": 4, **shared})[0]
    two = launch(tmp_path / "two", 2, rule=rule, trainer={"per_device_train_batch_size": 2, **shared})
    for block, other in zip(two[0]["tables"], two[1]["tables"], strict=True):
        assert torch.equal(block, other)
    torch.testing.assert_close(two[0]["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two[0]["tables"], one["tables"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two[0]["rest"], one["rest"], rtol=1e-5, atol=1e-5)
    # Distributed checkpoints take a value that is not sharded from any process.
    assert two[0]["run_ids"] == two[1]["run_ids"] and len(two[0]["run_ids"]) == 1
    # Rows and gates are those of all processes.
    first, expected = two[0]["statistics"][0], one["statistics"][0]
    for key in ("rows_touched/layer_0", "gate_mean/layer_0", "gate_std/layer_2/stream_1", "memory_share/layer_2"):
        assert first[f"engram/{key}"] == pytest.approx(expected[f"engram/{key}"], rel=1e-4)
    touched = [[line["engram/rows_touched/layer_2"] for line in run["statistics"]] for run in (two[0], two[1], one)]
    assert touched[0] == touched[1] == touched[2] and touched[0][-1] > touched[0][0] > 0
    # The largest message is a gradient of the backbone's.
    assert 0 < two[0]["largest"] < 100_000 < sum(block.numel() for block in one["tables"]) / 10


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_two_processes_train_tables_off_the_device(tmp_path, tier):
    resident = launch(tmp_path / "resident", 2, trainer={"per_device_train_batch_size": 2})
    other = launch(tmp_path / "other", 2, tier=tier, trainer={"per_device_train_batch_size": 2})
    for name in ("tables", "losses"):
        torch.testing.assert_close(other[0][name], resident[0][name], rtol=0, atol=0)
        torch.testing.assert_close(other[1][name], resident[0][name], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path):
    trainer = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    whole = launch(tmp_path / "run", 2, rule="adam", exact=False, trainer=trainer)
    resume = str(tmp_path / "run" / "run" / "checkpoint-3")
    resumed = launch(tmp_path / "again", 2, rule="adam", exact=False, trainer=trainer, resume=resume)
    for name in ("tables", "rest"):
        torch.testing.assert_close(resumed[0][name], whole[0][name], rtol=0, atol=0)
        torch.testing.assert_close(resumed[1][name], whole[0][name], rtol=0, atol=0)


@pytest.mark.slow
def test_tables_are_left_out_of_fsdp_and_train_the_same(tmp_path):
    one, two = (launch(tmp_path / str(processes), processes, rule="adam", fsdp=True) for processes in (1, 2))
    assert two[0]["is_sharded"] and not one[0]["is_sharded"]
    assert all(type(block) is torch.Tensor for block in two[0]["tables"])
    means = [sum(losses) / 2 for losses in zip(two[0]["losses"], two[1]["losses"], strict=True)]
    torch.testing.assert_close(means, one[0]["losses"], rtol=1e-5, atol=1e-5)
    for name in ("tables", "rest"):
        torch.testing.assert_close(two[0][name], one[0][name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two[1]["tables"], two[0]["tables"], rtol=0, atol=0)
    assert 0 < two[0]["largest"] < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["added", "served"])
def test_two_processes_train_what_was_not_made_here_like_one(tmp_path, kind):
    """A memory added to somebody else's model, and somebody else's table on disk."""
    options = {"rule": "adam", kind: True}
    one = launch(tmp_path / "one", 1, **options, trainer={"per_device_train_batch_size": 4})[0]
    two = launch(tmp_path / "two", 2, **options, trainer={"per_device_train_batch_size": 2})
    for block, other in zip(two[0]["tables"], two[1]["tables"], strict=True):
        assert torch.equal(block, other)
    for name in ("losses", "tables", "rest"):
        torch.testing.assert_close(two[0][name], one[name], rtol=1e-5, atol=1e-5)
    assert one["losses"][-1] != one["losses"][0] and 0 < two[0]["largest"] < 100_000


@pytest.mark.slow
def test_an_added_memory_trains_under_fsdp_with_its_tables_left_out(tmp_path):
    options = {"rule": "adam", "fsdp": True, "added": True}
    one, two = (launch(tmp_path / str(processes), processes, **options) for processes in (1, 2))
    assert two[0]["is_sharded"] and not one[0]["is_sharded"]
    means = [sum(losses) / 2 for losses in zip(two[0]["losses"], two[1]["losses"], strict=True)]
    torch.testing.assert_close(means, one[0]["losses"], rtol=1e-5, atol=1e-5)
    for name in ("tables", "rest"):
        torch.testing.assert_close(two[0][name], one[0][name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tier, accumulation", [("resident", 2), ("disk", 1)])
def test_tables_over_ranks_train_bit_for_bit_like_whole_ones_under_trainer(tmp_path, tier, accumulation):
    trainer = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    options = {"rule": "adam", "tier": tier, "trainer": trainer}
    whole = launch(tmp_path / "whole", 2, **options)
    cut = launch(tmp_path / "cut", 2, **options, shard=True)
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours["losses"] == theirs["losses"]
        rows, expected = ([torch.cat(of_table) for of_table in halves(each)] for each in (ours, theirs))
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)
        torch.testing.assert_close(ours["rest"], theirs["rest"], rtol=0, atol=0)
    # Gradients of the backbone are larger than what any rank sends of a table.
    assert 0 < cut[0]["largest"] < 100_000


def halves(result):
    """The blocks of each of the two tables of a model."""
    middle = len(result["tables"]) // 2
    return result["tables"][:middle], result["tables"][middle:]


@pytest.mark.slow
def test_a_run_over_four_ranks_goes_on_with_one_two_or_three(tmp_path):
    def options(processes):
        trainer = {"per_device_train_batch_size": 12 // processes, "save_strategy": "steps", "save_steps": 2}
        # One process alone holds whole tables.
        return {"rule": "sgd", "tier": "resident", "shard": processes > 1, "steps": 4, "trainer": trainer}

    unbroken = launch(tmp_path / "run", 4, **options(4))[0]
    checkpoint = tmp_path / "run" / "run" / "checkpoint-2"
    # The blocks are the files that they came from, and their changed rows lie beside them.
    for file in (tmp_path / "run" / "base").glob("tables-*"):
        assert (checkpoint / file.name).samefile(file)
    for processes in (1, 2, 3):
        again = {"base": str(checkpoint), "resume": str(checkpoint)}
        resumed = launch(tmp_path / f"by{processes}", processes, **options(processes), **again)
        for result in resumed:
            # Norms are taken in float32, which makes a last bit of a sum larger.
            rows, expected = ([torch.cat(of_table) for of_table in halves(each)] for each in (result, unbroken))
            torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(result["rest"], unbroken["rest"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_the_best_checkpoint_of_a_run_over_ranks_is_loaded_at_its_end_and_saved_again(tmp_path, save_strategy):
    # Steps as long as these make the loss rise in the end, so the best checkpoint is not the last one.
    trainer = {"per_device_train_batch_size": 2, "save_strategy": save_strategy, "learning_rate": 3.0}
    trainer |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}
    options = {"rule": "sgd", "tier": "resident", "shard": True, "steps": 4, "saves_last": True}
    results = launch(tmp_path, 2, **options, trainer={**trainer, "metric_for_best_model": "loss"})
    best = (tmp_path / "best").read_text()
    assert save_strategy == "best" or not best.endswith("checkpoint-4")
    for folder in (best, tmp_path / "last"):
        model = EngramMoEForCausalLM.from_pretrained(folder)
        rows = [torch.cat([block.detach() for block in table.blocks]) for table in model.named_tables().values()]
        for result in results:
            torch.testing.assert_close([torch.cat(of_table) for of_table in halves(result)], rows, rtol=0, atol=0)

"""FSDP2 for the backbone through accelerate, which takes GPUs for it, and tables over ranks that are left out of it."""

import sys
from pathlib import Path

import pytest
import torch
from devices import needs_gpu
from processes import run_processes
from run_fsdp import BATCH, HIGHEST_NORM, SAVED_AT, STEPS, arguments_of, batch, loaded, made_optimizer, rows_of
from tiny import tiny_config, tiny_model


SCRIPT = Path(__file__).parent / "run_fsdp.py"
# No argument of `accelerate launch` names modules that FSDP is to leave out.
IGNORED = {"FSDP_IGNORED_MODULES": ".*engram.table"}
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_reshard_after_forward", "true"),
    *("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"),
]
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, and torch finds {torch.cuda.device_count()} here"
)


def train_whole(folder: Path, device: str, tier: str, work: Path, ranks: int) -> tuple[list[dict], dict]:
    """What one process does without FSDP, which accumulates what each rank reads: its steps, and its rows."""
    model = loaded(folder, device, tier)
    optimizer, steps = made_optimizer(model, arguments_of(work, use_cpu=True)), []
    for step in range(STEPS):
        losses = []
        for rank in range(ranks):
            ids = batch(step)[rank::ranks].to(device)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / ranks).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), HIGHEST_NORM, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"losses": losses, "norm": float(norm)})
    return steps, rows_of(model)


def check_equal(folder: Path, device: str, tier: str, out: Path, ranks: int) -> None:
    """Compare what the ranks have left with one process without FSDP."""
    expected, rows = train_whole(folder, device, tier, out / "whole", ranks)
    before = rows_of(loaded(folder, device, tier))
    for rank in range(ranks):
        result = torch.load(out / f"result{rank}.pt")
        # A run without FSDP would give the same losses.
        assert result["is_fsdp2"]
        assert result["kinds"]["others"] and all(result["kinds"]["others"])
        assert result["kinds"]["tables"] and not any(result["kinds"]["tables"])
        for step, own in zip(expected, result["steps"], strict=True):
            # The backbone takes its norms in float32.
            assert own["loss"] == pytest.approx(step["losses"][rank], rel=1e-6)
            assert own["norm"] == pytest.approx(step["norm"], rel=1e-6)
        for name, table in rows.items():
            torch.testing.assert_close(result["rows"][name], table, rtol=1e-5, atol=1e-6)
            assert not torch.equal(table, before[name])
        # Weights, rows and the state of both come back from torch's distributed checkpoint.
        assert result["again"] == result["steps"][SAVED_AT:]
    assert min(step["norm"] for step in expected) > HIGHEST_NORM and BATCH % ranks == 0


@needs_gpu
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_two_gpus)])
@pytest.mark.parametrize("tier", ["resident", "host"])
def test_fsdp2_through_accelerate_trains_what_one_process_does(tmp_path, monkeypatch, tier, ranks):
    tiny_model(tiny_config(engram_table_dtype="float64")).double().save_pretrained(tmp_path / "model")
    for name, value in IGNORED.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, *LAUNCH, "--num_processes", str(ranks), SCRIPT, tmp_path / "model", tier, tmp_path]
    ran = run_processes(command)
    assert ran.returncode == 0, ran.stderr[-3000:]
    check_equal(tmp_path / "model", "cuda", tier, tmp_path, ranks)

"""The command says what the functions say, and ends with the exit code that a script can rely on."""

import json

import pytest
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from typer.testing import CliRunner

from engram_hf import EngramMoEConfig, count_parameters, inspect_checkpoint
from engram_hf.commands.main import app


@pytest.fixture
def folder(tmp_path):
    tiny_model(tiny_config(engram_table_dtype="float32")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_inspect_shows_what_the_files_hold(folder):
    ran = run("inspect", folder, "--json")
    found = json.loads(ran.stdout)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    blocks = {name: tensor for name, tensor in tensors.items() if ".table.blocks." in name}
    assert found["tables_nbytes"] == sum(tensor.nbytes for tensor in blocks.values())
    assert found["backbone_nbytes"] == sum(t.nbytes for name, t in tensors.items() if name not in blocks)
    assert [table["name"] for table in found["tables"]] == ["layers.0.engram.table", "layers.2.engram.table"]
    assert {b["name"]: b["rows"] for t in found["tables"] for b in t["blocks"]} == {
        n: len(t) for n, t in blocks.items()
    }
    config = EngramMoEConfig.from_pretrained(folder)
    assert found["fingerprint"] == config.engram_fingerprint
    shown = run("inspect", folder)
    assert shown.exit_code == 0 and "layers.2.engram.table" in shown.stdout and "fingerprint" in shown.stdout
    assert inspect_checkpoint(folder).as_dict() == {
        **found,
        "tables": tuple(inspect_checkpoint(folder).as_dict()["tables"]),
    }


def test_plan_counts_as_the_functions_do(folder):
    ran = run("plan", "engram-27b", "--json", "--device-map", "auto", "--max-memory", '{"0": "80GB", "cpu": "200GB"}')
    found = json.loads(ran.stdout)
    parameters = count_parameters(EngramMoEConfig.preset("engram-27b"))
    assert found["parameters"]["total"] == parameters.total
    assert 0.2 <= found["parameters"]["memory_share"] <= 0.26
    assert "%" in run("plan", folder).stdout
    assert run("plan", folder, "--device-map", '{"": "cpu", "model.layers.7.engram.table": "disk"}').exit_code == 1


def test_verify_names_what_is_damaged(folder):
    assert run("verify", folder).exit_code == 0
    assert all(file["promised"] == file["found"] for file in json.loads(run("verify", folder, "--json").stdout))
    path = next(folder.glob("tables-layer-00*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ran = run("verify", folder)
    assert ran.exit_code == 1 and path.name in ran.stderr and "Traceback" not in ran.stderr


def test_quantize_and_merge_write_another_folder(folder, tmp_path):
    assert run("quantize", folder, tmp_path / "int8", "--row-format", "int8").exit_code == 0
    assert inspect_checkpoint(tmp_path / "int8").tables[0].dtype == "int8"
    assert run("quantize", folder, folder).exit_code == 1
    assert run("merge", folder, tmp_path / "merged").exit_code == 0
    assert run("verify", tmp_path / "merged").exit_code == 0


def test_what_is_not_there_is_said_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty"
    for command in (["inspect", empty], ["verify", empty], ["verify", tmp_path / "nothing"], ["push", empty, "a/b"]):
        ran = run(*command)
        assert ran.exit_code == 1 and ran.stderr.startswith("error: ") and "Traceback" not in ran.stderr
    assert run("push", tmp_path / "nothing", "a/b").exit_code == 2


@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "push", "quantize", "merge"])
def test_every_command_has_an_example(command):
    ran = run(command, "--help")
    assert ran.exit_code == 0 and f"Example: engram-hf {command}" in ran.stdout


def test_push_is_a_dry_run_by_default(hub, folder):
    shown = run("push", folder, "user/tiny", "--license", "mit")
    assert shown.exit_code == 0 and "--no-dry-run sends" in shown.stdout and "user/tiny" not in hub.repositories
    for path in folder.glob("*.safetensors"):
        assert f"{path.stat().st_size:,} bytes  user/tiny/{path.name}" in shown.stdout
    plan = json.loads(run("push", folder, "user/tiny", "--tables-repo", "user/tables", "--json").stdout)
    assert set(plan["files"]) == {"user/tiny", "user/tables"} and not plan["commits"]
    pushed = run("push", folder, "user/tiny", "--license", "mit", "--no-dry-run")
    assert pushed.exit_code == 0 and f"/user/tiny/commit/{hub.commits('user/tiny')[-1][0]}" in pushed.stdout
    assert "license: mit" in hub.files("user/tiny")["README.md"].decode()
    (folder / "config.json").unlink()
    failed = run("push", folder, "user/tiny", "--no-dry-run")
    assert failed.exit_code == 1 and "save_pretrained first" in failed.stderr

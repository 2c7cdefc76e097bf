"""The command says what the functions say, and ends with the exit code that a script can rely on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.metadata import version

import pytest
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from typer import Exit
from typer.main import get_command
from typer.testing import CliRunner

from engram_hf import EngramMoEConfig, EngramMoEForCausalLM, count_parameters, estimate_memory, inspect_checkpoint
from engram_hf.modeling import configuration_engram_moe, table_formats
from engram_hf_command import PRESETS, ROW_FORMATS, app, patches, sentences


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
    request = run("push", folder, "user/tiny", "--tables-repo", "user/tables", "--create-pr", "--no-dry-run")
    assert f"{hub.url}/user/tiny/discussions/1" in request.stdout
    assert "license: mit" in hub.files("user/tiny")["README.md"].decode()
    (folder / "config.json").unlink()
    failed = run("push", folder, "user/tiny", "--no-dry-run")
    assert failed.exit_code == 1 and "save_pretrained first" in failed.stderr


def said(*arguments):
    """The one sentence of a command that fails."""
    ran = run(*arguments)
    assert ran.exit_code == 1 and ran.stderr.startswith("error: ") and "Traceback" not in ran.stderr, ran.output
    assert isinstance(ran.exception, SystemExit)
    return ran.stderr


def test_what_the_hub_does_not_have_is_said_in_a_sentence(hub, folder, monkeypatch):
    run("push", folder, "user/tiny", "--no-dry-run")
    assert "no repository" in said("inspect", "user/nothere")
    assert "has no revision 'nobranch'" in said("inspect", "user/tiny", "--revision", "nobranch")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for command in (["inspect", "output/nothere"], ["plan", "output/nothere"]):
        said(*command)


@pytest.mark.parametrize(
    "error",
    [HTTPError("the connection broke"), OSError("no space"), ValueError("no rows"), NotImplementedError("not yet")],
)
def test_what_is_documented_to_fail_ends_with_one(error, capsys):
    with pytest.raises(Exit) as end, sentences():
        raise error
    assert capsys.readouterr().err == f"error: {error}\n" and end.value.exit_code == 1
    with pytest.raises(ZeroDivisionError), sentences():
        raise ZeroDivisionError


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word(folder, command):
    """As `| head` does. Nothing is printed before the pipe has no reader any more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engram_hf_command", command, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read()
    assert (process.wait(), said) == (1, "")


def test_an_interrupted_command_prints_one_line():
    """The process waits for a Hub that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
        }
        # Programs in the background of a shell begin with the signal ignored.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from engram_hf_command import app; app()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "inspect", "user/model"], env=environment, stderr=subprocess.PIPE, text=True
        )
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        connection.close()
    assert (process.returncode, said) == (130, "interrupted\n")


def test_help_and_version_do_not_load_what_models_need():
    commands = list(get_command(app).commands)
    assert set(commands) == {"explore", "inspect", "plan", "verify", "push", "quantize", "merge", "memorize", "patch"}
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from engram_hf_command import app\n"
        f"uses = [['--help'], ['--version'], [], ['plan', '--sequence'], *[[c, '--help'] for c in {commands}]]\n"
        "for arguments in uses:\n"
        "    assert CliRunner().invoke(app, arguments).exit_code in (0, 2), arguments\n"
        "loaded = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'engram_hf'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_the_presets_and_formats_that_there_are():
    assert tuple(configuration_engram_moe.PRESETS) == PRESETS
    assert set(table_formats.QUANTIZED_FORMATS) == set(ROW_FORMATS)
    assert all(name in run("plan", "--help").stdout for name in PRESETS)


DAMAGES = {
    "engram_n_heads": "x",
    "engram_max_ngram_size": 200_000_000,
    "hidden_act": "gelou",
    "dtype": "int8",
    "engram_layers": [1],
    "id2label": 5,
    "rope_parameters": {"rope_type": "yarn"},
    "engram_fingerprint": {},
}


@pytest.mark.parametrize("field", DAMAGES)
def test_a_damaged_config_is_the_same_sentence_everywhere(folder, tmp_path, field):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, field: DAMAGES[field]}))
    with pytest.raises(ValueError) as error:
        EngramMoEForCausalLM.from_pretrained(folder)
    sentence = str(error.value)
    assert sentence.startswith(f"config.json of {folder}: ") and field in sentence
    with pytest.raises(ValueError, match=re.escape(sentence)):
        estimate_memory(folder)
    for command in (["inspect", folder], ["plan", folder], ["verify", folder], ["quantize", folder, tmp_path / "q"]):
        assert said(*command) == f"error: {sentence}\n"


def test_a_config_that_is_none_is_named(folder, tmp_path):
    content = json.loads((folder / "config.json").read_text())
    for text, message in [
        (json.dumps({**content, "model_type": "llama"}), "model_type is 'llama', not 'engram_moe'"),
        ("{", "not (a valid )?JSON"),
        ("[" * 100_000, "maximum recursion"),
        ("[]", r"must hold (an|a JSON) object, got \[\]"),
    ]:
        (folder / "config.json").write_text(text)
        for command in (
            ["inspect", folder],
            ["plan", folder],
            ["verify", folder],
            ["quantize", folder, tmp_path / "q"],
        ):
            sentence = said(*command)
            assert "config.json" in sentence and re.search(message, sentence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-map", "disc"], "got 'disc'"),
        (["--device-map", "{'': 0}"], "--device-map is no JSON"),
        (["--dtype", "bf16"], "got 'bf16'"),
        (["--device-map", "auto", "--max-memory", "[1]"], "--max-memory is an object in JSON"),
        (["--device-map", "cpu", "--max-memory", '{"cpu": "1GB"}'], "is not used with 'cpu'"),
        (["--device-map", '{"...tabel": "disk"}'], "names ...tabel, which is no table. The tables of this model are: "),
        (["--max-memory", '{"gpu": "1GB"}'], "max_memory is a dict such as"),
        (["--max-memory", '{"cpu": "1 apple"}'], "max_memory is a dict such as"),
        (["--bandwidth", "0"], "--bandwidth must be above 0, got 0"),
    ],
)
def test_plan_refuses_what_means_nothing(folder, arguments, message):
    assert message in said("plan", folder, *arguments)


def test_a_wrong_name_is_said_without_asking_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    with pytest.raises(FileNotFoundError, match="engram-28b is no folder, no repository"):
        EngramMoEForCausalLM.from_pretrained("engram-28b")
    for command in ("inspect", "plan", "verify"):
        assert "engram-28b is no folder" in said(command, "engram-28b")
        assert "output/nothere is no folder" in said(command, "output/nothere")
    assert "no preset: tiny, 100m" in said("plan", "engram-28b")
    assert not hub.requests


def test_a_plan_over_ranks_says_what_each_holds_and_moves():
    plan = ["plan", "engram-27b", "--ranks", "64"]
    found, estimate = json.loads(run(*plan, "--json").stdout), estimate_memory("engram-27b", dtype="bfloat16", ranks=64)
    assert found["ranks"] == 64 and found["distinct_share"] == 0.5
    assert found["tables"] == estimate.tables and found["moved_per_step"] == estimate.moved_per_step > 0
    shown = " ".join(run(*plan).stdout.split())
    held, moved = estimate.tables["cpu"] / 1e9, estimate.moved_per_step / 1e6
    assert f"Over 64 ranks each holds {held:,.3f} GB of tables and the whole backbone." in shown
    assert f"2,048 tokens a rank, each moves {moved:,.3f} MB between ranks, if 50% of the rows are distinct." in shown
    assert "ranks" not in run("plan", "engram-27b").stdout


def test_plan_allocates_both_shares_of_the_paper_or_the_one_that_is_asked_for():
    plain = run("plan", "tiny", "--json").stdout
    found = json.loads(run("plan", "tiny", "--allocate", "--json").stdout)
    assert [round(each["memory_share"], 2) for each in found["allocations"]] == [0.21, 0.25]
    config = EngramMoEConfig.preset("tiny")
    sizes = [(each["n_routed_experts"], each["engram_vocab_size"]) for each in found.pop("allocations")]
    assert sizes[1] == (config.n_routed_experts, pytest.approx(config.engram_vocab_size, abs=30))
    assert found == json.loads(plain)
    (asked,) = json.loads(run("plan", "tiny", "--allocate", "--share", "40", "--json").stdout)["allocations"]
    assert asked["memory_share"] == pytest.approx(0.4, abs=0.03)
    assert f"{sizes[0][1]:,}" in run("plan", "tiny", "--allocate").stdout
    assert "Add --allocate" in said("plan", "tiny", "--share", "40")
    assert "Start from a preset" in said("plan", "moe-27b", "--allocate")


EXAMPLE = ["plan", "engram-27b", "--device-map", "auto", "--max-memory", '{"0": "24GB", "cpu": "64GB"}']


def test_a_plan_says_in_words_whether_it_fits_and_what_a_step_costs():
    ran = run(*EXAMPLE)
    estimate = estimate_memory("engram-27b", "auto", "bfloat16", {0: "24GB", "cpu": "64GB"})
    assert ran.exit_code == 0 and not ran.stderr and "engram-27b fits." in ran.stdout
    rows = [line.split("│")[1].strip() for line in ran.stdout.splitlines() if line.startswith("│")]
    assert rows == ["cuda:0", "host"]
    moved = sum(estimate.moved_per_forward.values())
    assert f"{moved / 1e9:.3f} GB of the backbone do not fit on accelerators" in ran.stdout
    assert f"{moved / 25e9:.2f} s at 25 GB/s, which PCIe 4.0 x16 reaches" in ran.stdout
    assert f"at most {25e9 / moved:.1f} tokens a second" in ran.stdout
    assert "Each token reads 32 rows of tables from host memory, 5.120 KB" in ran.stdout
    assert f"max_memory={estimate.max_memory})" in ran.stdout
    faster = run(*EXAMPLE, "--bandwidth", "50").stdout
    assert f"{moved / 50e9:.2f} s at 50 GB/s. So" in faster and "PCIe" not in faster
    assert run(*EXAMPLE[:2], *EXAMPLE[4:]).stdout == ran.stdout


def test_a_plan_that_does_not_fit_ends_with_exit_code_1():
    ran = run("plan", "engram-27b", "--max-memory", '{"0": "8GB", "cpu": "32GB"}')
    assert ran.exit_code == 1 and "engram-27b does not fit." in ran.stdout and "to load it so" not in ran.stdout.lower()
    assert "of the backbone find no place in memory" in ran.stdout
    assert run("plan", "engram-27b", "--max-memory", '{"cpu": "32GB"}', "--json").exit_code == 1
    disk = ["plan", "engram-27b", "--device-map", "auto+disk", "--max-memory", '{"0": "48GB", "cpu": "1GB"}']
    shown = run(*disk, "--disk-reads", "50000").stdout
    assert "32 rows of tables from disk, 5.120 KB; a step of 2,048 tokens takes 1.31 s at 50,000 reads" in shown


def test_plan_takes_the_type_of_the_checkpoint_and_says_what_does_not_fit(folder):
    found = json.loads(run("plan", folder, "--json").stdout)
    assert found["backbone"] == estimate_memory(folder, dtype="float32").backbone and found["lacking"] == {}
    half = json.loads(run("plan", folder, "--dtype", "bfloat16", "--json").stdout)
    assert half["backbone"] == estimate_memory(folder, dtype="bfloat16").backbone != found["backbone"]
    preset = json.loads(run("plan", "engram-27b", "--json").stdout)
    assert preset["backbone"] == estimate_memory(EngramMoEConfig.preset("engram-27b"), dtype="bfloat16").backbone
    limited = ["plan", folder, "--device-map", "auto", "--max-memory", '{"cpu": "100KB"}']
    assert json.loads(run(*limited, "--json").stdout)["lacking"]["disk"] > 0
    assert "does not fit: " in run(*limited).stdout and "only when training" in run("plan", folder).stdout
    assert "does not fit" not in run("plan", folder).stdout


def test_failures_are_json_where_that_was_asked_for(folder):
    path = next(folder.glob("tables-layer-00*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    ran = run("verify", folder, "--json")
    assert ran.exit_code == 1 and path.name in json.loads(ran.stdout)["error"] and path.name in ran.stderr


def test_names_of_files_and_tables_are_never_cut_short(folder):
    narrow = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "60"}).stdout
    wide = json.loads(run("inspect", folder, "--json").stdout)["tables"]
    lines = narrow.splitlines()
    assert all(each["name"] in lines and any(f"rows {each['rows']:,};" in line for line in lines) for each in wide)
    assert (
        "…" not in narrow
        and all(path.name in narrow for path in folder.glob("tables-*"))
        and "tokens of an n-gram: 2-3" in narrow
    )


def test_the_terminal_alone_breaks_the_lines_of_help():
    texts = [each.help for group in (app, patches) for each in get_command(group).commands.values()]
    assert len(texts) > 10 and not any("\n" in paragraph for text in texts for paragraph in text.split("\n\n"))


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout.strip() == version("engram-hf")


def test_every_option_is_explained():
    for command in get_command(app).commands.values():
        assert all(getattr(option, "help", None) for option in command.params), command.name


def test_verify_takes_tables_that_lie_elsewhere(folder, tmp_path):
    model = EngramMoEForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "backbone", tables_to=tmp_path / "tables")
    assert run("verify", tmp_path / "backbone").exit_code == 1
    both = run("verify", tmp_path / "backbone", "--tables-from", tmp_path / "tables")
    assert both.exit_code == 0 and both.stdout.count("sound") == 3


def test_memorize_writes_a_patch_and_says_which_facts_are_not_recalled(tmp_path, tokenizer):
    config = tiny_config(vocab_size=600, engram_vocab_size=499, engram_compressed_vocab_size="auto")
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    facts, text, output = tmp_path / "facts.jsonl", tmp_path / "text.txt", tmp_path / "known.safetensors"
    facts.write_text('{"prompt": "Velspar is", "target": " red"}\n')
    text.write_text("The class statement is executed.\n\nA loop ends.\n")
    given = (tmp_path / "model", "--facts", facts, "--output", output, "--text", text)
    ran = run("memorize", *given, "--caution", "1", "--json")
    report = json.loads(ran.stdout)
    assert ran.exit_code == 0 and report["recalled"] == 1 and report["drift"]["documents"] == 1
    model = EngramMoEForCausalLM.from_pretrained(tmp_path / "model").eval()
    model.add_patch(output)
    ids = tokenizer("Velspar is", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=len(tokenizer(" red").input_ids), do_sample=False)
    assert tokenizer.decode(said[0]) == "Velspar is red" and model.active_patches() == ["known"]
    ran = run("memorize", *given, "--caution", "1e12", "--max-steps", "1")
    assert ran.exit_code == 1 and "0 of 1 facts are recalled" in ran.stdout and output.is_file()
    text.write_text(" \n")
    ran = run("memorize", *given)
    assert ran.exit_code == 1 and "holds no text" in ran.stderr

"""What goes to a Hub: everything or nothing to be seen, sent once, and whole when it is read again."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from engram_hf import (
    EngramMoEForCausalLM,
    EngramMoEForSequenceClassification,
    engram_optimizers,
    fetch_blocks,
    gather_facts,
    inspect_checkpoint,
    push_engram,
    verify_tables,
)
from engram_hf.modeling.checkpoint_saving import CODE_FILES
from engram_hf.modeling.configuration_engram_moe import AUTO_MAP


SOURCE = Path(__file__).parent.parent.parent / "src" / "engram_hf" / "modeling"
INDEX = "model.safetensors.index.json"


def bound_model(tokenizer, seed: int = 0) -> EngramMoEForCausalLM:
    config = tiny_config(
        vocab_size=608, engram_compressed_vocab_size="auto", engram_pad_token_id=0, engram_table_dtype="float32"
    )
    model = tiny_model(config, seed)
    model.bind_tokenizer(tokenizer)
    return model


@pytest.fixture
def model(tokenizer):
    return bound_model(tokenizer)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids(2, 17)).logits


def digest_of(files: dict[str, bytes], name: str) -> str:
    return json.loads(files[INDEX])["metadata"]["sha256"][name]


@pytest.mark.parametrize("what", ["model", "folder"])
def test_all_of_a_model_is_pushed_in_one_commit(hub, model, tokenizer, folder, what):
    if what == "model":
        push_engram(model, "user/tiny", tokenizer=tokenizer)
    else:
        push_engram(folder, "user/tiny")
    assert len(hub.commits("user/tiny")) == 1
    files = hub.files("user/tiny")
    named = set(json.loads(files[INDEX])["weight_map"].values())
    assert named == {name for name in files if name.endswith(".safetensors")}
    assert {*CODE_FILES, "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert all(files[name] == (SOURCE / name).read_bytes() for name in CODE_FILES)
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert files["README.md"].startswith(b"---\n") and b"engram" in files["README.md"]
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny")
    pulled.model.bind_tokenizer(AutoTokenizer.from_pretrained("user/tiny"))
    assert_same_logits(logits(pulled), logits(model))
    assert verify_tables("user/tiny")


def test_a_dry_run_sends_nothing_and_prints_every_file(hub, folder):
    hub.forget()
    push = push_engram(folder, "user/tiny", tables_repo="user/tables", dry_run=True)
    assert not push.commits and not hub.requests
    printed = str(push)
    for path in folder.iterdir():
        repo = "tables" if path.name.startswith("tables") else "tiny"
        assert f"user/{repo}/{path.name}\n" in printed
        if path.suffix == ".safetensors":
            assert f" {path.stat().st_size:,} bytes  user/{repo}/{path.name}\n" in printed
    real = push_engram(folder, "user/tiny", tables_repo="user/tables")
    assert {repo: {file.name for file in files} for repo, files in push.files.items()} == {
        repo: set(hub.files(repo)) for repo in real.commits
    }
    assert list(push.files) == ["user/tables", "user/tiny"]
    # The same again is no commit, in neither of them.
    push_engram(folder, "user/tiny", tables_repo="user/tables")
    assert len(hub.commits("user/tiny")) == len(hub.commits("user/tables")) == 1


def test_an_upload_that_breaks_commits_nothing_and_goes_on(hub, folder, model, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    large = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert len(large) > 3
    hub.break_upload = {1: 2000}
    with pytest.raises((RuntimeError, OSError)):
        push_engram(folder, "user/tiny")
    assert not hub.commits("user/tiny") and hub.files("user/tiny") == {}
    arrived = dict(hub.large_files)
    assert 0 < len(arrived) < len(large)
    hub.break_upload = {}
    hub.forget()
    push_engram(folder, "user/tiny")
    assert set(hub.received) == set(hub.large_files) - set(arrived), "what was there was sent again"
    assert len(hub.commits("user/tiny")) == 1
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/tiny")), logits(model))
    hub.forget()
    push_engram(folder, "user/tiny")
    assert not hub.received and len(hub.commits("user/tiny")) == 1, "nothing has changed, and something was sent"


def test_a_reader_never_sees_an_index_without_its_files(hub, tokenizer, model, tmp_path):
    """Every state that a reader can have seen, commit by commit, in both repositories."""
    push_engram(model, "user/tiny", tokenizer=tokenizer)
    push_engram(bound_model(tokenizer, 1), "user/tiny", tokenizer=tokenizer, max_shard_size="10KB")
    push_engram(bound_model(tokenizer, 2), "user/tiny", "user/tables", tokenizer=tokenizer)
    assert len(hub.commits("user/tiny")) == 3 and len(hub.commits("user/tables")) == 1
    for repo in ("user/tiny", "user/tables"):
        for _, files in hub.commits(repo):
            named = set(json.loads(files[INDEX])["weight_map"].values())
            # Neither less, nor what an earlier push has left.
            assert named == {name for name in files if name.endswith(".safetensors")}
    last = json.loads(hub.files("user/tiny")["config.json"])
    assert last["engram_tables_repo"] == "user/tables"
    assert last["engram_tables_revision"] == hub.commits("user/tables")[-1][0]
    order = [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
    assert order[-2:] == ["/api/models/user/tables/commit/main", "/api/models/user/tiny/commit/main"]


def test_tables_in_a_repository_of_their_own(hub, folder, model, tokenizer, tmp_path):
    push_engram(folder, "user/tiny", tables_repo="user/tables")
    assert not any(name.startswith("tables") for name in hub.files("user/tiny"))
    # Later tables are none of this model's.
    push_engram(bound_model(tokenizer, 1), "user/other", "user/tables", tokenizer=tokenizer)
    on_disk = {"": "cpu", "model.layers.0.engram.table": "disk"}
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", device_map=on_disk)
    assert_same_logits(logits(pulled), logits(model))
    assert torch.equal(
        fetch_blocks("user/tiny", layers=[2], blocks=[0])["model.layers.2.engram.table.blocks.0"],
        model.model.layers[2].engram.table.blocks[0],
    )
    assert inspect_checkpoint("user/tiny").tables_nbytes == inspect_checkpoint(folder).tables_nbytes
    assert inspect_checkpoint("user/tables").tables_nbytes == inspect_checkpoint(folder).tables_nbytes
    assert len(verify_tables("user/tiny")) == len([path for path in folder.iterdir() if path.suffix == ".safetensors"])
    pulled.save_pretrained(tmp_path / "again")
    # A snapshot without tables may be pushed on, as long as the config names them.
    snapshot = Path(hf_hub_download("user/tiny", "config.json")).parent
    push_engram(snapshot, "user/copy")
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/copy")), logits(model))
    assert gather_facts(snapshot).tables == gather_facts(folder).tables
    with pytest.raises(ValueError, match="they are in user/tables"):
        push_engram(snapshot, "user/copy", "user/more")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_logits(logits(again), logits(model))
    # Tables alone are no model.
    with pytest.raises(ValueError, match="user/tables"):
        EngramMoEForCausalLM.from_pretrained("user/tables")
    hub.repositories["user/tables"].is_gated = True
    shutil.rmtree(tmp_path / "cache" / "models--user--tables")
    with pytest.raises(OSError, match="gated"):
        AutoModelForCausalLM.from_pretrained("user/tiny")
    hub.repositories["user/tables"].is_gated = False
    model.save_pretrained(tmp_path / "backbone", tables_to=tmp_path / "apart")
    with pytest.raises(ValueError, match="holds no tables. Load the model"):
        push_engram(tmp_path / "backbone", "user/tiny")
    with pytest.raises(ValueError, match="itself"):
        push_engram(folder, "user/tiny", tables_repo="user/tiny")


def test_a_push_onto_a_single_file_removes_it(hub, folder, model):
    """Loaders take model.safetensors before any index."""
    api = HfApi(token="hf_nobody")
    api.create_repo("user/tiny")
    api.upload_file(path_or_fileobj=b"old", path_in_repo="model.safetensors", repo_id="user/tiny")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/tiny")
    push_engram(folder, "user/tiny")
    files = hub.files("user/tiny")
    assert "model.safetensors" not in files and files["notes.txt"] == b"mine"
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/tiny")), logits(model))


def test_another_commit_meanwhile_is_an_error(hub, folder):
    push_engram(folder, "user/tiny")
    (folder / "notes.txt").write_text("new")
    api = HfApi(token="hf_nobody")
    path = f"/user/tiny/resolve/{hub.commits('user/tiny')[-1][0]}/{INDEX}"
    hub.before[path] = lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="user/tiny")
    with pytest.raises(HfHubHTTPError, match="412"):
        push_engram(folder, "user/tiny")
    assert "notes.txt" not in hub.files("user/tiny")
    push_engram(folder, "user/tiny")
    assert {"notes.txt", "x"} <= set(hub.files("user/tiny"))


@pytest.mark.parametrize("what", ["flipped", "truncated", "missing", "of a training run", "another tokenizer", "empty"])
def test_what_is_not_whole_is_not_pushed(hub, folder, tokenizer, what):
    table = sorted(folder.glob("tables-layer-00*"))[0]
    content = table.read_bytes()
    if what == "flipped":
        table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif what == "truncated":
        table.write_bytes(content[:-1])
    elif what == "missing":
        table.unlink()
    elif what == "of a training run":
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["model.layers.0.engram.table.changed.row_ids"] = table.name
        (folder / INDEX).write_text(json.dumps(index))
    elif what == "another tokenizer":
        # Two tokens change places: the same ids stand for other text.
        content = json.loads((folder / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        (folder / "config.json").unlink()
    message = {
        "flipped": "not what the index",
        "truncated": "truncated",
        "missing": "does not exist",
        "of a training run": "merge_changed_rows",
        "another tokenizer": "tokenizer",
        "empty": "no folder of a checkpoint",
    }[what]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_engram(folder, "user/tiny")
    assert "user/tiny" not in hub.repositories or not hub.commits("user/tiny")


def test_tokens_that_were_added_after_training_are_pushed(hub, folder, model):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["brand-new"])
    push_engram(model, "user/tiny", tokenizer=tokenizer)
    push_engram(folder, "user/tiny", tokenizer=tokenizer)
    tokenizer.save_pretrained(folder)
    push_engram(folder, "user/tiny")
    assert "brand-new" in AutoTokenizer.from_pretrained("user/tiny").get_vocab()


def test_what_a_trainer_leaves_stays_here(hub, folder):
    (folder / "tables-layer-09-00001-of-00001.safetensors").write_text("of an earlier save")
    (folder / "LICENSE").write_text("mine")
    left = {"optimizer.pt", "trainer_state.json", "rng_state_0.pth", "training_args.bin", ".hidden"}
    left |= {
        "train.jsonl",
        "wandb.key",
        "nohup.out",
        "README.md.part4242",
        "events.out.tfevents.1",
        "pytorch_model.bin",
    }
    for name in left:
        (folder / name).write_text("x")
    push_engram(folder, "user/tiny")
    assert not left & set(hub.files("user/tiny")) and "LICENSE" in hub.files("user/tiny")
    assert "tables-layer-09-00001-of-00001.safetensors" not in hub.files("user/tiny")


REMOTE = """
import sys
sys.modules["engram_hf"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
out, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("user/tiny", trust_remote_code=True)
ids = load_file(out)["ids"]
with torch.no_grad():
    logits = model(ids).logits
model.push_to_hub("user/again")
save_file({"ids": ids, "logits": logits}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tables_repo", [None, "user/tables"])
def test_code_from_the_hub_gives_the_logits_of_the_package_and_pushes_whole_models(
    hub, folder, model, tmp_path, monkeypatch, tables_repo
):
    from safetensors.torch import save_file

    push_engram(folder, "user/tiny", tables_repo=tables_repo)
    out = tmp_path / "out.safetensors"
    save_file({"ids": tiny_ids(2, 17)}, out)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_nobody", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = subprocess.run(
        [sys.executable, "-c", REMOTE, str(out), str(tmp_path / "again")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert torch.equal(load_file(out)["logits"], logits(model))
    pulled = AutoModelForCausalLM.from_pretrained("user/again")
    assert torch.equal(logits(pulled), logits(model))
    assert set(CODE_FILES) <= set(hub.files("user/again"))
    assert verify_tables("user/again")


def test_the_card_is_edited_in_its_own_section_and_shows_the_run(hub, folder, tmp_path):
    api = HfApi(token="hf_nobody")
    api.create_repo("user/tiny")
    mine = b"---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\r\n\nHand-written, with   odd spaces.\n"
    api.upload_file(path_or_fileobj=mine, path_in_repo="README.md", repo_id="user/tiny")
    state = {"log_history": [{"step": i, "loss": 3.0 / i} for i in (1, 2, 3)], "global_step": 3, "epoch": 1.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    card = {"training": tmp_path / "run", "data": "Python's standard library", "license": "apache-2.0"}
    push_engram(folder, "user/tiny", card=card)
    files = hub.files("user/tiny")
    readme = files["README.md"].decode()
    body = "# My model\n\nHand-written, with   odd spaces.\n"
    assert body in readme and "license: mit" in readme and "- mine" in readme and "- engram" in readme
    assert "(training.png)" in readme and files["training.png"].startswith(b"\x89PNG")
    assert "Python's standard library" in readme and f"{model_rows(folder):,} rows" in readme
    push_engram(folder, "user/tiny", card=card)
    again = hub.files("user/tiny")["README.md"].decode()
    assert again.count("Hand-written") == 1 and again == readme


def model_rows(folder) -> int:
    return inspect_checkpoint(folder).tables[0].rows


def test_a_readme_that_cannot_be_edited_stops_the_push_before_anything_is_sent(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    hub.forget()
    with pytest.raises(ValueError, match="README"):
        push_engram(folder, "user/tiny", tables_repo="user/tables")
    assert not hub.received and not hub.commits("user/tiny") and not hub.commits("user/tables")


def test_a_pull_request_leaves_the_branch_as_it_is(hub, folder, model):
    push = push_engram(folder, "user/tiny", tables_repo="user/tables", create_pr=True)
    assert [commit.pr_url for commit in push.commits.values()] == [
        f"{hub.url}/user/tables/discussions/1",
        f"{hub.url}/user/tiny/discussions/1",
    ]
    assert not hub.commits("user/tiny") and not hub.commits("user/tables")
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", revision="refs/pr/1")
    assert_same_logits(logits(pulled), logits(model))


def test_a_branch_of_its_own(hub, folder, model, tokenizer):
    push_engram(bound_model(tokenizer, 1), "user/tiny", tokenizer=tokenizer)
    push_engram(folder, "user/tiny", tables_repo="user/tables", revision="next")
    assert len(hub.commits("user/tiny")) == 1 and "user/tables" in hub.repositories
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny", revision="next")
    assert_same_logits(logits(pulled), logits(model))


def test_a_file_that_the_hub_should_not_have_is_refused(hub, folder, monkeypatch):
    monkeypatch.setattr("engram_hf.hub.uploading.LARGEST_UPLOAD", 5000)
    with pytest.raises(ValueError, match="smaller max_shard_size"):
        push_engram(folder, "user/tiny")
    assert "user/tiny" not in hub.repositories


@pytest.mark.parametrize("kind", ["no memory", "classifier", "quantized"])
def test_other_models_than_the_usual_one(hub, tmp_path, tokenizer, kind):
    if kind == "no memory":
        model = tiny_model(tiny_config(engram_layer_ids=[]))
    elif kind == "classifier":
        model = EngramMoEForSequenceClassification(tiny_config(num_labels=3)).eval()
    else:
        model = tiny_model(tiny_config(engram_table_dtype="int8"))
    push_engram(model, "user/tiny", "user/tables" if kind == "quantized" else None)
    pulled = type(model).from_pretrained("user/tiny")
    assert torch.equal(logits(pulled), logits(model))
    card = hub.files("user/tiny")["README.md"].decode()
    assert ("text-classification" in card) == (kind == "classifier")


def test_a_model_without_tables_has_none_to_put_apart(hub):
    with pytest.raises(ValueError, match="no tables for user.tables"):
        push_engram(tiny_model(tiny_config(engram_layer_ids=[])), "user/tiny", "user/tables")


MINE = "---\nlicense: mit\n---\n\nHand-written.\n"


def write_readme(repo_id: str, revision: str | None = None, text: str = MINE) -> None:
    HfApi(token="hf_nobody").upload_file(
        path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo_id, revision=revision
    )


def test_a_name_without_a_namespace_is_that_of_the_user(hub, folder, model):
    HfApi(token="hf_nobody").create_repo("tiny")
    write_readme("user/tiny")
    push_engram(folder, "tiny", tables_repo="tables")
    assert json.loads(hub.files("user/tiny")["config.json"])["engram_tables_repo"] == "user/tables"
    assert 'where = "user/tiny"' in hub.files("user/tiny")["README.md"].decode()
    assert "Hand-written." in hub.files("user/tiny")["README.md"].decode()
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/tiny")), logits(model))
    with pytest.raises(ValueError, match="itself"):
        push_engram(folder, "tiny", tables_repo="user/tiny")


def test_a_readme_that_could_not_be_downloaded_is_not_replaced(hub, folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    HfApi(token="hf_nobody").create_repo("user/tiny")
    write_readme("user/tiny")
    hub.failing.add("README.md")
    with pytest.raises(OSError):
        push_engram(folder, "user/tiny")
    assert hub.files("user/tiny")["README.md"].decode() == MINE and len(hub.commits("user/tiny")) == 1


def test_a_new_branch_keeps_the_readme_that_it_begins_with(hub, folder):
    HfApi(token="hf_nobody").create_repo("user/tiny")
    write_readme("user/tiny")
    push_engram(folder, "user/tiny", revision="next")
    assert "Hand-written." in hub.files("user/tiny", "next")["README.md"].decode()
    assert hub.files("user/tiny")["README.md"].decode() == MINE


def test_an_edit_of_the_readme_meanwhile_is_not_lost(hub, folder):
    push_engram(folder, "user/tiny")
    before = hub.files("user/tiny")["README.md"].decode()
    commit = hub.commits("user/tiny")[-1][0]
    (folder / "notes.txt").write_text("new")
    hub.before[f"/user/tiny/resolve/{commit}/README.md"] = lambda: write_readme(
        "user/tiny", text=before + "\nEdited.\n"
    )
    with pytest.raises(HfHubHTTPError, match="412"):
        push_engram(folder, "user/tiny")
    push_engram(folder, "user/tiny")
    assert "\nEdited.\n" in hub.files("user/tiny")["README.md"].decode()


def test_facts_of_one_push_stay_as_long_as_they_are_true(hub, folder, tokenizer, caplog):
    loss = {"metric": "loss", "value": 2.5, "dataset": "held-out text", "command": "python evaluate.py"}
    card = {"license": "mit", "data": "Some text", "base_model": "user/base", "limits": ["English"], "evaluation": loss}
    push_engram(folder, "user/tiny", card=card)
    push_engram(folder, "user/tiny")
    readme = hub.files("user/tiny")["README.md"].decode()
    assert all(fact in readme for fact in ("license: mit", "Some text", "user/base", "English", "python evaluate.py"))
    # Other weights: what was measured of the old ones is not true of them.
    with caplog.at_level("WARNING", "engram_hf"):
        push_engram(bound_model(tokenizer, 1), "user/tiny", tokenizer=tokenizer)
    readme = hub.files("user/tiny")["README.md"].decode()
    assert "license: mit" in readme and "user/base" in readme
    assert not any(fact in readme for fact in ("Some text", "English", "python evaluate.py", "model-index"))
    with pytest.raises(ValueError, match="but not licence"):
        push_engram(folder, "user/tiny", card={"licence": "mit"})


def test_a_repository_with_a_model_is_no_place_for_tables(hub, folder):
    push_engram(folder, "user/precious")
    with pytest.raises(ValueError, match="user/precious holds a model"):
        push_engram(folder, "user/tiny", tables_repo="user/precious")
    assert len(hub.commits("user/precious")) == 1 and not hub.commits("user/tiny")


@pytest.mark.parametrize("tables_repo", [None, "user/tables"])
def test_variants_go_with_their_files(hub, folder, model, tokenizer, tables_repo):
    model.save_pretrained(folder, variant="fp16")
    push_engram(folder, "user/tiny", tables_repo=tables_repo)
    for repo in hub.repositories:
        files = hub.files(repo)
        indices = [name for name in files if name.startswith("model.safetensors.index")]
        named = {file for index in indices for file in json.loads(files[index])["weight_map"].values()}
        assert len(indices) == 2 and named == {name for name in files if name.endswith(".safetensors")}
    for variant in (None, "fp16"):
        assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/tiny", variant=variant)), logits(model))
    # The next push of the default alone leaves the variant's files alone.
    if tables_repo is None:
        push_engram(bound_model(tokenizer, 1), "user/tiny", tokenizer=tokenizer)
        pulled = AutoModelForCausalLM.from_pretrained("user/tiny", variant="fp16")
        assert_same_logits(logits(pulled), logits(model))
    for name in ("model.safetensors.index.json",):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="only a variant"):
        push_engram(folder, "user/tiny")


@pytest.mark.parametrize("where", ["folder", "argument"])
def test_further_chat_templates_go_with_the_tokenizer(hub, folder, where):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    if where == "folder":
        tokenizer.save_pretrained(folder)
    push_engram(folder, "user/tiny", tokenizer=tokenizer if where == "argument" else None)
    assert AutoTokenizer.from_pretrained("user/tiny").chat_template == tokenizer.chat_template


def test_an_adapter_is_not_a_model(hub, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["value_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    for what in (adapted, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="adapter.*merge"):
            push_engram(what, "user/tiny")
    assert not hub.repositories


def test_a_readme_of_the_repository_that_cannot_be_edited_stays(hub, folder):
    HfApi(token="hf_nobody").create_repo("user/tiny")
    for text in (b"\xe4", b"---\nlicense: [\n---\n"):
        hub.repositories["user/tiny"].branches["main"][-1][1]["README.md"] = text
        with pytest.raises(ValueError, match="README.md of user/tiny .*nothing was changed"):
            push_engram(folder, "user/tiny", tables_repo="user/tables")
    assert not hub.commits("user/tiny") and not hub.commits("user/tables")


def test_push_to_hub_of_transformers_pushes_a_model_that_loads(hub, model, folder, tmp_path):
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="user/saved")
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/saved")), logits(model))
    model.push_to_hub("user/tiny")
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/tiny")), logits(model))
    assert "[More Information Needed]" in hub.files("user/tiny")["README.md"].decode()
    # The form is nobody's text; the card of push_engram says how tables go to a repository of their own.
    push_engram(folder, "user/tiny")
    card = hub.files("user/tiny")["README.md"].decode()
    assert "[More Information Needed]" not in card and "push_engram(model, repo_id, tables_repo=...)" in card


def test_after_the_pushes_of_a_trainer_the_repository_holds_what_its_index_names(hub, model, tokenizer, tmp_path):
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=4,
        save_steps=2,
        learning_rate=0.01,
        push_to_hub=True,
        hub_model_id="user/tiny",
        hub_always_push=True,
        report_to=[],
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 9)]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=engram_optimizers(arguments),
    )
    trainer.train()
    trainer.push_to_hub()
    pulled = AutoModelForCausalLM.from_pretrained("user/tiny")
    assert_same_logits(logits(pulled), logits(model.eval()))
    files = hub.files("user/tiny")
    named = set(json.loads(files[INDEX])["weight_map"].values())
    weights = {name for name in files if name.endswith(".safetensors")}
    assert not any(name.startswith("rows") for name in named)
    # Trainer deletes nothing: rows that it pushed while it trained stay until the next push of push_engram.
    assert {name for name in weights - named if not name.startswith("rows-layer")} == set()
    before = files["README.md"].decode()
    push_engram(tmp_path / "run", "user/tiny")
    files = hub.files("user/tiny")
    assert {name for name in files if name.endswith(".safetensors")} == named
    assert "generated automatically according to the information the Trainer" in before
    assert before.split("---\n", 2)[2].strip() in files["README.md"].decode()
    assert "push_engram(model, repo_id, tables_repo=...)" in files["README.md"].decode()


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "weights", "additional_chat_templates"])
def test_files_from_outside_of_the_folder_are_not_sent(hub, folder, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jinja").write_text("secret")
    path = sorted(folder.glob("tables-*"))[0] if name == "weights" else folder / name
    if name == "additional_chat_templates":
        target = tmp_path / "outside"
    else:
        target = tmp_path / "outside" / "secret"
        path.rename(target) if path.exists() else target.write_text("secret")
    path.symlink_to(target)
    with pytest.raises(ValueError, match="is a link that leads out"):
        push_engram(folder, "user/tiny")
    assert not hub.repositories
    with pytest.raises(ValueError, match="is a link that leads out"):
        push_engram(folder, "user/tiny", dry_run=True)


def test_links_inside_a_folder_and_into_the_cache_of_the_hub_are_followed(hub, folder, model, tmp_path):
    push_engram(folder, "user/tiny")
    snapshot = Path(snapshot_download("user/tiny"))
    assert all(path.is_symlink() for path in snapshot.glob("*.safetensors"))
    push_engram(snapshot, "user/copy")
    (tmp_path / "mine").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "mine" / path.name).symlink_to(path)
    (tmp_path / "mine" / "notes.txt").symlink_to("config.json")
    push_engram(tmp_path / "mine", "user/mine")
    for repository in ("user/copy", "user/mine"):
        assert_same_logits(logits(AutoModelForCausalLM.from_pretrained(repository)), logits(model))
    # The cache of another repository is no part of a snapshot that lies elsewhere.
    other = tmp_path / "other" / "models--user--secret" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("secret")
    (tmp_path / "mine" / "more.txt").symlink_to(other / "0")
    with pytest.raises(ValueError, match="more.txt is a link that leads out"):
        push_engram(tmp_path / "mine", "user/mine")


ON_EVERY_RANK = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from tiny import tiny_config, tiny_model
from engram_hf import push_engram
torch.distributed.init_process_group("gloo")
model = tiny_model(tiny_config())
for what in (model, sys.argv[1]):
    push = push_engram(what, "user/ranks")
    assert bool(push.commits) == (torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
"""


@pytest.mark.slow
def test_a_push_on_every_rank_pushes_once(hub, tmp_path):
    model = tiny_model(tiny_config(), seed=1)
    model.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_nobody", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    command = [sys.executable, "-c", ON_EVERY_RANK, str(tmp_path / "model"), str(Path(__file__).parent.parent)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert len(hub.commits("user/ranks")) == 2 and list(hub.repositories) == ["user/ranks"]
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained("user/ranks")), logits(model))

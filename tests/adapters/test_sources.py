"""A name that nothing can be loaded from is refused at once, in a sentence."""

import socket

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from engram_hf import load_patch, load_with_tables
from engram_hf_command import app


@pytest.fixture
def offline(monkeypatch):
    """Offline, and without a network: whoever asks for a connection fails the test."""

    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("load", [load_patch, load_with_tables])
def test_offline_a_name_in_no_folder_and_not_in_the_cache_is_refused(load, offline, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder user/nothing, and no repository user/nothing with"):
        load("user/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize("load", [load_patch, load_with_tables])
def test_a_path_that_no_repository_can_have_as_its_name_is_refused(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder .*nothing/here, and no repository can have this"):
        load(str(tmp_path / "nothing" / "here"))


def test_applying_a_patch_looks_at_the_patch_before_it_loads_the_model(tmp_path, offline):
    (tmp_path / "patch.safetensors").write_bytes(b"no patch")
    ran = CliRunner().invoke(app, ["patch", "apply", "user/nothing", str(tmp_path), "a prompt"])
    assert ran.exit_code == 1 and "patch.safetensors" in ran.stderr and "user/nothing" not in ran.stderr


def test_the_cache_is_asked_for_the_file_that_is_needed(offline, tmp_path):
    (tmp_path / "models--user--alice" / "refs").mkdir(parents=True)
    (tmp_path / "models--user--alice" / "refs" / "main").write_text("0" * 40)
    snapshot = tmp_path / "models--user--alice" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no repository user/alice with patch.safetensors in the cache"):
        load_patch("user/alice", cache_dir=tmp_path)
    (snapshot / "patch.safetensors").write_bytes(b"no patch")
    with pytest.raises(ValueError, match="patch.safetensors"):
        load_patch("user/alice", cache_dir=tmp_path)

"""Saves: a file per block, links for what is unchanged, and the old checkpoint until the new one is whole."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from cases import slow
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from engram_hf import verify_tables
from engram_hf.modeling import checkpoint_saving
from engram_hf.modeling.checkpoint_saving import CODE_FILES
from engram_hf.modeling.disk_safetensors import PIECE_BYTES, read_header


ON_DISK = {"": "cpu", "model.layers.0.engram.table": "disk", "model.layers.2.engram.table": "disk"}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def weight_map(folder):
    return json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("device_map", [None, ON_DISK, {**ON_DISK, "model.layers.0.engram.table.blocks.1": "cpu"}])
@pytest.mark.parametrize(("limit", "files"), [("5GB", [1, 1]), ("4KB", [3, 4]), (3500, [4, 4]), (1, [4, 4])])
def test_blocks_lie_in_files_of_their_own_below_the_limit(tmp_path, device_map, limit, files):
    model = tiny_model()
    model.save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first", device_map=device_map)
    loaded.save_pretrained(tmp_path / "second", max_shard_size=limit)
    names = weight_map(tmp_path / "second")
    of_blocks = {file for name, file in names.items() if ".table." in name}
    assert of_blocks.isdisjoint(file for name, file in names.items() if ".table." not in name)
    if device_map is None:
        assert [sum(f"layer-{layer:02d}" in file for file in of_blocks) for layer in (0, 2)] == files
    size = {"5GB": 5e9, "4KB": 4000}.get(limit, limit)
    for file in of_blocks:
        places = read_header(tmp_path / "second" / file)
        assert sum(place.nbytes for place in places.values()) <= size or len(places) == 1
    assert_same_state(load(tmp_path / "second"), model)
    assert len(verify_tables(tmp_path / "second")) == len(set(names.values()))


def test_unchanged_blocks_on_disk_are_linked_and_changed_ones_written(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a", device_map={"": "cpu", "model.layers.0.engram.table": "disk"})
    model.save_pretrained(tmp_path / "b")
    linked, written = (tmp_path / "b" / f"tables-layer-{i:02d}-00001-of-00001.safetensors" for i in (0, 2))
    assert linked.stat().st_ino == (tmp_path / "a" / linked.name).stat().st_ino
    assert written.stat().st_ino != (tmp_path / "a" / written.name).stat().st_ino
    # Without links (another file system) it is a copy.
    verify_tables(tmp_path / "b")


def test_where_the_system_has_no_links_the_file_is_copied(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a", device_map=ON_DISK)

    def no_links(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    model.save_pretrained(tmp_path / "b")
    assert_same_state(load(tmp_path / "b"), load(tmp_path / "a"))
    verify_tables(tmp_path / "b")


@pytest.mark.parametrize("device_map", [None, ON_DISK])
def test_a_model_saved_over_its_own_checkpoint_stays_usable(tmp_path, device_map):
    tiny_model().save_pretrained(tmp_path)
    model = load(tmp_path, device_map=device_map)
    ids = tiny_ids(1, 5)
    with torch.no_grad():
        expected = model(ids).logits
        for _ in range(3):
            model.save_pretrained(tmp_path)
            assert torch.equal(model(ids).logits, expected)
            assert_same_state(load(tmp_path), model)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob(".saving*"))


@pytest.mark.slow
def test_saving_holds_no_more_than_a_block_in_memory(tmp_path):
    # Blocks of 16 MB, 16 of them in each of two tables.
    config = tiny_config(engram_vocab_size=64_000, engram_n_heads=8, engram_head_dim=64)
    model = tiny_model(config)
    block = max(parameter.nbytes for table in model.model.tables() for parameter in table.blocks)
    table = model.engram_tables()[0].nbytes
    model.save_pretrained(tmp_path / "a")
    for device_map in (None, ON_DISK):
        loaded = load(tmp_path / "a", device_map=device_map)
        tracemalloc.start()
        loaded.save_pretrained(tmp_path / "b", max_shard_size="50MB")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * max(block, PIECE_BYTES) < table / 3


@pytest.mark.parametrize("limit", [5_000, 9_000, 60_000])
def test_no_space_left_leaves_the_old_checkpoint(tmp_path, limit):
    """The system itself refuses to write more: the size of a file is limited, first below a table's, then the rest."""
    old = tiny_model(seed=1)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new, limits = tiny_model(seed=2), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            new.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same_state(load(tmp_path), old)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from tiny import tiny_model
torch.set_num_threads(1)
model = tiny_model(seed=2)
print("ready", flush=True)
sys.stdin.readline()
while True:
    model.save_pretrained({folder!r}, max_shard_size={limit!r})
"""


@pytest.mark.parametrize("delay", [slow(0.003), slow(0.011), 0.025, slow(0.04), slow(0.09)])
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, delay):
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    old.save_pretrained(tmp_path, max_shard_size="8KB")
    script = KILLED.format(tests=str(Path(__file__).parent.parent), folder=str(tmp_path), limit="16KB")
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    found = load(tmp_path).state_dict()
    assert any(all(torch.equal(found[n], t) for n, t in model.state_dict().items()) for model in (old, new))
    verify_tables(tmp_path)
    # And the next save cleans up what was left.
    new.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), new)
    assert not list(tmp_path.glob(".saving*")) and len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("old", ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", None])
def test_the_index_comes_last_into_a_new_folder_and_before_the_config_of_an_old_one(tmp_path, monkeypatch, old):
    moved, model = [], tiny_model()
    replace = os.replace

    def note(source, target):
        moved.append(Path(target).name if Path(target).parent == tmp_path else "")
        replace(source, target)

    monkeypatch.setattr(checkpoint_saving.os, "replace", note)
    # What a killed first save has left is no model.
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    if old is None:
        model.save_pretrained(tmp_path)
        assert [name for name in moved if name][-1] == "model.safetensors.index.json" and "config.json" in moved
        moved.clear()
    else:
        (tmp_path / old).write_bytes(b"")
    model.save_pretrained(tmp_path)
    assert moved.index("model.safetensors.index.json") < moved.index("config.json")


def test_a_flipped_byte_is_found_by_its_digest(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    verify_tables(tmp_path)
    for pattern in ("tables-layer-02*", "model-*"):
        path = next(tmp_path.glob(pattern))
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"are not what was saved: {path.name}"):
            verify_tables(tmp_path)
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(FileNotFoundError, match="nothing can be verified"):
        verify_tables(tmp_path / "nowhere")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map(tmp_path)}))
    with pytest.raises(ValueError, match="holds no SHA-256"):
        verify_tables(tmp_path)


def test_a_save_without_code_leaves_none_also_over_one_with_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, with_code=False)
    assert not list(tmp_path.glob("*.py"))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "auto_map")
    assert set(CODE_FILES) == {path.name for path in Path(checkpoint_saving.__file__).parent.glob("[!_]*.py")}


def test_other_files_of_a_folder_are_left_alone(tmp_path):
    names = ("README.md", "adapter_model.safetensors", "model.gguf")
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-5").mkdir()
    for _ in range(2):
        tiny_model().save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert (tmp_path / "checkpoint-5").is_dir()


def test_two_variants_live_in_one_folder(tmp_path):
    one, two = tiny_model(seed=1), tiny_model(seed=2)
    one.save_pretrained(tmp_path)
    two.save_pretrained(tmp_path, variant="ema")
    one.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), one)
    assert_same_state(load(tmp_path, variant="ema"), two)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_tables_that_were_cast_to_eight_bits_are_refused_before_anything_is_written(tmp_path, dtype):
    model = tiny_model()
    for table in model.model.tables():
        for block in table.blocks:
            block.requires_grad_(False)
            block.data = block.data.to(dtype)
    with pytest.raises(ValueError, match="got float8_e.*no scales.*quantize_tables"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()

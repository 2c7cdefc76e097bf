"""The readers of files, each against what the format or the system says."""

import json
import os
import random
import resource
import struct
import subprocess

import pytest
import torch
from damaged_bases import Base, read_json, write_anew
from damaging import header_of_weights
from judging import numbers_of
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model

from engram_hf import EngramMoEForCausalLM, inspect_checkpoint, merge_changed_rows, quantize_tables, verify_tables
from engram_hf.modeling.disk_files import TableFile
from engram_hf.modeling.disk_safetensors import (
    NAMES,
    TORCH_DTYPES,
    TensorContent,
    read_header,
    read_index,
    refuse_outside,
    write_file,
    write_pieces,
)
from engram_hf.modeling.table_changes import ChangedRows


INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(tiny_config(engram_table_dtype="float32", num_hidden_layers=2, engram_layer_ids=[1])).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Base("copy", checkpoint).copy(tmp_path / "copy").root


def as_the_library_reads(path):
    """Names, types and shapes; None where the library refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except SafetensorError:
        return None


def test_a_header_that_is_accepted_is_one_that_the_library_reads_in_the_same_way(tmp_path):
    tensors = {f"{name}.{i}": torch.randn(i + 1, 4) for i in range(3) for name in "ab"}
    tensors["half"], tensors["numbers"] = torch.randn(3, 2).half(), torch.arange(5)
    save_file(tensors, tmp_path / "sound.safetensors", metadata={"format": "pt"})
    accepted = 0
    for seed in range(300):
        (tmp_path / "case").mkdir(exist_ok=True)
        path = tmp_path / "case" / "model.safetensors"
        write_anew(path, (tmp_path / "sound.safetensors").read_bytes())
        damage = header_of_weights(Base("case", tmp_path / "case"), random.Random(seed))
        library = as_the_library_reads(path)
        try:
            ours = {name: (place.type_name, place.shape) for name, place in read_header(path).items()}
        except ValueError as error:
            assert path.name in str(error)
            # The library keeps the last of two entries with one name.
            assert library is None or damage.what in ("twice", "NaN", "deep extra"), (seed, damage, error)
            continue
        accepted += 1
        assert ours == library, (seed, damage)
    assert 20 < accepted < 200


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_every_type_of_the_format_is_read_and_written_as_the_library_does(tmp_path, dtype):
    tensor = torch.arange(24, dtype=torch.uint8).view(TORCH_DTYPES[dtype] if dtype != "BOOL" else torch.uint8)
    tensor = tensor.bool() if dtype == "BOOL" else tensor
    digest = write_file(
        tmp_path / "ours.safetensors", {"a": TensorContent.of(tensor), "b": TensorContent.of(tensor[:1])}
    )
    assert len(digest) == 64
    assert as_the_library_reads(tmp_path / "ours.safetensors") == {
        "a": (dtype, tuple(tensor.shape)),
        "b": (dtype, (1,)),
    }
    file = TableFile(tmp_path / "ours.safetensors")
    assert file.dtype_of("a") == tensor.dtype and NAMES[tensor.dtype] == dtype
    assert torch.equal(file.tensor("a").view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "size", "nbytes"), [("F4", 4, 2), ("F6_E2M3", 4, 3), ("F6_E3M2", 8, 6)])
def test_types_that_torch_does_not_have_are_known_by_name_and_not_read(tmp_path, dtype, size, nbytes):
    text = json.dumps({"a": {"dtype": dtype, "shape": [size], "data_offsets": [0, nbytes]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    place = read_header(path)["a"]
    assert (place.dtype, place.type_name, place.nbytes) == (None, dtype, nbytes)
    with pytest.raises(ValueError, match="a of .*a.safetensors has a type that torch does not have"):
        TableFile(path).tensor("a")


@pytest.mark.parametrize("how", ["overlap", "shift", "gap", "same bytes", "reversed"])
def test_tables_from_elsewhere_go_through_the_same_checks(checkpoint, tmp_path, how):
    model = EngramMoEForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "model", tables_to=tmp_path / "tables")
    for seed in range(1000):
        base = Base("tables", tmp_path / "tables").copy(tmp_path / f"case-{seed}")
        if header_of_weights(base, random.Random(seed)).what == how:
            break
    for reader in (
        lambda: EngramMoEForCausalLM.from_pretrained(tmp_path / "model", tables_from=base.root),
        lambda: verify_tables(tmp_path / "model", tables_from=base.root),
    ):
        with pytest.raises(
            ValueError, match="tables-layer-01-.* is damaged: .*(overlap|fill its bytes|truncated|longer|two numbers)"
        ):
            reader()


def changed_rows(row_ids) -> ChangedRows:
    rows, digests = torch.zeros(row_ids.numel(), 4), torch.zeros(2, 32, dtype=torch.uint8)
    changed = ChangedRows.from_tensors(
        {"row_ids": row_ids, "rows": rows, "digests": digests}, "a.table", "rows.safetensors"
    )
    changed.check_fit("a.table", 10, 4, torch.float32, 2)
    return changed


@pytest.mark.parametrize(
    "row_ids",
    [
        torch.tensor([-1, 3]),
        torch.tensor([3, 10]),
        torch.tensor([3, 3]),
        torch.tensor([4, 3]),
        torch.tensor([0.0, 3.0]),
        torch.tensor([False, True]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([[1, 2]]),
        torch.tensor(3),
    ],
)
def test_row_ids_that_no_table_can_have_are_refused(row_ids):
    with pytest.raises(ValueError, match="a.table"):
        changed_rows(row_ids)


def test_row_ids_of_a_table_are_accepted():
    for row_ids in (torch.tensor([0, 3, 9]), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(changed_rows(row_ids).row_ids, row_ids)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "",
        ".",
        "..",
        "./x",
        "a//x",
        "x/",
        "C:\\x",
        "C:x",
        "~/x",
        "a\\x",
        "a\0x",
    ],
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    path = tmp_path / INDEX
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=f"{INDEX} is damaged: weight_map names .* inside its folder"):
        read_index(path)


@pytest.mark.parametrize("rewrite", [merge_changed_rows, quantize_tables])
@pytest.mark.parametrize("what", ["vocab.txt", "folder", "file in a folder", "weights", "config.json"])
def test_what_a_link_leads_to_outside_of_the_folder_is_not_copied(copy, tmp_path, rewrite, what):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("{}")
    path = copy / what
    if what == "folder":
        path.symlink_to(secret)
    elif what == "file in a folder":
        (copy / "additional_chat_templates").mkdir()
        (copy / "additional_chat_templates" / "x.jinja").symlink_to(secret / "key")
    else:
        if what == "weights":
            path = next(copy.glob("tables-*"))
        if path.exists():
            os.replace(path, secret / "key")
        path.symlink_to(secret / "key")
    with pytest.raises(ValueError, match="is a link that leads out of its folder, to .*secret/key"):
        rewrite(copy, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*")) if (tmp_path / "new").exists() else True


@pytest.mark.parametrize("rewrite", [merge_changed_rows, quantize_tables])
def test_links_into_the_blobs_of_the_hubs_cache_are_followed(copy, tmp_path, rewrite):
    repository = tmp_path / "hub" / "models--user--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "blobs", snapshot, tmp_path / "hub" / "blobs" / "ab"):
        folder.mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / ".huggingface-shared-blobs").write_text("1")
    for number, path in enumerate(sorted(copy.iterdir())):
        blob = repository / "blobs" / str(number)
        if number % 2:
            # As huggingface_hub does where repositories share files.
            shared = tmp_path / "hub" / "blobs" / "ab" / str(number)
            os.link(path, shared)
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            os.link(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    rewrite(snapshot, tmp_path / "new")
    verify_tables(tmp_path / "new")
    with pytest.raises(ValueError, match="leads out of its folder"):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "x").write_text("not a cache")
        (snapshot / "x").symlink_to(tmp_path / "blobs" / "x")
        refuse_outside(snapshot, snapshot / "x")


def test_what_is_made_of_a_damaged_file_is_not_promised_anew(copy, tmp_path):
    path = next(copy.glob("tables-*"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    write_anew(path, content)
    with pytest.raises(ValueError, match=f"{path.name} is not what the index of .* promises, so nothing was written"):
        quantize_tables(copy, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.fixture
def small_files():
    """No file can be larger than 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_of_writing_says_which_file_and_how_many_bytes(tmp_path, small_files):
    path = tmp_path / "a.safetensors"
    path.write_text("what was there")
    with pytest.raises(OSError, match=r"a\.safetensors could not be written .*: 10,000 of 24,096 bytes were written"):
        write_file(path, {"a": TensorContent.of(torch.zeros(5000))})
    with pytest.raises(OSError, match=r"a\.safetensors could not be written .*: 10,000 bytes were written"):
        write_pieces(path, [bytes(20_000)])
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"] and path.read_text() == "what was there"


def test_a_full_disk_is_said_with_the_file(copy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(
            OSError, match=r"safetensors could not be written \(No space left on device\): [\d,]+ .*bytes were written"
        ):
            quantize_tables(copy, disk / "new", "int8")
        assert not list((disk / "new").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bytes_of_a_generator_that_fails_are_not_called_an_error_of_writing(tmp_path):
    def pieces():
        yield b"a"
        raise FileNotFoundError("the source is gone")

    with pytest.raises(FileNotFoundError, match="^the source is gone$"):
        write_pieces(tmp_path / "a", pieces())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_inspecting_verifying_and_loading_agree_on_a_sound_checkpoint(checkpoint):
    assert inspect_checkpoint(checkpoint).tables and verify_tables(checkpoint)
    tensors = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    model = EngramMoEForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert model(tiny_ids(1, 5)).logits.isfinite().all()


def test_a_config_that_was_changed_is_refused_by_verifying_wherever_it_changes_a_result(copy):
    content = read_json(copy / "config.json")
    expected = numbers_of(copy)
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "hidden_act": "relu"}
    noticed = set()
    for name, value in content.items():
        others = {bool: [True, False], int: [1, -1], float: [0.7]}.get(type(value), [])
        others = [changes[name]] if name in changes else [value ^ o if type(o) is bool else value + o for o in others]
        for other in others:
            write_anew(copy / "config.json", json.dumps({**content, name: other}))
            try:
                is_same = numbers_of(copy) == expected
            except ValueError:
                is_same = None
            if is_same is not True:
                with pytest.raises(ValueError, match=name if is_same is False else ""):
                    verify_tables(copy)
            if is_same is False:
                noticed.add(name)
    assert {"rms_norm_eps", "rope_parameters", "hidden_act", "routed_scaling_factor", "hc_sinkhorn_iters"} <= noticed

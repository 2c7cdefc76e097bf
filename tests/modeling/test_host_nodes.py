"""Host memory on chosen NUMA nodes: the kernel tells the policy, and pages lie on the nodes that it allows."""

import copy
import ctypes
import mmap
import platform
import sys

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_hf import engram_optimizers
from engram_hf.modeling import table_blocks
from engram_hf.modeling.table_blocks import SYSCALLS, HostNodes, nodes_with_memory, policy_at


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in SYSCALLS, reason="host_nodes is for Linux"
)
HOST = {"": "cpu", "...table": "host"}
MOVE_PAGES = {"x86_64": 279, "aarch64": 239}
# A block has some pages.
ROWS = 2003


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config(engram_vocab_size=ROWS, engram_block_elements=500_000)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def may_bind():
    try:
        HostNodes(nodes_with_memory()).empty((mmap.PAGESIZE,), torch.uint8)
    except OSError as error:
        pytest.skip(f"not proved here: {error}")


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **{"device_map": HOST, **arguments}).eval()


def blocks(model):
    return [block for table in model.named_tables().values() for block in table.blocks]


def nodes_of_pages(tensor: torch.Tensor) -> set[int]:
    """Where the pages of a tensor lie, as move_pages(2) tells without moving any."""
    addresses = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, mmap.PAGESIZE)
    pages, status = (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int * len(addresses))()
    libc = ctypes.CDLL(None, use_errno=True)
    number = MOVE_PAGES[platform.machine()]
    assert libc.syscall(number, 0, ctypes.c_ulong(len(addresses)), pages, None, status, 0) == 0, ctypes.get_errno()
    return set(status)


def policy_in_numa_maps(tensor: torch.Tensor) -> str:
    """What /proc says of the mapping in which a tensor begins: "default", "bind:0" or the like."""
    with open("/proc/self/numa_maps") as lines:
        policies = {int(line.split()[0], 16): line.split()[1] for line in lines}
    return policies[max(begin for begin in policies if begin <= tensor.data_ptr())]


def assert_bound(model, nodes: HostNodes) -> None:
    for block in blocks(model):
        assert block.nbytes > mmap.PAGESIZE and block.data_ptr() % mmap.PAGESIZE == 0
        assert policy_at(block.data_ptr()) == policy_at(block.data_ptr() + block.nbytes - 1) == nodes
        assert nodes_of_pages(block) <= set(nodes.nodes)
        name = "interleave" if nodes.is_interleaved else "bind"
        assert policy_in_numa_maps(block).split("=")[0].startswith(f"{name}:{nodes.nodes[0]}")


def test_tables_in_host_memory_lie_on_the_nodes_that_are_named(folder):
    every, ids = nodes_with_memory(), tiny_ids(2, 11)
    plain = load(folder)
    assert all(policy_at(block.data_ptr()) is None for block in blocks(plain))
    for given, nodes in {
        "interleave": HostNodes(every, is_interleaved=True),
        every[-1:]: HostNodes(every[-1:]),
        every: HostNodes(every),
    }.items():
        model = load(folder, host_nodes=given if given == "interleave" else list(given))
        assert_bound(model, nodes)
        assert all(torch.equal(block, other) for block, other in zip(blocks(model), blocks(plain), strict=True))
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_tables_that_move_to_host_memory_go_to_the_nodes_too(folder):
    nodes = HostNodes(nodes_with_memory()[:1])
    for device_map in (HOST, None, {"": "cpu", "...table": "disk"}):
        model = load(folder, device_map=device_map)
        model.place_tables({"...table": "host"}, host_nodes=list(nodes.nodes))
        assert_bound(model, nodes)
        # They come back to their nodes, and memory that is there already stays.
        addresses = [block.data_ptr() for block in blocks(model)]
        model.place_tables({"...table": "host"})
        assert [block.data_ptr() for block in blocks(model)] == addresses
        model.place_tables({"...table": "disk"})
        assert all(policy_at(block.data_ptr()) is None for block in blocks(model))
        model.place_tables({"...table": "host"})
        assert_bound(model, nodes)
    assert all(torch.equal(block, other) for block, other in zip(blocks(model), blocks(load(folder)), strict=True))


def test_tables_on_nodes_train_copy_and_load_as_others_do(folder, tmp_path):
    nodes, trained = HostNodes(nodes_with_memory()[:1]), []
    for arguments in ({}, {"host_nodes": list(nodes.nodes)}):
        model = load(folder, **arguments).train()
        factory, options = engram_optimizers(TrainingArguments(tmp_path, report_to=[], use_cpu=True), "adam")
        optimizer = factory()(model, **options)
        for step in range(2):
            ids = tiny_ids(2, 9, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    plain, bound = trained
    assert_bound(bound, nodes)
    assert all(torch.equal(block, other) for block, other in zip(blocks(bound), blocks(plain), strict=True))
    assert not torch.equal(blocks(bound)[0], blocks(load(folder))[0])
    loaded, from_disk = (load(folder, host_nodes=list(nodes.nodes)) for _ in range(2))
    # Rows that are not in the file bring a block back from disk.
    from_disk.place_tables({"...table": "disk"})
    for model in (loaded, from_disk):
        model.load_state_dict({name: tensor + 1 for name, tensor in plain.state_dict().items()})
        model.load_state_dict(plain.state_dict())
        assert_bound(model, nodes)
    copied = copy.deepcopy(loaded)
    assert all(torch.equal(block, other) for block, other in zip(blocks(copied), blocks(plain), strict=True))


@pytest.mark.parametrize("given", [[], 0, "all", ["0"], [True], [0.0], {0: 1}])
def test_what_names_no_nodes_is_refused(folder, given):
    with pytest.raises(ValueError, match=r'a list of NUMA nodes such as \[2\], or "interleave"; got '):
        load(folder, host_nodes=given)


def test_an_unknown_node_is_refused_with_the_nodes_there_are(folder):
    every = nodes_with_memory()
    unknown = max(every) + 2
    message = f"names node {unknown}, on which this process can have no memory. It can on: {every[0]}"
    for call in (
        lambda: load(folder, host_nodes=[every[0], unknown]),
        lambda: load(folder).place_tables({"...table": "host"}, host_nodes=[unknown]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nodes_without_a_table_in_host_memory_are_refused(folder):
    for device_map in (None, {"": "cpu", "...table": "disk"}):
        with pytest.raises(ValueError, match="host_nodes is for tables in host memory, and no table goes there"):
            load(folder, device_map=device_map, host_nodes="interleave")


def test_other_systems_refuse_in_a_sentence(folder, monkeypatch):
    monkeypatch.setattr(table_blocks.sys, "platform", "win32")
    with pytest.raises(NotImplementedError, match="Linux's mbind .* and this is win32 on .*Leave host_nodes out"):
        load(folder, host_nodes=[0])


def test_a_refusal_of_the_kernel_is_said_in_a_sentence():
    # No machine has so many nodes.
    with pytest.raises(OSError, match="does not bind memory to nodes .*leave host_nodes out"):
        HostNodes((1023,)).empty((4,), torch.float32)


def test_lists_of_nodes_are_read_as_linux_writes_them():
    assert table_blocks._numbers_in("0-1,4\n") == {0, 1, 4} and table_blocks._numbers_in("3") == {3}
    assert table_blocks._numbers_in("\n") == set()

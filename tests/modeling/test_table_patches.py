"""Row patches over tables: the rows of a patch where it has some, the table's own everywhere else, on every tier."""

import contextvars
import copy
import json
import logging
import pickle
import random
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import (
    EngramMoEModel,
    PatchedRows,
    RowPatch,
    active_patches,
    add_patch,
    disable_patches,
    load_patch,
    make_patch,
    remove_patch,
    save_patch,
    set_patches,
    use_patches,
)
from engram_hf.modeling.memory_layer import find_rows
from engram_hf.modeling.table_patches import has_requests


FIRST, SECOND = "layers.0.engram.table", "layers.2.engram.table"
IDS = tiny_ids(3, 12)
TIERS = {
    "resident": None,
    "host": {"": "cpu", "...table": "cpu"},
    "disk": {"": "cpu", "...table": "disk"},
    "blocks": {"": "cpu", f"model.{FIRST}": "disk", f"model.{FIRST}.blocks.1": "cpu"},
}


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def row_ids_of(model, table: str, ids=IDS) -> torch.Tensor:
    """Row ids of a table that are read for some tokens, ascending."""
    layer = int(table.split(".")[1])
    in_head = model.model.ngram_hash(ids).row_ids[layer]
    first_of_head = torch.tensor([0, *model.named_tables()[table].head_rows.cumsum(0).tolist()[:-1]])
    return (in_head + first_of_head).unique()


def some_patch(model, name="alice", ids=IDS, seed=0, tables=(FIRST, SECOND), mode="replace", dtype=torch.float32):
    """A patch of half of the rows that some tokens read, and of as many others."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    for table in tables:
        read = row_ids_of(model, table, ids)
        is_kept = torch.rand(len(read), generator=generator) < 0.5
        others = torch.randint(0, model.named_tables()[table].num_rows, (20,), generator=generator)
        row_ids = torch.cat([read[is_kept], others]).unique()
        rows[table] = row_ids, 0.5 * torch.randn(len(row_ids), 8, generator=generator).to(dtype)
    return make_patch(model, name, rows, mode)


def whole_patch(model, name="alice", seed=0, mode="replace", tables=None):
    """Every row of some tables, at random."""
    generator = torch.Generator().manual_seed(seed)
    rows = {
        table_name: (
            torch.arange(table.num_rows),
            0.5 * torch.randn(table.num_rows, table.head_dim, generator=generator),
        )
        for table_name, table in model.named_tables().items()
        if tables is None or table_name in tables
    }
    return make_patch(model, name, rows, mode)


@pytest.fixture
def open_request():
    """Opens `use_patches` in a thread of its own, until the test ends."""
    go, threads = threading.Event(), []

    def start(model, names):
        is_open = threading.Event()

        def serve():
            with use_patches(model, names):
                is_open.set()
                go.wait(60)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        is_open.wait(60)

    yield start
    go.set()
    for thread in threads:
        thread.join()


def naive(model, *patches_and_scales):
    """A plain model in which somebody has written the rows of patches, one after the other."""
    plain = copy.deepcopy(model)
    set_patches(plain, [])
    for table_name, table in plain.named_tables().items():
        for patch, scale in patches_and_scales:
            for row_id, row in zip(*patch.tables[table_name][:2]) if table_name in patch.tables else ():
                block = next(b for b in table.block_records if row_id < b.first_row + b.num_rows)
                place = block.parameter.data[row_id - block.first_row]
                new, old = row.float(), place.float()
                if patch.mode == "add":
                    new = old + scale * new
                elif scale != 1:
                    new = old + scale * (new - old)
                place.copy_(new.to(place.dtype))
    return plain


def load(folder, device_map=None, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_patched_table_gives_what_a_table_with_these_rows_gives_on_every_tier(tmp_path, tier, dtype):
    model = tiny_model(tiny_config(engram_table_dtype=dtype))
    model.save_pretrained(tmp_path)
    patch = some_patch(model)
    expected, plain = logits(naive(model, (patch, 1.0))), logits(model)
    loaded = load(tmp_path, TIERS[tier], hot_rows=0 if tier == "resident" else 30)
    assert torch.equal(logits(loaded), plain)
    add_patch(loaded, patch)
    for _ in range(2):
        assert torch.equal(logits(loaded), expected)
    with disable_patches(loaded):
        assert active_patches(loaded) == [] and torch.equal(logits(loaded), plain)
    assert torch.equal(logits(loaded), expected) and not torch.equal(expected, plain)
    remove_patch(loaded, "alice")
    assert torch.equal(logits(loaded), plain) and active_patches(loaded) == []


@pytest.mark.parametrize("table_dtype", ["float8_e4m3fn", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_patch_over_quantized_rows_are_not_quantized(tmp_path, table_dtype, dtype):
    model = tiny_model(tiny_config(engram_table_dtype=table_dtype))
    model.save_pretrained(tmp_path)
    patch = some_patch(model, dtype=dtype)
    for name, table in model.named_tables().items():
        every = torch.arange(int(table.head_rows.min())).unsqueeze(1).expand(-1, len(table.head_rows))
        expected = table(every).view(-1, len(table.head_rows), 8).clone()
        firsts = table.head_rows.cumsum(0) - table.head_rows
        row_of = dict(zip(patch.tables[name].row_ids.tolist(), patch.tables[name].rows))
        for row in range(len(expected)):
            for head in range(len(firsts)):
                if (key := row + int(firsts[head])) in row_of:
                    expected[row, head] = row_of[key].float()
        for device_map in (None, TIERS["disk"]):
            loaded = load(tmp_path, device_map)
            add_patch(loaded, patch)
            assert torch.equal(loaded.named_tables()[name](every), expected.flatten(1))


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_and_differences_give_what_writing_them_gives(mode, scale, dtype):
    model = tiny_model(tiny_config(engram_table_dtype=dtype))
    patch = some_patch(model, mode=mode)
    expected = logits(naive(model, (patch, scale)))
    add_patch(model, patch, scale=scale)
    assert torch.equal(logits(model), expected)


def test_stacked_patches_are_laid_over_each_other_in_their_order():
    model = tiny_model(tiny_config(engram_table_dtype="bfloat16"))
    a, b = some_patch(model, "a", seed=1), some_patch(model, "b", seed=2, mode="add")
    c = some_patch(model, "c", seed=3, tables=[SECOND])
    for patch, scale in ((a, 1.0), (b, 0.3), (c, 0.7)):
        add_patch(model, patch, scale)
    known = {"a": (a, 1.0), "b": (b, 0.3), "c": (c, 0.7)}
    seen = set()
    assert active_patches(model) == ["a", "b", "c"]
    for names in (["a", "b", "c"], ["c", "b", "a"], ["b", "a"], ["c"], []):
        set_patches(model, names)
        found = logits(model)
        assert active_patches(model) == names
        assert torch.equal(found, logits(naive(model, *(known[name] for name in names))))
        seen.add(found.sum().item())
    assert len(seen) == 5


@pytest.mark.parametrize("modes", [("replace", "add"), ("replace", "replace"), ("add", "add")])
def test_patches_of_disjoint_rows_commute_exactly(modes):
    model = tiny_model()
    a = some_patch(model, "a", seed=1, mode=modes[0])
    b = some_patch(model, "b", seed=2, mode=modes[1])
    for name, each in b.tables.items():
        keep = ~torch.isin(each.row_ids, a.tables[name].row_ids)
        b.tables[name] = each._replace(row_ids=each.row_ids[keep], rows=each.rows[keep], base_digest="")
    add_patch(model, a, 0.3)
    add_patch(model, b, 0.7)
    forth = logits(model)
    set_patches(model, ["b", "a"])
    assert torch.equal(logits(model), forth)
    set_patches(model, ["b"])
    assert not torch.equal(logits(model), forth)


def random_rows(model, is_read: bool, count: int, seed: int, ids=IDS):
    """For each table, row ids that some tokens read, or that they do not, and new rows."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for table_name, table in model.named_tables().items():
        may_be = torch.isin(torch.arange(table.num_rows), row_ids_of(model, table_name, ids)) == is_read
        row_ids = may_be.nonzero().flatten()
        row_ids = row_ids[torch.randperm(len(row_ids), generator=generator)[:count]].sort().values
        found[table_name] = row_ids, torch.randn(len(row_ids), table.head_dim, generator=generator)
    return found


def rows_by_hand(table, row_ids, patched):
    """A lookup row by row: those of a patch by their row id, and the table's own."""
    given = dict(zip(patched[0].tolist(), patched[1]))
    own, first = table.look_up(row_ids).unflatten(-1, (-1, table.head_dim)), table.first_rows_of_heads.tolist()
    for place in torch.ones_like(row_ids).nonzero().tolist():
        row_id = int(row_ids[tuple(place)]) + first[place[-1]]
        if row_id in given:
            own[tuple(place)] = given[row_id]
    return own.flatten(-2)


# Heads of a table: eight to a byte of the filter, two bytes, several heads to a bit, and numbers that fill no eight.
@pytest.mark.parametrize("heads_of_order", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 40, 400])
# Row ids that are compared as one number of Python, and more of them.
@pytest.mark.parametrize("seq", [7, 90])
def test_a_forward_that_reads_one_patched_row_among_many_others_reads_it(heads_of_order, count, seq):
    model = tiny_model(tiny_config(engram_n_heads=heads_of_order))
    ids = tiny_ids(2, seq)
    memories = [layer.engram for layer in model.model.memory_layers()]
    others = random_rows(model, False, count, count, ids)
    one_of_each = random_rows(model, True, 1, count + 1, ids)
    add_patch(model, make_patch(model, "others", others))
    for table_name, (row_ids, rows) in one_of_each.items():
        patched = {table_name: (row_ids, rows)}
        add_patch(model, make_patch(model, "one", patched))
        _, found = find_rows(model.model.ngram_hash, memories, ids)
        for memory, (name, table) in zip(memories, model.named_tables().items()):
            expected = rows_by_hand(table, found[memory.layer_idx], patched.get(name, others[name]))
            assert torch.equal(memory.table(found[memory.layer_idx]), expected)
        remove_patch(model, "one")


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_an_empty_lookup_under_a_patch_is_empty(is_on_cpu):
    model = tiny_model()
    table = model.named_tables()[FIRST]
    add_patch(model, make_patch(model, "x", {FIRST: (torch.arange(3), torch.ones(3, table.head_dim))}))
    row_ids = torch.zeros(0, 5, len(table.head_rows), dtype=torch.int64)
    # An accelerator gives no numbers to look at.
    found = table.patches.lay_over(row_ids, table.look_up(row_ids), row_ids.numpy() if is_on_cpu else None)
    assert found.shape == (0, 5, len(table.head_rows) * table.head_dim)


def test_patches_that_are_switched_are_looked_for_anew():
    model = tiny_model()
    plain = logits(model)
    add_patch(model, make_patch(model, "others", random_rows(model, False, 40, 0)))
    assert torch.equal(logits(model), plain)
    add_patch(model, make_patch(model, "one", random_rows(model, True, 1, 1)))
    patched = logits(model)
    assert not torch.equal(patched, plain)
    for names, expected in ((["others"], plain), (["one"], patched), (["others", "one"], patched), ([], plain)):
        set_patches(model, names)
        assert torch.equal(logits(model), expected), names


@pytest.mark.parametrize("layers", [slice(1, None), slice(None, None, -1)], ids=["without the first", "turned round"])
def test_a_model_with_other_layers_than_its_hash_reads_patched_rows(layers):
    model = tiny_model(tiny_config(num_hidden_layers=4, engram_layer_ids=[0, 1, 2, 3]))
    model.model.layers = model.model.layers[layers]
    memories = [layer.engram for layer in model.model.memory_layers()]
    _, found = find_rows(model.model.ngram_hash, memories, IDS)
    for memory, (name, table) in zip(memories, model.named_tables().items(), strict=True):
        row_id = found[memory.layer_idx][-1, -1, -1:] + table.first_rows_of_heads[-1]
        row = torch.full((1, table.head_dim), 7.0)
        add_patch(model, make_patch(model, "one", {name: (row_id, row)}))
        _, row_ids = find_rows(model.model.ngram_hash, memories, IDS)
        assert (memory.table(row_ids[memory.layer_idx])[-1, -1, -table.head_dim :] == 7).all(), name
        remove_patch(model, "one")


def test_patches_that_are_switched_between_hash_and_lookup_are_those_of_the_lookup():
    model = tiny_model()
    memories = [layer.engram for layer in model.model.memory_layers()]
    add_patch(model, make_patch(model, "others", random_rows(model, False, 40, 0)))
    _, row_ids = find_rows(model.model.ngram_hash, memories, IDS)
    found = [memory.table(row_ids[memory.layer_idx]) for memory in memories]
    add_patch(model, make_patch(model, "one", random_rows(model, True, 1, 1)))
    again = [memory.table(row_ids[memory.layer_idx]) for memory in memories]
    assert not any(map(torch.equal, found, again))
    # A context of its own: each sequence is asked for itself.
    with use_patches(model, [None, "one", None]):
        mixed = [memory.table(row_ids[memory.layer_idx]) for memory in memories]
    assert all(torch.equal(one[::2], other[::2]) for one, other in zip(mixed, found))


def test_prefetched_rows_are_patched_and_prefetching_is_not_disturbed(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    patch = some_patch(model)
    expected = logits(naive(model, (patch, 1.0)))
    loaded = load(tmp_path, TIERS["disk"], hot_rows=16)
    add_patch(loaded, patch)
    loaded.prefetch(IDS)
    assert torch.equal(logits(loaded), expected)
    generated = loaded.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, naive(model, (patch, 1.0)).generate(IDS, max_new_tokens=6, do_sample=False))


def test_a_compiled_table_sees_patches_that_come_and_go():
    model = tiny_model()
    patch, table = some_patch(model), model.named_tables()[FIRST]
    patched = naive(model, (patch, 1.0)).named_tables()[FIRST]
    row_ids = model.model.ngram_hash(IDS).row_ids[0]
    plain, expected = table(row_ids), patched(row_ids)
    compiled = torch.compile(table, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(row_ids), plain)
        add_patch(model, patch)
        assert torch.equal(compiled(row_ids), expected)
        set_patches(model, [])
        assert torch.equal(compiled(row_ids), plain)
        remove_patch(model, "alice")
    add_patch(model, patch)
    with use_patches(model, [None, "alice", None]):
        each = torch.compile(table, backend="eager")(row_ids)
    assert torch.equal(each[1], expected[1]) and torch.equal(each[2], plain[2])


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["resident", "disk"])
def test_a_compiled_model_sees_patches_that_come_and_go(tmp_path, tier):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, TIERS[tier])
    patch, plain = some_patch(model), logits(model)
    expected = logits(naive(model, (patch, 1.0)))
    compiled = torch.compile(loaded, backend="eager", fullgraph=tier == "resident")
    assert_same_logits(logits(compiled, use_cache=False), plain)
    add_patch(loaded, patch)
    assert_same_logits(logits(compiled, use_cache=False), expected)
    set_patches(loaded, [])
    assert_same_logits(logits(compiled, use_cache=False), plain)
    with use_patches(loaded, [None, "alice", None]):
        each = logits(torch.compile(loaded, backend="eager"), use_cache=False)
    assert_same_logits(each[1], expected[1])
    assert_same_logits(each[2], plain[2])


@pytest.mark.slow
def test_an_exported_model_holds_its_patch():
    model = tiny_model()
    patch = some_patch(model)
    expected = logits(naive(model, (patch, 1.0)))
    add_patch(model, patch)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False).module()
    assert_same_logits(exported(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("is_pickled", [False, True])
def test_copies_have_the_patches_and_are_independent(is_pickled):
    model = tiny_model()
    add_patch(model, some_patch(model, "a"))
    add_patch(model, some_patch(model, "b", seed=5))
    set_patches(model, ["b"])
    twin = pickle.loads(pickle.dumps(model)) if is_pickled else copy.deepcopy(model)
    assert active_patches(twin) == ["b"] and torch.equal(logits(twin), logits(model))
    set_patches(twin, ["a", "b"])
    remove_patch(model, "a")
    assert active_patches(model) == ["b"] and not torch.equal(logits(twin), logits(model))


def test_a_copy_of_a_model_does_not_follow_rows_that_are_trained():
    model = tiny_model().requires_grad_(False)
    made = whole_patch(model)
    rows = {name: (each.row_ids, each.rows.clone().requires_grad_()) for name, each in made.tables.items()}
    add_patch(model, make_patch(model, "learning", rows))
    reference = copy.deepcopy(model)
    before = logits(reference)
    with torch.no_grad():
        for _, given in rows.values():
            given.add_(1.0)
    assert torch.equal(logits(reference), before) and not torch.equal(logits(model), before)


def test_a_pickle_holds_rows_and_row_ids_of_patches_and_little_else():
    model = tiny_model()
    size = len(pickle.dumps(model))
    patch = whole_patch(model)
    add_patch(model, patch)
    assert len(pickle.dumps(model)) - size < patch.nbytes + 2000
    held = sum(table.patches.nbytes for table in model.named_tables().values())
    assert patch.nbytes < held <= patch.nbytes + 128 * patch.num_rows


@pytest.mark.parametrize("mode, scale, size", [("replace", 1.0, 1e5), ("add", 1.0, 1e5), ("add", 1e300, 1.0)])
def test_numbers_that_the_type_of_the_table_cannot_hold_are_refused(mode, scale, size):
    model = tiny_model(tiny_config(engram_table_dtype="float16"))
    patch = make_patch(model, "x", {FIRST: (torch.arange(3), torch.full((3, 8), size))}, mode)
    with pytest.raises(ValueError, match="would be infinite: lookups are float16, whose largest number is 6.55e"):
        add_patch(model, patch, scale)
    assert active_patches(model) == []
    add_patch(model, patch, 1e-4)
    assert torch.isfinite(model.named_tables()[FIRST](torch.zeros(1, 1, 4, dtype=torch.long))).all()


def test_a_save_leaves_patches_out_and_says_so(tmp_path, caplog):
    model = tiny_model()
    plain, names = logits(model), set(model.state_dict())
    add_patch(model, some_patch(model))
    assert set(model.state_dict()) == names
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        model.save_pretrained(tmp_path)
    assert "alice are not part of what is saved" in caplog.text
    assert torch.equal(logits(load(tmp_path)), plain)


def test_rows_that_require_gradients_get_them_and_those_of_the_table_do_not():
    model = tiny_model().requires_grad_(False)
    made = some_patch(model)
    rows = {name: (each.row_ids, each.rows.clone().requires_grad_()) for name, each in made.tables.items()}
    add_patch(model, make_patch(model, "learning", rows))
    model(IDS, labels=IDS).loss.backward()
    dense = naive(model, (made, 1.0))
    for table in dense.named_tables().values():
        table.requires_grad_(True)
    dense(IDS, labels=IDS).loss.backward()
    for name, (row_ids, given) in rows.items():
        whole = torch.cat([block.parameter.grad for block in dense.named_tables()[name].block_records])
        torch.testing.assert_close(given.grad, whole[row_ids], rtol=1e-4, atol=1e-7)
        assert given.grad.abs().max() > 0


def test_a_table_is_not_trained_under_a_patch():
    model = tiny_model()
    add_patch(model, some_patch(model))
    for table in model.named_tables().values():
        table.collect_row_gradients()
    model.train()
    with pytest.raises(ValueError, match=r"lie over the table are alice.*set_patches\(model, \[\]\)"):
        model(IDS, labels=IDS)
    logits(model)
    with disable_patches(model):
        model(IDS, labels=IDS)
    set_patches(model, [])
    model(IDS, labels=IDS).loss.backward()
    assert model.named_tables()[FIRST].row_gradients.rows is not None


def test_a_patch_for_another_model_is_refused(caplog):
    model = tiny_model()
    patch = some_patch(model)

    def refused(other, sentence, patch=patch):
        with pytest.raises(ValueError, match=sentence):
            add_patch(other, patch)
        assert active_patches(other) == []

    refused(tiny_model(tiny_config(engram_layer_ids=[0])), "no such table; it has layers.0.engram.table")
    refused(tiny_model(tiny_config(engram_vocab_size=59)), "was made for a layers.0.engram.table of .* rows")
    refused(tiny_model(tiny_config(engram_head_dim=16)), "of width 8, and this one has .* of width 16")
    refused(tiny_model(tiny_config(engram_seed=7)), "another hash than that of .*: it differs in multipliers")
    refused(tiny_model(), "replace, add, got 'set'", RowPatch("x", {}, "set"))
    with pytest.raises(ValueError, match="has no tables"):
        add_patch(torch.nn.Linear(2, 2), patch)
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        add_patch(tiny_model(seed=5), patch)
    assert "other rows than the table that the patch 'alice' was made for" in caplog.text
    # The base model of the same has the same tables.
    base = EngramMoEModel(tiny_config())
    base.load_state_dict(model.model.state_dict())
    add_patch(base, patch)
    add_patch(model, patch)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_names_are_checked():
    model = tiny_model()
    add_patch(model, some_patch(model))
    for call, sentence in (
        (lambda: add_patch(model, some_patch(model)), "a patch 'alice' already"),
        (lambda: set_patches(model, ["bob"]), "no patch 'bob'; it has 'alice'"),
        (lambda: set_patches(model, "alice"), r"Write \['alice'\]"),
        (lambda: set_patches(model, ["alice", "alice"]), "can be laid over the tables once"),
        (lambda: remove_patch(model, "bob"), "no patch 'bob'"),
        (lambda: add_patch(model, some_patch(model, "b"), scale=float("nan")), "finite number"),
        (lambda: add_patch(model, some_patch(model, "b"), scale=10**400), "finite number"),
        (lambda: make_patch(model, "x", {"layers.1.engram.table": (torch.arange(2), torch.zeros(2, 8))}), "no table"),
        (lambda: make_patch(model, "x", {FIRST: (torch.tensor([2, 1]), torch.zeros(2, 8))}), "not ascending"),
        (lambda: make_patch(model, "x", {FIRST: (torch.arange(2), torch.zeros(2, 8).half())}), "torch.bfloat16"),
        (lambda: make_patch(model, "x", {FIRST: (torch.arange(2), torch.zeros(2, 8) / 0)}), "NaN or infinity"),
        (lambda: make_patch(model, "x", {FIRST: (torch.tensor([10**9]), torch.zeros(1, 8))}), r"must lie in \[0, "),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert active_patches(model) == ["alice"]


# Patches for each sequence.


def dense_model():
    """Without experts, whose kernels compute tokens of all sequences at once, so that one depends on the others."""
    return tiny_model(tiny_config(first_k_dense_replace=3))


def with_users(model):
    """A model that knows three patches and sees none, and a plain model for each of them."""
    plain = {None: copy.deepcopy(model)}
    for seed, name in enumerate(["alice", "bob", "carol"], 1):
        patch = some_patch(model, name, seed=seed, mode="add" if name == "bob" else "replace")
        plain[name] = naive(model, (patch, 0.5))
        add_patch(model, patch, 0.5)
    set_patches(model, ["carol"])
    return model, plain


@pytest.mark.parametrize("tier", ["resident", "disk"])
def test_each_sequence_of_a_batch_sees_its_own_patch(tmp_path, tier):
    model = dense_model()
    model.save_pretrained(tmp_path)
    model, plain = with_users(load(tmp_path, TIERS[tier], hot_rows=0 if tier == "resident" else 9))
    names = ["alice", None, "bob"]
    with use_patches(model, names):
        found = logits(model)
        assert torch.equal(found, logits(model))
    assert torch.equal(found, logits(model, engram_patches=names))
    for i, name in enumerate(names):
        # The same batch in a model with this patch alone.
        assert torch.equal(found[i], logits(plain[name])[i])
    assert torch.equal(logits(model), logits(plain["carol"]))
    with use_patches(model, [None] * 3):
        assert torch.equal(logits(model), logits(plain[None]))
        with disable_patches(model), use_patches(model, ["bob"] * 3):
            assert torch.equal(logits(model), logits(plain["bob"]))
    with use_patches(model, ["alice"]), disable_patches(model):
        assert torch.equal(logits(model), logits(plain[None]))
    assert active_patches(model) == ["carol"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_what_is_generated_for_each_user_is_what_the_user_alone_would_get(options):
    model, plain = with_users(dense_model())
    names = ["bob", None, "alice"]
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    torch.manual_seed(3)
    found = model.generate(IDS, engram_patches=names, **options)
    torch.manual_seed(3)
    with use_patches(model, names):
        assert torch.equal(found, model.generate(IDS, **options))
    each = len(found) // 3
    for i, name in enumerate(names):
        torch.manual_seed(3)
        assert torch.equal(
            found[each * i : each * (i + 1)], plain[name].generate(IDS, **options)[each * i : each * (i + 1)]
        )


def test_rows_of_a_mixture_of_experts_are_those_of_each_user_too():
    model, plain = with_users(tiny_model())
    names = ["alice", None, "bob"]
    for name, table in model.named_tables().items():
        row_ids = model.model.ngram_hash(IDS).row_ids[int(name.split(".")[1])]
        with use_patches(model, names):
            found = table(row_ids)
        for i, user in enumerate(names):
            assert torch.equal(found[i], plain[user].named_tables()[name](row_ids)[i])
    with use_patches(model, names):
        found = logits(model)
    for i, user in enumerate(names):
        assert_same_logits(found[i], logits(plain[user])[i])


def test_several_patches_of_one_sequence_are_stacked():
    model, _ = with_users(dense_model())
    set_patches(model, ["bob", "alice"])
    expected = logits(model)
    set_patches(model, [])
    with use_patches(model, [["bob", "alice"], None, ("alice", "bob")]):
        found = logits(model)
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[2], expected[2])


def test_requests_are_checked():
    model, _ = with_users(dense_model())
    for names, sentence in (
        ([], "one name or None per sequence"),
        ("alice", "one name or None"),
        (["x"], "no patch 'x'"),
    ):
        with pytest.raises(ValueError, match=sentence), use_patches(model, names):
            pass
    with pytest.raises(ValueError, match="for 2 sequences, and the batch has 3"), use_patches(model, [None, "bob"]):
        logits(model)
    model.train()
    with pytest.raises(ValueError, match="a forward that trains"), use_patches(model, ["bob", None, None]):
        model(IDS)
    assert not has_requests()


def test_threads_do_not_see_each_others_patches():
    model, plain = with_users(dense_model())
    expected = {name: logits(each) for name, each in plain.items()}
    wrong, start = [], threading.Barrier(4)

    def serve(name):
        start.wait()
        for _ in range(15):
            with use_patches(model, [name] * 3):
                if not torch.equal(logits(model), expected[name]):
                    wrong.append(name)

    def serve_plainly():
        start.wait()
        for _ in range(15):
            if not torch.equal(logits(model), expected["carol"]):
                wrong.append("active")

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("alice", "bob", None)]
    threads.append(threading.Thread(target=serve_plainly))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_contexts_of_plain_tables_are_those_of_one_thread_and_end_in_any_order():
    model = tiny_model()
    plain = logits(model)
    add_patch(model, whole_patch(model))
    patched, seen = logits(model), []
    one, other = disable_patches(model), disable_patches(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert active_patches(model) == [] and torch.equal(logits(model), plain)
    thread = threading.Thread(target=lambda: seen.append(logits(model)))
    thread.start()
    thread.join()
    assert torch.equal(seen[0], patched)
    # What is added inside is there afterwards.
    add_patch(model, whole_patch(model, "bob", seed=1))
    other.__exit__(None, None, None)
    assert active_patches(model) == ["alice", "bob"] and not torch.equal(logits(model), patched)


def test_a_request_whose_patch_is_removed_goes_on_with_it():
    model = tiny_model()
    add_patch(model, whole_patch(model))
    with use_patches(model, ["alice"] * 3):
        before = logits(model)
        remove_patch(model, "alice")
        assert torch.equal(logits(model), before) and active_patches(model) == []
    assert not torch.equal(logits(model), before)


def test_a_forward_refuses_a_batch_with_another_number_of_sequences():
    """Chosen and rejected answers of two users, behind each other: the second half would see the wrong users."""
    model = tiny_model()
    add_patch(model, whole_patch(model, "a", seed=1))
    add_patch(model, whole_patch(model, "b", seed=2))
    for names, ids in ((["a", "b"], torch.cat([IDS[:2], IDS[:2]])), (["a"], IDS), (["a", "b", None], IDS[:2])):
        for call in (logits, lambda model, ids: model.generate(ids, max_new_tokens=2, do_sample=False)):
            with use_patches(model, names), pytest.raises(ValueError, match=f"for {len(names)} seq.*has {len(ids)}"):
                call(model, ids)
    beams = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2}
    with use_patches(model, ["a", "b"]), pytest.raises(ValueError, match="2 sequences, each 2 times.*batch has 6"):
        model.generate(IDS, **beams)
    with use_patches(model, ["a", "b"]):
        model.generate(IDS[:2], **beams)
        with pytest.raises(ValueError, match="for 2 sequences, and the batch has 4"):
            logits(model, torch.cat([IDS[:2], IDS[:2]]))


def test_a_context_that_is_taken_to_another_thread_is_seen_there():
    torch._dynamo.reset()
    model = tiny_model()
    add_patch(model, whole_patch(model))
    patched = logits(model)
    set_patches(model, [])
    ids, seen = IDS[:1], []
    with use_patches(model, ["alice"]):
        context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(lambda: seen.append(logits(model, ids)),))
    thread.start()
    thread.join()
    assert torch.equal(seen[0], logits(model, ids, engram_patches=["alice"]))
    assert not torch.equal(seen[0], logits(model, ids)) and patched.shape[0] == 3


def test_a_forward_that_trains_something_else_refuses_contexts_that_its_backward_would_not_know():
    model = tiny_model().train()
    add_patch(model, whole_patch(model))
    for table in model.named_tables().values():
        table.requires_grad_(False)
    with disable_patches(model), pytest.raises(ValueError, match=r"cannot use them.*set_patches\(model, names\)"):
        model(IDS)
    with use_patches(model, ["alice"] * 3):
        model(IDS)
    set_patches(model, [])
    with disable_patches(model):
        model(IDS)


def test_a_compiled_forward_does_not_mind_requests_of_other_threads(open_request):
    torch._dynamo.reset()
    model = tiny_model()
    add_patch(model, whole_patch(model))
    set_patches(model, [])
    table, row_ids = model.named_tables()[FIRST], model.model.ngram_hash(IDS).row_ids[0]
    compiled = torch.compile(table, backend="eager", fullgraph=True)
    expected = compiled(row_ids)
    open_request(model, ["alice"])
    assert torch.equal(compiled(row_ids), expected)


def test_training_does_not_mind_requests_of_other_threads(open_request):
    model = tiny_model()
    add_patch(model, whole_patch(model))
    set_patches(model, [])
    for table in model.named_tables().values():
        table.collect_row_gradients()
    open_request(model, ["alice"])
    model.train()
    model(IDS, labels=IDS).loss.backward()


# The file.


def test_a_patch_comes_back_from_its_file(tmp_path):
    model = tiny_model()
    patch = some_patch(model, dtype=torch.bfloat16)
    patch.provenance = {"data": "a text", "steps": 7, "learning_rate": 1e-3}
    file = save_patch(patch, tmp_path / "folder")
    found = load_patch(tmp_path / "folder")
    assert file.name == "patch.safetensors" and (found.name, found.mode) == (patch.name, patch.mode)
    assert (found.provenance, found.fingerprint) == (patch.provenance, patch.fingerprint)
    for name, each in patch.tables.items():
        back = found.tables[name]
        assert torch.equal(back.row_ids, each.row_ids) and torch.equal(back.rows, each.rows)
        assert (back.table_rows, back.base_digest, back.rows.dtype) == (
            each.table_rows,
            each.base_digest,
            torch.bfloat16,
        )
    # Anybody can read it.
    tensors = load_file(file)
    assert torch.equal(tensors[f"{FIRST}.patch.row_ids"], patch.tables[FIRST].row_ids) and len(tensors) == 4
    assert file.stat().st_size < patch.nbytes + 4096
    add_patch(model, tmp_path / "folder")
    assert active_patches(model) == ["alice"]


def test_damaged_files_are_refused(tmp_path):
    model = tiny_model()
    patch = some_patch(model)
    sound = save_patch(patch, tmp_path / "sound.safetensors").read_bytes()
    path, refused = tmp_path / "damaged.safetensors", 0
    for seed in range(150):
        rng = random.Random(seed)
        content = bytearray(sound)
        kind = seed % 3
        if kind == 0:
            del content[rng.randrange(len(content)) :]
        elif kind == 1:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            content += bytes(rng.randrange(1, 9))
        path.write_bytes(content)
        try:
            found = load_patch(path)
        except (ValueError, OSError) as error:
            assert "damaged" in str(error), (seed, error)
            refused += 1
            continue
        # A bit of the padding behind the header, for one, or of the entry "format".
        assert found.num_rows == patch.num_rows, seed
        for name, each in patch.tables.items():
            assert torch.equal(found.tables[name].rows, each.rows), seed
    assert refused > 130


def test_other_files_are_no_patches(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        load_patch(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is no row patch"):
        load_patch(path)
    for text in ("[]", "{", json.dumps({"version": 1}), "[" * 10**5):
        save_file({"a": torch.zeros(2)}, path, metadata={"engram_patch": text})
        with pytest.raises(ValueError, match="is damaged"):
            load_patch(path)


def test_a_patch_that_cannot_be_written_leaves_the_old_file(tmp_path):
    model = tiny_model()
    file = save_patch(some_patch(model), tmp_path / "a.safetensors")
    before = file.read_bytes()
    broken = some_patch(model, "b")
    broken.tables[FIRST] = PatchedRows(torch.tensor([3, 1]), torch.zeros(2, 8), 10)
    with pytest.raises(ValueError, match="not ascending"):
        save_patch(broken, file)
    broken = some_patch(model, "b")
    broken.provenance = {"loss": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        save_patch(broken, file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

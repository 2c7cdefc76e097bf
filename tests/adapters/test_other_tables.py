"""Tables of other people's models on tiers: the logits, the tokens and the files are those of stock transformers."""

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from cases import slow
from foreign import (
    GEMMA_TABLE,
    QWEN_TABLE,
    drawn,
    gemma3n_text,
    gemma4_composite,
    gemma4_text,
    publish,
    qwen_composite,
    qwen_text,
    tensors_of,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen4ExpForConditionalGeneration,
    pipeline,
)
from typer.testing import CliRunner

from engram_hf import (
    EngramConfig,
    add_engram,
    count_parameters,
    engram_tables,
    estimate_memory,
    inspect_checkpoint,
    load_with_tables,
    place_tables,
    prefetch,
)
from engram_hf.adapters.served_embedding import TableOfParts
from engram_hf.adapters.table_parts import class_and_config
from engram_hf_command import app


EOS = 2
# Name of a model, the class that it is loaded as (None for AutoModelForCausalLM's), the end of its tables' names.
CASES = {
    "qwen": (None, "...ngram_embedding"),
    "qwen-fp8": (None, "...ngram_embedding"),
    "qwen-text-of-composite": (None, "...ngram_embedding"),
    "qwen-composite": (Qwen4ExpForConditionalGeneration, "...ngram_embedding"),
    "gemma3n": (None, "...embed_tokens_per_layer"),
    "gemma4": (None, "...embed_tokens_per_layer"),
    "gemma4-composite": (None, "...embed_tokens_per_layer"),
}
TIERS = ("resident", "host", "disk")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in the layouts of their publishers."""
    made = tmp_path_factory.mktemp("published")
    composite = publish(qwen_composite(), made / "qwen-composite")
    return {
        "qwen": publish(qwen_text(), made / "qwen"),
        "qwen-fp8": publish(qwen_text(), made / "qwen-fp8", is_fp8=True),
        "qwen-composite": composite,
        "qwen-text-of-composite": composite,
        "gemma3n": publish(gemma3n_text(), made / "gemma3n"),
        "gemma4": publish(gemma4_text(), made / "gemma4"),
        "gemma4-composite": publish(gemma4_composite(), made / "gemma4-composite"),
    }


def some_ids(seed: int = 0, batch: int = 2, seq: int = 11) -> torch.Tensor:
    ids = torch.randint(3, 95, (batch, seq), generator=torch.Generator().manual_seed(seed))
    # The end of a text inside of it, after which n-grams begin anew.
    ids[0, seq // 2] = EOS
    return ids


def stock(folders, case: str, **options):
    return (CASES[case][0] or AutoModelForCausalLM).from_pretrained(folders[case], **options)


def served(folders, case: str, tier: str, **options):
    return load_with_tables(folders[case], {"": "cpu", CASES[case][1]: tier}, CASES[case][0], **options)


@torch.no_grad()
def logits_of(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=some_ids() if ids is None else ids).logits


@pytest.mark.parametrize("case", CASES)
def test_every_tier_gives_the_bits_of_the_stock_model(folders, case):
    expected = logits_of(stock(folders, case))
    for tier in TIERS:
        model = served(folders, case, tier)
        assert {each for table in engram_tables(model) for each in table.tiers} == {tier}
        assert torch.equal(logits_of(model), expected)
        assert isinstance(model, type(stock(folders, case))), "the model keeps its class"


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_type_of_the_model_gives_the_same_bits(folders, case, dtype):
    expected = logits_of(stock(folders, case, dtype=dtype))
    model = served(folders, case, "disk", dtype=dtype)
    assert model.dtype == dtype
    assert torch.equal(logits_of(model), expected)
    cast = served(folders, case, "disk").to(dtype)
    assert torch.equal(logits_of(cast), logits_of(stock(folders, case).to(dtype)))


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", "cpu+disk", {"": "cpu"}])
def test_every_kind_of_map_gives_the_same_bits(folders, device_map):
    model = load_with_tables(folders["qwen"], device_map)
    assert torch.equal(logits_of(model), logits_of(stock(folders, "qwen")))
    is_on_disk = all(set(table.tiers) == {"disk"} for table in engram_tables(model))
    assert is_on_disk == (device_map == "cpu+disk")


def test_a_key_is_a_complete_name_or_its_end(folders):
    second = QWEN_TABLE.replace("layers.0", "layers.1")
    model = load_with_tables(
        folders["qwen"], {"": "cpu", QWEN_TABLE: "disk", "...layers.1.ple.ple_embedding.ngram_embedding": "host"}
    )
    assert {table.name: table.tiers.keys() for table in engram_tables(model)} == {
        QWEN_TABLE: {"disk"},
        second: {"host"},
    }


def test_moves_between_tiers_change_no_bit(folders):
    model, expected = served(folders, "qwen", "disk"), logits_of(stock(folders, "qwen"))
    for tier in ("host", "disk", "resident", "disk", "host", "resident"):
        place_tables(model, {"...ngram_embedding": tier})
        assert torch.equal(logits_of(model), expected)
    with pytest.raises(ValueError, match="moves tables only"):
        place_tables(model, {"model.norm": "cpu"})


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
def test_a_model_that_somebody_else_loaded_can_be_placed(folders, case):
    expected = logits_of(stock(folders, case))
    for tier in TIERS:
        model = stock(folders, case)
        place_tables(model, {CASES[case][1]: tier})
        assert {each for table in engram_tables(model) for each in table.tiers} == {tier}
        assert torch.equal(logits_of(model), expected)
        assert not any(module.training for module in model.modules())
    for each in (model, stock(folders, case)):
        with pytest.raises(ValueError, match="takes a dict of names to places, such as .* got 'disk'"):
            place_tables(each, "disk")
    with pytest.raises(ValueError, match=r"got a list.*torch.tensor\(\[ids\]\)"):
        prefetch(model, [1, 2])
    with pytest.raises(ValueError, match=r"got a (Gemma3n|Qwen).*place_tables\(model, places\)"):
        load_with_tables(model)
    changed = stock(folders, case)
    with torch.no_grad():
        changed.get_submodule(GEMMA_TABLE if case == "gemma3n" else QWEN_TABLE).weight[5] += 1
    with pytest.raises(ValueError, match="has other rows than"):
        place_tables(changed, {CASES[case][1]: "disk"})
    assert type(changed).__module__.startswith("transformers.") and not engram_tables(changed)


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
def test_a_table_that_was_taken_over_into_memory_goes_to_disk_without_a_save(folders, case, tmp_path):
    expected, model = logits_of(stock(folders, case)), stock(folders, case)
    for tier in ("host", "disk", "resident", "disk"):
        place_tables(model, {CASES[case][1]: tier})
        assert torch.equal(logits_of(model), expected)
        assert {each for table in engram_tables(model) for each in table.tiers} == {tier}
    # Its parts are those of the files, whatever the config says of them.
    place_tables(model, {CASES[case][1]: "host"})
    model.save_pretrained(tmp_path / "saved")
    assert set(tensors_of(tmp_path / "saved")) == set(tensors_of(folders[case]))
    with torch.no_grad():
        model.get_submodule(GEMMA_TABLE if case == "gemma3n" else QWEN_TABLE).table.blocks[0][3] += 1
    with pytest.raises(ValueError, match="has other rows than"):
        place_tables(model, {CASES[case][1]: "disk"})
    # A model that comes from no files has the parts of its config.
    made = drawn(qwen_text() if case == "qwen" else gemma3n_text())
    expected = logits_of(made)
    place_tables(made, {CASES[case][1]: "host"})
    assert torch.equal(logits_of(made), expected)
    with pytest.raises(ValueError, match="comes from no file"):
        place_tables(made, {CASES[case][1]: "disk"})


def test_arguments_that_are_fields_of_the_config_change_it_as_in_from_pretrained(folders):
    options = {"use_cache": False, "attn_implementation": "eager", "dtype": torch.float32}
    theirs, ours = stock(folders, "gemma4", **options), served(folders, "gemma4", "disk", **options)
    for model in (theirs, ours):
        assert not model.config.use_cache and model.config._attn_implementation == "eager"
        assert model.dtype == torch.float32
    assert ours(input_ids=some_ids()).past_key_values is None
    assert torch.equal(logits_of(ours), logits_of(theirs))
    for load in (stock, served):
        with pytest.raises(TypeError, match="no_such_field"):
            load(folders, "gemma4", *(["disk"] if load is served else []), no_such_field=1)


def test_the_text_class_of_a_quantized_composite_is_quantized_too(tmp_path):
    folder = publish(qwen_composite(), tmp_path / "model", is_fp8=True)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load_with_tables(folder, "cpu+disk")
    assert type(ours.config) is type(theirs.config)
    assert "quantization_config" in class_and_config(AutoConfig.from_pretrained(folder), None)[1].to_dict()
    assert torch.equal(logits_of(ours), logits_of(theirs))


def test_a_class_without_tables_is_refused_for_a_checkpoint_with_a_memory(tmp_path):
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = add_engram(
        drawn(LlamaForCausalLM(config), torch.float32), EngramConfig([1], 101, 4, 8, compressed_vocab_size=None)
    )
    model.save_pretrained(tmp_path)
    for model_class in (None, AutoModelForCausalLM):
        loaded = load_with_tables(tmp_path, "cpu+disk", model_class)
        assert engram_tables(loaded) and torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        load_with_tables(tmp_path, "cpu+disk", LlamaForCausalLM)


def test_a_named_embedding_of_any_model_is_a_table(tmp_path):
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    drawn(LlamaForCausalLM(config)).save_pretrained(tmp_path / "untied")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "untied"))
    for device_map in ({"": "cpu", "...embed_tokens": "disk"}, {"": "cpu", "model.embed_tokens": "disk"}):
        model = load_with_tables(tmp_path / "untied", device_map)
        assert torch.equal(logits_of(model), expected)
    with pytest.raises(ValueError, match="has no lookup table that is known by its name"):
        load_with_tables(tmp_path / "untied", "cpu+disk")
    with pytest.raises(ValueError, match="which is no embedding"):
        load_with_tables(tmp_path / "untied", {"": "cpu", "...embed_token": "disk"})
    config.tie_word_embeddings = True
    drawn(LlamaForCausalLM(config)).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="is tied to another weight"):
        load_with_tables(tmp_path / "tied", {"": "cpu", "...embed_tokens": "disk"})


# Saving and copying.


@pytest.mark.parametrize(
    "case", ["qwen", "qwen-fp8", "gemma3n", *map(slow, sorted(CASES.keys() - {"qwen", "qwen-fp8", "gemma3n"}))]
)
def test_a_save_has_the_names_and_bytes_of_the_checkpoint_and_stock_loads_it(folders, case, tmp_path):
    for tier in ("disk", "host"):
        model = served(folders, case, tier)
        model.save_pretrained(tmp_path / tier)
        saved, original = tensors_of(tmp_path / tier), tensors_of(folders[case])
        tables = [name for name in original if "ngram_embedding." in name or "embed_tokens_per_layer." in name]
        assert tables
        assert {name for name in saved if "ngram_embedding." in name or "tokens_per_layer." in name} == set(tables)
        for name in tables:
            assert saved[name].dtype == original[name].dtype
            assert torch.equal(saved[name].view(torch.uint8), original[name].view(torch.uint8))
        if case != "qwen-fp8":
            again = (CASES[case][0] or type(model).stock_class).from_pretrained(tmp_path / tier)
            assert torch.equal(logits_of(again), logits_of(stock(folders, case)))
        assert torch.equal(logits_of(load_with_tables(tmp_path / tier, "cpu+disk", CASES[case][0])), logits_of(model))


@pytest.mark.parametrize("case", ["qwen", "qwen-fp8", "gemma3n"])
@pytest.mark.parametrize("tier", TIERS)
def test_copies_and_pickles_compute_the_same(folders, case, tier):
    model = served(folders, case, tier)
    expected = logits_of(model)
    torch.save(model, written := io.BytesIO())
    written.seek(0)
    twins = [copy.deepcopy(model), torch.load(written, weights_only=False)]
    # torch cannot pickle FP8 without torch.save, whoever's model it is.
    twins += [] if case == "qwen-fp8" else [pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(logits_of(twin), expected)
        assert [table.tiers for table in engram_tables(twin)] == [table.tiers for table in engram_tables(model)]
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_state_dicts_go_in_and_out(folders, tier):
    model, other = served(folders, "qwen", tier), stock(folders, "qwen")
    other.load_state_dict(drawn(qwen_text(), seed=1).state_dict())
    expected = logits_of(model)
    again = served(folders, "qwen", "host")
    with torch.no_grad():
        for block in again.get_submodule(QWEN_TABLE).table.blocks:
            block.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(again), expected)
    # The state dict of the owner's own class goes in too.
    again.load_state_dict(other.state_dict())
    assert torch.equal(logits_of(again), logits_of(other))


def test_parameters_are_counted_with_the_tables(folders):
    for case in ("qwen", "gemma3n", "qwen-fp8"):
        assert served(folders, case, "disk").num_parameters() == stock(folders, case).num_parameters()


def test_resizing_the_vocabulary_is_refused_and_the_same_size_is_not(folders):
    for case in ("qwen", "gemma3n"):
        model = served(folders, case, "disk")
        assert model.resize_token_embeddings(99) is model.get_input_embeddings()
        with pytest.raises(ValueError, match="stays at 99 ids, got 101"):
            model.resize_token_embeddings(101)


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
def test_an_adapter_of_peft_trains_beside_a_table_on_disk(folders, case, tmp_path):
    results = []
    for model in (stock(folders, case), served(folders, case, "disk")):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).train()
        loss = adapted(input_ids=some_ids(), labels=some_ids()).loss
        loss.backward()
        gradients = [p.grad for n, p in adapted.named_parameters() if "lora_" in n]
        adapted.save_pretrained(tmp_path / "adapter")
        results.append([loss.detach(), *gradients, logits_of(adapted.eval()), logits_of(adapted.merge_and_unload())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000


# Decoding.

GENERATIONS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("case", ["qwen", "qwen-fp8", "gemma3n", "gemma4"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_generate_gives_the_tokens_of_the_stock_model(folders, case, tier):
    theirs, ours = stock(folders, case), served(folders, case, tier)
    ids = some_ids(3)
    mask = torch.ones_like(ids)
    # Padding on the left of the second text.
    ids[1, :4], mask[1, :4] = 0, 0
    for name, options in GENERATIONS.items():
        found = []
        options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True, **options}
        for model in (theirs, ours):
            torch.manual_seed(0)
            try:
                out = model.generate(ids, attention_mask=mask, **options)
                found.append([out.sequences, *out.scores])
            except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
                found.append(type(error))
        if isinstance(found[0], type):
            assert found[0] is found[1], f"{name}: only where the stock model cannot either"
        else:
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), name


def test_a_pipeline_generates_from_a_table_on_disk(folders, tokenizer):
    texts = []
    for model in (stock(folders, "gemma3n"), served(folders, "gemma3n", "disk")):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        # Only ids of the tiny vocabulary.
        texts.append(generate("()", max_new_tokens=5, do_sample=False, return_tensors=True))
    assert texts[0] == texts[1]


class Spy:
    """Which row ids tables are asked for early, and which they are asked for in the end."""

    def __init__(self, monkeypatch):
        self.early, self.late = set(), set()
        bring, forward = TableOfParts.bring_pages, TableOfParts.forward

        def bring_pages(table, row_ids):
            self.early |= {(id(table), row) for row in row_ids.flatten().tolist()}
            bring(table, row_ids)

        def look_up(table, row_ids):
            self.late |= {(id(table), row) for row in row_ids.flatten().tolist()}
            return forward(table, row_ids)

        monkeypatch.setattr(TableOfParts, "bring_pages", bring_pages)
        monkeypatch.setattr(TableOfParts, "forward", look_up)


@pytest.mark.parametrize("case", ["qwen", "qwen-composite", "gemma3n", "gemma4-composite"])
def test_forwards_prefetch_exactly_the_rows_that_they_read(folders, case, monkeypatch):
    model, ids = served(folders, case, "disk"), some_ids(4)
    ids[1, :3] = 0
    mask = (ids != 0).long()
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        model(input_ids=ids, attention_mask=mask)
        of_prompt = spy.early
        assert spy.late and spy.early == spy.late
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        # For one token a lookup follows at once in the first table, which therefore is not asked early.
        first = id(next(iter(model.named_tables().values())))
        assert of_prompt < spy.late and spy.early <= spy.late
        assert spy.early == {each for each in spy.late if each[0] != first or each in of_prompt}
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        prefetch(model, ids, mask)
        early = spy.early
        model(input_ids=ids, attention_mask=mask)
        assert early == spy.late
    # Rows off the disk need no prefetch.
    place_tables(model, {CASES[case][1]: "resident"})
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        model(input_ids=ids)
        assert not spy.early and spy.late


# What loading reads, and what is refused.


@pytest.mark.slow
def test_loading_opens_headers_and_reads_no_row(tmp_path):
    folder = publish(qwen_text(ngram_vocab_size_base=300_007), tmp_path / "large")
    nbytes = sum(t.nbytes for name, t in tensors_of(folder).items() if "ngram_embedding" in name)
    code = f"""
import sys
from engram_hf import load_with_tables
model = load_with_tables({str(folder)!r}, "cpu+disk")
rss = [line for line in open("/proc/self/smaps").read().split("\\n")]
mapped, inside = 0, False
for line in rss:
    if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
        inside = {str(folder)!r} in line
    elif inside and line.startswith("Rss:"):
        mapped += int(line.split()[1]) * 1024
print(mapped)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    mapped = int(done.stdout.strip().splitlines()[-1])
    # The backbone lies in the same files, and is far smaller than a hundredth of them.
    assert mapped < 0.02 * nbytes + 2 * 66_000 * 2, (mapped, nbytes)


def test_a_file_that_changes_under_an_open_table_is_an_error(folders, tmp_path):
    folder = Path(shutil.copytree(folders["gemma3n"], tmp_path / "copy"))
    model = load_with_tables(folder, "cpu+disk")
    path = engram_tables(model)[0].blocks[0].file
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"12345678")
    with pytest.raises(ValueError, match="was changed while a table was open"):
        logits_of(model)


def test_what_cannot_be_served_is_refused_with_a_sentence(folders, tmp_path):
    with pytest.raises(ValueError, match="Rows of a GGUF file are packed"):
        load_with_tables(folders["qwen"], gguf_file="model.gguf")
    with pytest.raises(ValueError, match="tp_plan cuts embeddings over devices"):
        load_with_tables(folders["qwen"], tp_plan="auto")
    with pytest.raises(ValueError, match="has no safetensors files"):
        (tmp_path / "empty").mkdir()
        shutil.copy(folders["qwen"] / "config.json", tmp_path / "empty")
        load_with_tables(tmp_path / "empty")
    with pytest.raises(ValueError, match='"host" .also called "cpu": RAM., "disk"'):
        load_with_tables(folders["qwen"], {"": "cpu", "...ngram_embedding": "attic"})
    model = served(folders, "qwen", "disk")
    with pytest.raises(IndexError, match="out of range"):
        model.get_submodule(QWEN_TABLE)(torch.tensor([10**6]))
    compiled = torch.compile(model.get_submodule(QWEN_TABLE), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="Compile without fullgraph=True"):
        compiled(torch.tensor([1, 2]))


def rewritten(folders, folder: Path, case: str, change) -> Path:
    """A copy of a checkpoint in one file, its tensors changed."""
    tensors = tensors_of(folders[case])
    change(tensors)
    folder.mkdir()
    shutil.copy(folders[case] / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_damaged_and_packed_parts_are_refused_with_a_sentence(folders, tmp_path):
    part = f"{QWEN_TABLE}.shard_2.weight"
    damages = {
        "packed": (lambda t: t.update({f"{part}_packed": t.pop(part).view(torch.uint8)}), "in a packed format"),
        "missing": (lambda t: t.pop(part), "must have 424 rows of 4 together"),
        "narrow": (lambda t: t.update({part: t[part][:, :2].contiguous()}), "must have 424 rows of 4 together"),
        "mixed": (lambda t: t.update({part: t[part].float()}), "and other types"),
        "none": (lambda t: [t.pop(n) for n in list(t) if n.startswith(QWEN_TABLE)], "holds no tensor of"),
        "codes": (lambda t: t.update({n: t[n].to(torch.float8_e4m3fn) for n in t if n.startswith(QWEN_TABLE)}), "FP8"),
    }
    for name, (change, sentence) in damages.items():
        with pytest.raises(ValueError, match=sentence):
            load_with_tables(rewritten(folders, tmp_path / name, "qwen", change))


@pytest.mark.parametrize("case", ["qwen", "qwen-fp8", "qwen-composite", "gemma4-composite"])
def test_inspecting_shows_tables_and_backbone(folders, case):
    found, tensors = inspect_checkpoint(folders[case]), tensors_of(folders[case])
    of_tables = {n: t for n, t in tensors.items() if "ngram_embedding.shard" in n or "tokens_per_layer.weight" in n}
    assert {block.name for table in found.tables for block in table.blocks} == set(of_tables)
    assert found.tables_nbytes == sum(t.nbytes for t in of_tables.values())
    assert found.backbone_nbytes == sum(t.nbytes for n, t in tensors.items() if n not in of_tables)
    ran = CliRunner().invoke(app, ["inspect", str(folders[case])])
    assert ran.exit_code == 0 and "backbone" in ran.output, ran.output


@pytest.mark.parametrize("case", ["qwen", "qwen-fp8", "qwen-text-of-composite", "gemma3n", "gemma4-composite"])
def test_a_plan_has_the_sizes_of_the_loaded_model(folders, case):
    end = CASES[case][1]
    for device_map in (None, "cpu+disk", {"": "cpu", end: "disk"}, {"": "cpu", end: "resident"}):
        estimate, model = estimate_memory(folders[case], device_map), load_with_tables(folders[case], device_map)
        tables = engram_tables(model)
        on_disk, nbytes = {"disk"} == set(tables[0].tiers), sum(table.nbytes for table in tables)
        assert estimate.tables == {"disk" if on_disk else "cpu": nbytes}
        blocks = {id(block) for table in model.named_tables().values() for block in table.parameters()}
        backbone = [each for each in (*model.parameters(), *model.buffers()) if id(each) not in blocks]
        if case != "qwen-fp8":  # whose scales are no part of a plan
            assert sum(estimate.backbone.values()) == sum(each.nbytes for each in backbone)
        # Every head of Qwen reads one row of each of two tables; a token of Gemma reads one.
        reads = 2 * 4 if "qwen" in case else 1
        assert estimate.rows_per_token == {"disk" if on_disk else "cpu": reads}
        row_nbytes = sum(table.nbytes for table in tables) // sum(table.rows for table in tables)
        assert sum(estimate.read_per_token.values()) == reads * row_nbytes
    assert count_parameters(folders[case]).tables == sum(table.rows * table.head_dim for table in tables)
    with pytest.raises(ValueError, match="which is no embedding"):
        estimate_memory(folders[case], {"": "cpu", "...no_such_table": "disk"})


def test_a_plan_for_an_accelerator_gives_it_to_the_backbone_and_says_so(folders):
    free = estimate_memory(folders["qwen"], "cpu+disk")
    needed = sum(free.backbone.values()) + max(free.step.values())
    tight = estimate_memory(folders["qwen"], "auto", max_memory={0: needed + 100, "cpu": "1GB"})
    assert tight.tables == {"host": sum(free.tables.values())} and set(tight.backbone) == {"cuda:0"}
    assert not tight.lacking
    limits = json.dumps({"0": needed + 100, "cpu": "1GB"})
    ran = CliRunner().invoke(app, ["plan", str(folders["qwen"]), "--max-memory", limits])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 0 and "fits." in said and "load_with_tables(" in said, said
    assert f"with the tables on disk it needs {needed / 1e6:,.3f} MB of memory" in said
    assert "sparse budget" not in said


def test_a_deepseek_v41_is_refused_and_sent_to_open_tables(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v41"}')
    with pytest.raises(NotImplementedError, match=r"engram_hf.open_tables"):
        load_with_tables(tmp_path)


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
def test_a_forward_with_hooks_of_accelerate_gives_the_same_bits(folders, case):
    expected, model = logits_of(stock(folders, case)), served(folders, case, "disk")
    attach_execution_device_hook(model, "cpu")
    assert torch.equal(logits_of(model), expected)
    hooked = stock(folders, case)
    attach_execution_device_hook(hooked, "cpu")
    with pytest.raises(ValueError, match="Load the model with load_with_tables"):
        place_tables(hooked, {CASES[case][1]: "host"})
    assert torch.equal(logits_of(hooked), expected)


def test_a_move_that_fails_leaves_the_model_as_it_was(folders):
    model = stock(folders, "qwen")
    expected, kind, names = logits_of(model), type(model), list(model.state_dict())
    last = model.get_submodule(QWEN_TABLE)
    last.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        place_tables(model, {"...embed_tokens": "host", CASES["qwen"][1]: "host"})
    last.max_norm = None
    assert type(model) is kind and list(model.state_dict()) == names and torch.equal(logits_of(model), expected)
    place_tables(model, {CASES["qwen"][1]: "host"})
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_a_frozen_embedding_stays_frozen(folders, tier):
    model = stock(folders, "gemma3n").requires_grad_(False)
    place_tables(model, {CASES["gemma3n"][1]: tier})
    assert not any(block.requires_grad for table in model.named_tables().values() for block in table.blocks)


@pytest.mark.parametrize("key", ["model.embed_token_per_layer", "model.embed_tokens_per_layer.weight"])
def test_a_misspelled_key_is_named(folders, key):
    with pytest.raises(ValueError, match=f"device_map names {key}, which is no embedding"):
        load_with_tables(folders["gemma3n"], {"": "cpu", key: "disk"})


def test_what_loading_found_is_told(folders):
    model, told = load_with_tables(folders["gemma3n"], "cpu+disk", output_loading_info=True)
    assert not told["missing_keys"] and torch.equal(logits_of(model), logits_of(stock(folders, "gemma3n")))


def test_a_memory_is_not_added_beside_served_tables(folders):
    model = served(folders, "gemma3n", "disk")
    with pytest.raises(ValueError, match="cannot be saved with a memory"):
        add_engram(model, EngramConfig([1], 101, 4, 8, compressed_vocab_size=None))
    with pytest.raises(ValueError, match="The vocabulary of a model with served tables stays"):
        model.resize_token_embeddings(model.config.vocab_size, pad_to_multiple_of=64)


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
def test_saves_over_its_own_files_and_two_saves_at_once_leave_a_whole_checkpoint(folders, case, tmp_path):
    expected, tensors = logits_of(stock(folders, case)), tensors_of(folders[case])
    shutil.copytree(folders[case], tmp_path / "own")
    model = load_with_tables(tmp_path / "own", "cpu+disk")
    for _ in range(2):
        # The files that it saves over are those that it reads.
        model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits_of(model), expected)
    both = [threading.Thread(target=model.save_pretrained, args=(tmp_path / "shared",)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for name in ("own", "shared"):
        saved = tensors_of(tmp_path / name)
        assert set(saved) == set(tensors)
        assert all(
            torch.equal(saved[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in tensors.items()
        )
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected)

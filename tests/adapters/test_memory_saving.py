"""A memory is saved with its model or alone, and loaded whole or not at all."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from architectures import draw, memory_layers, tiny_backbone, tiny_memory, with_memory
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline
from transformers.quantizers.quantizers_utils import should_convert_module

from engram_hf import EngramMoEConfig, add_engram, load_engram, remove_engram, save_engram, set_engram
from engram_hf.adapters.memory_class import decoder_of


ON_DISK = {"": "cpu", "...table": "disk"}
EAGER = {"attn_implementation": "eager"}


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (batch, seq), generator=torch.Generator().manual_seed(seed))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **EAGER, **options).eval()


def tiers_of(model) -> set[str]:
    return {tier for table in model.engram_tables() for tier in table.tiers}


def content_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def change(folder, **fields) -> None:
    """Other fields for a memory that is saved alone."""
    content = content_of(folder)
    parts = (content["engram"]["model"], content["engram"]["memories"]["default"])
    part = next(part for part in parts if set(fields) <= set(part))
    part.update(fields)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("model_type", ["llama", "falcon", "mixtral", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize(
    ("device_map", "tiers"),
    [
        (None, {"resident"}),
        (ON_DISK, {"disk"}),
        ("cpu+host", {"host"}),
        ({"": "cpu", "...table.blocks.1": "disk"}, {"resident", "disk"}),
    ],
)
def test_a_model_is_saved_and_loaded_whole(tmp_path, model_type, device_map, tiers):
    model, ids = with_memory(tiny_backbone(model_type)), some_ids()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, device_map=device_map)
    assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert tiers_of(loaded) == tiers
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)
    first, second = content_of(tmp_path), content_of(tmp_path / "again")
    assert first["engram"] == second["engram"]
    remove_engram(loaded)
    assert type(loaded) is type(tiny_backbone(model_type))
    assert torch.equal(loaded(ids).logits, tiny_backbone(model_type)(ids).logits)


def test_several_memories_are_saved_and_loaded_with_the_active_one(tmp_path):
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    add_engram(model, tiny_memory(layer_ids=[1], vocab_size=31), name="other")
    draw(model, 3, "other")
    set_engram(model, "default")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for each in (loaded, model):
        set_engram(each, "other")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_memory_keeps_its_type_in_a_backbone_of_another(tmp_path):
    tiny_backbone("llama").save_pretrained(tmp_path / "backbone")
    model, ids = with_memory(load(tmp_path / "backbone", dtype=torch.bfloat16)), some_ids()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for layer in memory_layers(loaded) for p in layer.parameters()} == {torch.float32}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_other_auto_classes_and_pipelines_load_it(tmp_path, tokenizer):
    model = add_engram(tiny_backbone("llama", vocab_size=600), tiny_memory(compressed_vocab_size="auto"), tokenizer)
    ids = tokenizer("a text", return_tensors="pt")["input_ids"]
    draw(model, 1, "default").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, **EAGER).eval()
    assert type(base).__name__ == "LlamaModel"
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "engram_memory" and config.hidden_size == 32
    assert config.get_text_config().vocab_size == 600
    built = AutoModelForCausalLM.from_config(config)
    assert [table.name for table in built.engram_tables()] == [table.name for table in model.engram_tables()]
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu", model_kwargs=EAGER)
    said = pipe("a text", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert said == model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
    loaded = load(tmp_path)
    loaded.bind_tokenizer(AutoTokenizer.from_pretrained(tmp_path))


def test_without_the_package_nothing_loads_half_a_model(tmp_path):
    with_memory(tiny_backbone("llama")).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['engram_hf'] = None\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "for kind in (AutoModelForCausalLM, LlamaForCausalLM):\n"
        "    try: kind.from_pretrained(sys.argv[1])\n"
        "    except Exception as error: print(repr(error))\n"
        "    else: raise SystemExit(f'{kind} loaded it')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "contains custom code which must be executed to correctly load the model" in ran.stdout
    with pytest.raises(
        StrictDataclassError, match="This model has a memory: import engram_hf, and load it with AutoModelFor"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content["engram"]["memories"]["default"].update(head_dim=16), "memory of another shape"),
        (lambda content: content["engram"]["memories"]["default"].update(vocab_size=67), "differs in: primes"),
        (lambda content: content["engram"]["memories"]["default"].update(seed=1), "differs in: multipliers"),
        (lambda content: content["engram"]["memories"]["default"].update(layer_ids=[0, 1]), "tensors of the memory"),
        (lambda content: content["engram"].update(active="none"), "has no memory called 'none'"),
        (lambda content: content["engram"]["memories"]["default"].update(heads=1), "'heads' is no field of EngramConf"),
        (lambda content: content.update(engram=None), "does not describe a memory"),
        (lambda content: content.update(backbone_model_type="no-model"), "names no backbone that transformers"),
    ],
)
def test_a_model_whose_parts_do_not_belong_together_is_refused(tmp_path, damage, message):
    with_memory(tiny_backbone("llama")).save_pretrained(tmp_path)
    content = content_of(tmp_path)
    damage(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("device_map", [None, {"...table": "disk"}, {"model.layers.2.engram.default.table": "host"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_alone_goes_into_its_model_again(tmp_path, device_map, dtype):
    model, ids = with_memory(tiny_backbone("llama").to(dtype)), some_ids()
    save_engram(model, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tables-layer-00-00001-of-00001.safetensors",
        "tables-layer-02-00001-of-00001.safetensors",
    ]
    other = tiny_backbone("llama").to(dtype)
    assert load_engram(other, tmp_path, device_map=device_map) is other
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert {"resident"} if device_map is None else set(device_map.values()) <= tiers_of(other)
    assert torch.equal(other.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    other.place_tables({"...table": "disk"}, hot_rows=4)
    assert tiers_of(other) == {"disk"} and torch.equal(other(ids).logits, model(ids).logits)
    other.prefetch(ids)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_engram(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_memory_has_another_name_in_another_model(tmp_path):
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    save_engram(model, tmp_path / "first")
    draw(model, 5, "default")
    both = load_engram(model, tmp_path / "first", name="other")
    again = load_engram(tiny_backbone("llama"), tmp_path / "first")
    assert torch.equal(both(ids).logits, again(ids).logits)
    set_engram(both, "default")
    assert not torch.equal(both(ids).logits, again(ids).logits)
    save_engram(both, tmp_path / "other", name="other")
    assert (tmp_path / "other" / "config.json").read_text() == (tmp_path / "first" / "config.json").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "made for a model with hidden_size = 64, and this one has 32"),
        ({"num_hidden_layers": 4}, "made for a model with num_hidden_layers = 4, and this one has 3"),
        ({"vocab_size": 98}, "made for a model with vocab_size = 98, and this one has 99"),
        ({"seed": 3}, "differs in: multipliers"),
        ({"layer_ids": [0, 1]}, "primes|lacks .* tensors of the memory"),
        ({"head_dim": 16}, "of another shape"),
        ({"kernel_size": 3}, "of another shape"),
    ],
)
def test_a_memory_of_another_model_is_refused_and_leaves_nothing(tmp_path, fields, message):
    save_engram(with_memory(tiny_backbone("llama")), tmp_path)
    change(tmp_path, **fields)
    model, ids = tiny_backbone("llama"), some_ids()
    keys, kind, logits = list(model.state_dict()), type(model), model(ids).logits
    with pytest.raises(ValueError, match=message):
        load_engram(model, tmp_path)
    assert list(model.state_dict()) == keys and type(model) is kind and torch.equal(model(ids).logits, logits)


def test_a_memory_for_another_tokenizer_is_refused(tmp_path, tokenizer):
    backbone = tiny_backbone("llama", vocab_size=600)
    model = add_engram(backbone, tiny_memory(compressed_vocab_size="auto"), tokenizer)
    save_engram(model, tmp_path / "memory")
    remove_engram(model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    load_engram(load(tmp_path / "model"), tmp_path / "memory").bind_tokenizer(tokenizer)
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not the one its tables were made with"):
        load_engram(load(tmp_path / "model"), tmp_path / "memory")


def test_folders_that_are_no_memory_are_refused(tmp_path):
    model = with_memory(tiny_backbone("llama"))
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds a whole model, not a memory alone. Load it with AutoModelForCausalLM"):
        load_engram(tiny_backbone("llama"), tmp_path / "whole")
    for folder in ("whole", "plain"):
        remove_engram(model) if folder == "plain" else None
        model.save_pretrained(tmp_path / folder)
        with pytest.raises(ValueError, match="holds a model, which a memory alone would replace"):
            save_engram(with_memory(tiny_backbone("llama")), tmp_path / folder)
    with pytest.raises(FileNotFoundError, match="is no folder or repository with a memory"):
        load_engram(tiny_backbone("llama"), tmp_path)
    save_engram(with_memory(tiny_backbone("llama")), tmp_path / "memory")
    with pytest.raises(ValueError, match="Put a memory alone into its model: load_engram"):
        load(tmp_path / "memory")
    with pytest.raises(ValueError, match="places tables and blocks only, got {'lm_head': 'cpu'}"):
        load_engram(tiny_backbone("llama"), tmp_path / "memory", device_map={"lm_head": "cpu"})
    with pytest.raises(ValueError, match="load_engram takes cache_dir"):
        load_engram(tiny_backbone("llama"), tmp_path / "memory", file="x")


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    save_engram(with_memory(tiny_backbone("llama")), tmp_path / "memory")
    for name in ("tables-layer-02-00001-of-00001.safetensors", "model-00001-of-00001.safetensors"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "memory", tmp_path / "copy")
        (tmp_path / "copy" / name).write_bytes((tmp_path / "copy" / name).read_bytes()[:-8])
        with pytest.raises(ValueError, match=name):
            load_engram(tiny_backbone("llama"), tmp_path / "copy")
        (tmp_path / "copy" / name).unlink()
        with pytest.raises((FileNotFoundError, ValueError)):
            load_engram(tiny_backbone("llama"), tmp_path / "copy")


def test_a_save_that_fails_leaves_the_memory_that_was_there(tmp_path, monkeypatch):
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    save_engram(model, tmp_path)
    expected = model(ids).logits
    draw(model, 8, "default")
    monkeypatch.setattr("engram_hf.adapters.memory_saving.write_tables", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_engram(model, tmp_path)
    assert torch.equal(load_engram(tiny_backbone("llama"), tmp_path)(ids).logits, expected)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_config_of_an_engram_moe_is_what_it_was():
    config = EngramMoEConfig.preset("tiny")
    assert config.engram_width == 128 and config.engram_conv_reach == 9


def test_a_model_without_memory_saves_as_it_does_without_the_package(tmp_path):
    model = remove_engram(with_memory(tiny_backbone("llama")))
    model.save_pretrained(tmp_path / "after")
    tiny_backbone("llama").save_pretrained(tmp_path / "before")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("after", "before")]
    assert files[0] == files[1]
    assert decoder_of(with_memory(model)) is model.model


def test_programs_that_trust_remote_code_import_the_package(tmp_path):
    model, ids = with_memory(tiny_backbone("llama")), some_ids(1)
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys, torch\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'engram_hf': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "if sys.argv[2] == 'without': sys.meta_path.insert(0, Missing())\n"
        "from transformers import AutoModelForCausalLM\n"
        "kwargs = {'trust_remote_code': True, 'attn_implementation': 'eager'}\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **kwargs).eval()\n"
        "print(model(torch.tensor([eval(sys.argv[3])])).logits.sum().item())\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ran = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model"), which, str(ids[0].tolist())],
            capture_output=True,
            text=True,
            env=environment,
        )
        for which in ("with", "without")
    ]
    assert ran[0].returncode == 0, ran[0].stderr[-2000:]
    assert float(ran[0].stdout) == pytest.approx(float(model(ids).logits.sum().detach()), abs=1e-3)
    assert ran[1].returncode
    assert "requires the following packages that were not found in your environment: engram_hf" in ran[1].stderr


def test_the_vocabulary_grows_and_shrinks_with_the_embedding(tmp_path, tokenizer):
    for config in (tiny_memory(compressed_vocab_size="auto"), tiny_memory()):
        model = add_engram(tiny_backbone("llama", vocab_size=640), config, tokenizer)
        draw(model, 1, "default")
        ids = torch.tensor([[5, 7, 5, 7, 9]])
        before = model(ids).logits
        model.resize_token_embeddings(700)
        torch.testing.assert_close(model(ids).logits[..., :640], before)
        new = torch.tensor([[5, 7, 650, 7, 9]])
        pad = torch.tensor([[5, 7, 0, 7, 9]])
        hashed = [model.engram_memory().ngram_hash(each).row_ids[2] for each in (new, pad)]
        assert torch.equal(*hashed)
        with pytest.raises(ValueError, match="cannot shrink to 0 ids"):
            model.resize_token_embeddings(0)
        model.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path)(new).logits, model(new).logits)
        model.resize_token_embeddings(600)
        torch.testing.assert_close(model(ids).logits, before[..., :600])


def test_quantizers_leave_the_memory_alone(tmp_path):
    model = with_memory(tiny_backbone("llama"))
    model.save_pretrained(tmp_path)
    left_alone = list(load(tmp_path)._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)}
    # Some quantizers ask for modules, some for parameters.
    asked = {name: (name, f"{name}.weight") for name in linear}
    converted = {name for name in linear if any(should_convert_module(each, left_alone) for each in asked[name])}
    assert linear - converted == {name for name in linear if ".engram." in name}

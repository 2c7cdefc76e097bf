"""A memory in somebody else's model trains as that of an EngramMoE does, with everything that people train with."""

import copy

import pytest
import torch
import transformers
from architectures import draw, memory_layers, tiny_backbone, tiny_memory, with_memory
from cases import slow
from datasets import Dataset
from dense_rows import DenseReference
from packaging.version import Version
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from runs import same
from sft import sft_trainer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import AutoModelForCausalLM, CompileConfig, Trainer, TrainingArguments
from transformers.cache_utils import StaticCache
from trl import DPOConfig, DPOTrainer

from engram_hf import (
    EngramGateStatisticsCallback,
    EngramPrefetchCallback,
    EngramRowStatisticsCallback,
    add_engram,
    engram_optimizers,
    freeze_backbone,
    last_complete_checkpoint,
    load_engram,
    lora_config,
    merge_changed_rows,
    remove_engram,
    save_engram,
    verify_tables,
)
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


# So many rows that a few steps touch less than half of a block.
ROWS = {"vocab_size": 2003, "block_elements": 20_000}
EAGER = {"attn_implementation": "eager"}
# Releases that checkpoint layers together with their hooks.
IS_OLD = Version(transformers.__version__) < Version("5.24")
TIERS = {"resident": None, "host": {"": "cpu", "...table": "host"}, "disk": {"": "cpu", "...table": "disk"}}


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (batch, seq), generator=torch.Generator().manual_seed(seed))


def load(folder, tier="resident"):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=TIERS[tier], **EAGER)


def train(model, out, resume=None, callbacks=(), optimizers=None, **changes):
    fields = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **changes}
    args = TrainingArguments(str(out), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **fields)
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in some_ids(64, 5)],
        callbacks=list(callbacks),
        optimizers=(None, None) if optimizers is None else (optimizers(model, args), None),
        optimizer_cls_and_kwargs=None if optimizers else engram_optimizers(args, work_folder=out.parent / "work"),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_rows_train_like_the_dense_rule(tmp_path, model_type, is_frozen):
    models = []
    for dense in (False, True):
        model = with_memory(tiny_backbone(model_type).double(), table_dtype="float64").double()
        if is_frozen:
            freeze_backbone(model)
        before = copy.deepcopy(model.state_dict())
        rule = (lambda model, args: DenseReference(model, args, "adam")) if dense else None
        train(model, tmp_path / "run", optimizers=rule, save_strategy="no", adam_epsilon=1e-4)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved and (all(".engram." in name for name in moved) or not is_frozen)
        assert any(".table.blocks." in name for name in moved)
        models.append(dict(model.named_parameters()))
    for name, weight in models[1].items():
        torch.testing.assert_close(models[0][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the model `base` and the run `run`, and what its model is at the end."""
    folder = tmp_path_factory.mktemp("runs")
    with_memory(tiny_backbone("llama"), **ROWS).save_pretrained(folder / "base")
    model = freeze_backbone(load(folder / "base"))
    train(model, folder / "run")
    return folder, model.state_dict()


@pytest.mark.parametrize(
    ("start", "tier"),
    [
        ("base", "disk"),
        ("run/checkpoint-4", "host"),
        *(slow("base", tier) for tier in ("resident", "host")),
        *(slow("run/checkpoint-4", tier) for tier in ("resident", "disk")),
    ],
)
def test_a_run_is_resumed_bit_for_bit_on_every_tier(run, tmp_path, tier, start):
    folder, expected = run
    model = freeze_backbone(load(folder / start, tier))
    train(model, tmp_path / "run", folder / "run" / "checkpoint-4")
    assert same(model, expected)
    assert same(load(tmp_path / "run" / "checkpoint-6", tier), expected)


def test_checkpoints_hold_changed_rows_and_are_merged(run, tmp_path):
    folder, expected = run
    last = last_complete_checkpoint(folder / "run")
    assert last.endswith("checkpoint-6")
    base = {path.name: path.stat().st_ino for path in (folder / "base").glob("tables-*")}
    assert {path.name: path.stat().st_ino for path in (folder / "run/checkpoint-6").glob("tables-*")} == base
    assert len(list((folder / "run/checkpoint-6").glob("rows-*"))) == 2
    verify_tables(last)
    merge_changed_rows(last, tmp_path / "merged")
    assert same(load(tmp_path / "merged"), expected)
    verify_tables(tmp_path / "merged")


def test_a_trained_memory_is_saved_alone(run, tmp_path):
    folder, _ = run
    trained, ids = load(folder / "run/checkpoint-6").eval(), some_ids()
    save_engram(trained, tmp_path / "memory")
    backbone = remove_engram(load(folder / "base")).eval()
    assert torch.equal(load_engram(backbone, tmp_path / "memory")(ids).logits, trained(ids).logits)


def test_callbacks_report_on_the_memory(tmp_path):
    with_memory(tiny_backbone("llama"), **ROWS).save_pretrained(tmp_path / "base")
    model = freeze_backbone(load(tmp_path / "base", "disk"))
    callbacks = [EngramGateStatisticsCallback(every=1), EngramRowStatisticsCallback(every=1), EngramPrefetchCallback()]
    trainer = train(model, tmp_path / "run", callbacks=callbacks, save_strategy="no")
    line = trainer.state.log_history[0]
    for name in ("gate_mean/layer_0", "gate_mean/layer_2", "memory_share/layer_2", "rows_touched/layer_0"):
        assert line[f"engram/{name}"] > 0
    assert 0 <= line["engram/prefetch_in_time"] <= 1 and "engram/prefetch_waited_ms" in line


def test_callbacks_report_on_the_active_memory_alone(tmp_path):
    model = with_memory(tiny_backbone("llama"))
    add_engram(model, tiny_memory(layer_ids=[1, 2], vocab_size=31), name="other")
    draw(model, 3, "other")
    callbacks = [EngramGateStatisticsCallback(every=1), EngramPrefetchCallback()]
    trainer = train(freeze_backbone(model), tmp_path / "run", callbacks=callbacks, save_strategy="no")
    line = trainer.state.log_history[0]
    assert "engram/gate_mean/layer_1" in line and "engram/gate_mean/layer_0" not in line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2"])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(model_type, is_frozen, use_reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = with_memory(tiny_backbone(model_type, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)).train()
        if is_frozen:
            freeze_backbone(model)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if checkpoints and model_type == "falcon" and IS_OLD:
            # The memory's hook would run again in a backward, outside of the model.
            with pytest.raises(RuntimeError, match="was called outside of its model"):
                model(some_ids(), labels=some_ids()).loss.backward()
            return
        model(some_ids(), labels=some_ids()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".table.blocks." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_layers_that_somebody_else_checkpoints_are_exact_or_refused(kind):
    def wrapped(model_type):
        model = with_memory(tiny_backbone(model_type)).train()
        layers = model.get_decoder().get_submodule(model.get_decoder().engram.facts.layers)
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer, checkpoint_impl=kind)
        return model

    plain, model = with_memory(tiny_backbone("llama")).train(), wrapped("llama")
    for each in (plain, model):
        each(some_ids(), labels=some_ids(), use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name.replace("_checkpoint_wrapped_module.", "")])
    model = wrapped("falcon")
    with pytest.raises(RuntimeError, match="was called outside of its model"):
        model(some_ids(), labels=some_ids(), use_cache=False).loss.backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_goes_with_a_memory_whatever_comes_first(tmp_path, when):
    model, ids = tiny_backbone("llama"), some_ids()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    if when == "before":
        adapted = get_peft_model(model, config)
        add_engram(adapted, tiny_memory())
    else:
        add_engram(model, tiny_memory())
        torch.manual_seed(5)
        adapted = get_peft_model(model, config)
    draw(adapted, 1, "default")
    adapted.eval()
    logits = adapted(ids).logits
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, with_memory(tiny_backbone("llama"))(ids).logits)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    save_engram(adapted, tmp_path / "memory")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.generate(ids, max_new_tokens=3), adapted.generate(ids, max_new_tokens=3))
    remove_engram(merged)
    other = load_engram(merged, tmp_path / "memory")
    torch.testing.assert_close(other(ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lora_and_rows_train_together(tmp_path):
    model = with_memory(tiny_backbone("llama"), **ROWS)
    adapted = get_peft_model(model, lora_config(r=4))
    assert any("engram.default.key_proj.lora_A" in name for name, _ in adapted.named_parameters())
    for layer in memory_layers(model):
        layer.table.requires_grad_(True)
    before = copy.deepcopy(adapted.state_dict())
    train(adapted, tmp_path / "run", save_strategy="no")
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".table.blocks." in name for name in moved) and any("lora_B" in name for name in moved)
    assert all("lora" in name or ".table.blocks." in name for name in moved)
    with pytest.raises(ValueError, match="adapted or quantized, so they cannot be saved alone"):
        save_engram(adapted, tmp_path / "memory")


def test_lora_adapts_memories_of_every_name():
    model = with_memory(tiny_backbone("llama"))
    add_engram(model, tiny_memory(layer_ids=[1]), name="code")
    adapted = get_peft_model(model, lora_config(r=2, attention=False))
    found = {name.partition(".layers.")[2] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    places = ("0.engram.default", "1.engram.code", "2.engram.default")
    assert found == {f"{place}.{kind}_proj.lora_A.default.weight" for place in places for kind in ("key", "value")}


@pytest.mark.filterwarnings("ignore")
def test_prefix_tuning_is_refused():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = get_peft_model(with_memory(tiny_backbone("llama")), config)
    with pytest.raises(ValueError, match="Prefix tuning of PEFT begins with such a cache"):
        adapted(some_ids())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [{}, {"packing": True}, {"padding_free": True}])
def test_sft_trains_a_memory_like_the_dense_rule(tmp_path, tokenizer, way):
    results = []
    for dense in (False, True):
        model = tiny_backbone("llama", vocab_size=640).double()
        add_engram(model, tiny_memory(compressed_vocab_size="auto", table_dtype="float64"), tokenizer).double()
        freeze_backbone(draw(model, 1, "default"))
        trainer = sft_trainer(model, tmp_path, tokenizer, dense, max_steps=4, **way)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        results.append((losses, dict(model.named_parameters())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for name, weight in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_dpo_trains_a_memory(tmp_path, tokenizer):
    model = tiny_backbone("llama", vocab_size=640)
    freeze_backbone(add_engram(model, tiny_memory(compressed_vocab_size="auto"), tokenizer))
    args = DPOConfig(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True
    )
    pairs = {"prompt": ["def f("] * 8, "chosen": ["x): return x"] * 8, "rejected": ["y"] * 8}
    optimizer_class, options = engram_optimizers(args)
    trainer = DPOTrainer(
        model,
        ref_model=tiny_backbone("llama", vocab_size=640),
        args=args,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        optimizers=(optimizer_class()(model, **options), None),
    )
    trainer.train()
    assert all(block.abs().sum() > 0 for layer in memory_layers(model) for block in layer.table.blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_has_no_graph_break_and_the_same_logits():
    torch._dynamo.reset()
    model = with_memory(tiny_backbone("llama"))
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        for seq in (4, 7, 11):
            ids = some_ids(seq=seq)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        cache, logits = StaticCache(model.config, max_cache_len=32), []
        ids = some_ids(seq=8)
        logits.append(model(ids[:, :5], **{CACHE_NAME: cache}).logits)
        step = torch.compile(model, backend="eager", fullgraph=True)
        for i in range(5, 8):
            positions = torch.full((2, 1), i)
            logits.append(step(ids[:, i : i + 1], position_ids=positions, **{CACHE_NAME: cache}).logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_that_passes_no_arguments_on_is_refused():
    torch._dynamo.reset()
    model = torch.compile(with_memory(tiny_backbone("falcon")), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="hands no keyword arguments to its layers"), torch.no_grad():
        model(some_ids(), use_cache=False)


@pytest.mark.filterwarnings("ignore")
def test_generation_that_compiles_says_the_same():
    torch._dynamo.reset()
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    actual = model.generate(
        ids, max_new_tokens=4, do_sample=False, cache_implementation="static", compile_config=config
    )
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

"""Rows under the stock Trainer, in every way people train: losses and weights of a dense implementation of the rule."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from cases import slow
from dense_rows import DenseReference
from tiny import tiny_config, tiny_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainingArguments

from engram_hf import engram_optimizers


DISK_MAP = {"": "cpu", "model.layers.0.engram.table": "disk", "model.layers.2.engram.table": "disk"}
HOST_MAP = {"": "cpu", "model.layers.0.engram.table": "cpu", "model.layers.2.engram.table": "cpu"}


def rows_of_data(count=64, seq=9, seed=0):
    return [{"input_ids": row, "labels": row} for row in tiny_ids(count, seq, seed)]


def made_arguments(folder, **changes) -> TrainingArguments:
    fields = {
        "max_steps": 20,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.0,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        # Adam divides by the size of a gradient; with a larger epsilon its steps do not magnify rounding.
        "adam_epsilon": 1e-4,
    }
    return TrainingArguments(str(folder), **{**fields, **changes})


def train(model, args, rule=None, dense=False, callbacks=(), **options):
    """A trained model's losses, by row updates or by the dense reference."""
    trainer = Trainer(
        model,
        args,
        train_dataset=rows_of_data(),
        eval_dataset=rows_of_data(8, seed=1),
        callbacks=list(callbacks),
        optimizers=(DenseReference(model, args, rule), None) if dense else (None, None),
        optimizer_cls_and_kwargs=None if dense else engram_optimizers(args, row_optimizer=rule, **options),
    )
    trainer.train()
    return [value for line in trainer.state.log_history for key, value in line.items() if key in ("loss", "eval_loss")]


def exact_model(config=None):
    """In double precision: rounding, which experts and Adam magnify, would hide what is wrong."""
    config = config or tiny_config()
    config.engram_table_dtype = "float64"
    model = tiny_model(config).double()
    model.set_experts_implementation("eager")
    return model


def check_same(folder, rule="adam", config=None, callbacks=lambda: (), prepare=lambda model: None, **changes):
    losses, models = [], []
    for dense in (False, True):
        args = made_arguments(folder, **changes)
        model = exact_model(config)
        prepare(model)
        losses.append(train(model, args, rule, dense, callbacks()))
        models.append(model)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)
    return losses[0]


def test_tables_move_at_all(tmp_path):
    model, before = tiny_model(), tiny_model()
    train(model, made_arguments(tmp_path, max_steps=2), "adam")
    for ours, theirs in zip(model.model.tables(), before.model.tables(), strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(ours.blocks, theirs.blocks, strict=True))


@pytest.mark.parametrize("rule", ["adam", "rowwise_adam", slow("adagrad"), slow("sgd")])
@pytest.mark.parametrize("elements", [500, slow(10**9)])
def test_a_run_equals_the_dense_rule(tmp_path, rule, elements):
    check_same(tmp_path, rule, tiny_config(engram_block_elements=elements))


# Their names in transformers 6, where this release has them already.
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
PREFIX = "activation" if "activation_checkpointing" in NAMES else "gradient"
CHECKPOINTING, CHECKPOINTING_KWARGS = {f"{PREFIX}_checkpointing": True}, f"{PREFIX}_checkpointing_kwargs"
# Each changes what a step is made of.
WAYS = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.3},
    "clipping and accumulation": {"max_grad_norm": 0.3, "gradient_accumulation_steps": 2},
    "checkpointing": {**CHECKPOINTING, CHECKPOINTING_KWARGS: {"use_reentrant": False}},
    "reentrant checkpointing": {
        **CHECKPOINTING,
        CHECKPOINTING_KWARGS: {"use_reentrant": True},
        "max_grad_norm": 0.3,
    },
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 10},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 10},
    "sgd": {"optim": "sgd", "learning_rate": 1e-2},
}


# The way that changes most; all others are slow.
QUICK_WAY = "clipping and accumulation"


@pytest.mark.parametrize("way", [way if way == QUICK_WAY else slow(way) for way in WAYS])
def test_a_run_equals_the_dense_rule_in_every_way_of_training(tmp_path, way):
    check_same(tmp_path, **WAYS[way])


def test_mixed_precision_equals_the_dense_rule(tmp_path):
    # Rows leave the table in float32 either way; autocast rounds the same numbers.
    check_same(tmp_path, bf16=True, max_grad_norm=0.5)


@pytest.mark.parametrize("rule", ["adam", slow("adagrad")])
def test_tied_embeddings_equal_the_dense_rule(tmp_path, rule):
    check_same(tmp_path, rule, tiny_config(tie_word_embeddings=True))


@pytest.mark.slow
def test_a_compiled_run_equals_the_dense_rule(tmp_path):
    torch._dynamo.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    losses, models = [], []
    for dense in (False, True):
        args = made_arguments(tmp_path, max_grad_norm=0.3, **({} if dense else compiled))
        model = exact_model()
        losses.append(train(model, args, "adam", dense))
        models.append(model)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(models[0].model.tables(), models[1].model.tables(), strict=True):
        for one, other in zip(ours.blocks, theirs.blocks, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_early_stopping_stops_both_at_the_same_step(tmp_path):
    losses = check_same(
        tmp_path,
        callbacks=lambda: [EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)],
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    assert 10 < len(losses) < 25


@pytest.mark.parametrize("frozen", ["first table", slow("tables"), slow("backbone")])
def test_what_is_frozen_stays_and_the_rest_equals_the_dense_rule(tmp_path, frozen):
    def prepare(model):
        if frozen == "backbone":
            model.requires_grad_(False)
        for number, table in enumerate(model.model.tables()):
            table.requires_grad_(frozen == "backbone" or frozen == "first table" and number == 1)

    if frozen != "tables":
        check_same(tmp_path, prepare=prepare)
    model, before = tiny_model(), tiny_model()
    prepare(model)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(model, made_arguments(tmp_path, max_steps=3), "adam")
    for (name, now), (_, then) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        is_table = ".table.blocks" in name
        is_frozen = {"tables": is_table, "backbone": not is_table, "first table": "0.engram.table" in name}[frozen]
        if is_frozen and "e_score" not in name:
            assert torch.equal(now, then), name
        elif is_table:
            assert not torch.equal(now, then), name
    # One number per trained table stands for its rows where gradients are clipped; transformers counts no scalars.
    trained = sum(table.is_trainable for table in model.model.tables())
    assert model.num_parameters(only_trainable=True) in (wanted, wanted + trained)


def test_the_norm_that_is_logged_counts_rows_and_clipping_reaches_them(tmp_path):
    norms = []
    for dense in (False, True):
        model, args = tiny_model(), made_arguments(tmp_path, max_steps=3, max_grad_norm=0.05, optim="sgd")
        trainer = Trainer(
            model,
            args,
            train_dataset=rows_of_data(),
            optimizers=(DenseReference(model, args, "sgd"), None) if dense else (None, None),
            optimizer_cls_and_kwargs=None if dense else engram_optimizers(args, row_optimizer="sgd"),
        )
        trainer.train()
        norms.append([line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line])
        model.requires_grad_(True)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-6)
    backbone = tiny_model()
    for table in backbone.model.tables():
        table.requires_grad_(False)
    args = made_arguments(tmp_path, max_steps=1, max_grad_norm=0.05, optim="sgd")
    trainer = Trainer(backbone, args, train_dataset=rows_of_data())
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] < 0.99 * norms[0][0]


CASES = [slow("adam", "float32"), ("rowwise_adam", "bfloat16"), slow("adagrad", "float32"), slow("sgd", "float32")]
CASES += [
    slow("adam", "bfloat16"),
    slow("rowwise_adam", "float32"),
    slow("adagrad", "bfloat16"),
    slow("sgd", "bfloat16"),
]


@pytest.mark.parametrize("rule, dtype", CASES)
def test_every_tier_trains_to_the_same_bits(tmp_path, rule, dtype):
    tiny_model(tiny_config(engram_table_dtype=dtype)).save_pretrained(tmp_path / "model")
    files = {path: path.read_bytes() for path in (tmp_path / "model").glob("*.safetensors")}
    states = []
    for device_map in (None, HOST_MAP, DISK_MAP, {**DISK_MAP, "model.layers.2.engram.table.blocks.1": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
        args = made_arguments(tmp_path / "run", max_steps=10, max_grad_norm=0.5)
        train(model, args, rule, work_folder=tmp_path / "work")
        tiers = [table.tiers for table in model.engram_tables()]
        assert device_map is not DISK_MAP or all(set(own) == {"disk"} for own in tiers)
        states.append(model.state_dict())
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in states[0])
    # A checkpoint's own files are never written, and nothing is left in the work folder.
    assert all(path.read_bytes() == content for path, content in files.items())
    assert not list((tmp_path / "work").iterdir())


def test_saving_after_training_on_disk_makes_whole_files_of_their_own(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=DISK_MAP, hot_rows=50)
    train(model, made_arguments(tmp_path / "run", max_steps=3), "adam", work_folder=tmp_path / "work")
    model.eval()
    ids = tiny_ids(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "after")
    train(model, made_arguments(tmp_path / "run", max_steps=3), "adam", work_folder=tmp_path / "work")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(loaded(ids).logits, expected)
    assert not torch.equal(model.eval()(ids).logits, expected)


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            # A view or an operation in place makes nothing.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
@pytest.mark.parametrize("rule", ["adam", "rowwise_adam", "adagrad", "sgd"])
def test_a_step_makes_nothing_of_the_tables_size(tmp_path, tier, rule):
    tiny_model(tiny_config(engram_vocab_size=50_000)).save_pretrained(tmp_path / "model")
    device_map = {"resident": None, "host": HOST_MAP, "disk": DISK_MAP}[tier]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map).train()
    args = made_arguments(tmp_path / "run", max_grad_norm=1.0)
    factory, options = engram_optimizers(args, row_optimizer=rule, work_folder=tmp_path / "work")
    optimizer = factory()(model, **options)
    ids = tiny_ids(2, 9)
    with LargestTensor() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # A table has 200,000 rows; logits are 2 x 9 x 99.
    assert 0 < largest.elements < 20_000 < min(table.num_rows for table in model.model.tables())


def test_a_forward_that_is_made_twice_counts_its_rows_once():
    model = tiny_model().train()
    table = model.model.tables()[0]
    gradients = table.collect_row_gradients()
    ids = tiny_ids(1, 9)
    # Its name in transformers 6, where the older release has it already.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    found = []
    for kind in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if kind is not None:
            enable(kind)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(gradients.take())
    for keys, rows in found[1:]:
        assert torch.equal(keys, found[0][0])
        torch.testing.assert_close(rows, found[0][1])


def test_a_trainable_table_off_the_device_is_not_left_behind_in_silence(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=DISK_MAP)
    with pytest.raises(ValueError, match="engram_optimizers"):
        Trainer(model, made_arguments(tmp_path / "run"), train_dataset=rows_of_data()).train()
    with pytest.raises(ValueError, match="work_folder"):
        train(model, made_arguments(tmp_path / "run"), "adam")
    for table in model.model.tables():
        table.requires_grad_(False)
    Trainer(model, made_arguments(tmp_path / "run", max_steps=1), train_dataset=rows_of_data()).train()


FULL_DISK = """
import resource, sys
from transformers import AutoModelForCausalLM, TrainingArguments
from engram_hf import engram_optimizers
folder, work = sys.argv[1:]
tables = {f"model.layers.{i}.engram.table": "disk" for i in (0, 2)}
model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu", **tables})
args = TrainingArguments(work, report_to=[], use_cpu=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
factory, options = engram_optimizers(args, work_folder=work)
try:
    factory()(model, **options)
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_work_folder_without_room_is_refused_before_anything_is_trained(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), str(tmp_path / "work")], capture_output=True, text=True
    )
    assert "has no room for" in ran.stdout, ran.stderr


@pytest.mark.parametrize("to_none", [True, False])
def test_a_backward_that_is_thrown_away_leaves_nothing_behind(tmp_path, to_none):
    states = []
    for throws in (False, True):
        model = tiny_model().train()
        factory, options = engram_optimizers(made_arguments(tmp_path))
        optimizer = factory()(model, **options)
        for step in range(3):
            if throws:
                other = tiny_ids(2, 9, seed=50 + step)
                model(input_ids=other, labels=other).loss.backward()
                optimizer.zero_grad(set_to_none=to_none)
            ids = tiny_ids(2, 9, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=name)


@pytest.mark.parametrize("change", ["scale", "clip by value", "clip by norm"])
def test_gradients_that_are_changed_between_two_backwards_count_as_changed(tmp_path, change):
    """As a dense gradient does: what comes later is added to what was changed."""

    def changed(parameters):
        parameters = list(parameters)
        if change == "scale":
            for parameter in (each for each in parameters if each.grad is not None):
                parameter.grad.mul_(0.25)
        elif change == "clip by value":
            torch.nn.utils.clip_grad_value_(parameters, 1e-3)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, 0.05)

    def backward(model, seed):
        ids = tiny_ids(2, 9, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()

    args, models = made_arguments(tmp_path), [exact_model().train(), exact_model().train()]
    factory, options = engram_optimizers(args, row_optimizer="sgd")
    for model, optimizer in zip(
        models, (factory()(models[0], **options), DenseReference(models[1], args, "sgd")), strict=True
    ):
        backward(model, 1)
        changed(model.parameters())
        backward(model, 2)
        optimizer.step()
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)


def test_a_run_that_no_longer_updates_rows_says_so(tmp_path, caplog):
    model = tiny_model()
    train(model, made_arguments(tmp_path, max_steps=2), "adam")
    Trainer(model, made_arguments(tmp_path, max_steps=8), train_dataset=rows_of_data()).train()
    assert sum("no step has used them" in record.message for record in caplog.records) == 2


def test_a_frozen_block_stays_while_its_table_is_trained(tmp_path):
    model = tiny_model()
    table = model.model.tables()[0]
    table.blocks[1].requires_grad_(False)
    before = [block.detach().clone() for block in table.blocks]
    train(model, made_arguments(tmp_path, max_steps=3), "adam")
    assert [torch.equal(a, b) for a, b in zip(before, table.blocks, strict=True)] == [False, True, False, False]


def test_a_table_in_training_is_not_moved_to_the_files_it_came_from(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=HOST_MAP)
    train(model, made_arguments(tmp_path / "run", max_steps=2), "adam")
    with pytest.raises(ValueError, match="in training and cannot move to disk"):
        model.place_tables({"model.layers.0.engram.table": "disk"})

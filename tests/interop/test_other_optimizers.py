"""What other libraries do with an optimizer: every `optim` name, more groups, clipping by value, sweeps, distributed
checkpoints, damaged and older states."""

import copy
import io
import random
import shutil
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import tiny_config, tiny_ids, tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from engram_hf import engram_optimizers


# transformers says itself that a library is missing, in one of these ways.
MISSING = "install|failed to import"
REFUSED = ("lomo", "adalomo", *(each.value for each in OptimizerNames if each.value.endswith("layerwise")))
DATA = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 9)]


def arguments(folder, **changes) -> TrainingArguments:
    fields = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(str(folder), **fields)


def trained(model, args, resume=None, **options):
    trainer = Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=engram_optimizers(args, **options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def made(model, args, **options):
    factory, given = engram_optimizers(args, **options)
    return factory()(model, **given)


def steps(model, optimizer, count, first=0):
    model.train()
    for step in range(first, first + count):
        ids = tiny_ids(2, 9, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def same(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(model, start) -> dict[str, bool]:
    now = dict(model.named_parameters())
    return {name: not torch.equal(weight, now[name]) for name, weight in start.named_parameters()}


@pytest.mark.parametrize("optim", [each.value for each in OptimizerNames])
def test_every_optim_trains_tables_and_backbone_or_is_refused_in_a_sentence(tmp_path, optim):
    changes = {"optim_target_modules": ["o_proj"]} if optim.startswith(("galore", "apollo")) else {}
    if optim.startswith(("galore", "apollo")):
        changes["optim_args"] = "rank=4"
    # RAdam makes no step before its sixth.
    args = arguments(tmp_path, optim=optim, max_steps=8 if "radam" in optim else 2, **changes)
    model = tiny_model()
    if optim in REFUSED:
        with pytest.raises(NotImplementedError, match=f"optim='{optim}' .* Choose"):
            trained(model, args)
        return
    try:
        trained(model, args)
    except (ImportError, ValueError) as error:
        assert any(word in str(error) for word in MISSING.split("|")), error
        return
    changed = moved(model, tiny_model())
    assert all(changed[name] for name in changed if ".table.blocks." in name)
    assert changed["model.layers.1.self_attn.o_proj.weight"] and changed["model.layers.0.engram.key_proj.weight"]


class TwoFaced(torch.optim.SGD):
    """As in schedulefree: steps are allowed while it trains only, and it is told when to evaluate."""

    def __init__(self, params, lr, warmup_steps=0, weight_lr_power=0.0, r=0.0, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.is_training, self.seen = False, []

    def train(self):
        self.is_training = True
        self.seen.append("train")

    def eval(self):
        self.is_training = False
        self.seen.append("eval")

    def step(self, closure=None):
        assert self.is_training, "stepped while it evaluates"
        return super().step(closure)


class InGroups(torch.optim.SGD):
    """As in galore_torch: the groups come from the whole model, and some have more values than others."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)


def stand_in(monkeypatch, name, **classes):
    """A library that is not installed, by the names that transformers imports."""
    module = ModuleType(name)
    module.__dict__.update(classes)
    monkeypatch.setitem(sys.modules, name, module)


def test_an_optimizer_that_trains_and_evaluates_apart_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_schedulefree_available", lambda *_: True)
    stand_in(monkeypatch, "schedulefree", SGDScheduleFree=TwoFaced, AdamWScheduleFree=TwoFaced)
    args = arguments(tmp_path, optim="schedule_free_sgd")
    model = tiny_model()
    trainer = Trainer(
        model, args, train_dataset=DATA, eval_dataset=DATA[:2], optimizer_cls_and_kwargs=engram_optimizers(args)
    )
    trainer.train()
    trainer.evaluate()
    seen = trainer.optimizer.optimizer.parts[0].optimizer.seen
    assert seen[0] == "train" and seen[-1] == "eval"
    assert all(moved(model, tiny_model())[f"model.layers.{i}.engram.table.blocks.0"] for i in (0, 2))


def test_groups_of_the_whole_model_lose_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    stand_in(monkeypatch, "galore_torch", GaLoreAdamW=InGroups, GaLoreAdamW8bit=InGroups, GaLoreAdafactor=InGroups)
    model = tiny_model()
    model.model.layers[1].requires_grad_(False)
    model.model.layers[1].self_attn.o_proj.requires_grad_(True)
    args = arguments(tmp_path, optim="galore_adamw", optim_target_modules=["o_proj"])
    optimizer = made(model, args)
    rest, targets = optimizer.parts[0].optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert targets["rank"] == 128 and all("o_proj" in names[id(each)] for each in targets["params"])
    dense = {name for name, p in model.named_parameters() if p.requires_grad and ".table." not in name}
    assert {names[id(each)] for group in (rest, targets) for each in group["params"]} == dense
    steps(model, optimizer, 2)
    changed = moved(model, tiny_model())
    assert changed["model.layers.1.self_attn.o_proj.weight"] and changed["model.layers.0.engram.table.blocks.0"]
    assert not changed["model.layers.1.self_attn.q_a_proj.weight"]
    with pytest.raises(ValueError, match="backbone=\"muon\" and optim='galore_adamw'"):
        made(model, args, backbone="muon")


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(NotImplementedError, match="torchrun --nproc-per-node 2.*CUDA_VISIBLE_DEVICES=0"):
        made(tiny_model(), args)


def test_a_group_that_is_added_is_trained_saved_and_loaded_like_the_others(tmp_path):
    args = arguments(tmp_path, optim="sgd", learning_rate=0.1)
    models, optimizers = [], []
    for _ in range(3):
        model = tiny_model()
        model.lm_head.requires_grad_(False)
        optimizer = made(model, args)
        model.lm_head.requires_grad_(True)
        optimizer.add_param_group({"params": model.lm_head.weight, "lr": 0.05, "momentum": 0.9})
        models.append(model)
        optimizers.append(optimizer)
    # By a stock optimizer, which is given the same gradients.
    head = torch.nn.Parameter(models[0].lm_head.weight.detach().clone())
    stock = torch.optim.SGD([head], lr=0.05, momentum=0.9)
    for step in range(4):
        ids = tiny_ids(2, 9, seed=step)
        models[0].train()(input_ids=ids, labels=ids).loss.backward()
        head.grad = models[0].lm_head.weight.grad.clone()
        stock.step()
        optimizers[0].step()
        optimizers[0].zero_grad()
        torch.testing.assert_close(models[0].lm_head.weight, head)
    steps(models[1], optimizers[1], 2)
    models[2].load_state_dict(models[1].state_dict())
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for model, optimizer in zip(models[1:], optimizers[1:], strict=True):
        steps(model, optimizer, 2, first=2)
    assert same(models[1], models[2])


def test_a_group_that_cannot_be_trained_is_refused(tmp_path):
    args = arguments(tmp_path)
    model = tiny_model()
    optimizer = made(model, args)
    with pytest.raises(ValueError, match="row optimizer"):
        optimizer.add_param_group({"params": [model.model.tables()[0].blocks[0]]})
    with pytest.raises(ValueError, match="trained already"):
        optimizer.add_param_group({"params": model.lm_head.weight})
    extra = torch.nn.Parameter(torch.zeros(2, 2))
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".table." in name)
    with pytest.raises(NotImplementedError, match="while the backbone was frozen"):
        made(model, args).add_param_group({"params": [extra]})


def test_a_sweep_that_changes_the_arguments_reaches_the_rows(tmp_path):
    args = arguments(tmp_path)
    factory, options = engram_optimizers(args)
    for beta, eps, rate in [(0.9, 1e-6, 1e-3), (0.5, 1e-5, 2e-3)]:
        args.adam_beta2, args.adam_epsilon, args.learning_rate = beta, eps, rate
        optimizer = factory()(tiny_model(), **options)
        rules = [updates.rule for updates in optimizer.rows.values()]
        assert all(rule.betas == (args.adam_beta1, beta) and rule.eps == eps for rule in rules)
        assert all(group["lr"] == rate for group in optimizer.param_groups)
        assert optimizer.param_groups[0]["betas"] == (args.adam_beta1, beta)


@pytest.mark.parametrize("backbone", ["adamw", "muon"])
@pytest.mark.parametrize("rule", ["adam", "adagrad"])
def test_a_distributed_checkpoint_resumes_bit_for_bit(tmp_path, rule, backbone):
    """As accelerate saves under FSDP2: both ways that it has, in one process."""
    args = arguments(tmp_path)
    whole = tiny_model()
    optimizer = made(whole, args, row_optimizer=rule, backbone=backbone)
    steps(whole, optimizer, 3)
    of_model, of_optimizer = get_state_dict(whole, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    file = io.BytesIO()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    torch.save(get_state_dict(whole, optimizer, options=options), file)
    resumed = []
    for way in ("sharded", "full"):
        model = tiny_model(seed=5)
        other = made(model, args, row_optimizer=rule, backbone=backbone)
        if way == "sharded":
            states = dict(zip(("model", "optimizer"), get_state_dict(model, other), strict=True))
            dcp.load(states, checkpoint_id=tmp_path / "sharded", no_dist=True)
            set_state_dict(model, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        else:
            file.seek(0)
            of_model, of_optimizer = torch.load(file, weights_only=True)
            set_state_dict(model, other, model_state_dict=of_model, optim_state_dict=of_optimizer)
        resumed.append((model, other))
    for model, other in [(whole, optimizer), *resumed]:
        steps(model, other, 3, first=3)
    assert same(resumed[0][0], whole) and same(resumed[1][0], whole)


def early_layout(optimizer) -> dict:
    """A state as the first release wrote it, put together by hand."""
    return {
        "dense": [part.optimizer.state_dict() for part in optimizer.parts],
        "rows": {
            name: {
                "rows": None,
                "steps": updates.steps,
                "rule": type(updates.rule).__name__,
                "keys": (touched := (updates.state["steps"] != 0).flatten().nonzero().flatten()),
                "state": {key: store[touched] for key, store in updates.stores.items()},
            }
            for name, updates in optimizer.rows.items()
        },
        # The rates of rows were their own.
        "row_groups": [
            {"lr": group["lr"] * group["lr_scale"], "weight_decay": 0.0, "table": name}
            for name, group in optimizer.row_groups.items()
        ],
    }


@pytest.mark.parametrize("backbone", ["adamw", "muon"])
def test_a_state_of_the_first_release_still_loads(tmp_path, backbone):
    args = arguments(tmp_path)
    whole, resumed = tiny_model(), tiny_model()
    optimizers = [made(model, args, backbone=backbone) for model in (whole, resumed)]
    steps(whole, optimizers[0], 3)
    resumed.load_state_dict(whole.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(early_layout(optimizers[0])))
    for model, optimizer in zip((whole, resumed), optimizers, strict=True):
        steps(model, optimizer, 3, first=3)
    assert same(whole, resumed)


def test_the_state_of_an_optimizer_is_shown_as_others_show_it(tmp_path):
    model = tiny_model()
    optimizer = made(model, arguments(tmp_path))
    assert not optimizer.state
    steps(model, optimizer, 1)
    assert optimizer.state[model.lm_head.weight]["exp_avg"].shape == model.lm_head.weight.shape
    saved = optimizer.state_dict()
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert [each for group in saved["param_groups"] for each in group["params"]] == list(range(count))


def spots(value, path=()):
    """Every place in a nested state that can be damaged."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, each in inner:
        yield from spots(each, (*path, key))


def damaged(value, path, to):
    """A copy with something else at one place, or with nothing there where `to` is None."""
    if not path:
        return to
    key, *rest = path
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != key or rest or to is not None}
        return {**kept, key: damaged(value[key], rest, to)} if key in kept else kept
    items = [damaged(each, rest, to) if i == key else each for i, each in enumerate(value)]
    return type(value)(each for i, each in enumerate(items) if i != key or rest or to is not None)


def test_a_damaged_state_is_refused_in_a_sentence_or_changes_nothing(tmp_path):
    """A state with one thing wrong: loading raises a ValueError, or the next step is that of the state as it was."""
    model, whole = tiny_model(), tiny_model()
    optimizer = made(model, arguments(tmp_path))
    steps(model, optimizer, 2)
    state = optimizer.state_dict()
    expected = made(whole, arguments(tmp_path))
    expected.load_state_dict(copy.deepcopy(state))
    steps(whole, expected, 1)
    draw = random.Random(0)
    # A parameter that has not been used has no state, so that a state is missing cannot be seen.
    places = [path for path in spots(state) if len(path) != 2 or path[0] != "state"]
    others = [None, "text", -1, float("nan"), [], {}, torch.zeros(31), torch.tensor([5, 4, 4])]
    refused = 0
    fresh = made(tiny_model(), arguments(tmp_path))
    for _ in range(400):
        path, to = draw.choice(places), draw.choice(others)
        broken = damaged(copy.deepcopy(state), path, to)
        try:
            fresh.load_state_dict(broken)
        except ValueError as error:
            refused += 1
            assert len(str(error)) > 60, (path, to, error)
        else:
            other = tiny_model()
            again = made(other, arguments(tmp_path))
            again.load_state_dict(broken)
            steps(other, again, 1)
            assert same(other, whole), (path, to)
    assert refused > 300


ROW_DAMAGE = {
    "negative": lambda ids: ids - ids[0] - 1,
    "twice": lambda ids: torch.cat([ids[:1], ids[:-1]]),
    "unsorted": lambda ids: ids.flip(0),
    "float": lambda ids: ids.double(),
    "bool": lambda ids: ids > 0,
    "int32": lambda ids: ids.int(),
    "past the table": lambda ids: ids + 10**6,
    "one less": lambda ids: ids[:-1],
    "in two dimensions": lambda ids: ids[None],
}


@pytest.mark.parametrize("damage", ROW_DAMAGE)
@pytest.mark.parametrize("is_early", [True, False])
def test_row_ids_of_a_state_are_checked_before_anything_is_loaded(tmp_path, damage, is_early):
    model, other = tiny_model(), tiny_model()
    optimizer, fresh = made(model, arguments(tmp_path)), made(other, arguments(tmp_path))
    steps(model, optimizer, 2)
    name = "model.layers.2.engram.table"
    if is_early:
        state = early_layout(optimizer)
        state["rows"][name]["keys"] = ROW_DAMAGE[damage](state["rows"][name]["keys"])
    else:
        state = optimizer.state_dict()
        last = state["state"][state["param_groups"][-1]["params"][0]]
        last["row_ids"] = (ROW_DAMAGE[damage](last["row_ids"][0]),)
    with pytest.raises(ValueError, match=name):
        fresh.load_state_dict(state)
    assert not fresh.state and not any(store.any() for each in fresh.rows.values() for store in each.stores.values())


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    args = arguments(tmp_path)
    model = tiny_model()
    optimizer = made(model, args)
    steps(model, optimizer, 1)
    state = optimizer.state_dict()
    for changes, what in [({"optim": "sgd"}, "momentum of group 0"), ({"optim": "adafactor"}, "eps of group 0")]:
        with pytest.raises(ValueError, match=what):
            made(tiny_model(), arguments(tmp_path, **changes)).load_state_dict(state)
    wider = tiny_model(tiny_config(intermediate_size=48))
    with pytest.raises(ValueError, match=r"exp_avg is .* where the parameter is"):
        made(wider, args).load_state_dict(state)


@pytest.mark.parametrize("value", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("ways", [("value",), ("norm", "value"), ("unscale", "value")])
def test_rows_are_clipped_by_value_as_dense_gradients_are(tmp_path, value, ways):
    """Also after clipping by norm, and after a loss that was scaled; compared with the dense gradients."""
    scale = 2.0**8
    model, dense = tiny_model().train(), tiny_model().train()
    optimizer = made(model, arguments(tmp_path, optim="sgd"), row_optimizer="sgd")
    ids = tiny_ids(2, 9)
    for each in (model, dense):
        (scale * each(input_ids=ids, labels=ids).loss).backward()
        for way in ways if "unscale" in ways else ("unscale", *ways):
            if way == "unscale":
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
            elif way == "value":
                torch.nn.utils.clip_grad_value_(each.parameters(), value)
            else:
                torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5)
    for table, other in zip(model.model.tables(), dense.model.tables(), strict=True):
        row_ids, gradients = table.row_gradients.take()
        expected = torch.cat([block.grad for block in other.blocks])
        assert gradients.abs().max() <= value * (1 + 1e-6)
        torch.testing.assert_close(gradients, expected[row_ids], rtol=1e-5, atol=1e-9)
        assert not expected[~torch.isin(torch.arange(len(expected)), row_ids)].any()
    assert optimizer.rows


def test_the_small_parameter_of_a_table_carries_the_norm_of_its_rows(tmp_path):
    model, dense = tiny_model().train(), tiny_model().train()
    made(model, arguments(tmp_path))
    ids = tiny_ids(2, 9)
    for each in (model, dense):
        each(input_ids=ids, labels=ids).loss.backward()
    norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 1e9) for each in (model, dense)]
    torch.testing.assert_close(*norms)


def test_a_run_that_clips_by_value_equals_a_dense_one(tmp_path):
    """A loop of one's own; accelerate's `clip_grad_value_` is torch's."""
    model, dense = (tiny_model(tiny_config(engram_table_dtype="float64")).double().train() for _ in range(2))
    for each in (model, dense):
        each.set_experts_implementation("eager")
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9")
    optimizer = made(model, args, row_optimizer="sgd", table_lr_scale=1.0)
    stock = torch.optim.SGD(dense.parameters(), lr=args.learning_rate, momentum=0.9)
    for step in range(4):
        # The same rows each time: momentum moves dense rows without a gradient too.
        ids = tiny_ids(2, 9)
        for each, steps_it in ((model, optimizer), (dense, stock)):
            each(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_value_(each.parameters(), 1e-3 * (step + 1))
            steps_it.step()
            steps_it.zero_grad()
    ours = dict(model.named_parameters())
    for name, weight in dense.named_parameters():
        torch.testing.assert_close(ours[name], weight, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.slow
def test_rows_and_optimizer_of_different_runs_are_refused(tmp_path):
    """Two runs of one base have tables of the same shapes."""
    tiny_model(tiny_config(engram_vocab_size=2003)).save_pretrained(tmp_path / "base")
    fields = {"save_strategy": "steps", "save_steps": 2}
    for name, seed in (("one", 1), ("two", 2)):
        trained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), arguments(tmp_path / name, seed=seed, **fields)
        )
    mixed = tmp_path / "mixed" / "checkpoint-2"
    shutil.copytree(tmp_path / "one" / "checkpoint-2", mixed)
    resumable = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained(resumable, arguments(tmp_path / "mixed", **fields), resume=str(mixed))
    for other in (tmp_path / "two" / "checkpoint-2", tmp_path / "one" / "checkpoint-4"):
        shutil.copyfile(other / "optimizer.pt", mixed / "optimizer.pt")
        with pytest.raises(ValueError, match="The rows of model.layers.0.engram.table were loaded from a checkpoint"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            trained(model, arguments(tmp_path / "mixed", **fields), resume=str(mixed))
    # A new run may begin where another one has stopped, and be resumed itself.
    begun = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint-4")
    whole = trained(begun, arguments(tmp_path / "three", **fields)).model
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint-4")
    trained(again, arguments(tmp_path / "three", **fields), resume=str(tmp_path / "three" / "checkpoint-2"))
    assert same(whole, again)

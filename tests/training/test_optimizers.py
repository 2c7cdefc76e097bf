"""`engram_optimizers`: what goes where, at which rate, and what is refused."""

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import Trainer, TrainingArguments

from engram_hf import RowSGD, engram_optimizers
from engram_hf.training.dense_parts import matrices_of_backbone
from engram_hf.training.work_files import WorkFile


def made(model, folder, arguments=None, **options):
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True, **(arguments or {}))
    factory, given = engram_optimizers(args, **options)
    return factory()(model, **given)


def names_of(model, parameters) -> set[str]:
    ids = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_rates_and_decay_come_from_the_arguments(tmp_path):
    model = tiny_model()
    arguments = {"learning_rate": 3e-4, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-5}
    optimizer = made(model, tmp_path, arguments, table_lr_scale=4.0)
    dense, rows = optimizer.param_groups[:-2], optimizer.param_groups[-2:]
    assert [group["weight_decay"] for group in dense] == [0.2, 0.0] and [group["weight_decay"] for group in rows] == [
        0,
        0,
    ]
    assert all(group["lr"] == 3e-4 and group["betas"] == (0.8, 0.7) and group["eps"] == 1e-5 for group in dense)
    # Schedulers see one rate for all; rows move at a multiple of it.
    assert all(group["lr"] == 3e-4 and group["lr_scale"] == 4.0 for group in rows)
    rule = next(iter(optimizer.rows.values())).rule
    assert rule.betas == (0.8, 0.7) and rule.eps == 1e-5
    # The groups are those that Trainer makes by itself, without the tables.
    stock = Trainer(tiny_model(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **arguments))
    stock.create_optimizer()
    for ours, theirs in zip(dense, stock.optimizer.param_groups, strict=True):
        expected = {name for name in names_of(stock.model, theirs["params"]) if ".table." not in name}
        assert names_of(model, ours["params"]) == expected
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(every) == len({id(p) for p in every})
    blocks = {name for name, _ in model.named_parameters() if ".table.blocks" in name}
    assert names_of(model, every) | blocks == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_the_backbone_is_trained_by_what_the_arguments_name(tmp_path, optim):
    optimizer = made(tiny_model(), tmp_path, {"optim": optim})
    stock, _ = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=optim, use_cpu=True))
    assert [type(part.optimizer) for part in optimizer.parts] == [stock]


def test_muon_gets_matrices_of_the_backbone_and_one_expert_at_a_time(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=False))
    names = matrices_of_backbone(model)
    experts = [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (1, 2) for p in ("gate_up", "down")]
    memory = [f"model.layers.{i}.engram.{p}_proj.weight" for i in (0, 2) for p in ("key", "value")]
    assert set(experts) <= names and set(memory) <= names and "model.layers.0.self_attn.o_proj.weight" in names
    left_out = ("embed_tokens", "lm_head", "norm", "conv", "table", "_hc", "hc_head", "gate.weight")
    assert not any(part in name.replace("gate_up", "").replace("gate_proj", "") for name in names for part in left_out)
    reference = tiny_model(tiny_config(tie_word_embeddings=False))
    optimizer = made(model, tmp_path, {"learning_rate": 1e-2, "weight_decay": 0.1}, backbone="muon")
    weights = dict(reference.named_parameters())
    slices = {name: [torch.nn.Parameter(m.clone()) for m in weights[name].detach()] for name in experts}
    plain = sorted(names - set(experts))
    every = [weights[name] for name in plain] + [m for own in slices.values() for m in own]
    muon = torch.optim.Muon(every, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ids = tiny_ids(4, 9)
    for _ in range(3):
        for each in (model, reference):
            each.train()(input_ids=ids, labels=ids).loss.backward()
        # The same gradients for both: what is compared is the optimizer.
        ours = dict(model.named_parameters())
        for name in experts:
            for matrix, gradient in zip(slices[name], ours[name].grad, strict=True):
                matrix.grad = gradient.clone()
        for name in plain:
            weights[name].grad = ours[name].grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        muon.step()
    ours = dict(model.named_parameters())
    for name in plain:
        torch.testing.assert_close(ours[name], weights[name], msg=name)
    for name in experts:
        torch.testing.assert_close(ours[name].detach(), torch.stack([m.detach() for m in slices[name]]), msg=name)
    assert [type(part.optimizer).__name__ for part in optimizer.parts] == ["Muon", "AdamW"]


def test_muon_under_trainer_follows_the_schedule(tmp_path):
    model = tiny_model()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tiny_ids(32, 9)]
    trainer = Trainer(
        model, args, train_dataset=data, optimizer_cls_and_kwargs=engram_optimizers(args, backbone="muon")
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    optimizer.state_dict()
    rates = {group["lr"] for group in optimizer.param_groups[:-2]}
    assert rates == {0.0} and optimizer.parts[0].optimizer.param_groups[0]["lr"] == 0.0


class StatelessRule(RowSGD):
    wide = ()


def test_what_makes_no_sense_is_refused(tmp_path):
    model = tiny_model()
    for options in (
        {"row_optimizer": "lion"},
        {"backbone": "sgd"},
        {"table_lr_scale": 0.0},
        {"table_lr_scale": float("nan")},
        {"state_dtype": torch.float16},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}.*{next(iter(options.values()))}"):
            made(model, tmp_path, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="work_folder .*file/work cannot be made"):
        WorkFile(tmp_path / "file" / "work", {})
    with pytest.raises(ValueError, match="StatelessRule keeps no state"):
        made(model, tmp_path, row_optimizer=StatelessRule())
    muon = made(model, tmp_path, backbone="muon").state_dict()
    with pytest.raises(ValueError, match="same backbone= of engram_optimizers"):
        made(model, tmp_path).load_state_dict(muon)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        made(model, tmp_path)


def test_quantized_tables_stay_as_they_are(tmp_path):
    model = tiny_model(tiny_config(engram_table_dtype="int8"))
    optimizer = made(model, tmp_path)
    assert not optimizer.rows and "no table" in repr(optimizer)


def test_a_rule_with_values_of_ones_own_is_taken(tmp_path):
    optimizer = made(tiny_model(), tmp_path, row_optimizer=RowSGD(momentum=0.5))
    assert all(updates.rule == RowSGD(momentum=0.5) for updates in optimizer.rows.values())
    assert "RowSGD" in repr(optimizer)


def test_state_is_of_the_tables_type_or_of_the_one_that_is_asked_for(tmp_path):
    for dtype, asked, expected in [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("float16", None, torch.float32),
        ("bfloat16", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.bfloat16),
    ]:
        optimizer = made(tiny_model(tiny_config(engram_table_dtype=dtype)), tmp_path, state_dtype=asked)
        state = next(iter(optimizer.rows.values())).state
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected and state["steps"].dtype == torch.float32


def test_a_closure_is_called(tmp_path):
    model = tiny_model().train()
    optimizer = made(model, tmp_path)
    ids = tiny_ids(2, 9)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]

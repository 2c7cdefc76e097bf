"""Tables of other people's models, trained row by row under the stock Trainer."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import slow
from dense_rows import DenseReference
from foreign import GEMMA_TABLE, QWEN_TABLE, gemma3n_text, publish, qwen_text, tensors_of
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from engram_hf import (
    engram_optimizers,
    engram_tables,
    last_complete_checkpoint,
    load_with_tables,
    merge_changed_rows,
)


ENDS = {"qwen": "...ngram_embedding", "gemma3n": "...embed_tokens_per_layer"}
TABLES = {"qwen": QWEN_TABLE, "gemma3n": GEMMA_TABLE}
# A model that chooses experts by their scores makes large differences of rounding ones; in double precision there are
# none. The other implementations of experts know no doubles.
DOUBLE = "qwen-64"
ENDS[DOUBLE], TABLES[DOUBLE] = ENDS["qwen"], TABLES["qwen"]
LOADED = {DOUBLE: {"experts_implementation": "eager"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("published")
    return {
        # So many rows that a run touches less than half of a part: checkpoints hold the changed ones.
        "qwen": publish(qwen_text(torch.float32, ngram_vocab_size_base=5003), made / "qwen"),
        DOUBLE: publish(qwen_text(torch.float64, ngram_vocab_size_base=5003), made / DOUBLE),
        "qwen-fp8": publish(qwen_text(), made / "qwen-fp8", is_fp8=True),
        "gemma3n": publish(gemma3n_text(torch.float32, vocab_size_per_layer_input=400), made / "gemma3n"),
    }


def some_data(rows: int = 16, seq: int = 12) -> list[dict]:
    ids = torch.randint(3, 95, (rows, seq), generator=torch.Generator().manual_seed(0))
    # Some padding, whose row takes no gradient.
    ids[:, 5] = 0
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


def arguments(folder: Path, **changes) -> TrainingArguments:
    fields = {"max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_grad_norm": 0.5}
    fields |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no", "weight_decay": 0.1}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": []}
    return TrainingArguments(str(folder), **{**fields, **quiet, **changes})


def served(folder: Path, case: str, tier: str):
    return load_with_tables(folder, {"": "cpu", ENDS[case]: tier}, **LOADED.get(case, {}))


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows_of(model, case: str) -> torch.Tensor:
    module = model.get_submodule(TABLES[case])
    return torch.cat([block.detach() for block in module.table.blocks]) if hasattr(module, "table") else module.weight


def train_by_rows(model, folder: Path, rule: str = "adam", last=None, **changes) -> Trainer:
    args = arguments(folder, **changes)
    rows = engram_optimizers(args, row_optimizer=rule, work_folder=folder / "work")
    trainer = Trainer(model, args, train_dataset=some_data(), optimizer_cls_and_kwargs=rows)
    trainer.train(resume_from_checkpoint=last)
    return trainer


def train_densely(folders, case: str, folder: Path, rule: str, **changes) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(folders[case], **LOADED.get(case, {}))
    args = arguments(folder, **changes)
    modules = [m for name, m in model.named_modules() if f"...{name}".endswith(ENDS[case].removeprefix("..."))]
    model.named_tables = lambda: {i: SimpleNamespace(blocks=[m.weight]) for i, m in enumerate(modules)}
    optimizer = DenseReference(model, args, rule)
    trainer = Trainer(model, args, train_dataset=some_data(), optimizers=(optimizer, None))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("case", "rule", "steps"),
    [("qwen", "adam", 3), ("gemma3n", "adagrad", 3), slow(DOUBLE, "adam", 50), slow("gemma3n", "adam", 50)],
)
def test_rows_and_losses_are_those_of_the_dense_rule(folders, tmp_path, case, rule, steps):
    # The same learning rate in every step: the dense reference scales that of rows itself.
    changes = {"max_steps": steps, "lr_scheduler_type": "constant"}
    dense = train_densely(folders, case, tmp_path / "dense", rule, **changes)
    for tier in ("resident", "host", "disk"):
        model = served(folders[case], case, tier)
        before = rows_of(model, case).clone()
        trainer = train_by_rows(model, tmp_path / tier, rule, **changes)
        assert losses_of(trainer) == pytest.approx(losses_of(dense), abs=1e-5)
        after = rows_of(trainer.model, case)
        torch.testing.assert_close(after, rows_of(dense.model, case), atol=1e-5, rtol=0)
        has_moved = (after != before).any(1)
        assert 0 < has_moved.float().mean() < 0.5 and not has_moved[0]


@pytest.mark.parametrize("case", [slow("qwen"), slow("gemma3n")])
def test_a_resumed_run_goes_on_bit_for_bit_and_its_checkpoint_holds_changed_rows(folders, tmp_path, case):
    whole = train_by_rows(served(folders[case], case, "disk"), tmp_path / "whole", max_steps=6)
    run = tmp_path / "run"
    train_by_rows(served(folders[case], case, "disk"), run, max_steps=6, save_strategy="steps", save_steps=2)
    for step in (4,):
        last = run / f"checkpoint-{step}"
        again = served(last, case, "disk")
        trainer = train_by_rows(again, tmp_path / f"again-{step}", last=str(last), max_steps=6)
        assert losses_of(trainer) == losses_of(whole)
        for (name, ours), theirs in zip(
            trainer.model.state_dict().items(), whole.model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        # A model from the first folder takes the rows of the checkpoint too.
        trainer = train_by_rows(
            served(folders[case], case, "host"), tmp_path / f"first-{step}", last=str(last), max_steps=6
        )
        assert torch.equal(rows_of(trainer.model, case), rows_of(whole.model, case))
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")
    # The second checkpoint links the table that the first has written, and holds the rows that have changed since.
    tables = [sorted((run / f"checkpoint-{step}").glob("tables-*.safetensors")) for step in (2, 4)]
    assert [p.stat().st_ino for p in tables[0]] == [p.stat().st_ino for p in tables[1]]
    changed = 0
    for path in (run / "checkpoint-4").glob("rows-*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.endswith("row_ids")]  # noqa: SIM118
            changed += sum(file.get_slice(name).get_shape()[0] for name in names)
    assert 0 < changed < 0.5 * sum(table.rows for table in engram_tables(whole.model))


@pytest.mark.parametrize("case", ["qwen", "gemma3n"])
def test_a_checkpoint_becomes_the_published_layout_again(folders, tmp_path, case):
    trainer = train_by_rows(
        served(folders[case], case, "disk"), tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2
    )
    load_with_tables(tmp_path / "run" / "checkpoint-4", "cpu+disk").save_pretrained(tmp_path / "merged")
    trainer.model.save_pretrained(tmp_path / "saved")
    (tmp_path / "run" / "checkpoint-4" / "notes.txt").write_text("beside the weights")
    merge_changed_rows(tmp_path / "run" / "checkpoint-4", tmp_path / "by function")
    assert (tmp_path / "by function" / "notes.txt").read_text() == "beside the weights"
    assert not list((tmp_path / "by function").glob("*.pt"))
    with pytest.raises(ValueError, match="holds weights already"):
        merge_changed_rows(tmp_path / "run" / "checkpoint-4", tmp_path / "by function")
    original = tensors_of(folders[case])
    for folder in ("merged", "by function", "saved"):
        tensors = tensors_of(tmp_path / folder)
        assert set(tensors) == set(original)
        assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in original.items()}
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(rows_of(stock, case), rows_of(trainer.model, case))
        ids = torch.arange(3, 20)[None]
        assert torch.equal(stock(ids).logits, trainer.model.eval()(ids).logits)


def test_fp8_rows_stay_as_they_are_and_the_run_says_so(folders, tmp_path, caplog):
    model = served(folders["qwen-fp8"], "qwen", "disk")
    before = rows_of(model, "qwen").view(torch.uint8).clone()
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level("WARNING"):
            trainer = train_by_rows(model, tmp_path, max_steps=2)
    finally:
        logging.getLogger("transformers").propagate = False
    assert "are quantized, so this run leaves them as they are" in caplog.text
    assert torch.equal(rows_of(trainer.model, "qwen").view(torch.uint8), before)


def test_training_a_table_off_the_device_without_row_updates_is_refused(folders, tmp_path):
    model = served(folders["gemma3n"], "gemma3n", "disk")
    with pytest.raises(ValueError, match="only row updates reach it"):
        Trainer(model, arguments(tmp_path), train_dataset=some_data()).train()

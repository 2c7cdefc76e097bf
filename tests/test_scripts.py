"""Text of one's own: one file is enough to train on, and too little of it is said in a sentence."""

import importlib
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_model


pytest.importorskip("datasets")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    return importlib.import_module


def test_a_short_file_is_cut_so_that_some_can_be_held_out(script, tmp_path):
    gather_text = script("gather_text")
    text = "".join(f"{number} is a number. " for number in range(1000))
    (tmp_path / "notes.txt").write_text(text)
    documents = gather_text.load_documents(str(tmp_path / "notes.txt"))
    assert "".join(part for _, part in documents) == text
    train, held_out = gather_text.split_documents(documents)
    assert len(held_out) == 1 and len(train) + 1 == len(documents)


def test_a_run_that_has_all_its_steps_is_not_trained_on(script, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    arguments = ["model", "--dataset", "notes.txt", "--output", str(tmp_path), "--resume", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    with pytest.raises(SystemExit, match="checkpoint-3 has all of --steps 3"):
        script("finetune").main()


def test_finetuning_on_too_little_text_ends_with_a_sentence(script, tmp_path, tokenizer, monkeypatch):
    tiny_model(tiny_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("short")
    arguments = [tmp_path / "model", "--dataset", tmp_path / "notes.txt", "--output", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="--dataset: .* too few to hold one out"):
        script("finetune").main()

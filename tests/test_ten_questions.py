"""The table of CONTRIBUTING.md that says where things happen is true: its functions are there, and they run."""

import ast
import importlib
import inspect
import re
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

import pytest
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from engram_hf import (
    EngramConfig,
    add_engram,
    engram_optimizers,
    last_complete_checkpoint,
    load_engram,
    push_engram,
    remove_engram,
    save_engram,
)


ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "engram_hf"
TABLE_ON_DISK = {"": "cpu", "model.layers.1.engram.table": "disk"}
STEPS = 2
# Somebody else's model.
BACKBONE = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def answers() -> dict[str, tuple[str, str]]:
    """Question to file and function, of the questions that have an answer yet."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Ten questions")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+\?) \| (.*) \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 10
    return {question: (file.strip("`"), function.strip("`")) for question, file, function in rows if function != "none"}


def code_of(file: str, function: str) -> CodeType:
    """The code of a function that is written in a file."""
    module = importlib.import_module("engram_hf." + file.removesuffix(".py").replace("/", "."))
    found = module
    for name in function.split("."):
        found = inspect.getattr_static(found, name)
        found = getattr(found, "__func__", found)
    code = inspect.unwrap(found).__code__
    assert Path(code.co_filename) == SOURCE / file
    return code


@contextmanager
def entered(codes: set[CodeType]):
    """Which of some functions are entered inside the block, in this thread and in those that begin there."""
    seen: set[CodeType] = set()

    def look(frame, event, argument):
        if event == "call" and frame.f_code in codes:
            seen.add(frame.f_code)

    sys.setprofile(look)
    threading.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model(tiny_config(engram_layer_ids=[1])).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def train(source, output: Path, steps: int, last: str | None = None) -> None:
    args = TrainingArguments(
        str(output), max_steps=steps, save_steps=STEPS, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tiny_ids(16, 12)]
    model = AutoModelForCausalLM.from_pretrained(source, device_map=TABLE_ON_DISK)
    rows = engram_optimizers(args, work_folder=output / "work")
    Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=rows).train(resume_from_checkpoint=last)


def test_there_are_ten_questions_and_all_of_them_have_an_answer():
    assert len(answers()) == 10


@pytest.mark.parametrize("question", answers())
def test_the_function_is_written_in_that_file(question):
    file, function = answers()[question]
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    body = tree.body
    for name in function.split("."):
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        assert len(found) == 1, (file, function)
        body = found[0].body


def test_the_functions_are_the_ones_that_run(folder, tmp_path, hub):
    questions = answers()

    def asked(*words: str) -> dict[str, CodeType]:
        """The functions of the questions that hold one of the words."""
        return {q: code_of(*questions[q]) for q in questions if any(word in q for word in words)}

    def see(work, *words: str):
        wanted = asked(*words)
        assert len(wanted) == len(words)
        with entered(set(wanted.values())) as seen:
            result = work()
        assert {q for q, code in wanted.items() if code not in seen} == set()
        return result

    load = lambda: AutoModelForCausalLM.from_pretrained(folder, device_map=TABLE_ON_DISK)  # noqa: E731
    model = see(load, "device_map")
    ids = tiny_ids(1, 5)
    see(lambda: model.generate(ids, max_new_tokens=3), "read from disk", "the gate", "while decoding")
    see(lambda: model.save_pretrained(tmp_path / "saved"), "tables saved")
    see(lambda: push_engram(folder, "user/tiny"), "when I push")
    config = EngramConfig(layer_ids=[0], vocab_size=53, n_heads=2, head_dim=8, compressed_vocab_size=None)
    backbone = LlamaForCausalLM(LlamaConfig(**BACKBONE))
    other = see(lambda: add_engram(backbone, config), "somebody else")
    save_engram(other, tmp_path / "memory")
    see(lambda: load_engram(remove_engram(other), tmp_path / "memory"), "somebody else")
    run = tmp_path / "run"
    see(lambda: train(folder, run, STEPS), "gradient of a row", "row optimizer")
    last = last_complete_checkpoint(run)
    see(lambda: train(last, run, 2 * STEPS, last), "resumed run")

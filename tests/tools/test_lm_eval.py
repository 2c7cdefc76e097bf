"""`lm_eval --model hf` on a task in local files, with tables on disk: its numbers are the model's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extra import needs
from transformers import AutoModelForCausalLM, AutoTokenizer


needs("lm_eval")
# lm_eval drops `device_map` unless it is told that the model may be spread out.
ARGUMENTS = "pretrained={},trust_remote_code=True,dtype=float32,parallelize=True,device_map=cpu+disk"
ROWS = [
    {"question": "The list of a class" + " is in the" * i, "choices": [" object", " a method of the module", " int"]}
    for i in range(5)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: ""
generation_kwargs: {until: ["zzz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, kind in (("local_choice", CHOICE), ("local_generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=folder / "rows.jsonl") + kind)
    return folder


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(checkpoint):
    """Log-likelihoods and texts, row by row, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    likelihoods, texts = [], []
    for row in ROWS:
        prompt = tokenizer(row["question"], return_tensors="pt")
        seen = prompt["input_ids"].shape[1]
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + choice, return_tensors="pt")["input_ids"]
            scores = model(ids).logits[0, seen - 1 : -1].log_softmax(-1)
            likelihoods.append(scores.gather(1, ids[0, seen:, None]).sum().item())
        generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, seen:]
        texts.append(tokenizer.decode(generated, skip_special_tokens=True))
    return likelihoods, texts


@pytest.mark.parametrize("batch_size", ["1", "4", "auto"])
def test_its_numbers_are_the_models_own_at_every_batch_size(checkpoint, tasks, expected, tmp_path, batch_size):
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "hf", "--device", "cpu", "--log_samples"]
    command += ["--model_args", ARGUMENTS.format(checkpoint), "--batch_size", batch_size]
    command += ["--tasks", "local_choice,local_generate", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]

    def responses(name):
        (path,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        return [response for sample in samples for response in sample["resps"]]

    likelihoods, texts = expected
    found = [float(likelihood) for ((likelihood, _is_greedy),) in responses("local_choice")]
    assert found == pytest.approx(likelihoods, rel=1e-5)
    assert [text for (text,) in responses("local_generate")] == texts


@pytest.mark.filterwarnings("ignore")
def test_these_arguments_leave_tables_on_disk(checkpoint):
    from lm_eval.models.huggingface import HFLM

    model = HFLM.create_from_arg_string(ARGUMENTS.format(checkpoint), {"device": "cpu"}).model
    assert [table.tiers.keys() for table in model.engram_tables()] == [{"disk"}] * 2


QUESTIONS = [
    {"kind": "given", "prompt": "the list of a class" + " is in" * i, "choices": [" a", " the\nmethod", " int", " of"]}
    for i in range(6)
]


def test_the_tasks_of_the_experiments_give_the_answers_that_their_own_scorer_gives(checkpoint, tmp_path, monkeypatch):
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    from helpers.known_answers import TASKS, score

    questions = [{**question, "answer": place % 4} for place, question in enumerate(QUESTIONS)]
    folder = tmp_path / "output" / "knowledge"
    folder.mkdir(parents=True)
    for task in TASKS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--log_samples"]
    command += ["--model_args", ARGUMENTS.format(checkpoint), "--output_path", "out"]
    command += ["--include_path", str(scripts / "experiments" / "tasks")]
    command += ["--tasks", ",".join(f"engram_{task}" for task in TASKS)]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    expected = score(model, tokenizer, questions)["given"]
    assert {"0", "1"} == set(expected)
    for task in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_engram_{task}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert "".join(str(int(sample["acc_norm"])) for sample in samples) == expected

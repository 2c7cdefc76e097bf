"""`transformers serve` answers an OpenAI client from tables on disk, by its own command line and with remote code."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers
from architectures import draw, tiny_backbone, tiny_memory
from extra import needs
from foreign import GEMMA_TABLE, gemma3n_text, publish
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_hf import add_engram, load_with_tables


needs("fastapi", "uvicorn", "openai")
pytestmark = [
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"),
        reason="transformers serve knows classes that are not its own from 5.23 on",
    ),
    pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux, which tells how a file is mapped"),
]
TRANSFORMERS = [str(Path(sys.executable).parent / "transformers")]
# The same command where the package cannot be imported.
WITHOUT_PACKAGE = "import sys; sys.modules['engram_hf'] = None; from transformers.cli.transformers import main; main()"
QUESTIONS = ["the list is", "Why does a class have a name, and what is returned by the call of a method?"]
NEW_TOKENS = 16


@contextmanager
def serving(checkpoint, log, command, *options):
    """A client, and the number of the process that answers it."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "HF_MODULES_CACHE": str(log.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [*command, "serve", str(checkpoint), "--trust-remote-code", "--port", port, *options]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        with OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client, server.pid
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def read_by_rows(pid: int) -> set[str]:
    """Files that a process maps with the advice of the disk tier: read nothing beside what is asked for."""
    name, files = "", set()
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            name = line.split()[-1]
        elif line.startswith("VmFlags:") and "rr" in line.split():
            files.add(Path(name).name)
    return files


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What `generate` makes of a prompt, alone, with resident tables."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)

    def answer(ids):
        generated = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(generated, skip_special_tokens=True)

    def chat(question):
        messages = [{"role": "user", "content": question}]
        return answer(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        )

    answers = [chat(question) for question in QUESTIONS]
    assert len(set(answers)) == 2 and all(len(text) > NEW_TOKENS for text in answers)
    return answers, answer(tokenizer(QUESTIONS[1], return_tensors="pt"))


def ask(client, checkpoint, question, stream=False):
    answer = client.chat.completions.create(
        model=str(checkpoint),
        messages=[{"role": "user", "content": question}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=stream,
    )
    if not stream:
        return answer.choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in answer]
    assert len([part for part in parts if part]) > 2
    return "".join(parts)


def test_answers_are_those_of_generate_streamed_or_not_and_two_at_once(checkpoint, reference, tmp_path):
    answers, completion = reference
    command = [sys.executable, "-c", WITHOUT_PACKAGE]
    with serving(checkpoint, tmp_path / "log", command, "--device", "cpu+disk") as (client, pid):
        for stream in (False, True):
            assert [ask(client, checkpoint, question, stream) for question in QUESTIONS] == answers
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(ask, client, checkpoint, QUESTIONS[i % 2], i > 1) for i in range(4)]
            assert [each.result() for each in asked] == answers * 2
        completed = client.completions.create(
            model=str(checkpoint), prompt=QUESTIONS[1], max_tokens=NEW_TOKENS, temperature=0
        )
        assert completed.choices[0].text == completion
        assert read_by_rows(pid) == {path.name for path in checkpoint.glob("tables-*")}


def test_continuous_batching_is_left_for_one_request_after_another(checkpoint, reference, tmp_path):
    log = tmp_path / "log"
    with serving(checkpoint, log, TRANSFORMERS, "--device", "cpu", "--continuous-batching") as (client, pid):
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(lambda question: ask(client, checkpoint, question), QUESTIONS)) == reference[0]
        assert not read_by_rows(pid)
    assert "does not support continuous batching. Falling back to sequential generation" in log.read_text()


def test_a_model_with_an_added_memory_answers_as_generate_does(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    backbone = tiny_backbone(
        "llama", vocab_size=len(tokenizer), attn_implementation="sdpa", max_position_embeddings=512
    )
    model = add_engram(backbone, tiny_memory(compressed_vocab_size="auto"), tokenizer)
    folder = tmp_path / "added"
    draw(model, 1, "default").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(generated, skip_special_tokens=True)
    with serving(folder, tmp_path / "log", TRANSFORMERS, "--device", "cpu+disk") as (client, pid):
        assert ask(client, folder, QUESTIONS[1]) == expected
        assert read_by_rows(pid) == {path.name for path in folder.glob("tables-*")}


def test_a_served_table_of_somebody_elses_model_answers_as_the_stock_model_does(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    size = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer)}
    folder, published = tmp_path / "served", publish(gemma3n_text(**size), tmp_path / "published")
    load_with_tables(published, "cpu+disk").save_pretrained(folder, with_code=True)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers."), "without trust_remote_code it is the stock model"
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(generated, skip_special_tokens=True)
    assert len(expected) > NEW_TOKENS
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with serving(folder, tmp_path / "log", TRANSFORMERS, "--device", "cpu+disk") as (client, pid):
        for stream in (False, True):
            assert ask(client, folder, QUESTIONS[1], stream) == expected
        assert read_by_rows(pid) == {places[f"{GEMMA_TABLE}.weight"]}

"""What the page does, without the page: looks, predictions and continuations, limits, and the files of a Space."""

import ast
import re
import threading

import pytest
import torch
from architectures import tiny_backbone, with_memory
from tiny import tiny_config, tiny_model
from typer.testing import CliRunner

from engram_hf.insight.explorer import Explorer, Refusal
from engram_hf.insight.page import write_space
from engram_hf.insight.silencing import silenced
from engram_hf_command import app


TEXT = "the end of the line"


@pytest.fixture(params=["engram_moe", "llama"])
def explorer(request, tokenizer):
    if request.param == "engram_moe":
        return Explorer(tiny_model(tiny_config(vocab_size=600)), tokenizer)
    return Explorer(with_memory(tiny_backbone("llama", vocab_size=600)), tokenizer)


@torch.no_grad()
def test_predictions_are_the_most_likely_tokens_with_and_without_a_part(explorer, tokenizer):
    found, ids = explorer.look(TEXT).trace, tokenizer(TEXT, return_tensors="pt").input_ids
    position, model = 4, explorer.model
    whole = model(ids[:, : position + 1]).logits[0, -1].softmax(-1)
    for off, part in (
        ((), {}),
        (("layer 2",), {"layers": [2]}),
        (("layer 0, head 3 (3-grams)",), {"layers": [0], "heads": [3]}),
    ):
        with silenced(model, positions=[position], **part):
            silent = model(ids[:, : position + 1]).logits[0, -1].softmax(-1)
        answers = explorer.predictions(found, position, off)
        assert [each.token for each in answers[:5]] == [tokenizer.decode([t]) for t in whole.topk(5).indices.tolist()]
        assert {tokenizer.decode([t]) for t in silent.topk(5).indices.tolist()} <= {each.token for each in answers}
        expected = torch.stack([whole.topk(5).values, silent[whole.topk(5).indices]], -1)
        torch.testing.assert_close(
            torch.tensor([[each.with_memory, each.without_memory] for each in answers[:5]]), expected
        )


def test_continuations_are_those_of_generate_with_and_without_a_part(explorer, tokenizer):
    inputs = tokenizer(TEXT, return_tensors="pt")
    given = {**inputs, "max_new_tokens": 12, "do_sample": False}
    whole = explorer.model.generate(**given)
    with silenced(explorer.model, [2]):
        silent = explorer.model.generate(**given)
    texts = [
        tokenizer.decode(each[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) for each in (whole, silent)
    ]
    assert list(explorer.continuations(TEXT, ["layer 2"], 12)) == texts and texts[0] != texts[1]


def test_details_escape_the_text_and_hold_what_the_trace_says(explorer):
    found = explorer.look("<b>&amp;</b> the end").trace
    for position in range(len(found.tokens)):
        told = explorer.details(found, position)
        assert set(re.findall(r"<(\w+)", told)) == {"table", "tr", "th", "td"}
        for layer_id in found.layer_ids:
            assert ", ".join(f"{gate:.3f}" for gate in found.gates[layer_id][position]) in told
            assert " ".join(map(str, found.row_ids[layer_id][position].tolist())) in told


def test_visitors_at_once_get_the_answers_of_one_alone(explorer):
    found = explorer.look(TEXT).trace
    parts = list(explorer.parts())[:4]
    alone = [explorer.predictions(found, 4, [part]) for part in parts]
    told: dict[int, list] = {}

    def ask(number: int) -> None:
        told[number] = [explorer.predictions(found, 4, [parts[number]]) for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {number: [alone[number]] * 5 for number in range(4)}


def test_limits_and_mistakes_are_sentences_for_a_visitor(tokenizer):
    explorer = Explorer(tiny_model(tiny_config(vocab_size=600)), tokenizer, longest_text=10, longest_continuation=5)
    found = explorer.look(TEXT).trace
    for call, message in (
        (lambda: explorer.look(" \n"), "There is no text yet"),
        (lambda: explorer.look("the end " * 10), r"it has \d+ tokens, and this page reads 10 tokens at most"),
        (lambda: explorer.look("x" * 100_000), "it has 100,000 characters"),
        (lambda: explorer.continuations(TEXT, new_tokens=6), "1 to 5 tokens here, got 6"),
        (lambda: explorer.continuations(TEXT, ["layer 1"], 5), "This model has no 'layer 1'"),
        (lambda: explorer.details(found, 99), "and no token 99"),
    ):
        with pytest.raises(Refusal, match=message):
            call()
    with pytest.raises(ValueError, match="found no memory layer"):
        Explorer(tiny_model(tiny_config(engram_layer_ids=[])), tokenizer)


def test_a_request_that_takes_too_long_is_stopped_and_leaves_no_hook(tokenizer):
    explorer = Explorer(tiny_model(tiny_config(vocab_size=600)), tokenizer, longest_seconds=-1)
    with pytest.raises(Refusal, match="took longer than -1 seconds and was stopped"):
        explorer.look(TEXT)
    assert not explorer.model._forward_pre_hooks


def test_a_space_is_a_folder_that_runs_by_itself(tmp_path, tokenizer):
    model, space = tmp_path / "secret" / "engram-tiny", tmp_path / "space"
    tiny_model(tiny_config(vocab_size=600)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    ran = CliRunner().invoke(app, ["explore", str(model), "--as-space", str(space)])
    assert ran.exit_code == 0, ran.output
    program = (space / "app.py").read_text()
    names = {node.targets[0].id: node.value for node in ast.parse(program).body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(names["MODEL"]) == "model" and (space / "model" / "config.json").is_file()
    assert (space / "engram_hf" / "insight" / "page.py").is_file() and not list(space.rglob("__pycache__"))
    read_me = (space / "README.md").read_text()
    assert read_me.startswith("---\n") and "sdk: gradio" in read_me and "app_file: app.py" in read_me
    assert any(line.startswith("torch") for line in (space / "requirements.txt").read_text().splitlines())
    assert "secret" not in program + read_me
    again = CliRunner().invoke(app, ["explore", str(model), "--as-space", str(space)])
    assert again.exit_code == 1 and "holds something already" in again.output
    assert "from_pretrained(MODEL, device_map='cpu+disk')" in written_for_the_hub(tmp_path / "other")
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        write_space("nothing", tmp_path / "third")


def written_for_the_hub(folder) -> str:
    write_space("user/engram-tiny", folder, "cpu+disk")
    assert not (folder / "model").exists()
    return (folder / "app.py").read_text()


def test_a_text_has_at_most_as_many_tokens_as_the_model_has_positions(tokenizer):
    explorer = Explorer(tiny_model(tiny_config(vocab_size=600, max_position_embeddings=16)), tokenizer)
    with pytest.raises(Refusal, match="16"):
        explorer.look("the end of the line. " * 8)
    with pytest.raises(Refusal, match="too few for"):
        explorer.continuations(TEXT, new_tokens=16)


def test_a_space_is_not_written_into_the_model_that_is_copied(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lies inside"):
        write_space(str(tmp_path), tmp_path / "space")
    assert not (tmp_path / "space").exists()
    for name in ("training_args.bin", "trainer_state.json", "optimizer.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    write_space(str(tmp_path), tmp_path.parent / "a space")
    assert {path.name for path in (tmp_path.parent / "a space" / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }

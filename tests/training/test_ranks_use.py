"""Generation, pipelines and evaluation over processes whose texts have different lengths: what one process does.

Nobody gives `generate` an argument `synced_gpus`: no process waits for another one to look rows up.
"""

import sys
from pathlib import Path

import pytest
import torch
from cases import slow
from processes import run_processes
from run_ranks_use import WAYS, answer, evaluate, generate
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, pipeline

from engram_hf.planning import estimate_memory


SCRIPT = Path(__file__).parent / "run_ranks_use.py"


@pytest.fixture(scope="module", params=[2, slow(3), slow(4)])
def results(request, tmp_path_factory, tokenizer):
    """The folder with the model, and what each process has left."""
    folder = tmp_path_factory.mktemp("use")
    config = tiny_config(
        vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=None, engram_compressed_vocab_size="auto"
    )
    model = tiny_model(config)
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder / "base")
    tiny_model(tiny_config(engram_table_dtype="float64")).save_pretrained(folder / "plain")
    ran = run_processes([sys.executable, SCRIPT, folder, str(request.param)])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, [torch.load(folder / f"result{i}of{request.param}.pt") for i in range(request.param)]


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_generates_what_one_process_does(results, way):
    model = AutoModelForCausalLM.from_pretrained(results[0] / "base").eval()
    found = [result[way] for result in results[1]]
    for rank, generated in enumerate(found):
        assert torch.equal(generated, generate(model, way, rank))
    assert len({len(each) for each in found}) == len(found)


def test_a_pipeline_on_each_rank_answers_what_it_does_in_one_process(results):
    pipe = pipeline("text-generation", str(results[0] / "base"), device="cpu")
    for rank, result in enumerate(results[1]):
        assert result["pipeline"] == answer(pipe, rank) and len(set(result["pipeline"])) > 1


def test_trainer_evaluates_and_predicts_over_ranks_what_one_process_does(results, tmp_path):
    expected = evaluate(AutoModelForCausalLM.from_pretrained(results[0] / "base").eval(), tmp_path)
    for result in results[1]:
        found = result["evaluation"]
        assert found["loss"] == expected["loss"]
        assert torch.equal(found["predictions"], expected["predictions"])
        assert torch.equal(found["labels"], expected["labels"])


def test_evaluations_between_the_steps_of_a_run_are_those_of_whole_tables(results):
    for result in results[1]:
        assert result["sharded"] == result["replicated"]
        assert len(set(result["sharded"]["losses"])) == 2
    assert [len(result["sharded"]["own"]) for result in results[1]] == [*range(1, len(results[1]) + 1)]


def test_the_list_of_tables_says_what_a_plan_has_said(results):
    folder, found = results
    plan = estimate_memory(folder / "base", ranks=len(found), batch_size=16, seq_length=1024)
    assert plan.tables == {"cpu": sum(nbytes for nbytes, _, _ in found[0]["tables"])}
    for result in found:
        assert sum(moved for _, _, moved in result["tables"]) == pytest.approx(plan.moved_per_step, abs=2)
    whole = sum(rows for _, rows, _ in found[0]["tables"])
    # Rows of eight float32 numbers.
    assert sum(nbytes for result in found for nbytes, _, _ in result["tables"]) == whole * 32

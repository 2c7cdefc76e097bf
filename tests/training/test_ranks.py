"""Tables over 2, 3 and 4 processes, which trains, computes and saves what one process does."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes
from run_ranks import CASES, RANKS, ROWS_OF_HEAD, STEPS, rows_of_one_owner, train
from tiny import tiny_ids
from transformers import AutoModelForCausalLM

from engram_hf.modeling.disk_safetensors import file_digest


SCRIPT = Path(__file__).parent / "run_ranks.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder, and what each process of each run has left: number of processes to a list."""
    folder = tmp_path_factory.mktemp("ranks")
    # A process that waits for another one for ever is an error.
    ran = run_processes([sys.executable, SCRIPT, folder])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, {n: [torch.load(folder / f"result{i}of{n}.pt") for i in range(n)] for n in RANKS}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_table_over_ranks_trains_bit_for_bit_like_whole_tables_on_the_same_ranks(results, case):
    for of_ranks in results[1].values():
        for result in of_ranks:
            sharded, replicated = result[case], result[case, "replicated"]
            torch.testing.assert_close(sharded["rows"], replicated["rows"], rtol=0, atol=0)
            torch.testing.assert_close(sharded["state"], replicated["state"], rtol=0, atol=0)
            assert sharded["norms"] == replicated["norms"]


@pytest.mark.parametrize("way", ["sharded", "replicated"])
def test_rows_of_one_owner_are_exchanged_by_all(results, way):
    case = ("sgd", "resident", "float64")
    alone = train(results[0] / "float64.safetensors", case, 3, is_alone=True, make=rows_of_one_owner)
    for result in results[1][3]:
        torch.testing.assert_close(result["one owner"][way]["rows"], alone["rows"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result["one owner"][way]["norms"], alone["norms"], rtol=1e-12, atol=0)
    assert min(alone["norms"]) > 0


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_table_over_ranks_trains_what_one_process_does_with_the_joint_batch(results, case, tmp_path):
    for ranks, of_ranks in results[1].items():
        alone = train(results[0] / f"{case[2]}.safetensors", case, ranks, is_alone=True)
        for result in of_ranks:
            error = 1e-12 if case[2] == "float64" else 1e-6
            torch.testing.assert_close(result[case]["norms"], alone["norms"], rtol=error, atol=0)
            if case[2] == "float64":
                torch.testing.assert_close(result[case]["rows"], alone["rows"], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(result[case]["state"], alone["state"], rtol=1e-9, atol=1e-12)
        # Not one of the steps was without gradients, and clipping has changed something.
        assert len(alone["norms"]) == STEPS and min(alone["norms"]) > 2.0


def test_what_is_rounded_stochastically_does_not_depend_on_the_number_of_ranks(results):
    """The sums of these gradients are exact, and so are their means over two and four processes."""
    case = CASES[-1]
    for ranks in (2, 4):
        alone = train(results[0] / "bfloat16.safetensors", case, ranks, is_alone=True)
        assert torch.equal(results[1][ranks][0][case]["rows"], alone["rows"])


def test_each_rank_holds_its_part_of_the_rows_and_one_may_hold_none_of_a_block(results):
    for ranks, of_ranks in results[1].items():
        held = [result[CASES[0]]["held"] for result in of_ranks]
        # Blocks of 26 and 2 rows, in chunks of ceil(rows / ranks).
        assert held == {2: [14, 14], 3: [10, 10, 8], 4: [8, 8, 7, 5]}[ranks] and sum(held) == sum(ROWS_OF_HEAD)


def test_rows_and_row_ids_travel_once_each_way(results):
    for result in results[1][3]:
        traffic = result["traffic"]
        foreign, sent = traffic["foreign"], traffic["sent"]
        assert traffic["moved"] == {"ids": foreign, "rows": foreign, "row_bytes": foreign * 4 * 8} or not foreign
        heads = sum(nbytes for (name, dtype), nbytes in sent.items() if name == "send" and dtype == "torch.int64")
        asked = sum(nbytes for (name, dtype), nbytes in sent.items() if name == "send" and dtype == "torch.uint8")
        # Six numbers before a question; the question itself has 8 bytes a row.
        assert asked == 8 * foreign and heads <= 2 * 6 * 8
        backward = sent["alltoall_base_", "torch.uint8"]
        assert backward == 8 * 4 * traffic["distinct"]


def test_rows_that_come_to_a_wrong_rank_raise_on_every_rank(results):
    messages = [result["otherwise"] for result in results[1][3]]
    assert all(messages) and any("differently" in each for each in messages)


def test_a_model_over_ranks_computes_generates_and_saves_what_one_process_does(results):
    folder = results[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    for rank, result in enumerate(results[1][3]):
        for number, logits in enumerate(result["model"]["logits"]):
            with torch.no_grad():
                assert torch.equal(logits, model(tiny_ids(2, 5 + 3 * rank, seed=number)).logits)
        prompt = tiny_ids(1, 4 + rank, seed=rank)
        expected = model.generate(prompt, max_new_tokens=2 + 3 * rank, do_sample=False)
        assert torch.equal(result["model"]["generated"], expected)
    tables = sorted((folder / "base").glob("tables-*.safetensors"))
    digests = [[file_digest(folder / name / table.name) for table in tables] for name in ("base", "saved_by3")]
    assert tables and digests[0] == digests[1]


def test_gradient_checkpointing_fetches_no_row_twice(results):
    for result in results[1][2]:
        found = result["checkpointing"]
        assert found["None"]["fetched"] == found["False"]["fetched"] == found["True"]["fetched"] > 0
        for way in ("False", "True"):
            torch.testing.assert_close(found[way]["rows"], found["None"]["rows"], rtol=1e-9, atol=1e-12)

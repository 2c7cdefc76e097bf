"""Tables over 2, 3 and 4 processes, which trains, computes and saves what one process does."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import slow
from processes import run_processes
from run_ranks import (
    CASES,
    EARLY,
    ERRORS,
    HEADS,
    ROUNDED,
    ROWS_OF_HEAD,
    STEPS,
    TWO_LOOKUPS,
    WIDTH,
    batch,
    batch_after,
    open_table,
    rows_of_one_owner,
    share_of_tokens,
    train,
    turns,
)
from tiny import tiny_ids
from transformers import AutoModelForCausalLM

from engram_hf.modeling.disk_safetensors import file_digest
from engram_hf.modeling.table_cut import RowCut, check_number
from engram_hf.modeling.table_ranks import LOOKUPS_KEPT


SCRIPT = Path(__file__).parent / "run_ranks.py"


RANKS = [2, slow(3), slow(4)]


@pytest.fixture(scope="module")
def launches():
    """Numbers of processes that are started together to the folder that they have written to."""
    return {}


@pytest.fixture
def folder(ranks, launches, tmp_path_factory):
    """Where so many processes have left their results."""
    together = ("2",) if ranks == 2 else ("3", "4")
    if together not in launches:
        launches[together] = tmp_path_factory.mktemp("ranks")
        # A process that waits for another one for ever is an error.
        ran = run_processes([sys.executable, SCRIPT, launches[together], *together])
        assert ran.returncode == 0, ran.stderr[-3000:]
    return launches[together]


@pytest.fixture
def results(folder, ranks):
    """What each process has left."""
    return [torch.load(folder / f"result{rank}of{ranks}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_table_over_ranks_trains_bit_for_bit_like_whole_tables_on_the_same_ranks(results):
    """All rules on all tiers, with accumulation and clipping, batches of several lengths and a rank without tokens."""
    for result in results:
        for case in CASES:
            sharded, replicated = result[case], result[case, "replicated"]
            torch.testing.assert_close(sharded["rows"], replicated["rows"], rtol=0, atol=0, msg=str(case))
            torch.testing.assert_close(sharded["state"], replicated["state"], rtol=0, atol=0, msg=str(case))
            assert sharded["norms"] == replicated["norms"]


@pytest.mark.parametrize("ranks", RANKS)
def test_rows_of_one_owner_are_exchanged_by_all(folder, results, ranks):
    case = ("sgd", "resident", "float64")
    alone = train(folder / "float64.safetensors", case, ranks, is_alone=True, make=rows_of_one_owner)
    for result in results:
        for way in result["one owner"]:
            torch.testing.assert_close(way["rows"], alone["rows"], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(way["norms"], alone["norms"], rtol=1e-12, atol=0)
    assert min(alone["norms"]) > 0


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_whose_losses_do_not_touch_the_table_make_the_steps_of_the_others(folder, results, ranks):
    case = ("adam", "host", "float64")
    alone = train(folder / "float64.safetensors", case, ranks, is_alone=True, make=turns)
    assert alone["norms"][1] == 0 and alone["norms"][0] > 0
    for result in results:
        sharded, replicated = result["turns"]
        torch.testing.assert_close(sharded["rows"], replicated["rows"], rtol=0, atol=0)
        torch.testing.assert_close(sharded["state"], replicated["state"], rtol=0, atol=0)
        torch.testing.assert_close(sharded["rows"], alone["rows"], rtol=1e-12, atol=1e-12)
        assert sharded["state"]["steps"] == alone["state"]["steps"]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_table_over_ranks_trains_what_one_process_does_with_the_joint_batch(folder, results, ranks):
    for case in CASES:
        alone = train(folder / f"{case[2]}.safetensors", case, ranks, is_alone=True)
        for result in results:
            error = 1e-12 if case[2] == "float64" else 1e-6
            torch.testing.assert_close(result[case]["norms"], alone["norms"], rtol=error, atol=0)
            if case[2] != "bfloat16":
                torch.testing.assert_close(result[case]["rows"], alone["rows"], rtol=error, atol=error)
                torch.testing.assert_close(result[case]["state"], alone["state"], rtol=error, atol=error)
        # Not one of the steps was without gradients, and clipping has changed something.
        assert len(alone["norms"]) == STEPS and min(alone["norms"]) > 2.0


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_rounded_stochastically_does_not_depend_on_the_number_of_ranks(folder, results):
    """The sums of these gradients are exact, and so are their means."""
    path = folder / "bfloat16.safetensors"
    alone = train(path, ROUNDED, 1, is_alone=True, make=share_of_tokens, highest=1e9)
    for result in results:
        assert torch.equal(result["rounded"]["rows"], alone["rows"])


@pytest.mark.parametrize("ranks", RANKS)
def test_each_rank_holds_its_part_of_the_rows_and_one_may_hold_none_of_a_block(results, ranks):
    held = [result[CASES[0]]["held"] for result in results]
    # Blocks of 26 and 2 rows, in chunks of ceil(rows / ranks).
    assert held == {2: [14, 14], 3: [10, 10, 8], 4: [8, 8, 7, 5]}[ranks] and sum(held) == sum(ROWS_OF_HEAD)


@pytest.mark.parametrize("ranks", RANKS)
def test_rows_travel_once_each_way_and_their_ids_once_in_all(results, ranks):
    """Counted at the collectives, sends and receives, of two forwards that one step accumulates."""
    cut, common, fresh = RowCut([26, 2], ranks), 0, 0
    for rank, result in enumerate(results):
        traffic = result["traffic"]
        lookups = [distinct_rows(number, rank, ranks) for number in TWO_LOOKUPS]
        asked = [[ids[cut.owner(ids) == owner] for owner in range(ranks) if owner != rank] for ids in lookups]
        questions = [ids for of_lookup in asked for ids in of_lookup if len(ids)]
        assert traffic["asked"] == 4 * sum(map(len, questions))
        # Each answer begins with 16 bytes that say how it went. Nine numbers come before each question.
        assert traffic["answers"] == len(questions) and traffic["heads"] == 9 * 8 * len(questions)
        assert traffic["taken"] == sum(8 * WIDTH * len(ids) + 16 for ids in questions)
        message, rows = traffic["given"]
        expected = 0
        for first, second in zip(*asked):
            # A row of both is named by the first one.
            named = [ids for ids, new in ((first, first), (second, second[~torch.isin(second, first)])) if len(new)]
            # For an owner how many lookups are named, and their numbers; one bit for each row that was asked for.
            expected += bool(named) * 8 * (1 + len(named)) + sum((len(ids) + 7) // 8 for ids in named)
            common += int(torch.isin(second, first).sum())
            fresh += int((~torch.isin(second, first)).sum())
        assert message == expected
        assert rows == 8 * WIDTH * rows_of_others(cut, rank, *TWO_LOOKUPS)
    assert common and fresh


@pytest.mark.parametrize("ranks", RANKS)
def test_no_row_id_travels_twice_in_a_run(results):
    for result in results:
        for case in CASES:
            moved = result[case]["moved"]
            assert moved["ids"] == moved["rows"] > 0 and "again" not in moved
        assert "again" not in result["early"]["moved"]


@pytest.mark.parametrize("ranks", RANKS)
def test_lookups_that_owners_have_forgotten_get_the_same_gradients(results, ranks):
    """Forwards that no step follows do not fill the memory, and a step behind a forward forgets it. Neither do forwards
    matter that were broken off, before or after an owner knew of them."""
    cut = RowCut([26, 2], ranks)
    for rank, result in enumerate(results):
        found = result["without a step"]
        own, *of_ranks = found["remembered"]
        assert own == LOOKUPS_KEPT and of_ranks[rank] == 0
        # All other forwards have read rows of the first rank.
        assert of_ranks == [0] + [LOOKUPS_KEPT] * (ranks - 1) if rank == 0 else max(of_ranks) <= 1
        assert found["behind a step"] == [0] * (1 + ranks)
        row_ids, gradients, again = found["nothing"]
        assert len(row_ids) and gradients.any() and again == 0
        ids = distinct_rows(1, rank, ranks)
        foreign = ids[cut.owner(ids) != rank]
        # The first row of each head is what all other forwards have read.
        is_known = torch.isin(foreign, torch.tensor([0, *ROWS_OF_HEAD]).cumsum(0))
        are_all, is_none = torch.ones_like(is_known), torch.zeros_like(is_known)
        for way, expected in (
            ("forwards", ~is_known),
            ("a step", are_all),
            ("broken before", is_none),
            ("broken behind", ~is_known),
            ("broken announced", is_none),
        ):
            assert torch.equal(found[way][0], row_ids) and torch.equal(found[way][1], gradients)
            assert found[way][2] == int(expected.sum())
        raised = {way[0]: message for way, message in found.items() if "raised" in way}
        # The first rank reads no rows of the batches whose answers have no room.
        assert "page" in raised["broken behind"]
        assert bool(raised["broken before"]) == bool(raised["broken announced"]) == (rank > 0)
    assert int((~is_known).sum()) > 0


@pytest.mark.parametrize("ranks", RANKS)
def test_a_row_of_a_forward_takes_eight_bytes_at_the_rank_that_asks_and_at_the_owner(results, ranks):
    """Of as many forwards as are remembered, each of which has read three rows of the first rank."""
    for rank, result in enumerate(results):
        asked, answered = result["without a step"]["bytes"]
        assert asked == (8 * 3 * LOOKUPS_KEPT if rank else 0)
        if rank == 0:
            assert answered == 8 * 3 * LOOKUPS_KEPT * (ranks - 1)


def test_row_ids_above_four_billion_travel_in_four_bytes_each():
    cut = RowCut([2**35 + 11, 7], ranks=3)
    generator = torch.Generator().manual_seed(0)
    for rank in range(3):
        held = torch.randint(0, sum(cut.rows_of(rank)), (1000,), generator=generator).unique()
        row_ids = cut.to_table(held, rank)
        packed = cut.pack(row_ids, rank)
        assert len(packed) == 4 * len(held) + 8 * 2
        check = int(check_number(row_ids))
        assert torch.equal(cut.find_packed(packed, check, rank), held)
        # Shifted, cut differently, or at another rank.
        assert cut.find_packed(packed, check + 1, rank) is None
        assert cut.find_packed(packed[4:], check, rank) is None
        assert cut.find_packed(packed[1:], check, rank) is None
        assert cut.find_packed(packed, check, (rank + 1) % 3) is None
        if rank:
            assert RowCut([2**35 + 14, 7], ranks=3).find_packed(packed, check, rank) is None
    assert len(cut.pack(held[:0], 0)) == 8 * 2 and len(cut.find_packed(cut.pack(held[:0], 0), 0, 0)) == 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("error", ERRORS)
def test_rows_that_come_to_a_wrong_rank_raise_on_every_rank(results, error):
    messages = [result[error] for result in results]
    assert all(messages) and any("differently" in each for each in messages)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_that_has_deleted_its_model_says_so(results, ranks):
    assert f"has asked rank {ranks - 1} for rows, and that rank has deleted the model" in results[0]["deleted"]


@pytest.mark.parametrize("ranks", RANKS)
def test_rows_that_their_owner_cannot_read_are_not_zeros_for_the_rank_that_saves(results, ranks):
    assert "could not read rows that another rank has asked for: The disk is gone." in results[0]["unreadable"]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_that_alone_loads_what_is_not_of_a_table_is_still_answered(folder, results, ranks):
    table = open_table(folder / "float64.safetensors", "resident", "float64").eval()
    for rank, result in enumerate(results):
        assert torch.equal(result["loaded alone"], table(batch(1, 1 + rank, ranks)[0]))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", HEADS)
def test_ranks_without_a_row_and_heads_that_lie_on_several_ranks_train_alike(folder, results, ranks, name):
    tier = "disk" if name == "few" else "host"
    make = partial(batch, heads=HEADS[name])
    alone = train(folder / f"{name}.safetensors", ("adam", tier, "float64"), ranks, is_alone=True, make=make)
    held = [result[name][0]["held"] for result in results]
    assert sum(held) == sum(HEADS[name]) and (name != "few" or held == [1, 1, 0, 0][:ranks])
    for result in results:
        sharded, replicated = result[name]
        torch.testing.assert_close(sharded["rows"], replicated["rows"], rtol=0, atol=0)
        torch.testing.assert_close(sharded["state"], replicated["state"], rtol=0, atol=0)
        torch.testing.assert_close(sharded["rows"], alone["rows"], rtol=1e-9, atol=1e-12)


def distinct_rows(number: int, rank: int, ranks: int) -> torch.Tensor:
    """Row ids in the table that a rank reads for a batch."""
    firsts = torch.tensor(ROWS_OF_HEAD).cumsum(0) - torch.tensor(ROWS_OF_HEAD)
    return (batch(number, rank, ranks)[0] + firsts).flatten().unique()


def rows_of_others(cut: RowCut, rank: int, *numbers: int) -> int:
    """How many of them, in some batches together, other ranks hold."""
    distinct = torch.cat([distinct_rows(number, rank, cut.ranks) for number in numbers]).unique()
    return int((cut.owner(distinct) != rank).sum())


@pytest.mark.parametrize("ranks", RANKS)
def test_lookups_that_were_announced_train_the_same_bits_and_owners_know_their_rows_early(results, ranks):
    cut = RowCut([26, 2], ranks)
    numbers = [10 * step + part for step in range(STEPS) for part in range(2)]
    for rank, result in enumerate(results):
        early, late = result["early"], result[EARLY]
        torch.testing.assert_close(early["rows"], late["rows"], rtol=0, atol=0)
        torch.testing.assert_close(early["state"], late["state"], rtol=0, atol=0)
        assert early["norms"] == late["norms"]
        foreign = partial(rows_of_others, cut, rank)
        # Of each batch but the first one.
        asked = torch.cat([distinct_rows(number, each, ranks) for number in numbers[1:] for each in range(ranks)])
        wanted = asked[cut.owner(asked) == rank].unique()
        assert torch.isin(cut.to_held(wanted, rank), torch.cat(early["seen"])).all()
        # The last one is prefetched and never looked up.
        assert result["announced"].get("announced", 0) == sum(map(foreign, [*numbers[1:], 30]))
        # What a rank announces: the batch that follows, and one that never comes. What it asks for in full: the first
        # batch, one without a gradient in each forward, those that it had prefetched before a step, and in the end all
        # rows.
        named = sum(foreign(batch_after(each)) + foreign(each + 100) + foreign(each + 200) for each in numbers)
        in_the_end = int((cut.owner(torch.arange(28)) != rank).sum())
        again = foreign(10) + foreign(20)
        assert early["sent"] == 4 * (foreign(0) + named + again + in_the_end)


@pytest.mark.parametrize("ranks", [slow(3)])
def test_a_model_over_ranks_computes_generates_and_saves_what_one_process_does(folder, results):
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    for rank, result in enumerate(results):
        for number, logits in enumerate(result["model"]["logits"]):
            with torch.no_grad():
                assert torch.equal(logits, model(tiny_ids(2, 5 + 3 * rank, seed=number)).logits)
        prompt = tiny_ids(1, 4 + rank, seed=rank)
        expected = model.generate(prompt, max_new_tokens=2 + 3 * rank, do_sample=False)
        assert torch.equal(result["model"]["generated"], expected)
    tables = sorted((folder / "base").glob("tables-*.safetensors"))
    digests = [[file_digest(folder / name / table.name) for table in tables] for name in ("base", "saved_by3")]
    assert tables and digests[0] == digests[1]


@pytest.mark.parametrize("ranks", [2])
def test_gradient_checkpointing_fetches_no_row_twice(results):
    for result in results:
        found = result["checkpointing"]
        assert found["None"]["fetched"] == found["False"]["fetched"] == found["True"]["fetched"] > 0
        for way in ("False", "True"):
            torch.testing.assert_close(found[way]["rows"], found["None"]["rows"], rtol=1e-9, atol=1e-12)


WITHOUT_DRIVER = """
import torch
import torch.distributed as dist

torch.accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cuda")
dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
from engram_hf.modeling.table_ranks import start_ranks
from engram_hf.training.row_exchange import device_of_collectives

print(sorted(start_ranks().meshes), device_of_collectives())
dist.destroy_process_group()
"""


def test_torch_for_gpus_on_a_machine_without_one_stays_on_the_cpu(tmp_path):
    ran = run_processes([sys.executable, "-c", WITHOUT_DRIVER.format(store=tmp_path / "store")])
    assert ran.stdout == "['cpu'] cpu\n", ran.stderr[-3000:]

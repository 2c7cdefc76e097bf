"""Each rule against torch's optimizer of that name, and against its definition where rows rest."""

import pytest
import torch
from dense_rows import DenseRows

from engram_hf import RowAdam, RowSGD, RowwiseAdagrad, RowwiseAdam
from engram_hf.modeling.table import EngramTable
from engram_hf.modeling.table_formats import row_format
from engram_hf.training.row_rules import draws_of_rows, round_stochastically
from engram_hf.training.row_updates import RowUpdates


RULES = {
    "adam": RowAdam((0.9, 0.95)),
    "rowwise_adam": RowwiseAdam((0.9, 0.95)),
    "adagrad": RowwiseAdagrad(),
    "sgd": RowSGD(momentum=0.9),
}


def made_table(rows=23, width=6, dtype=torch.float32, blocks=2) -> EngramTable:
    table = EngramTable([rows] * blocks, width, 1, row_format(dtype))
    with torch.no_grad():
        for number, block in enumerate(table.blocks):
            block.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(number)))
    return table


def train(table, updates, row_ids, pull, lr):
    (table(row_ids) * pull).sum().backward()
    updates.step(lr)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_rows_that_every_step_touches_move_like_under_torchs_optimizer(name, betas):
    table = made_table(blocks=1)
    dense = torch.nn.Parameter(table.blocks[0].detach().clone())
    if name == "adam":
        optimizer = torch.optim.Adam([dense], lr=0.01, betas=betas)
    else:
        optimizer = torch.optim.SGD([dense], lr=0.01, momentum=0.9)
    updates = RowUpdates("table", table, RowAdam(betas) if name == "adam" else RULES[name])
    row_ids = torch.arange(23).view(1, -1, 1)
    for step in range(200):
        pull = torch.randn(1, 23, 6, generator=torch.Generator().manual_seed(step))
        train(table, updates, row_ids, pull, 0.01)
        dense.grad = pull[0].clone()
        optimizer.step()
    torch.testing.assert_close(table.blocks[0].detach(), dense.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("is_sparse", [False, True])
def test_rows_move_by_the_written_definition(name, is_sparse):
    table = made_table()
    references = [
        DenseRows(name, torch.nn.Parameter(block.detach().clone()), betas=(0.9, 0.95)) for block in table.blocks
    ]
    untouched = [block.detach().clone() for block in table.blocks]
    updates = RowUpdates("table", table, RULES[name])
    seen = [set(), set()]
    for step in range(200):
        generator = torch.Generator().manual_seed(step)
        row_ids = torch.randint(0, 20, (2, 9, 2), generator=generator)
        if not is_sparse:
            row_ids = torch.arange(23).view(1, -1, 1).expand(1, -1, 2)
        pull = torch.randn(*row_ids.shape[:2], 12, generator=generator)
        train(table, updates, row_ids, pull, 0.01)
        for head, reference in enumerate(references):
            reference.block.grad = torch.zeros_like(reference.block).index_add_(
                0, row_ids[..., head].flatten(), pull[..., 6 * head : 6 * head + 6].flatten(0, 1)
            )
            reference.step(0.01)
            seen[head] |= set(row_ids[..., head].flatten().tolist())
    for block, reference, start, rows in zip(table.blocks, references, untouched, seen, strict=True):
        torch.testing.assert_close(block.detach(), reference.block.detach(), rtol=1e-6, atol=1e-6)
        resting = sorted(set(range(23)) - rows)
        assert torch.equal(block[resting], start[resting]) and (resting != []) == is_sparse


@pytest.mark.parametrize(
    "name, dtype, most",
    [
        ("adagrad", torch.float32, 1.1),
        ("rowwise_adam", torch.float32, 2.1),
        ("rowwise_adam", torch.bfloat16, 2.1),
        ("adam", torch.float32, 3.1),
        ("adam", torch.bfloat16, 3.1),
    ],
)
def test_weights_and_state_together_stay_within_their_bound(name, dtype, most):
    table = made_table(rows=1009, width=64, dtype=dtype, blocks=1)
    updates = RowUpdates("table", table, RULES[name])
    kept = sum(tensor.nbytes for tensor in updates.state.values())
    assert table.blocks[0].nbytes + kept <= most * table.blocks[0].nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_the_mean_and_takes_one_of_the_two_neighbours(dtype):
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).repeat(4000, 1)
    rounded = round_stochastically(values, dtype, draws_of_rows(torch.arange(4000), 64, stream=1)).float()
    unit = (values[0].abs() * (2**-7 if dtype == torch.bfloat16 else 2**-10)).clamp_min(2**-24)
    assert ((rounded - values).abs() <= unit).all()
    assert all(len(rounded[:, i].unique()) <= 2 for i in range(64))
    # The mean of 4000 draws, of at most one unit each, within five standard deviations.
    assert ((rounded.mean(0) - values[0]).abs() <= 5 * unit / 4000**0.5).all()
    exact = values.to(dtype).float()
    assert torch.equal(round_stochastically(exact, dtype, torch.rand(exact.shape)).float(), exact)


def test_what_is_drawn_for_a_row_is_uniform_and_depends_on_row_column_and_stream_alone():
    # As far apart as rows of a large table are.
    row_ids = torch.cat([torch.arange(20_000), 3 * 2**40 + torch.arange(20_000)])
    draws = draws_of_rows(row_ids, 8, stream=7)
    some = torch.tensor([39_999, 5, 20_003])
    assert torch.equal(draws_of_rows(row_ids[some], 8, stream=7), draws[some])
    assert draws.min() >= 0 and draws.max() < 1
    # Of 320,000 numbers in ten bins, each within five standard deviations.
    assert ((draws.flatten().mul(10).long().bincount(minlength=10) - 32_000).abs() < 5 * 28_800**0.5).all()
    # Neighbours in a row, in a column, and in streams have nothing to do with each other.
    other = draws_of_rows(row_ids, 8, stream=8)
    pairs = [(draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1]), (draws, other), (draws[:20_000], draws[20_000:])]
    for one, two in pairs:
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 5 / 150_000**0.5


def test_rows_of_sixteen_bits_learn_by_steps_smaller_than_their_unit():
    table = made_table(rows=50, width=8, dtype=torch.bfloat16, blocks=1)
    with torch.no_grad():
        table.blocks[0].fill_(1.0)
    updates = RowUpdates("table", table, RowSGD(momentum=0.0))
    row_ids = torch.arange(50).view(1, -1, 1)
    for _ in range(100):
        # Half a unit of bfloat16 at 1 is 0.0039 downwards: rounding to nearest would never move.
        train(table, updates, row_ids, torch.ones(1, 50, 8), 0.001)
    assert abs(float(table.blocks[0].detach().float().mean()) - 0.9) < 0.01


def test_a_rule_without_a_gradient_leaves_everything_as_it_is():
    table = made_table()
    before = [block.detach().clone() for block in table.blocks]
    updates = RowUpdates("table", table, RULES["adam"])
    assert updates.step(0.1) == 0
    row_ids = torch.zeros(1, 3, 2, dtype=torch.int64)
    (table(row_ids) * 0).sum().backward()
    assert updates.step(0.1) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, table.blocks, strict=True))
    assert not any(tensor.any() for tensor in updates.state.values())

"""Masks that say for each token whom it sees: the logits of the separate rows, or an error; never something between."""

import pytest
import torch
from tiers import REFUSALS, right_or_refused
from tiny import SHAPES, assert_same_logits, shaped_config, tiny_ids, tiny_model
from transformers import DynamicCache


@pytest.fixture(params=[SHAPES[0], SHAPES[1], SHAPES[3]], ids=lambda shape: "streams{}-order{}-taps{}".format(*shape))
def model(request):
    return tiny_model(shaped_config(request.param))


@pytest.fixture(params=["bool", "lowest", "infinite"])
def as_mask(request):
    """From (seq, seen) bool, True for "sees", to what a forward takes."""

    def make(sees: torch.Tensor) -> torch.Tensor:
        sees = sees if sees.ndim == 4 else sees[None, None]
        if request.param == "bool":
            return sees
        hidden = torch.finfo(torch.float32).min if request.param == "lowest" else float("-inf")
        return torch.zeros(sees.shape).masked_fill(~sees, hidden)

    return make


def causal(seq: int) -> torch.Tensor:
    return torch.ones(seq, seq).tril().bool()


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [False, True])
def test_a_plain_causal_mask_changes_nothing(model, as_mask, with_positions):
    ids = tiny_ids(2, 9)
    positions = {"position_ids": torch.arange(9)[None]} if with_positions else {}
    assert_same_logits(model(ids, attention_mask=as_mask(causal(9)), **positions).logits, model(ids).logits)


@torch.no_grad()
def test_heads_that_see_different_tokens_are_refused(model, as_mask):
    sees = causal(9).expand(1, model.config.num_attention_heads, 9, 9)
    same = model(tiny_ids(1, 9), attention_mask=as_mask(sees)).logits
    assert_same_logits(same, model(tiny_ids(1, 9)).logits)
    sees = sees.clone()
    sees[0, 1, 5, 4] = False
    with pytest.raises(REFUSALS, match="heads of attention_mask differ"):
        model(tiny_ids(1, 9), attention_mask=as_mask(sees))


@torch.no_grad()
def test_the_router_loss_takes_a_mask_of_each_token(as_mask):
    model, ids = tiny_model(shaped_config(SHAPES[0])), tiny_ids(2, 9)
    plain = model(ids, labels=ids, output_router_logits=True)
    masked = model(ids, labels=ids, output_router_logits=True, attention_mask=as_mask(causal(9)))
    torch.testing.assert_close(masked.loss, plain.loss)
    assert masked.aux_loss > 0


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, "restarting", "going on"])
def test_packed_documents_are_apart(model, as_mask, positions):
    ids = tiny_ids(1, 12)
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = as_mask(causal(12) & (document[:, None] == document))
    given = {
        None: {},
        "restarting": {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]},
        "going on": {"position_ids": torch.arange(12)[None]},
    }[positions]
    packed = model(ids, attention_mask=mask, **given).logits
    assert_same_logits(packed[:, :5], model(ids[:, :5]).logits)
    # Rotary positions are relative, so that the second document need not begin at 0.
    assert_same_logits(packed[:, 5:], model(ids[:, 5:]).logits)


@torch.no_grad()
def test_rows_with_different_documents_are_apart(model, as_mask):
    ids = tiny_ids(2, 12)
    document = torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [1] * 4])
    mask = as_mask((causal(12) & (document[:, :, None] == document[:, None, :]))[:, None])
    packed = model(ids, attention_mask=mask, position_ids=torch.arange(12)[None]).logits
    for row, border in ((0, 5), (1, 8)):
        here = ids[row : row + 1]
        assert_same_logits(packed[row : row + 1, :border], model(here[:, :border]).logits)
        assert_same_logits(packed[row : row + 1, border:], model(here[:, border:]).logits)


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [False, True])
def test_padding_on_the_left_is_not_seen(model, as_mask, with_positions):
    ids = tiny_ids(2, 11)
    is_token = torch.ones(2, 11, dtype=torch.bool)
    is_token[0, :4] = False
    # Padding sees itself, as in transformers' own masks: a row of scores that are all hidden gives no numbers.
    sees = causal(11) & is_token[:, None, None, :] | torch.eye(11, dtype=torch.bool)
    positions = {"position_ids": (is_token.long().cumsum(-1) - 1).clamp_min(0)} if with_positions else {}
    logits = model(ids, attention_mask=as_mask(sees), **positions).logits
    assert_same_logits(logits[:1, 4:], model(ids[:1, 4:]).logits)
    assert_same_logits(logits[1:], model(ids[1:]).logits)


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [False, True])
def test_a_gap_that_sees_itself_is_a_branch_of_its_own(model, as_mask, with_positions):
    ids = tiny_ids(1, 12)
    is_token = torch.ones(12, dtype=torch.bool)
    is_token[5:7] = False
    sees = causal(12) & is_token | torch.eye(12, dtype=torch.bool)
    positions = torch.arange(12)[None]
    given = {"position_ids": positions} if with_positions else {}
    logits = model(ids, attention_mask=as_mask(sees), **given).logits[:, is_token]
    without = model(ids[:, is_token], attention_mask=as_mask(causal(10)), position_ids=positions[:, is_token]).logits
    assert_same_logits(logits, without)


@torch.no_grad()
def test_a_gap_that_does_not_see_itself_is_padding_as_in_a_mask_of_two_dimensions(model, as_mask):
    ids = tiny_ids(1, 12)
    is_token = torch.ones(1, 12, dtype=torch.bool)
    is_token[:, 5:7] = False
    logits = model(ids, attention_mask=as_mask(causal(12) & is_token)).logits
    assert_same_logits(logits[is_token], model(ids, attention_mask=is_token.long()).logits[is_token])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(3, 3), (1, 4, 2), (12, 11)])
def test_a_prefix_is_shared_by_several_answers(model, as_mask, lengths):
    prefix = tiny_ids(1, 5)
    answers = [tiny_ids(1, length, seed=number) for number, length in enumerate(lengths)]
    owner = torch.cat([torch.full((5,), -1), *(torch.full((n,), i) for i, n in enumerate(lengths))])
    sees = causal(len(owner)) & ((owner == owner[:, None]) | (owner == -1))
    positions = torch.cat([torch.arange(5), *(torch.arange(5, 5 + n) for n in lengths)])[None]
    row = torch.cat([prefix, *answers], dim=1)
    logits = model(row, attention_mask=as_mask(sees), position_ids=positions).logits
    for number, answer in enumerate(answers):
        alone = model(torch.cat([prefix, answer], dim=1)).logits
        assert_same_logits(logits[:, :5], alone[:, :5])
        assert_same_logits(logits[:, owner == number], alone[:, 5:])
    # Without positions the attention has other ones, and the memory reads the same.
    gates = model(row, attention_mask=as_mask(sees), output_engram_gates=True).engram_gates[0]
    expected = model(torch.cat([prefix, answers[-1]], dim=1), output_engram_gates=True).engram_gates[0]
    assert_same_logits(gates[:, owner == len(lengths) - 1], expected[:, 5:])


@torch.no_grad()
def test_branches_branch_again_beside_a_row_that_does_not(model, as_mask):
    ids, parent = tiny_ids(2, 9), [None, 0, 1, 1, 2, 3, 3, 4, 7]
    sees = torch.eye(9, dtype=torch.bool).repeat(2, 1, 1)
    for token in range(1, 9):
        sees[0, token] |= sees[0, parent[token]]
    sees[1] = causal(9)
    positions = torch.stack([sees[0].sum(-1) - 1, torch.arange(9)])
    logits = model(ids, attention_mask=as_mask(sees[:, None]), position_ids=positions).logits
    assert_same_logits(logits[1:], model(ids[1:]).logits)
    for token in range(9):
        alone = model(ids[:1, sees[0, token]]).logits[:, -1]
        assert_same_logits(logits[:1, token], alone)


@torch.no_grad()
@pytest.mark.parametrize("prefix_length", [1, 6, 20])
def test_a_tree_of_candidates_behind_a_cache(model, as_mask, prefix_length):
    """What speculative decoding with several candidates does: each sees the prefix, and none the other."""
    prefix, candidates = tiny_ids(1, prefix_length), tiny_ids(1, 4, seed=1)
    cache = DynamicCache(config=model.config)
    model(prefix, cache=cache)
    among = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    sees = torch.cat([torch.ones(4, prefix_length, dtype=torch.bool), among], dim=1)
    positions = torch.tensor([[0, 0, 1, 1]]) + prefix_length
    logits = model(candidates, attention_mask=as_mask(sees), cache=cache, position_ids=positions).logits
    for token in range(4):
        alone = model(torch.cat([prefix, candidates[:, among[token]]], dim=1)).logits[:, -1]
        assert_same_logits(logits[:, token], alone)


@torch.no_grad()
def test_a_token_that_looks_past_padding_or_past_the_last_token_of_a_cache_is_refused(model, as_mask):
    ids, sees = tiny_ids(1, 8), causal(8)
    # A branch behind a gap: position 2 holds no token.
    sees[:, 2] = sees[2, :2] = False
    sees[2, 2] = False
    sees[6:, 5] = False
    with pytest.raises(REFUSALS, match="directly before.* looks past padding"):
        model(ids, attention_mask=as_mask(sees), position_ids=torch.arange(8)[None])
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], cache=cache)
    sees = torch.ones(2, 8, dtype=torch.bool)
    sees[0, 7] = sees[1, 6] = sees[1, 5] = False
    with pytest.raises(REFUSALS, match="directly before"):
        model(ids[:, 6:], attention_mask=as_mask(sees), cache=cache, position_ids=torch.tensor([[6, 5]]))


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_what_follows_a_cache_under_a_plain_mask_is_right(model, as_mask, length, with_positions):
    ids = tiny_ids(2, 6 + length)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], cache=cache)
    positions = {"position_ids": torch.arange(6, 6 + length)[None]} if with_positions else {}
    mask = as_mask(causal(6 + length)[6:])
    logits = model(ids[:, 6:], attention_mask=mask, cache=cache, **positions).logits
    assert_same_logits(logits, model(ids).logits[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [False, True])
def test_a_token_that_sees_nothing_of_a_cache_begins_a_document_or_is_refused(model, as_mask, with_positions):
    ids = tiny_ids(1, 9)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], cache=cache)
    sees = torch.cat([torch.zeros(3, 6, dtype=torch.bool), causal(3)], dim=1)
    positions = {"position_ids": torch.arange(6, 9)[None]} if with_positions else {}

    def behind():
        return model(ids[:, 6:], attention_mask=as_mask(sees), cache=cache, **positions).logits

    right_or_refused(behind, model(ids[:, 6:]).logits, "directly before|Leave the cache out")


@torch.no_grad()
def test_a_prefix_that_sees_itself_in_both_directions_is_no_error(model, as_mask):
    """Every token sees the one before it; that some see later ones is the attention's affair alone."""
    ids = tiny_ids(1, 9)
    sees = causal(9)
    sees[:4, :4] = True
    gates = model(ids, attention_mask=as_mask(sees), output_engram_gates=True).engram_gates[0]
    # The first memory layer comes before all attention.
    assert_same_logits(gates, model(ids, output_engram_gates=True).engram_gates[0])


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_forward_is_right_or_refused_too():
    torch._dynamo.reset()
    model = tiny_model()
    ids = tiny_ids(1, 11)
    compiled = torch.compile(model, backend="aot_eager")
    document = torch.tensor([0] * 5 + [1] * 6)
    mask = (causal(11) & (document[:, None] == document))[None, None]
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    packed = compiled(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_same_logits(packed[:, 5:], model(ids[:, 5:]).logits)
    sees = causal(11)
    sees[8:, 5:8] = False
    with pytest.raises((*REFUSALS, RuntimeError), match="directly before"):
        compiled(ids, attention_mask=sees[None, None], position_ids=torch.arange(11)[None], use_cache=False)

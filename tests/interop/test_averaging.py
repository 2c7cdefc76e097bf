"""A model averaged with itself is itself, by every rule of torch, on every tier, with buffers and without."""

import pytest
import torch
from tiers import TIERS, load, logits_of, right_or_refused
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from engram_hf import active_patches, add_patch, make_patch, remove_patch
from engram_hf.training.trained_rows import TrainedRows


RULES = {
    "mean": {},
    "weights": {"avg_fn": lambda averaged, current, _: 0.9 * averaged + 0.1 * current},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
}


def tables_of(model):
    return model.named_tables().items()


def averaged(model, rule: str, use_buffers: bool, others=()):
    average = AveragedModel(model, use_buffers=use_buffers, **RULES[rule])
    for each in (model, *others, model, model):
        average.update_parameters(each)
    return average


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_model_averaged_with_itself_has_its_logits(rule, use_buffers):
    model = tiny_model()
    assert_same_logits(logits_of(averaged(model, rule, use_buffers)), logits_of(model))


@pytest.mark.parametrize("rule", RULES)
def test_an_average_has_the_patches_of_its_model(rule):
    model = tiny_model()
    plain = logits_of(model)
    rows = {name: (torch.arange(table.num_rows), torch.ones(table.num_rows, 8)) for name, table in tables_of(model)}
    add_patch(model, make_patch(model, "alice", rows))
    average = averaged(model, rule, use_buffers=False).module
    assert_same_logits(logits_of(average), logits_of(model))
    remove_patch(average, "alice")
    assert_same_logits(logits_of(average), plain)
    assert active_patches(model) == ["alice"], "the average has patches of its own"


def test_an_average_of_a_run_that_trains_a_patch_keeps_the_patch_of_its_beginning():
    """Averaging goes over parameters, and rows of a patch are none."""
    model = tiny_model()
    rows = {name: TrainedRows("alice", table) for name, table in tables_of(model)}
    model.begin_patch_training("alice", rows)
    for each in rows.values():
        each.write(torch.arange(40), torch.ones(40, 8))
    average, before = AveragedModel(model), logits_of(model)
    for each in rows.values():
        each.write(torch.arange(40), torch.full((40, 8), 2.0))
    average.update_parameters(model)
    assert_same_logits(logits_of(average.module), before)
    assert not torch.equal(logits_of(model), before)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_token_map_stays_whole_numbers_of_the_same_tokens(rule, use_buffers, tokenizer):
    """torch averages integers in floats and cuts them off: 0.9 * 3 + 0.1 * 3 is 2 then."""
    model = tiny_model(tiny_config(vocab_size=640, engram_compressed_vocab_size="auto"))
    model.bind_tokenizer(tokenizer)
    ids = torch.randint(2, 600, (2, 11))
    try:
        average = averaged(model, rule, use_buffers)
    except RuntimeError as error:
        # This rule of torch's refuses integers.
        assert rule == "swa" and "Integer division with addcdiv" in str(error)
        return
    assert_same_logits(logits_of(average, ids), logits_of(model, ids))
    average.module.bind_tokenizer(tokenizer)


@pytest.mark.parametrize("tier", TIERS)
def test_the_average_of_two_models_is_that_of_their_tensors(tier, tmp_path):
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    expected = tiny_model()
    with torch.no_grad():
        for parameter, first, second in zip(*(m.parameters() for m in (expected, *models)), strict=True):
            parameter.copy_((first + second) / 2)
    loaded = [load(tmp_path / str(number), tier) for number in (0, 1)]

    def mean():
        average = AveragedModel(loaded[0], use_buffers=True)
        for model in loaded:
            average.update_parameters(model)
        return logits_of(average)

    right_or_refused(mean, logits_of(expected), "disk")
    # Neither the models nor their files have changed.
    for number, model in enumerate(models):
        assert torch.equal(logits_of(loaded[number]), logits_of(model))
        assert torch.equal(logits_of(load(tmp_path / str(number))), logits_of(model))


@torch.no_grad()
def test_casting_all_buffers_changes_no_row_that_is_read():
    """What `model.half()` leaves alone, other tools cast: integers of the hash are no numbers to compute with."""
    model, ids = tiny_model(), tiny_ids(2, 11)
    gates = model(ids, output_engram_gates=True).engram_gates[0]
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer.copy_(buffer.to(torch.float32).to(buffer.dtype))
    assert torch.equal(model(ids, output_engram_gates=True).engram_gates[0], gates)

"""The cache is one thing under two names, whatever the installed transformers calls it."""

from functools import partial

import pytest
import torch
from cases import slow
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import MoeModelOutputWithPast

from engram_hf import EngramMoEForSequenceClassification, EngramMoEForTokenClassification
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


NAMES = ["cache", "past_key_values"]
SEQ = 11
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
# Ours take the old name with a warning, as classes of transformers do.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def new_cache(model):
    return DynamicCache(config=model.config)


def test_outputs_hold_the_cache_under_the_name_of_transformers():
    model = tiny_model()
    cache = new_cache(model)
    assert CACHE_NAME in MoeModelOutputWithPast.__dataclass_fields__
    for outputs in (model(tiny_ids(1, 4), **{CACHE_NAME: cache}), model.model(tiny_ids(1, 3), **{CACHE_NAME: cache})):
        assert outputs[CACHE_NAME] is cache and set(NAMES) & set(outputs) == {CACHE_NAME}
    assert cache.get_seq_length() == 7


@torch.no_grad()
@pytest.mark.parametrize("is_compiled", [False, slow(True)])
@pytest.mark.parametrize("first", NAMES)
def test_a_forward_goes_on_with_a_cache_of_either_name(first, is_compiled):
    ids = tiny_ids(2, SEQ)
    model = tiny_model()
    if is_compiled:
        torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager") if is_compiled else model
    for continued, expected in ((forward, model(ids).logits), (model.model, model.model(ids).last_hidden_state)):
        cache = new_cache(model)
        before = continued(ids[:, :5], **{first: cache})[0]
        for name, start, end in (("cache", 5, 6), ("past_key_values", 6, SEQ)):
            before = torch.cat([before, continued(ids[:, start:end], **{name: cache})[0]], dim=1)
        assert_same_logits(before, expected)


@torch.no_grad()
def test_a_forward_takes_the_cache_by_its_place():
    ids = tiny_ids(2, SEQ)
    model = tiny_model()
    cache = model(ids[:, :6], None, None, new_cache(model))[CACHE_NAME]
    assert_same_logits(model(ids[:, 6:], None, None, cache).logits, model(ids).logits[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_class", [EngramMoEForSequenceClassification, EngramMoEForTokenClassification])
def test_a_classifier_goes_on_with_a_cache_of_either_name(model_class, name):
    set_seed(0)
    model = model_class(tiny_config()).eval()
    ids = tiny_ids(1, SEQ)
    cache = new_cache(model)
    model(ids[:, :-1], **{name: cache})
    expected = model(ids).logits
    assert_same_logits(model(ids[:, -1:], **{name: cache}).logits, expected[:, -1:] if expected.ndim == 3 else expected)


def test_a_cache_under_both_names_is_refused():
    model = tiny_model()
    both = {name: new_cache(model) for name in NAMES}
    for forward in (model, model.model):
        with pytest.raises(ValueError, match="Both `cache` and `past_key_values` were given"):
            forward(tiny_ids(1, 3), **both)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_writes_no_cache_twice(name):
    """A cache in a checkpointed layer would be written again by the backward pass."""
    model = tiny_model().train()
    ids = tiny_ids(2, SEQ)
    model(ids, labels=ids).loss.backward()
    expected = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    cache = new_cache(model)
    model(ids, labels=ids, **{name: cache}).loss.backward()
    assert cache.get_seq_length() == 0
    for key, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-5, atol=1e-7, msg=key)


def test_generation_goes_on_with_a_cache_or_says_what_to_call_it():
    model = tiny_model()
    first = model.generate(tiny_ids(1, 7), **NEW, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, tiny_ids(1, 4, seed=9)], dim=1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**both, **NEW, use_cache=False)
    if CACHE_NAME == "past_key_values":
        with pytest.raises(ValueError, match=r"to generate\(\) of transformers .* give `past_key_values`"):
            model.generate(**both, **NEW, cache=first.past_key_values)
    assert torch.equal(model.generate(**both, **NEW, past_key_values=first[CACHE_NAME]), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_evaluation_leaves_the_cache_out_of_predictions(use_cache, tmp_path):
    model = tiny_model()
    examples = [{"input_ids": row, "labels": row} for row in tiny_ids(2, SEQ)]
    model.config.use_cache = use_cache
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True))
    assert trainer.predict(examples).predictions.shape == (2, SEQ, model.config.vocab_size)

"""A model whose memory has no tokenizer yet says so before it is too late."""

import pytest
from tiers import REFUSALS
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import EngramMoEForCausalLM


def unbound_model(**fields):
    return EngramMoEForCausalLM(tiny_config(vocab_size=640, engram_compressed_vocab_size="auto", **fields))


def messages(caplog, recwarn) -> str:
    return "\n".join([*caplog.messages, *(str(warning.message) for warning in recwarn)])


def test_saving_a_model_that_was_never_bound_warns(tmp_path, caplog, recwarn):
    unbound_model().save_pretrained(tmp_path)
    assert "bind_tokenizer" in messages(caplog, recwarn)
    # What was saved is whole, and is bound after loading.
    with pytest.raises(REFUSALS, match="bind_tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)(tiny_ids(1, 3))


@pytest.mark.parametrize("kind", ["bound", "without compression", "without memory"])
def test_saving_any_other_model_warns_of_nothing(kind, tmp_path, tokenizer, caplog, recwarn):
    if kind == "bound":
        model = unbound_model()
        model.bind_tokenizer(tokenizer)
    else:
        model = tiny_model(tiny_config(**({"engram_layer_ids": []} if kind == "without memory" else {})))
    model.save_pretrained(tmp_path)
    assert "bind_tokenizer" not in messages(caplog, recwarn)

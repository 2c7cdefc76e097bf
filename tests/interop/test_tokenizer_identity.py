"""The tokenizer that a model was bound to is known again, also when it has grown; any other one is refused."""

import copy
import json

import pytest
import torch
from tiny import assert_same_logits, tiny_config, tiny_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from engram_hf import build_token_map, push_engram, verify_tables


def bound_model(tokenizer, **fields):
    model = tiny_model(tiny_config(vocab_size=640, engram_compressed_vocab_size="auto", **fields))
    model.bind_tokenizer(tokenizer)
    return model


def rebuilt(tokenizer, change) -> PreTrainedTokenizerFast:
    """The tokenizer after a change of its `tokenizer.json`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content, tokenizer)
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def swap(content, first: str, second: str) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def swap_lonely_tokens(content, tokenizer) -> None:
    """Two ids trade their texts, and neither shares a compressed id: the token map has the same numbers."""
    token_map = build_token_map(tokenizer)
    lonely = [i for i in range(300, 600) if (token_map == token_map[i]).sum() == 1]
    swap(content, *tokenizer.convert_ids_to_tokens(lonely[:2]))


def swap_letters(content, tokenizer) -> None:
    swap(content, "a", "b")


def lowercase(content, tokenizer) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def strip_accents(content, tokenizer) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}


def add_prefix_space(content, tokenizer) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def reverse_merges(content, tokenizer) -> None:
    """All ids keep their texts, and texts are cut into other ones."""
    content["model"]["merges"].reverse()


CHANGES = [swap_lonely_tokens, swap_letters, lowercase, strip_accents, add_prefix_space, reverse_merges]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_gives_other_ids_is_refused(change, tokenizer, tmp_path):
    other = rebuilt(tokenizer, change)
    text = " ".join(["Ábc", "The", *tokenizer.batch_decode(torch.arange(300, 600)[:, None])])
    assert other(text)["input_ids"] != tokenizer(text)["input_ids"]
    model = bound_model(tokenizer)
    fingerprint = copy.copy(model.config.engram_fingerprint)
    with pytest.raises(ValueError, match="tokenizer"):
        model.bind_tokenizer(other)
    assert model.config.engram_fingerprint == fingerprint
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path).bind_tokenizer(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        verify_tables(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        push_engram(tmp_path, "user/model", dry_run=True)
    with pytest.raises(ValueError, match="tokenizer"):
        push_engram(model, "user/model", tokenizer=other, dry_run=True)


def assert_is_accepted(model, tokenizer, folder) -> None:
    """By everything that asks, before and after saving."""
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    verify_tables(folder)
    again = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded.bind_tokenizer(again)
    push_engram(folder, "user/model", dry_run=True)
    push_engram(loaded, "user/model", tokenizer=again, dry_run=True)
    ids = torch.randint(2, 600, (2, 9))
    assert_same_logits(loaded(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*resized.*")
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("kind", ["word", "special", "chat"])
def test_tokens_added_after_binding_are_no_other_tokenizer(kind, resized, tokenizer, tmp_path):
    model, grown = bound_model(tokenizer), copy.deepcopy(tokenizer)
    ids = torch.randint(2, 600, (2, 9))
    expected = model(ids).logits
    if kind == "word":
        grown.add_tokens(["<brand-new>", "Class"])
    elif kind == "special":
        grown.add_special_tokens({"sep_token": "<sep>", "extra_special_tokens": ["<tool>"]})
    else:
        grown.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
        grown.chat_template = "{{ messages }}"
    if resized:
        model.resize_token_embeddings(660, mean_resizing=False)
    assert_same_logits(model(ids).logits[..., :640], expected)
    assert_is_accepted(model, grown, tmp_path / "grown")


@pytest.mark.parametrize("way", ["saved", "copied", "chat template", "padding side"])
def test_the_same_tokenizer_in_another_dress_is_accepted(way, tokenizer, tmp_path):
    model, same = bound_model(tokenizer), copy.deepcopy(tokenizer)
    if way == "saved":
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        same = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    elif way == "chat template":
        same.chat_template = "{{ messages }}"
    elif way == "padding side":
        # What a call leaves behind in the backend.
        same.padding_side = "left"
        same(["a", "much longer text"], padding=True, truncation=True, max_length=3)
    assert_is_accepted(model, same, tmp_path / "model")

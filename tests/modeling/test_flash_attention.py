"""Flash attention needs a GPU. Here the two functions of its library are written out, and what is around them, masks,
padding and borders of documents, is transformers' and ours."""

import sys
from types import ModuleType

import pytest
import torch
from architectures import tiny_backbone, with_memory
from tiny import SHAPES, assert_same_logits, shaped_config, tiny_ids, tiny_model
from transformers import DataCollatorWithFlattening, DynamicCache, modeling_flash_attention_utils


def attend(query, key, value, softmax_scale):
    """One sequence, (tokens, heads, width) each; causal, the last query beside the last key."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    hidden = torch.ones(scores.shape[1:]).triu(scores.shape[2] - scores.shape[1] + 1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the flash functions that ran."""
    ran: list[str] = []

    def flash(query, key, value, causal=False, softmax_scale=None, dropout_p=0.0):
        ran.append("flash")
        assert causal or query.shape[1] == 1
        return torch.stack([attend(*rows, softmax_scale) for rows in zip(query, key, value, strict=True)])

    def varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **rest):
        ran.append("varlen")
        assert rest.pop("causal") or max_seqlen_q == 1
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        found = [
            attend(query[a:b], key[c:d], value[c:d], rest["softmax_scale"])
            for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
        ]
        return torch.cat(found)

    library, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    library.flash_attn_func, library.flash_attn_varlen_func, library.flash_attn_with_kvcache = flash, varlen, None
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return ran


@pytest.fixture(params=[*SHAPES, "llama"], ids=str)
def models(request):
    """The same model with SDPA, which other tests prove, and with flash attention; or a Llama with an added memory."""
    if request.param == "llama":
        sdpa, flash = (
            with_memory(tiny_backbone("llama", attn_implementation="sdpa", num_key_value_heads=4)) for _ in range(2)
        )
    else:
        sdpa, flash = (tiny_model(shaped_config(request.param)) for _ in range(2))
    flash.config._attn_implementation = "flash_attention_2"
    return sdpa, flash


@torch.no_grad()
def test_a_batch_and_its_tokens_one_by_one(models, calls):
    sdpa, flash = models
    ids, cache = tiny_ids(2, 11), DynamicCache(config=flash.config)
    expected = sdpa(ids).logits
    assert_same_logits(flash(ids).logits, expected)
    pieces = [flash(ids[:, start:end], cache=cache).logits for start, end in [(0, 6), (6, 10), (10, 11)]]
    assert_same_logits(torch.cat(pieces, dim=1), expected)
    assert calls == ["flash"] * 12


@torch.no_grad()
def test_padding_on_the_left(models, calls):
    sdpa, flash = models
    ids = tiny_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for where in ({}, {"position_ids": positions}):
        batch = {"input_ids": ids, "attention_mask": mask, **where}
        assert_same_logits(flash(**batch).logits[:, 4:], sdpa(**batch).logits[:, 4:])
    prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(flash.generate(**prompt), sdpa.generate(**prompt))
    assert set(calls) == {"varlen"}


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [True, False])
def test_documents_without_padding(models, calls, with_positions):
    sdpa, flash = models
    documents = [tiny_ids(1, length, seed=length) for length in (4, 1, 9, 5)]
    expected = torch.cat([sdpa(document).logits for document in documents], dim=1)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=with_positions)
    batch = collator([{"input_ids": document[0].tolist()} for document in documents])
    assert_same_logits(flash(**{**batch, "labels": None}).logits, expected)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    assert_same_logits(flash(torch.cat(documents, dim=1), position_ids=positions).logits, expected)
    assert calls == ["varlen"] * 6

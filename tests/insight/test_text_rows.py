"""Rows of text: what a user has becomes tokens with the name of their document, and a batch changes nothing."""

import pytest
import torch
from architectures import tiny_backbone, with_memory
from datasets import Dataset
from tiny import tiny_ids, tiny_model

from engram_hf.insight import read_rows
from engram_hf.insight.intervals import interval
from engram_hf.insight.text_rows import batches, evaluating, losses_of_rows, rows_for


def tokens_of(data, **given) -> list[tuple[list[int], str]]:
    return [(row.ids.tolist(), row.document) for row in read_rows(data, **given)]


def test_what_trainer_takes_is_read_as_it_stands():
    columns = {"input_ids": [[5, 6, 7], [8, 9]], "document": ["a", "b"]}
    expected = [([5, 6, 7], "a"), ([8, 9], "b")]
    assert tokens_of(Dataset.from_dict(columns)) == expected
    assert tokens_of(Dataset.from_dict(columns).with_format("torch")) == expected
    assert tokens_of({"input_ids": ids, "document": name} for ids, name in expected) == expected
    assert tokens_of(torch.tensor([[1, 2], [3, 4]])) == [([1, 2], "row 0"), ([3, 4], "row 1")]


def test_padding_is_taken_out_and_labels_say_what_counts():
    ids, mask, labels = [0, 0, 5, 6, 7], [0, 0, 1, 1, 1], [-100, -100, -100, 6, 7]
    (row,) = read_rows([{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    assert row.ids.tolist() == [5, 6, 7] and row.is_scored.tolist() == [False, True, True]


def test_a_packed_row_is_cut_into_its_documents():
    row = {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 0, 1, 2]}
    assert tokens_of([row]) == [([5, 6], "row 0, document 0"), ([7, 8, 9], "row 0, document 1")]
    assert tokens_of([{**row, "document": "a"}]) == [([5, 6], "a"), ([7, 8, 9], "a")]


def test_a_text_is_tokenized_and_cut(tokenizer):
    text = "The list is a mutable sequence, and so is the array."
    ids = tokenizer(text)["input_ids"]
    found = tokens_of([text, {"text": "x y", "document": "named"}], tokenizer=tokenizer, longest_text=4)
    assert [token for part, name in found if name == "row 0" for token in part] == ids
    assert max(len(part) for part, _ in found) == 4 and found[-1][1] == "named"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("a text", "data is one str"),
        ([], "data has no tokens"),
        ([[]], "data has no tokens"),
        (["a text"], "Row 0 of data is a text"),
        ([{"words": 3}], r"columns \['words'\]"),
        ([[1.5, 2.0]], "must be a list of integers"),
        ([[[1, 2], [3, 4]]], r"of shape \(2, 2\)"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
    ],
)
def test_what_is_no_text_is_refused_with_a_sentence(data, told):
    with pytest.raises(ValueError, match=told):
        list(read_rows(data))


def test_batches_hold_each_row_once_and_no_more_tokens_than_they_may():
    lengths = [3, 9, 4, 4, 4, 1, 30, 2]
    rows = list(read_rows([list(range(1, length + 1)) for length in lengths]))
    found = list(batches(rows, most_tokens=12))
    assert [int(row.sum()) for batch in found for row in batch.is_token] == lengths
    assert all(batch.input_ids.numel() <= 12 or len(batch.input_ids) == 1 for batch in found)
    assert any(batch.attention_mask is None and len(batch.input_ids) > 1 for batch in found)


@pytest.mark.parametrize("kind", ["engram_moe", "llama"])
def test_the_losses_of_batched_rows_are_those_of_the_rows_alone(kind):
    model = tiny_model() if kind == "engram_moe" else with_memory(tiny_backbone(kind))
    data = [tiny_ids(1, seq, seed=seq)[0].tolist() for seq in (7, 3, 12, 2)]
    expected = []
    for ids in data:
        log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].detach().double().log_softmax(-1)
        expected.append(-sum(float(log_probs[place, ids[place + 1]]) for place in range(len(ids) - 1)))
    losses, tokens = losses_of_rows(model, rows_for(model, data))
    torch.testing.assert_close(losses, torch.tensor(expected).double(), atol=1e-4, rtol=0)
    assert tokens.tolist() == [6, 2, 11, 1]


def test_a_model_that_was_training_goes_on_training():
    model = tiny_model().train()
    model.model.layers[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert model.training and not model.model.layers[1].training


def test_an_interval_draws_whole_documents():
    generator = torch.Generator().manual_seed(0)
    of_documents = torch.randn(50, generator=generator)
    differences, names = of_documents.repeat_interleave(20), [f"{i}" for i in range(50) for _ in range(20)]
    mean, low, high = interval(differences, names)
    # As wide as that of 50 numbers, and not of 1,000.
    half = 1.96 * float(of_documents.std()) / 50**0.5
    assert abs(mean - float(of_documents.mean())) < 1e-6
    assert 0.85 * half < mean - low < 1.15 * half and 0.85 * half < high - mean < 1.15 * half


def test_a_row_of_more_tokens_counts_for_more():
    differences, names = torch.tensor([1.0, 4.0]), ["a", "b"]
    assert interval(differences, names, torch.tensor([3, 1]))[0] == pytest.approx((3 * 1.0 + 4.0) / 4)
    long = interval(torch.tensor([1.0, 1.0, 1.0, 4.0]), ["a", "a", "a", "b"])
    assert interval(differences, names, torch.tensor([3, 1])) == pytest.approx(long)

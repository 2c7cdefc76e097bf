"""Token ids from embeddings: exact, or an error that names the position."""

import pytest
import torch

from engram_hf.modeling import ids_reach
from engram_hf.modeling.ids_reach import recover_token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ids_come_back_in_every_dtype(dtype):
    weight = torch.randn(500, 16).to(dtype)
    ids = torch.randint(500, (3, 40))
    assert torch.equal(recover_token_ids(weight[ids], weight), ids)


def test_a_matrix_is_read_in_slices(monkeypatch):
    monkeypatch.setattr(ids_reach, "ELEMENTS_AT_ONCE", 64)
    weight = torch.randn(101, 16)
    ids = torch.randint(101, (1, 33))
    assert torch.equal(recover_token_ids(weight[ids], weight), ids)


def test_zero_of_either_sign_is_one_value():
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert recover_token_ids(torch.tensor([[[2.0, -0.0], [-0.0, 1.0]]]), weight).tolist() == [[1, 0]]


def test_an_unknown_or_ambiguous_row_is_refused():
    weight = torch.randn(9, 4)
    with pytest.raises(ValueError, match="batch 0, position 1 matches no row"):
        recover_token_ids(torch.stack([weight[3], weight[3] + 0.1]).unsqueeze(0), weight)
    weight[5] = weight[2]
    assert recover_token_ids(weight[None, 3:4], weight).tolist() == [[3]]
    with pytest.raises(ValueError, match="batch 0, position 0 matches more than one row"):
        recover_token_ids(weight[None, 2:3], weight)

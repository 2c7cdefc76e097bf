"""Without memory layers and with one stream the model is DeepseekV3 of transformers, whatever it is given."""

import pytest
import torch
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache


@pytest.fixture(scope="module")
def models():
    """(ours, the same weights in a stock model)."""
    model = tiny_model(tiny_config(engram_layer_ids=[], hc_mult=1))
    fields = model.config.to_dict()
    shared = set(DeepseekV3Config().to_dict()) & set(fields) - {"model_type", "architectures", "auto_map", "dtype"}
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**{name: fields[name] for name in shared})).eval()
    stock.load_state_dict(model.state_dict())
    return model, stock


def causal(seq: int) -> torch.Tensor:
    return torch.ones(seq, seq).tril().bool()


def shared_prefix() -> torch.Tensor:
    sees = causal(11)
    sees[8:, 5:8] = False
    return sees


POSITIONS = torch.cat([torch.arange(8), torch.arange(5, 8)])[None]
MASK = torch.ones(2, 11, dtype=torch.int64)
MASK[0, :3] = 0
INPUTS = {
    "plain": {},
    "padded": {"attention_mask": MASK},
    "padded, with positions": {"attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp_min(0)},
    "packed": {"position_ids": torch.cat([torch.arange(5), torch.arange(6)])[None], "use_cache": False},
    "packed in a mask": {
        "attention_mask": (causal(11) & ((torch.arange(11) < 5)[:, None] == (torch.arange(11) < 5)))[None, None]
    },
    "shared prefix": {"attention_mask": shared_prefix()[None, None], "position_ids": POSITIONS},
    "shared prefix, no positions": {"attention_mask": shared_prefix()[None, None]},
}


@torch.no_grad()
@pytest.mark.parametrize("name", INPUTS)
def test_a_forward_gives_the_logits_of_a_stock_model(models, name):
    ids, (model, stock) = tiny_ids(2, 11), models
    expected, actual = (each(ids, **INPUTS[name]).logits for each in (stock, model))
    seen = torch.ones_like(ids, dtype=torch.bool) if "padded" not in name else MASK.bool()
    assert_same_logits(actual[seen], expected[seen])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["going on", "jumping", "tree"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_what_follows_a_cache_has_the_logits_of_a_stock_model(models, cache_class, kind):
    ids, sees = tiny_ids(1, 8), torch.ones(2, 8, dtype=torch.bool)
    sees[0, 7] = False
    if kind == "tree":
        sees[1, 6] = False
    positions = {"going on": [6, 7], "jumping": [9, 10], "tree": [6, 6]}[kind]
    found = []
    for model in models:
        room = {"max_cache_len": 8} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **room)
        model(ids[:, :6], cache=cache)
        found.append(
            model(
                ids[:, 6:], cache=cache, attention_mask=sees[None, None], position_ids=torch.tensor([positions])
            ).logits
        )
    assert_same_logits(*found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"assistant_early_exit": 1},
    ],
)
def test_generation_gives_the_tokens_of_a_stock_model(models, options):
    ids = tiny_ids(1, 7)
    found = [model.generate(ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, **options) for model in models]
    assert torch.equal(*found)


@torch.no_grad()
def test_embeddings_of_no_token_are_taken(models):
    embeddings = torch.randn(2, 7, 32)
    assert_same_logits(*(model(inputs_embeds=embeddings).logits for model in models))

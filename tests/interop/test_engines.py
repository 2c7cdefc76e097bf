"""What serving engines and special ways of decoding do: the tokens of a plain greedy decoding, or a sentence."""

import pytest
import torch
from tiers import REFUSALS, logits_of
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("layers", [[0, 2], [1, 2], [2], [0]])
def test_early_exit_gives_the_greedy_tokens_or_says_that_it_cannot(layers, exit_layer):
    model, ids = tiny_model(tiny_config(engram_layer_ids=layers)), tiny_ids(1, 9)
    expected, fields = model.generate(ids, **NEW), model.config.to_dict()
    try:
        actual = model.generate(ids, assistant_early_exit=exit_layer, **NEW)
    except REFUSALS as error:
        assert "assistant_early_exit" in str(error)
    else:
        assert torch.equal(actual, expected)
    # Whatever came of it, the model is as it was.
    assert model.config.to_dict() == fields
    assert torch.equal(model.generate(ids, **NEW), expected)


def test_a_model_with_fewer_layers_than_its_config_said_is_whole():
    """What an early exit changes for a while, others change for good, to try a model without its last layers."""
    model, ids = tiny_model(tiny_config(engram_layer_ids=[0])), tiny_ids(1, 9)
    shorter = tiny_model(tiny_config(engram_layer_ids=[0], num_hidden_layers=2))
    shorter.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.2.")}
    )
    model.config.num_hidden_layers = 2
    assert_same_logits(logits_of(model, ids), logits_of(shorter, ids))


@pytest.mark.parametrize("layers", [[], [0, 2]])
def test_continuous_batching_is_refused(layers):
    model = tiny_model(tiny_config(engram_layer_ids=layers))
    with pytest.raises(REFUSALS, match="Continuous batching is not supported.*Call generate"):
        model.generate_batch([[5, 6, 7]])
    with pytest.raises(REFUSALS, match="Continuous batching is not supported"):
        model.continuous_batching_context_manager()
    # `transformers serve` looks for this name, and where it is missing answers one request after another.
    assert not hasattr(model, "init_continuous_batching")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_stock_model_with_this_attention_is_not_batched_continuously_either():
    """When this fails, transformers has learned it, and models without memory layers can do it too.

    With a cache as small as the test: without limits transformers takes most of the machine's memory.
    """
    fields = tiny_config(engram_layer_ids=[], hc_mult=1).to_dict()
    shared = set(DeepseekV3Config().to_dict()) & set(fields) - {"model_type", "architectures", "auto_map", "dtype"}
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**{name: fields[name] for name in shared})).eval()
    outputs = stock.generate_batch(
        [[5, 6, 7]],
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=8, max_batch_tokens=32, use_cuda_graph=False, use_async_batching=False
        ),
        warmup=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == [[]]


@pytest.fixture
def vllm_attention(monkeypatch):
    """vLLM's Transformers backend registers its kernels under this name and sets it in the config."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", sdpa_attention_forward)


def test_vllm_is_refused_where_there_is_a_memory(vllm_attention):
    """It keeps no cache of ours, and calls the model token by token: the memory would see no history."""
    model = tiny_model()
    model.config._attn_implementation = "vllm"
    with pytest.raises(REFUSALS, match="vLLM"):
        model(tiny_ids(1, 1), position_ids=torch.tensor([[7]]), use_cache=False)
    built = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(REFUSALS, match="vLLM"):
        built.base_model(tiny_ids(1, 1), position_ids=torch.tensor([[7]]), use_cache=False)


def test_vllm_takes_a_model_without_memory(vllm_attention):
    model, ids = tiny_model(tiny_config(engram_layer_ids=[])), tiny_ids(1, 5)
    expected = logits_of(model, ids)
    model.config._attn_implementation = "vllm"
    assert_same_logits(logits_of(model, ids, use_cache=False), expected)

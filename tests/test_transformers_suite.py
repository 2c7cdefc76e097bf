"""Transformers' own common model tests, from a checkout named by TRANSFORMERS_CHECKOUT; see CONTRIBUTING.md.

The classes below say which model is tested and what its cache holds, nothing else.
"""

import copy
import importlib
import os
import sys
import unittest

import pytest
import torch
from transformers.models.auto import modeling_auto

from engram_hf import (
    EngramMoEConfig,
    EngramMoEForCausalLM,
    EngramMoEForSequenceClassification,
    EngramMoEForTokenClassification,
    EngramMoEModel,
)
from engram_hf.modeling.memory_layer import IDS


CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("needs a checkout of transformers, named by TRANSFORMERS_CHECKOUT", allow_module_level=True)
sys.path.insert(0, CHECKOUT)
suite = importlib.import_module("tests.causal_lm_tester")

# The suite finds the labels of a model by class name, in tables that hold only models of transformers.
for mapping, model in [
    (modeling_auto.MODEL_MAPPING_NAMES, EngramMoEModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, EngramMoEForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, EngramMoEForSequenceClassification),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, EngramMoEForTokenClassification),
]:
    mapping["engram_moe"] = model.__name__


class OneStreamTester(suite.CausalLMModelTester):
    config_class = EngramMoEConfig
    base_model_class = EngramMoEModel
    causal_lm_class = EngramMoEForCausalLM
    sequence_classification_class = EngramMoEForSequenceClassification
    token_classification_class = EngramMoEForTokenClassification
    streams = 1

    def get_config(self):
        fields = {
            name: getattr(self, name)
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
            + ("intermediate_size", "moe_intermediate_size", "num_experts_per_tok", "hidden_act")
            + ("max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
        }
        return EngramMoEConfig(
            **fields,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            tie_word_embeddings=False,
            hc_mult=self.streams,
            hc_sinkhorn_iters=3,
            engram_layer_ids=[1],
            engram_vocab_size=101,
            engram_n_heads=2,
            engram_head_dim=8,
            engram_block_elements=1000,
            engram_compressed_vocab_size=None,
        )


def without_memory(cache):
    """A cache with the layers of the attention alone, and the layer of the memory, which stands behind them."""
    attention = copy.copy(cache)
    attention.layers = cache.layers[:-1]
    return attention, cache.layers[-1]


class FourStreamsTester(OneStreamTester):
    streams = 4


class OneStreamTest(suite.CausalLMModelTest, unittest.TestCase):
    model_tester_class = OneStreamTester
    pipeline_model_mapping: dict = {}

    # The suite's hooks for caches of models that keep more than keys and values.
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        attention, state = without_memory(past_key_values)
        super()._check_past_key_values_for_generate(batch_size, attention, seq_length, config)
        channels = config.hc_mult * config.hidden_size
        assert state.past(IDS).shape == (batch_size, config.engram_max_ngram_size - 1)
        assert state.past(1).shape == (batch_size, config.engram_conv_reach, channels)

    def _check_caches_are_equal(self, cache1, cache2):
        (attention1, state1), (attention2, state2) = without_memory(cache1), without_memory(cache2)
        super()._check_caches_are_equal(attention1, attention2)
        assert all(torch.equal(state1.past(name), state2.past(name)) for name in (IDS, 1))

    @unittest.skip("opens model.safetensors by name: tables lie in files of their own, so there is always an index")
    def test_load_save_without_tied_weights(self):
        pass

    @unittest.skip("as above: overwrites model.safetensors by name")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


class FourStreamsTest(OneStreamTest):
    model_tester_class = FourStreamsTester

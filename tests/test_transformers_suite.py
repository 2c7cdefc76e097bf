"""Transformers' own common model tests, from a checkout named by TRANSFORMERS_CHECKOUT; see CONTRIBUTING.md.

The classes below say which model is tested and what its cache holds, nothing else.
"""

import importlib
import os
import sys
import unittest

import pytest
from transformers.models.auto import modeling_auto

from engram_hf import (
    EngramMoEConfig,
    EngramMoEForCausalLM,
    EngramMoEForSequenceClassification,
    EngramMoEForTokenClassification,
    EngramMoEModel,
)


CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("needs a checkout of transformers, named by TRANSFORMERS_CHECKOUT", allow_module_level=True)
sys.path.insert(0, CHECKOUT)
suite = importlib.import_module("tests.causal_lm_tester")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

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


class FourStreamsTester(OneStreamTester):
    streams = 4


class OneStreamTest(suite.CausalLMModelTest, unittest.TestCase):
    model_tester_class = OneStreamTester
    pipeline_model_mapping: dict = {}

    def _get_conv_state_shape(self, batch_size, config):
        # The suite's hook for what a hybrid layer keeps: the last ids, and the inputs of the convolution.
        channels = config.hc_mult * config.hidden_size
        return [(batch_size, config.engram_max_ngram_size - 1), (batch_size, channels, config.engram_conv_reach)]

    @unittest.skip("opens model.safetensors by name: tables lie in files of their own, so there is always an index")
    def test_load_save_without_tied_weights(self):
        pass

    @unittest.skip("as above: overwrites model.safetensors by name")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


class FourStreamsTest(OneStreamTest):
    model_tester_class = FourStreamsTester

"""Engram memory for Hugging Face Transformers.

Importing the package registers EngramMoE with the Auto classes, and does nothing else.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .hub.quantizing import quantize_tables
from .hub.verifying import verify_tables
from .modeling.configuration_engram_moe import EngramMoEConfig
from .modeling.modeling_engram_moe import (
    EngramMoEForCausalLM,
    EngramMoEForSequenceClassification,
    EngramMoEForTokenClassification,
    EngramMoEModel,
)
from .modeling.ngram_hashing import NgramHash, build_token_map
from .planning import count_parameters, estimate_memory
from .training.balancing import LossFreeBalancingCallback


__version__ = "0.1.0.dev0"

AutoConfig.register(EngramMoEConfig.model_type, EngramMoEConfig)
AutoModel.register(EngramMoEConfig, EngramMoEModel)
AutoModelForCausalLM.register(EngramMoEConfig, EngramMoEForCausalLM)
AutoModelForSequenceClassification.register(EngramMoEConfig, EngramMoEForSequenceClassification)
AutoModelForTokenClassification.register(EngramMoEConfig, EngramMoEForTokenClassification)

__all__ = [
    "EngramMoEConfig",
    "EngramMoEForCausalLM",
    "EngramMoEForSequenceClassification",
    "EngramMoEForTokenClassification",
    "EngramMoEModel",
    "LossFreeBalancingCallback",
    "NgramHash",
    "build_token_map",
    "count_parameters",
    "estimate_memory",
    "quantize_tables",
    "verify_tables",
]

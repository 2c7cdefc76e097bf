"""Engram memory for Hugging Face Transformers.

Importing the package registers EngramMoE with transformers' Auto classes, and does nothing else. Nearly all of its time
is that of importing torch and transformers, which registration needs; the command is therefore outside the package.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .adapters.added_memory import (
    add_engram,
    disable_engram,
    freeze_backbone,
    record_gates,
    remove_engram,
    set_engram,
)
from .adapters.facts import Fact
from .adapters.lora import lora_config
from .adapters.memorizing import forget, memorize, memorize_many
from .adapters.memory_class import EngramMemoryConfig, EngramMemoryForCausalLM, EngramMemoryModel
from .adapters.memory_config import EngramConfig
from .adapters.memory_saving import load_engram, save_engram
from .adapters.open_tables import open_tables
from .adapters.other_tables import engram_tables, load_with_tables, place_tables, prefetch
from .adapters.patch_making import ComparedRows, compare_patches, extract_patch, merge_patch
from .adapters.row_patches import (
    active_patches,
    add_patch,
    disable_patches,
    load_patch,
    make_patch,
    remove_patch,
    save_patch,
    set_patches,
    use_patches,
)
from .checkpoints.inspecting import inspect_checkpoint
from .checkpoints.merging import merge_changed_rows
from .checkpoints.quantizing import quantize_tables
from .checkpoints.verifying import verify_tables
from .hub.card import CardFacts, gather_facts, read_facts, render_card, update_card
from .hub.fetching import fetch_blocks
from .hub.patch_pushing import push_patch
from .hub.pushing import push_engram
from .insight.plotting import plot_training
from .modeling.configuration_engram_moe import EngramMoEConfig
from .modeling.ids_hashing import NgramHash, build_token_map
from .modeling.modeling_engram_moe import (
    EngramMoEForCausalLM,
    EngramMoEForSequenceClassification,
    EngramMoEForTokenClassification,
    EngramMoEModel,
)
from .modeling.table_patches import PatchedRows, RowPatch
from .planning import count_parameters, estimate_memory
from .training.callbacks.balancing import LossFreeBalancingCallback
from .training.callbacks.best_patch import EngramBestPatchCallback
from .training.callbacks.gate_statistics import EngramGateStatisticsCallback
from .training.callbacks.prefetching import EngramPrefetchCallback
from .training.callbacks.reporting import report_to_trackers
from .training.callbacks.row_statistics import EngramRowStatisticsCallback
from .training.checkpoints import last_complete_checkpoint
from .training.optimizers import engram_optimizers
from .training.row_rules import RowAdam, RowSGD, RowwiseAdagrad, RowwiseAdam


__version__ = "0.1.0.dev0"

AutoConfig.register(EngramMoEConfig.model_type, EngramMoEConfig)
AutoModel.register(EngramMoEConfig, EngramMoEModel)
AutoModelForCausalLM.register(EngramMoEConfig, EngramMoEForCausalLM)
AutoModelForSequenceClassification.register(EngramMoEConfig, EngramMoEForSequenceClassification)
AutoModelForTokenClassification.register(EngramMoEConfig, EngramMoEForTokenClassification)
# Models with an added memory, as they are saved.
AutoConfig.register(EngramMemoryConfig.model_type, EngramMemoryConfig)
AutoModel.register(EngramMemoryConfig, EngramMemoryModel)
AutoModelForCausalLM.register(EngramMemoryConfig, EngramMemoryForCausalLM)

__all__ = [
    "CardFacts",
    "ComparedRows",
    "EngramBestPatchCallback",
    "EngramConfig",
    "EngramGateStatisticsCallback",
    "EngramMemoryConfig",
    "EngramMemoryForCausalLM",
    "EngramMemoryModel",
    "EngramMoEConfig",
    "EngramMoEForCausalLM",
    "EngramMoEForSequenceClassification",
    "EngramMoEForTokenClassification",
    "EngramMoEModel",
    "EngramPrefetchCallback",
    "EngramRowStatisticsCallback",
    "Fact",
    "LossFreeBalancingCallback",
    "NgramHash",
    "PatchedRows",
    "RowAdam",
    "RowPatch",
    "RowSGD",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "active_patches",
    "add_engram",
    "add_patch",
    "build_token_map",
    "compare_patches",
    "count_parameters",
    "disable_engram",
    "disable_patches",
    "engram_optimizers",
    "engram_tables",
    "estimate_memory",
    "extract_patch",
    "fetch_blocks",
    "forget",
    "freeze_backbone",
    "gather_facts",
    "inspect_checkpoint",
    "last_complete_checkpoint",
    "load_engram",
    "load_patch",
    "load_with_tables",
    "lora_config",
    "make_patch",
    "memorize",
    "memorize_many",
    "merge_changed_rows",
    "merge_patch",
    "open_tables",
    "place_tables",
    "plot_training",
    "prefetch",
    "push_engram",
    "push_patch",
    "quantize_tables",
    "read_facts",
    "record_gates",
    "remove_engram",
    "remove_patch",
    "render_card",
    "report_to_trackers",
    "save_engram",
    "save_patch",
    "set_engram",
    "set_patches",
    "update_card",
    "use_patches",
    "verify_tables",
]

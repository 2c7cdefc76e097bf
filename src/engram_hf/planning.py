"""Sizes before anything is allocated: parameters of a config, those a token computes with, the share of the memory.

Counts a model on the meta device, so a config of any size costs milliseconds and no memory.
"""

from dataclasses import dataclass

import torch

from .modeling.configuration_engram_moe import EngramMoEConfig
from .modeling.modeling_engram_moe import EngramMoEForCausalLM


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, counted as the paper does.

    total: everything, a tied vocabulary matrix once.
    active: what one token computes with: no vocabulary matrix, no table, and of the routed experts the chosen ones.
    tables: rows times width, over all memory layers.
    routed_experts: all experts a router chooses from.
    """

    total: int
    active: int
    tables: int
    routed_experts: int

    @property
    def memory_share(self) -> float:
        """Tables as a part of the sparse budget, which is what a token does not compute with; best at 0.2 to 0.25."""
        sparse = self.total - self.active
        return self.tables / sparse if sparse else 0.0


def count_parameters(config: EngramMoEConfig) -> ParameterCount:
    """Count the parameters of the causal language model of a config.

    Example:
        >>> round(count_parameters(EngramMoEConfig.preset("engram-27b")).memory_share, 2)
        0.25
    """
    with torch.device("meta"):
        model = EngramMoEForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    tables = sum(size for name, size in sizes.items() if ".engram.table." in name)
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    vocabulary = sum(size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name)
    unused = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    return ParameterCount(total, total - tables - vocabulary - unused, tables, routed)

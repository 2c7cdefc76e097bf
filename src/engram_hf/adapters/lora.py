"""Which weights of an EngramMoE LoRA adapts through PEFT. Tables are never among them: train their rows instead.

PEFT keeps such a list for each architecture that it knows, and this one is not in it.
"""

from typing import Any


ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# In an EngramMoE, and in memories of any name that were added to another model.
MEMORY = (r"engram\.key_proj", r"engram\.value_proj", r"engram\.\w+\.key_proj", r"engram\.\w+\.value_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# One parameter holds all experts of a layer, so PEFT takes these as parameters and not as modules.
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def lora_config(attention: bool = True, memory: bool = True, experts: bool = False, **options: Any):
    """A `peft.LoraConfig` for an EngramMoE, or for a model that a memory was added to.

    Args:
        attention: adapt all projections of the attention.
        memory: adapt the projections of keys and values in the memory layers, those of every memory that a model has.
        experts: adapt the routed experts (`target_parameters`), the shared ones and the dense layers.
        options: of `LoraConfig`: r, lora_alpha, lora_dropout, ...

    Raises:
        ImportError: PEFT is not installed.
        ValueError: attention, memory and experts are all False.

    Example:
        >>> from peft import get_peft_model
        >>> adapted = get_peft_model(model, lora_config(r=16))
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'engram-hf[train]'.") from error
    modules = [*ATTENTION * attention, *MEMORY * memory, *FEED_FORWARD * experts]
    if not modules:
        raise ValueError("attention, memory and experts are all False, so there is nothing to adapt. Set one of them.")
    # A string is a pattern of whole names, which a list of endings cannot express for memories of any name.
    defaults: dict[str, Any] = {"target_modules": rf"(.*\.)?({'|'.join(modules)})", "task_type": "CAUSAL_LM"}
    if experts:
        defaults["target_parameters"] = list(EXPERTS)
    return LoraConfig(**{**defaults, **options})

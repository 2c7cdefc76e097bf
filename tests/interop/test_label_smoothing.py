"""Trainer shifts labels under smoothing for this model as for a stock one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_ids, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments


def stock_model():
    config = DeepseekV3Config(
        vocab_size=99, hidden_size=32, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


def adapted_model():
    return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["value_proj"], task_type="CAUSAL_LM")).eval()


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Each token is asked for the next one."""
    log_probabilities = logits[:, :-1].log_softmax(-1).flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    kept = wanted != -100
    nll = -log_probabilities[kept, wanted[kept]].mean()
    return (1 - epsilon) * nll - epsilon * log_probabilities[kept].mean()


@pytest.mark.parametrize("build", [stock_model, tiny_model, adapted_model])
def test_smoothed_labels_are_those_of_the_next_token(build, tmp_path):
    model, ids = build(), tiny_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    with torch.no_grad():
        loss = Trainer(model, args).compute_loss(model, {"input_ids": ids, "labels": labels.clone()})
        torch.testing.assert_close(loss, smoothed_loss(model(input_ids=ids).logits, labels, 0.1))

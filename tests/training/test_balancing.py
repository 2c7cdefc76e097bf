"""Loss-free balancing under the stock Trainer."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_config, tiny_ids
from transformers import Trainer, TrainingArguments

from engram_hf import EngramMoEForCausalLM, LossFreeBalancingCallback, lora_config


def train(model, tmp_path, callback, **arguments):
    ids = tiny_ids(16, 12)
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(tmp_path), report_to=[], save_strategy="no", per_device_train_batch_size=4, use_cpu=True, **arguments
    )
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()


def routers(model):
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_bias_moves_by_the_rate_towards_experts_that_saw_less(tmp_path, accumulation):
    model = EngramMoEForCausalLM(tiny_config())
    chosen = {router: [] for router in routers(model)}
    for router in chosen:
        router.register_forward_hook(lambda module, _, outputs: chosen[module].append(outputs[-1].detach().clone()))
    train(model, tmp_path, LossFreeBalancingCallback(0.01), max_steps=1, gradient_accumulation_steps=accumulation)
    for router, indices in chosen.items():
        assert len(indices) == accumulation
        seen = torch.cat([each.flatten() for each in indices]).bincount(minlength=4).float()
        expected = 0.01 * torch.sign(seen.mean() - seen)
        assert torch.equal(router.e_score_correction_bias, expected) and expected.any()


def imbalance(model) -> float:
    """Load of the busiest expert over the mean load, the worst of all routers."""
    loads = []
    hooks = [
        router.register_forward_hook(lambda _, __, out: loads.append(out[-1].flatten().bincount(minlength=4).float()))
        for router in routers(model)
    ]
    with torch.no_grad():
        model(tiny_ids(16, 12))
    for hook in hooks:
        hook.remove()
    return max((load.max() / load.mean()).item() for load in loads)


def test_experts_are_balanced_without_a_loss(tmp_path):
    model = EngramMoEForCausalLM(tiny_config())
    with torch.no_grad():
        for router in routers(model):
            router.e_score_correction_bias[0] += 0.2
    before = imbalance(model)
    train(model, tmp_path, LossFreeBalancingCallback(0.01), max_steps=40, learning_rate=0.0)
    assert before > 1.9 and imbalance(model) < 1.5


def test_evaluation_is_not_counted():
    model, callback = EngramMoEForCausalLM(tiny_config()), LossFreeBalancingCallback()
    callback.on_train_begin(None, None, None, model=model)
    model.eval()(tiny_ids(2, 6))
    assert not any(counts.any() for counts in callback.choices.values())
    model.train()(tiny_ids(2, 6))
    assert all(counts.sum() == 2 * 6 * 2 for counts in callback.choices.values())


def test_hooks_are_gone_after_training(tmp_path):
    model, callback = EngramMoEForCausalLM(tiny_config()), LossFreeBalancingCallback()
    train(model, tmp_path, callback, max_steps=1)
    assert not callback.choices and not any(router._forward_hooks for router in routers(model))


def test_a_model_without_experts_and_a_rate_of_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no router"):
        train(EngramMoEForCausalLM(tiny_config(first_k_dense_replace=3)), tmp_path, LossFreeBalancingCallback())
    adapted = get_peft_model(EngramMoEForCausalLM(tiny_config()), lora_config(r=2))
    with pytest.raises(ValueError, match="an adapter does not save"):
        train(adapted, tmp_path, LossFreeBalancingCallback())
    with pytest.raises(ValueError, match="above 0, got 0"):
        LossFreeBalancingCallback(0)

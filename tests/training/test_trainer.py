"""The stock Trainer: accumulation, resuming bit for bit, and PEFT on the projections of the memory."""

import pytest
import torch
from cases import slow
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import Trainer, TrainingArguments

from engram_hf import EngramMoEForCausalLM, LossFreeBalancingCallback


def trainer(model, folder, **arguments):
    data = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 12)]
    args = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, learning_rate=1e-2, max_grad_norm=1.0, logging_steps=1, **arguments
    )
    return Trainer(model, args, train_dataset=data, callbacks=[LossFreeBalancingCallback()])


@pytest.mark.parametrize("elements", [slow(500), 10**9])
def test_accumulated_small_batches_train_like_one_large_batch(tmp_path, elements):
    config = tiny_config(engram_block_elements=elements)
    models = [tiny_model(config) for _ in range(2)]
    for model, (batch, accumulation) in zip(models, [(8, 1), (2, 4)], strict=True):
        trainer(
            model,
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            # Adam divides by the size of a gradient, and would make rounding of tiny ones as large as a step.
            optim="sgd",
        ).train()
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    arguments = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4}
    unbroken = tiny_model()
    trainer(unbroken, tmp_path, **arguments).train()
    resumed = tiny_model(seed=1)
    trainer(resumed, tmp_path, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, one), (_, other) in zip(unbroken.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_trainer_saves_what_from_pretrained_loads(tmp_path, tokenizer):
    model = EngramMoEForCausalLM(tiny_config(vocab_size=640, engram_compressed_vocab_size="auto"))
    model.bind_tokenizer(tokenizer)
    run = trainer(model, tmp_path, max_steps=2, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "last"))
    loaded = EngramMoEForCausalLM.from_pretrained(tmp_path / "last").eval()
    ids = tiny_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_lora_on_the_projections_of_the_memory_trains_and_merges():
    model = tiny_model()
    tables = [block.clone() for table in model.model.tables() for block in table.blocks]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["key_proj", "value_proj"], init_lora_weights=False))
    ids = tiny_ids(2, 9)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    expected = adapted(input_ids=ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    after = [block for table in model.model.tables() for block in table.blocks]
    assert all(torch.equal(a, b) for a, b in zip(tables, after, strict=True))

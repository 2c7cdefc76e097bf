"""The small models of train_tiny.py and compare_memory.py, and how they are trained.

The shape follows the paper's Engram-27B (arXiv 2601.07372): the first layer is dense, the second layer has a memory, a
quarter of the sparse budget is in its tables, and tables have five times the learning rate.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, set_seed

from engram_hf import (
    EngramGateStatisticsCallback,
    EngramMoEConfig,
    EngramMoEForCausalLM,
    EngramPrefetchCallback,
    EngramRowStatisticsCallback,
    LossFreeBalancingCallback,
    count_parameters,
)
from helpers.recipe import make_arguments, row_trainer
from helpers.text import gather_documents, load_documents, packed_dataset, split_documents, train_tokenizer


PRESETS = {
    # 4.3 million parameters, 0.9 of them active.
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "n_routed_experts": 32,
        "hc_mult": 2,
        "engram_layer_ids": [1],
        "engram_vocab_size": 6700,
        "engram_n_heads": 4,
    },
    # 21 million parameters, 3 of them active.
    "small": {
        "vocab_size": 8192,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "intermediate_size": 576,
        "moe_intermediate_size": 96,
        "n_routed_experts": 48,
        "hc_mult": 4,
        "engram_layer_ids": [1, 3],
        "engram_vocab_size": 8800,
        "engram_n_heads": 8,
    },
}
STEPS = {"tiny": 400, "small": 1500}
SEQ_LENGTH = 128
ROWS_PER_STEP = 16
HELD_OUT_ROWS = 512
# About 8,000 tokens: two seconds for each part of a memory that is silenced.
MEASURED_DOCUMENTS, MEASURED_CHARACTERS = 48, 500
LEARNING_RATE = 4e-3
WATCHING = (EngramPrefetchCallback, EngramGateStatisticsCallback, EngramRowStatisticsCallback)


def prepare_text(dataset: str | None, preset: str):
    """Tokenizer, rows to train on and rows held out, of a data set or of Python's standard library.

    Raises:
        ValueError: there is no such text, or too little of it.
    """
    train, held_out = split_documents(load_documents(dataset) if dataset else gather_documents())
    tokenizer = train_tokenizer(train, PRESETS[preset]["vocab_size"])
    rows = packed_dataset(tokenizer, held_out, SEQ_LENGTH).shuffle(seed=0)
    return tokenizer, packed_dataset(tokenizer, train, SEQ_LENGTH), rows.select(range(min(len(rows), HELD_OUT_ROWS)))


def held_out_documents(dataset: str | None) -> list[dict[str, str]]:
    """The beginnings of the first documents that `prepare_text` holds out, for measurements over documents."""
    _, held_out = split_documents(load_documents(dataset) if dataset else gather_documents())
    return [{"document": name, "text": text[:MEASURED_CHARACTERS]} for name, text in held_out[:MEASURED_DOCUMENTS]]


def make_config(preset: str, tokenizer, **overrides) -> EngramMoEConfig:
    fields = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 512,
        # The default of 20 takes a quarter of the time, and so few streams are balanced after 5.
        "hc_sinkhorn_iters": 5,
        "engram_head_dim": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return EngramMoEConfig(**{**fields, **PRESETS[preset], **overrides})


def parameters_of_expert(config: EngramMoEConfig) -> int:
    """Three matrices, and its row of the router."""
    return config.hidden_size * (3 * config.moe_intermediate_size + 1)


def without_memory(make: Callable[..., EngramMoEConfig]) -> EngramMoEConfig:
    """The mixture of experts whose parameters, total and active, are as equal as whole experts and channels allow.

    Args:
        make: makes the config with a memory; it takes fields that are changed.
    """
    engram = make()
    wanted = count_parameters(engram)
    expert_layers = engram.num_hidden_layers - engram.first_k_dense_replace
    n_routed_experts = engram.n_routed_experts + round(wanted.tables / (expert_layers * parameters_of_expert(engram)))
    fields = {"engram_layer_ids": [], "n_routed_experts": n_routed_experts}
    missing = wanted.active - count_parameters(make(**fields)).active
    width = engram.intermediate_size + round(missing / (3 * engram.hidden_size * engram.first_k_dense_replace))
    return make(**fields, intermediate_size=width)


def freeze_tables(model: EngramMoEForCausalLM, at_zero: bool) -> None:
    """Tables that cannot learn: zeros, or rows as they were drawn."""
    for table in model.base_model.tables():
        for block in table.blocks:
            block.requires_grad_(False)
            if at_zero:
                torch.nn.init.zeros_(block)


def make_model(config: EngramMoEConfig, tokenizer, seed: int) -> EngramMoEForCausalLM:
    set_seed(seed)
    model = EngramMoEForCausalLM(config)
    # Raw token ids need no map.
    if config.engram_layer_ids and config.engram_compressed_vocab_size is not None:
        model.bind_tokenizer(tokenizer)
    return model


def make_trainer(
    model, train: Dataset, held_out: Dataset, output: Path, steps: int, seed: int, tokenizer=None
) -> Trainer:
    """The stock Trainer, with tables trained row by row. With a tokenizer, callbacks watch gates and rows."""
    fields = {"weight_decay": 0.1, "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "prediction_loss_only": True}
    arguments = make_arguments(output, steps, seed, ROWS_PER_STEP, LEARNING_RATE, **fields)
    return row_trainer(
        model,
        arguments,
        train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[LossFreeBalancingCallback(), *(callback() for callback in WATCHING if tokenizer is not None)],
    )


def held_out_loss(trainer: Trainer, model=None) -> float:
    """Mean loss per token, in nats, of the trainer's model or of another one."""
    if model is not None:
        trainer = Trainer(model, trainer.args, eval_dataset=trainer.eval_dataset)
    return trainer.evaluate()["eval_loss"]

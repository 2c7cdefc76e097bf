"""TRL's SFTTrainer, with packed rows and with padding-free batches, trains rows like the dense rule does."""

import pytest
import torch
from datasets import Dataset
from dense_rows import DenseReference
from tiny import tiny_config, tiny_model
from trl import SFTConfig, SFTTrainer

from engram_hf import EngramGateStatisticsCallback, EngramRowStatisticsCallback, engram_optimizers


TEXTS = [f"def f{i}(x):\n    return x + {i}\n" + "    # why not\n" * (i % 5) for i in range(48)]
# TRL warns that only flash attention keeps packed documents apart; this model reads their positions.
pytestmark = pytest.mark.filterwarnings("ignore")


def made_model(tokenizer):
    config = tiny_config(
        vocab_size=640, engram_compressed_vocab_size="auto", engram_table_dtype="float64", engram_vocab_size=499
    )
    model = tiny_model(config).double()
    model.bind_tokenizer(tokenizer)
    model.set_experts_implementation("eager")
    return model


def train(folder, tokenizer, dense, **changes):
    args = SFTConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        adam_epsilon=1e-4,
        max_length=None if changes.get("padding_free") else 64,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **changes,
    )
    model = made_model(tokenizer)
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        optimizers=(DenseReference(model, args, "adam"), None) if dense else (None, None),
        optimizer_cls_and_kwargs=None if dense else engram_optimizers(args),
        callbacks=[] if dense else [EngramGateStatisticsCallback(every=1), EngramRowStatisticsCallback(every=1)],
    )
    batches = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    return model, history, batches


@pytest.mark.parametrize("way", [{}, {"packing": True}, {"padding_free": True}])
def test_sft_trains_rows_like_the_dense_rule(tmp_path, tokenizer, way):
    ours, history, batches = train(tmp_path, tokenizer, dense=False, **way)
    theirs, expected, _ = train(tmp_path, tokenizer, dense=True, **way)
    torch.testing.assert_close(*([line["loss"] for line in h] for h in (history, expected)), rtol=1e-5, atol=1e-5)
    mine = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(mine[name], weight, rtol=1e-5, atol=1e-5)
    # Documents are told apart by positions that begin again, or by padding.
    positions = batches[0].get("position_ids")
    assert (positions is not None and int((positions == 0).sum()) > len(positions)) == bool(way)
    assert all("engram/gate_mean/layer_0" in line and "engram/rows_touched/layer_2" in line for line in history)

"""TRL's SFTTrainer, with packed rows and with padding-free batches, trains rows like the dense rule does."""

import pytest
import torch
from cases import slow
from sft import sft_trainer
from tiny import tiny_config, tiny_model

from engram_hf import EngramGateStatisticsCallback, EngramRowStatisticsCallback


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
    model = made_model(tokenizer)
    callbacks = [EngramGateStatisticsCallback(every=1), EngramRowStatisticsCallback(every=1)]
    given = {"dense": dense, "callbacks": [] if dense else callbacks, "max_steps": 6, **changes}
    trainer = sft_trainer(model, folder, tokenizer, **given)
    batches = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    return model, history, batches


@pytest.mark.parametrize("way", [slow({}), slow({"packing": True}), {"padding_free": True}])
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

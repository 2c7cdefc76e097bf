"""Training steps of engram-peft, for bench_training.py, which runs this file in an environment of its own.

    python scripts/benchmarks/bench_training.py --engram-peft ENV/bin/python       Python 3.12, engram-peft==1.2.7

The backbone is EngramMoE without memory layers. The table has as many rows of the same width before the same layer, and
engram-peft's own trainer updates it by SparseAdam. Prints what bench_training.py reads: milliseconds and losses.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from engram_peft import EngramConfig, EngramTrainer, get_engram_model


# The package is not installed in that environment.
SCRIPTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent / "src")]


def main() -> None:
    from helpers.timed_training import CONFIG, SMALL, STEPS, Watch, made_arguments, random_tokens

    from engram_hf import EngramMoEConfig, EngramMoEForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(0)
    backbone = EngramMoEForCausalLM(EngramMoEConfig(**CONFIG, engram_layer_ids=[]))
    heads = CONFIG["engram_n_heads"]
    config = EngramConfig(
        # Divided among the heads of an order.
        engram_vocab_size_per_ngram=[SMALL * heads, SMALL * heads],
        ngram_sizes=[2, 3],
        n_head_per_ngram=heads,
        embedding_dim=2 * heads * CONFIG["engram_head_dim"],
        enable_tokenizer_compression=False,
        compressed_vocab_size=CONFIG["vocab_size"],
        target_layers=[1],
        hidden_size=CONFIG["hidden_size"],
        pad_id=0,
        hc_mult=1,
        use_sparse_embeddings=True,
        learning_rate_multiplier=1.0,
    )
    model = get_engram_model(backbone, config, train_mode="full_finetune")
    rows = [p for n, p in model.named_parameters() if p.numel() > 10_000_000]
    print("table:", [tuple(p.shape) for p in rows], file=sys.stderr)
    ids = random_tokens()
    watch = Watch(is_cold=False)
    with tempfile.TemporaryDirectory() as folder:
        args = made_arguments(folder, STEPS)
        trainer = EngramTrainer(
            model=model,
            args=args,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[watch],
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps([watch.milliseconds, losses, [], []]))


if __name__ == "__main__":
    main()

"""TRL's SFTTrainer on functions of several lengths, for tests that compare rows with the dense rule."""

from datasets import Dataset
from dense_rows import DenseReference
from trl import SFTConfig, SFTTrainer

from engram_hf import engram_optimizers


TEXTS = [f"def f{i}(x):\n    return x + {i}\n" + "    # why not\n" * (i % 5) for i in range(48)]


def sft_trainer(model, folder, tokenizer, dense: bool, callbacks=(), **changes) -> SFTTrainer:
    """With rows, or with the dense rule written once more."""
    args = SFTConfig(
        str(folder),
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
    return SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        optimizers=(DenseReference(model, args, "adam"), None) if dense else (None, None),
        optimizer_cls_and_kwargs=None if dense else engram_optimizers(args),
        callbacks=list(callbacks),
    )

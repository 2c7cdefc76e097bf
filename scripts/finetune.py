"""Fine-tune any EngramMoE: tables resident, in host memory or on disk, trained or frozen; all of the backbone or LoRA.

    python scripts/finetune.py output/tiny --dataset notes.txt --output output/mine          all of the model
    python scripts/finetune.py output/tiny --dataset notes.txt --output output/mine --table-tier disk --lora 16
    python scripts/finetune.py output/tiny --sft chats.jsonl --output output/chat            chats, with TRL

The demo's model takes a minute for 100 steps on two cores. A run that was killed goes on with --resume. Chats are rows
with `messages`, or with `prompt` and `completion`, and need a tokenizer with a chat template.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from gather_text import DATASET_HELP, TABLE_FILES, load_documents, packed_dataset, split_documents
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from engram_hf import (
    EngramGateStatisticsCallback,
    EngramPrefetchCallback,
    EngramRowStatisticsCallback,
    LossFreeBalancingCallback,
    engram_optimizers,
    last_complete_checkpoint,
    lora_config,
    plot_training,
)


TIERS = ("resident", "host", "disk")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of an EngramMoE")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, curves and the model")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--dataset", help=DATASET_HELP)
    text.add_argument("--sft", help="chats: a .jsonl or .parquet file, or a data set of the Hub (needs trl)")
    parser.add_argument("--table-tier", choices=TIERS, default="resident", help="where tables live (default: resident)")
    parser.add_argument("--row-optimizer", choices=("adam", "rowwise_adam", "adagrad", "sgd"), default="adam")
    parser.add_argument("--freeze-tables", action="store_true", help="train the backbone alone")
    parser.add_argument("--lora", type=int, metavar="RANK", help="adapt the backbone instead of training it")
    parser.add_argument("--lora-experts", action="store_true", help="also adapt experts and dense layers")
    parser.add_argument("--backbone", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--save-steps", type=int, help="(default: a quarter of the steps)")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in --output")
    parser.add_argument("--report-to", nargs="*", default=[], help="trackers, such as tensorboard or trackio")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.lora_experts and not arguments.lora:
        parser.error("--lora-experts needs --lora RANK")
    if arguments.steps < 1 or arguments.lora is not None and arguments.lora < 1:
        parser.error("--steps and --lora must be at least 1")
    return arguments


def load_model(arguments: argparse.Namespace, last: str | None):
    device = 0 if torch.accelerator.is_available() else "cpu"
    tier = {"resident": device, "host": "cpu", "disk": "disk"}[arguments.table_tier]
    config = AutoConfig.from_pretrained(arguments.model)
    tables = {f"model.layers.{layer}.engram.table": tier for layer in config.engram_layer_ids}
    # From the checkpoint itself: its tables then stay where they are, in its own files.
    source = last if last is not None and not arguments.lora else arguments.model
    model = AutoModelForCausalLM.from_pretrained(source, device_map={"": device, **tables})
    if arguments.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(r=arguments.lora, experts=arguments.lora_experts))
    base = model.get_base_model() if arguments.lora else model
    for table in base.base_model.tables():
        # Quantized rows cannot be trained.
        if table.dtype.is_floating_point:
            table.requires_grad_(not arguments.freeze_tables)
    return model, base


def make_trainer(arguments: argparse.Namespace, model, base, tokenizer) -> Trainer:
    fields = {
        "output_dir": str(arguments.output),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(arguments.steps // 20, 1),
        "logging_steps": max(arguments.steps // 10, 1),
        "save_steps": arguments.save_steps or max(arguments.steps // 4, 1),
        "save_total_limit": 2,
        "report_to": arguments.report_to,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "disable_tqdm": not sys.stderr.isatty(),
        "seed": arguments.seed,
    }
    callbacks = [EngramPrefetchCallback(), EngramGateStatisticsCallback(), EngramRowStatisticsCallback()]
    # Of an adapter the routers are no part.
    if not arguments.lora and any(hasattr(module, "e_score_correction_bias") for module in base.modules()):
        callbacks.append(LossFreeBalancingCallback())
    if arguments.sft:
        try:
            from trl import SFTConfig, SFTTrainer
        except ImportError as error:
            raise SystemExit("--sft needs TRL: pip install 'engram-hf[sft]'") from error
        if tokenizer.chat_template is None:
            raise SystemExit(f"The tokenizer of {arguments.model} has no chat template; set tokenizer.chat_template.")
        path = Path(arguments.sft)
        local = {"path": TABLE_FILES.get(path.suffix, "json"), "data_files": str(path)}
        data = load_dataset(**(local if path.is_file() else {"path": arguments.sft}), split="train")
        args = SFTConfig(**fields, max_length=arguments.seq_length, packing=True, bf16=torch.cuda.is_available())
        kind, evaluated = SFTTrainer, None
    else:
        try:
            parts = split_documents(load_documents(arguments.dataset))
            data, evaluated = (packed_dataset(tokenizer, part, arguments.seq_length) for part in parts)
        except (ValueError, OSError) as error:
            raise SystemExit(f"--dataset: {error}") from error
        args, kind = TrainingArguments(**fields), Trainer
    rows = engram_optimizers(
        args, arguments.row_optimizer, backbone=arguments.backbone, work_folder=arguments.output / "work"
    )
    return kind(
        model,
        args,
        train_dataset=data,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=rows,
    )


def main():
    arguments = parse_arguments()
    last = last_complete_checkpoint(arguments.output) if arguments.resume else None
    # Trainer would train one step more.
    if last is not None and int(last.rsplit("-", 1)[1]) >= arguments.steps:
        raise SystemExit(f"{last} has all of --steps {arguments.steps}; --resume goes on with more.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model, base = load_model(arguments, last)
    trainer = make_trainer(arguments, model, base, tokenizer)
    before = trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else None
    trainer.train(resume_from_checkpoint=last)
    if before is not None:
        print(f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    final = arguments.output / "model"
    if arguments.lora and arguments.freeze_tables:
        model.save_pretrained(final)
    else:
        # Rows are no part of an adapter: with tables trained too, it is merged into the model it was trained on.
        (model.merge_and_unload() if arguments.lora else model).save_pretrained(final)
    tokenizer.save_pretrained(final)
    trainer.save_state()
    print(f"model in {final}, curves in {plot_training(arguments.output)}")


if __name__ == "__main__":
    main()

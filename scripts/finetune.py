"""Fine-tune an EngramMoE on your own text. `make demo` makes the model of these examples.

    python scripts/finetune.py output/tiny --dataset README.md --output output/mine          the whole model
    python scripts/finetune.py output/tiny --dataset README.md --output output/lora --lora 16 --table-tier disk
    python scripts/finetune.py output/tiny --sft your.jsonl --output output/chat             chats, with TRL

100 steps of the demo's model take a minute on two cores. Tables can be resident, in host memory or on disk, and they
can be trained or frozen. The backbone is trained as a whole or by LoRA. A run that was stopped goes on with --resume.

Chats are rows with `messages`, or with `prompt` and `completion`. They need a tokenizer with a chat template.
"""

import argparse
import logging
from pathlib import Path

import torch
from datasets import load_dataset
from helpers.console import choose_threads, show_one_line
from helpers.folders import find_model, refuse_used
from helpers.text import DATASET_HELP, TABLE_FILES, load_documents, packed_dataset, split_documents
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
    report_to_trackers,
)


TIERS = ("resident", "host", "disk")
# An adapter begins at zero and needs a larger rate than weights that are trained already.
LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 2e-3
HELD_OUT_ROWS = 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of an EngramMoE")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, curves and the model")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--dataset", help=DATASET_HELP)
    text.add_argument("--sft", help="chats: a .jsonl or .parquet file, or a data set of the Hub (needs trl)")
    parser.add_argument("--table-tier", choices=TIERS, default="resident", help="where tables live (default: resident)")
    rules = ("adam", "rowwise_adam", "adagrad", "sgd")
    parser.add_argument("--row-optimizer", choices=rules, default="adam", help="trains the rows (default: adam)")
    parser.add_argument("--freeze-tables", action="store_true", help="train the backbone only")
    parser.add_argument("--lora", type=int, metavar="RANK", help="adapt the backbone by LoRA instead of training it")
    parser.add_argument("--lora-experts", action="store_true", help="adapt experts and dense layers too")
    parser.add_argument(
        "--backbone", choices=("adamw", "muon"), default="adamw", help="optimizer of the backbone (default: adamw)"
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of text a step (default: 8)")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens of a row (default: 128)")
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"of the backbone; tables get five times as much (default: {LEARNING_RATE:g}, with --lora "
        f"{LORA_LEARNING_RATE:g})",
    )
    parser.add_argument("--save-steps", type=int, help="steps between checkpoints (default: a quarter of --steps)")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in --output")
    parser.add_argument(
        "--report-to", nargs="*", default=[], help="trackers, such as tensorboard or trackio (default: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text (default: 0)")
    arguments = parser.parse_args()
    if arguments.learning_rate is None:
        arguments.learning_rate = LORA_LEARNING_RATE if arguments.lora else LEARNING_RATE
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
    # Loaded from the checkpoint itself, tables stay in the checkpoint's own files.
    source = last if last is not None and not arguments.lora else arguments.model
    model = AutoModelForCausalLM.from_pretrained(source, device_map={"": device, **tables})
    if arguments.lora:
        from peft import get_peft_model

        options = {"r": arguments.lora, "lora_alpha": 2 * arguments.lora}
        model = get_peft_model(model, lora_config(experts=arguments.lora_experts, **options))
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
        # helpers/console.py shows the progress.
        "disable_tqdm": True,
        "seed": arguments.seed,
    }
    callbacks = [EngramPrefetchCallback(), EngramGateStatisticsCallback(), EngramRowStatisticsCallback()]
    # An adapter does not save the routers' bias.
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
        evaluated = evaluated.select(range(min(len(evaluated), HELD_OUT_ROWS)))
        args, kind = TrainingArguments(**fields), Trainer
    rows = engram_optimizers(
        args, arguments.row_optimizer, backbone=arguments.backbone, work_folder=arguments.output / "work"
    )
    trainer = kind(
        model,
        args,
        train_dataset=data,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=rows,
    )
    show_one_line(trainer)
    if arguments.report_to:
        report_to_trackers(trainer)
    return trainer


def find_start(arguments: argparse.Namespace) -> str | None:
    """The checkpoint to go on from, or None for a run from the beginning.

    Raises:
        ValueError: the model does not exist, the output folder is in use, or all steps are done.
    """
    if arguments.output.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output {arguments.output} is the folder of the model itself; name another folder.")
    if not arguments.resume:
        refuse_used(arguments.output, "add --resume or name another folder")
    find_model(arguments.model)
    if not arguments.resume:
        return None
    last = last_complete_checkpoint(arguments.output)
    if last is None:
        refuse_used(arguments.output, "no checkpoint in it is complete; name another folder", ("checkpoint", "work"))
        print(f"{arguments.output} holds no complete checkpoint, so the run begins at step 0.")
    # Trainer would train one step more.
    elif int(last.rsplit("-", 1)[1]) >= arguments.steps:
        raise ValueError(f"{last} has all of --steps {arguments.steps}; --resume goes on with more.")
    return last


def is_not_about_tied_weights(record: logging.LogRecord) -> bool:
    """A log filter. Trainer misses the output matrix of a tied model, which is saved once, as the embeddings."""
    return "missing keys in the checkpoint model loaded: ['lm_head.weight']" not in record.getMessage()


def main() -> None:
    arguments = parse_arguments()
    choose_threads()
    try:
        last = find_start(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    try:
        run(arguments, last)
    except KeyboardInterrupt:
        last = last_complete_checkpoint(arguments.output)
        go_on = f"--resume goes on from {last}" if last else "no checkpoint was saved yet"
        raise SystemExit(f"\nStopped; {go_on}.") from None


def run(arguments: argparse.Namespace, last: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model, base = load_model(arguments, last)
    if base.config.tie_word_embeddings:
        logging.getLogger("transformers.trainer").addFilter(is_not_about_tied_weights)
    trainer = make_trainer(arguments, model, base, tokenizer)
    before = trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else None
    trainer.train(resume_from_checkpoint=last)
    if before is not None:
        print(f"held-out loss {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")
    final = arguments.output / "model"
    if arguments.lora and arguments.freeze_tables:
        model.save_pretrained(final)
    else:
        # An adapter holds no rows. Where tables were trained too, it is merged into its model and all of it is saved.
        (model.merge_and_unload() if arguments.lora else model).save_pretrained(final)
    tokenizer.save_pretrained(final)
    trainer.save_state()
    print(f"model in {final}, curves in {plot_training(arguments.output)}")


if __name__ == "__main__":
    main()

"""One process of a run over ranks, which writes the most memory that it had. Not a test."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import tiny_ids
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from engram_hf import engram_optimizers


# Of the rows that a rank holds; of more, blocks would be written whole.
CHANGED_SHARE = 0.45


class TouchesRows(TrainerCallback):
    """After the first step, every row has a state, and nearly half of the rows have changed."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != 1:
            return
        for updates in getattr(optimizer, "optimizer", optimizer).rows.values():
            for store in updates.stores.values():
                for part in store.split(2**14):
                    part.fill_(0.5)
            table = updates.table
            for block in table.block_records:
                ids = torch.arange(block.first_row, block.first_row + int(CHANGED_SHARE * block.num_rows))
                for part in ids.split(2**14):
                    table.write_rows(part, table.gather_held(part) + 1)


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    tier, rank = options["tier"], int(os.environ["RANK"])
    entries = {"": "cpu", "...table": tier} if tier in ("host", "disk") else None
    model = AutoModelForCausalLM.from_pretrained(options["base"], device_map=entries, engram_ranks="shard")
    args = TrainingArguments(
        str(out / "run"),
        max_steps=options["steps"],
        save_steps=options["steps"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(32, 9)],
        optimizer_cls_and_kwargs=engram_optimizers(args, "adam", work_folder=out / "work"),
        callbacks=[TouchesRows()],
    )
    trainer.train(resume_from_checkpoint=options["resume"])
    state = [store for updates in trainer.optimizer.optimizer.rows.values() for store in updates.stores.values()]
    status = Path("/proc/self/status").read_text().split()
    result = {
        "most_bytes": 1024 * int(status[status.index("VmHWM:") + 1]),
        "state_bytes": sum(store.nbytes for store in state),
        "touched_rows": [int((store != 0).flatten(1).any(-1).sum()) for store in state],
    }
    (out / f"memory{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

"""One optimizer for a model with tables: a dense optimizer for the backbone, row updates for the tables.

Trainer builds it through its own argument, so no subclass of Trainer is needed:

    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=engram_optimizers(args))

Learning rate, weight decay, betas, schedule and `optim` come from `TrainingArguments`. How a row moves is in
row_rules.py, where its state lives in row_updates.py; the dense optimizers are in dense_parts.py.
"""

import hashlib
import re
from collections import ChainMap
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from ..modeling.checkpoint_saving import numbers_of_files
from ..modeling.table import EngramTable
from ..modeling.table_changes import TrainingRun
from ..modeling.table_patches import is_patch_name
from .dense_parts import (
    DensePart,
    MatrixPart,
    check_values,
    dense_part,
    errors_of_the_backbone,
    groups_by_decay,
    matrices_of_backbone,
    values_of,
)
from .row_exchange import RowExchange
from .row_rules import RowAdam, RowRule, RowSGD, RowwiseAdagrad, RowwiseAdam
from .row_updates import RowUpdates
from .trained_rows import TrainedRows


# Steps after which a table that has not moved is worth a warning.
STEPS_WITHOUT_GRADIENT = 10
# torch's DistributedDataParallel reads this attribute of a model.
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
# In a saved state: a digest of the names of all that it holds. What a file has lost would begin anew without a word.
CONTENTS = "contents"
# They step inside the backward and keep no gradients, so rows could not be clipped together with the backbone.
FUSED_INTO_BACKWARD = ("lomo", "adalomo")
# They sort the parameters of the whole model by themselves.
LOW_RANK = ("galore", "apollo")

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.get_logger(__name__)


def engram_optimizers(
    args: "TrainingArguments",
    row_optimizer: str | RowRule = "adam",
    table_lr_scale: float = 5.0,
    backbone: str = "adamw",
    work_folder: str | Path | None = None,
    state_dtype: torch.dtype | None = None,
    train_as_patch: str | None = None,
) -> tuple[type, dict]:
    """Make the value of Trainer's `optimizer_cls_and_kwargs` that trains tables row by row, on any tier.

    Args:
        args: the arguments of the same Trainer. They are read when Trainer makes its optimizer, so a sweep may change
            them after this call.
        row_optimizer: "adam" (lazy Adam, as in the paper), "rowwise_adam", "adagrad" (row-wise) or "sgd" (with
            momentum); or a rule with values of your own, such as RowSGD(momentum=0.5).
        table_lr_scale: rows learn at this many times the learning rate. Tables have no weight decay.
        backbone: "adamw" trains all dense parameters with the optimizer that `args.optim` names. "muon" trains
            matrices of the backbone and the projections of the memory with torch.optim.Muon, at step sizes like
            AdamW's, and the rest with `args.optim`.
        work_folder: folder for the training copies of tables on disk, and for the state of their rows.
        state_dtype: type of the state that a row optimizer keeps per weight. None means bfloat16 for bfloat16 tables,
            and float32 for others.
        train_as_patch: name of a new row patch. Rows are trained in it, and the tables are never written to. Each
            checkpoint holds the patch in `patch.safetensors`; a table on disk needs no copy.

    Raises:
        ValueError: a value that is not listed here. Trainer raises it where train_as_patch meets several memories.

    Example:
        >>> args = TrainingArguments("output", learning_rate=4e-4)
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=engram_optimizers(args))
    """
    if not isinstance(row_optimizer, RowRule) and row_optimizer not in ROW_RULES:
        raise ValueError(f"row_optimizer must be one of {sorted(ROW_RULES)} or a RowRule, got {row_optimizer!r}.")
    if backbone not in ("adamw", "muon"):
        raise ValueError(f'backbone must be "adamw" or "muon", got {backbone!r}.')
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {state_dtype}.")
    if not table_lr_scale > 0:
        raise ValueError(
            f"table_lr_scale must be above 0, got {table_lr_scale}. To leave tables as they are, freeze them."
        )
    if train_as_patch is not None and not is_patch_name(train_as_patch):
        raise ValueError(
            f'train_as_patch must be the name of a new patch, such as "alice", got {train_as_patch!r:.80}.'
        )
    return EngramOptimizerFactory, {
        "args": args,
        "row_optimizer": row_optimizer,
        "table_lr_scale": table_lr_scale,
        "backbone": backbone,
        "work_folder": work_folder,
        "state_dtype": state_dtype,
        "train_as_patch": train_as_patch,
    }


ROW_RULES: dict[str, Callable[["TrainingArguments"], RowRule]] = {
    "adam": lambda args: RowAdam((args.adam_beta1, args.adam_beta2), args.adam_epsilon),
    "rowwise_adam": lambda args: RowwiseAdam((args.adam_beta1, args.adam_beta2), args.adam_epsilon),
    "adagrad": lambda args: RowwiseAdagrad(),
    "sgd": lambda args: RowSGD(),
}


class EngramOptimizerFactory:
    """Trainer calls an instance with its model; see `engram_optimizers` for the arguments."""

    def __call__(
        self,
        model: nn.Module,
        *,
        args: "TrainingArguments",
        row_optimizer: str | RowRule,
        table_lr_scale: float,
        backbone: str,
        work_folder: str | Path | None,
        state_dtype: torch.dtype | None,
        train_as_patch: str | None = None,
    ) -> "EngramOptimizer":
        refuse_unsupported(args, backbone)
        tables = find_tables(model)
        if any(table.ranks is not None for table in tables.values()) and args.world_size != dist.get_world_size():
            raise ValueError(
                f"The tables are cut over {dist.get_world_size()} processes, and Trainer takes this one for the only "
                "one. On CPUs give TrainingArguments(use_cpu=True, ...). Start with torchrun or `accelerate launch`."
            )
        if any(table.ranks is not None for table in tables.values()):
            refuse_whole_tables(args)
        refuse_tables_in_fsdp(model, tables)
        frozen = [name for name, table in tables.items() if table.row_format is not None]
        if frozen:
            logger.warning(f"Rows of {', '.join(frozen)} are quantized, so this run leaves them as they are.")
        if train_as_patch is not None:
            if args.load_best_model_at_end:
                raise ValueError(
                    "load_best_model_at_end loads tables, and train_as_patch leaves them as they are. Leave it out, "
                    "and keep the best patch with EngramBestPatchCallback(file)."
                )
            refuse_several_memories(model)
            begin_patch(model, train_as_patch)
        else:
            end_patch(model)
        # A checkpoint of an adapted model holds the adapter alone.
        saves_rows = hasattr(model, "peft_config")
        if saves_rows and any(table.is_trainable for table in tables.values()):
            refuse_checkpoints_without_rows(args)
        if saves_rows and any(table.ranks is not None and table.is_trainable for table in tables.values()):
            raise NotImplementedError(
                "An adapter's checkpoint holds rows in its optimizer's state, which tables that are cut over ranks do "
                'not write. Load the base model without engram_ranks="shard", or train without the adapter.'
            )
        rule = row_optimizer if isinstance(row_optimizer, RowRule) else ROW_RULES[row_optimizer](args)
        run = TrainingRun(Path(args.output_dir or "."))
        if args.world_size > 1:
            # One run: distributed checkpoints take a value that is not sharded from any process.
            ids = [run.run_id]
            dist.broadcast_object_list(ids)
            run.run_id = ids[0]
        exchange = RowExchange() if args.world_size > 1 else None
        rows = {
            name: RowUpdates(name, table, rule, state_dtype, work_folder, args.seed, saves_rows, run, exchange)
            for name, table in tables.items()
            if table.is_trainable
        }
        for name, updates in rows.items():
            # A gradient scaler copies its scale to every device, and to the CPU without waiting for it.
            updates.gradients.norm.data = updates.gradients.norm.data.to(device_beside(model, name))
        if args.world_size > 1:
            leave_tables_out_of_ddp(model, tables)
        of_tables = {id(parameter) for table in tables.values() for parameter in table.parameters()}
        dense = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in of_tables}
        if exchange is not None:
            for updates in rows.values():
                exchange.add(updates.table)
            exchange.follow(model, list(dense.values()))
        matrices = matrices_of_backbone(model) if backbone == "muon" else set()
        parts: list[DensePart] = []
        if groups := groups_by_decay(model, args, {n: p for n, p in dense.items() if n in matrices}):
            parts.append(MatrixPart(groups, args.learning_rate))
        if rest := {n: p for n, p in dense.items() if n not in matrices}:
            parts.append(dense_part(model, args, rest))
        patience = min(STEPS_WITHOUT_GRADIENT, args.max_steps) if args.max_steps > 0 else STEPS_WITHOUT_GRADIENT
        optimizer = EngramOptimizer(parts, rows, args.learning_rate, table_lr_scale, patience, run)
        if args.save_only_model:
            run.write_row_state = None
        return optimizer


def refuse_unsupported(args: "TrainingArguments", backbone: str) -> None:
    """
    Raises:
        NotImplementedError: rows cannot be trained this way.
        ValueError: two of the settings do not go together.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"Trainer would run this model in torch.nn.DataParallel on {args.n_gpu} GPUs, which copies every table to "
            f"each of them. Start it with `torchrun --nproc-per-node {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES=0."
        )
    if args.distributed_state is not None and args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        raise NotImplementedError(
            "engram_optimizers cannot run under DeepSpeed, which steps flat copies of all parameters. Use DDP or FSDP2."
        )
    if optim in FUSED_INTO_BACKWARD:
        raise NotImplementedError(
            f"optim={optim!r} updates parameters inside the backward and leaves no gradients, so rows of tables cannot "
            "be trained beside it. Choose another optim, such as adamw_torch."
        )
    if optim.endswith("layerwise"):
        raise NotImplementedError(
            f"optim={optim!r} steps each parameter inside the backward, so rows of tables cannot be trained beside it. "
            f"Choose {optim.removesuffix('_layerwise')!r}."
        )
    if backbone == "muon" and optim.startswith(LOW_RANK):
        raise ValueError(
            f'backbone="muon" and optim={optim!r} both train the matrices of the backbone. Choose one of them.'
        )


def refuse_whole_tables(args: "TrainingArguments") -> None:
    """
    Raises:
        NotImplementedError: something would bring whole tables to a rank, and they are cut over ranks; or ranks form a
            mesh of several dimensions.
    """
    mesh = AcceleratorState._shared_state.get("parallelism_config")
    if several := [name for name in ("tp", "cp", "sp") if getattr(mesh, f"{name}_enabled", False)]:
        raise NotImplementedError(
            f"Ranks that hold tables need whole sequences and layers, and got {several[0]}_size above 1. Leave it "
            "out of parallelism_config."
        )
    if args.save_on_each_node:
        raise NotImplementedError(
            "Tables that are cut over ranks are saved by one rank, and got save_on_each_node=True. Leave it out, and "
            "copy a checkpoint to the other machines before you resume."
        )
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is None:
        return
    if "FULL_STATE_DICT" in str(plugin.state_dict_type):
        raise NotImplementedError(
            "FSDP's FULL_STATE_DICT collects whole tables on one rank, and they are cut over ranks. Launch with "
            "--fsdp_state_dict_type SHARDED_STATE_DICT."
        )
    if plugin.cpu_ram_efficient_loading:
        raise NotImplementedError(
            "FSDP's cpu_ram_efficient_loading copies what the first rank holds to all, and tables are cut over ranks. "
            "Launch with --fsdp_cpu_ram_efficient_loading false."
        )


def refuse_tables_in_fsdp(model: nn.Module, tables: dict[str, EngramTable]) -> None:
    """
    Raises:
        NotImplementedError: accelerate's FSDP2 would shard a table, convert its rows, or move it from the state of its
            rows; or a table that is trained, or cut over ranks, is in a run of FSDP version 1.
    """
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        # Rows that it shards do not move any more. Left out, they move, but not every rank finds their state again in
        # a sharded checkpoint.
        for name, table in tables.items():
            if table.is_trainable or table.ranks is not None:
                raise NotImplementedError(
                    f"FSDP version 1 would shard the rows of {name}, or not resume their state. Set the environment "
                    'variable FSDP_IGNORED_MODULES=".*engram.table" where you call `accelerate launch --fsdp_version '
                    "2`."
                )
        return
    ignored, device = plugin.ignored_modules or [], None
    if isinstance(ignored, str):
        # As accelerate reads it, which moves these modules to its device.
        device = AcceleratorState._shared_state.get("device")
        ignored = [module for name, module in model.named_modules() if re.fullmatch(ignored, name)]
    left_out = {id(module) for each in ignored for module in each.modules()}
    mixed = AcceleratorState._shared_state.get("_mixed_precision")
    for name, table in tables.items():
        if id(table) not in left_out:
            raise NotImplementedError(
                f"FSDP2 would shard the rows of {name}, and only row updates may change them. Set the environment "
                'variable FSDP_IGNORED_MODULES=".*engram.table" where you call `accelerate launch`.'
            )
        resident = [block.parameter.device for block in table.block_records if block.is_resident]
        is_here = device is None or all(
            each.type == device.type and device.index in (None, each.index) for each in resident
        )
        if table.is_trainable and not is_here:
            raise NotImplementedError(
                f"accelerate's FSDP2 would move {name} to {device}, and the state of its rows is made where it is now. "
                f'Load the model there, with device_map={{"": "{device}"}}, or place the table in host memory.'
            )
        if mixed not in (None, "no") and table.is_trainable and table.dtype != torch.float32:
            raise NotImplementedError(
                f"Under mixed precision ({mixed}) accelerate's FSDP2 converts all that is trained to float32, and rows "
                f"of {name} are {str(table.dtype).removeprefix('torch.')}. Launch with --mixed_precision no and load "
                "the model with dtype=torch.float32, freeze the table, or use a table of float32 rows."
            )


def refuse_several_memories(model: nn.Module) -> None:
    """
    Raises:
        ValueError: a patch belongs to one memory, and the tables of the model belong to several.
    """
    whole: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    hashes = [whole.hash_of_table(name) for name in whole.named_tables()]
    fingerprints = [{} if each is None else each.fingerprint() for each in hashes]
    if any(each != fingerprints[0] for each in fingerprints):
        raise ValueError(
            f"train_as_patch trains the rows of one memory, and this model has tables of several: "
            f"{', '.join(whole.named_tables())}. Take the others out first, with remove_engram(model, name)."
        )


def begin_patch(model: nn.Module, name: str) -> None:
    """Have a run train a new patch of this name.

    Raises:
        ValueError: the model has patches already.
        NotImplementedError: tables are cut over ranks.
    """
    whole: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    tables = whole.named_tables()
    if any(table.ranks is not None for table in tables.values()):
        raise NotImplementedError(
            "A patch of a table that is cut over ranks cannot be trained. Leave out train_as_patch, or load the model "
            'without engram_ranks="shard".'
        )
    whole.begin_patch_training(name, {each: TrainedRows(name, table) for each, table in tables.items()})


def end_patch(model: nn.Module) -> None:
    """A patch that an earlier run has trained is one as any other."""
    whole: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(whole, "end_patch_training"):
        whole.end_patch_training()


def refuse_checkpoints_without_rows(args: "TrainingArguments") -> None:
    """
    Raises:
        ValueError: a checkpoint of an adapter would be read without the state of the optimizer, which holds the rows.
    """
    refused = [name for name in ("save_only_model", "load_best_model_at_end") if getattr(args, name)]
    if refused:
        raise ValueError(
            f"{refused[0]} cannot be used with LoRA and trainable tables: a checkpoint of an adapter holds rows in its "
            "optimizer's state only. Leave it out, freeze the tables, or train without LoRA."
        )


def find_tables(model: nn.Module) -> dict[str, EngramTable]:
    """The tables of a model by the names of their modules."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "collect_row_gradients")}


def device_beside(model: nn.Module, table_name: str) -> torch.device:
    """Where the memory layer of a table computes, wherever the table is."""
    tables = {id(parameter) for table in find_tables(model).values() for parameter in table.parameters()}
    name = table_name
    while name:
        # The embedding that a table serves has no other parameters, and what is around it has.
        name = name.rpartition(".")[0]
        beside = [p.device for p in model.get_submodule(name).parameters() if id(p) not in tables]
        if beside:
            return beside[0]
    return torch.device("cpu")


def leave_tables_out_of_ddp(model: nn.Module, tables: dict[str, EngramTable]) -> None:
    """Keep DistributedDataParallel from broadcasting tables, and from holding gradients of their size."""
    names = [f"{name}.{parameter}" for name, table in tables.items() for parameter, _ in table.named_parameters()]
    ignored = set(getattr(model, DDP_IGNORES, ()))
    setattr(model, DDP_IGNORES, sorted(ignored | set(names)))


def digest_of_names(saved: dict) -> str:
    """SHA-256 of the path of every value in nested dicts and lists, whatever the values are."""

    def paths(value, path: str):
        if isinstance(value, dict | list):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                yield from paths(each, f"{path}/{key!r}")
        else:
            yield path

    return hashlib.sha256("\n".join(sorted(paths(saved, ""))).encode()).hexdigest()


class EngramOptimizer(torch.optim.Optimizer):
    """Dense parts and the rows of tables, as one optimizer.

    A table's group holds the small parameter that stands for its rows where gradients are clipped. Its `lr` is the rate
    of the backbone, so that every scheduler treats it alike; rows move at `lr * lr_scale`.
    """

    def __init__(
        self,
        parts: list[DensePart],
        rows: dict[str, RowUpdates],
        lr: float,
        table_lr_scale: float,
        patience: int = STEPS_WITHOUT_GRADIENT,
        run: TrainingRun | None = None,
    ):
        """
        Args:
            parts: dense optimizers.
            rows: table name to the updates of its rows.
            lr: learning rate of the backbone.
            table_lr_scale: rows learn at this many times the rate of the backbone.
            patience: steps after which a table that has not moved is worth a warning.
            run: that the tables take part in.

        Raises:
            ValueError: nothing can be trained.
        """
        self.parts, self.rows = parts, rows
        self.patience, self.steps_here = patience, 0
        self.run = TrainingRun() if run is None else run
        # By table: whether a row has moved, on any rank.
        self.has_moved = dict.fromkeys(rows, False)
        self.row_states: dict[nn.Parameter, dict[str, int]] = {}
        self.row_groups: dict[str, dict[str, Any]] = {
            name: {
                "params": [updates.gradients.norm],
                "lr": lr,
                "lr_scale": table_lr_scale,
                "weight_decay": 0.0,
                "table": name,
            }
            for name, updates in rows.items()
        }
        groups = [*chain.from_iterable(part.groups for part in parts), *self.row_groups.values()]
        if not groups:
            raise ValueError(
                "Nothing of this model requires a gradient, so there is nothing to train. Unfreeze some of it: "
                "model.requires_grad_(True)."
            )
        self.is_made = False
        # Schedulers with an absolute floor divide it by this rate.
        super().__init__(groups, {"lr": lr})
        self.is_made = True
        if any(updates.table.ranks is not None for updates in rows.values()):
            self.run.write_row_state = self._write_row_state
        self._show_state()

    def _show_state(self) -> None:
        """Show the state of all dense parameters as any optimizer does; that of rows is in `rows`.

        Distributed checkpoints make a step with an optimizer that shows none, so a table shows its steps.
        """
        self.state = cast(Any, ChainMap(*(part.optimizer.state for part in self.parts), self.row_states))

    def _show_steps(self, updates: RowUpdates) -> None:
        if updates.steps:
            self.row_states[updates.gradients.norm] = {"steps": updates.steps}

    def add_param_group(self, param_group: dict) -> None:
        """Train more dense parameters, by the optimizer of the others.

        Raises:
            ValueError: a parameter is trained already, or belongs to a table.
            NotImplementedError: no dense optimizer takes it.
        """
        if self.is_made:
            param_group = self._hand_over(param_group)
        super().add_param_group(param_group)

    def _hand_over(self, group: dict) -> dict:
        given = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        ids = {id(each[1] if isinstance(each, tuple) else each) for each in given}
        if ids & {id(p) for updates in self.rows.values() for p in updates.table.parameters()}:
            raise ValueError("A table's rows are trained by their row optimizer; leave it out of the group you add.")
        if ids & {id(p) for known in self.param_groups for p in known["params"]}:
            raise ValueError("A parameter of the group you add is trained already; leave it out.")
        if not self.parts:
            raise NotImplementedError(
                "This optimizer was made while the backbone was frozen, so it has no dense optimizer that could take "
                "the group you add. Make its parameters trainable before Trainer makes its optimizer."
            )
        return self.parts[-1].add_group({**group, "params": given})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps_here += 1
        self.run.steps += 1
        for part in self.parts:
            part.step()
        for name, updates in self.rows.items():
            lr = float(self.row_groups[name]["lr"]) * self.row_groups[name]["lr_scale"]
            has_gradient = updates.gradients.are_nonzero()
            updates.step(lr)
            self._show_steps(updates)
            self.has_moved[name] |= has_gradient and bool(lr)
            if self.steps_here == self.patience and not self.has_moved[name]:
                why = "its learning rate was 0" if has_gradient else "no gradient has reached it"
                logger.warning(
                    f"{name} can be trained, but it has not moved in {self.patience} steps: {why}. If it is not meant "
                    "to learn, freeze it: table.requires_grad_(False)."
                )
        return loss

    def train(self) -> None:
        """For optimizers of schedulefree, which Trainer tells when it trains and when it evaluates."""
        for part in self.parts:
            part.switch("train")

    def eval(self) -> None:
        """See `train`."""
        for part in self.parts:
            part.switch("eval")

    def _write_row_state(self, folder: Path) -> dict[str, str]:
        """What a checkpoint holds of rows beside optimizer.pt: files, name to SHA-256."""
        written: dict[str, str] = {}
        numbers = numbers_of_files(self.rows)
        for name, updates in self.rows.items():
            if updates.table.ranks is not None:
                written |= updates.write_state(folder, f"row-state-layer-{numbers[name]:02d}")
        return written

    def state_dict(self) -> dict:
        """torch's layout: `state`, by the number of a parameter, and `param_groups`.

        The state of a table's small parameter is that of the rows that have been touched (row_updates.py). The rows
        themselves are the model's.
        """
        number = self._numbers()
        states: dict[nn.Parameter, Any] = {}
        values: dict[int, dict] = {id(group): values_of(group) for group in self.row_groups.values()}
        for part in self.parts:
            own_states, own_groups = part.save()
            states |= own_states
            values |= {id(group): own for group, own in zip(part.groups, own_groups, strict=True)}
        for updates in self.rows.values():
            states[updates.gradients.norm] = updates.state_dict()
        saved = {
            "state": {number[parameter]: state for parameter, state in states.items()},
            "param_groups": [
                {**values[id(group)], "params": [number[parameter] for parameter in group["params"]]}
                for group in self.param_groups
            ],
        }
        return {**saved, CONTENTS: digest_of_names(saved)}

    def _numbers(self) -> dict[nn.Parameter, int]:
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        return {parameter: number for number, parameter in enumerate(parameters)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned. Everything is checked before anything changes.

        Raises:
            ValueError: the state is damaged, or it is another optimizer's.
        """
        if isinstance(state_dict, dict) and {"dense", "rows", "row_groups"} <= set(state_dict):
            self._load_early(state_dict)
        else:
            self._load(state_dict)
        self._show_state()

    def _load(self, state_dict: dict) -> None:
        saved_states, saved_groups = self._checked(state_dict)
        states: dict[nn.Parameter, Any] = {}
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            # Distributed checkpoints use names where torch uses numbers.
            pairs = zip(group["params"], saved["params"], strict=True)
            states |= {parameter: saved_states[key] for parameter, key in pairs if key in saved_states}
        values = {id(group): values_of(own) for group, own in zip(self.param_groups, saved_groups, strict=True)}
        missing = [name for name, updates in self.rows.items() if updates.gradients.norm not in states]
        if missing:
            raise ValueError(f"optimizer.pt of the checkpoint is damaged: the rows of {missing[0]} are missing.")
        of_rows = {name: updates.checked(states[updates.gradients.norm]) for name, updates in self.rows.items()}
        for part in self.parts:
            part.check(states)
        with errors_of_the_backbone():
            for part in self.parts:
                part.load(states, [values[id(group)] for group in part.groups])
        for name, updates in self.rows.items():
            updates.load_state_dict(of_rows[name])
            self._show_steps(updates)
            self.row_groups[name].update(values[id(self.row_groups[name])])

    def _checked(self, state_dict: Any) -> tuple[dict, list[dict]]:
        """`state` and `param_groups` of a state dict, once their shape is that of this optimizer's.

        Raises:
            ValueError: it is not.
        """
        is_whole = isinstance(state_dict, dict) and {"state", "param_groups"} <= set(state_dict)
        states, groups = (state_dict["state"], state_dict["param_groups"]) if is_whole else (None, None)
        if not isinstance(states, dict) or not isinstance(groups, list):
            raise ValueError(
                "optimizer.pt of the checkpoint is damaged: it has no `state` and `param_groups`. Resume from "
                "another checkpoint."
            )
        for number, group in enumerate(groups):
            if not isinstance(group, dict) or not isinstance(group.get("params"), list):
                raise ValueError(
                    f"optimizer.pt of the checkpoint is damaged: group {number} lists no parameters. Resume "
                    "from another checkpoint."
                )
        keys = list(chain.from_iterable(group["params"] for group in groups))
        if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) < len(keys):
            raise ValueError(
                "optimizer.pt of the checkpoint is damaged: its groups do not list each parameter once. "
                "Resume from another checkpoint."
            )
        tables = [group["table"] for group in groups if "table" in group]
        if tables != list(self.row_groups):
            raise ValueError(
                f"optimizer.pt of the checkpoint trained the tables {tables}, and this run trains "
                f"{list(self.row_groups)}. Resume with the same engram_optimizers and the same tables frozen."
            )
        sizes = [[len(group["params"]) for group in each] for each in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"optimizer.pt of the checkpoint has groups of {sizes[0]} parameters, and this one of {sizes[1]}. "
                "Resume with the same backbone= of engram_optimizers, and with the same parameters frozen."
            )
        for number, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            check_values(group, own, number)
        for key, state in states.items():
            if key not in keys or not isinstance(state, dict):
                raise ValueError(
                    f"optimizer.pt of the checkpoint is damaged: what it holds of parameter {key!r} is a "
                    f"{type(state).__name__}, or its groups do not list that one. Resume from another checkpoint."
                )
        # Earlier versions and distributed checkpoints write no digest.
        if CONTENTS in state_dict and state_dict[CONTENTS] != digest_of_names(
            {"state": states, "param_groups": groups}
        ):
            raise ValueError(
                "optimizer.pt of the checkpoint is damaged: it does not hold all that was saved. Resume from another "
                "checkpoint."
            )
        return states, groups

    def _load_early(self, state_dict: dict) -> None:
        """Load the layout of the first release: a list of state dicts, and rows under the names of their tables."""
        dense, rows, row_groups = (state_dict[key] for key in ("dense", "rows", "row_groups"))
        found = sorted(rows) if isinstance(rows, dict) else []
        if found != sorted(self.rows):
            raise ValueError(
                f"optimizer.pt of the checkpoint trained the tables {found}, and this run trains {sorted(self.rows)}. "
                "Resume with the same engram_optimizers and the same tables frozen."
            )
        of_rows = {name: updates.checked(rows[name]) for name, updates in self.rows.items()}
        with errors_of_the_backbone():
            for part, saved in zip(self.parts, dense, strict=True):
                part.load_early(saved)
        for name, saved in zip(self.rows, row_groups, strict=True):
            self.rows[name].load_state_dict(of_rows[name])
            self._show_steps(self.rows[name])
            # Its rates, and those of its scheduler, are the rows' own.
            self.row_groups[name].update({**saved, "lr_scale": 1.0})

    def __repr__(self) -> str:
        dense = ", ".join(type(part.optimizer).__name__ for part in self.parts)
        rows = ", ".join(f"{name}: {type(updates.rule).__name__}" for name, updates in self.rows.items())
        return f"EngramOptimizer({dense}; {rows or 'no table'})"

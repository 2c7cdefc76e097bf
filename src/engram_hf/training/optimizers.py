"""One optimizer for a model with tables, through Trainer's own door: dense parameters by torch's or transformers' own
optimizers, rows of tables by row updates.

    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=engram_optimizers(args))

What `TrainingArguments` say of learning rate, decay, betas and schedule is said of every group.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.table import EngramTable
from ..modeling.table_changes import TrainingRun
from .row_exchange import exchange_rows
from .row_rules import RowAdam, RowRule, RowSGD, RowwiseAdagrad, RowwiseAdam
from .row_updates import RowUpdates


# Steps after which a table without any gradient is worth a warning.
STEPS_WITHOUT_GRADIENT = 10
# Read by torch's DistributedDataParallel.
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"

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
) -> tuple[type, dict]:
    """What Trainer takes as `optimizer_cls_and_kwargs`, so that tables are trained row by row, wherever they live.

    Args:
        args: of the same Trainer; learning rate, weight decay, betas, epsilon, seed and `optim` are read from it.
        row_optimizer: "adam" (lazy Adam, the paper's), "rowwise_adam", "adagrad" (row-wise) or "sgd" (with momentum);
            or a rule with values of its own, such as RowSGD(momentum=0.5).
        table_lr_scale: times the learning rate, for rows. Tables have no weight decay.
        backbone: "adamw" is what `args.optim` names, for all dense parameters; "muon" gives matrices of the backbone
            and the memory's projections to torch.optim.Muon, at step sizes like AdamW's, the rest to `args.optim`.
        work_folder: where tables that are on disk are copied to be trained, with the state of their rows.
        state_dtype: of what a row optimizer keeps per weight; None is bfloat16 for tables of bfloat16, else float32.

    Example:
        >>> args = TrainingArguments("output", learning_rate=4e-4)
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=engram_optimizers(args))
    """
    betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    rules: dict[str, Callable[[], RowRule]] = {
        "adam": lambda: RowAdam(betas, eps),
        "rowwise_adam": lambda: RowwiseAdam(betas, eps),
        "adagrad": RowwiseAdagrad,
        "sgd": RowSGD,
    }
    if not isinstance(row_optimizer, RowRule) and row_optimizer not in rules:
        raise ValueError(f"row_optimizer must be one of {sorted(rules)} or a RowRule, got {row_optimizer!r}.")
    if backbone not in ("adamw", "muon"):
        raise ValueError(f'backbone must be "adamw" or "muon", got {backbone!r}.')
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {state_dtype}.")
    if not table_lr_scale > 0:
        raise ValueError(
            f"table_lr_scale must be above 0, got {table_lr_scale}; freeze tables to leave them as they are."
        )
    return EngramOptimizerFactory, {
        "args": args,
        "rule": row_optimizer if isinstance(row_optimizer, RowRule) else rules[row_optimizer](),
        "table_lr_scale": table_lr_scale,
        "backbone": backbone,
        "work_folder": work_folder,
        "state_dtype": state_dtype,
    }


class EngramOptimizerFactory:
    """Called by Trainer with its model; see `engram_optimizers`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        args: "TrainingArguments",
        rule: RowRule,
        table_lr_scale: float,
        backbone: str,
        work_folder: str | Path | None,
        state_dtype: torch.dtype | None,
    ) -> "EngramOptimizer":
        tables = find_tables(model)
        # A checkpoint of an adapted model is the adapter alone.
        saves_rows = hasattr(model, "peft_config")
        if saves_rows and any(table.is_trainable for table in tables.values()):
            refused = [name for name in ("save_only_model", "load_best_model_at_end") if getattr(args, name)]
            if refused:
                raise ValueError(
                    f"{refused[0]} cannot be used with LoRA and trainable tables: a checkpoint of an adapter holds no "
                    "rows but in its optimizer's state. Leave it out, freeze the tables, or train without LoRA."
                )
        run, exchange = TrainingRun(Path(args.output_dir or ".")), exchange_rows if args.world_size > 1 else None
        rows = {
            name: RowUpdates(name, table, rule, state_dtype, work_folder, args.seed, saves_rows, run, exchange)
            for name, table in tables.items()
            if table.is_trainable
        }
        if args.world_size > 1:
            leave_tables_out_of_ddp(model, tables)
        # Trainer brings libraries that nobody needs who only loads a model.
        from transformers import Trainer

        blocks = {id(parameter) for table in tables.values() for parameter in table.parameters()}
        dense = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in blocks}
        decaying = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
        matrices = matrices_of_backbone(model) if backbone == "muon" else set()
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
        parts: list[DensePart] = []
        for is_muon in (True, False):
            own = {n: p for n, p in dense.items() if (n in matrices) == is_muon}
            groups = [
                {"params": [p for n, p in own.items() if n in decaying], "weight_decay": args.weight_decay},
                {"params": [p for n, p in own.items() if n not in decaying], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            if groups and is_muon:
                parts.append(MatrixPart(groups, args.learning_rate))
            elif groups:
                parts.append(DensePart(groups, optimizer_class, options))
        patience = min(STEPS_WITHOUT_GRADIENT, args.max_steps) if args.max_steps > 0 else STEPS_WITHOUT_GRADIENT
        return EngramOptimizer(parts, rows, args.learning_rate * table_lr_scale, patience, run)


def find_tables(model: nn.Module) -> dict[str, EngramTable]:
    """The tables of a model by the names of their modules, known by what they can do."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "collect_row_gradients")}


def leave_tables_out_of_ddp(model: nn.Module, tables: dict[str, EngramTable]) -> None:
    """DistributedDataParallel would broadcast a table, and hold a gradient of its size: name them as not its own."""
    names = [f"{name}.{parameter}" for name, table in tables.items() for parameter, _ in table.named_parameters()]
    ignored = set(getattr(model, DDP_IGNORES, ()))
    setattr(model, DDP_IGNORES, sorted(ignored | set(names)))


def matrices_of_backbone(model: nn.Module) -> set[str]:
    """Names of the weights that are matrices, or stacks of an expert's matrices: all linear layers but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and module is not head and parameter.ndim == 2
            is_stack = parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if is_linear or is_stack:
                names.add(f"{module_name}.{name}".lstrip("."))
    return names


class DensePart:
    """A dense optimizer, and the groups that Trainer and its scheduler see of it."""

    def __init__(self, groups: list[dict], optimizer_class: type, options: dict):
        self.optimizer = optimizer_class(groups, **options)
        self.groups = self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, saved: dict) -> None:
        self.optimizer.load_state_dict(saved)
        self.groups = self.optimizer.param_groups


class MatrixPart(DensePart):
    """torch.optim.Muon, which takes matrices only: of a stack of them it is given one at a time."""

    def __init__(self, groups: list[dict], lr: float):
        self.slices: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        inner = []
        for group in groups:
            matrices = []
            for parameter in group["params"]:
                own = [nn.Parameter(matrix) for matrix in parameter.detach().unbind()] if parameter.ndim == 3 else []
                self.slices.append((parameter, own))
                matrices += own or [parameter]
            inner.append({**group, "params": matrices})
        # AdamW's step sizes, so that a learning rate means what it means for the rest of the model.
        self.optimizer = torch.optim.Muon(inner, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.groups = self._outer_groups([group["params"] for group in groups])

    def _outer_groups(self, parameters: list[list[nn.Parameter]]) -> list[dict]:
        return [{**inner, "params": own} for inner, own in zip(self.optimizer.param_groups, parameters, strict=True)]

    def _follow_groups(self) -> None:
        """Take over what a scheduler has written into the groups that it sees."""
        for inner, outer in zip(self.optimizer.param_groups, self.groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key != "params"})

    def state_dict(self) -> dict:
        self._follow_groups()
        return super().state_dict()

    def step(self) -> None:
        self._follow_groups()
        for parameter, own in self.slices:
            gradients = [None] * len(own) if parameter.grad is None else parameter.grad.unbind() if own else []
            for matrix, weights, gradient in zip(own, parameter.detach().unbind() if own else [], gradients):
                matrix.data, matrix.grad = weights, gradient
        self.optimizer.step()
        for _, own in self.slices:
            for matrix in own:
                matrix.grad = None

    def load_state_dict(self, saved: dict) -> None:
        self.optimizer.load_state_dict(saved)
        self.groups = self._outer_groups([group["params"] for group in self.groups])


class EngramOptimizer(torch.optim.Optimizer):
    """Dense parts and the rows of tables, as one optimizer. Each table's group holds the parameter of one number that
    stands for its rows where gradients are clipped (`RowGradients.norm`)."""

    def __init__(
        self,
        parts: list[DensePart],
        rows: dict[str, RowUpdates],
        table_lr: float,
        patience: int = STEPS_WITHOUT_GRADIENT,
        run: TrainingRun | None = None,
    ):
        """
        Args:
            parts: dense optimizers.
            rows: table name to the updates of its rows.
            table_lr: learning rate of rows.
            patience: steps after which a table that has not moved is worth a warning.
            run: that the tables take part in.
        """
        self.parts, self.rows = parts, rows
        self.patience, self.steps_here = patience, 0
        self.run = TrainingRun() if run is None else run
        self.row_groups: list[dict[str, Any]] = [
            {"params": [updates.gradients.norm], "lr": table_lr, "weight_decay": 0.0, "table": name}
            for name, updates in rows.items()
        ]
        self.rows_moved = dict.fromkeys(rows, 0)
        groups = [group for part in parts for group in part.groups] + self.row_groups
        if not groups:
            raise ValueError("Nothing of this model requires a gradient, so there is nothing to train.")
        super().__init__([{"params": group["params"]} for group in groups], {"lr": table_lr})
        self.param_groups = groups

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
        for group, (name, updates) in zip(self.row_groups, self.rows.items(), strict=True):
            rows_with_gradient = updates.step(float(group["lr"]))
            self.rows_moved[name] += rows_with_gradient if float(group["lr"]) else 0
            if self.steps_here == self.patience and not self.rows_moved[name]:
                why = "its learning rate was 0" if rows_with_gradient else "no gradient has reached it"
                logger.warning(
                    f"{name} can be trained, and has not moved in {self.patience} steps: {why}. If it is not to learn, "
                    "freeze it: table.requires_grad_(False)."
                )
        return loss

    def state_dict(self) -> dict:
        """State of the dense parts, and of the rows that have been touched. Tables themselves are the model's."""
        row_groups = [{k: v for k, v in group.items() if k != "params"} for group in self.row_groups]
        return {
            "dense": [part.state_dict() for part in self.parts],
            "rows": {name: updates.state_dict() for name, updates in self.rows.items()},
            "row_groups": row_groups,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Raises:
            ValueError: it is the state of another optimizer.
        """
        if not {"dense", "rows", "row_groups"} <= set(state_dict) or set(state_dict["rows"]) != set(self.rows):
            found = sorted(state_dict.get("rows", []))
            raise ValueError(
                f"The checkpoint's optimizer is another one: it trains the tables {found}, this run "
                f"{sorted(self.rows)}. Resume with the same engram_optimizers and the same tables frozen."
            )
        try:
            for part, saved in zip(self.parts, state_dict["dense"], strict=True):
                part.load_state_dict(saved)
        except ValueError as error:
            raise ValueError(
                f"The checkpoint's optimizer of the backbone is another one ({error}). Resume with the same backbone= "
                "of engram_optimizers, and with the same parameters frozen."
            ) from error
        for name, updates in self.rows.items():
            updates.load_state_dict(state_dict["rows"][name])
        for group, saved in zip(self.row_groups, state_dict["row_groups"], strict=True):
            group.update(saved)
        self.param_groups = [group for part in self.parts for group in part.groups] + self.row_groups

    def __repr__(self) -> str:
        dense = ", ".join(type(part.optimizer).__name__ for part in self.parts)
        rows = ", ".join(f"{name}: {type(updates.rule).__name__}" for name, updates in self.rows.items())
        return f"EngramOptimizer({dense}; {rows or 'no table'})"

"""The dense optimizers of a model: which parameters each one gets, its groups, its state in torch's layout.

What they train is everything but tables; those have row updates (row_updates.py).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel


# What a group of a dense optimizer steps by; its other values have changed between releases of torch.
NUMBERS_OF_A_GROUP = ("lr", "lr_scale", "betas", "eps", "weight_decay", "momentum")

if TYPE_CHECKING:
    from transformers import TrainingArguments


def matrices_of_backbone(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers, except the head's, and of stacks of experts' matrices."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and module is not head and parameter.ndim == 2
            is_stack = parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if is_linear or is_stack:
                names.add(f"{module_name}.{name}".lstrip("."))
    return names


def groups_by_decay(model: nn.Module, args: "TrainingArguments", own: dict[str, nn.Parameter]) -> list[dict]:
    """The two groups that Trainer makes, of some of the parameters; an empty group is left out."""
    # Trainer imports libraries that are not needed to load a model.
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
    groups = [
        {"params": [p for n, p in own.items() if n in decaying], "weight_decay": args.weight_decay},
        {"params": [p for n, p in own.items() if n not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def dense_part(model: nn.Module, args: "TrainingArguments", own: dict[str, nn.Parameter]) -> "DensePart":
    """The optimizer that `args.optim` names, as Trainer makes it, for some of the parameters.

    Raises:
        NotImplementedError: transformers makes something else than an optimizer for this name.
        ImportError, ValueError: transformers misses a library or an argument for this name.
    """
    from transformers import Trainer

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise NotImplementedError(
            f"optim={args.optim!r} builds its optimizer from the whole model, tables included. Choose another optim, "
            'such as adamw_torch, or backbone="muon".'
        )
    # GaLore and APOLLO bring groups of the whole model; the tables and what is frozen leave them.
    ids = {id(parameter) for parameter in own.values()}
    groups = [{**group, "params": [p for p in group["params"] if id(p) in ids]} for group in options.pop("params", [])]
    if "bitsandbytes" in str(optimizer_class) and options.get("optim_bits") == 8:
        keep_embeddings_in_32_bits(model)
    groups = [group for group in groups if group["params"]] or groups_by_decay(model, args, own)
    return DensePart(groups, optimizer_class, options)


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """As Trainer does for the 8-bit optimizers of bitsandbytes."""
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


class DensePart:
    """A dense optimizer, and the groups of it that Trainer and its scheduler see."""

    def __init__(self, groups: list[dict], optimizer_class: type, options: dict):
        self.optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
        # The same dicts for ever: schedulers and EngramOptimizer hold them.
        self.groups = list(self.optimizer.param_groups)

    def add_group(self, group: dict) -> dict:
        """Train the parameters of one more group, and return the group."""
        self.optimizer.add_param_group(group)
        self.groups.append(self.optimizer.param_groups[-1])
        return self.groups[-1]

    def step(self) -> None:
        self.optimizer.step()

    def switch(self, mode: str) -> None:
        """Call `train` or `eval` of an optimizer that has them, such as those of schedulefree."""
        if hasattr(self.optimizer, mode):
            getattr(self.optimizer, mode)()

    def save(self) -> tuple[dict[nn.Parameter, Any], list[dict]]:
        """The state of each parameter, and the values of each group."""
        saved = self.optimizer.state_dict()
        parameters = list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))
        states = {parameters[number]: state for number, state in saved["state"].items()}
        return states, [values_of(group) for group in saved["param_groups"]]

    def check(self, states: Mapping[nn.Parameter, Any]) -> None:
        """
        Raises:
            ValueError: a state has not the names of the others, or not the shape of its parameter. Optimizers that are
                not torch's keep what they like, and are not checked.
        """
        if not type(self.optimizer).__module__.startswith("torch.optim"):
            return
        parameters = chain.from_iterable(group["params"] for group in self.groups)
        own = [(parameter, states[parameter]) for parameter in parameters if parameter in states]
        for parameter, state in own:
            if set(state) != set(own[0][1]):
                raise ValueError(
                    f"optimizer.pt of the checkpoint is damaged: one parameter has {sorted(own[0][1], key=str)} and "
                    f"another one {sorted(state, key=str)}. Resume from another checkpoint."
                )
            for name, value in state.items():
                is_count = name == "step" and is_number(value) and float(value) == int(value)
                is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
                if value is not None and not is_count and not (is_tensor and value.shape == parameter.shape):
                    found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
                    raise ValueError(
                        f"optimizer.pt of the checkpoint does not fit this model: {name} is {found} where the "
                        f"parameter is {tuple(parameter.shape)}. Resume from a checkpoint of this run."
                    )

    def load(self, states: Mapping[nn.Parameter, Any], groups: list[dict]) -> None:
        """
        Args:
            states: as `save` returns them; a parameter without a state has not been stepped.
            groups: the values of each group.
        """
        number: dict[nn.Parameter, int] = {}
        numbered = []
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            number |= {parameter: len(number) + i for i, parameter in enumerate(group["params"])}
            numbered.append({**values, "params": [number[parameter] for parameter in group["params"]]})
        known = {number[parameter]: state for parameter, state in states.items() if parameter in number}
        self.load_early({"state": known, "param_groups": numbered})

    def load_early(self, saved: dict) -> None:
        """Load a state dict of the dense optimizer itself; checkpoints of the first release hold those."""
        self.optimizer.load_state_dict(saved)
        # torch has put new dicts in the place of the groups.
        for group, loaded in zip(self.groups, self.optimizer.param_groups, strict=True):
            group.clear()
            group.update(loaded)
        self.optimizer.param_groups = list(self.groups)


class MatrixPart(DensePart):
    """torch.optim.Muon. It takes matrices only, so a stack of experts is handed over one matrix at a time."""

    def __init__(self, groups: list[dict], lr: float):
        self.slices: dict[nn.Parameter, list[nn.Parameter]] = {}
        inner = []
        for group in groups:
            matrices = []
            for parameter in group["params"]:
                is_stack = parameter.ndim == 3
                own = [nn.Parameter(matrix) for matrix in parameter.detach().unbind()] if is_stack else [parameter]
                self.slices[parameter] = own
                matrices += own
            inner.append({**group, "params": matrices})
        # At AdamW's step sizes, a learning rate means what it means for the rest of the model.
        self.optimizer = torch.optim.Muon(inner, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.groups = [
            {**values_of(own), "params": group["params"]}
            for own, group in zip(self.optimizer.param_groups, groups, strict=True)
        ]

    def add_group(self, group: dict) -> dict:
        raise NotImplementedError(
            'backbone="muon" takes no further group of parameters. Make them trainable before Trainer makes its '
            "optimizer."
        )

    def _follow_groups(self) -> None:
        """Take over what a scheduler has written into the groups that it sees."""
        for inner, outer in zip(self.optimizer.param_groups, self.groups, strict=True):
            inner.update(values_of(outer))

    def step(self) -> None:
        self._follow_groups()
        for parameter, own in self.slices.items():
            if parameter.ndim == 3:
                gradients = [None] * len(own) if parameter.grad is None else parameter.grad.unbind()
                for matrix, weights, gradient in zip(own, parameter.detach().unbind(), gradients, strict=True):
                    matrix.data, matrix.grad = weights, gradient
        self.optimizer.step()
        for parameter, own in self.slices.items():
            if parameter.ndim == 3:
                for matrix in own:
                    matrix.grad = None

    def save(self) -> tuple[dict[nn.Parameter, Any], list[dict]]:
        self._follow_groups()
        of_matrices, groups = super().save()
        states = {}
        for parameter, own in self.slices.items():
            known = [of_matrices[matrix] for matrix in own if matrix in of_matrices]
            if parameter.ndim == 2 and known:
                states[parameter] = known[0]
            elif known:
                states[parameter] = {name: torch.stack([state[name] for state in known]) for name in known[0]}
        return states, groups

    def load(self, states: Mapping[nn.Parameter, Any], groups: list[dict]) -> None:
        of_matrices: dict[nn.Parameter, Any] = {}
        for parameter, own in self.slices.items():
            state = states.get(parameter)
            if state is not None and parameter.ndim == 3:
                of_matrices |= {
                    matrix: {name: stack[number] for name, stack in state.items()} for number, matrix in enumerate(own)
                }
            elif state is not None:
                of_matrices[parameter] = state
        super().load(of_matrices, groups)

    def load_early(self, saved: dict) -> None:
        self.optimizer.load_state_dict(saved)
        for group, loaded in zip(self.groups, self.optimizer.param_groups, strict=True):
            group.update(values_of(loaded))


def values_of(group: dict) -> dict:
    """A group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def check_values(saved: dict, own: dict, number: int) -> None:
    """
    Raises:
        ValueError: a rate or another number of a saved group is missing or is no number, or a switch is none.
    """
    for name, value in own.items():
        found = saved.get(name)
        if name in NUMBERS_OF_A_GROUP and value is not None:
            wanted = value if isinstance(value, tuple | list) else [value]
            numbers = found if isinstance(found, tuple | list) else [found]
            is_fit = len(numbers) == len(wanted) and all(map(is_number, numbers))
        else:
            is_fit = not isinstance(value, bool) or found is None or isinstance(found, bool)
        if not is_fit:
            raise ValueError(
                f"optimizer.pt of the checkpoint is not of this optimizer: {name} of group {number} is "
                f"{found!r}, and this run has {value!r}. Resume with the same optim and backbone=."
            )


def is_number(value: Any) -> bool:
    """Whether this is a rate, a decay or a count: finite and not below 0."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and is_number(value.item())
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


@contextmanager
def errors_of_the_backbone() -> Iterator[None]:
    """Turn what dense optimizers raise over a state that is not theirs into a sentence."""
    try:
        yield
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"The backbone's part in optimizer.pt of the checkpoint is another one, or damaged ({error!r}). Resume "
            "with the same backbone= of engram_optimizers and the same optim, or from another checkpoint."
        ) from error

"""Row rules written once more, on whole tables with dense gradients: slow and plain, without the code they check."""

import torch
from transformers import Trainer


class DenseRows:
    """One block, trained by a rule on its rows with a gradient; every row has a state, and a clock, of its own."""

    def __init__(self, rule: str, block: torch.nn.Parameter, betas=(0.9, 0.999), eps=1e-8, momentum=0.9):
        self.rule, self.block, self.betas, self.eps, self.momentum = rule, block, betas, eps, momentum
        rows = block.shape[0]
        self.first, self.second = torch.zeros_like(block), torch.zeros_like(block)
        self.second_of_row, self.clock = torch.zeros(rows, dtype=block.dtype), torch.zeros(rows)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self.block.grad is None:
            return
        b1, b2 = self.betas
        for row in (self.block.grad != 0).any(1).nonzero().flatten().tolist():
            g, w = self.block.grad[row], self.block[row]
            mean_square = (g * g).mean()
            if self.rule == "sgd":
                self.first[row] = self.momentum * self.first[row] + g
                w -= lr * self.first[row]
                continue
            if self.rule == "adagrad":
                self.second_of_row[row] += mean_square
                w -= lr * g / (self.second_of_row[row].sqrt() + 1e-10)
                continue
            self.clock[row] += 1
            t = float(self.clock[row])
            self.first[row] = b1 * self.first[row] + (1 - b1) * g
            if self.rule == "adam":
                self.second[row] = b2 * self.second[row] + (1 - b2) * g * g
                size = (self.second[row] / (1 - b2**t)).sqrt()
            else:
                self.second_of_row[row] = b2 * self.second_of_row[row] + (1 - b2) * mean_square
                size = (self.second_of_row[row] / (1 - b2**t)).sqrt()
            w -= lr * (self.first[row] / (1 - b1**t)) / (size + self.eps)


class DenseReference(torch.optim.Optimizer):
    """AdamW as Trainer makes it for the backbone, and dense gradients of tables for `DenseRows`."""

    def __init__(self, model, args, rule: str, scale: float = 5.0):
        self.tables = [
            DenseRows(rule, block, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
            for table in model.named_tables().values()
            for block in table.blocks
            if block.requires_grad
        ]
        blocks = {id(rows.block) for rows in self.tables}
        decaying = Trainer.get_decay_parameter_names(None, model)
        own = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in blocks]
        groups = [
            {"params": [p for n, p in own if n in decaying], "weight_decay": args.weight_decay},
            {"params": [p for n, p in own if n not in decaying], "weight_decay": 0.0},
        ]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        self.dense = kind([group for group in groups if group["params"]], **options) if own else None
        row_group = {"params": [rows.block for rows in self.tables], "lr": args.learning_rate * scale}
        super().__init__([{"params": list(row_group["params"])}], {"lr": row_group["lr"]})
        self.param_groups = (self.dense.param_groups if own else []) + [row_group]

    def step(self, closure=None):
        if self.dense is not None:
            # accelerate replaces the groups by copies.
            for inner, outer in zip(self.dense.param_groups, self.param_groups):
                inner["lr"] = outer["lr"]
            self.dense.step()
        for rows in self.tables:
            rows.step(float(self.param_groups[-1]["lr"]))

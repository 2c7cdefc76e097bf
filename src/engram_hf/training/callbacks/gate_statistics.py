"""How far the gates of the memory open in training, and how much of the residual stream is memory."""

import torch
from torch import nn

from ...insight.memory_layers import find_memory_layers
from .reporting import EngramCallback, is_distributed, is_made_again


BINS = 20
# A gate beyond these is as good as shut, or as good as open.
SHUT, OPEN = 0.05, 0.95


class EngramGateStatisticsCallback(EngramCallback):
    """Samples the gates of a step now and then, and reports for each memory layer:

    * `engram/gate_mean/layer_1`, `gate_std`, `gate_shut` and `gate_open` (shares of gates below 0.05 and above 0.95),
      over all residual streams, and for each one where there are several: `.../layer_1/stream_0`;
    * `engram/memory_share/layer_1`: the norm of what the memory adds, over that of the streams with it;
    * `engram/gate_histogram/layer_1`: 20 counts over [0, 1], in the history of the run alone.

    The console shows `engram/gate_mean`, over all layers. Tokens without memory (padding) are left out.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EngramGateStatisticsCallback()])
    """

    on_console = ("engram/gate_mean",)

    def __init__(self, every: int = 10):
        """
        Args:
            every: steps from one sample to the next.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.every = every
        self.is_looking = False
        # Layer id to sums over the sampled gates since the last log line.
        self._sums: dict[int, dict[str, torch.Tensor]] = {}
        # The same of all processes, as the last log line has them.
        self._reported: dict[int, dict[str, torch.Tensor]] = {}
        self._hooks: list = []

    def arguments(self):
        return {"every": self.every}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layers = find_memory_layers(model, type(self).__name__)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self._remove_hooks()
        self._sums = {}
        # They stay for the whole run: a compiled model does not see a hook that is added later.
        self._hooks = [layer.register_forward_hook(self._look) for layer in layers.values()]

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_looking = state.global_step % self.every == 0

    def on_step_end(self, args, state, control, **kwargs):
        self.is_looking = False

    def _look(self, layer: nn.Module, inputs: tuple, outputs: tuple) -> None:
        if self.is_looking and layer.training and not is_made_again():
            self._add(layer.layer_idx, inputs[0], *outputs)

    @torch.compiler.disable
    @torch.no_grad()
    def _add(self, layer_id: int, streams: torch.Tensor, memory: torch.Tensor, gates: torch.Tensor) -> None:
        """Add up the gates of one forward.

        Args:
            streams: (batch, seq, streams, hidden), before the memory layer.
            memory: (batch, seq, streams, hidden), which is added to them.
            gates: (batch, seq, streams).
        """
        gates = gates.detach().flatten(0, 1).float()  # (tokens, streams)
        is_token = (gates > 0).float()
        histogram = torch.stack([torch.histc(own[own > 0], BINS, 0.0, 1.0) for own in gates.T])
        after, added = (streams.detach() + memory.detach()).float(), memory.detach().float()
        new = {
            "count": is_token.sum(0),
            "sum": gates.sum(0),
            "squares": gates.square().sum(0),
            "shut": ((gates < SHUT) * is_token).sum(0),
            "open": (gates > OPEN).float().sum(0),
            "histogram": histogram,
            "norms": torch.stack([added.square().sum(), after.square().sum()]),
        }
        old = self._sums.get(layer_id)
        self._sums[layer_id] = new if old is None else {key: old[key] + value for key, value in new.items()}

    def figures(self):
        figures = {}
        self._reported, self._sums = self._of_all_processes(), {}
        for layer_id, sums in self._reported.items():
            streams = len(sums["count"])
            named = {f"layer_{layer_id}": slice(None)}
            if streams > 1:
                named |= {f"layer_{layer_id}/stream_{i}": slice(i, i + 1) for i in range(streams)}
            for name, own in named.items():
                count = float(sums["count"][own].sum())
                if not count:
                    continue
                mean = float(sums["sum"][own].sum()) / count
                variance = float(sums["squares"][own].sum()) / count - mean**2
                figures[f"engram/gate_mean/{name}"] = mean
                figures[f"engram/gate_std/{name}"] = max(variance, 0.0) ** 0.5
                figures[f"engram/gate_shut/{name}"] = float(sums["shut"][own].sum()) / count
                figures[f"engram/gate_open/{name}"] = float(sums["open"][own].sum()) / count
            added, after = sums["norms"].sqrt().tolist()
            if after:
                figures[f"engram/memory_share/layer_{layer_id}"] = added / after
        means = [value for name, value in figures.items() if name.count("/") == 2 and "gate_mean" in name]
        return {**figures, "engram/gate_mean": sum(means) / len(means)} if means else figures

    def _of_all_processes(self) -> dict[int, dict[str, torch.Tensor]]:
        """The sums of all processes added up, float64 on the CPU; a process may have seen less layers than others."""
        own = {i: {name: value.double().cpu() for name, value in sums.items()} for i, sums in self._sums.items()}
        gathered = [own]
        if is_distributed():
            gathered = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(gathered, own)
        total: dict[int, dict[str, torch.Tensor]] = {}
        for sums_of_layers in gathered:
            for layer_id, sums in sums_of_layers.items():
                known = total.get(layer_id)
                total[layer_id] = sums if known is None else {name: known[name] + sums[name] for name in sums}
        return dict(sorted(total.items()))

    def records(self):
        return {
            f"engram/gate_histogram/layer_{layer_id}": sums["histogram"].sum(0).long().tolist()
            for layer_id, sums in self._reported.items()
        }

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

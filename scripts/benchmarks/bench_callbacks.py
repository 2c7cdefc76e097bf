"""How long the statistics callbacks take: their own seconds in a training run of the demo's model.

python scripts/benchmarks/bench_callbacks.py         a minute on 2 cores
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.results import Results, Table, add_results_argument
from helpers.tiny_recipe import make_config, make_model, make_trainer, prepare_text

from engram_hf import EngramGateStatisticsCallback, EngramRowStatisticsCallback


def timed(kind: type) -> type:
    """The callback class, which also counts the seconds it takes."""

    class Timed(kind):
        seconds = 0.0

        def _time(self, name: str, *arguments, **named):
            start = time.perf_counter()
            result = getattr(kind, name)(self, *arguments, **named)
            self.seconds += time.perf_counter() - start
            return result

        def _look(self, *arguments):
            return self._time("_look", *arguments)

        def on_step_begin(self, *arguments, **named):
            return self._time("on_step_begin", *arguments, **named)

        def on_step_end(self, *arguments, **named):
            return self._time("on_step_end", *arguments, **named)

        def on_log(self, *arguments, **named):
            return self._time("on_log", *arguments, **named)

    return Timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training (default: 60)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    results = Results("Statistics callbacks", f"Seconds of each callback in {arguments.steps} steps of the demo's run.")
    tokenizer, train, held_out = prepare_text(None, "tiny")
    model = make_model(make_config("tiny", tokenizer), tokenizer, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, train, held_out, Path(folder), arguments.steps, seed=0)
        callbacks = [timed(kind)() for kind in (EngramGateStatisticsCallback, EngramRowStatisticsCallback)]
        for callback in callbacks:
            trainer.add_callback(callback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    rows = [[type(own).__mro__[1].__name__, own.seconds, own.seconds / seconds] for own in callbacks]
    columns = {"callback": "", "seconds": ".2f", "share of training": ".2%"}
    results.tables = [Table(columns, [*rows, ["training", seconds, 1.0]])]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

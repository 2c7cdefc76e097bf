"""What the statistics callbacks cost: their own seconds in a run of the demo's model, as a share of all.

python scripts/bench_callbacks.py         a minute on 2 cores
"""

import argparse
import tempfile
import time
from pathlib import Path

from tiny_recipe import make_config, make_model, make_trainer, prepare_text

from engram_hf import EngramGateStatisticsCallback, EngramRowStatisticsCallback


def timed(kind: type) -> type:
    """The callback, with the seconds that are spent in it."""

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
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    tokenizer, train, held_out = prepare_text(None, "tiny")
    model = make_model(make_config("tiny", tokenizer), tokenizer, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, train, held_out, Path(folder), steps, seed=0)
        callbacks = [timed(kind)() for kind in (EngramGateStatisticsCallback, EngramRowStatisticsCallback)]
        for callback in callbacks:
            trainer.add_callback(callback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    for callback in callbacks:
        print(f"{type(callback).__mro__[1].__name__}: {callback.seconds / seconds:.2%} of {seconds:.0f} seconds")


if __name__ == "__main__":
    main()

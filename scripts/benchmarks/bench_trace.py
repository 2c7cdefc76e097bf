"""How long a trace takes: without effects and with them, beside a plain forward of the same text.

    python scripts/benchmarks/bench_trace.py                        a minute on 2 cores: a new model of the demo's size
    python scripts/benchmarks/bench_trace.py --model output/tiny    the demo's own

Every round runs all of them, so that a slow minute of the machine meets all. The times are medians. Before it times, it
compares the effects with an ordinary forward for each of some tokens.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from helpers.results import Results, Table, add_results_argument
from helpers.text import gather_documents
from helpers.tiny_recipe import make_config, make_model, prepare_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_hf.insight import show, silenced, trace


CHECKED_TOKENS = 8


@torch.no_grad()
def check(model, tokenizer, text: str) -> float:
    """The largest difference of an effect to the one that an ordinary forward gives, in nats.

    Raises:
        SystemExit: it is more than rounding.
    """
    found, worst = trace(model, tokenizer, text), 0.0
    ids = torch.tensor(found.token_ids)[None]
    count = ids.shape[1]
    plain = model(ids, use_cache=False).logits[0].log_softmax(-1)
    for position in range(0, count - 1, max(1, count // CHECKED_TOKENS)):
        for layer_id, effect in found.effects.items():
            with silenced(model, [layer_id], positions=[position]):
                silent = model(ids, use_cache=False).logits[0, position].log_softmax(-1)
            next_id = ids[0, position + 1]
            worst = max(worst, abs(float(plain[position, next_id] - silent[next_id]) - float(effect.gain[position])))
    if worst > 1e-3:
        raise SystemExit(f"Effects differ from those of ordinary forwards by {worst:.2g} nats. Please report it.")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model (default: a new one of the demo's size)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2000], help="lengths (default: 512 2000)")
    parser.add_argument("--rounds", type=int, default=7, help="of each (default: 7)")
    add_results_argument(parser)
    arguments = parser.parse_args()
    about = "Seconds of a plain forward of a text, of a trace of it, and of showing the trace."
    results = Results("Traces", about)
    if arguments.model is None:
        tokenizer, _, _ = prepare_text(None, "tiny")
        model = make_model(make_config("tiny", tokenizer), tokenizer, seed=0)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model.eval()
    ids = tokenizer("\n".join(document[1] for document in gather_documents()[:20]))["input_ids"]
    rows = []
    for tokens in arguments.tokens:
        text = tokenizer.decode(ids[:tokens])
        worst = check(model, tokenizer, text)
        seconds: dict[str, list[float]] = {}
        with torch.no_grad():
            own = torch.tensor([ids[:tokens]])
            runs = {
                "plain forward": lambda own=own: model(own, use_cache=False),
                "trace without effects": lambda text=text: trace(model, tokenizer, text, effects=False),
                "trace": lambda text=text: trace(model, tokenizer, text),
            }
            for _ in range(arguments.rounds + 1):
                for name, run in runs.items():
                    start = time.perf_counter()
                    found = run()
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
                start = time.perf_counter()
                page = show(found).html
                seconds.setdefault("page", []).append(time.perf_counter() - start)
        # The first round only warms up.
        medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
        plain = medians["plain forward"]
        rows += [[tokens, name, value, value / plain] for name, value in medians.items()]
        print(f"{tokens} tokens: effects within {worst:.1e} nats; a page of {len(page) / 1e6:.1f} MB", flush=True)
    columns = {"tokens": ",d", "": "", "seconds": ".3f", "of a plain forward": ".2f"}
    results.tables = [Table(columns, rows)]
    results.write(arguments.results)


if __name__ == "__main__":
    main()

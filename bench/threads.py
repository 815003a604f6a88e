"""Two threads against one: tokens a second of the generation loop on the CPU, by the clock on the wall.

Both settings take turns in one process, so that what else the machine does meets both. A token's cost is the slope
between two lengths, as in `bench.generate`, whose networks and numbers of rows these are.

    python -m bench.threads [--threads 2] [--models M ...] [--batches B ...] [--output bench/results/threads.csv]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.generate import MODELS, OURS, build, possible, requests
from bench.timing import Timing, row, slopes, write_csv
from fastrnn import Network
from fastrnn.generate import make_engine, make_runner


def loop_on(threads: int, network: Network, batch: int, keywords: dict) -> Callable[[int], None]:
    """Generates as many tokens of each row as it is told, from weights that are packed once."""
    torch.set_num_threads(threads)
    runner = make_runner(network, **keywords)

    def loop(number: int) -> None:
        engine = make_engine(runner, requests(batch, number), batch, events=False)
        while engine.busy:
            engine.step()
            engine.take_completions()

    return loop


def measure(model: str, batch: int, threads: int) -> list[dict]:
    """The rows of one network and number of rows, in each precision; the ratios are printed."""
    network, found = build(MODELS[model]), []
    sizes = {"B": batch, "H": network.config.hidden_size, "L": network.config.num_layers}
    sizes |= {"I": network.config.input_size, "V": network.config.vocab_size}
    for name, (dtype, keywords, _) in OURS.items():
        on = functools.partial(loop_on, network=network, batch=batch, keywords=keywords)
        loops = {str(number): on(number) for number in (1, threads)}
        costs = possible(slopes(loops, time.perf_counter, rounds=7, seconds=0.15, budget=12.0))
        if len(costs) < len(loops):
            continue
        rates = {}
        for number, slope in costs.items():
            torch.set_num_threads(int(number))
            median, low, high = (batch * 1e6 / us for us in (slope.step.median, slope.step.p80, slope.step.p20))
            rates[number] = median
            found.append(row(f"generate {model}", name, Timing(median, low, high), "tokens/s", dtype=dtype, **sizes))
        one, many = rates["1"], rates[str(threads)]
        print(f"{model:28s} B={batch:<5d} {name:18s} {one:12,.0f} {many:12,.0f}  {many / one:.2f}x", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "threads.csv")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for batch in options.batches:
            rows += measure(model, batch, options.threads)
            write_csv(options.output, rows)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

"""Two threads against one: tokens a second of the generation loop on the CPU, by the clock on the wall.

What could be had is measured with it: as many processes as threads, each with a loop of its own on one thread, which
share nothing but the machine ("apart"). All settings take turns, so that what else the machine does meets each. A
token's cost is the slope between two lengths, as in `bench.generate`, whose networks and numbers of rows these are.

    python -m bench.threads [--threads 2] [--quick] [--models M ...] [--batches B ...] [--output CSV]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


def keep_busy(model: str, batch: int, name: str) -> None:
    """Generates without end on one thread; says so once the loop is set up."""
    network = build(MODELS[model])
    loop = loop_on(1, network, batch, OURS[name][1])
    loop(1)
    print("ready", flush=True)
    while True:
        loop(256)


@contextlib.contextmanager
def others(count: int, model: str, batch: int, name: str) -> Iterator[Callable[[Callable[[int], None]], Callable]]:
    """Processes that `keep_busy` while a loop runs that was wrapped by what this yields, and sleep otherwise."""
    command = [sys.executable, "-m", "bench.threads", "--keep-busy", model, str(batch), name]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]

    def tell(what: signal.Signals) -> None:
        for process in processes:
            process.send_signal(what)

    def beside(loop: Callable[[int], None]) -> Callable[[int], None]:
        def run(number: int) -> None:
            tell(signal.SIGCONT)
            loop(number)
            tell(signal.SIGSTOP)

        return run

    try:
        for process in processes:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()}")
        tell(signal.SIGSTOP)
        yield beside
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(model: str, batch: int, threads: int, pace: dict) -> list[dict]:
    """The rows of one network and number of rows, in each precision; the ratios are printed."""
    network, found = build(MODELS[model]), []
    sizes = {"B": batch, "H": network.config.hidden_size, "L": network.config.num_layers}
    sizes |= {"I": network.config.input_size, "V": network.config.vocab_size}
    for name, (dtype, keywords, _) in OURS.items():
        on = functools.partial(loop_on, network=network, batch=batch, keywords=keywords)
        with others(threads - 1, model, batch, name) as beside:
            loops = {"one": on(1), "many": on(threads), "apart": beside(on(1))}
            costs = possible(slopes(loops, time.perf_counter, **pace))
        if len(costs) < len(loops):
            continue
        rates = {}
        for setting, slope in costs.items():
            torch.set_num_threads(1 if setting == "one" else threads)
            factor = batch * 1e6 * (threads if setting == "apart" else 1)
            median, low, high = (factor / us for us in (slope.step.median, slope.step.p80, slope.step.p20))
            rates[setting] = median
            label = f"{name} apart" if setting == "apart" else name
            found.append(row(f"generate {model}", label, Timing(median, low, high), "tokens/s", dtype=dtype, **sizes))
        one, many, apart = rates["one"], rates["many"], rates["apart"]
        told = f"{one:12,.0f} {many:12,.0f}  {many / one:.2f}x, apart {apart / one:.2f}x"
        print(f"{model:28s} B={batch:<5d} {name:18s} {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "threads.csv")
    parser.add_argument("--keep-busy", nargs=3, metavar=("MODEL", "B", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keep_busy:
        model, batch, name = options.keep_busy
        keep_busy(model, int(batch), name)
    rows, pace = [], {"rounds": 7, "seconds": 0.15, "budget": 12.0}
    pace = {"rounds": 3, "seconds": 0.01} if options.quick else pace
    for model in options.models:
        for batch in options.batches:
            rows += measure(model, batch, options.threads, pace)
            write_csv(options.output, rows)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

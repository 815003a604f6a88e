"""Interleaved timing and the one CSV form of every benchmark.

Rivals run in turn within one process, round by round, so that a drift of the machine meets all of them; the median of
the rounds is quoted with the 20th and the 80th percentile. CPU time of one thread is the default clock: on a shared
machine it varies least. On a GPU the clock is wall time, read after the GPU has done all it was given.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import importlib.util
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

COLUMNS = (
    "op", "backend", "dtype", "T", "B", "I", "H", "L", "V", "median", "p20", "p80", "unit", "threads", "machine",
    "torch", "triton", "cuda", "commit", "date",
)  # fmt: skip


class Timing(NamedTuple):
    """Microseconds a call."""

    median: float
    p20: float
    p80: float


def synchronised() -> float:
    """Seconds of wall time once the GPU has done all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def clock_of(device: str) -> tuple[Callable[[], float], str]:
    """The clock of a device and the unit of a call that it timed."""
    return (synchronised, "us a call") if device == "cuda" else (time.process_time, "us CPU a call")


def interleaved(
    rivals: dict[str, Callable[[], object]], rounds: int = 9, seconds: float = 0.05,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:  # fmt: skip
    """Time each rival in every round for about ``seconds``; return microseconds a call by ``clock``.

    Where a call takes longer than four times ``seconds``, three rounds have to do.
    """
    repeats = {}
    for name, function in rivals.items():
        function()
        start = clock()
        function()
        once = max(clock() - start, 1e-6)
        repeats[name] = max(1, int(seconds / once))
        rounds = min(rounds, 3) if once > 4 * seconds else rounds
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, function in rivals.items():
            start = clock()
            for _ in range(repeats[name]):
                function()
            samples[name].append((clock() - start) / repeats[name] * 1e6)
    return {name: summary(values) for name, values in samples.items()}


class Slope(NamedTuple):
    """What a loop of n steps costs: ``step`` microseconds for each more step, ``setup`` microseconds before them."""

    step: Timing
    setup: Timing


def slopes(
    loops: dict[str, Callable[[int], object]], clock: Callable[[], float] = time.process_time, rounds: int = 5,
    seconds: float = 0.1, budget: float = 15.0,
) -> dict[str, Slope]:  # fmt: skip
    """The `Slope` of each loop, from the times of two lengths in each round.

    The difference of the lengths takes ``seconds``, or twice the set-up where that is longer. ``rounds`` shrink to no
    fewer than three where all of them would take longer than ``budget`` seconds.
    """

    def timed(loop: Callable[[int], object], steps: int) -> float:
        start = clock()
        loop(steps)
        return clock() - start

    lengths, round_seconds = {}, 0.0
    for name, loop in loops.items():
        number, one = 1, timed(loop, 1)
        one = min(one, timed(loop, 1)) if one < seconds else one  # the first call may have had something to set up
        while (once := timed(loop, number + 1)) < seconds / 4:
            number *= 4
        each = max(once - one, once / 10) / number
        more = max(1, round(max(seconds, 2 * (one - each)) / each))
        lengths[name] = (max(1, more // 2), max(1, more // 2) + more)
        round_seconds += one + sum(lengths[name]) * each
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for _ in range(max(3, min(rounds, int(budget / round_seconds)))):
        for name, loop in loops.items():
            (few, many), one = lengths[name], timed(loop, 1)
            short = timed(loop, few) if few > 1 else one
            each = (timed(loop, many) - short) / (many - few)
            samples[name].append((each * 1e6, (one - each) * 1e6))
    return {name: Slope(*(summary(list(values)) for values in zip(*pairs))) for name, pairs in samples.items()}


def summary(values: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3])


@functools.cache
def launch_errors() -> tuple[type[Exception], ...]:
    """What a rival that cannot run here raises: torch's errors, and Triton's where it is installed."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def first_line(error: Exception) -> str:
    """What an error says first; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def row(
    op: str, backend: str, timing: Timing, unit: str = "us CPU a call", device: str = "cpu", **sizes
) -> dict:  # fmt: skip
    """One measurement as a CSV row; ``sizes`` are any of dtype, T, B, I, H, L, V."""
    return {
        "op": op, "backend": backend, **sizes, "median": f"{timing.median:.6g}", "p20": f"{timing.p20:.6g}",
        "p80": f"{timing.p80:.6g}", "unit": unit, "threads": torch.get_num_threads(), "machine": machine(device),
        "torch": torch.__version__, "triton": _version("triton"), "cuda": cuda(device), "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write the rows with the columns of `COLUMNS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def machine(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cuda(device: str) -> str:
    """The CUDA that torch is built with and the cuDNN it runs, for a GPU."""
    return f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if device == "cuda" else ""


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


@functools.cache
def _commit() -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else ""

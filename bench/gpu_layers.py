"""The map of the layers on a GPU: microseconds a step of torch.nn's and ours, and what PyTorch ran.

Every shape runs forward, and forward and backward, by torch.nn, by our automatic choice and by each of our backends
that takes it, interleaved, after outputs and gradients have been compared with torch.nn in float64. Plain shapes (one
layer, one direction, padded) come first; when the time is up the rest is left out and counted. The last part of the
time goes to a list of what ran: the kernels that PyTorch launched, and the backend that was chosen.

    python -m bench.gpu_layers [--device cuda] [--seconds 200] [--quick] [--compile-only K/N] [--output CSV]

``--compile-only K/N`` calls the K-th of N parts of ours once and times nothing: Triton keeps what it compiles, so N
processes side by side save the measuring one the wait. Exit status 1 where a rival was wrong or failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from bench.gpu import KEY
from bench.timing import Timing, clock_of, first_line, interleaved, launch_errors, machine, row, write_csv
from fastrnn import backends

STEPS = 128
# How float32 is multiplied is torch's setting; "tf32" is float32 with products of TF32.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "tf32": 2**-11}
FLOOR = 16  # roundings of the largest expected value that a result may always err by
PROFILED = 0.15  # of the time is for what ran
WAYS = {False: "forward", True: "forward+backward"}


class Shape(NamedTuple):
    """One layer or stack; inputs are as wide as the state."""

    cell: str
    dtype: str
    hidden: int
    batch: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    steps: int = STEPS

    def op(self, gradient: bool) -> str:
        flags = [name for name in ("bidirectional", "packed") if getattr(self, name)]
        return " ".join([self.cell, WAYS[gradient], *flags])

    def sizes(self) -> dict:
        return dict(dtype=self.dtype, T=self.steps, B=self.batch, I=self.hidden, H=self.hidden, L=self.layers)

    def __str__(self) -> str:
        return f"{self.op(False)} {self.dtype} T={self.steps} B={self.batch} H={self.hidden} L={self.layers}"


def shapes(quick: bool) -> list[Shape]:
    """All shapes, the plain ones first, in a fixed random order within a kind, so that a part of them is a sample."""
    if quick:
        small = dict(hidden=16, batch=3, steps=2)
        return [Shape("LSTM", "float16", **small), Shape("GRU", "tf32", layers=2, packed=True, **small)]
    every = list(
        itertools.starmap(
            Shape,
            itertools.product(
                ("LSTM", "GRU"), DTYPES, (64, 128, 256, 512, 1024), (1, 8, 16, 64, 128), (1, 2, 4), (False, True),
                (False, True),
            ),
        )
    )  # fmt: skip
    random.Random(0).shuffle(every)
    return sorted(every, key=lambda s: s.layers.bit_length() - 1 + s.bidirectional + s.packed)


# --- the rivals of a shape --------------------------------------------------------------------------------------------

Input = Tensor | PackedSequence
Run = Callable[[], tuple[Tensor, ...]]


def build(shape: Shape, device: str) -> tuple[nn.Module, nn.Module, nn.Module, Input]:
    """torch.nn's module, ours, torch.nn's in float64 with the same weights, and an input that wants a gradient."""
    torch.manual_seed(0)
    sizes = (shape.hidden, shape.hidden, shape.layers)
    theirs = getattr(nn, shape.cell)(*sizes, bidirectional=shape.bidirectional).to(device, DTYPES[shape.dtype])
    ours = getattr(fastrnn, shape.cell)(*sizes, bidirectional=shape.bidirectional).to(device, DTYPES[shape.dtype])
    ours.load_state_dict(theirs.state_dict())
    x: Input = torch.randn(shape.steps, shape.batch, shape.hidden, device=device).to(DTYPES[shape.dtype])
    if shape.packed:
        x = pack_padded_sequence(x, torch.linspace(shape.steps, (shape.steps + 1) // 2, shape.batch).long())
    return theirs, ours, copy.deepcopy(theirs).double(), leaf(x)


def leaf(x: Input, dtype: torch.dtype | None = None) -> Input:
    """The same values, wanting a gradient."""
    data = (x.data if isinstance(x, PackedSequence) else x).detach().to(dtype).requires_grad_()
    return x._replace(data=data) if isinstance(x, PackedSequence) else data


def runner(layer: nn.Module, x: Input, backend: str | None, gradient: bool) -> Run:
    """A call that returns the output, and with ``gradient`` those of the input and of every weight."""
    wanted = [x.data if isinstance(x, PackedSequence) else x, *layer.parameters()]

    def run() -> tuple[Tensor, ...]:
        named = fastrnn.backend(backend) if backend else contextlib.nullcontext()
        with named, torch.set_grad_enabled(gradient):
            y = layer(x)[0]
            y = y.data if isinstance(y, PackedSequence) else y
            return (y, *torch.autograd.grad(y, wanted, y.detach())) if gradient else (y,)

    return run


def tried(names: list[str], make: Callable[[str], Run], problems: list[str], what: str) -> dict[str, Run]:
    """Those that run; a refusal is no problem, another error is one."""
    found: dict[str, Run] = {}
    for name in names:
        run = make(name)
        try:
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except backends.BackendRefusal:
            continue
        except launch_errors() as error:
            problems.append(f"{name} fails on {what}: {first_line(error)}")
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again where the error has left the GPU unusable
            continue
        found[name] = run
    return found


def check(
    rivals: dict[str, Run], expected: tuple[Tensor, ...], rounding: float, problems: list[str], what: str
) -> None:  # fmt: skip
    """Remove the rivals whose results err by more than three times torch.nn's own error and `FLOOR` roundings."""

    def errors(run: Run) -> list[float]:
        pairs = zip(run(), expected, strict=True)
        return [(found.double() - wanted).abs().max().nan_to_num(float("inf")).item() for found, wanted in pairs]

    floors = [FLOOR * rounding * wanted.abs().max().item() for wanted in expected]
    allowed = [3 * error + floor for error, floor in zip(errors(rivals["torch"]), floors)]
    for name in [name for name in rivals if name != "torch"]:
        wrong = [(e, a) for e, a in zip(errors(rivals[name]), allowed) if not e <= a]
        if wrong:
            problems.append(f"{name} is wrong on {what}: {wrong[0][0]:.2e} where {wrong[0][1]:.2e} is allowed")
            del rivals[name]


def entrants(shape: Shape, device: str, gradient: bool, problems: list[str]) -> tuple[dict[str, Run], str]:
    """The checked rivals of a shape, and the backend of the automatic choice."""
    theirs, ours, double, x = build(shape, device)
    names = ["auto", *(name for name in backends.TABLE if name not in ("reference", "aten"))]
    what = f"{shape}, {WAYS[gradient]}"

    def make(name: str) -> Run:
        layer, backend = (theirs if name == "torch" else ours), (name if name in backends.TABLE else None)
        return runner(layer, x, backend, gradient)

    rivals = tried(["torch", *names], make, problems, what)
    if "torch" not in rivals:
        return {}, ""
    expected = runner(double, leaf(x, torch.float64), None, gradient)()
    check(rivals, expected, ROUNDING[shape.dtype], problems, what)
    with torch.set_grad_enabled(gradient):
        told = fastrnn.explain(ours, x) if "auto" in rivals else []
    return rivals, told[0][1].backend if told else ""


# --- measuring --------------------------------------------------------------------------------------------------------


def kernels(run: Run, device: str) -> str:
    """The names of the kernels (of the operators, on a CPU) of one call with their numbers, the most frequent first."""
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    where = DeviceType.CUDA if device == "cuda" else DeviceType.CPU  # launches are events of the CPU
    events = [event for event in profile.key_averages() if event.device_type == where]
    counts = sorted(((event.count, event.key) for event in events), reverse=True)
    return "; ".join(f"{count} x {name[:160]}" for count, name in counts[:8])


class Map:
    """What has been measured, its files and its key figures."""

    def __init__(self, path: Path, device: str, pace: dict) -> None:
        self.path, self.device, self.pace = path, device, pace
        self.rows: list[dict] = []
        self.ran: list[dict] = []
        self.problems: list[str] = []
        self.ratios: dict[tuple[str, str, str, str], list[float]] = {}

    def measure(self, shape: Shape, gradient: bool) -> None:
        """Time the rivals of a shape; one printed line."""
        rivals, chosen = entrants(shape, self.device, gradient, self.problems)
        if not rivals:
            return
        clock, unit = clock_of(self.device)
        timings = interleaved(rivals, clock=clock, **self.pace)
        op, base, steps = shape.op(gradient), timings["torch"].median, shape.steps
        for name, timing in timings.items():
            each = Timing(*(value / steps for value in timing))
            unit_of_step = unit.replace("a call", "a step")
            self.rows.append(row(op, name, each, unit_of_step, self.device, **shape.sizes()))
            if name != "torch":
                key = (shape.cell, WAYS[gradient], shape.dtype, name)
                self.ratios.setdefault(key, []).append(base / timing.median)
        figures = "  ".join(f"{n} {t.median / steps:.2f} ({base / t.median:.2f}x)" for n, t in timings.items())
        what = f"{op} {shape.dtype} B={shape.batch} H={shape.hidden} L={shape.layers}"
        print(f"{what}: {figures}; auto is {chosen}", flush=True)
        write_csv(self.path, self.rows)
        self.tell(shape, gradient, "auto", chosen)

    def tell(self, shape: Shape, gradient: bool, backend: str, ran: str) -> None:
        """A row of the file of what ran."""
        told = dict(op=shape.op(gradient), backend=backend, **shape.sizes(), ran=ran)
        self.ran.append(told | {"machine": machine(self.device), "torch": torch.__version__})
        with self.path.with_name(f"{self.path.stem}-ran.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.ran[0]))
            writer.writeheader()
            writer.writerows(self.ran)

    def profile(self, shape: Shape, gradient: bool) -> None:
        """List the kernels that PyTorch runs for a shape."""
        theirs, _, _, x = build(shape, self.device)
        run = runner(theirs, x, None, gradient)
        run()
        self.tell(shape, gradient, "torch", kernels(run, self.device))

    def keys(self) -> Iterator[str]:
        """The geometric mean and the range of the ratios to torch.nn, for each cell, way, dtype and rival."""
        for (cell, way, dtype, name), found in sorted(self.ratios.items()):
            mean, lost = statistics.geometric_mean(found), sum(ratio < 0.95 for ratio in found)
            spread = f"{min(found):.2f} to {max(found):.2f}, slower than 0.95x in {lost} of {len(found)}"
            yield f"{cell} {way} {dtype}: {name} {mean:.2f}x of torch.nn ({spread})"


def compile_part(part: str, every: list[Shape], device: str, seconds: float) -> list[str]:
    """Call ours once for each plain shape of a part, which is whole in cell, dtype and H; what failed."""
    number, of = map(int, part.split("/"))
    keys = sorted({(s.cell, s.dtype, s.hidden) for s in every})
    mine = [s for s in every if keys.index((s.cell, s.dtype, s.hidden)) % of == number]
    end, problems, done = time.perf_counter() + seconds, [], 0
    names = [name for name in backends.TABLE if name not in ("reference", "aten", "cpu")]
    for shape in mine:
        if time.perf_counter() > end or shape.layers > 1 or shape.bidirectional or shape.packed:
            break
        _, ours, _, x = build(shape, device)
        for gradient in WAYS:
            tried(names, lambda name: runner(ours, x, name, gradient), problems, str(shape))  # noqa: B023 (used at once)
        done += 1
    print(f"{done} shapes called")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--quick", action="store_true", help="two tiny shapes")
    parser.add_argument("--compile-only", metavar="K/N")
    parser.add_argument("--output", type=Path, default=Path("build") / "gpu" / "layers.csv")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # cuDNN's RNN may take TF32 anyway
    start, every = time.perf_counter(), shapes(options.quick)
    if options.compile_only:
        problems = compile_part(options.compile_only, every, options.device, options.seconds)
        print("\n".join(problems))
        return int(bool(problems))
    pace = {"rounds": 3, "seconds": 0.001} if options.quick else {"rounds": 5, "seconds": 0.01}
    found, timed = Map(options.output, options.device, pace), []
    for shape in every:
        if time.perf_counter() - start > (1 - PROFILED) * options.seconds:
            break
        for gradient in WAYS:
            found.measure(shape, gradient)
        timed.append(shape)
    profiled = 0
    for shape, gradient in itertools.product(timed, WAYS):
        if time.perf_counter() - start > options.seconds:
            break
        found.profile(shape, gradient)
        profiled += 1
    for line in (*(f"not timed: {problem}" for problem in found.problems), *found.keys()):
        print(f"{KEY}{line}")
    left = f"{len(every) - len(timed)} left out for want of time"
    print(f"{KEY}{len(timed)} of {len(every)} shapes timed, {left}; kernels listed of {profiled} calls")
    return int(bool(found.problems))


if __name__ == "__main__":
    raise SystemExit(main())

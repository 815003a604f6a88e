"""Layers and cells against torch.nn: microseconds of CPU time for forward, and for forward and backward.

Each shape runs the automatic choice, every backend of ours, and torch.nn with oneDNN on and (float32) off, interleaved
in one run, after the outputs and the gradients of all of them have been compared with torch.nn in float64. "products"
are the products of the same sizes alone, by PyTorch: what is left of a call beside them, or won against them.

    python -m bench.sequence [--threads 1] [--quick] [--shapes all] [--output bench/results/sequence.csv]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastrnn
from bench.timing import interleaved, row, write_csv

# T, B, L, H, I: the stacks of the five tutorials and of word and molecule models, then single steps.
SHAPES = [
    (100, 128, 4, 256, 1), (100, 64, 1, 512, 512), (35, 20, 2, 650, 650), (100, 64, 1, 64, 82), (100, 1, 4, 256, 1),
    (100, 1, 1, 64, 82), (5, 1, 1, 32, 16), (5, 16, 1, 64, 64),
    *((1, batch, 1, hidden, hidden) for hidden in (64, 256) for batch in (1, 16, 256)),
]  # fmt: skip
SHORT = [(t, batch, 1, h, h) for h in (512, 1024) for t, batch in ((2, 1), (5, 1), (12, 1), (2, 16))]
# Those to choose from: the last are few steps, where packing the weights counts.
OF_NAME = {
    "all": SHAPES, "sequences": [shape for shape in SHAPES if shape[0] > 1],
    "steps": [shape for shape in SHAPES if shape[0] == 1], "short": SHORT,
}  # fmt: skip
QUICK = [(5, 1, 1, 32, 16), (1, 16, 1, 64, 64)]
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")  # run the shapes with T=1 and L=1


def runner(layer: nn.Module, x: Tensor, backend: str | None, onednn: bool, gradient: bool) -> Callable[[], Tensor]:
    """A call of ``layer`` under the given settings; with ``gradient`` forward and backward."""

    def run() -> Tensor:
        no_onednn = contextlib.nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False)
        with fastrnn.backend(backend), no_onednn, torch.set_grad_enabled(gradient):
            y = first(layer(x))
            if gradient:
                y.backward(y.detach())
            return y

    def run_plainly() -> Tensor:
        with torch.set_grad_enabled(gradient):
            y = first(layer(x))
            if gradient:
                y.backward(y.detach())
            return y

    # What a context costs is much of a single step, so a rival that needs none has none.
    return run_plainly if backend is None and onednn else run


def first(result: Tensor | tuple) -> Tensor:
    """The output of a layer, the (first) state of a cell."""
    return result if isinstance(result, Tensor) else result[0]


def check(rivals: dict[str, Callable[[], Tensor]], double: nn.Module, x: Tensor) -> None:
    """Refuse to time a rival whose output is further from float64 than three times torch.nn's own error."""
    with torch.no_grad():
        expected = first(double(x.double()))
        errors = {name: (run().double() - expected).abs().max().item() for name, run in rivals.items()}
    allowed = 3 * errors["torch"] + 64 * torch.finfo(x.dtype).eps
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        raise SystemExit(f"not timed: errors {wrong} exceed {allowed:.2e} on shape {tuple(x.shape)}")


def products(name: str, shape: tuple[int, ...], dtype: torch.dtype, gradient: bool) -> Callable[[], None]:
    """The matrix products of a call and nothing else, by PyTorch: of the inputs of all steps at once, of the state step
    by step; with ``gradient`` those of its gradient too, of the weights at once. x itself needs no gradient.
    """
    time, batch, layers, hidden, inputs = shape
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[name.removesuffix("Cell")] * hidden

    def made(*sizes: int) -> Tensor:
        return torch.randn(sizes).to(dtype)

    def run() -> None:
        for x, w_ih in stack:
            x @ w_ih.t()
            for _ in range(time):
                h @ w_hh.t()
            if gradient:
                for _ in range(time):
                    da @ w_hh
                if x is not stack[0][0]:
                    all_da @ w_ih
                all_da.t() @ x
                all_da.t() @ all_h

    stack = [(made(time * batch, n), made(rows, n)) for n in (inputs, *[hidden] * (layers - 1))]
    h, da, w_hh = made(batch, hidden), made(batch, rows), made(rows, hidden)
    all_h, all_da = made(time * batch, hidden), made(time * batch, rows)
    return run


def measure(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, gradient: bool, pace: dict[str, float]
) -> list[dict]:
    """Rows of one shape; printed as they come."""
    time, batch, layers, hidden, inputs = shape
    torch.manual_seed(0)
    sizes = (inputs, hidden) if name in CELLS else (inputs, hidden, layers)
    theirs, layer = getattr(nn, name)(*sizes), getattr(fastrnn, name)(*sizes)
    layer.load_state_dict(theirs.state_dict())
    double = copy.deepcopy(theirs).double()
    theirs, layer = theirs.to(dtype), layer.to(dtype)
    double.load_state_dict(theirs.state_dict())
    x = (torch.randn(batch, inputs) if name in CELLS else torch.randn(time, batch, inputs)).to(dtype)
    rivals = {"auto": runner(layer, x, None, True, gradient)}
    for backend, why in fastrnn.backends.available().items():
        if why is None and backend != "reference":
            rivals[backend] = runner(layer, x, backend, True, gradient)
    rivals["torch"] = runner(theirs, x, None, True, gradient)
    if dtype != torch.bfloat16:  # which PyTorch multiplies 30 to 60 times slower without oneDNN
        rivals["torch without oneDNN"] = runner(theirs, x, None, False, gradient)
    check(rivals, double, x)
    precision = str(dtype).removeprefix("torch.")
    timings = interleaved(rivals | {"products": products(name, shape, dtype, gradient)}, **pace)
    best = min(timing.median for rival, timing in timings.items() if rival.startswith("torch"))
    op = f"{name} {'forward+backward' if gradient else 'forward'}"
    figures = "  ".join(f"{rival} {t.median:.0f} ({best / t.median:.2f}x)" for rival, t in timings.items())
    print(f"{op} {precision} T={time} B={batch} L={layers} H={hidden} I={inputs}: {figures}", flush=True)
    sizes = dict(dtype=precision, T=time, B=batch, I=inputs, H=hidden, L=layers)
    return [row(op, rival, timing, **sizes) for rival, timing in timings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="sequence mode against torch.nn (ratios to its faster setting)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two small shapes, to see that it runs")
    parser.add_argument("--shapes", choices=OF_NAME, default="all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sequence.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # said whenever oneDNN is switched off
    rows, pace = [], {"rounds": 3, "seconds": 0.002} if options.quick else {}
    for shape in QUICK if options.quick else OF_NAME[options.shapes]:
        for name in LAYERS + CELLS if shape[0] == shape[2] == 1 else LAYERS:
            for dtype in (torch.float32, torch.bfloat16):
                for gradient in (False, True):
                    rows += measure(name, shape, dtype, gradient, pace)
    write_csv(options.output, rows)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

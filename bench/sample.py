"""One token a row against PyTorch: microseconds a call, of CPU time on one thread, of wall time on a GPU.

Rivals: softmax and multinomial, what most loops write, the same compiled by torch.compile (on a GPU), and softmax with
the exponential race (gpt-fast's way, one random number a logit). Ours runs plain, with log-probabilities and margins,
as the op alone (which does not ask whether every row could be drawn from, and so never waits for a GPU), and with top_k
and top_p, which PyTorch's side does by sorting as Hugging Face does. Before a shape is timed the tokens
of every backend are compared with those of the reference on the CPU on the same logits; one that differs is named, not
timed, and makes the exit status 1. On a GPU the bytes of the logits a second are set against a measured copy.

    python -m bench.sample [--threads 1] [--device cpu] [--seconds 600] [--quick] [--output bench/results/sample.csv]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastrnn
from bench import peers
from bench.gpu import KEY
from bench.timing import Timing, clock_of, first_line, interleaved, launch_errors, row, write_csv
from fastrnn import gpu, ops
from fastrnn.backends import Call, automatic

SHAPES = {  # B, V
    "cpu": [(1, 65), (256, 65), (64, 10000), (8, 50257)],
    "cuda": [(1, 65), (256, 65), (1024, 256), (64, 10000), (256, 50257), (8, 128256), (64, 32768)],
}
QUICK = [(1, 65), (16, 1000)]
COMPARED = 1 << 20  # logits of a shape whose rows are drawn by the reference too: all on a CPU, the first rows of more
COPIED = 1 << 28  # bytes of the copy whose bandwidth is measured
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9


def multinomial(logits: Tensor) -> Tensor:
    return peers.multinomial(logits / TEMPERATURE)


def filtered_multinomial(logits: Tensor) -> Tensor:
    """Temperature, top_k, top_p as Hugging Face's warpers do them."""
    scores = logits / TEMPERATURE
    smallest = scores.topk(min(TOP_K, scores.shape[-1]))[0][:, -1:]
    scores = scores.masked_fill(scores < smallest, float("-inf"))
    ordered, ids = scores.sort(-1)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - TOP_P
    removed[:, -1] = False
    scores = scores.masked_fill(removed.scatter(-1, ids, removed), float("-inf"))
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def ours(logits: Tensor, backend: str | None, **options) -> Callable[[], object]:
    """A call of `fastrnn.sample` on a backend; as a user's where the table would choose that backend itself."""
    chosen = automatic(Call("sample", logits.device.type, torch.float32, 1, len(logits), 0, logits.shape[1]))
    if backend in (None, chosen.backend):
        return functools.partial(fastrnn.sample, logits, TEMPERATURE, seed=1, **options)

    def run() -> object:
        with fastrnn.backend(backend):
            return fastrnn.sample(logits, TEMPERATURE, seed=1, **options)

    return run


def op_alone(logits: Tensor, backend: str | None) -> Callable[[], object]:
    """A call of the op, whose parameters lie on the device already."""
    scale, top_k, top_p, min_p = fastrnn.SamplingParams(TEMPERATURE).numbers()
    rows = torch.arange(len(logits), device=logits.device)
    floats = [torch.full_like(rows, value, dtype=torch.float32) for value in (scale, min_p)]
    numbers = [torch.full_like(rows, value) for value in (top_k, top_p, 1, 0)]
    given = (logits, floats[0], *numbers[:2], floats[1], None, numbers[2], rows, numbers[3])

    def run() -> object:
        with fastrnn.backend(backend):
            return ops.sample(*given)

    return run


def of_torch(logits: Tensor) -> dict[tuple[str, str], Callable[[], object]]:
    """What PyTorch offers, by op and name."""
    found: dict[tuple[str, str], Callable[[], object]] = {
        ("sample", "torch multinomial"): lambda: multinomial(logits),
        ("sample", "torch exponential race"): lambda: peers.race(logits / TEMPERATURE),
        ("sample top_k top_p", "torch sort"): lambda: filtered_multinomial(logits),
    }
    if logits.is_cuda:
        torch._dynamo.reset()
        function = torch.compile(multinomial, dynamic=False)
        try:
            function(logits)
        except launch_errors() as error:
            print(f"  torch.compile: not timed: {first_line(error)}")
        else:
            found["sample", "torch multinomial compiled"] = lambda: function(logits)
    return found


def copy_bandwidth(device: str, size: int = COPIED) -> Timing:
    """10^9 bytes a second, read and written, of copies of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = interleaved({"copy": lambda: target.copy_(source)}, rounds=5, seconds=0.01, clock=clock_of(device)[0])
    return Timing(*(2 * size / value / 1e3 for value in found["copy"]))


OPS: dict[str, Callable[[Tensor, str | None], Callable[[], object]]] = {
    "sample": ours,
    "sample op": op_alone,
    "sample details": functools.partial(ours, return_details=True),
    "sample top_k top_p": functools.partial(ours, top_k=TOP_K, top_p=TOP_P),
}


class Bench:
    """What has been measured on a device: rows for the CSV, key figures, and backends that drew wrong tokens."""

    def __init__(self, device: str, backends: list[str], pace: dict) -> None:
        self.device, self.backends, self.pace = device, backends, pace
        self.rows: list[dict] = []
        self.keys: list[str] = []
        self.wrong: list[str] = []
        self.bandwidth = None
        if device == "cuda":
            self.bandwidth = copy_bandwidth(device)
            self.rows.append(row("copy", "torch", self.bandwidth, "GB/s", device))
            self.keys.append(f"copy: {self.bandwidth.median:.0f} GB/s read and written")

    def rivals(self, logits: Tensor) -> dict[tuple[str, str], Callable[[], object]]:
        """PyTorch's, and ours where they draw the reference's tokens."""
        found = of_torch(logits)
        first = max(1, min(len(logits), COMPARED // logits.shape[1]))
        for op, make in OPS.items():
            expected = tokens(make(logits[:first].cpu(), "reference")())
            for backend in self.backends:
                try:
                    drawn = tokens(make(logits, backend)())[:first].cpu()
                except fastrnn.BackendRefusal as refusal:
                    print(f"  {backend}: not timed: {refusal}")
                    continue
                except launch_errors() as error:
                    self.wrong.append(f"{op} of {backend} fails at {tuple(logits.shape)}: {first_line(error)}")
                    continue
                if torch.equal(drawn, expected):
                    found[op, backend] = make(logits, backend)
                else:
                    share = f"{(drawn != expected).sum()} of {first} tokens"
                    self.wrong.append(f"{op} of {backend} at {tuple(logits.shape)}: {share} differ from the reference")
        return found

    def measure(self, batch: int, vocabulary: int) -> None:
        """Time one shape; printed as it comes."""
        logits = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
        rivals, (clock, unit) = self.rivals(logits.to(self.device)), clock_of(self.device)
        timings = interleaved({" / ".join(key): run for key, run in rivals.items()}, clock=clock, **self.pace)
        base = min(timings[f"sample / {name}"].median for op, name in rivals if op == "sample" and "torch" in name)
        for op, backend in rivals:
            timing, roof = timings[f"{op} / {backend}"], ""
            if self.bandwidth:
                read = batch * vocabulary * 4 / timing.median / 1e3
                roof = f"{100 * read / self.bandwidth.median:6.1f} % of the copy"
            what = f"B={batch:<4} V={vocabulary:<6} {op:<19} {backend:<26} {timing.median:10.1f} us {roof}"
            print(what, flush=True)
            if backend in self.backends and op in ("sample", "sample op"):
                self.keys.append(f"{what} {base / timing.median:.2f}x of the fastest of torch")
            self.rows.append(row(op, backend, timing, unit, self.device, dtype="float32", B=batch, V=vocabulary))


def tokens(found: Tensor | tuple) -> Tensor:
    """The tokens, which a `fastrnn.Draw` and the op's results begin with."""
    return found if isinstance(found, Tensor) else found[0]


def main() -> int:
    """Measure every shape and write the CSV after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no further shape is started")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        others = {"aten", "cpu", "reference"}  # the reference is no rival there
    else:
        others = {"aten", "cuda"} | (set() if gpu.interpreting() else {"triton"})
    backends = [name for name in fastrnn.backends.TABLE if name not in others]
    pace = {"rounds": 5, "seconds": 0.02} if options.device == "cuda" else {}
    bench = Bench(options.device, backends, {"rounds": 3, "seconds": 0.002} if options.quick else pace)
    shapes, start = QUICK if options.quick else SHAPES[options.device], time.perf_counter()
    for number, shape in enumerate(shapes):
        if time.perf_counter() - start > options.seconds:
            bench.keys.append(f"{len(shapes) - number} of {len(shapes)} shapes left out for want of time")
            break
        bench.measure(*shape)
        if options.output:
            write_csv(options.output, bench.rows)
    for line in (*(f"not timed: {fault}" for fault in bench.wrong), *bench.keys):
        print(f"{KEY}{line}")
    return int(bool(bench.wrong))


if __name__ == "__main__":
    raise SystemExit(main())

"""One token a row against PyTorch: microseconds of CPU time a call, on one thread.

Rivals: softmax and multinomial, what most loops write, and softmax with the exponential race (gpt-fast's way,
one random number a logit). Ours runs plain, with log-probabilities and margins, and with top_k and top_p, which
PyTorch's side does by sorting as Hugging Face does. Before a shape is timed the tokens of every backend are compared
with the reference's on the same logits, and a refusal stops the run.

    python -m bench.sample [--threads 1] [--quick] [--output bench/results/sample.csv]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastrnn
from bench.timing import interleaved, row, write_csv

SHAPES = [(1, 65), (256, 65), (64, 10000), (8, 50257)]  # B, V
QUICK = [(1, 65), (16, 1000)]
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits / TEMPERATURE, -1), 1)[:, 0]


def exponential_race(logits: Tensor) -> Tensor:
    probabilities = torch.softmax(logits / TEMPERATURE, -1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


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
    """A call of `fastrnn.sample` on a backend."""

    def run() -> object:
        with fastrnn.backend(backend):
            return fastrnn.sample(logits, TEMPERATURE, seed=1, **options)

    return run


def measure(batch: int, vocabulary: int, backends: list[str], pace: dict[str, float]) -> list[dict]:
    """Rows of one shape; printed as they come."""
    logits = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    rivals: dict[tuple[str, str], Callable[[], object]] = {
        ("sample", "torch multinomial"): lambda: multinomial(logits),
        ("sample", "torch exponential race"): lambda: exponential_race(logits),
        ("sample top_k top_p", "torch sort"): lambda: filtered_multinomial(logits),
    }
    for op, options in (
        ("sample", {}), ("sample details", {"return_details": True}),
        ("sample top_k top_p", {"top_k": TOP_K, "top_p": TOP_P}),
    ):  # fmt: skip
        expected = ours(logits, "reference", **options)()
        for backend in backends:
            found = ours(logits, backend, **options)()
            tokens = (found.token, expected.token) if options.get("return_details") else (found, expected)
            if not torch.equal(*tokens):
                raise SystemExit(f"not timed: {backend} draws other tokens than the reference at {tuple(logits.shape)}")
            rivals[op, backend] = ours(logits, backend, **options)
    timings = interleaved({" / ".join(key): run for key, run in rivals.items()}, **pace)
    rows = []
    for op, backend in rivals:
        timing = timings[f"{op} / {backend}"]
        print(f"B={batch:<4} V={vocabulary:<6} {op:<19} {backend:<23} {timing.median:10.1f} us", flush=True)
        rows.append(row(op, backend, timing, dtype="float32", B=batch, V=vocabulary))
    return rows


def main() -> None:
    """Measure every shape and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backends = [name for name, missing in fastrnn.backends.available().items() if missing is None and name != "aten"]
    pace = {"rounds": 3, "seconds": 0.002} if arguments.quick else {}
    shapes = QUICK if arguments.quick else SHAPES
    rows = [line for shape in shapes for line in measure(*shape, backends, pace)]
    if arguments.output:
        write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()

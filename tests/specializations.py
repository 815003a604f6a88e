"""Prints how often Triton would compile each kernel for calls of many lengths and batch sizes, as JSON.

    python tests/specializations.py

Neither a GPU nor a driver is needed: Triton is told of a GPU, and what it would compile is counted instead, by the keys
under which it keeps compiled kernels. Nothing is computed.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # triton decides when it is imported whether it compiles
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import aot  # noqa: E402
import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

aot.kernel_modules()  # those of this checkout, under another name
from checked_kernels import gru, lstm, rnn, tuning  # noqa: E402

CELLS = {"lstm": lstm, "gru": gru, "rnn": rnn}
compiled: collections.Counter[str] = collections.Counter()


class Driver:
    """As much of a GPU's driver as a launch asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def count_compilation(self, key, signature, device, *_) -> None:
    compiled[self.__name__] += 1
    self.device_caches[device][0][key] = object()


def count_compilations() -> None:
    """From here on launches end where a kernel is compiled, and that is counted."""
    run = jit.JITFunction.run
    driver.set_active(Driver())
    jit.JITFunction._do_compile = count_compilation
    jit.JITFunction.run = lambda self, *args, grid, warmup, **options: run(
        self, *args, grid=grid, warmup=True, **options
    )


def call(cell: str, time: int, batch: int, hidden: int, dtype: torch.dtype) -> None:
    """Forward and backward of the second layer of two, whose states stand behind those of the first."""
    rows, inputs = tuning.GATES[cell] * hidden, 16

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    states = [zeros(2, batch, hidden)[1] for _ in range(2 if cell == "lstm" else 1)]
    weights = [zeros(rows, inputs), zeros(rows, hidden), zeros(rows), zeros(rows)]
    rest = [*([None] if cell == "lstm" else []), None, None, False]
    tail = "tanh" if cell == "rnn" else True
    x = zeros(time, batch, inputs)
    found = getattr(CELLS[cell], f"{cell}_forward")(x, *states, *weights, *rest, tail)
    gradients = [found[0], *states]
    kept = ["tanh", found[0]] if cell == "rnn" else [found[0], *found[len(states) + 1 :]]
    getattr(CELLS[cell], f"{cell}_backward")(*gradients, x, *states, *weights, *rest, *kept)


def main() -> None:
    count_compilations()
    report = {}
    times, batches = (2, 3, 16, 17, 40), (1, 2, 3, 15, 16, 17, 48, 67)
    for cell, (hidden, dtype) in itertools.product(CELLS, ((33, torch.float32), (24, torch.bfloat16))):
        compiled.clear()
        for time, batch in itertools.product(times, batches):
            call(cell, time, batch, hidden, dtype)
        report[f"{cell} resident {hidden}"] = dict(compiled)
    for cell in CELLS:
        compiled.clear()
        plans = set()
        for time, batch in itertools.product((2, 3, 16), batches):
            call(cell, time, batch, 300, torch.float32)
            for way in ("forward", "backward"):
                plan = tuning.sequence(cell, way, 300, batch, torch.float32, 8)
                plans.add((way, plan.warps, *plan.blocks.items()))
        report[f"{cell} tiled"] = {"plans": len(plans), **compiled}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

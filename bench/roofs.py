"""What this machine can do at most, measured: products in three types, and reading weights.

The product roofs are those of the library PyTorch calls, so a hand-written kernel may pass them; reading is the faster
of the two ways it has to read so much once, a sum and the product of a matrix with a vector. All obey
``torch.set_num_threads``. What a processor shared with others can do changes within seconds, and not for all roofs
alike (those of bfloat16 and int8 by a factor of three), so that a benchmark measures them between the rounds of what it
holds against them.

    python -m bench.roofs [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.timing import slopes

SIDE = 768  # of the square matrices of the product roofs
LEAST_BYTES = 1 << 20  # below, the time of a call counts
SHOWN = {f"{megabytes} MB": megabytes << 20 for megabytes in (1, 4, 16, 64)}


class Task(NamedTuple):
    """What a roof is measured by: a loop of so many rounds, and the 10^9 operations or bytes of a round."""

    loop: Callable[[int], object]
    amount: float


def repeated(function: Callable[[], object]) -> Callable[[int], None]:
    def loop(rounds: int) -> None:
        for _ in range(rounds):
            function()

    return loop


def products() -> dict[str, Task]:
    """Of square matrices, by type."""
    a, q = torch.randn(SIDE, SIDE), torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8)
    half, operations = a.bfloat16(), 2 * SIDE**3 / 1e9
    return {
        "float32": Task(repeated(lambda: a @ a), operations),
        "bfloat16": Task(repeated(lambda: half @ half), operations),
        "int8": Task(repeated(lambda: torch._int_mm(q, q)), operations),
    }


def reads(sizes: dict[str, int]) -> dict[str, Task]:
    """Two ways of reading as many bytes, or `LEAST_BYTES`, for each name."""
    tasks = {}
    for name, size in sizes.items():
        side = int((max(size, LEAST_BYTES) / 4) ** 0.5) // 16 * 16
        matrix = torch.ones(side, side)
        vector, amount = matrix[0].clone(), matrix.nbytes / 1e9
        tasks[f"sum {name}"] = Task(repeated(matrix.sum), amount)
        tasks[f"product {name}"] = Task(repeated(lambda m=matrix, v=vector: m @ v), amount)
    return tasks


class Roofs(NamedTuple):
    """By name: 10^9 multiplications and additions a second, and 10^9 bytes a second."""

    products: dict[str, float]
    reads: dict[str, float]

    @classmethod
    def of_seconds(cls, tasks: dict[str, Task], seconds: dict[str, float]) -> Roofs:
        """The roofs where a round of each task of `products` and `reads` takes so long."""
        rates = {name: task.amount / seconds[name] for name, task in tasks.items()}
        read = {name.removeprefix("sum "): rates[name] for name in rates if name.startswith("sum ")}
        read = {name: max(rate, rates[f"product {name}"]) for name, rate in read.items()}
        return cls({name: rate for name, rate in rates.items() if " " not in name}, read)

    def seconds(self, dtype: str, operations: float, weight_bytes: float) -> float:
        """The least time for a step that does these operations and reads these bytes of weights once."""
        return max(operations / self.products[dtype], weight_bytes / self.reads[dtype]) / 1e9

    def __str__(self) -> str:
        products = ", ".join(f"{name} gemm {rate:.0f} GFLOP/s" for name, rate in self.products.items())
        return f"roofs: {products}, read {', '.join(f'{name} {rate:.0f} GB/s' for name, rate in self.reads.items())}"


def main() -> None:
    """Print the roofs at so many threads, medians; CPU time on one thread, wall time on more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    tasks = products() | reads(SHOWN)
    found = slopes({name: task.loop for name, task in tasks.items()}, clock)
    print(Roofs.of_seconds(tasks, {name: cost.step.median / 1e6 for name, cost in found.items()}))


if __name__ == "__main__":
    main()

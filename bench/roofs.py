"""What this machine can do at most, measured: products in three types, and reading from L2 and L3.

The product roofs are those of the library PyTorch calls, so a hand-written kernel may pass them; the bandwidths are
those of the fastest way it has to read so much once: a sum over what fits L2, a matrix by a vector from L3. Both obey
``torch.set_num_threads``. What a processor shared with others can do changes within seconds, and not for all roofs
alike (those of bfloat16 and int8 by a factor of three), so that a benchmark measures them between the rounds of what it
holds against them.

    python -m bench.roofs [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.timing import slopes

SIDE = 768  # of the square matrices of the product roofs
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


class Roofs(NamedTuple):
    """10^9 multiplications and additions, or 10^9 bytes, a second; and the bytes that a core's L2 holds."""

    float32: float
    bfloat16: float
    int8: float
    l2: float
    l3: float
    l2_bytes: int

    def seconds(self, dtype: str, operations: float, weight_bytes: float) -> float:
        """The least time for a step that does these operations and reads these bytes of weights once."""
        read = self.l2 if weight_bytes <= self.l2_bytes else self.l3
        return max(operations / getattr(self, dtype), weight_bytes / read) / 1e9

    def __str__(self) -> str:
        return (
            f"roofs: float32 gemm {self.float32:.0f} GFLOP/s, bfloat16 gemm {self.bfloat16:.0f} GFLOP/s, "
            f"int8 gemm {self.int8:.0f} GOP/s, read {self.l2:.0f} GB/s from 1 MB, {self.l3:.0f} GB/s from 34 MB"
        )


class Task(NamedTuple):
    """What a roof is measured by: a loop of so many rounds, and the 10^9 operations or bytes of a round."""

    loop: Callable[[int], object]
    amount: float


def tasks() -> dict[str, Task]:
    """The task of each roof by its name."""
    a, q = torch.randn(SIDE, SIDE), torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8)
    half, operations = a.bfloat16(), 2 * SIDE**3 / 1e9
    small, large = torch.ones(1 << 18), torch.ones(2896, 2896)

    def repeated(function: Callable[[], object]) -> Callable[[int], None]:
        def loop(rounds: int) -> None:
            for _ in range(rounds):
                function()

        return loop

    return {
        "float32": Task(repeated(lambda: a @ a), operations),
        "bfloat16": Task(repeated(lambda: half @ half), operations),
        "int8": Task(repeated(lambda: torch._int_mm(q, q)), operations),
        "l2": Task(repeated(small.sum), small.nbytes / 1e9),
        "l3": Task(repeated(lambda: large @ large[0]), large.nbytes / 1e9),
    }


def of_seconds(seconds: dict[str, float]) -> Roofs:
    """The roofs where a round of each task takes so long."""
    amounts = {name: task.amount for name, task in tasks().items()}
    return Roofs(**{name: amount / seconds[name] for name, amount in amounts.items()}, l2_bytes=l2_bytes())


def measure() -> Roofs:
    """The roofs at torch's number of threads, medians; CPU time on one thread, wall time on more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = slopes({name: task.loop for name, task in tasks().items()}, clock)
    return of_seconds({name: cost.step.median / 1e6 for name, cost in found.items()})


def l2_bytes() -> int:
    """The size of a core's L2 as Linux tells it; 1 MB where it does not."""
    for index in sorted(CACHE.glob("index*")):
        if (index / "level").read_text().strip() == "2":
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return 1 << 20


def main() -> None:
    """Print the roofs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(measure())


if __name__ == "__main__":
    main()

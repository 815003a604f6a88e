"""What this machine can do at most, measured: products in three types, and reading from L2 and L3.

The product roofs are those of the library PyTorch calls, so a hand-written kernel may pass them; the bandwidths are
those of a sum over a buffer that fits the cache. Both obey ``torch.set_num_threads``.

    python -m bench.roofs [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.timing import Timing, row

SIDE = 1024  # of the square matrices of the product roofs
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

    def rows(self) -> list[dict]:
        """CSV rows."""
        units = {"float32": "GFLOP/s", "bfloat16": "GFLOP/s", "int8": "GOP/s", "l2": "GB/s", "l3": "GB/s"}
        return [
            row("roof", name, Timing(*[getattr(self, name)] * 3), unit, dtype=name if name in units else "")
            for name, unit in units.items()
        ]

    def __str__(self) -> str:
        return (
            f"roofs: float32 gemm {self.float32:.0f} GFLOP/s, bfloat16 gemm {self.bfloat16:.0f} GFLOP/s, "
            f"int8 gemm {self.int8:.0f} GOP/s, read {self.l2:.0f} GB/s from 1 MB, {self.l3:.0f} GB/s from 32 MB"
        )


def best(function: Callable[[], object], clock: Callable[[], float], rounds: int = 15) -> float:
    """Seconds of the fastest call."""
    function()
    found = float("inf")
    for _ in range(rounds):
        start = clock()
        function()
        found = min(found, clock() - start)
    return found


def measure(rounds: int = 15) -> Roofs:
    """The roofs at torch's number of threads: best of ``rounds``; CPU time on one thread, wall time on more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    operations = 2 * SIDE**3 / 1e9
    a = torch.randn(SIDE, SIDE)
    products = {"float32": a, "bfloat16": a.bfloat16()}
    found = {name: operations / best(lambda m=m: m @ m, clock, rounds) for name, m in products.items()}
    q = torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8)
    found["int8"] = operations / best(lambda: torch._int_mm(q, q), clock, rounds)
    for name, megabytes, repeats in (("l2", 1, 64), ("l3", 32, 2)):
        buffer = torch.ones(megabytes << 18)

        def read(buffer: torch.Tensor = buffer, repeats: int = repeats) -> None:
            for _ in range(repeats):
                buffer.sum()

        found[name] = buffer.nbytes * repeats / 1e9 / best(read, clock, rounds)
    return Roofs(**found, l2_bytes=l2_bytes())


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

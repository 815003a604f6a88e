"""What the tests of the draw share: rows of hard logits, parameters, and the backends to ask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrnn import backends, ops

VOCABULARIES = (1, 2, 65, 255, 256, 257, 999, 4097, 50257, 200000)
TEMPERATURES = (1e-3, 0.3, 0.8, 1.0, 1.3, 10.0, 1e3)
LOG2_E = math.log2(math.e)

needs_cpu = pytest.mark.skipif(
    backends.extension_missing() is not None,
    reason=f"needs a build with the C++ extension: {backends.extension_missing()}",
)
both_backends = pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])


def random_logits(rows: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Rows of different spread with ties, both zeros, -inf, and (rows 0 and 1) logits of 1e30 and of +-1e30."""
    spread = torch.tensor([0.1, 1.0, 5.0, 30.0])[torch.randint(0, 4, (rows, 1), generator=generator)]
    x = torch.randn(rows, vocabulary, generator=generator) * spread

    def some(share: float) -> Tensor:
        return torch.rand(rows, vocabulary, generator=generator) < share

    x[some(0.2)] = 1.0
    x[some(0.02)], x[some(0.02)] = -0.0, 0.0
    x[some(0.05)] = float("-inf")
    x[0] = 1e30
    x[1 % rows] *= 1e30
    return x


def random_columns(rows: int, generator: torch.Generator, *, filters: bool) -> dict[str, Tensor]:
    """Per-row parameters: every temperature, greedy too, random filters each off for 40 % of the rows, any integers."""

    def off() -> Tensor:
        return torch.rand(rows, generator=generator) < (0.4 if filters else 2.0)

    def unit() -> Tensor:
        return torch.rand(rows, generator=generator, dtype=torch.float64)

    def integers() -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)

    choices = torch.tensor([math.inf, *TEMPERATURES], dtype=torch.float64)  # inf: scale 0, greedy
    scale = (LOG2_E / choices[torch.randint(0, len(choices), (rows,), generator=generator)]).float()
    return {
        "scale": scale,
        "top_k": torch.randint(1, 60, (rows,), generator=generator).masked_fill(off(), 0),
        "top_p": (unit() * 2.0**62.9).ceil().long().masked_fill(off(), 0),
        "min_p": (-unit().log2()).float().masked_fill(off(), math.inf),
        "seed": integers(), "sequence": integers(), "step": integers(),
    }  # fmt: skip


def plain_columns(rows: int, temperature: float = 1.0, seed: int = 0, step: int = 0) -> dict[str, Tensor]:
    """The same parameters for every row, no filters, sequence ids 0 .. rows-1."""
    return {
        "scale": torch.full((rows,), LOG2_E / temperature if temperature else 0.0),
        "top_k": torch.zeros(rows, dtype=torch.int64), "top_p": torch.zeros(rows, dtype=torch.int64),
        "min_p": torch.full((rows,), math.inf), "seed": torch.full((rows,), seed),
        "sequence": torch.arange(rows), "step": torch.full((rows,), step),
    }  # fmt: skip


def draw(name: str, logits: Tensor, columns: dict, mask: Tensor | None = None, mode_of: int = 1, logprobs: bool = True):
    """`ops.sample` on a named backend: (token, logprob, tempered_logprob, margin, status)."""
    with backends.backend(name):
        return ops.sample(logits, mask=mask, mode_of=mode_of, logprobs=logprobs, **columns)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str = "") -> None:
    """Tokens and status equal in every bit; the floats equal to one unit in the last place (double log2 differs so)."""
    for k in (0, 4):
        bad = (actual[k] != expected[k]).nonzero()[:, 0]
        assert not len(bad), f"{what}: rows {bad[:5].tolist()} differ: {actual[k][bad[:5]]} and {expected[k][bad[:5]]}"
    for k in (1, 2, 3):
        torch.testing.assert_close(actual[k], expected[k], rtol=2.0**-23, atol=2.0**-24, equal_nan=True, msg=what)

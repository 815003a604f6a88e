"""Draws follow the softmax: chi-square, the far tail, independence. Fixed seeds; one bound for all tests together.

A test that is right fails with probability 1e-9 at most (over the choice of seeds, which are fixed): Bonferroni.
"""

import math

import pytest
import torch
from draws import both_backends, draw, needs_cpu, plain_columns
from torch import Tensor

from fastrnn import reference_sample as definition

ALPHA = 1e-9 / 100  # fewer than 100 tests of a hypothesis stand in this file
Z_BOUND = 5.0  # two-sided 6e-7, as the definition's own list of tests asks of the far tail


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """The p-value of observed counts (V,) under float64 probabilities; bins expecting under 10 are put together."""
    expected = probabilities.double() * counts.sum()
    small = expected < 10
    observed = torch.cat([counts[~small].double(), counts[small].sum().double()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(expected) > 1 else 1.0


def test_chi_square_sees_a_wrong_distribution():
    counts = torch.tensor([10300, 9700, 10000])
    assert chi_square_p(counts, torch.full((3,), 1 / 3)) == pytest.approx(math.exp(-9.0), rel=1e-6)


@both_backends
@pytest.mark.parametrize("vocabulary", [2, 65, 256, 257, 1500])
def test_tokens_follow_the_softmax(name, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    rows = {"cpu": 6_000_000, "reference": 1_500_000}[name] // max(vocabulary, 20)
    logits = torch.randn(vocabulary, generator=generator) * 2 - 30  # all negative
    for temperature in (0.7, 1.0, 3.0):
        columns = plain_columns(rows, temperature, seed=12345)
        token = draw(name, logits.expand(rows, -1), columns, logprobs=False)[0]
        counts = torch.bincount(token, minlength=vocabulary)
        assert chi_square_p(counts, (logits.double() / temperature).softmax(-1)) > ALPHA, temperature


def test_far_tail():
    """One head token and 2**17 tail tokens: integer masses keep the tail that 24-bit uniforms lose."""
    tail, number = 1 << 17, 2_000_000
    zero = torch.zeros(1, dtype=torch.int64)
    r_tile, r_token = definition.random_words(zero + 77, torch.arange(number), zero, zero)
    for gap in (16.0, 18.0, 20.0, 22.0, 28.0):
        logits = torch.full((tail + 1,), -gap)
        logits[0] = 0.0
        exact = tail * math.exp(-gap) / (1 + tail * math.exp(-gap))
        # Exactly: the tail's share of the integer masses, each tile of which is truncated to a multiple of 2**-37.
        w, mass, _ = definition._tiles(definition._as_tiles(logits[None]), torch.tensor([definition.LOG2_E]))
        head = int(w[0, 0, 0]) / int(w[0, 0].sum()) * int(mass[0, 0]) / int(mass.sum())
        assert abs(1 - head - exact) <= exact * 2.0**-21 + mass.shape[1] * 2.0**-37
        # Drawn: a binomial count, its deviation in standard deviations.
        tile, _ = definition._look_up(mass, r_tile[None])
        place, _ = definition._look_up(w[:, 0], r_token[None])  # of the draws that chose the first tile
        count = int(((tile > 0) | (place > 0)).sum())
        deviation = (count - number * exact) / math.sqrt(number * exact * (1 - exact))
        assert abs(deviation) < Z_BOUND, (gap, count, number * exact)


@needs_cpu
def test_far_tail_through_the_op():
    """The same with whole draws, at a gap where 2000 of them see the tail."""
    tail, rows, gap = 1 << 17, 2000, 14.0
    logits = torch.full((1, tail + 1), -gap)
    logits[0, 0] = 0.0
    exact = tail * math.exp(-gap) / (1 + tail * math.exp(-gap))
    columns = plain_columns(rows)
    parts = [{k: c[start : start + 50] for k, c in columns.items()} for start in range(0, rows, 50)]
    count = sum(int((draw("cpu", logits.expand(50, -1), part, logprobs=False)[0] > 0).sum()) for part in parts)
    assert abs(count - rows * exact) / math.sqrt(rows * exact * (1 - exact)) < Z_BOUND


@both_backends
def test_the_draws_of_a_tail_inside_one_tile(name):
    rows = 400_000 if name == "cpu" else 15_000
    logits = torch.full((256,), -12.0)
    logits[100] = 0.0
    token = draw(name, logits.expand(rows, -1), plain_columns(rows, seed=5), logprobs=False)[0]
    exact = 255 * math.exp(-12.0) / (1 + 255 * math.exp(-12.0))
    deviation = (int((token != 100).sum()) - rows * exact) / math.sqrt(rows * exact * (1 - exact))
    assert abs(deviation) < Z_BOUND


@both_backends
@pytest.mark.parametrize("field", ["step", "sequence", "seed"])
def test_consecutive_draws_are_independent(name, field):
    """Pairs of tokens at n and n + lag are uniform over all pairs, for each of the three counters and several lags."""
    vocabulary, number = 16, 200_000 if name == "cpu" else 60_000
    columns = plain_columns(number)
    columns["sequence"].zero_()
    columns[field] = torch.arange(number)
    token = draw(name, torch.zeros(1, vocabulary).expand(number, -1), columns, logprobs=False)[0]
    for lag in (1, 2, 256):
        # Non-overlapping pairs, so that the counts are multinomial.
        alternate = torch.arange(number - lag) // lag % 2 == 0
        pairs = torch.bincount((token[:-lag] * vocabulary + token[lag:])[alternate], minlength=vocabulary**2)
        assert chi_square_p(pairs, torch.full((vocabulary**2,), 1 / vocabulary**2)) > ALPHA, lag


@both_backends
def test_the_two_levels_are_independent(name):
    """Tile and place in the tile of uniform draws over four tiles: uniform over all 1024 pairs."""
    number = 100_000 if name == "cpu" else 6_000
    token = draw(name, torch.zeros(1, 1024).expand(number, -1), plain_columns(number, seed=3), logprobs=False)[0]
    assert chi_square_p(torch.bincount(token, minlength=1024), torch.full((1024,), 1 / 1024)) > ALPHA


@both_backends
def test_a_vote_sharpens_the_distribution(name):
    """The mode of three draws over two tokens with p = 0.7 is the first with p^3 + 3 p^2 (1 - p) = 0.784."""
    rows = 100_000 if name == "cpu" else 20_000
    logits = torch.tensor([0.7, 0.3]).log().expand(rows, -1)
    token = draw(name, logits, plain_columns(rows, seed=8), None, 3, logprobs=False)[0]
    deviation = (int((token == 0).sum()) - 0.784 * rows) / math.sqrt(rows * 0.784 * 0.216)
    assert abs(deviation) < Z_BOUND

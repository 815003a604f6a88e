"""top_k, top_p, min_p and mask against a float64 oracle with Hugging Face's semantics, and the draws they leave."""

import math

import draws
import pytest
import torch
from draws import both_backends, draw, plain_columns, random_logits
from torch import Tensor

import fastrnn
from fastrnn import reference_sample as definition
from fastrnn import sampling


def oracle(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Kept ids (V,) bool of one row in float64: warpers in Hugging Face's order, by sorting; ties by the lowest id."""
    scores = (x.double() + 0.0) / temperature
    order = scores.sort(descending=True, stable=True)[1]
    kept = scores > -math.inf
    if top_k:
        keep = torch.zeros_like(kept)
        keep[order[:top_k]] = True
        kept &= keep
    if top_p < 1:
        probabilities = scores.masked_fill(~kept, -math.inf).softmax(-1)[order]
        keep = torch.zeros_like(kept)
        keep[order[probabilities.cumsum(-1) - probabilities < top_p]] = True
        kept &= keep
    if min_p > 0:
        probabilities = scores.masked_fill(~kept, -math.inf).softmax(-1)
        kept &= probabilities >= min_p * probabilities.max()
    return kept


def kept_ids(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    numbers = sampling.SamplingParams(temperature, top_k, top_p, min_p).numbers()
    columns = [torch.tensor([number]) for number in numbers]
    return definition.filter_logits(x[None] + 0.0, *columns)[0] > -math.inf


@pytest.mark.parametrize("vocabulary", [1, 2, 65, 257, 3000])
def test_filters_against_float64(vocabulary):
    """Between the oracle's sets for thresholds a hair (1e-6, above all rounding) stricter and laxer; mostly one set."""
    generator = torch.Generator().manual_seed(vocabulary)
    x = random_logits(60, vocabulary, generator)[2:]
    x[:, 0] = 0.5
    exact = 0
    for r, row in enumerate(x):
        temperature = (0.3, 1.0, 1.7)[r % 3]
        top_k = int(torch.randint(0, 40, (), generator=generator)) if r % 2 else 0
        top_p = float(torch.rand((), generator=generator, dtype=torch.float64) * 0.998 + 0.001) if r % 4 < 3 else 1.0
        min_p = float(torch.rand((), generator=generator, dtype=torch.float64) ** 3) if r % 5 < 2 else 0.0
        found = kept_ids(row, temperature, top_k, top_p, min_p)
        strict = oracle(row, temperature, top_k, top_p - 1e-6 if top_p < 1 else 1.0, min_p * (1 + 1e-5))
        lax = oracle(row, temperature, top_k, top_p + 1e-6 if top_p < 1 else 1.0, min_p * (1 - 1e-5))
        assert bool((strict <= found).all()), (r, temperature, top_k, top_p, min_p)
        assert bool((found <= lax).all()), (r, temperature, top_k, top_p, min_p)
        exact += bool((strict == lax).all())
    assert exact > 50


def test_top_p_target_is_the_exact_ceiling():
    generator = torch.Generator().manual_seed(1)
    top_p = torch.randint(1, 2**63 - 1, (500,), generator=generator)
    total = torch.randint(1, 2**62, (500,), generator=generator) >> torch.randint(0, 62, (500,), generator=generator)
    top_p[:4] = torch.tensor([1, 2**62, 2**63 - 1, 2**62])
    total[:4] = torch.tensor([2**62, 2**62, 2**62, 3])
    expected = [-(-(p * t) // 2**63) for p, t in zip(top_p.tolist(), total.tolist())]
    assert definition.top_p_target(top_p, total).tolist() == expected


def test_exact_edges():
    """Four equal tokens have 1/4 each exactly: top_p on, just below and just above a boundary; ties by id."""
    x = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0])
    nucleus = lambda p: kept_ids(x[1:], 1.0, 0, p, 0.0).tolist()  # noqa: E731
    assert nucleus(0.5) == [True, True, False, False]
    assert nucleus(math.nextafter(0.5, 1)) == [True, True, True, False]
    assert nucleus(math.nextafter(0.5, 0)) == [True, True, False, False]
    assert nucleus(math.nextafter(0.25, 0)) == [True, False, False, False]
    assert nucleus(5e-324) == [True, False, False, False]
    assert kept_ids(x, 1.0, 2, 1.0, 0.0).tolist() == [False, True, True, False, False]
    assert kept_ids(x, 1.0, 0, 1.0, 1.0).tolist() == [False, True, True, True, True]
    assert kept_ids(torch.tensor([0.0, -0.0, 0.0]), 1.0, 2, 1.0, 0.0).tolist() == [True, True, False]
    halves = torch.tensor([0.0, -math.log(2)]).float()
    assert kept_ids(halves, 1.0, 0, 1.0, 0.4999).tolist() == [True, True]
    assert kept_ids(halves, 1.0, 0, 1.0, 0.5001).tolist() == [True, False]
    # Order: top_k before top_p, so that the nucleus is of the k that are left: 0.62 of (0.6, 0.3, 0.1) is two tokens,
    # of the two largest renormalised (0.67, 0.33) one.
    x = torch.tensor([0.6, 0.3, 0.1]).log()
    assert kept_ids(x, 1.0, 0, 0.62, 0.0).tolist() == [True, True, False]
    assert kept_ids(x, 1.0, 2, 0.62, 0.0).tolist() == [True, False, False]


@both_backends
@pytest.mark.parametrize("vocabulary", [20, 600])
def test_exactly_the_kept_ids_are_drawn(name, vocabulary):
    generator = torch.Generator().manual_seed(2)
    rows = 1500 if vocabulary == 20 else 300
    for top_k, top_p, min_p in ((3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (9, 0.8, 0.1), (0, 1.0, 0.0)):
        x = torch.randn(vocabulary, generator=generator)
        mask = torch.rand(vocabulary, generator=generator) < 0.6
        kept = oracle(x.masked_fill(~mask, -math.inf), 0.9, top_k, top_p, min_p)
        with fastrnn.backends.backend(name):
            token = sampling.sample(
                x.expand(rows, -1), 0.9, top_k=top_k, top_p=top_p, min_p=min_p, mask=mask, seed=vocabulary
            )
        counts = torch.bincount(token, minlength=vocabulary)
        assert not bool(counts[~kept].any()), "a removed id was drawn"
        if vocabulary == 20:
            assert bool((counts[kept] > 0).all()), "a kept id was never drawn"


@both_backends
def test_masked_and_minus_infinity_are_never_drawn(name):
    """One allowed id in a sea of larger forbidden ones, at each place of a tile and of the row."""
    for vocabulary in (1, 2, 256, 257, 1025):
        places = torch.arange(vocabulary) if vocabulary < 300 else torch.tensor([0, 255, 256, 511, 512, 1023, 1024])
        rows = len(places)
        mask = torch.zeros(rows, vocabulary, dtype=torch.bool).scatter(1, places[:, None], True)
        x = torch.full((rows, vocabulary), 80.0).scatter(1, places[:, None], -80.0)
        for columns in (plain_columns(rows), plain_columns(rows, 0.0)):
            assert torch.equal(draw(name, x, columns, mask)[0], places)
            assert torch.equal(draw(name, x.masked_fill(~mask, -math.inf), columns)[0], places)


@both_backends
def test_filters_that_remove_nothing_change_nothing(name):
    generator = torch.Generator().manual_seed(3)
    x = random_logits(200, 300, generator)
    plain = draw(name, x, plain_columns(200))
    lax = plain_columns(200) | {"top_k": torch.full((200,), 300), "top_p": torch.full((200,), 2**63 - 1)}
    lax["min_p"] = torch.full((200,), 3e38)
    found = draw(name, x[2:], {k: c[2:] for k, c in lax.items()}, torch.ones(1, 300, dtype=torch.bool))
    # top_p just below 1 may cut ids whose mass is below the resolution of the sum, 2**-38: too little to be felt here.
    draws.assert_same(found[:1] * 5, tuple(t[2:] for t in plain[:1] * 5))

"""What a draw returns: tokens of extreme logits, greedy rows, votes, log-probabilities, margins."""

import math

import draws
import pytest
import torch
from draw_oracle import python_draw
from draws import both_backends, draw, plain_columns, random_columns

from fastrnn import reference_sample as definition


@both_backends
def test_extreme_logits(name):
    inf = math.inf
    table = torch.tensor([
        [1e30, 1e30, -1e30, -inf], [-1e30, -1e30, -3e38, -inf], [3.4e38, -3.4e38, -3.4e38, -inf],
        [-1e-45, 0.0, 1e-45, -inf], [-500.0, -501.0, -500.5, -inf],
    ])  # fmt: skip
    for temperature in draws.TEMPERATURES:
        columns = plain_columns(500, temperature)
        for r, row in enumerate(table):
            token, logprob, tempered, margin, status = draw(name, row.expand(500, -1), columns)
            assert not bool(status.any()), (temperature, r)
            assert int(token.max()) < 3, (temperature, r)
            assert bool((logprob <= 0).all())
            assert bool((tempered <= 0).all())
            assert bool((margin >= 0).all())
            if r < 2 and temperature < 1e3:
                assert set(token.tolist()) == {0, 1}
            if r == 2:
                assert set(token.tolist()) == {0}


@both_backends
def test_greedy_takes_the_lowest_of_the_largest(name):
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-3, 3, (200, 300), generator=generator).float()
    x[:, 0] = -0.0
    columns = random_columns(200, generator, filters=True) | {"scale": torch.zeros(200)}
    mask = torch.rand(200, 300, generator=generator) < 0.5
    for mode_of in (1, 5):
        token, logprob, tempered, margin, _ = draw(name, x, columns, mask, mode_of)
        allowed = x.masked_fill(~mask, -math.inf)
        assert torch.equal(token, (allowed == allowed.amax(-1, keepdim=True)).int().argmax(-1))
        assert not bool(tempered.any())
        assert not bool(margin.any())
        assert torch.equal(logprob, draw("reference", x, columns, mask)[1])
    x = torch.tensor([[1.0, 3.5, 3.0], [2.0, -math.inf, -math.inf]])
    assert draw(name, x, plain_columns(2, 0.0))[3].tolist() == [0.5, math.inf]


@both_backends
@pytest.mark.parametrize("vocabulary", [5, 600])
def test_mode_of_is_a_vote_of_single_draws(name, vocabulary):
    """Draw n of a vote is the single draw whose counter holds n: computed here by the definition's own look-ups."""
    generator = torch.Generator().manual_seed(6)
    rows, votes = 40, 80
    x, columns = torch.randn(rows, vocabulary, generator=generator), random_columns(rows, generator, filters=False)
    found = draw(name, x, columns, None, votes)[0]
    for r in (columns["scale"] > 0).nonzero()[:, 0].tolist():
        w, mass, _ = definition._tiles(definition._as_tiles(x[r : r + 1]), columns["scale"][r : r + 1])
        words = definition.random_words(*(columns[k][r] for k in ("seed", "sequence", "step")), torch.arange(votes))
        tokens, _ = definition._draw(w, mass, *(word[None] for word in words))
        if r < 4 and vocabulary == 5:
            one = {k: c[r].item() for k, c in columns.items()}
            assert tokens[0].tolist() == [python_draw(x[r].tolist(), one, n) for n in range(votes)]
        counts = torch.bincount(tokens[0], minlength=vocabulary)
        assert int(found[r]) == int((counts == counts.max()).int().argmax())


@both_backends
@pytest.mark.parametrize("vocabulary", [3, 256, 5000])
def test_log_probabilities(name, vocabulary):
    """Against float64: the mass is good to a relative 2**-22, z = (x - max) * c to three roundings of 2**-24 of it."""
    generator = torch.Generator().manual_seed(7)
    rows = 60
    x = torch.randn(rows, vocabulary, generator=generator) * 4
    for temperature in (0.3, 1.0, 2.5):
        columns = plain_columns(rows, temperature)
        columns["top_k"] = torch.randint(0, 6, (rows,), generator=generator)
        token, logprob, tempered, _, _ = draw(name, x, columns)
        kept = definition.filter_logits(x, *(columns[k] for k in ("scale", "top_k", "top_p", "min_p")))
        for found, exact in ((logprob, x.double()), (tempered, kept.double() / temperature)):
            expected = exact.log_softmax(-1).gather(1, token[:, None])[:, 0]
            bound = 2.0**-21 + (exact.amax(-1) - exact.gather(1, token[:, None])[:, 0]) * 4 * 2.0**-24
            assert bool(((found.double() - expected).abs() <= bound).all()), (temperature, vocabulary)


@both_backends
@pytest.mark.parametrize("mode_of", [1, 9])
@pytest.mark.parametrize("vocabulary", [40, 1200])
def test_margin_bounds_what_a_change_of_logits_can_do(name, vocabulary, mode_of):
    generator = torch.Generator().manual_seed(8)
    rows = 300 if vocabulary == 40 else 50
    x = torch.randn(rows, vocabulary, generator=generator) * 3
    moved = 0
    for temperature in (0.5, 1.0, 0.0):
        columns = plain_columns(rows, temperature, seed=11)
        token, _, _, margin, _ = draw(name, x, columns, None, mode_of)
        usable = (margin - 1e-6).clamp(min=0, max=1) * 2 * temperature if temperature else margin / 2 - 1e-5
        for _ in range(3):
            signs = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
            shaken = x + signs * (0.999 * usable.clamp(min=0))[:, None]
            assert torch.equal(draw(name, shaken, columns, None, mode_of)[0], token)
        # The same change ten times as large does move tokens: the margin is not merely cautious.
        signs = torch.where(torch.arange(vocabulary) < token[:, None], 1.0, -1.0)
        moved += int((draw(name, x + signs * 10 * usable[:, None], columns, None, mode_of)[0] != token).sum())
    assert moved > rows / 4

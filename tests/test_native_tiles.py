"""Draws from large vocabularies, whose logits the generation loop weighs tile by tile and does not keep."""

import functools
import itertools

import draws
import pytest
import torch

import fastrnn
from fastrnn.generate import generate
from fastrnn.native import PackedNetwork
from fastrnn.network import Network, NetworkConfig
from fastrnn.request import Completion, Request
from fastrnn.sampling import SamplingParams

pytestmark = pytest.mark.skipif(
    fastrnn.backends.available()["cpu"] is not None, reason="needs the C++ extension (make build)"
)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
PRECISIONS = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}
TEMPERATURES = (1.0, 0.7, 1.3, 0.05, 40.0)
STEPS = 3


@pytest.fixture
def threads():
    number = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(number)


def make(vocab: int, cell: str = "rnn_tanh", hidden: int = 24, sharpen: float = 6) -> Network:
    torch.manual_seed(1)
    network = Network(NetworkConfig(vocab, embedding_dim=5, cell=cell, hidden_size=hidden))
    with torch.no_grad():
        network.head.weight.mul_(sharpen)
    return network


def requests(count: int, **options) -> list[Request]:
    return [
        Request(
            [i % 7],
            **{"max_new_tokens": STEPS, "seed": i % 5, "sequence": i, **options},
            sampling=SamplingParams(temperature=TEMPERATURES[i % len(TEMPERATURES)]),
        )
        for i in range(count)
    ]


def run(network: Network, asked: list[Request], **options) -> list[Completion]:
    return sorted(generate(network, asked, **options), key=lambda c: c.index)


def tokens(done: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_are_those_of_kept_logits(isa: str, precision: str, set_isa, threads) -> None:
    """A request for log-probabilities keeps the logits of all rows; the tokens are the same, whatever runs together."""
    set_isa(isa)
    for vocab, hidden in ((2047, 24), (2048, 24), (2049, 40), (2303, 24), (2305, 8), (4097, 33)):
        network = make(vocab, "lstm", hidden)
        kept = tokens(run(network, requests(150, logprobs=True), **PRECISIONS[precision]))
        for batch, number in ((150, 1), (23, 2), (5, 1), (1, 1)):
            threads(number)
            some = 150 if batch > 1 else 6
            found = tokens(run(network, requests(some), batch_size=batch, **PRECISIONS[precision]))
            assert found == kept[:some], f"V={vocab}, batch {batch}, {number} threads"


def test_a_team_draws_what_one_thread_draws(threads) -> None:
    network = make(10_000, hidden=64)
    assert PackedNetwork(network)
    found = []
    for number in (1, 2):
        threads(number)
        found.append(tokens(run(network, requests(12), batch_size=12)))
    assert found[0] == found[1]


def one_row(vocab: int, kind: str) -> torch.Tensor:
    """Logits that are hard to draw from."""
    chance = torch.Generator().manual_seed(vocab)
    if kind == "ties":
        return torch.full((vocab,), 0.25)
    if kind == "one left":
        return torch.full((vocab,), float("-inf")).scatter(0, torch.tensor([vocab - 2]), -3.0)
    if kind == "few left":
        kept = torch.rand(vocab, generator=chance) < 0.004
        return torch.randn(vocab, generator=chance).masked_fill(~kept, float("-inf"))
    if kind == "steep":
        return torch.arange(vocab, dtype=torch.float32) / 16
    if kind == "last":
        return torch.zeros(vocab).index_fill(0, torch.tensor([vocab - 1]), 9.0)
    return draws.random_logits(4, vocab, chance)[2 if kind == "hard" else 1]


KINDS = ("ties", "one left", "few left", "steep", "last", "hard", "huge")


@functools.cache
def defined(vocab: int, kind: str, count: int) -> list[list[int]]:
    """The tokens that the definition draws for `requests` from rows that are all alike."""
    columns, expected = draws.plain_columns(count), []
    columns["scale"] = torch.tensor([r.sampling.numbers().scale for r in requests(count)])
    columns["seed"] = torch.arange(count) % 5
    for step in range(STEPS):
        columns["step"] = torch.full((count,), step)
        rows = one_row(vocab, kind).expand(count, -1)
        token, *_, status = draws.draw("reference", rows, columns, logprobs=False)
        assert not status.any()
        expected.append(token)
    return torch.stack(expected, 1).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("vocab", "kind"), list(itertools.product((2048, 2113, 2304, 2305), KINDS)))
def test_tokens_are_those_of_the_definition(isa: str, vocab: int, kind: str, set_isa) -> None:
    """A head without weights: its bias is the logits of every row, so the reference can draw from them too."""
    set_isa(isa)
    network = make(vocab)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(one_row(vocab, kind))
    for count in (150, 9):  # rows whose group is computed again, and rows whose logits are at hand
        for options in (PRECISIONS["float32"], PRECISIONS["bfloat16"]):
            found = tokens(run(network, requests(count), batch_size=count, **options))
            assert found == defined(vocab, kind, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bad", "says"), [(torch.nan, "NaN"), (torch.inf, "inf"), (-torch.inf, "")])
def test_logits_that_cannot_be_drawn_from_say_so(isa: str, bad: float, says: str, set_isa) -> None:
    set_isa(isa)
    for place in (0, 255, 256, 2111, 2112):
        network = make(2113)
        with torch.no_grad():
            network.head.bias[place] = bad
            if not says:
                network.head.bias.fill_(bad)
        for count in (150, 9):
            for completion in run(network, requests(count), batch_size=count):
                assert completion.finish_reason == "error"
                assert completion.token_ids == []
                assert says in completion.error


def test_a_row_of_nan_disturbs_no_other() -> None:
    """An id whose embedding is NaN spoils the sequences that draw it, and no other."""
    network = make(2200)
    sound = tokens(run(network, requests(50)))
    with torch.no_grad():
        network.embedding.weight[3] = torch.nan
    done = run(network, requests(50), batch_size=50)
    assert {c.finish_reason for c in done} == {"length", "error"}
    for completion, expected in zip(done, sound, strict=True):
        if completion.finish_reason == "length":
            assert completion.token_ids == expected
        else:
            assert 3 in [completion.index % 7, *completion.token_ids]
            assert completion.token_ids == expected[: len(completion.token_ids)]

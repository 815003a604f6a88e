"""int8 weights on every instruction set: one quantisation, whose integers are exact, so that only the gates differ.

Every row of weights and every row of states has its own scale. Portable, AVX2 and AVX-512 compute the gates by
cell_math.h, the tiles to about 12 bits. A gate's error moves a state to the next of its 255 values now and
then.
"""

import copy

import pytest
import torch
from draws import needs_cpu
from torch import Tensor

import oracle
from fastrnn.generate import Runner, generate, make_runner, prefill
from fastrnn.network import Network, NetworkConfig
from fastrnn.request import Request
from fastrnn.sampling import SamplingParams
from fastrnn.sequence import SequenceState

pytestmark = needs_cpu

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
PLAIN = ("portable", "avx2", "avx512", "avx512_bf16")  # those with exact gates, the definition first
SHAPES = ((1, 1, 2), (2, 45, 37), (1, 64, 257), (3, 130, 50))  # L, H, V


def make(cell: str, layers: int, hidden: int, vocabulary: int, **options) -> Network:
    torch.manual_seed(1)
    network = Network(NetworkConfig(vocabulary, hidden_size=hidden, num_layers=layers, cell=cell, **options))
    with torch.no_grad():
        network.head.weight.mul_(3)
    return network


@pytest.fixture
def on():
    """Forces an instruction set, or skips where this processor does not have it."""

    def force(isa: str) -> None:
        try:
            torch.ops.fastrnn_cpu.set_isa(isa)
        except RuntimeError as refusal:
            pytest.skip(str(refusal))

    yield force
    torch.ops.fastrnn_cpu.set_isa("")


def logits(runner: Runner, ids: Tensor) -> Tensor:
    """(T, V) after each of ids (T,)."""
    return torch.stack([runner.read(ids[: t + 1], None, None)[1] for t in range(len(ids))])


def ids_of(network: Network, length: int) -> Tensor:
    return torch.randint(network.config.vocab_size, (length,), generator=torch.Generator().manual_seed(5))


def worth(largest: Tensor) -> Tensor:
    """What one of the integers is worth that stand for numbers up to ``largest``: the next float32 above a 127th of it
    whose last 8 bits are zero, so that its products with integers are exact."""
    bits = (largest.float() / 127).view(torch.int32)
    return ((bits + 0xFF) & ~0xFF).view(torch.float32)


def quantised(numbers: Tensor) -> Tensor:
    """What the integers nearest to each row of numbers stand for, in float64: one scale a row."""
    one = worth(numbers.abs().amax(-1, keepdim=True))
    integers = (numbers.float() * torch.where(one > 0, 1 / one, 0.0)).round()
    return integers.double() * one.double()


def definition(network: Network, ids: Tensor) -> Tensor:
    """(T, V) logits of the quantised network, everything but the weights and the states read exact: float64."""
    weights, config = [w.detach() for w in network.weights()], network.config
    state = [torch.zeros(2, config.hidden_size, dtype=torch.float64) for _ in range(config.num_layers)]
    head = quantised(network.head.weight.detach())
    out = []
    for token in ids:
        for layer in range(config.num_layers):
            w_ih, w_hh, b_ih, b_hh = weights[4 * layer : 4 * layer + 4]
            h, c = state[layer]
            if layer:
                from_input = quantised(w_ih) @ quantised(state[layer - 1][0]) + b_ih.double()
            else:
                from_input = w_ih[:, token].double() + b_ih.double()
            from_state = quantised(w_hh) @ quantised(h) + b_hh.double()
            state[layer] = _cell(config.cell, from_input, from_state, h, c)
        out.append(head @ quantised(state[-1][0]) + network.head.bias.double())
    return torch.stack(out).detach()


def _cell(cell: str, x: Tensor, u: Tensor, h: Tensor, c: Tensor) -> Tensor:
    if cell.startswith("rnn"):
        return torch.stack([(x + u).tanh() if cell == "rnn_tanh" else (x + u).relu(), c])
    if cell == "lstm":
        i, f, g, o = (x + u).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.stack([o.sigmoid() * c.tanh(), c])
    (xr, xz, xn), (ur, uz, un) = x.chunk(3), u.chunk(3)
    z, n = (xz + uz).sigmoid(), (xn + (xr + ur).sigmoid() * un).tanh()
    return torch.stack([n + z * (h - n), c])


def one_value(network: Network, runner: Runner, ids: Tensor) -> float:
    """How far a logit moves, at most, when every state of the last layer moves to the next of its values."""
    hidden = [hidden_of(runner.read(ids[: t + 1], None, None)[0])[-1] for t in range(len(ids))]
    return float(network.head.weight.detach().abs().sum(1).max()) * float(torch.stack(hidden).abs().max()) / 127


def hidden_of(state) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", PLAIN)
def test_the_logits_are_those_of_the_quantised_network(cell: str, shape: tuple, isa: str, on) -> None:
    """float32 sums of exact integers against float64: a state on the edge between two values is the only freedom, and
    these networks have none there."""
    network = make(cell, *shape, input="onehot")
    on(isa)
    ids = ids_of(network, 30)
    expected = definition(network, ids)
    oracle.assert_close(logits(make_runner(network, quantize="int8"), ids), expected, expected.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_tiles_differ_by_the_bits_of_their_gates(cell: str, shape: tuple, on) -> None:
    """Gates of 12 bits are wrong by 2^-12 of themselves, a thirtieth of the distance between two values of the largest
    state: no logit moves as far as it would if every state went to the next value."""
    network = make(cell, *shape)
    ids = ids_of(network, 30)
    on("portable")
    runner = make_runner(network, quantize="int8")
    exact, allowed = logits(runner, ids), one_value(network, runner, ids)
    on("amx")
    tiles = logits(make_runner(network, quantize="int8"), ids)
    assert oracle.error(tiles, exact) <= allowed


@pytest.mark.parametrize("isa", [*PLAIN, "amx"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_8_bits_lose(cell: str, isa: str, on) -> None:
    network = make(cell, 2, 64, 60)
    ids = ids_of(network, 80)
    on(isa)
    plain, quantised = (logits(make_runner(network, **kind), ids).log_softmax(1) for kind in ({}, {"quantize": "int8"}))
    moved = float((quantised - plain).square().mean().sqrt())
    assert 0 < moved <= oracle.INT8_OF_SPREAD * float(plain.std(1).mean())


@pytest.mark.parametrize("isa", [*PLAIN, "amx"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_state_is_given_and_taken_without_loss(cell: str, isa: str, on) -> None:
    """What the integers of a state stand for rounds to the same integers: reading goes on with the same bits."""
    network = make(cell, 3, 45, 37)
    on(isa)
    runner, ids = make_runner(network, quantize="int8"), ids_of(network, 20)
    state = prefill(network, ids[:1], runner=runner)
    for t in range(1, len(ids)):
        hidden, found, tail = runner.read(ids[t : t + 1], state, None)
        assert torch.equal(found, runner.read(ids[: t + 1], None, None)[1])
        state = SequenceState(hidden, found, tail, state.seen, t + 1)


@pytest.mark.parametrize("isa", [*PLAIN, "amx"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_of_zeros_has_a_scale(cell: str, isa: str, on) -> None:
    network = make(cell, 2, 45, 37)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.head.bias.copy_(torch.arange(37.0))
    on(isa)
    found = logits(make_runner(network, quantize="int8"), ids_of(network, 3))
    assert torch.equal(found, torch.arange(37.0).repeat(3, 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("isa", [*PLAIN, "amx"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_state_that_is_no_number_ends_its_request_alone(cell: str, isa: str, bad: float, on) -> None:
    network = make(cell, 2, 45, 37)
    on(isa)
    good = prefill(network, ids_of(network, 3), runner=make_runner(network, quantize="int8"))
    broken = copy.deepcopy(good)
    hidden_of(broken.hidden)[-1, 0, 3] = bad
    asked = [Request([1], 6, state=state, sequence=1) for state in (good, broken, good)]
    one, error, other = sorted(generate(network, asked, quantize="int8"), key=lambda c: c.index)
    assert (error.finish_reason, error.token_ids) == ("error", [])
    assert "NaN" in error.error
    assert one.finish_reason == other.finish_reason == "length"
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize("isa", [*PLAIN, "amx"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_request_has_the_same_tokens_in_any_company(cell: str, isa: str, on) -> None:
    network = make(cell, 2, 45, 37)
    asked = [
        Request(ids_of(network, 1 + i % 7), 8, SamplingParams(), sequence=i, logprobs=True) for i in range(50)
    ]
    on(isa)
    runs = []
    for rows in (1, 3, 50):
        done = sorted(generate(network, asked, batch_size=rows, quantize="int8"), key=lambda c: c.index)
        runs.append([(c.token_ids, c.logprobs) for c in done])
    assert runs[0] == runs[1] == runs[2]

"""int8 weights on every instruction set: one quantisation, whose integers are exact, so that only the gates differ.

Portable, AVX2 and AVX-512 compute the gates by cell_math.h, the tiles to about 12 bits. A gate's error moves a state to
the next of its 255 values now and then; nothing more.
"""

import pytest
import torch
from draws import needs_cpu
from torch import Tensor

import oracle
from fastrnn.generate import Runner, generate, make_runner
from fastrnn.network import Network, NetworkConfig
from fastrnn.request import Request
from fastrnn.sampling import SamplingParams

pytestmark = needs_cpu

CELLS = ("lstm", "gru", "rnn_tanh")
PLAIN = ("portable", "avx2", "avx512")  # those with exact gates, the definition first
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


def quantised(weight: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(integers, what one of them is worth) of each row; ``other`` shares the scale."""
    largest = (weight if other is None else torch.cat([weight, other], 1)).abs().amax(1, keepdim=True)
    return (weight * torch.tensor(127.0).div(largest)).round(), (largest / 127).double()


def definition(network: Network, ids: Tensor) -> Tensor:
    """(T, V) logits of the quantised network, everything but the weights and the states read exact: float64."""
    weights, config = [w.detach() for w in network.weights()], network.config
    state = [torch.zeros(2, config.hidden_size, dtype=torch.float64) for _ in range(config.num_layers)]
    head, unit = quantised(network.head.weight.detach())
    out = []
    for token in ids:
        for layer in range(config.num_layers):
            w_ih, w_hh, b_ih, b_hh = weights[4 * layer : 4 * layer + 4]
            h, c = state[layer]
            if layer:
                (w, size), x = quantised(w_ih, w_hh), (127 * state[layer - 1][0]).round() / 127
                from_input = size.squeeze(1) * (w.double() @ x) + b_ih.double()
            else:
                from_input = w_ih[:, token].double() + b_ih.double()
            u, size = quantised(w_hh, w_ih if layer else None)
            from_state = size.squeeze(1) * (u.double() @ ((127 * h).round() / 127)) + b_hh.double()
            state[layer] = _cell(config.cell, from_input, from_state, h, c)
        last = (127 * state[-1][0]).round() / 127
        out.append(unit.squeeze(1) * (head.double() @ last) + network.head.bias.double())
    return torch.stack(out).detach()


def _cell(cell: str, x: Tensor, u: Tensor, h: Tensor, c: Tensor) -> Tensor:
    if cell == "rnn_tanh":
        return torch.stack([(x + u).tanh(), c])
    if cell == "lstm":
        i, f, g, o = (x + u).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.stack([o.sigmoid() * c.tanh(), c])
    (xr, xz, xn), (ur, uz, un) = x.chunk(3), u.chunk(3)
    z, n = (xz + uz).sigmoid(), (xn + (xr + ur).sigmoid() * un).tanh()
    return torch.stack([n + z * (h - n), c])


def one_value(network: Network) -> float:
    """How far a logit moves, at most, when every state moves to the next of its values."""
    return float(network.head.weight.detach().abs().sum(1).max()) / 127


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
    """Gates of 12 bits are wrong by 2^-12, a sixteenth of the distance between two values of a state: no logit moves as
    far as it would if every state went to the next value."""
    network = make(cell, *shape)
    ids = ids_of(network, 30)
    on("portable")
    exact = logits(make_runner(network, quantize="int8"), ids)
    on("amx")
    tiles = logits(make_runner(network, quantize="int8"), ids)
    assert oracle.error(tiles, exact) <= one_value(network)


@pytest.mark.parametrize("isa", [*PLAIN, "amx"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_8_bits_lose(cell: str, isa: str, on) -> None:
    """The loss in nats of a text under the int8 network against the float32 network's: below a hundredth."""
    network = make(cell, 2, 64, 60)
    ids = ids_of(network, 80)
    on(isa)

    def nats(runner: Runner) -> Tensor:
        return -logits(runner, ids[:-1]).log_softmax(1).gather(1, ids[1:, None]).mean()

    quantised, plain = nats(make_runner(network, quantize="int8")), nats(make_runner(network))
    assert float((quantised - plain).abs()) < oracle.INT8_NATS
    assert quantised != plain


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

"""`reset=` masks against torch.nn run piece by piece in a Python loop, with every gradient."""

import pytest
import torch
from layer_cases import CELLS, LAYERS, assert_same, flat, make_state, outcome, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastrnn import layers
from oracle import assert_all_close

T, B, I, H = 6, 3, 3, 4


class Unrolled(nn.Module):
    """A stack of torch.nn cells run in Python, with the state zeroed where a row starts anew; time-major."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer  # its parameters are the ones that get the gradients
        self.cell = getattr(nn, layer._get_name() + "Cell")

    def forward(self, x: Tensor, hx, reset: Tensor, lengths=None):
        states, ends, ys = [s.unbind(0) for s in flat(hx)], [], []
        lengths = torch.full((x.size(1),), x.size(0)) if lengths is None else lengths
        for slot in range(len(states[0])):
            direction = slot % (1 + self.layer.bidirectional)
            y, end = self._direction(slot, direction, x, [s[slot] for s in states], reset, lengths)
            ys.append(y)
            ends.append(end)
            if len(ys) == 1 + self.layer.bidirectional:
                x, ys = torch.cat(ys, -1), []
        out = [torch.stack(s) for s in zip(*ends, strict=True)]
        return x, *out

    def _direction(self, slot, direction, x, state, reset, lengths):
        rows, ends = [], []
        for b in range(x.size(1)):
            row_state, length, ys = [s[b] for s in state], int(lengths[b]), {}
            for t in range(length - 1, -1, -1) if direction else range(length):
                starts = reset[t + 1, b] if direction and t + 1 < length else reset[t, b] if not direction else False
                if starts:
                    row_state = [torch.zeros_like(s) for s in row_state]
                row_state = self._step(slot, direction, x[t, b], row_state)
                ys[t] = row_state[0]
            pad = torch.zeros_like(row_state[0])
            rows.append(torch.stack([ys.get(t, pad) for t in range(x.size(0))]))
            ends.append(row_state)
        return torch.stack(rows, 1), [torch.stack(s) for s in zip(*ends, strict=True)]

    def _step(self, slot, direction, x, state):
        layer, per = self.layer, len(self.layer._flat_weights) // len(self.layer.all_weights)
        weights = layer._flat_weights[slot * per : (slot + 1) * per]
        biases = weights[2:4] if layer.bias else [None, None]
        kind = {"LSTM": "lstm_cell", "GRU": "gru_cell", "RNN_TANH": "rnn_tanh_cell", "RNN_RELU": "rnn_relu_cell"}
        hx = [s[None] for s in state]
        function = getattr(torch._VF, kind[layer.mode])
        if layer.proj_size:  # torch.nn's cell has no projection: one step of its fused layer
            out = torch._VF.lstm(x[None, None], [s[None] for s in hx], weights, layer.bias, 1, 0.0, False, False, False)
            return [s[0, 0] for s in out[1:]]
        new = function(x[None], hx if layer.mode == "LSTM" else hx[0], *weights[:2], *biases)
        return [s[0] for s in (new if layer.mode == "LSTM" else (new,))]


CASES = [(name, kwargs) for name in LAYERS for kwargs in ({}, {"num_layers": 2, "bidirectional": True})]
CASES += [("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False})]
CASES += [("RNN", {"nonlinearity": "relu", "bidirectional": True})]


def _masks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    some = torch.rand(T, B, generator=generator) < 0.3
    first, last = torch.zeros(T, B, dtype=torch.bool), torch.zeros(T, B, dtype=torch.bool)
    first[0] = last[-1] = True
    return [some, first, last, torch.ones_like(some), torch.zeros_like(some)]


@pytest.mark.parametrize("name, kwargs", CASES)
def test_against_an_unrolled_loop(name, kwargs):
    torch.manual_seed(0)
    ours = getattr(layers, name)(I, H, **kwargs)
    loop = Unrolled(getattr(nn, name)(I, H, **kwargs))
    loop.layer.load_state_dict(ours.state_dict())
    x, hx = torch.randn(T, B, I), make_state(ours, B)
    for reset in _masks():
        expected = outcome(_bound(loop, reset), x, hx, torch.float64)
        plain = outcome(_bound(loop, reset), x, hx, torch.float32)
        assert_all_close(outcome(ours, x, hx, torch.float64, reset=reset), expected, None, f"{ours} float64")
        assert_all_close(outcome(ours, x, hx, torch.float32, reset=reset), expected, plain, f"{ours} float32")


class _bound(nn.Module):
    """The loop with its mask, so that it is called like a layer."""

    def __init__(self, loop: Unrolled, *args):
        super().__init__()
        self.loop, self.args = loop, args

    def forward(self, x, hx):
        return self.loop(x, hx, *self.args)


@pytest.mark.parametrize("name", LAYERS)
def test_no_reset_is_an_empty_mask(name):
    theirs, ours = pair(name, I, H, num_layers=2, bidirectional=True)
    assert_same(theirs, ours, torch.randn(T, B, I), reset=torch.zeros(T, B, dtype=torch.bool))


@pytest.mark.parametrize("name", LAYERS)
def test_batch_first_unbatched_and_packed_masks(name):
    torch.manual_seed(0)
    ours = getattr(layers, name)(I, H, num_layers=2, bidirectional=True).double()
    first = getattr(layers, name)(I, H, num_layers=2, bidirectional=True, batch_first=True).double()
    first.load_state_dict(ours.state_dict())
    x, hx, reset = torch.randn(T, B, I).double(), make_state(ours, B, dtype=torch.float64), _masks()[0]
    expected = flat(ours(x, hx, reset=reset))
    actual = flat(first(x.transpose(0, 1), hx, reset=reset.t()))
    assert_all_close([actual[0].transpose(0, 1), *actual[1:]], expected)
    for b in range(B):
        state = tuple(s[:, b] for s in hx) if name == "LSTM" else hx[:, b]
        alone = flat(ours(x[:, b], state, reset=reset[:, b]))
        assert_all_close(alone, [expected[0][:, b], *[s[:, b] for s in expected[1:]]])
    lengths = [2, 6, 4]
    packed = pack_sequence([x[:n, b] for b, n in enumerate(lengths)], enforce_sorted=False)
    flags = pack_sequence([reset[:n, b] for b, n in enumerate(lengths)], enforce_sorted=False)
    loop = Unrolled(getattr(nn, name)(I, H, num_layers=2, bidirectional=True).double())
    loop.layer.load_state_dict(ours.state_dict())
    out, hn = ours(packed, hx, reset=flags)
    y, *ends = loop(x, hx, reset, torch.tensor(lengths))
    assert_all_close([*flat(torch.nn.utils.rnn.pad_packed_sequence(out)[0]), *flat(hn)], [y, *ends])


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    theirs, ours = pair(name, I, H)
    hx = make_state(ours, B)
    reset = torch.tensor([True, False, True])
    keep = (~reset).unsqueeze(-1)
    zeroed = tuple(s * keep for s in hx) if name == "LSTMCell" else hx * keep
    x = torch.randn(B, I)
    assert_all_close(
        flat(ours(x, hx, reset=reset)), flat(theirs.double()(x.double(), _double(zeroed))), flat(ours(x, zeroed))
    )
    alone = tuple(s[0] for s in hx) if name == "LSTMCell" else hx[0]
    assert_all_close(flat(ours(x[0], alone, reset=torch.tensor(True))), flat(ours(x[0])))
    ours.double()
    state = [s.double().requires_grad_() for s in flat(hx)]
    new = flat(ours(x.double(), tuple(state) if name == "LSTMCell" else state[0], reset=reset))
    for g in torch.autograd.grad(sum(s.sum() for s in new), state):
        assert torch.equal(g.abs().sum(-1) == 0, reset)


def _double(value):
    return tuple(v.double() for v in value) if isinstance(value, tuple) else value.double()


@pytest.mark.parametrize("name", LAYERS)
def test_resets_cut_a_sequence_into_independent_ones(name):
    ours = getattr(layers, name)(I, H, bidirectional=True).double()
    x = torch.randn(T, 1, I).double()
    reset = torch.zeros(T, 1, dtype=torch.bool)
    reset[2] = reset[5] = True
    whole = ours(x, reset=reset)[0]
    pieces = torch.cat([ours(x[:2])[0], ours(x[2:5])[0], ours(x[5:])[0]])
    assert_all_close([whole], [pieces])

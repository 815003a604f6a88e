"""The ops of both directions of a layer: opcheck, gradients of any order, every backend, and what they mean."""

import pytest
import torch
from test_ops import BACKENDS, CELLS, arguments
from torch.library import opcheck

import fastrnn
from fastrnn import reference
from fastrnn.library import ARGUMENTS, GRADIENTS, RESULTS
from oracle import assert_close, check

SHARED = ("x", "lengths", "reset")


def both_arguments(kind, dtype=torch.float64, masked=True, **sizes):
    """Random arguments of the forward op of both directions by name."""
    cell, a = arguments(kind, dtype, masked=masked, **sizes)
    other = arguments(kind, dtype, masked=masked, **sizes)[1]
    for name, value in a.items():
        if torch.is_tensor(value) and name not in SHARED:
            a[name] = torch.stack((value, other[name])).detach().requires_grad_()
    del a["reverse"]
    return cell, a


def in_order(op, a):
    return [a[name] for name in ARGUMENTS[op]]


def backward_arguments(cell, a, rows="both"):
    """Arguments of the backward op that follow a call of the reference's forward, of both directions or `packed`."""
    op = f"{cell}_{rows}_forward"
    named = a | dict(zip(RESULTS[op], getattr(reference, op)(*in_order(op, a))))
    named |= {"dy": torch.randn_like(named["y"]), "dhn": torch.randn_like(named["hn"])}
    named |= {"dcn": torch.randn_like(named["cn"])} if cell == "lstm" else {}
    return [v.detach() if torch.is_tensor(v) else v for v in in_order(f"{cell}_{rows}_backward", named)]


@pytest.mark.parametrize(("kind", "masked"), [("lstm-proj", True), ("gru", False), ("rnn-tanh", True)])
def test_opcheck(kind, masked):
    cell, a = both_arguments(kind, masked=masked, bias=masked, time=2)
    forward, backward = (getattr(torch.ops.fastrnn, f"{cell}_both_{way}").default for way in ("forward", "backward"))
    opcheck(forward, in_order(f"{cell}_both_forward", a))
    values = backward_arguments(cell, a)
    opcheck(backward, [v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for v in values])


@pytest.mark.parametrize("kind", CELLS)
def test_first_and_second_derivative(kind):
    cell, a = both_arguments(kind, time=2, batch=1, inputs=2, hidden=2)
    op, names = f"{cell}_both_forward", [n for n in GRADIENTS[cell] if a[n] is not None]

    def function(*values):
        results = getattr(torch.ops.fastrnn, op)(*in_order(op, a | dict(zip(names, values))))
        return tuple(results[: 3 if cell == "lstm" else 2])

    assert torch.autograd.gradcheck(function, [a[n] for n in names])
    if kind != "rnn-relu":
        assert torch.autograd.gradgradcheck(function, [a[n] for n in names])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CELLS)
def test_every_backend_equals_the_oracle(kind, backend):
    cell, a = both_arguments(kind, torch.float32, masked=backend != "aten", time=7, batch=3, inputs=4, hidden=9)
    a = {n: v.detach() if torch.is_tensor(v) else v for n, v in a.items()}
    given = {f"{cell}_both_forward": in_order(f"{cell}_both_forward", a)}
    given[f"{cell}_both_backward"] = backward_arguments(cell, a)
    with fastrnn.backend(backend):
        for op, values in given.items():
            check(getattr(torch.ops.fastrnn, op), getattr(reference, op), values, op)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_it_is_a_bidirectional_layer(mode):
    """torch.nn's, whose output has both directions side by side."""
    layer = getattr(torch.nn, mode)(3, 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    state = [torch.randn(2, 2, 4, dtype=torch.float64) for _ in range(1 + (mode == "LSTM"))]
    weights = [torch.stack(pair) for pair in zip(layer._flat_weights[:4], layer._flat_weights[4:])]
    tail = {"LSTM": (None, None, None, False), "GRU": (None, None, False), "RNN": (None, None, "tanh")}[mode]
    y, *end = getattr(torch.ops.fastrnn, f"{mode.lower()}_both_forward")(x, *state, *weights, *tail)
    expected, last = layer(x, tuple(state) if mode == "LSTM" else state[0])
    assert_close(torch.cat(tuple(y), -1), expected)
    for found, wanted in zip(end, last if mode == "LSTM" else (last,)):
        assert_close(found, wanted)


def test_a_reset_starts_a_segment_in_both_directions():
    """So each segment is what it is alone."""
    cell, a = both_arguments("gru", masked=False, time=6, batch=1)
    a["h0"] = torch.zeros_like(a["h0"])
    a["reset"] = torch.tensor([False, False, True, False, False, False]).unsqueeze(-1)
    op = f"{cell}_both_forward"
    whole = getattr(reference, op)(*in_order(op, a))[0]
    for part in (slice(0, 2), slice(2, 6)):
        alone = getattr(reference, op)(*in_order(op, a | {"x": a["x"][part], "reset": None}))[0]
        assert_close(whole[:, part], alone)

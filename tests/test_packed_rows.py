"""The ops of packed rows: opcheck, gradients of any order, every backend, and what they mean."""

import pytest
import torch
from test_both_directions import CELLS, backward_arguments, both_arguments, in_order
from test_ops import BACKENDS
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import reference
from fastrnn.library import GRADIENTS, RESULTS
from oracle import assert_close, check

LENGTHS = torch.tensor([3, 1])


def packed_arguments(kind, dtype=torch.float64, directions=2, lengths=LENGTHS, masked=True, **sizes):
    """Random arguments of the forward op of packed rows by name."""
    cell, a = both_arguments(kind, dtype, masked=False, time=int(lengths[0]), batch=len(lengths), **sizes)
    for name, value in a.items():
        if torch.is_tensor(value) and name != "x":
            a[name] = value[:directions].detach().requires_grad_()
    exists = torch.arange(int(lengths[0])).unsqueeze(-1) < lengths
    a["x"] = a["x"][exists].detach().requires_grad_()
    a["lengths"], a["offsets"] = lengths, torch.nn.functional.pad(exists.sum(1).cumsum(0), (1, 0))
    a["reset"] = torch.rand(len(a["x"])) < 0.3 if masked else None
    return cell, a


@pytest.mark.parametrize(("kind", "directions"), [("lstm-proj", 2), ("gru", 1), ("rnn-tanh", 2)])
def test_opcheck(kind, directions):
    cell, a = packed_arguments(kind, directions=directions)
    forward, backward = (getattr(torch.ops.fastrnn, f"{cell}_packed_{way}").default for way in ("forward", "backward"))
    opcheck(forward, in_order(f"{cell}_packed_forward", a))
    values = backward_arguments(cell, a, "packed")
    opcheck(backward, [v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for v in values])


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_first_and_second_derivative(kind, save):
    """Also where forward saves nothing and is run once more for backward."""
    cell, a = packed_arguments(kind, inputs=2, hidden=2, lengths=torch.tensor([2, 1]))
    op, names = f"{cell}_packed_forward", [n for n in GRADIENTS[cell] if a[n] is not None]
    a["save"] = save

    def function(*values):
        results = getattr(torch.ops.fastrnn, op)(*in_order(op, a | dict(zip(names, values))))
        return tuple(results[: 3 if cell == "lstm" else 2])

    assert torch.autograd.gradcheck(function, [a[n] for n in names])
    if kind != "rnn-relu" and save:
        assert torch.autograd.gradgradcheck(function, [a[n] for n in names])


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] != "aten"])
@pytest.mark.parametrize("kind", CELLS)
def test_every_backend_equals_the_oracle(kind, backend):
    cell, a = packed_arguments(kind, torch.float32, lengths=torch.tensor([7, 4, 4]), inputs=4, hidden=9)
    a = {n: v.detach() if torch.is_tensor(v) else v for n, v in a.items()}
    given = {f"{cell}_packed_forward": in_order(f"{cell}_packed_forward", a)}
    given[f"{cell}_packed_backward"] = backward_arguments(cell, a, "packed")
    with fastrnn.backend(backend):
        for op, values in given.items():
            check(getattr(torch.ops.fastrnn, op), getattr(reference, op), values, op)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_it_is_a_layer_over_a_packed_sequence(mode, directions):
    """torch.nn's, whose output has the directions side by side."""
    _, a = packed_arguments("gru", directions=directions, lengths=torch.tensor([5, 5, 3, 1]), masked=False)
    layer = getattr(torch.nn, mode)(4, 3, bidirectional=directions == 2, dtype=torch.float64)
    state = [torch.randn(directions, 4, 3, dtype=torch.float64) for _ in range(1 + (mode == "LSTM"))]
    weights = [torch.stack(layer._flat_weights[k::4]) for k in range(4)]
    tail = {"LSTM": (False,), "GRU": (False,), "RNN": ("tanh",)}[mode]
    given = (*([None] if mode == "LSTM" else []), a["lengths"], a["offsets"], None, *tail)
    y, *end = getattr(torch.ops.fastrnn, f"{mode.lower()}_packed_forward")(a["x"], *state, *weights, *given)
    packed = PackedSequence(a["x"], a["offsets"].diff())
    expected, last = layer(packed, tuple(state) if mode == "LSTM" else state[0])
    assert_close(torch.cat(tuple(y), -1), expected.data)
    for found, wanted in zip(end, last if mode == "LSTM" else (last,)):
        assert_close(found, wanted)


def test_results_have_the_names_of_one_direction():
    for cell in ("lstm", "gru", "rnn"):
        for way in ("forward", "backward"):
            assert RESULTS[f"{cell}_packed_{way}"] == RESULTS[f"{cell}_{way}"]

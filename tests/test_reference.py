"""The definition equals torch.nn in float64 to rounding: outputs, states and every gradient."""

import itertools

import pytest
import torch
from torch import nn

from fastrnn import reference
from oracle import assert_all_close, assert_close

CASES = [
    pytest.param(nn.LSTM, {}, id="lstm"),
    pytest.param(nn.LSTM, {"proj_size": 3}, id="lstm-proj"),
    pytest.param(nn.LSTM, {"bias": False}, id="lstm-nobias"),
    pytest.param(nn.GRU, {}, id="gru"),
    pytest.param(nn.GRU, {"bias": False}, id="gru-nobias"),
    pytest.param(nn.RNN, {}, id="rnn-tanh"),
    pytest.param(nn.RNN, {"nonlinearity": "relu"}, id="rnn-relu"),
    pytest.param(nn.RNN, {"bias": False}, id="rnn-nobias"),
]


def setup(module, options, reverse, time=6, batch=4, inputs=5, hidden=7):
    """A torch.nn layer, its input and states in float64, and the tensors of the direction asked for."""
    torch.manual_seed(1)
    layer = module(inputs, hidden, bidirectional=reverse, **options).double()
    x = torch.randn(time, batch, inputs, dtype=torch.float64, requires_grad=True)
    sizes = [options.get("proj_size", hidden)] + ([hidden] if module is nn.LSTM else [])
    states = [torch.randn(1 + reverse, batch, s, dtype=torch.float64, requires_grad=True) for s in sizes]
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else []), "weight_hr"]
    suffix = "_l0_reverse" if reverse else "_l0"
    weights = {name: getattr(layer, name + suffix) for name in names if hasattr(layer, name + suffix)}
    return layer, x, states, weights


def definition(layer, x, states, weights, reverse, lengths=None, reset=None):
    """Forward by the definition, and the arguments that its backward takes after the gradients."""
    cell = layer.mode.partition("_")[0].lower()
    k = int(reverse)
    inputs = [x, *(s[k] for s in states), weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih")]
    inputs += [weights.get("bias_hh"), *([weights.get("weight_hr")] if cell == "lstm" else []), lengths, reset, reverse]
    tail = [layer.nonlinearity] if cell == "rnn" else [True]
    outputs = getattr(reference, f"{cell}_forward")(*inputs, *tail)
    ends = 1 + len(states)
    kept = [outputs[0], *outputs[ends:]]
    return cell, outputs[:ends], [*inputs, *(tail if cell == "rnn" else []), *kept]


def gradients_by_name(cell, results):
    names = {
        "lstm": ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "weight_hr"),
        "gru": ("x", "h", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
        "rnn": ("x", "h", "weight_ih", "weight_hh", "bias_ih"),
    }[cell]
    found = dict(zip(names, results))
    if cell != "gru":
        found["bias_hh"] = found["bias_ih"]
    return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("module, options", CASES)
def test_equals_torch_nn(module, options, reverse):
    layer, x, states, weights = setup(module, options, reverse)
    y, ends = layer(x, tuple(states) if module is nn.LSTM else states[0])
    k, width = int(reverse), states[0].shape[-1]
    expected = (y[..., k * width : (k + 1) * width], *(s[k] for s in (ends if module is nn.LSTM else (ends,))))
    cell, outputs, backward_inputs = definition(layer, x, states, weights, reverse)
    assert_all_close(outputs, expected, what="forward")

    grads = [torch.randn_like(t) for t in expected]
    wanted = [x, *states, *weights.values()]
    found = torch.autograd.grad(expected, wanted, grads)
    ours = gradients_by_name(cell, getattr(reference, f"{cell}_backward")(*grads, *backward_inputs))
    assert_close(ours["x"], found[0], what="dx")
    for name, state in zip("hc", found[1 : 1 + len(states)]):
        assert_close(ours[name], state[k], what=f"d{name}0")
    for name, gradient in zip(weights, found[1 + len(states) :]):
        assert_close(ours[name], gradient, what=f"d{name}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("module, options", CASES)
def test_lengths_and_resets_equal_separate_calls(module, options, reverse):
    """A row with a length is that row cut short; a reset is two rows one after the other, the second from zero."""
    layer, x, states, weights = setup(module, options, reverse)
    time, batch = x.shape[:2]
    lengths = torch.tensor([time, 4, 0, 1])
    reset = torch.zeros(time, batch, dtype=torch.bool)
    reset[2, 0] = reset[3, 1] = reset[0, 3] = True
    _, outputs, _ = definition(layer, x, states, weights, reverse, lengths, reset)
    for row in range(batch):
        length = int(lengths[row])
        own = [s[:, row : row + 1] for s in states]
        marks = [t for t in range(length) if reset[t, row]]
        if reverse:  # a reset at t zeroes the state before step t, and the steps run downwards
            edges = [length, *(t + 1 for t in reversed(marks)), 0]
        else:
            edges = [0, *marks, length]
        pieces, first = {}, True
        for start, stop in itertools.pairwise(edges):
            low, high = min(start, stop), max(start, stop)
            begin = own if first else [torch.zeros_like(s) for s in own]
            first = False
            if high > low:
                _, piece, _ = definition(layer, x[low:high, row : row + 1], begin, weights, reverse)
                pieces[low], last = piece[0], piece[1:]
            else:
                last = [s[int(reverse)] for s in begin]
        expected = torch.cat([pieces[low] for low in sorted(pieces)]) if pieces else outputs[0][:0, row : row + 1]
        assert_close(outputs[0][:length, row : row + 1], expected, what=f"y of row {row}")
        assert not outputs[0][length:, row].any()
        for found, end in zip(outputs[1:], last):
            assert_close(found[row : row + 1], end, what=f"state of row {row}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module, options", CASES)
def test_backward_is_the_derivative_of_forward(module, options, masked, reverse):
    """The written-out backward equals autograd through the definition, with lengths and resets too."""
    layer, x, states, weights = setup(module, options, reverse)
    lengths = torch.tensor([6, 4, 0, 1]) if masked else None
    reset = (torch.rand(x.shape[:2]) < 0.3) if masked else None
    cell, outputs, backward_inputs = definition(layer, x, states, weights, reverse, lengths, reset)
    grads = [torch.randn_like(t) for t in outputs]
    found = torch.autograd.grad(outputs, [x, *states, *weights.values()], grads)
    ours = gradients_by_name(cell, getattr(reference, f"{cell}_backward")(*grads, *backward_inputs))
    assert_close(ours["x"], found[0], what="dx")
    for name, state in zip("hc", found[1 : 1 + len(states)]):
        assert_close(ours[name], state[int(reverse)], what=f"d{name}0")
    for name, gradient in zip(weights, found[1 + len(states) :]):
        assert_close(ours[name], gradient, what=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module, options", CASES)
def test_runs_in_any_dtype(module, options, dtype):
    layer, x, states, weights = setup(module, options, False)
    _, expected, _ = definition(layer, x, states, weights, False)
    layer, x = layer.to(dtype), x.to(dtype)
    states, weights = [s.to(dtype) for s in states], {name: w.to(dtype) for name, w in weights.items()}
    _, outputs, _ = definition(layer, x, states, weights, False)
    for found, true in zip(outputs, expected):
        assert found.dtype == dtype
        # six steps of gates below 1 in magnitude: rounding grows by less than a factor of the step count per step
        assert (found.double() - true).abs().max() <= 6 * 7 * torch.finfo(dtype).eps * true.abs().max().clamp(min=1)

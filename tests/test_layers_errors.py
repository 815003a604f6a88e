"""A bad call gets torch.nn's exception type and text, word for word."""

import pytest
import torch
from layer_cases import CELLS, LAYERS
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from fastrnn import layers

CONSTRUCTIONS = [
    *[(name, (3, 4), {"bias": 1}) for name in LAYERS],
    *[(name, (3, 4), {"batch_first": None}) for name in LAYERS],
    *[(name, (3, 4), {"dropout": value}) for name in LAYERS for value in (1.5, -0.1, True, "half")],
    *[(name, (0, 4), {}) for name in LAYERS],
    *[(name, (3, 0), {}) for name in LAYERS],
    *[(name, (3.0, 4), {}) for name in LAYERS],
    *[(name, (3, "4"), {}) for name in LAYERS],
    *[(name, (3, 4, 0), {}) for name in LAYERS],
    *[(name, (3, 4), {"num_layers": 1.5}) for name in LAYERS],
    *[(name, (3, 4), {"nonsense": 1}) for name in LAYERS],
    *[(name, (3, 4), {"proj_size": 2}) for name in ("GRU", "RNN")],
    *[(name, (3, 4), {"proj_size": 0}) for name in ("GRU", "RNN")],
    *[("LSTM", (3, 4), {"proj_size": size}) for size in (4, 5, -1)],
    *[("RNN", (3, 4), {"nonlinearity": value}) for value in ("gelu", None)],
    *[("RNN", (3, 4, 1, "sigmoid"), {})],
    *[(name, (3, 4), {"nonsense": 1}) for name in CELLS],
    *[(name, (-3, 4), {}) for name in CELLS],
    *[(name, (3, "4"), {}) for name in CELLS],
]

f32, f64 = {}, {"dtype": torch.float64}
t = torch.zeros

# name: (input, hx as LSTM takes it, hx as GRU and RNN take it); a module has I=3, H=4, L=2 for layers.
CALLS = {
    "input 1-D": (t(3),),
    "input 4-D": (t(1, 2, 5, 3),),
    "input of the wrong width": (t(5, 2, 4),),
    "unbatched input of the wrong width": (t(5, 4),),
    "input of another dtype": (t(5, 2, 3, **f64),),
    "integer input": (t(5, 2, 3, dtype=torch.int64),),
    "no tensor": ([1, 2],),
    "none": (None,),
    "input on another device": (t(5, 2, 3, device="meta"),),
    "empty sequence": (t(0, 2, 3),),
    "empty unbatched sequence": (t(0, 3),),
    "h of the wrong width": (t(5, 2, 3), (t(2, 2, 5), t(2, 2, 4)), t(2, 2, 5)),
    "c of the wrong width": (t(5, 2, 3), (t(2, 2, 4), t(2, 2, 5)), t(2, 2, 5)),
    "state of the wrong batch": (t(5, 2, 3), (t(2, 3, 4), t(2, 3, 4)), t(2, 3, 4)),
    "state of the wrong number of layers": (t(5, 2, 3), (t(1, 2, 4), t(1, 2, 4)), t(1, 2, 4)),
    "2-D state of batched input": (t(5, 2, 3), (t(2, 4), t(2, 4)), t(2, 4)),
    "3-D state of unbatched input": (t(5, 3), (t(2, 1, 4), t(2, 1, 4)), t(2, 1, 4)),
    "state of another dtype": (t(5, 2, 3), (t(2, 2, 4, **f64), t(2, 2, 4, **f64)), t(2, 2, 4, **f64)),
    "state on another device": (t(5, 2, 3), (t(2, 2, 4, device="meta"),) * 2, t(2, 2, 4, device="meta")),
    "the other kind of state": (t(5, 2, 3), t(2, 2, 4), (t(2, 2, 4), t(2, 2, 4))),
    "a stacked pair": (t(5, 2, 3), t(2, 2, 2, 4), t(2, 2, 2, 4)),
    "three states": (t(5, 2, 3), (t(2, 2, 4),) * 3, (t(2, 2, 4),) * 3),
    "one state in a tuple": (t(5, 2, 3), (t(2, 2, 4),), (t(2, 2, 4),)),
    "no tensors in the state": (t(5, 2, 3), (1, 2), 1),
    "packed input of the wrong width": (pack_sequence([t(3, 5), t(2, 5)]),),
    "packed input of another dtype": (pack_sequence([t(3, 3, **f64), t(2, 3, **f64)]),),
    "packed input, h of the wrong width": (pack_sequence([t(3, 3)]), (t(2, 1, 5), t(2, 1, 4)), t(2, 1, 5)),
    "packed input, 2-D state": (pack_sequence([t(3, 3)]), (t(2, 4), t(2, 4)), t(2, 4)),
}
CELL_CALLS = {
    "input 3-D": (t(5, 2, 3),),
    "input 0-D": (t(()),),
    "input of the wrong width": (t(2, 4),),
    "unbatched input of the wrong width": (t(4),),
    "input of another dtype": (t(2, 3, **f64),),
    "no tensor": ([1, 2],),
    "input on another device": (t(2, 3, device="meta"),),
    "h of the wrong width": (t(2, 3), (t(2, 5), t(2, 4)), t(2, 5)),
    "c of the wrong width": (t(2, 3), (t(2, 4), t(2, 5)), t(2, 5)),
    "state of the wrong batch": (t(2, 3), (t(3, 4), t(3, 4)), t(3, 4)),
    "c of the wrong batch": (t(2, 3), (t(2, 4), t(3, 4)), t(3, 4)),
    "1-D state of batched input": (t(2, 3), (t(4), t(4)), t(4)),
    "2-D state of unbatched input": (t(3), (t(1, 4), t(1, 4)), t(1, 4)),
    "3-D state": (t(2, 3), (t(1, 2, 4), t(1, 2, 4)), t(1, 2, 4)),
    "state of another dtype": (t(2, 3), (t(2, 4, **f64), t(2, 4, **f64)), t(2, 4, **f64)),
    "the other kind of state": (t(2, 3), t(2, 4), (t(2, 4), t(2, 4))),
    "three states": (t(2, 3), (t(2, 4),) * 3, (t(2, 4),) * 3),
    "one state in a tuple": (t(2, 3), (t(2, 4),), (t(2, 4),)),
}


def _complaint(function) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # which one, torch.nn's module decides
        function()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("name, args, kwargs", CONSTRUCTIONS)
def test_construction(name, args, kwargs):
    theirs, ours = (_complaint(lambda m=m: getattr(m, name)(*args, **kwargs)) for m in (nn, layers))
    assert ours[0] is theirs[0]
    # Python itself names the class whose signature does not match; ours has its own.
    assert ours[1] == theirs[1] or (name in CELLS and ours[1].split(" ", 1)[1] == theirs[1].split(" ", 1)[1])


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("args", [(), (3,)])
def test_missing_arguments(name, args):
    theirs, ours = (_complaint(lambda m=m: getattr(m, name)(*args)) for m in (nn, layers))
    assert ours[0] is theirs[0] is TypeError
    assert ours[1].partition("missing")[2] == theirs[1].partition("missing")[2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_calls_of_layers(name, what, training):
    input, *states = CALLS[what]
    hx = states[name != "LSTM"] if states else None
    modules = [getattr(m, name)(3, 4, num_layers=2).train(training) for m in (nn, layers)]
    theirs, ours = (_complaint(lambda m=m: m(input, hx)) for m in modules)
    assert ours == theirs


@pytest.mark.parametrize("name", LAYERS)
def test_calls_of_layers_with_batch_first_and_projection(name):
    kwargs = {"proj_size": 2} if name == "LSTM" else {}
    modules = [getattr(m, name)(3, 4, batch_first=True, bidirectional=True, **kwargs) for m in (nn, layers)]
    wrong = t(2, 2, 4)
    hx = (wrong, wrong) if name == "LSTM" else wrong
    for args in ((t(5, 2, 3), hx), (t(5, 2, 4),), (t(2, 0, 3),)):
        theirs, ours = (_complaint(lambda m=m, args=args: m(*args)) for m in modules)
        assert ours == theirs


@pytest.mark.parametrize("what", CELL_CALLS)
@pytest.mark.parametrize("name", CELLS)
def test_calls_of_cells(name, what):
    input, *states = CELL_CALLS[what]
    hx = states[name != "LSTMCell"] if states else None
    theirs, ours = (_complaint(lambda m=m: getattr(m, name)(3, 4)(input, hx)) for m in (nn, layers))
    assert ours == theirs


def test_unknown_nonlinearity_of_a_cell():
    theirs, ours = (_complaint(lambda m=m: m.RNNCell(3, 4, nonlinearity="gelu")(t(2, 3))) for m in (nn, layers))
    assert ours == theirs


RESETS = {
    "a list": ([True], "reset must be a bool tensor of shape (T, B) = (5, 2), got list"),
    "wrong dtype": (t(5, 2), "reset must be a bool tensor of shape (T, B) = (5, 2) on cpu, got torch.float32"),
    "wrong shape": (t(2, 5, dtype=torch.bool), "got torch.bool of shape (2, 5) on cpu"),
    "wrong device": (t(5, 2, dtype=torch.bool, device="meta"), "got torch.bool of shape (5, 2) on meta"),
    "packed": (pack_sequence([t(5, dtype=torch.bool)] * 2), "got PackedSequence"),
}


@pytest.mark.parametrize("what", RESETS)
@pytest.mark.parametrize("name", LAYERS)
def test_resets_that_do_not_fit(name, what):
    reset, text = RESETS[what]
    kind, message = _complaint(lambda: getattr(layers, name)(3, 4)(t(5, 2, 3), reset=reset))
    assert kind in (TypeError, ValueError)
    assert text in message


def test_resets_that_do_not_fit_other_inputs():
    lstm = layers.LSTM(3, 4, batch_first=True)
    flags = t(5, 2, dtype=torch.bool)
    packed = pack_sequence([t(3, 3), t(2, 3)])
    with pytest.raises(ValueError, match=r"shape \(B, T\) = \(2, 5\) on cpu, got torch.bool of shape \(5, 2\)"):
        lstm(t(2, 5, 3), reset=flags)
    with pytest.raises(ValueError, match=r"shape \(T,\) = \(5,\)"):
        lstm(t(5, 3), reset=flags)
    with pytest.raises(TypeError, match="reset must be a PackedSequence of bools because input is a PackedSequence"):
        lstm(packed, reset=flags)
    with pytest.raises(ValueError, match=r"batch_sizes \[2, 2, 1\] and the same order of rows, got batch_sizes \[2, 2"):
        lstm(packed, reset=pack_sequence([t(4, dtype=torch.bool), t(2, dtype=torch.bool)]))
    short_first = pack_sequence([t(2, dtype=torch.bool), t(3, dtype=torch.bool)], enforce_sorted=False)
    with pytest.raises(ValueError, match="the same order of rows"):
        lstm(packed, reset=short_first)
    with pytest.raises(ValueError, match=r"shape \(sum of lengths,\) = \(5,\)"):
        lstm(packed, reset=pack_sequence([t(3), t(2)]))
    with pytest.raises(ValueError, match=r"shape \(B,\) = \(2,\)"):
        layers.GRUCell(3, 4)(t(2, 3), reset=flags)
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments"):
        lstm(t(2, 5, 3), None, flags)

"""Both directions of a layer in one launch of the Triton kernels, against the definition and each direction alone."""

import pytest
import torch
from triton_cases import (
    DTYPES,
    KINDS,
    NEEDED,
    assert_equal,
    both_case,
    call,
    hold_to_definition,
    runs_here,
    skip_without,
    with_gradients,
)

import fastrnn
from fastrnn.library import RESULTS
from oracle import assert_close

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

# One slice of the batch and two, of different fill, for each direction; an odd number of steps and an even one.
SHAPES = [
    dict(time=3, batch=3, inputs=7, hidden=5, masked=True),
    dict(time=2, batch=17, inputs=4, hidden=33, masked=True, bias=False),
]


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=["small", "two slices"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_against_the_definition(device, form, kind, shape, way):
    skip_without(form, kind, shape["hidden"])
    hold_to_definition(*both_case(kind, device, **shape), way)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_dtypes(device, kind, dtype):
    case = both_case(kind, device, dtype, time=3, batch=2, inputs=5, hidden=21)
    hold_to_definition(*case, "forward")
    hold_to_definition(*case, "backward")


@pytest.mark.parametrize("kind", KINDS)
def test_each_direction_is_what_it_is_alone(device, form, kind):
    """Bit for bit, in forward and backward; x has one input, so that its part has no sum to be ordered."""
    skip_without(form, kind)
    cell, a = both_case(kind, device, time=2, batch=18, inputs=1, hidden=19, masked=True, bias=False)
    named = with_gradients(cell, a)
    found = call(f"{cell}_forward", a) | call(f"{cell}_backward", named)
    single = cell.removesuffix("_both")
    shared = ("x", "lengths", "reset")
    for d in (0, 1):
        own = {n: v[d] if torch.is_tensor(v) and n not in shared else v for n, v in named.items()}
        if d == 1:
            own["reset"] = torch.cat((a["reset"][1:], torch.zeros_like(a["reset"][:1])))
        own["reverse"] = d == 1
        alone = call(f"{single}_forward", own) | call(f"{single}_backward", own)
        for name in {"y", "hn", "cn", "gates", "cells", "dh0", "dc0"} & set(alone):
            assert_equal(found[name][d], alone[name], f"{name} of direction {d}")


@pytest.mark.parametrize("sizes", [dict(time=0), dict(batch=0), dict(time=1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_and_rows(device, kind, sizes):
    case = both_case(kind, device, masked=True, **({"time": 2} | sizes))
    hold_to_definition(*case, "forward")
    hold_to_definition(*case, "backward")


def test_a_state_of_three_directions_is_refused(device):
    cell, a = both_case("gru", device)
    with pytest.raises(RuntimeError, match=r"gru_forward: x must be \(T, B, I\) and h0 \(B, H\), or \(2, B, H\)"):
        call(f"{cell}_forward", a | {"h0": torch.zeros(3, 3, 5, device=device)})


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("packed", [False, True])
def test_layers_take_one_launch_for_both_directions(device, mode, packed, monkeypatch):
    """Two layers, forward and backward, as torch.nn has them; the ops that ran are those of both directions."""
    torch.manual_seed(1)
    ours = getattr(fastrnn, mode)(4, 6, num_layers=2, bidirectional=True, device=device)
    theirs = getattr(torch.nn, mode)(4, 6, num_layers=2, bidirectional=True, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4, device=device)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        given = torch.nn.utils.rnn.pack_padded_sequence(own, [5, 4, 2]) if packed else own
        if layer is ours:
            with fastrnn.backend("triton"):
                ran = fastrnn.explain(lambda layer=layer, given=given: results.append(layer(given)))
        else:
            results.append(layer(given))
        y, state = results.pop()
        y = y.data if packed else y
        (y.square().sum() + sum(s.sin().sum() for s in (state if mode == "LSTM" else (state,)))).backward()
        results.append([y, *(state if mode == "LSTM" else (state,)), own.grad, *(p.grad for p in layer.parameters())])
        for parameter in layer.parameters():
            parameter.grad = None
    cell, op = mode.lower(), "packed" if packed else "both"
    assert {c.op for c, _ in ran} == {cell, f"{cell}_{op}_forward", f"{cell}_{op}_backward"}
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


def test_resets_are_the_layer_s(device):
    layer = fastrnn.GRU(3, 5, bidirectional=True, device=device)
    x, reset = torch.randn(6, 2, 3, device=device), torch.rand(6, 2, device=device) < 0.4
    with fastrnn.backend("triton"):
        found = layer(x, reset=reset)
    with fastrnn.backend("reference"):
        expected = layer(x, reset=reset)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


def test_results_have_the_names_of_one_direction():
    for cell in ("lstm", "gru", "rnn"):
        for way in ("forward", "backward"):
            assert RESULTS[f"{cell}_both_{way}"] == RESULTS[f"{cell}_{way}"]

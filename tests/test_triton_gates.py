"""The Triton kernels that find gates again from a layer's output, against the definition in float64."""

import pytest
import torch
from triton_cases import NEEDED, assert_equal, definition, forward_case, ours, runs_here

import fastrnn
from fastrnn.library import ARGUMENTS
from oracle import check

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

KINDS = ["lstm", "lstm-proj", "gru"]


def gates_case(kind, device, dtype=torch.float32, **sizes):
    """The op and its arguments: those of forward, and the y that forward has for them."""
    cell, a = forward_case(kind, device, dtype, **sizes)
    a["y"] = definition(f"{cell}_forward")(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))[0]
    return f"{cell}_gates", [a[n] for n in ARGUMENTS[f"{cell}_gates"]]


# More steps than one program takes at once and units of one tile and a bit of the next; the interpreter's scan is slow.
SHAPES = {
    "one": dict(time=3, batch=1, hidden=5),
    "masked": dict(time=20, batch=2, hidden=67, masked=True),
    "reverse": dict(time=20, batch=2, hidden=5, masked=True, reverse=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(device, kind, dtype, shape):
    op, values = gates_case(kind, device, dtype, **SHAPES[shape])
    check(ours(op), definition(op), values, op)


@pytest.mark.parametrize("sizes", [dict(time=0), dict(batch=0), dict(time=1), dict(time=16, bias=False)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_and_rows(device, kind, sizes):
    op, values = gates_case(kind, device, masked=True, **sizes)
    check(ours(op), definition(op), values, op)


def test_what_was_before_a_reset_or_lies_beyond_a_length_does_not_matter(device):
    """Not even NaN: in the initial state before a reset at the first step, and in x beyond the length."""
    op, values = gates_case("lstm", device, time=20, batch=2, hidden=5)
    a = dict(zip(ARGUMENTS[op], values))
    a["reset"] = torch.zeros(20, 2, dtype=torch.bool, device=device)
    a["reset"][0], a["lengths"] = True, torch.tensor([20, 7], device=device)
    clean = ours(op)(*a.values())
    a["c0"], a["h0"] = torch.full_like(a["c0"], torch.nan), torch.full_like(a["h0"], torch.nan)
    a["x"][7:, 1] = torch.nan
    for found, expected in zip(ours(op)(*a.values()), clean, strict=True):
        assert_equal(found, expected, op)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_train_without_kept_gates(device, mode, bidirectional):
    """The same gradients as with them, and the op that finds them again is Triton's."""
    torch.manual_seed(2)
    layer = getattr(fastrnn, mode)(3, 5, bidirectional=bidirectional, device=device)
    x, found = torch.randn(6, 2, 3, device=device), []
    for layer.recompute in (False, True):
        with fastrnn.backend("triton"):
            ran = fastrnn.explain(lambda: layer(x)[0].square().sum().backward())
        found.append([p.grad for p in layer.parameters()])
        layer.zero_grad()
    assert f"{mode.lower()}_gates" in {call.op for call, choice in ran if choice.backend == "triton"}
    for again, kept in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(again, kept)

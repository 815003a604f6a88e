"""Packed rows in the Triton kernels, read and written where they lie, against the definition and the padded rows."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from triton_cases import (
    DTYPES,
    KINDS,
    NEEDED,
    assert_equal,
    call,
    hold_to_definition,
    hold_within_fences,
    packed_case,
    runs_here,
    skip_without,
    with_gradients,
)

import fastrnn
from oracle import assert_close

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

# One direction and two; one slice of the batch and two, of which the second has fewer steps than the first.
SHAPES = [
    dict(directions=1, time=5, batch=3, inputs=7, hidden=5, masked=True),
    dict(directions=2, time=3, batch=17, inputs=4, hidden=33, masked=True, bias=False),
]


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=["one direction", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(device, form, kind, shape, way):
    skip_without(form, kind, shape["hidden"])
    hold_to_definition(*packed_case(kind, device, **shape), way)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_dtypes(device, kind, dtype):
    case = packed_case(kind, device, dtype, directions=2, time=3, batch=2, inputs=5, hidden=21)
    hold_to_definition(*case, "forward")
    hold_to_definition(*case, "backward")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_they_are_padded(device, form, kind):
    """Bit for bit, in forward and backward; x has one input, so that its part has no sum to be ordered."""
    skip_without(form, kind)
    cell, a = packed_case(kind, device, directions=2, time=3, batch=18, inputs=1, hidden=19, bias=False)
    named = with_gradients(cell, a)
    found = call(f"{cell}_forward", a) | call(f"{cell}_backward", named)
    exists = torch.arange(3, device=device).unsqueeze(-1) < a["lengths"]
    padded = dict(named)
    for name in {"x", "y", "dy", "gates", "cells"} & set(named):
        padded[name] = named[name].new_zeros(*named[name].shape[:-2], 3, 18, named[name].shape[-1])
        padded[name][..., exists, :] = named[name]
    both = cell.replace("packed", "both")
    expected = call(f"{both}_forward", padded) | call(f"{both}_backward", padded)
    for name in {"y", "hn", "cn", "gates", "cells", "dh0", "dc0"} & set(expected):
        rows = expected[name][:, exists] if expected[name].dim() == 4 else expected[name]
        assert_equal(found[name], rows, name)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_or_written_beyond_the_rows(device, form, kind):
    skip_without(form, kind)
    hold_within_fences(*packed_case(kind, device, time=3, batch=3, inputs=3, hidden=18, masked=True))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", [dict(time=1, batch=3), dict(time=4, batch=1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_and_rows(device, kind, sizes, directions):
    case = packed_case(kind, device, directions=directions, masked=True, **sizes)
    hold_to_definition(*case, "forward")
    hold_to_definition(*case, "backward")


def test_messages_say_what_is_needed(device):
    cell, a = packed_case("gru", device, time=3, batch=2, hidden=5)
    with pytest.raises(RuntimeError, match=r"gru_forward: offsets must be torch.int64"):
        call(f"{cell}_forward", a | {"offsets": a["offsets"].float()})
    with pytest.raises(RuntimeError, match=r"gru_forward: lengths must be \(2,\) for T=3 B=2 I=7 H=5, got \(3,\)"):
        call(f"{cell}_forward", a | {"lengths": a["lengths"].new_ones(3)})


@pytest.mark.parametrize(
    ("mode", "recompute", "options"),
    [
        ("LSTM", False, dict(proj_size=3)),
        ("LSTM", True, dict(bidirectional=True)),
        ("GRU", False, dict(bidirectional=True)),
        ("GRU", True, {}),
        ("RNN", False, {}),
    ],
    ids=str,
)
def test_layers_read_packed_rows_in_place(device, mode, recompute, options):
    """As torch.nn, of sequences in any order, with resets as the definition; no op has padded rows."""
    torch.manual_seed(1)
    options |= dict(num_layers=2)
    ours = getattr(fastrnn, mode)(4, 6, device=device, recompute=recompute, **options)
    theirs = getattr(torch.nn, mode)(4, 6, device=device, **options)
    theirs.load_state_dict(ours.state_dict())
    given = pack_sequence([torch.randn(n, 4, device=device) for n in (2, 5, 1, 4)], enforce_sorted=False)
    given.data.requires_grad_()

    def run(layer, **more):
        (y, _, *orders), state = layer(given, **more)
        assert all(torch.equal(a, b) for a, b in zip(orders, given[2:]))
        results = [y, *(state if mode == "LSTM" else (state,))]
        leaves = [given.data, *layer.parameters()]
        return results + list(torch.autograd.grad(sum(r.sin().sum() for r in results), leaves))

    with fastrnn.backend("triton"):
        found = run(ours)
        ran = {c.op for c, _ in fastrnn.explain(lambda: ours(given))}
    cell = mode.lower()
    ops = [f"{cell}_packed_forward", f"{cell}_packed_backward"]
    assert {cell, ops[0]} <= ran <= {cell, *ops}
    for actual, expected in zip(found, run(theirs), strict=True):
        assert_close(actual, expected)
    reset = PackedSequence(torch.rand(12, device=device) < 0.4, *given[1:])
    with fastrnn.backend("triton"):
        found = run(ours, reset=reset)
    with fastrnn.backend("reference"):
        expected = run(ours, reset=reset)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)

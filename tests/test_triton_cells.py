"""The Triton kernels of lstm, gru and rnn against the definition in float64.

On a GPU the kernels are compiled; elsewhere Triton's interpreter runs them on the CPU (`interpreter`). Sizes are small
for the interpreter's sake; `form` makes the launch plans take the forms that larger sizes take.
"""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton_cases import (
    DTYPES,
    KINDS,
    NEEDED,
    assert_equal,
    call,
    check,
    definition,
    forward_case,
    hold_to_definition,
    hold_within_fences,
    ours,
    runs_here,
    skip_without,
    take_form,
    with_gradients,
)

from fastrnn.library import ARGUMENTS, RESULTS

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

from fastrnn.kernels import cell_math, tuning

# --- values ---------------------------------------------------------------------------------------------------------

# One tile and several, of units (16 or 32), of rows (16) and of the sums over inputs and units (32 or 64).
SHAPES = [
    dict(time=3, batch=3, inputs=7, hidden=5, masked=True),
    dict(time=2, batch=17, inputs=4, hidden=33, masked=True, reverse=True, bias=False),
]


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=["small", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_against_the_definition(device, form, kind, shape, way):
    skip_without(form, kind, shape["hidden"])
    hold_to_definition(*forward_case(kind, device, **shape), way)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_dtypes(device, monkeypatch, kind, dtype):
    for name in ("tiled",) if kind == "lstm-proj" else ("resident", "tiled"):
        with monkeypatch.context() as patch:
            take_form(name, patch)
            cell, a = forward_case(kind, device, dtype, time=3, batch=2, inputs=5, hidden=21, reverse=name == "tiled")
            hold_to_definition(cell, a, "forward")
            hold_to_definition(cell, a, "backward")


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh"])
def test_tf32_is_taken_where_it_is_allowed(device, kind, monkeypatch):
    """One TF32 product makes an error of about 2^-11, three of them none that float32 has not; both are told apart."""
    cell, a = forward_case(kind, device, inputs=3, hidden=40, time=3)
    hold_to_definition(cell, a, "forward")
    exact = definition(f"{cell}_forward")(*(v.double() if isinstance(v, torch.Tensor) else v for v in ordered(cell, a)))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        y = call(f"{cell}_forward", a)["y"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    error = (y.double() - exact[0]).abs().max()
    assert 2**-20 < error < 2**-8


def ordered(cell, a):
    return [a[n] for n in ARGUMENTS[f"{cell}_forward"]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_step(device, kind, dtype, masked):
    cell, a = forward_case(kind, device, dtype, time=1, batch=18, inputs=70, hidden=35, masked=masked, bias=masked)
    hold_to_definition(cell, a, "forward")


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_cells(device, kind):
    """Pre-activations of about 1e4 and of nearly 0 in one batch, one step at a time and in a sequence."""
    for time in (1, 3):
        cell, a = forward_case(kind, device, time=time, batch=4, inputs=1, hidden=19)
        a["x"] *= 1e5
        a["x"][:, 1] = 0
        hold_to_definition(cell, a, "forward")
        hold_to_definition(cell, a, "backward")


def test_tanh_is_accurate_near_zero_and_far(device):
    """Through an Elman cell of one unit and one input whose weight is 1: at most 4 units in the last place."""
    size = torch.cat([torch.logspace(-30, 4, 300, dtype=torch.float64), torch.linspace(0.3, 12, 200).double()])
    x = torch.cat([size, -size]).float().to(device)
    one, state = torch.ones(1, 1, device=device), torch.zeros(len(x), 1, device=device)
    y = ours("rnn_forward")(x.view(1, -1, 1), state, one, one, None, None, None, None, False, "tanh")[0].view(-1)
    exact = x.double().tanh()
    step = torch.nextafter(exact.abs().float(), torch.tensor(torch.inf, device=device)).double() - exact.abs().float()
    assert ((y.double() - exact).abs() <= 4 * step).all()


# --- what a sequence and a batch are ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_parts_is_the_sequence_at_once(device, kind, reverse):
    """In float32, where states are handed on whole; with one input and no bias, a product has no sum to be ordered."""
    cell, a = forward_case(kind, device, time=5, batch=2, inputs=1, hidden=9, reverse=reverse, bias=False)
    whole, x, states = call(f"{cell}_forward", a), a["x"], {"h0": "hn"} | ({"c0": "cn"} if cell == "lstm" else {})
    for part in reversed((slice(0, 2), slice(2, 5))) if reverse else (slice(0, 2), slice(2, 5)):
        results = call(f"{cell}_forward", a | {"x": x[part]})
        for name in set(results) - set(states.values()):
            assert_equal(results[name], whole[name][part], f"{name}[{part}]")
        a |= {before: results[after] for before, after in states.items()}
    for before, after in states.items():
        assert_equal(a[before], whole[after], after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch_and_runs_repeat(device, kind):
    """Row 17 of 18 is in the second slice of the batch; alone it is in the first. One input: no sum to be ordered."""
    cell, a = forward_case(kind, device, time=3, batch=18, inputs=1, hidden=7, masked=True, bias=False)
    named = with_gradients(cell, a)
    again = call(f"{cell}_forward", a) | call(f"{cell}_backward", named)
    whole = {n: named[n] for n in RESULTS[f"{cell}_forward"]} | call(f"{cell}_backward", named)
    for name, value in again.items():
        assert_equal(value, whole[name], f"{name} of a second run")
    rows = {n: v for n, v in named.items() if isinstance(v, torch.Tensor) and not n.startswith(("w_", "b_"))}
    part = named | {n: v[:, 17:] if v.dim() == 3 or n == "reset" else v[17:] for n, v in rows.items()}
    alone = call(f"{cell}_forward", part) | call(f"{cell}_backward", part)
    for name in {"y", "hn", "cn", "gates", "cells", "dh0", "dc0"} & set(alone):
        expected = whole[name][:, 17:] if whole[name].dim() == 3 else whole[name][17:]
        assert_equal(alone[name], expected, f"{name} of row 17 alone")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_or_written_beyond_the_tensors(device, form, kind):
    """Every argument lies between margins of NaN (of True, and of large lengths); results are new and have none."""
    skip_without(form, kind)
    hold_within_fences(*forward_case(kind, device, time=3, batch=2, inputs=3, hidden=18, masked=True))


@triton.jit
def places_of_a_tile(p_places, program, T, B):
    row = cell_math.span_of(None, None, 0, tl.full((), program, tl.int64) * 16, T, B, True)[2]
    o_b, o_n = tl.arange(0, 16), tl.arange(0, 4)
    places = cell_math.tile_of(tl.full((), 0, tl.int64), row - B, o_b, o_n, 4096)
    tl.store(p_places + o_b[:, None] * 4 + o_n[None, :], places)


def test_places_have_64_bits(device):
    """Those of the last step but one of 2**20, in program 1000 of a batch of 2**15: numbers of 47 bits."""
    time, batch = 2**20, 2**15
    found = torch.zeros(16, 4, dtype=torch.int64, device=device)
    places_of_a_tile[(1,)](found, 1000, time, batch)
    rows = (time - 2) * batch + 16_000 + torch.arange(16)
    assert torch.equal(found.cpu(), rows[:, None] * 4096 + torch.arange(4))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_a_length_does_not_matter(device, kind):
    cell, a = forward_case(kind, device, time=4, batch=3, masked=True)
    a["lengths"][2] = 2
    named = with_gradients(cell, a)
    clean = call(f"{cell}_forward", a) | call(f"{cell}_backward", named)
    beyond = (torch.arange(4, device=device).unsqueeze(-1) >= a["lengths"]).unsqueeze(-1)
    nan = {name: named[name].masked_fill(beyond, float("nan")) for name in ("x", "dy")}
    found = call(f"{cell}_forward", a | {"x": nan["x"]}) | call(f"{cell}_backward", named | nan)
    for name in clean:
        assert_equal(found[name], clean[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_arguments_and_no_aliasing(device, kind):
    cell, a = forward_case(kind, device, time=2, batch=3, inputs=4, hidden=6, masked=True)
    named = with_gradients(cell, a)
    expected = call(f"{cell}_forward", a) | call(f"{cell}_backward", named)
    odd = {n: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else v for n, v in named.items()}
    assert not odd["w_hh"].is_contiguous()
    for op in (f"{cell}_forward", f"{cell}_backward"):
        check(ours(op), definition(op), [odd[n] for n in ARGUMENTS[op]], op)
    # Of what goes into torch's own products, another layout may be another kernel and another rounding.
    odd |= {n: named[n] for n in ("x", "w_ih", "y")}
    found = call(f"{cell}_forward", odd) | call(f"{cell}_backward", odd)
    for name in expected:
        assert_equal(found[name], expected[name], name)
    tensors = [*found.values(), *(v for v in odd.values() if isinstance(v, torch.Tensor))]
    starts = [v.untyped_storage().data_ptr() for v in tensors if v.numel()]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("sizes", [dict(time=0), dict(batch=0), dict(time=1, batch=0), dict(inputs=0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_sizes(device, kind, sizes):
    cell, a = forward_case(kind, device, masked=True, **({"time": 2} | sizes))
    hold_to_definition(cell, a, "forward")
    hold_to_definition(cell, a, "backward")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nothing_is_saved_unless_asked(device, form, kind):
    cell, a = forward_case(kind, device, time=2)
    saved, unsaved = call(f"{cell}_forward", a), call(f"{cell}_forward", a | {"save": False})
    for name, value in unsaved.items():
        expected = torch.empty(0, device=device) if name in ("gates", "cells") else saved[name]
        assert_equal(value, expected, name)


@pytest.mark.parametrize("kind", ["lstm-proj", "gru"])
def test_groups_meet_in_any_order_of_their_programs(device, kind, monkeypatch):
    take_form("group", monkeypatch)
    for seed in (1, 2):
        monkeypatch.setattr(interpreter, "seed", seed)
        cell, a = forward_case(kind, device, time=3, batch=2, inputs=2, hidden=40)
        assert tuning.sequence(cell, "forward", 40, 2, torch.float32, 8).programs == 3
        hold_to_definition(cell, a, "forward")
        hold_to_definition(cell, a, "backward")

"""What the tests of the Triton kernels share: arguments and calls by name, and the comparison with the definition."""

from __future__ import annotations

import pytest
import torch

from fastrnn import gpu, reference
from fastrnn.library import ARGUMENTS, GATES, RESULTS
from oracle import check

KINDS = ["lstm", "lstm-proj", "gru", "rnn-tanh", "rnn-relu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEEDED = "needs Triton and either a CUDA GPU or TRITON_INTERPRET=1"


def runs_here() -> bool:
    """Whether the kernels can run on this machine, compiled or interpreted."""
    return gpu.triton_missing() is None and (torch.cuda.is_available() or gpu.interpreting())


def take_form(name, monkeypatch):
    """Has every sequence run in one form: "resident", W_hh on chip, or in tiles, by one program or by a "group"."""
    from fastrnn.kernels import tuning  # which needs Triton

    plan = tuning.sequence

    def sequence(cell, way, hidden, batch, dtype, sms, projection=False, directions=1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "RESIDENT_BYTES", tuning.RESIDENT_BYTES if name == "resident" else 0)
            found = plan(cell, way, hidden, batch, dtype, 1 if name == "tiled" else 8, projection, directions)
        assert found.resident == (name == "resident" and not projection)
        assert name != "tiled" or found.programs == 1
        return found

    monkeypatch.setattr(tuning, "sequence", sequence)


def skip_without(form, kind, hidden=None):
    """Skip where a kind has no such form, or so few units are one tile."""
    if kind == "lstm-proj" and form == "resident":
        pytest.skip("a projection is never resident")
    if form == "group" and hidden is not None and hidden <= 16:
        pytest.skip("one tile has no group; the larger shape has")


def forward_case(
    kind, device, dtype=torch.float32, time=5, batch=3, inputs=7, hidden=5, masked=False, reverse=False, bias=True
):
    """A cell and the arguments of its forward op by name."""
    cell, _, detail = kind.partition("-")
    width = max(1, hidden // 2 + 1) if detail == "proj" else hidden
    rows, scale = GATES[cell] * hidden, 0.5 * hidden**-0.5

    def make(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(device)

    a = {"x": make(time, batch, inputs), "h0": make(batch, width), "w_ih": make(rows, inputs, scale=scale)}
    a["w_hh"] = make(rows, width, scale=scale)
    a["b_ih"], a["b_hh"] = (make(rows, scale=0.3), make(rows, scale=0.3)) if bias else (None, None)
    if cell == "lstm":
        a["c0"] = make(batch, hidden)
        a["w_hr"] = make(width, hidden, scale=hidden**-0.5) if detail == "proj" else None
    a["lengths"] = torch.randint(0, time + 1, (batch,)).to(device) if masked else None
    if masked and batch > 1:
        a["lengths"][0], a["lengths"][1] = 0, time
    a["reset"] = (torch.rand(time, batch) < 0.3).to(device) if masked else None
    a["reverse"] = reverse
    a |= {"nonlinearity": detail} if cell == "rnn" else {"save": True}
    return cell, a


def both_case(kind, device, dtype=torch.float32, **sizes):
    """As `forward_case`, for the op of both directions: two layers' weights and states, one input."""
    cell, a = forward_case(kind, device, dtype, **sizes)
    other = forward_case(kind, device, dtype, **sizes)[1]
    one = ("x", "lengths", "reset")
    a = {n: torch.stack((v, other[n])) if torch.is_tensor(v) and n not in one else v for n, v in a.items()}
    del a["reverse"]
    return f"{cell}_both", a


def packed_case(kind, device, dtype=torch.float32, directions=1, masked=False, **sizes):
    """As `forward_case`, for the op of packed rows, of sequences of all lengths up to `time`; resets where `masked`."""
    cell, a = both_case(kind, device, dtype, **sizes)
    time, batch = a["x"].shape[:2]
    lengths = torch.linspace(time, 1, batch).round().long() if batch > 1 else torch.tensor([time])
    exists = torch.arange(time).unsqueeze(-1) < lengths
    for name, value in a.items():
        if torch.is_tensor(value) and name != "x":
            a[name] = value[:directions]
    a["x"] = a["x"][exists.to(device)]
    a["lengths"] = lengths.to(device)
    a["offsets"] = torch.nn.functional.pad(exists.sum(1).cumsum(0), (1, 0)).to(device)
    a["reset"] = (torch.rand(len(a["x"])) < 0.3).to(device) if masked else None
    return cell.replace("_both", "_packed"), a


def ours(op):
    return gpu.load_triton(op)


def call(op, named, function=ours):
    """Results by name of a forward or backward function."""
    return dict(zip(RESULTS[op], function(op)(*(named[n] for n in ARGUMENTS[op])), strict=True))


def definition(op):
    return getattr(reference, op)


def with_gradients(cell, a, function=ours):
    """The arguments of the backward op by name: what forward returned, and gradients of its results."""
    named = a | call(f"{cell}_forward", a, function)
    named |= {"dy": torch.randn_like(named["y"]), "dhn": torch.randn_like(named["hn"])}
    return named | ({"dcn": torch.randn_like(named["cn"])} if "cn" in named else {})


def hold_to_definition(cell, a, way, function=ours):
    """Forward or backward against the definition; backward takes what the definition's forward kept."""
    named = a if way == "forward" else with_gradients(cell, a, definition)
    op = f"{cell}_{way}"
    check(function(op), definition(op), [named[n] for n in ARGUMENTS[op]], op)


def hold_within_fences(cell, a):
    """Forward and backward, with every argument between margins of NaN (of True, and of large integers)."""
    named = with_gradients(cell, a)
    expected = call(f"{cell}_forward", a) | call(f"{cell}_backward", named)
    for name in expected:
        assert not expected[name].isnan().any(), name

    def fenced(value):
        if not isinstance(value, torch.Tensor):
            return value
        poison = {torch.bool: True, torch.int64: 2**40}.get(value.dtype, float("nan"))
        room = torch.full((value.numel() + 512,), poison, dtype=value.dtype, device=value.device)
        room[256:-256] = value.flatten()
        return room[256:-256].view(value.shape)

    inside = {n: fenced(v) for n, v in named.items()}
    found = call(f"{cell}_forward", inside) | call(f"{cell}_backward", inside)
    for name in expected:
        assert_equal(found[name], expected[name], name)
    for name, value in inside.items():
        if isinstance(value, torch.Tensor):
            assert_equal(value, named[name], f"{name} after the call")


def assert_equal(actual, expected, what):
    __tracebackhide__ = True
    assert actual.shape == expected.shape, what
    assert torch.equal(actual, expected), f"{what}: differs by {(actual.double() - expected.double()).abs().max()}"

"""The ops as PyTorch sees them: opcheck, gradients of any order, autocast; and the table that dispatches them."""

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import fastrnn
from fastrnn import backends, ops, reference
from fastrnn.backends import Call
from fastrnn.library import ARGUMENTS, GATES, GRADIENTS, RESULTS
from oracle import assert_all_close, assert_close, check, to_double

BACKENDS = [  # those that run tensors of the CPU; tests/test_triton_*.py have their own
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=why or ""))
    for name, why in backends.available().items()
    if name != "triton"
]
CELLS = ["lstm", "lstm-proj", "gru", "rnn-tanh", "rnn-relu"]


def arguments(kind, dtype=torch.float64, time=3, batch=2, inputs=4, hidden=3, masked=True, reverse=False, bias=True):
    """Random arguments of the forward op by name."""
    cell, _, detail = kind.partition("-")
    width = 2 if detail == "proj" else hidden

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    a = {"x": make(time, batch, inputs), "h0": make(batch, width)}
    if cell == "lstm":
        a["c0"] = make(batch, hidden)
    a["w_ih"], a["w_hh"] = make(GATES[cell] * hidden, inputs), make(GATES[cell] * hidden, width)
    a["b_ih"], a["b_hh"] = (make(GATES[cell] * hidden), make(GATES[cell] * hidden)) if bias else (None, None)
    if cell == "lstm":
        a["w_hr"] = make(width, hidden) if detail == "proj" else None
    a["lengths"] = torch.randint(0, time + 1, (batch,)) if masked else None
    a["reset"] = torch.rand(time, batch) < 0.3 if masked else None
    a["reverse"] = reverse
    if cell == "rnn":
        a["nonlinearity"] = detail
    else:
        a["save"] = True
    return cell, a


def backward_arguments(cell, a):
    """Arguments of the backward op that follow a call of the reference's forward."""
    outputs = getattr(reference, f"{cell}_forward")(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))
    named = a | dict(zip(RESULTS[f"{cell}_forward"], outputs))
    named |= {"dy": torch.randn_like(named["y"]), "dhn": torch.randn_like(named["hn"])}
    if cell == "lstm":
        named["dcn"] = torch.randn_like(named["cn"])
    values = [named[n] for n in ARGUMENTS[f"{cell}_backward"]]
    return [v.detach() if isinstance(v, torch.Tensor) else v for v in values]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Whose backward is traced with symbolic sizes, which takes seconds, without masks and with them: each cell both ways.
# A projection and a nonlinearity do not know of the masks.
TRACED = {False: ("lstm-proj", "gru", "rnn-tanh"), True: ("lstm", "gru", "rnn-relu")}
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_opcheck(kind, masked):
    cell, a = arguments(kind, time=2, masked=masked, bias=not masked or kind != "gru")
    forward, backward = (getattr(torch.ops.fastrnn, f"{cell}_{way}").default for way in ("forward", "backward"))
    values = [a[n] for n in ARGUMENTS[f"{cell}_forward"]]
    opcheck(forward, values)
    opcheck(forward, [v.detach() if isinstance(v, torch.Tensor) else v for v in values])
    values = backward_arguments(cell, a)
    values = [v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]
    opcheck(backward, values, **({} if kind in TRACED[masked] else {"test_utils": UNTRACED}))


@pytest.mark.parametrize("mode_of", [1, 3])
@pytest.mark.parametrize("logprobs", [False, True])
def test_opcheck_sample(logprobs, mode_of):
    logits = torch.randn(3, 300)
    rows = torch.arange(3)
    zeros, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    mask = torch.rand(1, 300) < 0.9
    top_p, min_p = torch.full((3,), torch.iinfo(torch.int64).max), torch.full((3,), float("inf"))
    opcheck(
        torch.ops.fastrnn.sample.default,
        (logits, ones, zeros, top_p, min_p, mask, rows, rows, zeros, mode_of, logprobs),
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_first_and_second_derivative(kind, reverse):
    cell, a = arguments(kind, time=2, batch=2, inputs=2, hidden=2, reverse=reverse)
    names = [n for n in GRADIENTS[cell] if a[n] is not None]

    def function(*values):
        given = a | dict(zip(names, values))
        outputs = getattr(torch.ops.fastrnn, f"{cell}_forward")(*(given[n] for n in ARGUMENTS[f"{cell}_forward"]))
        return tuple(outputs[: 3 if cell == "lstm" else 2])

    values = [a[n] for n in names]
    assert torch.autograd.gradcheck(function, values)
    if kind != "rnn-relu":  # its second derivative is that of a kink: checked against the definition below
        assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivative_of_an_empty_sequence(kind):
    """Without steps hn = h0, so the second derivative of (sum of hn * h0) by h0 is a constant 2."""
    cell, a = arguments(kind, time=0, masked=False)
    hn = getattr(torch.ops.fastrnn, f"{cell}_forward")(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))[1]
    (first,) = torch.autograd.grad((hn * a["h0"]).sum(), a["h0"], create_graph=True)
    assert_close(first, 2 * a["h0"])
    (second,) = torch.autograd.grad(first.sum(), a["h0"])
    assert_close(second, torch.full_like(second, 2))


@pytest.mark.parametrize("kind", CELLS)
def test_third_derivative_equals_the_definition(kind):
    """Autograd through the op, three times, equals autograd through the plain PyTorch definition."""
    cell, a = arguments(kind, time=2, batch=1, inputs=2, hidden=2)

    def third(function):
        y = function(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))[0]
        (first,) = torch.autograd.grad(y.pow(2).sum(), a["w_hh"], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), a["x"], create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), [a["h0"], a["w_ih"]])

    op, plain = getattr(torch.ops.fastrnn, f"{cell}_forward"), getattr(reference, f"{cell}_forward")
    assert_all_close(third(op), third(plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_every_backend_equals_the_oracle(kind, reverse, dtype, backend):
    masked = backend != "aten"  # aten refuses lengths and resets, and a test below reads its sentences
    cell, a = arguments(kind, dtype, time=9, batch=5, inputs=6, hidden=11, masked=masked, reverse=reverse)
    forward, backward = (getattr(torch.ops.fastrnn, f"{cell}_{way}") for way in ("forward", "backward"))
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in (a[n] for n in ARGUMENTS[f"{cell}_forward"])]
    with fastrnn.backend(backend):
        check(forward, getattr(reference, f"{cell}_forward"), values, what="forward")
        check(backward, getattr(reference, f"{cell}_backward"), backward_arguments(cell, a), what="backward")


@pytest.mark.parametrize("second", BACKENDS)
@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("kind", CELLS)
def test_forward_of_one_backend_feeds_backward_of_another(kind, first, second):
    cell, a = arguments(kind, time=5, batch=3, inputs=6, hidden=4, masked="aten" not in (first, second))
    names = [n for n in GRADIENTS[cell] if a[n] is not None]

    def gradient(forward_backend, backward_backend):
        with fastrnn.backend(forward_backend):
            y = getattr(torch.ops.fastrnn, f"{cell}_forward")(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))
        with fastrnn.backend(backward_backend):
            return torch.autograd.grad((y[0].pow(2).sum() + y[1].sum()), [a[n] for n in names], allow_unused=True)

    assert_all_close(gradient(first, second), gradient("reference", "reference"))


@pytest.mark.parametrize("time, batch", [(0, 3), (4, 0), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CELLS)
def test_empty_and_smallest_sizes(kind, backend, time, batch):
    cell, a = arguments(kind, time=time, batch=batch, masked=False)
    args = [a[n] for n in ARGUMENTS[f"{cell}_forward"]]
    expected = getattr(reference, f"{cell}_forward")(*args)
    with fastrnn.backend(backend):
        if backend == "aten" and time == 0:
            with pytest.raises(fastrnn.BackendRefusal, match="empty"):
                getattr(torch.ops.fastrnn, f"{cell}_forward")(*args)
            return
        assert_all_close(getattr(torch.ops.fastrnn, f"{cell}_forward")(*args), expected)


@pytest.mark.parametrize("kind", ["lstm", "lstm-proj", "gru"])
def test_opcheck_gates(kind):
    cell, a = arguments(kind)
    a["y"] = getattr(reference, f"{cell}_forward")(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))[0].detach()
    opcheck(getattr(torch.ops.fastrnn, f"{cell}_gates").default, [a[n] for n in ARGUMENTS[f"{cell}_gates"]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "lstm-proj", "gru"])
def test_gates_are_those_that_forward_saves(kind, reverse, backend):
    cell, a = arguments(kind, masked=backend != "aten", reverse=reverse)
    a = {n: v.detach() if torch.is_tensor(v) else v for n, v in a.items()}
    forward, gates = getattr(reference, f"{cell}_forward"), getattr(torch.ops.fastrnn, f"{cell}_gates")
    a |= dict(zip(RESULTS[f"{cell}_forward"], forward(*(a[n] for n in ARGUMENTS[f"{cell}_forward"]))))
    with fastrnn.backend(backend):
        found = gates(*(a[n] for n in ARGUMENTS[f"{cell}_gates"]))
    for name, value in zip(RESULTS[f"{cell}_gates"], found if isinstance(found, tuple) else (found,), strict=True):
        assert_close(value, a[name])


def test_one_bias_alone_is_refused():
    _, a = arguments("gru")
    with pytest.raises(ValueError, match="only b_ih"):
        torch.ops.fastrnn.gru_forward(*((a | {"b_hh": None})[n] for n in ARGUMENTS["gru_forward"]))


@pytest.mark.parametrize("kind", CELLS)
def test_autocast(kind):
    cell, a = arguments(kind, torch.float32)
    args = [a[n] for n in ARGUMENTS[f"{cell}_forward"]]
    with torch.autocast("cpu", torch.bfloat16):
        y = getattr(torch.ops.fastrnn, f"{cell}_forward")(*args)[0]
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), a["w_hh"])
    assert gradient.dtype == torch.float32
    low = [v.to(torch.bfloat16) if torch.is_tensor(v) and v.is_floating_point() else v for v in args]
    assert_close(y, getattr(reference, f"{cell}_forward")(*to_double(low))[0],
                 getattr(reference, f"{cell}_forward")(*low)[0])  # fmt: skip


# --- the table ------------------------------------------------------------------------------------------------------

CALL = Call("lstm_forward", "cpu", torch.float32, 7, 2, 3, 4)


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="no backend 'cudnn'; the backends are reference, aten, cpu"):
        with fastrnn.backend("cudnn"):
            pass


def test_an_explicit_backend_never_falls_back():
    with fastrnn.backend("aten"), pytest.raises(fastrnn.BackendRefusal, match="takes no reset mask"):
        backends.choose(CALL._replace(reset=True))
    with fastrnn.backend("cpu"), pytest.raises(fastrnn.BackendRefusal, match="refuses"):
        backends.choose(CALL._replace(dtype=torch.float16))


@pytest.mark.parametrize(
    "change, backend, sentence",
    [
        ({"op": "lstm", "reset": True}, "aten", "no reset mask"),
        ({"op": "lstm", "lengths": True}, "aten", "PackedSequence it does take"),
        ({"op": "lstm", "transform": "torch.func transforms"}, "aten", "does not support torch.func"),
        ({"op": "lstm", "dtype": torch.float16}, "aten", "float16"),
        ({"op": "gru", "device": "cuda", "needs_grad": True, "training": False}, "aten", "training mode only"),
        ({"op": "gru", "device": "cuda", "needs_grad": True, "training": True, "dropout": True}, "aten", "replayed"),
        ({"op": "sample"}, "aten", "no fused draw"),
        ({"time": 0}, "aten", "empty"),
        ({"device": "cuda"}, "cpu", "CPU tensors"),
    ],
)
def test_refusals_are_sentences(change, backend, sentence):
    why = backends.TABLE[backend].refuse(CALL._replace(**change))
    assert sentence in why
    assert backends.TABLE[backend].refuse(CALL._replace(op="gru")) is None or backend == "cpu"
    choice = backends._choose(CALL._replace(**change), None)
    assert choice.backend != backend


def test_contexts_nest_and_environment_yields():
    code = (
        "import fastrnn; from fastrnn import backends as b; print(b.explicit())\n"
        "with fastrnn.backend('reference'):\n"
        "    print(b.explicit())\n"
        "    with fastrnn.backend(None): print(b.explicit())\n"
    )
    env = {**os.environ, "FASTRNN_BACKEND": "aten"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["aten", "reference", "None"]
    env["FASTRNN_BACKEND"] = "fastest"
    bad = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "FASTRNN_BACKEND: there is no backend 'fastest'" in bad.stderr


def test_explain_lists_choices_reasons_and_refusals():
    layer = torch.nn.LSTM(3, 16, dtype=torch.float64)  # in training and at this size PyTorch's own is asked first
    x = torch.randn(5, 300, 3, dtype=torch.float64)

    def run():
        states, reset = (x.new_zeros(1, 300, 16),) * 2, torch.zeros(5, 300, dtype=torch.bool)
        options = dict(bias=True, num_layers=1, dropout=0.0, training=True, bidirectional=False)
        return ops.stack("LSTM", x, states, layer._flat_weights, reset=reset, **options)

    explanation = fastrnn.explain(run)
    text = str(explanation)
    assert "not aten: PyTorch's fused RNN takes no reset mask" in text
    assert {call.op for call, _ in explanation} >= {"lstm", "lstm_forward", "lstm_backward"}
    assert str(fastrnn.explain(lambda: None)) == "no fastrnn op was called"


def test_double_backward_through_the_fused_rnn():
    """The wrapper that gives cuDNN a double backward, on tensors of any device."""
    from fastrnn.aten import DoublyDifferentiable

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    calls = []

    def fused(x, w):
        calls.append("fused")
        return x.sin() * w, w.exp()

    def definition(x, w):
        calls.append("definition")
        return x.sin() * w, w.exp()

    def function(x, w):
        return DoublyDifferentiable.apply(fused, definition, x, w)

    torch.autograd.grad(function(x, w)[0].sum(), x)
    assert calls == ["fused"]
    assert torch.autograd.gradcheck(function, (x, w))
    assert torch.autograd.gradgradcheck(function, (x, w))
    assert "definition" in calls


@pytest.mark.parametrize(
    "change, wins",
    [
        (dict(op="lstm", time=100, batch=2), True),
        (dict(op="lstm", time=100, batch=16), True),
        (dict(op="lstm", time=100, batch=16, hidden=64, needs_grad=True), True),
        (dict(op="lstm", time=100, batch=16, hidden=512, needs_grad=True, dtype=torch.float64), False),
        (dict(op="lstm", time=100, batch=16, hidden=512, needs_grad=True, projection=True), False),
        (dict(op="lstm", time=1, batch=256, hidden=256, dtype=torch.bfloat16), True),
        (dict(op="gru", time=1, batch=256, hidden=64, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="rnn", time=1, batch=1, hidden=64, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="gru", time=1, batch=16, hidden=256, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="gru", time=1, batch=16, hidden=512, needs_grad=True, dtype=torch.bfloat16), False),
        (dict(op="gru", time=1, batch=4, hidden=1024, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="lstm", time=100, batch=128, hidden=256, needs_grad=True), True),
        (dict(op="lstm", time=100, batch=16, hidden=64, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="lstm", time=1, batch=16), True),
        (dict(op="lstm", time=1, batch=16, hidden=64, needs_grad=True), True),
        (dict(op="lstm", time=1, batch=1, hidden=256, needs_grad=True), True),
        (dict(op="lstm", time=1, batch=1, hidden=512, needs_grad=True), False),
        (dict(op="lstm", time=1, batch=16, hidden=512, needs_grad=True), True),
        (dict(op="lstm", time=1, batch=64, hidden=128, needs_grad=True), False),
        (dict(op="gru", time=1, batch=32, hidden=128, needs_grad=True), True),
        (dict(op="gru", time=1, batch=256, hidden=64, needs_grad=True), True),
        (dict(op="gru", time=1, batch=256, hidden=256, needs_grad=True), False),
        (dict(op="rnn", time=1, batch=64, hidden=64), True),
        (dict(op="rnn", time=1, batch=64, hidden=256), True),
        (dict(op="rnn", time=1, batch=128, hidden=256), False),
        (dict(op="gru", time=100, batch=16, needs_grad=True), True),
        (dict(op="gru", time=100, batch=64, hidden=64), True),
        (dict(op="gru", time=100, batch=64, hidden=256), True),
        (dict(op="rnn", time=5, batch=1, hidden=32, needs_grad=True), True),
        (dict(op="gru", time=100, batch=1, hidden=5000), True),
        (dict(op="rnn", time=1, batch=4, hidden=64, needs_grad=True), False),
        (dict(op="rnn", time=1, batch=4, hidden=256, needs_grad=True), True),
        (dict(op="rnn", time=1, batch=1, hidden=256, needs_grad=True), False),
        (dict(op="lstm", time=2, batch=1, hidden=512), True),
        # So few steps do not pay for the order in which the kernels need the weights.
        (dict(op="gru", time=2, batch=1, hidden=512), True),
        (dict(op="rnn", time=8, batch=8, hidden=512), False),
        (dict(op="rnn", time=9, batch=8, hidden=512), True),
        (dict(op="rnn", time=2, batch=9, hidden=512), True),
        (dict(op="rnn", time=12, batch=1, hidden=1024), False),
        (dict(op="rnn", time=2, batch=2, hidden=1024), True),
        (dict(op="gru", time=2, batch=8, hidden=1024, needs_grad=True), True),
        (dict(op="gru", time=2, batch=16, hidden=1024, needs_grad=True), False),
        (dict(op="gru", time=3, batch=16, hidden=1024, needs_grad=True), True),
        (dict(op="rnn", time=2, batch=16, hidden=1024, needs_grad=True), True),
        (dict(op="gru", time=2, batch=16, hidden=512, needs_grad=True, dtype=torch.bfloat16), False),
        (dict(op="rnn", time=2, batch=16, hidden=1024, needs_grad=True, dtype=torch.bfloat16), False),
        (dict(op="rnn", time=2, batch=8, hidden=1024, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="rnn", time=5, batch=1, hidden=1024, needs_grad=True, dtype=torch.bfloat16), True),
        (dict(op="gru", time=2, batch=1, hidden=64), True),
        (dict(op="gru", time=2, batch=1, hidden=512, dtype=torch.bfloat16), True),
        (dict(op="gru", time=5, batch=1, hidden=1024, dtype=torch.bfloat16), False),
        (dict(op="gru", time=12, batch=1, hidden=1024, dtype=torch.bfloat16), True),
        (dict(op="rnn", time=2, batch=1, hidden=1024, dtype=torch.bfloat16), True),
    ],
)
def test_the_kernels_come_first_where_they_win(change, wins):
    first = backends.preference(CALL._replace(**change))[0][0]
    assert first == ("cpu" if wins else "aten")

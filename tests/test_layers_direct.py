"""The short way of a plain call on the CPU: the bits of the long way, the table's choice, and where it is not taken."""

import contextlib

import pytest
import torch
from layer_cases import CELLS, LAYERS, flat, make_state
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import backends, direct, layers

NAMES = LAYERS + CELLS
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(backends.extension_missing() is not None, reason="needs _C built")),
    "aten",
]
OPTIONS = {
    "plain": {}, "no bias": {"bias": False}, "batch first": {"batch_first": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True}, "three layers": {"num_layers": 3},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the short way was told to run on, one entry a call that took it."""
    seen, choose = [], direct._backend

    def spy(*call):
        seen.append(choose(*call))
        return seen[-1]

    monkeypatch.setattr(direct, "_backend", spy)
    return seen


def some_input(module, name: str, time: int, **like) -> torch.Tensor:
    if name in CELLS:
        return torch.randn(3, 4, **like)
    return torch.randn(*((3, time) if module.batch_first else (time, 3)), 4, **like)


def results(module, x, hx) -> list[torch.Tensor]:
    """Outputs, and where there is a graph the gradients of the parameters, x and states for a fixed random loss."""
    outputs = flat(module(x, hx))
    if not outputs[0].requires_grad:
        return outputs
    generator = torch.Generator().manual_seed(7)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs)
    return outputs + list(torch.autograd.grad(loss, [*module.parameters(), x, *flat(hx)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_the_long_way(monkeypatch, asked, name, options, gradient, dtype, backend):
    if name in CELLS and not OPTIONS[options].keys() <= {"bias"}:
        options = "plain"  # a cell has no such option
    module = getattr(layers, name)(4, 5, dtype=dtype, **OPTIONS[options])
    for time in (1, 3):
        x = some_input(module, name, time, dtype=dtype, requires_grad=gradient)
        state = make_state(module, 3, dtype=dtype, requires_grad=gradient)
        for hx in (state, None):
            with torch.set_grad_enabled(gradient):
                with fastrnn.backend(backend):
                    short = results(module, x, hx)
                assert asked.pop() == backend
                with fastrnn.backend(backend), monkeypatch.context() as patch:
                    patch.setattr(direct, "_surrounded", lambda: True)
                    long = results(module, x, hx)
                assert asked == []
            for a, b in zip(short, long, strict=True):
                assert a.shape == b.shape
                assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_the_tables_and_explain_tells_it(asked, name, gradient):
    for batch in (1, 16, 300):
        module = getattr(layers, name)(4, 5)
        x = torch.randn(batch, 4) if name in CELLS else torch.randn(1, batch, 4)
        with torch.set_grad_enabled(gradient):
            module(x)
            told = fastrnn.explain(module, x)
        assert [choice.backend for _, choice in told][:1] == asked
        asked.clear()


def test_an_explicit_backend_is_asked(asked):
    module, x = layers.GRU(4, 5), torch.randn(1, 3, 4)
    for name in ("reference", "aten"):
        with fastrnn.backend(name):
            module(x)
            assert fastrnn.explain(module, x)[0][1].backend == name
    assert asked == ["reference", "aten"]
    with fastrnn.backend("cpu"), pytest.raises(fastrnn.BackendRefusal, match="gru: the backend 'cpu' was asked for"):
        module.half()(x.half())


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def _forward_ad(module, x):
    with forward_ad.dual_level():
        module(forward_ad.make_dual(x, x))


UNUSUAL = {
    "autocast": lambda module, x: module(x),
    "a dispatch mode": lambda module, x: module(x),
    "explain": lambda module, x: fastrnn.explain(module, x),
    "vmap": lambda module, x: vmap(module)(x[None]),
    "jvp": lambda module, x: jvp(lambda x: flat(module(x))[0], (x,), (x,)),
    "forward-mode AD": _forward_ad,
    "jit.trace": lambda module, x: torch.jit.trace(module, (x,), check_trace=False),
    "a subclass": lambda module, x: module(x.as_subclass(Subclass)),
    "a weight of a subclass": lambda module, x: functional_call(
        module, {k: p.detach().as_subclass(Subclass) for k, p in module.named_parameters()}, (x,)
    ),
    "a reset": lambda module, x: module(x, reset=torch.zeros(x.shape[:-1], dtype=torch.bool)),
    "no batch": lambda module, x: module(x.select(-2, 0)),
    "float16": lambda module, x: module.half()(x.half()),
}
AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": Mode,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", UNUSUAL)
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_an_unusual_call_goes_the_long_way(asked, name, what):
    module = getattr(layers, name)(4, 5)
    x = torch.randn(3, 4) if name in CELLS else torch.randn(1, 3, 4)
    module(x)
    assert len(asked) == 1, "the plain call is short"
    with AROUND.get(what, contextlib.nullcontext)():
        UNUSUAL[what](module, x)
    assert len(asked) == 1 or (what == "float16" and asked[1] != "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_holds_the_registered_op(asked, name):
    torch.compiler.reset()
    module = getattr(layers, name)(4, 5)
    x = torch.randn(3, 4) if name in CELLS else torch.randn(1, 3, 4)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    assert asked == []


# --- derivatives of the one node ------------------------------------------------------------------------------------


@pytest.fixture
def on_kernels(monkeypatch) -> None:
    if backends.extension_missing():
        pytest.skip("needs the C++ extension")
    monkeypatch.setattr(direct, "_backend", lambda *call: "cpu")


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(name, time):
    module = getattr(layers, name)(4, 2).double()
    like = {"dtype": torch.float64, "requires_grad": True}
    x, hx = some_input(module, name, time, **like), make_state(module, 3, **like)
    names = [key for key, _ in module.named_parameters()]

    def function(x, *tensors):
        state = tensors[: len(flat(hx))]
        weights = dict(zip(names, tensors[len(state) :]))
        return tuple(flat(functional_call(module, weights, (x, state if len(state) == 2 else state[0]))))

    inputs = (x, *flat(hx), *[p.detach().clone().requires_grad_() for p in module.parameters()])
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", NAMES)
def test_backward_in_batches_and_under_a_backend(name):
    module = getattr(layers, name)(4, 2).double()
    x = some_input(module, name, 2, dtype=torch.float64)

    def function(x):
        return flat(module(x))[0]

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(function, x, vectorize=True), jacobian(function, x))
    y = function(x.requires_grad_())
    with fastrnn.backend("reference"):
        (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("cell", backends.CELLS)
def test_steps_and_slices_of_the_kernels_ops(cell):
    """x (B, I) is x (1, B, I), states (1, B, H) are states (B, H), and a step is the states of a forward."""
    gates, states = {"lstm": 4, "gru": 3, "rnn": 1}[cell], [torch.randn(3, 5) for _ in range(1 + (cell == "lstm"))]
    x, w = torch.randn(3, 4), [torch.randn(gates * 5, n) for n in (4, 5)] + [torch.randn(gates * 5)] * 2
    tail = {"lstm": (None, None, None, False, False), "gru": (None, None, False, False), "rnn": (None, None, False)}
    tail = (*tail[cell], "relu") if cell == "rnn" else tail[cell]
    forward, step = (backends.function("cpu", f"{cell}_{way}") for way in ("forward", "step"))
    expected = forward(x[None], *states, *w, *tail)[: 1 + len(states)]
    for lead in (False, True):
        given = [s[None] for s in states] if lead else states
        y, *ends = forward(x, *given, *w, *tail)[: 1 + len(states)]
        found = step(x, *given, *w, *([True] if cell == "rnn" else []))
        ends_of_step = found if cell == "lstm" else (found,)
        assert torch.equal(y, expected[0][0])
        for a, b, want, start in zip(ends, ends_of_step, expected[1:], given, strict=True):
            assert a.shape == b.shape == start.shape
            assert torch.equal(a.view(3, 5), want)
            assert torch.equal(b.view(3, 5), want)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("time", [1, 30])  # read as they lie and packed, the weights of backward
@pytest.mark.parametrize("name", NAMES)
def test_an_input_that_needs_no_gradient_costs_none(monkeypatch, name, time):
    """The kernels leave its gradient out, and all others keep their bits."""
    module, made = getattr(layers, name)(4, 5), []
    x, kernel = some_input(module, name, time), direct._kernel

    def spied(op):
        function = kernel(op)
        return lambda *args: made.append((op, function(*args))) or made[-1][1]

    monkeypatch.setattr(direct, "_kernel", spied)
    gradients = []
    for needed in (False, True):
        y = flat(module(x.requires_grad_(needed)))[0]
        gradients.append(torch.autograd.grad(y.sum(), list(module.parameters())))
    without, having = [results[0] for op, results in made if op.endswith("_backward")]
    assert without.numel() == 0
    assert having.numel() == x.numel()
    assert all(map(torch.equal, *gradients))

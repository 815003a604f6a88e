"""The layers under PyTorch's transforms: compile, export, higher derivatives, forward mode, torch.func, autocast."""

import copy

import pytest
import torch
from layer_cases import CELLS, LAYERS, assert_same, flat, make_state, pair
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import layers

NAMES = LAYERS + CELLS


def _input(name: str, batch: int = 2, time: int = 4, **like) -> torch.Tensor:
    return torch.randn(time, batch, 3, **like) if name in LAYERS else torch.randn(batch, 3, **like)


def _module(name: str, **kwargs) -> nn.Module:
    return getattr(layers, name)(3, 4, **kwargs)


# --- compile and export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(name):
    torch.compiler.reset()
    theirs, ours = pair(name, 3, 4, **({"num_layers": 2, "bidirectional": True} if name in LAYERS else {}))
    model = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = _input(name)
    assert_same(theirs, ours, x)  # makes both float64
    x = x.double().requires_grad_()
    expected, actual = flat(theirs(x)), flat(model(x))
    wanted = torch.autograd.grad(sum(t.sum() for t in expected), [x, *theirs.parameters()])
    found = torch.autograd.grad(sum(t.sum() for t in actual), [x, *ours.parameters()])
    for a, b in zip((*actual, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_compile_dynamic_shapes_states_and_resets(name):
    torch.compiler.reset()
    module = _module(name, batch_first=True).double()
    model = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for time, batch in ((4, 2), (6, 3), (7, 5)):
        x, hx = torch.randn(batch, time, 3, dtype=torch.float64), make_state(module, batch, dtype=torch.float64)
        reset = torch.rand(batch, time) < 0.4
        for a, b in zip(flat(model(x, hx, reset=reset)), flat(module(x, hx, reset=reset)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_compile_with_packed_sequences(name):
    """A PackedSequence runs outside the compiled graph, whose code before and after it is compiled."""
    torch.compiler.reset()
    module = _module(name, num_layers=2, bidirectional=True)
    model = torch.compile(lambda packed: module(packed)[0].data * 2, backend="aot_eager")
    for lengths in ([3, 2], [2, 4, 1]):
        packed = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=False)
        torch.testing.assert_close(model(packed), module(packed)[0].data * 2)


def test_compile_of_a_model_with_weight_norm_and_dropout():
    torch.compiler.reset()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 3)
            self.rnn = layers.LSTM(3, 8, num_layers=2, dropout=0.3)
            self.head = nn.Linear(8, 11)

        def forward(self, ids, hx=None):
            y, hx = self.rnn(self.embedding(ids), hx)
            return self.head(y), hx

    model = Model()
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l1")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(11, (5, 2))
    compiled(ids)[0].sum().backward()
    assert model.rnn.parametrizations.weight_hh_l1.original0.grad.abs().sum() > 0
    model.eval()
    _, hx = compiled(ids)
    torch.testing.assert_close(compiled(ids, hx)[0], model(ids, hx)[0])


@pytest.mark.parametrize("name", CELLS)
def test_compile_with_inductor(name):
    torch.compiler.reset()
    theirs, ours = pair(name, 3, 4)
    # A graph of one op and views has no kernel to generate, so that this needs no C++ compiler.
    model = torch.compile(ours, fullgraph=True)
    x, hx = _input(name), make_state(ours, 2)
    with torch.no_grad():
        for a, b in zip(flat(model(x, hx)), flat(theirs(x, hx)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_export_with_dynamic_time_and_batch(name):
    module = _module(name, num_layers=2, bidirectional=True).eval()
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (_input(name),), dynamic_shapes=({0: time, 1: batch},))
    for t, b in ((4, 2), (9, 3), (1 + 1, 7)):
        x = _input(name, b, t)
        for actual, expected in zip(flat(program.module()(x)), flat(module(x)), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CELLS)
def test_export_of_cells_with_dynamic_batch(name):
    module = _module(name)
    hx = make_state(module, 2)
    batch = torch.export.Dim("batch", min=2)
    shapes = {"input": {0: batch}, "hx": ({0: batch}, {0: batch}) if name == "LSTMCell" else {0: batch}}
    program = torch.export.export(module, (_input(name), hx), dynamic_shapes=shapes)
    x, hx = _input(name, 5), make_state(module, 5)
    for actual, expected in zip(flat(program.module()(x, hx)), flat(module(x, hx)), strict=True):
        torch.testing.assert_close(actual, expected)


# --- higher derivatives ---------------------------------------------------------------------------------------------


def _as_function(module: nn.Module, hx, **kwargs):
    """A function of input, states and parameters, returning every output, for torch.autograd's checks."""
    names, states = [n for n, _ in module.named_parameters()], len(flat(hx))

    def function(x, *tensors):
        state = tensors[:states] if states == 2 else tensors[0]
        return tuple(flat(functional_call(module, dict(zip(names, tensors[states:], strict=True)), (x, state), kwargs)))

    return function


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_double_backward(name, reset):
    torch.manual_seed(0)
    module = getattr(layers, name)(2, 2, **({"bidirectional": True} if name in LAYERS else {})).double()
    like = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(3, 2, 2, **like) if name in LAYERS else torch.randn(2, 2, **like)
    hx = make_state(module, 2, **like)
    kwargs = {"reset": torch.rand(x.shape[:-1]) < 0.4} if reset else {}
    inputs = (x, *flat(hx), *[p.detach().clone().requires_grad_() for p in module.parameters()])
    function = _as_function(module, hx, **kwargs)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_gradient_penalty_in_eval_mode():
    theirs, ours = pair("LSTM", 3, 4, num_layers=2)
    results = []
    for module in (theirs.double().eval(), ours.double().eval()):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 2, 3).requires_grad_()
        (slope,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        results.append(torch.autograd.grad((slope.norm() - 1) ** 2, list(module.parameters()), allow_unused=True))
    for theirs_grad, ours_grad in zip(*results, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if ours_grad is None else ours_grad, torch.zeros(()) if theirs_grad is None else theirs_grad
        )


# --- forward mode and torch.func ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name, dtype):
    torch.manual_seed(0)
    module = _module(name).to(dtype)
    x, v = _input(name, dtype=dtype), _input(name, dtype=dtype)
    outputs, tangents = jvp(lambda x: tuple(flat(module(x))), (x,), (v,))
    assert_close = torch.testing.assert_close
    for out, tangent, k in zip(outputs, tangents, range(3)):
        assert_close(out, flat(module(x))[k])
        jacobian = torch.autograd.functional.jacobian(lambda x, k=k: flat(module(x))[k], x)
        expected = (jacobian * v).sum(tuple(range(jacobian.dim() - v.dim(), jacobian.dim())))
        assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        duals = flat(module(forward_ad.make_dual(x, v)))
        for dual, tangent in zip(duals, tangents, strict=True):
            assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.parametrize("name", NAMES)
def test_jacfwd_equals_jacrev(name):
    module = _module(name).double()
    x = _input(name, dtype=torch.float64)
    for forward, reverse in zip(
        jacfwd(lambda x: tuple(flat(module(x))))(x), jacrev(lambda x: tuple(flat(module(x))))(x), strict=True
    ):
        torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_per_sample_gradients(name):
    module = _module(name).double()
    params = {key: p.detach() for key, p in module.named_parameters()}
    x = torch.stack([_input(name, 1, dtype=torch.float64) for _ in range(3)])

    def loss(params, sample):
        return flat(functional_call(module, params, (sample,)))[0].square().sum()

    batched = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for k in range(3):
        alone = torch.autograd.grad(flat(module(x[k]))[0].square().sum(), list(module.parameters()))
        for key, expected in zip(params, alone, strict=True):
            torch.testing.assert_close(batched[key][k], expected)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_per_sample_gradients_within_a_compiled_region(name):
    module = _module(name)
    params = {key: p.detach() for key, p in module.named_parameters()}
    x = torch.stack([_input(name, 1) for _ in range(3)])

    def loss(params, sample):
        return flat(functional_call(module, params, (sample,)))[0].square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, x), per_sample(params, x))


@pytest.mark.parametrize("name", NAMES)
def test_ensemble(name):
    modules = [_module(name).double() for _ in range(3)]
    params, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = _input(name, dtype=torch.float64)
    hx = make_state(modules[0], 2, dtype=torch.float64)

    def run(params, buffers):
        return tuple(flat(functional_call(base, (params, buffers), (x, hx))))

    for out, k in zip(zip(*vmap(run)(params, buffers), strict=True), range(3)):
        for actual, expected in zip(out, flat(modules[k](x, hx)), strict=True):
            torch.testing.assert_close(actual, expected)
    assert modules[0](x, hx) is not None  # the modules themselves are untouched


def test_functional_call_with_tied_and_swapped_weights():
    module = layers.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    params = {key: torch.zeros_like(p) for key, p in module.named_parameters()}
    before = module(x)[0]
    assert torch.equal(functional_call(module, params, (x,))[0], torch.zeros(5, 2, 4))
    assert torch.equal(module(x)[0], before)
    doubled = {key: p.double() for key, p in module.named_parameters()}
    assert functional_call(module, doubled, (x.double(),))[0].dtype == torch.float64


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, dtype):
    torch.manual_seed(0)
    theirs, module = pair(name, 3, 4)
    x, hx = _input(name), make_state(module, 2)
    expected = flat(module(x, hx))
    with torch.autocast("cpu", dtype):
        actual = flat(module(x, hx))
        # torch.nn's LSTM has no float16 on many CPUs, and its GRU answers in the dtype of the state.
        wanted = flat(theirs(x, hx))[0].dtype if name == "GRU" else dtype
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == wanted
        torch.testing.assert_close(a.float(), b, rtol=0, atol=16 * torch.finfo(dtype).eps)
    actual[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("backend", [None, "aten"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_answers_in_the_dtypes_of_torch(name, time, gradient, backend):
    theirs, module = pair(name, 8, 512)  # wide and many rows: a step that the table gives to PyTorch
    x = torch.randn(time, 64, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradient):
        expected = flat(theirs(x))
        with fastrnn.backend(backend):
            actual = flat(module(x))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_of_packed_sequences(name):
    theirs, module = pair(name, 3, 4, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = module(packed)[0], theirs(packed)[0]
    assert out.data.dtype == expected.data.dtype
    torch.testing.assert_close(out.data.float(), module(packed)[0].data, rtol=0, atol=0.1)

"""Layers, cells, ops and the draw on a GPU at the sizes of real models: values, graphs, drift, the same bits again.

The oracle is torch.nn in float64 without cuDNN, on the GPU itself; the plain result that says which error is honest is
torch.nn in the kernel's dtype, without cuDNN too, so that no TF32 hides in it.
"""

import contextlib

import pytest
import torch
from layer_cases import flat, pair
from torch.library import opcheck
from triton_cases import forward_case, with_gradients

import fastrnn
from fastrnn import backends, ops
from fastrnn import reference_sample as definition
from fastrnn.library import ARGUMENTS
from oracle import assert_all_close

pytestmark = pytest.mark.gpu

LAYERS = ["LSTM", "GRU", "RNN"]
# T, B, I, H and dtype: a row alone, sizes of no tile, and the widths at which a sequence takes each of its forms.
SIZES = [
    (50, 1, 32, 64, torch.float32), (33, 17, 70, 200, torch.bfloat16), (20, 64, 256, 512, torch.float32),
    (20, 64, 256, 512, torch.float16), (10, 128, 512, 1024, torch.bfloat16),
]  # fmt: skip
OURS = [name for name in backends.TABLE if name not in ("reference", "aten", "cpu")]


@pytest.fixture(autouse=True)
def float32_is_float32():
    """cuDNN takes TF32 for float32 unless it is told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def plainly():
    """torch.nn without cuDNN."""
    return torch.backends.cudnn.flags(enabled=False)


def results(module, x, gradient=True):
    """The output, the final states, and the gradients of the input and of every weight; a loss on all of them."""
    x = x.detach().to(next(module.parameters()).dtype).requires_grad_(gradient)
    outputs = flat(module(x))
    if not gradient:
        return outputs
    loss = sum((t.double() * torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


def layers(name, inputs, hidden, dtype, **options):
    """torch.nn's and our layer on the GPU, and torch.nn's in float64, all with the weights rounded to ``dtype``."""
    theirs, ours = (module.to("cuda", dtype) for module in pair(name, inputs, hidden, **options))
    double = type(theirs)(inputs, hidden, **options).to("cuda", torch.float64)
    double.load_state_dict(theirs.state_dict())
    return theirs, ours, double


def hold_to_float64(name, x, hidden, dtype, backend, gradient=True, **options):
    theirs, ours, double = layers(name, x.shape[-1], hidden, dtype, **options)
    with plainly(), torch.set_grad_enabled(gradient):
        expected, plain = results(double, x, gradient), results(theirs, x, gradient)
    with fastrnn.backend(backend), torch.set_grad_enabled(gradient):
        found = results(ours, x, gradient)
    assert_all_close(found, expected, plain, f"{name} on {backend or 'the automatic choice'}")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", [None, "aten", *OURS])
def test_every_backend_against_float64(backend, name, size):
    time, batch, inputs, hidden, dtype = size
    hold_to_float64(name, torch.randn(time, batch, inputs, device="cuda").to(dtype), hidden, dtype, backend)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", [None, *OURS])
def test_stacks_in_both_directions(backend, name):
    x = torch.randn(20, 9, 48, device="cuda")
    hold_to_float64(name, x, 96, torch.float32, backend, num_layers=3, bidirectional=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OURS)
def test_ten_thousand_steps_do_not_drift(backend, name, dtype):
    x = torch.randn(10_000, 2, 16, device="cuda").to(dtype)
    hold_to_float64(name, x, 64, dtype, backend, gradient=False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OURS)
def test_ten_thousand_steps_by_a_group_and_back(backend, name):
    x = torch.randn(10_000, 3, 16, device="cuda")
    hold_to_float64(name, x, 320, torch.float32, backend)


@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OURS)
def test_the_same_bits_in_every_run(backend, name, hidden):
    """Twenty times, while another stream keeps the GPU busy."""
    x = torch.randn(50, 64, 64, device="cuda")
    ours = layers(name, 64, hidden, torch.float32)[1]
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    with fastrnn.backend(backend):
        first = results(ours, x)
        for _ in range(20):
            with torch.cuda.stream(other):
                noise = (noise @ noise).clamp(-1, 1)
            again = results(ours, x)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OURS)
def test_work_is_done_in_the_current_stream(backend, name):
    """The input is ready only after a long product in a stream of its own, which the layer must wait for."""
    ours, stream = layers(name, 64, 128, torch.float32)[1], torch.cuda.Stream()
    a, x = torch.randn(4096, 4096, device="cuda"), torch.randn(20, 8, 64, device="cuda")
    with torch.no_grad(), fastrnn.backend(backend):
        expected = flat(ours(x))
        late = torch.full_like(x, float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(10):
                a = (a @ a).clamp(-1, 1)
            late.copy_(x + 0 * a.sum())
            found = flat(ours(late))
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- ops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lstm", "lstm-proj", "gru", "rnn-tanh", "rnn-relu"])
@pytest.mark.parametrize("backend", [None, *OURS])
def test_opcheck_on_the_gpu(backend, kind):
    with fastrnn.backend(backend):
        cell, a = forward_case(kind, "cuda", masked=True)
        forward, backward = (getattr(torch.ops.fastrnn, f"{cell}_{way}").default for way in ("forward", "backward"))
        opcheck(forward, [a[name] for name in ARGUMENTS[f"{cell}_forward"]])
        named = with_gradients(cell, a)
        opcheck(backward, [named[name] for name in ARGUMENTS[f"{cell}_backward"]])


def columns(rows, device="cuda"):
    """The parameters of a plain draw of each row."""
    found = dict(
        scale=torch.full((rows,), 1.25), top_k=torch.zeros(rows, dtype=torch.int64),
        top_p=torch.full((rows,), torch.iinfo(torch.int64).max), min_p=torch.full((rows,), float("inf")), mask=None,
        seed=torch.arange(rows) + 2**40, sequence=torch.arange(rows) * 3, step=torch.zeros(rows, dtype=torch.int64),
    )  # fmt: skip
    return {name: value if value is None else value.to(device) for name, value in found.items()}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("backend", [None, *OURS])
def test_opcheck_of_the_draw_on_the_gpu(backend, logprobs):
    with fastrnn.backend(backend):
        values = (torch.randn(3, 300, device="cuda"), *columns(3).values(), 1, logprobs)
        opcheck(torch.ops.fastrnn.sample.default, values)


@pytest.mark.parametrize("rows, vocabulary", [(1024, 256), (256, 65), (64, 10000), (3, 128256)])
@pytest.mark.parametrize("backend", [None, *OURS])
def test_the_draws_of_the_definition(backend, rows, vocabulary):
    """Token by token what the CPU draws from the same logits."""
    logits = torch.randn(rows, vocabulary) * 3
    expected = definition.sample(logits, **columns(rows, "cpu"))
    with fastrnn.backend(backend):
        found = ops.sample(logits.cuda(), **columns(rows))
    assert torch.equal(found[0].cpu(), expected[0])


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


def captured(function):
    """The results of ``function`` in a CUDA graph, and the call that computes them anew in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return found, graph.replay


@pytest.mark.parametrize("time, hidden", [(1, 96), (30, 64), (30, 512)])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OURS)
def test_layers_in_a_graph(backend, name, time, hidden):
    """Replayed on other inputs it gives the bits of a call; so what programs meet at is set back by every replay."""
    ours = layers(name, 32, hidden, torch.float32)[1]
    x = torch.randn(time, 24, 32, device="cuda")
    with torch.no_grad(), fastrnn.backend(backend):
        found, replay = captured(lambda: flat(ours(x)))
        for _ in range(3):
            x.normal_()
            replay()
            assert all(torch.equal(a, b) for a, b in zip(found, flat(ours(x)), strict=True))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("backend", [None, *OURS])
def test_a_cell_in_a_graph_goes_on_from_its_state(backend, name):
    theirs, ours = (module.cuda() for module in pair(name, 20, 40))
    state = [torch.zeros(5, 40, device="cuda") for _ in range(1 + (name == "LSTMCell"))]
    x = torch.randn(5, 20, device="cuda")

    def step():
        after = flat(ours(x, tuple(state) if len(state) > 1 else state[0]))
        for kept, new in zip(state, after, strict=True):
            kept.copy_(new)
        return state

    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(fastrnn.backend(backend))
        _, replay = captured(step)
        for part in state:
            part.zero_()
        plain = expected = None
        for _ in range(6):
            x.normal_()
            replay()
            with plainly():
                plain = theirs(x, plain)
                expected = theirs.double()(x.double(), expected)
                theirs.float()
        assert_all_close(state, flat(expected), flat(plain), name)


@pytest.mark.parametrize("rows, vocabulary", [(16, 65), (4, 50257)])
@pytest.mark.parametrize("backend", OURS)
def test_a_graph_draws_by_the_seed_and_step_in_memory(backend, rows, vocabulary):
    """Seeds and steps are advanced by the host and by the graph itself, between replays and within."""
    logits, given = torch.randn(rows, vocabulary), columns(rows)
    on_gpu = logits.cuda()

    def draw():
        token = ops.sample(on_gpu, **given)[0]
        given["step"] += 1
        return token

    with fastrnn.backend(backend):
        token, replay = captured(draw)
        for seed in (1, 2**63 - 1):
            given["seed"].fill_(seed)
            given["step"].zero_()
            for step in range(5):
                replay()
                at = columns(rows, "cpu") | {"seed": torch.full((rows,), seed), "step": torch.full((rows,), step)}
                assert torch.equal(token.cpu(), definition.sample(logits, **at)[0]), (seed, step)

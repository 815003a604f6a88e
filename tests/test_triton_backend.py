"""Triton as a backend: layers, compilation, higher gradients, messages; the pure rules of choice and of launches."""

import itertools

import pytest
import torch
from layer_cases import assert_same, pair
from triton_cases import NEEDED, assert_equal, call, definition, forward_case, ours, runs_here, with_gradients

import fastrnn
from fastrnn import backends, gpu
from fastrnn.library import ARGUMENTS, RESULTS
from oracle import check

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

from fastrnn.kernels import tuning


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_run_on_it(device, name):
    """Two layers, both directions, packed rows, with every gradient, held to torch.nn."""
    theirs, ours = (m.to(device) for m in pair(name, 3, 4, num_layers=2, bidirectional=True))
    lengths = torch.tensor([4, 2, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 3, device=device), lengths)
    assert_same(theirs, Under(ours), packed, dtype=torch.float32)


class Under(torch.nn.Module):
    """A module that runs on Triton in float32, and wherever it likes in float64."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        name = "triton" if next(self.module.parameters()).dtype != torch.float64 else None
        with fastrnn.backend(name):
            return self.module(*args, **kwargs)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_forward_of_one_backend_feeds_backward_of_another(device, cell):
    kind = "rnn-tanh" if cell == "rnn" else cell
    _, a = forward_case(kind, device, time=3, masked=True)
    named = with_gradients(cell, a)
    op = f"{cell}_backward"
    check(definition(op), definition(op), [named[n] for n in ARGUMENTS[op]], op)
    by_definition = with_gradients(cell, a, definition)
    for name in RESULTS[f"{cell}_forward"]:
        assert named[name].shape == by_definition[name].shape, name
        assert named[name].dtype == by_definition[name].dtype, name
    check(ours(op), definition(op), [(named | {"y": by_definition["y"]})[n] for n in ARGUMENTS[op]], op)


def test_compiled_modules_run_on_it(device):
    layer = fastrnn.LSTM(3, 4).to(device)
    x = torch.randn(3, 2, 3, device=device)
    with fastrnn.backend("triton"):
        eager = layer(x)[0]
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0]
    assert_equal(compiled, eager, "y")


def test_gradients_of_gradients(device):
    layer = fastrnn.GRU(2, 3).to(device)
    x = torch.randn(2, 2, 2, device=device, requires_grad=True)

    def second(name):
        with fastrnn.backend(name):
            (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])

    for found, expected in zip(second("triton"), second("reference")):
        torch.testing.assert_close(found, expected)


WRONG = {
    "w_hh": (torch.zeros(12, 4), r"lstm_forward: w_hh must be \(12, 3\) for T=5 B=2 I=2 H=3, got \(12, 4\)"),
    "c0": (torch.zeros(1, 3), r"c0 must be \(2, 3\)"),
    "x": (torch.zeros(2), r"x must be \(T, B, I\)"),
    "b_hh": (torch.zeros(12).double(), r"b_hh must be torch.float32 on cpu, got torch.float64 on cpu"),
    "reset": (torch.zeros(5, 2), "reset must be torch.bool"),
    "h0": (torch.zeros(2, 2), r"w_hh must be \(12, 2\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_messages_say_what_is_needed(name):
    value, message = WRONG[name]
    _, a = forward_case("lstm", "cpu", time=5, batch=2, inputs=2, hidden=3)
    with pytest.raises(RuntimeError, match=message):
        call("lstm_forward", a | {name: value})
    with pytest.raises(RuntimeError, match=r"h0 must be \(B, H\) = \(2, 3\) without w_hr, got \(2, 2\)"):
        call("lstm_forward", a | {"h0": torch.zeros(2, 2), "w_hh": torch.zeros(12, 2)})


def test_explicit_use_refuses_in_sentences():
    with fastrnn.backend("triton"), pytest.raises(backends.BackendRefusal, match="float16 and bfloat16, not float64"):
        fastrnn.LSTM(2, 2).double()(torch.zeros(1, 1, 2, dtype=torch.float64))


# --- pure rules: no kernel runs below ---------------------------------------------------------------------------------

CALL = backends.Call("lstm", "cuda", torch.float32, 100, 16, 64, 64)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(device="mps"), "run on CUDA GPUs, these tensors are on mps"),
        (dict(dtype=torch.float64), "not float64"),
        (dict(transform="forward-mode AD"), "no rule for forward-mode AD; the reference has"),
        (dict(op="sample", dtype=torch.float64), "not float64"),
        (dict(op="generate", precision="int8"), "int8 weights are made by the C++ loop"),
    ],
)
def test_refusals_are_sentences(change, sentence):
    assert sentence in backends.TABLE["triton"].refuse(CALL._replace(**change))


def test_it_refuses_without_triton_and_takes_cpu_tensors_only_where_it_interprets(monkeypatch):
    refuse = backends.TABLE["triton"].refuse
    for value, refuses in (("1", False), ("0", True)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert (refuse(CALL._replace(device="cpu")) is not None) == refuses
        if not torch.cuda.is_available():
            assert ("interpreter" in backends.available()["triton"]) == (not refuses)
    assert "triton" not in dict(backends.preference(CALL._replace(device="cpu")))
    monkeypatch.setattr(gpu, "triton_missing", lambda: "Triton is not installed")
    assert refuse(CALL) == gpu.triton_absent() == "Triton is not installed"
    monkeypatch.undo()
    gpu.too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or newer, this one has 7.5" in refuse(CALL)
    monkeypatch.undo()
    gpu.too_old.cache_clear()


HALF = dict(dtype=torch.float16, hidden=512, inputs=512)


@pytest.mark.parametrize(
    "change, first",
    [
        (dict(hidden=192), "aten"),  # cuDNN's persistent kernels for small H: 192 forward, 128 backward
        (dict(hidden=193), "triton"),
        (dict(hidden=128, needs_grad=True), "aten"),
        (dict(hidden=129, needs_grad=True), "triton"),
        (dict(op="rnn", hidden=384), "aten"),
        (dict(op="rnn", hidden=257, needs_grad=True), "triton"),
        (dict(hidden=64, packed=True), "triton"),
        (dict(hidden=64, lengths=True), "triton"),
        (dict(hidden=64, projection=True), "triton"),
        (dict(hidden=64, time=1), "triton"),
        (HALF, "aten"),  # its persistent kernels for float16
        (HALF | dict(batch=12), "triton"),
        (HALF | dict(layers=2), "triton"),
        (HALF | dict(bidirectional=True), "triton"),
        (HALF | dict(inputs=100), "triton"),
        (HALF | dict(op="gru"), "triton"),
        (HALF | dict(dtype=torch.bfloat16), "triton"),
        (HALF | dict(op="rnn", hidden=896, inputs=128, batch=96), "triton"),
        (HALF | dict(dtype=torch.bfloat16, hidden=2048, batch=1024), "aten"),  # products so large that they rule
        (dict(op="gru_forward"), "triton"),
        (dict(op="lstm_backward"), "triton"),
    ],
    ids=str,
)
def test_what_a_gpu_prefers(change, first):
    call = CALL._replace(**change)
    order = backends.preference(call)
    assert order[0][0] == first, order
    assert order[-1][0] == "reference"
    assert all(reason for _, reason in order)


CONFIGURATIONS = list(itertools.product(
    backends.CELLS, ("forward", "backward"), (1, 5, 16, 33, 64, 100, 128, 200, 256, 512, 1000, 4096),
    (1, 16, 17, 128, 3000, 100_000), (torch.float32, torch.float16, torch.bfloat16), (1, 8, 108, 132),
))  # fmt: skip


def test_plans_cover_the_sizes_and_fit_the_device():
    for cell, way, hidden, batch, dtype, sms in CONFIGURATIONS:
        plan, told = tuning.sequence(cell, way, hidden, batch, dtype, sms), (cell, way, hidden, batch, dtype, sms)
        blocks = plan.blocks
        assert all(n >= 16 and n & (n - 1) == 0 for name, n in blocks.items() if name != "PROGRAMS"), told
        assert plan.grid[-1] * blocks["BB"] >= batch > (plan.grid[-1] - 1) * blocks["BB"], told
        if plan.resident:
            assert blocks["BH"] >= hidden, told
            assert tuning.resident_bytes(cell, hidden, dtype) <= 128 * 1024, told
        else:
            assert plan.grid[0] == plan.programs == blocks["PROGRAMS"], told
            assert plan.programs == 1 or plan.grid[0] * plan.grid[1] <= sms, told
            assert (plan.programs - 1) * blocks["BN"] < hidden, f"a program without a tile: {told}"
        assert plan.turns(torch.empty(0)).numel() == (plan.grid[-1] if plan.programs > 1 else 0), told
        assert not tuning.sequence(cell, way, hidden, batch, dtype, sms, projection=True).resident, told
        step = tuning.step(cell, hidden, batch, dtype)
        assert step.grid[0] * step.blocks["BN"] >= hidden, told
        assert step.grid[1] * step.blocks["BB"] >= batch, told


def test_an_estimate_grows_with_the_work():
    for cell, dtype in itertools.product(backends.CELLS, (torch.float32, torch.bfloat16)):
        told = [tuning.step_microseconds(cell, hidden, 64, dtype, 132) for hidden in (64, 512, 1024, 2048, 4096)]
        assert told == sorted(told), (cell, dtype)
        assert told[0] < told[-1], (cell, dtype)

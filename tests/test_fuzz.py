"""Random layers and calls against torch.nn: outputs, states and every gradient, on each backend that takes the call."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import assert_same, make_state, pair
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import backends

# Derandomized by default; FASTRNN_FUZZ=n draws n new examples of each test.
FRESH = int(os.environ.get("FASTRNN_FUZZ", "0"))
PROFILE = settings(
    derandomize=not FRESH,
    deadline=None,
    max_examples=FRESH or 100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SIZES = st.integers(1, 9)
DTYPES = st.sampled_from([torch.float64, torch.float32])


@st.composite
def layers(draw):
    """(class name, input size, hidden size, further constructor arguments)."""
    name = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    inputs, hidden = draw(SIZES), draw(SIZES)
    kwargs = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if kwargs["num_layers"] > 1:
        kwargs["dropout"] = draw(st.sampled_from([0.0, 0.5]))
    if name == "RNN":
        kwargs["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if name == "LSTM" and hidden > 1:
        kwargs["proj_size"] = draw(st.integers(0, hidden - 1))
    return name, inputs, hidden, kwargs


def _spread(tensor: Tensor) -> Tensor:
    """The same values with strides of a view: neither dense nor in the usual order."""
    return torch.stack([tensor.transpose(0, -1), tensor.transpose(0, -1)], -1)[..., 0].transpose(0, -1)


@st.composite
def calls(draw, batch_first: bool, inputs: int):
    """(input, batch of the state, whether a state is given, whether tensors are spread out in memory, their scale)."""
    kind = draw(st.sampled_from(["batched", "batched", "unbatched", "packed"]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    time, batch = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    given_state, spread = draw(st.booleans()), draw(st.booleans())
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 0.01]))
    if kind == "packed":
        lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
        rows = [scale * torch.randn(n, inputs) for n in lengths]
        if in_order := draw(st.booleans()):
            rows.sort(key=len, reverse=True)
        return pack_sequence(rows, enforce_sorted=in_order), (len(lengths),), given_state, False, scale
    shape = {"unbatched": (time, inputs), "batched": (batch, time, inputs) if batch_first else (time, batch, inputs)}
    x = scale * torch.randn(shape[kind])
    return _spread(x) if spread else x, () if kind == "unbatched" else (batch,), given_state, spread, scale


@pytest.fixture(params=[None, *(name for name in backends.TABLE if name != "triton")])
def backend(request):
    """None is the automatic choice. Triton does not run tensors of the CPU."""
    if request.param and (why := backends.available()[request.param]):
        pytest.skip(f"a machine where the backend {request.param} runs runs this; here {why}")
    return request.param


@PROFILE
@given(data=st.data(), dtype=DTYPES, training=st.booleans())
def _fuzz_layers(backend, data, dtype, training):
    name, inputs, hidden, kwargs = data.draw(layers())
    theirs, ours = pair(name, inputs, hidden, **kwargs)
    training = training and not kwargs.get("dropout")
    input, batch, given_state, spread, scale = data.draw(calls(kwargs["batch_first"], inputs))
    hx = make_state(theirs, *batch) if given_state else None
    if spread and hx is not None:
        hx = tuple(map(_spread, hx)) if name == "LSTM" else _spread(hx)
    # A saturated unit's slope is the rounding error of its value, so there only results are compared.
    with fastrnn.backend(backend):
        ours.train(training)
        assert_same(theirs.train(training), ours, input, hx, dtype, gradients=scale <= 1, one_scale=True)


@PROFILE
@given(data=st.data(), dtype=DTYPES)
def _fuzz_cells(backend, data, dtype):
    name = data.draw(st.sampled_from(["LSTMCell", "GRUCell", "RNNCell"]))
    kwargs = {"bias": data.draw(st.booleans())}
    if name == "RNNCell":
        kwargs["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    inputs, hidden = data.draw(SIZES), data.draw(SIZES)
    theirs, ours = pair(name, inputs, hidden, **kwargs)
    batch = data.draw(st.sampled_from([(), (1,), (2,), (5,)]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    x, hx = torch.randn(*batch, inputs), make_state(theirs, *batch) if data.draw(st.booleans()) else None
    if data.draw(st.booleans()):
        x = _spread(x)
    with fastrnn.backend(backend):
        assert_same(theirs, ours, x, hx, dtype, one_scale=True)


def test_layers(backend):
    _fuzz_layers(backend)


def test_cells(backend):
    _fuzz_cells(backend)

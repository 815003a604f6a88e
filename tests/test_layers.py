"""The layers and cells against torch.nn: construction, results and gradients, state_dict, copies and devices."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from layer_cases import CELLS, LAYERS, assert_same, flat, make_state, pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastrnn import layers

CONFIGS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True, "bias": False},
]
CASES = [(name, kwargs) for name in LAYERS for kwargs in CONFIGS]
CASES += [("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}), ("LSTM", {"proj_size": 3, "bias": False})]
CASES += [("RNN", {"nonlinearity": "relu", "num_layers": 2})]
CELL_CASES = [(name, {"bias": bias}) for name in CELLS for bias in (True, False)]
CELL_CASES += [("RNNCell", {"nonlinearity": "relu"})]


def _packed(*lengths: int, size: int = 3) -> PackedSequence:
    return pack_sequence([torch.randn(n, size) for n in lengths], enforce_sorted=False)


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kwargs", CASES + CELL_CASES)
def test_same_parameters_repr_and_attributes(name, kwargs):
    torch.manual_seed(5)
    theirs = getattr(nn, name)(3, 4, **kwargs)
    torch.manual_seed(5)
    ours = getattr(layers, name)(3, 4, **kwargs)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (mine, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine == other
        assert type(p) is nn.Parameter
        assert torch.equal(p, q)
    for key, value in vars(theirs).items():
        if not key.startswith("_"):
            assert getattr(ours, key) == value, key
    if name in LAYERS:
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert all(w is getattr(ours, n) for w, n in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
        assert [[tuple(w.shape) for w in layer] for layer in ours.all_weights] == [
            [tuple(w.shape) for w in layer] for layer in theirs.all_weights
        ]
        assert ours.flatten_parameters() is None
        assert isinstance(ours, nn.RNNBase)
        assert not isinstance(ours, getattr(nn, name))
    else:
        assert isinstance(ours, getattr(nn, name))


def test_positional_arguments():
    lstm = layers.LSTM(3, 4, 2, False, True, 0.5, True, 2, "cpu", torch.float64)
    assert repr(lstm) == repr(nn.LSTM(3, 4, 2, False, True, 0.5, True, 2))
    assert lstm.weight_ih_l0.dtype == torch.float64
    rnn = layers.RNN(3, 4, 2, "relu", False, True, 0.5, True)
    assert rnn.mode == "RNN_RELU"
    assert rnn.nonlinearity == "relu"
    assert rnn.batch_first
    assert rnn.dropout == 0.5
    assert repr(layers.GRU(3, 4, 2, False, True, 0.5, True)) == repr(nn.GRU(3, 4, 2, False, True, 0.5, True))
    assert repr(layers.RNNCell(3, 4, False, "relu")) == repr(nn.RNNCell(3, 4, False, "relu"))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_meta_device_skip_init_default_dtype_and_device_context(name):
    cls = getattr(layers, name)
    assert {"input_size", "hidden_size", "bias", "device", "dtype"} <= set(inspect.signature(cls).parameters)
    skipped = nn.utils.skip_init(cls, 3, 4)
    assert [p.shape for p in skipped.parameters()] == [p.shape for p in cls(3, 4).parameters()]
    with torch.device("meta"):
        module = cls(3, 4)
    assert all(p.is_meta for p in [*module.parameters(), *cls(3, 4, device="meta").parameters()])
    out = module(torch.randn(5, 3, device="meta"))
    assert all(t.is_meta for t in flat(out))
    assert [t.shape for t in flat(out)] == [t.shape for t in flat(cls(3, 4)(torch.randn(5, 3)))]
    module = module.to_empty(device="cpu")
    module.load_state_dict(cls(3, 4).state_dict())
    assert all(torch.isfinite(t).all() for t in flat(module(torch.randn(5, 3))))
    torch.set_default_dtype(torch.float64)
    try:
        assert all(t.dtype == torch.float64 for t in flat(cls(3, 4)(torch.randn(5, 3))))
    finally:
        torch.set_default_dtype(torch.float32)


def test_dropout_of_one_layer_warns_like_torch():
    texts = []
    for module in (nn, layers):
        with pytest.warns(UserWarning, match="dropout option adds") as caught:
            module.LSTM(3, 4, dropout=0.5)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name, kwargs", CASES)
def test_results_and_gradients(name, kwargs, with_state):
    torch.manual_seed(1)
    theirs, ours = pair(name, 3, 4, **kwargs)
    for input, batch in [
        (torch.randn(5, 2, 3), (5 if kwargs.get("batch_first") else 2,)),
        (torch.randn(5, 3), ()),
        (_packed(2, 4, 1), (3,)),
        (pack_sequence([torch.randn(n, 3) for n in (4, 2)]), (2,)),
    ]:
        hx = make_state(theirs, *batch) if with_state else None
        assert_same(theirs, ours, input, hx)
        assert_same(theirs, ours, input, hx, dtype=torch.float32)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name, kwargs", CELL_CASES)
def test_cell_results_and_gradients(name, kwargs, with_state):
    torch.manual_seed(1)
    theirs, ours = pair(name, 3, 4, **kwargs)
    for batch in ((5,), (1,), ()):
        hx = make_state(theirs, *batch) if with_state else None
        assert_same(theirs, ours, torch.randn(*batch, 3), hx)
        assert_same(theirs, ours, torch.randn(*batch, 3), hx, dtype=torch.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_output_keeps_its_order(name):
    theirs, ours = pair(name, 3, 4, bidirectional=True)
    packed = _packed(2, 4, 1, 4)
    (expected, _), (actual, _) = theirs(packed), ours(packed)
    assert isinstance(actual, PackedSequence)
    for mine, other in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_half_precision(name, dtype):
    torch.manual_seed(2)
    theirs, ours = pair(name, 5, 7)
    ours = ours.to(dtype)
    theirs = theirs.to(dtype).double()
    x = torch.randn(6, 5).to(dtype)
    for actual, expected in zip(flat(ours(x)), flat(theirs(x.double())), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name):
    theirs, ours = pair(name, 3, 4, num_layers=2)
    x = torch.randn(5, 0, 3)
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(theirs(x))]
    flat(ours(x))[0].sum().backward()
    assert torch.equal(ours.weight_ih_l0.grad, torch.zeros_like(ours.weight_ih_l0))
    assert flat(pair(name + "Cell", 3, 4)[1](torch.randn(0, 3)))[0].shape == (0, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout(name):
    theirs, ours = pair(name, 3, 32, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 3)
    assert not torch.equal(flat(ours(x))[0], flat(ours(x))[0])
    torch.manual_seed(3)
    expected = flat(theirs(x))[0]
    torch.manual_seed(3)
    torch.testing.assert_close(flat(ours(x))[0], expected)
    assert torch.equal(flat(ours.eval()(x))[0], flat(ours(x))[0])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_eval_mode_and_of_parts(name):
    module = getattr(layers, name)(3, 4, num_layers=2).eval()
    x, hx = torch.randn(5, 2, 3), make_state(module, 2, requires_grad=True)
    flat(module(x, hx))[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    only_state = torch.autograd.grad(flat(module(x, hx)[1])[0].sum(), flat(hx))
    assert all(g.abs().sum() > 0 for g in only_state)
    for p in module.parameters():
        p.requires_grad_(False)
        p.grad = None
    out = flat(module(x, hx))[0].sum()
    out.backward()
    assert all(p.grad is None for p in module.parameters())
    assert not flat(module(x))[0].requires_grad
    with torch.no_grad():
        assert not flat(module(x, hx))[0].requires_grad
    with torch.inference_mode():
        inside = flat(module(x, hx))
    assert all(t.is_inference() for t in inside)
    module.requires_grad_(True).train()
    flat(module(x))[0].sum().backward()
    assert module.weight_hh_l0.grad.abs().sum() > 0


def test_deterministic_algorithms_and_non_contiguous_input():
    theirs, ours = pair("LSTM", 3, 4, bidirectional=True)
    x = torch.randn(3, 2, 5).permute(2, 1, 0)
    hx = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in make_state(theirs, 2))
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(theirs, ours, x, hx)
        assert_same(theirs, ours, x[::2], hx)
    finally:
        torch.use_deterministic_algorithms(False)


# --- state_dict, copies, devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kwargs", CASES)
def test_state_dict_both_ways(name, kwargs):
    theirs, ours = getattr(nn, name)(3, 4, **kwargs), getattr(layers, name)(3, 4, **kwargs)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    theirs = getattr(nn, name)(3, 4, **kwargs)
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assigned = getattr(layers, name)(3, 4, **kwargs, device="meta")
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    assert assigned._flat_weights[0] is assigned.weight_ih_l0
    assert_same(theirs, assigned, torch.randn(5, 2, 3))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_copies_and_pickles(name):
    module = getattr(layers, name)(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = flat(module(x))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    copies.append(copy.copy(module))
    for clone in copies:
        assert type(clone) is type(module)
        assert repr(clone) == repr(module)
        assert all(torch.equal(a, b) for a, b in zip(flat(clone(x)), expected, strict=True))
    with torch.no_grad():
        next(copies[0].parameters()).zero_()
    assert not torch.equal(flat(copies[0](x))[0], expected[0])
    assert torch.equal(flat(module(x))[0], expected[0])


def test_setstate_of_old_pickles():
    module = layers.LSTM(3, 4, bidirectional=True)
    state = module.__getstate__()
    assert "_flat_weight_refs" not in state
    old = {key: value for key, value in state.items() if key != "proj_size"}
    old["_all_weights"] = [[None]]
    fresh = layers.LSTM.__new__(layers.LSTM)
    fresh.__setstate__(old)
    assert fresh.proj_size == 0
    assert fresh._flat_weights_names == module._flat_weights_names
    x = torch.randn(5, 2, 3)
    assert torch.equal(fresh(x)[0], module(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_apply_replicate_and_parameter_vectors(name):
    module = getattr(layers, name)(3, 4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    module.double()
    expected = flat(module(x))[0]
    replica = module._replicate_for_data_parallel()
    for key, value in module._parameters.items():
        setattr(replica, key, value * 1)
    assert torch.equal(flat(replica(x))[0], expected)
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 2, module.parameters())
    assert not torch.equal(flat(module(x))[0], expected)
    flat(module(x))[0].sum().backward()
    assert nn.utils.clip_grad_norm_(module.parameters(), 1e-3) > 0
    assert module.to("meta").weight_ih_l0.is_meta

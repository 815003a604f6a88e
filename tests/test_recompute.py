"""`recompute`: backward finds the gates again, with the gradients that kept gates give and less memory between."""

import copy
import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from oracle import assert_close

KINDS = {
    "lstm": lambda **more: fastrnn.LSTM(3, 5, **more),
    "projection": lambda **more: fastrnn.LSTM(3, 5, proj_size=2, **more),
    "gru": lambda **more: fastrnn.GRU(3, 5, **more),
    "two layers": lambda **more: fastrnn.GRU(3, 5, num_layers=2, dropout=0.5, **more),
    "both directions": lambda **more: fastrnn.LSTM(3, 5, bidirectional=True, **more),
    "rnn": lambda **more: fastrnn.RNN(3, 5, **more),
}


def gradients(layer, x, **more):
    torch.manual_seed(3)  # of dropout
    own = x.clone().requires_grad_()
    y, state = layer(own, **more)
    (y.square().sum() + sum(s.sum() for s in (state if isinstance(state, tuple) else (state,)))).backward()
    found = [own.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(kind, backend):
    """Bit for bit in C++, where forward runs once more; products for all steps at once are rounded in another way."""
    if (why := fastrnn.backends.available()[backend]) is not None:
        pytest.skip(why)
    layer = KINDS[kind]()
    x, reset = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.3
    with fastrnn.backend(backend):
        for more in ({}, {"reset": reset}):
            layer.recompute = False
            kept = gradients(layer, x, **more)
            layer.recompute = True
            for again, expected in zip(gradients(layer, x, **more), kept, strict=True):
                if backend == "cpu":
                    assert torch.equal(again, expected)
                torch.testing.assert_close(again, expected)


def test_packed_sequences():
    layer = fastrnn.LSTM(3, 5)
    x, found = torch.randn(6, 2, 3), []
    for layer.recompute in (False, True):
        own = x.clone().requires_grad_()
        layer(pack_padded_sequence(own, [6, 4]))[0].data.square().sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(*found)


def kept_numbers(layer, x):
    """How many numbers forward keeps for backward beside weights and x."""
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y, _ = layer(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("kind", "kept"), [("lstm", 6), ("gru", 5), ("rnn", 1)])
def test_what_forward_keeps(kind, kept):
    """y, and without `recompute` the gates and the LSTM's cells; what does not grow with time is not counted."""
    counts = {}
    for recompute in (False, True):
        layer = KINDS[kind](recompute=recompute)
        short, long = (kept_numbers(layer, torch.randn(time, 4, 3)) for time in (10, 110))
        counts[recompute] = (long - short) / (100 * 4 * 5)
    assert counts == {False: kept, True: 1}


def test_no_backend_that_keeps_gates_is_chosen():
    """Of a call that PyTorch's RNN gets otherwise; without a gradient there is nothing to keep."""
    layer, x = fastrnn.LSTM(3, 200, dtype=torch.float64), torch.randn(2, 32, 3, dtype=torch.float64)
    chosen = []
    for layer.recompute in (False, True):
        chosen.append({choice.backend for _, choice in fastrnn.explain(layer, x)})
    assert chosen[0] == {"aten"}
    assert "aten" not in chosen[1]
    with fastrnn.backend("aten"), pytest.raises(fastrnn.BackendRefusal, match="keeps the gates of every step"):
        layer(x)
    with fastrnn.backend("aten"), torch.no_grad():
        layer(x)


def test_second_derivative():
    layer = fastrnn.LSTM(2, 3, recompute=True, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_a_compiled_layer_keeps_less():
    """The graph of backward has the op that finds gates again; its gradients are those of the layer as it is."""
    torch.compiler.reset()
    layer, x = fastrnn.GRU(3, 5), torch.randn(6, 2, 3)
    expected = gradients(layer, x)
    counts = {}
    for layer.recompute in (False, True):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        counts[layer.recompute] = kept_numbers(compiled, x)
        for found, wanted in zip(gradients(compiled, x), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    assert counts[True] < counts[False]


def test_an_attribute_that_stays():
    layer = fastrnn.LSTM(3, 5, recompute=True)
    assert repr(layer) == "LSTM(3, 5, recompute=True)"
    assert copy.deepcopy(layer).recompute
    assert pickle.loads(pickle.dumps(layer)).recompute
    assert repr(fastrnn.LSTM(3, 5)) == "LSTM(3, 5)"
    converted = fastrnn.convert(torch.nn.GRU(3, 5))
    assert not converted.recompute
    converted.recompute = True
    assert gradients(converted, torch.randn(2, 1, 3))
    with pytest.raises(TypeError):
        fastrnn.LSTM(3, 5, 1, True, False, 0.0, False, 0, None, None, True)


def test_a_language_model_s_layers_obey():
    model = fastrnn.LanguageModel(fastrnn.NetworkConfig(vocab_size=11, hidden_size=6, input="onehot", cell="gru"))
    ids = torch.randint(0, 11, (2, 9))
    found = []
    for model.rnn.recompute in (False, True):
        model.zero_grad()
        model(ids)[0].square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for again, kept in zip(*found, strict=True):
        assert_close(again.double(), kept.double(), kept)

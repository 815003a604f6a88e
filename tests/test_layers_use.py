"""What users do to modules: weight drop, parametrizations, sharing, hooks, TorchScript, fx, writing into results."""

import copy
import warnings

import pytest
import torch
from layer_cases import CELLS, LAYERS, flat, make_state, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from fastrnn import layers


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_read_at_every_forward(name):
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(5, 2, 3)
    before = flat(ours(x))[0]
    raw = nn.Parameter(ours.weight_hh_l0.detach().clone())
    for module in (theirs, ours):
        del module.weight_hh_l0
        module.weight_hh_l0 = raw * 0.5
    assert not torch.equal(flat(ours(x))[0], before)
    torch.testing.assert_close(flat(ours(x))[0], flat(theirs(x))[0])
    flat(ours(x))[0].sum().backward()
    assert raw.grad.abs().sum() > 0
    assert ours._flat_weights[1] is ours.weight_hh_l0
    del ours.weight_hh_l0
    with pytest.raises(AttributeError, match="has no attribute 'weight_hh_l0'"):
        ours(x)
    ours._flat_weights = [raw * 2 if w is None else w for w in ours._flat_weights]
    assert torch.equal(ours.weight_hh_l0, raw * 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["weight_norm", "old_weight_norm", "spectral_norm", "orthogonal", "prune"])
def test_reparametrized_weights_train(name, how):
    theirs, ours = pair(name, 3, 4)
    apply = {
        "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
        "old_weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
        "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
        "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
        "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    }[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates its older weight_norm
        for module in (theirs, ours):
            torch.manual_seed(0)
            apply(module)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    for module in (theirs.eval(), ours.eval()):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            flat(module(x))[0].square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(flat(ours(x))[0], flat(theirs(x))[0])
    if how not in ("old_weight_norm", "prune"):
        assert flat(copy.deepcopy(ours)(x))[0].equal(flat(ours(x))[0])
        parametrize.remove_parametrizations(ours, "weight_hh_l0")
        assert type(ours) is getattr(layers, name)


def test_shared_and_tied_weights():
    model = nn.ModuleList([layers.GRU(4, 4), layers.GRU(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model.append(model[0])
    assert len(list(model.parameters())) == 7
    x = torch.randn(5, 2, 4)
    for module in model:
        x = module(x)[0]
    x.sum().backward()
    twins = nn.ModuleList([module.to_torch() for module in model])
    ours = model[0].weight_hh_l0.grad.clone()
    model.zero_grad()
    torch.manual_seed(0)
    assert twins[1].weight_hh_l0 is twins[0].weight_hh_l0
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_hooks(name):
    module, seen = getattr(layers, name)(3, 4), []
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        module.register_forward_hook(lambda m, args, kwargs, out: seen.append(sorted(kwargs)), with_kwargs=True),
        module.register_full_backward_hook(lambda m, gi, go: seen.append("backward")),
        module.weight_ih_l0.register_hook(lambda g: seen.append("weight")),
    ]
    x = torch.randn(5, 2, 3, requires_grad=True)
    flat(module(x, reset=torch.zeros(5, 2, dtype=torch.bool)))[0].sum().backward()
    assert seen[:2] == ["pre", ["reset"]]
    assert sorted(map(str, seen[2:])) == ["backward", "weight"]
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_torchscript(name):
    module = getattr(layers, name)(3, 4)
    x = torch.randn(5, 2, 3) if name in LAYERS else torch.randn(5, 3)
    expected = flat(module(x))
    traced = torch.jit.trace(module, (x,))
    for actual, wanted in zip(flat(traced(x)), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    parent = nn.Sequential(module)
    with pytest.warns(UserWarning, match=f"torch.jit.script compiles fastrnn.{name} as torch.nn.{name}"):
        scripted = torch.jit.script(parent)
    torch.testing.assert_close(flat(scripted(x)), expected)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_fx_keeps_the_layer_whole(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"rnn": getattr(layers, name)(3, 4)})

        def forward(self, x, hx):
            return self.inner["rnn"](x, hx)

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["inner.rnn"]
    x, hx = torch.randn(5, 2, 3)[: 5 if name in LAYERS else None], make_state(model.inner["rnn"], 2)
    x = x if name in LAYERS else x[0]
    for a, b in zip(flat(graph(x, hx)), flat(model(x, hx)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [None, "aten"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell"])  # torch.nn.RNNCell forbids it too
def test_writing_into_results_before_backward(name, backend):
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(5, 2, 3) if name in LAYERS else torch.randn(2, 3)
    for t in ((1, 5) if backend is None else (1,)) if name in LAYERS else (2,):  # oneDNN's LSTM forbids it too
        grads = []
        for module, write in ((theirs, False), (ours, True)):
            with fastrnn.backend(backend):
                outputs = flat(module(x[:t]))
            doubled = [out.mul_(2) if write else out * 2 for out in outputs]
            grads.append(torch.autograd.grad(sum(out.square().sum() for out in doubled), list(module.parameters())))
        for theirs_grad, ours_grad in zip(*grads, strict=True):
            torch.testing.assert_close(ours_grad, theirs_grad)

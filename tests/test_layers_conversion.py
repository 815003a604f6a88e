"""convert, to_torch and .to_torch(): the same modules and Parameter objects under another class; and DDP over gloo."""

import copy
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from layer_cases import CELLS, LAYERS, flat
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastrnn import layers
from fastrnn.conversion import convert, to_torch
from oracle import assert_all_close


class Model(nn.Module):
    """A user's model with every layer, one of them used twice and one hidden in a list."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.rnn = nn.RNN(4, 4, nonlinearity="relu")
        self.blocks = nn.ModuleList([nn.LSTM(4, 4, num_layers=2, dropout=0.1), nn.GRU(4, 4, bidirectional=True)])
        self.alias = self.blocks[0]
        self.cells = nn.ModuleDict({name: getattr(nn, name)(4, 4) for name in CELLS})

    def forward(self, ids):
        x = self.rnn(self.embedding(ids))[0]
        x = self.blocks[1](self.alias(self.blocks[0](x)[0])[0])[0][..., :4]
        for cell in self.cells.values():
            x = x + flat(cell(x[0]))[0]
        return x


def test_convert_and_back():
    model = Model().double().eval()
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    before, parameters = model(ids), dict(model.named_parameters())
    reference = model.blocks[0]
    assert convert(model) is model
    kinds = [type(m) for m in (model.rnn, *model.blocks, *model.cells.values())]
    assert kinds == [layers.RNN, layers.LSTM, layers.GRU, layers.LSTMCell, layers.GRUCell, layers.RNNCell]
    assert model.alias is model.blocks[0] is reference
    assert model.training is model.alias.training is False
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(parameters)
    assert_all_close([model(ids)], [before])
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert to_torch(convert(model)) is model  # converting twice changes nothing
    assert [type(m).__module__ for m in (model.rnn, model.alias)] == ["torch.nn.modules.rnn"] * 2
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert torch.equal(model(ids), before)
    assert torch.equal(copy.deepcopy(model)(ids), before)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_a_layer_itself(name):
    theirs = getattr(nn, name)(3, 4)
    ours = convert(theirs)
    assert ours is theirs
    assert type(ours) is getattr(layers, name)
    assert repr(ours) == repr(getattr(nn, name)(3, 4))
    twin = ours.to_torch()
    assert type(twin) is getattr(nn, name)
    assert type(ours) is getattr(layers, name)
    assert all(p is q for p, q in zip(ours.parameters(), twin.parameters(), strict=True))
    x = torch.randn(5, 3)
    assert_all_close(flat(ours(x)), flat(twin.double()(x.double())), flat(twin.float()(x)))
    twin.extra = nn.Linear(1, 1)
    assert "extra" not in dict(ours.named_children())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_hooks_and_parametrizations_move_along():
    gru, seen = nn.GRU(3, 4), []
    handle = gru.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    parametrizations.weight_norm(gru, "weight_hh_l0")
    lstm = nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    model = nn.ModuleList([gru, lstm])
    x = torch.randn(5, 2, 3)
    before = [flat(m(x))[0] for m in model]
    convert(model)
    assert isinstance(gru, layers.GRU)
    assert parametrize.is_parametrized(gru, "weight_hh_l0")
    with torch.no_grad():
        gru.parametrizations.weight_hh_l0.original0.mul_(2)
        lstm.weight_hh_l0_g.mul_(2)
    for module, y in zip(model, before, strict=True):
        assert not torch.equal(flat(module(x))[0], y)
        twin = module.to_torch()
        torch.testing.assert_close(flat(twin(x))[0], flat(module(x))[0])
    assert issubclass(seen[1], layers.GRU)
    handle.remove()
    to_torch(model)
    assert isinstance(gru, nn.GRU)
    count = len(seen)
    gru(x)
    assert len(seen) == count
    convert(model)
    parametrize.remove_parametrizations(gru, "weight_hh_l0")
    assert type(gru) is layers.GRU


def test_what_is_left_alone_is_named():
    class Mine(nn.LSTM):
        pass

    class MyOwn(layers.GRU):
        pass

    model = nn.Sequential(Mine(3, 4), nn.GRU(3, 4), nn.RNN(3, 4), MyOwn(3, 4))
    model[1].forward = model[1].forward
    with pytest.warns(UserWarning, match="leaves") as caught:
        convert(model)
    assert [str(w.message) for w in caught] == [
        "fastrnn.convert leaves '0' alone: Mine is a subclass and may have code of its own",
        "fastrnn.convert leaves '1' alone: its forward has been replaced on the instance",
    ]
    assert [type(m) for m in model] == [Mine, nn.GRU, layers.RNN, MyOwn]
    with pytest.warns(UserWarning, match="fastrnn.to_torch leaves '3' alone: MyOwn is a subclass"):
        to_torch(model)
    with pytest.raises(TypeError, match="MyOwn is not exactly one of fastrnn's GRU, LSTM, RNN, GRUCell"):
        model[3].to_torch()
    layer = layers.LSTM(3, 4)
    layer.forward = layer.forward
    with pytest.raises(TypeError, match="forward has been replaced on the instance"):
        layer.to_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(nn.Linear(3, 4), layers.LSTMCell(3, 4)))


def test_converted_model_compiles():
    torch.compiler.reset()
    model = convert(Model().double().eval())
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


# --- distributed ----------------------------------------------------------------------------------------------------

WORKER = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastrnn import layers
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # DDP itself must make the weights equal
layer = layers.LSTM(3, 4, num_layers=2, bidirectional=True).double()
model = DistributedDataParallel(layer)
torch.manual_seed(0)
x = torch.randn(5, 4, 3, dtype=torch.float64)
for _ in range(2):
    model.zero_grad()
    model(x[:, 2 * rank : 2 * rank + 2])[0].square().mean().backward()
alone = nn.LSTM(3, 4, num_layers=2, bidirectional=True).double()
alone.load_state_dict(layer.state_dict())
alone(x)[0].square().mean().backward()
for ours, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, theirs.grad)
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch built with distributed runs this")
def test_distributed_data_parallel_on_gloo():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0, output
        assert f"rank {rank} agrees" in output

"""Network: every input kind, cell and head against the same model in torch.nn; configs; foreign state dicts."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oracle
from fastrnn.network import CELLS, INPUTS, Network, NetworkConfig, column_inputs, rename_state_dict

V, H = 11, 6
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}


class Plain(nn.Module):
    """The same model in plain torch.nn, written as the tutorials write it."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        if config.input == "embedding":
            self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        options = {"nonlinearity": config.cell[4:]} if config.cell.startswith("rnn") else {}
        self.rnn = KINDS[config.cell](
            config.input_size, config.hidden_size, config.num_layers, batch_first=True, **options
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, ids, state=None):
        config, dtype = self.config, self.head.weight.dtype
        if config.input == "embedding":
            x = self.embedding(ids)
        elif config.input == "onehot":
            x = F.one_hot(ids, config.vocab_size).to(dtype)
        else:
            x = (ids.to(dtype) / config.vocab_size).unsqueeze(-1)
        y, state = self.rnn(x, state)
        return self.head(y if config.head == "all" else y[:, -1]), state


def pair(**options) -> tuple[Network, Plain]:
    """A Network and its torch.nn twin from the same seed."""
    config = NetworkConfig(**{"vocab_size": V, "hidden_size": H, "num_layers": 2, **options})
    torch.manual_seed(3)
    ours = Network(config)
    torch.manual_seed(3)
    return ours, Plain(config)


def parts(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize(("kind", "cell", "head"), list(itertools.product(INPUTS, CELLS, ("all", "last"))))
def test_forward_and_gradients_equal_torch(kind: str, cell: str, head: str) -> None:
    vocab = 40 if kind == "onehot" else V  # above the gates of H=6: the gathering path
    ours, plain = pair(input=kind, cell=cell, head=head, vocab_size=vocab)
    assert ours.gathers_columns == (kind == "onehot")
    assert list(ours.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), f"{name} has other initial values for the same seed"
    exact = Plain(plain.config).double()
    exact.load_state_dict(plain.state_dict())
    ids = torch.randint(vocab, (3, 7))
    results = []
    for model in (ours, exact, plain):
        first, state = model(ids)
        second, state = model(ids.flip(1), state)  # the carried state matters
        loss = second.double().square().mean() + first.double().mean() + sum(p.double().sum() for p in parts(state))
        names, weights = zip(*model.named_parameters(), strict=True)
        results.append([first, second, *parts(state), *torch.autograd.grad(loss, weights)])
    oracle.assert_all_close(*results, what=f"{kind} {cell} {head}: logits, state, d{', d'.join(names)}")


def test_small_vocabularies_use_one_hot_rows_and_give_the_same_logits() -> None:
    small, _ = pair(input="onehot", cell="gru", hidden_size=16)
    assert not small.gathers_columns
    ids = torch.randint(V, (2, 5))
    with torch.no_grad():
        expected, _ = small(ids)
        x, identity = column_inputs(ids.t(), small.rnn.weight_ih_l0)
        gx = F.one_hot(ids.t(), V).float() @ small.rnn.weight_ih_l0.t()
        assert torch.equal(x @ identity.t(), gx)
        assert expected.shape == (2, 5, V)


def test_one_hot_of_a_large_vocabulary_makes_no_tensor_of_its_size() -> None:
    network = Network(NetworkConfig(20_000, input="onehot", cell="rnn_tanh", hidden_size=8, head="last"))
    ids = torch.randint(20_000, (4, 30))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch(), torch.no_grad():
        network(ids)
    assert largest <= 20_000 * 8, "as large as the weights, and far below B*T*V = 2.4 million"


@pytest.mark.parametrize("kind", INPUTS)
def test_reset_starts_a_new_sequence(kind: str) -> None:
    network, _ = pair(input=kind, vocab_size=40)
    ids = torch.randint(40, (1, 9))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 4] = True
    with torch.no_grad():
        logits, _ = network(ids, reset=reset)
        before, after = network(ids[:, :4])[0], network(ids[:, 4:])[0]
        other, _ = network(ids)
    exact = network.double()
    with torch.no_grad():
        expected = torch.cat([exact(ids[:, :4])[0], exact(ids[:, 4:])[0]], 1)
    oracle.assert_close(logits, expected, torch.cat([before, after], 1))
    assert not torch.allclose(other, expected.float())


def test_dropout_acts_in_training_only_and_before_the_head() -> None:
    network, plain = pair(dropout=0.5, num_layers=1)
    plain.load_state_dict(network.state_dict())
    ids = torch.randint(V, (2, 5))
    assert not torch.equal(network(ids)[0], network(ids)[0])
    network.eval()
    assert torch.equal(network(ids)[0], network(ids)[0])
    kept = network.head(network.dropout(network.rnn(network.inputs(ids))[0]))
    assert torch.equal(kept, network(ids)[0])
    assert network.rnn.dropout == 0, "a single layer has nothing to drop between layers"
    assert Network(NetworkConfig(V, num_layers=2, dropout=0.5)).rnn.dropout == 0.5


def test_tied_weights_are_one_matrix_and_train_together() -> None:
    network = Network(NetworkConfig(V, hidden_size=H, tie_weights=True))
    assert network.head.weight is network.embedding.weight
    network(torch.randint(V, (2, 3)))[0].square().sum().backward()
    assert network.embedding.weight.grad is not None
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in set(network.parameters()))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (NetworkConfig(V, input="onehot", head="last", num_layers=2, hidden_size=H), ("lstm", "fc")),
        (NetworkConfig(V, input="scalar", head="last", num_layers=4, hidden_size=H), ("lstm", "linear")),
        (NetworkConfig(V, embedding_dim=4, cell="gru", hidden_size=H), ("gru", "fc")),
        (NetworkConfig(V, input="onehot", hidden_size=H), ("rnn", "fc")),
    ],
    ids=["000", "002", "003", "004"],
)
def test_state_dicts_of_the_tutorials_load(config: NetworkConfig, names: tuple[str, str]) -> None:
    plain = Plain(config)
    theirs = {
        name.replace("rnn.", f"{names[0]}.").replace("head.", f"{names[1]}."): tensor
        for name, tensor in plain.state_dict().items()
    }
    network = Network(config)
    network.load_renamed_state_dict(theirs)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    assert rename_state_dict({"module.lstm.weight_hh_l0": 1, "odd.x": 2}) == {"rnn.weight_hh_l0": 1, "odd.x": 2}


def test_a_state_dict_of_another_network_names_what_differs() -> None:
    network = Network(NetworkConfig(V, hidden_size=H))
    weights = dict(network.state_dict())
    extra = {**weights, "rnn.weight_ih_l1": weights["rnn.weight_ih_l0"]}
    with pytest.raises(ValueError, match=r"unknown rnn\.weight_ih_l1"):
        network.load_renamed_state_dict(extra)
    with pytest.raises(ValueError, match=r"missing head\.bias"):
        network.load_renamed_state_dict({name: t for name, t in weights.items() if name != "head.bias"})
    with pytest.raises(ValueError, match=r"head\.bias must be \(11,\).*got \(12,\)"):
        network.load_renamed_state_dict({**weights, "head.bias": torch.zeros(12)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"hidden_size": 2.5}, "hidden_size"),
        ({"num_layers": True}, "num_layers"),
        ({"cell": "LSTM"}, "cell must be one of lstm, gru, rnn_tanh, rnn_relu, got 'LSTM'"),
        ({"input": "text"}, "input must be one of"),
        ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\)"),
        ({"state": "window"}, "needs window="),
        ({"window": 5}, "needs state='window'"),
        ({"input": "onehot", "embedding_dim": 3}, "needs input='embedding'"),
        ({"tie_weights": True, "embedding_dim": 3}, "embedding_dim == hidden_size"),
    ],
)
def test_bad_configs_say_what_is_wrong(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**{"vocab_size": V, **fields})


def test_configs_survive_a_round_trip_and_refuse_unknown_fields() -> None:
    config = NetworkConfig(V, input="scalar", head="last", state="window", window=7, dropout=0.1)
    assert NetworkConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown field layers"):
        NetworkConfig.from_dict({**config.to_dict(), "layers": 2})
    with pytest.raises(ValueError, match="vocab_size is missing"):
        NetworkConfig.from_dict({})


def test_ids_of_the_wrong_shape_are_refused() -> None:
    network = Network(NetworkConfig(V, hidden_size=H, head="last"))
    with pytest.raises(ValueError, match=r"ids must be \(B, T\), got shape \(5,\)"):
        network(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one step"):
        network(torch.zeros(2, 0, dtype=torch.int64))

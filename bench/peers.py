"""The rivals of generation that PyTorch itself offers, with the weights of a given `fastrnn.Network`.

A `Peer` is built for one network and one number of rows. Each gets the network's input table instead of a one-hot
product, so the input of a big vocabulary costs it a gather. ``PEERS`` names them all; those of other packages are in
`bench.peers_graph`. A builder raises `Unavailable` with the reason where it cannot run here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import time
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrnn import Network

FIRST = 1  # the id every row starts from


class Unavailable(Exception):
    """Why a peer cannot run here."""


class Wrong(Unavailable):
    """A rival runs here and computes something else."""


class Peer(NamedTuple):
    """One rival: ``dtype`` names its honest tolerance; ``logits`` feeds ids (T, B) from a zero state and returns what
    follows (B, V); ``run`` draws n tokens for every row, each from the state the last left, and returns them (n, B)."""

    dtype: str
    logits: Callable[[Tensor], Tensor]
    run: Callable[[int], Tensor]


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]


def inverse_cdf(logits: Tensor) -> Tensor:
    """The draw with one uniform number a row: how many cumulative probabilities it reaches."""
    reached = torch.softmax(logits, -1).cumsum(-1) <= torch.rand(logits.shape[0], 1, device=logits.device)
    return reached.sum(-1).clamp_max(logits.shape[-1] - 1)


def race(logits: Tensor) -> Tensor:
    """The draw with an exponential random number a logit, which never waits for a GPU (gpt-fast's)."""
    probabilities = torch.softmax(logits, -1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


@functools.cache
def faster_draw(batch: int, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """The faster of the two draws for logits (batch, vocabulary)."""
    logits, spent = torch.randn(batch, vocabulary), {}
    for _ in range(5):
        for draw in (multinomial, inverse_cdf):
            start = time.process_time()
            draw(logits)
            spent[draw] = min(spent.get(draw, 1e9), time.process_time() - start)
    return min(spent, key=spent.get)


class Step(nn.Module):
    """(token (B,), *state) -> (next token, logits float32, *state), the stack run by `torch.nn` for one step."""

    def __init__(self, network: Network, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        config = network.config
        table, weights = network.input_table()
        self.table, self.draw, self.cell = nn.Parameter(table.detach().clone()), draw, config.cell
        self.layers, self.hidden = config.num_layers, config.hidden_size
        self.head = copy.deepcopy(network.head)
        self._make(table.shape[1], [weight.detach() for weight in weights])
        self.eval().requires_grad_(False)

    def _make(self, inputs: int, weights: list[Tensor]) -> None:
        options = {"nonlinearity": self.cell.removeprefix("rnn_")} if self.cell.startswith("rnn") else {}
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(self.cell, nn.RNN)
        self.rnn = kind(inputs, self.hidden, self.layers, **options, device=self.table.device)
        names = [name for name, _ in self.rnn.named_parameters()]
        self.rnn.load_state_dict(dict(zip(names, weights, strict=True)))

    def zero_state(self, batch: int) -> tuple[Tensor, ...]:
        zeros = self.table.new_zeros(self.layers, batch, self.hidden)
        return (zeros, zeros.clone()) if self.cell == "lstm" else (zeros,)

    def advance(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, state = self.rnn(x.unsqueeze(0), state if self.cell == "lstm" else state[0])
        return y[0], state if self.cell == "lstm" else (state,)

    def forward(self, token: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, state = self.advance(self.table[token], state)
        logits = self.head(y).float()
        return self.draw(logits), logits, *state


class CellStep(Step):
    """The same with `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` for each layer."""

    def _make(self, inputs: int, weights: list[Tensor]) -> None:
        options = {"nonlinearity": self.cell.removeprefix("rnn_")} if self.cell.startswith("rnn") else {}
        kind = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(self.cell, nn.RNNCell)
        self.cells = nn.ModuleList(
            kind(inputs if layer == 0 else self.hidden, self.hidden, **options, device=self.table.device)
            for layer in range(self.layers)
        )
        each = len(weights) // self.layers
        for layer, cell in enumerate(self.cells):
            names = [name for name, _ in cell.named_parameters()]
            cell.load_state_dict(dict(zip(names, weights[layer * each :][:each], strict=True)))

    def zero_state(self, batch: int) -> tuple[Tensor, ...]:
        each = 2 if self.cell == "lstm" else 1
        return tuple(self.table.new_zeros(batch, self.hidden) for _ in range(each * self.layers))

    def advance(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        after: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            if self.cell == "lstm":
                x, c = cell(x, (state[2 * layer], state[2 * layer + 1]))
                after += [x, c]
            else:
                x = cell(x, state[layer])
                after.append(x)
        return x, tuple(after)


def stepping(
    step: Callable[..., tuple[Tensor, ...]], zero: tuple[Tensor, ...], dtype: str, onednn: bool = True,
    guard: Callable[[], contextlib.AbstractContextManager] = torch.inference_mode,
) -> Peer:  # fmt: skip
    """The peer that calls ``step`` for every token."""

    @contextlib.contextmanager
    def setting():
        with guard(), contextlib.nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False):
            yield

    def logits(ids: Tensor) -> Tensor:
        state, found = zero, torch.empty(0)
        with setting():
            for token in ids:
                _, found, *state = step(token, *state)
        return found.clone()

    def run(number: int) -> Tensor:
        token, state, tokens = torch.full((zero[0].shape[-2],), FIRST, device=zero[0].device), zero, []
        with setting():
            for _ in range(number):
                token, _, *state = step(token, *state)
                tokens.append(token)
            return torch.stack(tokens)

    return Peer(dtype, logits, run)


def eager(
    network: Network, batch: int, dtype: str = "float32", onednn: bool = True,
    draw: Callable[[Tensor], Tensor] | None = None,
) -> Peer:  # fmt: skip
    """The loop that most programs write; ``draw`` None takes the faster one, on a GPU the one that never waits."""
    if dtype == "bfloat16" and not onednn and batch > 16:
        raise Unavailable("above 16 rows bfloat16 products without oneDNN take ten times as long and more")
    if draw is None:
        draw = race if network.head.weight.is_cuda else faster_draw(batch, network.config.vocab_size)
    step = Step(network, draw).to(getattr(torch, dtype))
    return stepping(step, step.zero_state(batch), dtype, onednn)


def traced(network: Network, batch: int, dtype: str = "float32") -> Peer:
    """`torch.jit.trace` of the step, frozen."""
    step = Step(network, faster_draw(batch, network.config.vocab_size)).to(getattr(torch, dtype))
    zero = step.zero_state(batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing and freezing are deprecated, and say so
        example = (torch.full((batch,), FIRST), *zero)
        frozen = torch.jit.freeze(torch.jit.trace(step, example, check_trace=False))
    return stepping(frozen, zero, dtype)


_compiled: weakref.WeakKeyDictionary[Network, dict[str, tuple]] = weakref.WeakKeyDictionary()


def compiled(network: Network, batch: int, dtype: str = "float32") -> Peer:
    """`torch.compile` of the step made of cells, whose draw is the inverse CDF.

    One compiled step serves all batches of a network: dynamo specializes on the first and makes the rows dynamic at
    the second. Its limit of recompilations is an error under ``fullgraph``, never a silent return to eager.
    """
    if shutil.which("g++") is None:
        raise Unavailable("torch.compile needs a C++ compiler: there is no g++")
    if network not in _compiled:
        torch._dynamo.reset()
        _compiled[network] = {}
    if dtype not in _compiled[network]:
        step = CellStep(network, inverse_cdf).to(getattr(torch, dtype))
        _compiled[network][dtype] = step, torch.compile(step, fullgraph=True)
    step, run = _compiled[network][dtype]
    return stepping(run, step.zero_state(batch), dtype, guard=torch.no_grad)


def dynamic_int8(network: Network, batch: int) -> Peer:
    """`torch.ao.quantization.quantize_dynamic`: int8 weights, activations quantized at every step."""
    rnn = network.config.cell.startswith("rnn")
    step = (CellStep if rnn else Step)(network, faster_draw(batch, network.config.vocab_size))
    zero = step.zero_state(batch)
    kinds = {nn.Linear, nn.RNNCell if rnn else type(step.rnn)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        quantized = torch.ao.quantization.quantize_dynamic(step, kinds, torch.qint8)
    return stepping(quantized, zero, "int8")


BASELINES = {
    "eager": functools.partial(eager, draw=multinomial),
    "eager without oneDNN": functools.partial(eager, onednn=False, draw=multinomial),
}
# Those whose error is the honest one of a dtype, see `bench.generate.Judge`.
PLAIN = {"float32": eager, "bfloat16": functools.partial(eager, dtype="bfloat16"), "int8": dynamic_int8}
PEERS: dict[str, Callable[[Network, int], Peer]] = {
    **BASELINES,
    "eager cdf": functools.partial(eager, draw=inverse_cdf),
    "eager cdf without oneDNN": functools.partial(eager, onednn=False, draw=inverse_cdf),
    "eager bfloat16": functools.partial(eager, dtype="bfloat16"),
    "eager bfloat16 without oneDNN": functools.partial(eager, dtype="bfloat16", onednn=False),
    "traced": traced,
    "traced bfloat16": functools.partial(traced, dtype="bfloat16"),
    "compiled": compiled,
    "compiled bfloat16": functools.partial(compiled, dtype="bfloat16"),
    "dynamic int8": dynamic_int8,
}

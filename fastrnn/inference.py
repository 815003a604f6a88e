"""Running a network forward without gradients so that a row's numbers never depend on the rows beside it.

The `cpu` cells are row-independent by contract. Other backends and the head are matrix products, whose rounding may
change with the number of rows and with a row's place; so those run in blocks of a fixed number of rows, filled up with
zeros, and which block sizes are safe on this machine is measured once per shape (`independent_blocks`), never assumed.
Prompts are cut into chunks whose sizes depend on their own length only. Together: state and logits of a sequence depend
on (weights, ids).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends, ops
from .network import Network, State
from .sequence import SequenceState, window_tail

BLOCK_ROWS = (256, 64, 16)  # the last is the base: the others are used where they give the base's bits
CHUNK_STEPS = 1024  # longest piece of a prompt in one call
# Below this many weights a step is microseconds of work, and waking a second thread costs more than it saves; on a busy
# machine a thousand times more. It depends on the network alone: the number of threads may change a product's rounding.
ONE_THREAD_WEIGHTS = 1 << 17
ALIGNED = 64  # bytes, as every new tensor is: products of few rows may be rounded by where these lie
ALONE_STEPS = 128  # from here on a piece fills the machine by itself and runs as one row
TOKENS_AT_ONCE = 1 << 14  # bounds the memory of a prefill: rows x steps of one call


class Blocks(NamedTuple):
    """Block sizes, largest first, and the number of threads under which they are safe."""

    sizes: tuple[int, ...]
    threads: int


ALONE = Blocks((1,), 1)
_measured: dict[tuple, Blocks] = {}


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Run torch on this many threads within."""
    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def independent_blocks(key: tuple, run: Callable[[Tensor], Tensor], rows: int) -> Blocks:
    """The `Blocks` in which ``run`` gives a row the same bits whatever its place, its companions and the threads.

    ``run`` maps row numbers (n,) int64 to those rows' outputs (n, K); it is called on 0 .. rows-1, in order and
    shuffled, in blocks of each size of BLOCK_ROWS up to ``rows``, and must give what blocks of 16 give on one thread.
    One thread where more give other bits, ALONE where even blocks of 16 do not agree. Results are kept under ``key``.
    """
    if key in _measured:
        return _measured[key]
    base, now = BLOCK_ROWS[-1], torch.get_num_threads()
    orders = (torch.arange(rows), torch.randperm(rows, generator=torch.Generator().manual_seed(20)))

    def outputs(numbers: Tensor, size: int) -> Tensor:
        return torch.cat([run(block) for block in numbers.split(size)])

    def agrees(size: int, expected: Tensor) -> bool:
        return all(torch.equal(outputs(order, size), expected[order.to(expected.device)]) for order in orders)

    with threads(1):
        expected = outputs(orders[0], base)
    found = ALONE
    for number in sorted({1, now}):
        with threads(number):
            sizes = tuple(size for size in BLOCK_ROWS if size <= rows and agrees(size, expected))
        if base in sizes:
            found = Blocks(sizes, number)
    _measured[key] = found
    return found


def blocks(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, size) of the blocks that cover ``rows`` rows, the largest that fit first; only the last may overhang."""
    start = 0
    while start < rows:
        size = next((size for size in sizes if size <= rows - start), sizes[-1])
        yield start, size
        start += size


class Inference:
    """A network's weights as they are now, with `advance`, `logits` and `prefill` free of gradients and of the training
    flag.

    Methods are called within `running`; ids are int64 on the network's device.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.config, self.rnn = network, network.config, network.rnn
        with torch.no_grad():
            table, weights = network.input_table()
        self.table, self.weights = table.detach(), [weight.detach() for weight in weights]
        self.head = network.head
        self.device, self.dtype = self.head.weight.device, self.head.weight.dtype
        self.zero_state = network.zero_state
        self.backend = self._choose_backend()
        weights = sum(weight.numel() for weight in (*self.weights, self.head.weight)) - self.weights[0].numel()
        self.threads = 1 if weights < ONE_THREAD_WEIGHTS else torch.get_num_threads()
        self.shape = (
            self.config.cell, self.table.shape[1], self.config.hidden_size, self.config.num_layers,
            self.dtype, str(self.device), self.threads,
        )  # fmt: skip

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, and one thread where the network is small; every other method is called within."""
        with torch.no_grad(), threads(self.threads):
            yield

    def _choose_backend(self) -> str:
        """The explicit backend, or the first of cpu, aten, reference that takes this network: one for all shapes."""
        if explicit := backends.explicit():
            return explicit
        config = self.config
        call = backends.Call(
            config.cell.partition("_")[0], self.device.type, self.dtype, 1, 1, self.table.shape[1], config.hidden_size,
            config.num_layers,
        )  # fmt: skip
        return next(name for name in ("cpu", "aten", "reference") if backends.TABLE[name].refuse(call) is None)

    def advance(self, ids: Tensor, state: State) -> State:
        """The state after ids (T, n) from ``state`` of n rows."""
        rows = ids.shape[1]
        if self.backend == "cpu":
            return self._run(ids, state)
        safe = ALONE if ids.shape[0] >= ALONE_STEPS else self._cell_blocks(ids.shape[0])
        with threads(safe.threads):
            pieces = [
                _narrow(self._run(_fill(ids, start, size), _map(state, _fill, start, size)), 0, rows - start)
                for start, size in blocks(rows, safe.sizes)
            ]
        return pieces[0] if len(pieces) == 1 else _cat(pieces)

    def logits(self, state: State) -> Tensor:
        """Logits (n, V) float32 of the token that follows ``state``."""
        h = state[0][-1] if isinstance(state, tuple) else state[-1]
        rows, safe = h.shape[0], self._head_blocks()
        with threads(safe.threads):
            pieces = [
                F.linear(_fill(h, start, size, 0), self.head.weight, self.head.bias)[: rows - start]
                for start, size in blocks(rows, safe.sizes)
            ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).float()

    def prefill(self, prompts: Sequence[Tensor], state: State) -> State:
        """The state of each row after its prompt, 1-D int64 of any length, from ``state`` of len(prompts) rows.

        A prompt runs as floor(length / 1024) pieces of 1024 ids, then one piece for each power of two in the rest: no
        padding, at most 11 sizes, and the rows that share a size share a call.
        """
        left, done = [len(prompt) for prompt in prompts], [0] * len(prompts)
        longest = max(left, default=0)
        sizes = [CHUNK_STEPS] * (longest // CHUNK_STEPS)
        sizes += [1 << bit for bit in reversed(range(CHUNK_STEPS.bit_length() - 1))]
        for size in sizes:
            rows = [r for r, length in enumerate(left) if length >= size] if size <= longest else []
            for at in range(0, len(rows), max(1, TOKENS_AT_ONCE // size)):
                group = rows[at : at + max(1, TOKENS_AT_ONCE // size)]
                ids = torch.stack([prompts[r][done[r] : done[r] + size] for r in group], 1).to(self.device)
                number = torch.tensor(group, device=self.device)
                after = self.advance(ids, take(state, number))
                state = after if len(group) == len(prompts) else _put(state, number, after)
                for r in group:
                    done[r] += size
                    left[r] -= size
        return state

    def read(self, prompt: Tensor, state: SequenceState | None, window: int | None) -> tuple[State, Tensor, Tensor]:
        """(hidden, logits, tail) after ``prompt``, 1-D int64, from ``state``: the parts of a `SequenceState`."""
        with self.running():
            if self.config.state == "window":
                tail = window_tail(prompt, state, window).to(self.device)
                return self.zero_state(1), self.window_logits([tail])[0], tail
            hidden = self.zero_state(1) if state is None else state.hidden
            if not len(prompt):
                return hidden, state.logits, prompt
            hidden = self.prefill([prompt], hidden)
            return hidden, self.logits(hidden)[0], prompt[:0]

    def window_logits(self, tails: Sequence[Tensor]) -> Tensor:
        """Logits (n, V) after running each row's ids, 1-D int64, from a zero state; rows of one length share a call."""
        by_length: dict[int, list[int]] = {}
        for r, tail in enumerate(tails):
            by_length.setdefault(len(tail), []).append(r)
        result = torch.empty(len(tails), self.config.vocab_size, device=self.device)
        for length, rows in by_length.items():
            at_once = max(1, TOKENS_AT_ONCE // length)
            for at in range(0, len(rows), at_once):
                group = rows[at : at + at_once]
                ids = torch.stack([tails[r] for r in group], 1).to(self.device)
                result[group] = self.logits(self.advance(ids, self.zero_state(len(group))))
        return result

    def outputs(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """y (T, n, H) of the top layer and the state after ids (T, n), as one call whatever n is."""
        return self._stack(F.embedding(ids, self.table), state, self.weights)

    def _run(self, ids: Tensor, state: State) -> State:
        return self.outputs(ids, state)[1]

    def _stack(self, x: Tensor, state: State, weights: list[Tensor]) -> tuple[Tensor, State]:
        with backends.backend(self.backend):
            return ops.stack(
                self.rnn.mode, x, state, weights, bias=self.rnn.bias, num_layers=self.config.num_layers, dropout=0.0,
                training=False, bidirectional=False,
            )  # fmt: skip

    def _random(self, *shape: int) -> Tensor:
        """Numbers in [-1, 1), the same ones each time, to measure with: a model's own may be all zero, or NaN."""
        chance = torch.Generator().manual_seed(21)
        return torch.rand(shape, generator=chance).mul(2).sub(1).to(self.device, self.dtype)

    def _cell_blocks(self, steps: int) -> Blocks:
        rows = BLOCK_ROWS[0] if steps == 1 else 2 * BLOCK_ROWS[-1]
        key = ("cell", self.backend, steps, *self.shape)
        if key in _measured:
            return _measured[key]
        weights = [self._random(*weight.shape) / self.config.hidden_size**0.5 for weight in self.weights]
        x = self._random(steps, rows, self.table.shape[1])
        state = _map(self.zero_state(rows), lambda s: self._random(*s.shape))

        def run(numbers: Tensor) -> Tensor:
            numbers = numbers.to(self.device)
            after = self._stack(x[:, numbers], take(state, numbers), weights)[1]
            parts = after if isinstance(after, tuple) else (after,)
            return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)

        return independent_blocks(key, run, rows)

    def _head_blocks(self) -> Blocks:
        key = ("head", self.config.vocab_size, *self.shape)
        if key in _measured:
            return _measured[key]
        h, weight = self._random(BLOCK_ROWS[0], self.config.hidden_size), self._random(*self.head.weight.shape)
        bias = self._random(self.config.vocab_size)
        return independent_blocks(key, lambda numbers: F.linear(h[numbers.to(h.device)], weight, bias), BLOCK_ROWS[0])


def _map(state: State, function: Callable[..., Tensor], *args: Any) -> State:
    return tuple(function(s, *args) for s in state) if isinstance(state, tuple) else function(state, *args)


def take(state: State, rows: Tensor) -> State:
    """The rows (n,) int64 of a state."""
    return _map(state, lambda s: s.index_select(1, rows))


def join(states: Sequence[State]) -> State:
    """States of several groups of rows as one state of all rows."""
    return states[0] if len(states) == 1 else _cat(states)


def _cat(states: Sequence[State]) -> State:
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts, 1) for parts in zip(*states))
    return torch.cat(list(states), 1)


def _put(state: State, rows: Tensor, values: State) -> State:
    if isinstance(state, tuple):
        return tuple(s.index_copy(1, rows, v) for s, v in zip(state, values))
    return state.index_copy(1, rows, values)


def _narrow(state: State, start: int, rows: int) -> State:
    return _map(state, lambda s: s[:, start : start + rows])


def _fill(tensor: Tensor, start: int, size: int, dim: int = 1) -> Tensor:
    """Rows start .. start+size of ``dim``, filled up with zeros where the tensor ends before, and aligned."""
    part = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
    lacking = size - part.shape[dim]
    if lacking == 0:
        aligned = part.is_contiguous() and part.data_ptr() % ALIGNED == 0
        return part if aligned else part.clone(memory_format=torch.contiguous_format)
    shape = list(part.shape)
    shape[dim] = lacking
    return torch.cat([part, part.new_zeros(shape)], dim)

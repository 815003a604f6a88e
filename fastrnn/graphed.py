"""The generation loop on a GPU (kernels/generate.py), seen from Python: the network there, and an engine that feeds it.

It does what `engine.Engine` does without a word from the host for 32 to 128 tokens of all rows: that many steps are one
CUDA graph, in which rows that have ended take prepared requests from a queue. Then the host reads what has been drawn
and fills the queue. A generation leaves its loop to the next one of the same network and shape, which need not capture
its graphs again. Where Triton interprets its kernels, for their tests, the same steps are launched one by one.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import backends
from .inference import Inference, join
from .network import Network, State
from .request import BATCH_ROWS, Completion, Pending, Request, Taken, signed
from .sampling import STATUS_TEXTS
from .sequence import SequenceState

if TYPE_CHECKING:
    from .kernels.generate import Kind, Loop, Weights

SIZES = (32, 64, 128)  # tokens of a graph
QUEUE = 4  # slots of the queue for each row
KEPT_LOOPS = 4  # of a network; the one whose last use is longest ago goes

# The loops that no generation uses, by what they have fixed; the one used last stands last.
_idle: weakref.WeakKeyDictionary[Network, dict[tuple, Loop]] = weakref.WeakKeyDictionary()


def _kernels():
    return importlib.import_module("fastrnn.kernels.generate")


def tokens_at_once(longest: int, events: bool, graphs: bool) -> int:
    """How many tokens every row draws before the host looks: what the longest row may still draw, in one of `SIZES`,
    the smallest where each token is looked at. Without graphs no more than that, but an even number."""
    size = SIZES[0] if events else next((size for size in SIZES if size >= longest), SIZES[-1])
    return size if graphs else min(size, longest + longest % 2)


def fixed(weights: Weights, *sizes: int) -> tuple:
    """What a loop of some sizes and its graphs have fixed; of the weights, where they lie, but for the table.

    A tensor that was made in inference mode can be written there only.
    """
    parts = (*(part for layer in weights.layers for part in layer), weights.head, weights.bias)
    places = (part if part is None else (part.data_ptr(), part.shape, part.dtype) for part in parts)
    table = weights.table
    return torch.is_inference_mode_enabled(), *sizes, weights.cell, table.shape, table.dtype, table.device, *places


class DeviceNetwork:
    """A network's weights as the loop on the GPU reads them; prompts are read by the Triton kernels of sequences."""

    def __init__(self, network: Network) -> None:
        self.network = network
        with backends.backend("triton"):
            self.inference = Inference(network)
        config, head = network.config, network.head
        with torch.no_grad():
            every = torch.arange(config.vocab_size, device=head.weight.device)
            inputs = None if config.input == "onehot" else network.inputs(every).detach()
            weights = [weight.detach() for weight in network.weights()]
            bias = None if head.bias is None else head.bias.detach()
            self.weights = _kernels().Weights.of(
                config.cell, inputs, weights, network.rnn.bias, head.weight.detach(), bias
            )

    def borrow(self, rows: int, user: object) -> Loop:
        """A loop of so many rows that is the user's alone as long as the user lives: an idle one if there is one."""
        Loop, sizes = _kernels().Loop, (rows, QUEUE * rows, SIZES[-1])
        key = fixed(self.weights, *sizes)
        loop = _idle.setdefault(self.network, {}).pop(key, None)
        if loop is None:
            loop = Loop(self.weights, *sizes)
        else:
            loop.restart(self.weights)
        weakref.finalize(user, _give_back, weakref.ref(self.network), key, loop).atexit = False
        return loop

    def read(self, prompt: Tensor, state: SequenceState | None, window: int | None) -> tuple[State, Tensor, Tensor]:
        """(hidden, logits, tail) after ``prompt``, 1-D int64, from ``state``: the parts of a `SequenceState`."""
        return self.inference.read(prompt, state, window)


def _give_back(of: weakref.ref[Network], key: tuple, loop: Loop) -> None:
    """Keep a loop that has lost its user, as long as its network lives."""
    if (network := of()) is not None:
        idle = _idle.setdefault(network, {})
        idle.pop(key, None)
        idle[key] = loop
        if len(idle) > KEPT_LOOPS:
            del idle[next(iter(idle))]


@dataclasses.dataclass
class _Live:
    """A request under way, and how many of its tokens the caller has looked at."""

    request: Request
    completion: Completion
    looked: int = 0


class GraphedEngine:
    """Runs requests as `engine.Engine` does; `step` lets every row draw many tokens.

    events: whether `step` gives the tokens as they come, at the price of shorter graphs.
    """

    def __init__(
        self, runner: DeviceNetwork, requests: Iterable[Request], batch_rows: int | None = None, *, events: bool = True
    ) -> None:
        self.network, self.inference, self.events = runner.network, runner.inference, events
        self.pending = Pending(requests, self.network)
        self.rows = self.pending.rows(batch_rows or BATCH_ROWS)
        self.first, self.waiting = 0, 0  # the queue: slot of the first request that has no row yet, and how many wait
        self.wanted = 2 * self.rows  # how many should be waiting, so that no row is idle before the next look
        self.live: dict[int, _Live] = {}  # under way, those in the queue too
        self.kinds: Counter[Kind] = Counter()  # of the live
        self.finished: dict[int, _Live] = {}  # not yet taken
        self.stopped: dict[int, int] = {}  # index -> how many tokens it had when it was stopped
        self.released: list[int] = []  # stopped while in a row
        self.loop = runner.borrow(self.rows, self)

    @property
    def busy(self) -> bool:
        """Whether a request is running or may be pending, or results wait to be taken."""
        return bool(self.live or self.finished) or not self.pending.exhausted

    def stop(self, index: int) -> None:
        """End request ``index`` after the tokens that were looked at, with finish_reason ``stop`` unless those are all
        of a request that has failed or drawn an eos."""
        known = self.live.get(index) or self.finished.get(index)
        if known is not None:
            self.stopped.setdefault(index, known.looked)

    def step(self) -> Iterator[tuple[int, int]]:
        """Draw some tokens for every row; an iterator over the (index, token) pairs, of those requests that `stop` has
        not ended."""
        with self.inference.running():
            self._feed()
            if not self.live:
                return iter(())
            self._release()
            self.loop.offer(self.first, self.waiting)
            longest = max(row.request.max_new_tokens - len(row.completion.token_ids) for row in self.live.values())
            tokens = tokens_at_once(longest, self.events, self.loop.device.type == "cuda")
            kind = _kernels().Kind.of_all(self.kinds)
            self.loop.run(tokens, kind)
            items, values = self._collect(tokens, kind.logprobs)
        return self._look(items, values) if self.events else iter(())

    def take_completions(self) -> list[Completion]:
        """What has finished since the last call, in the order in which it finished."""
        for index in [index for index in self.stopped if index in self.live]:
            self.released.append(index)
            self._finish(index)
        done = []
        for index, row in self.finished.items():
            self._cut(row.completion, self.stopped.pop(index, None))
            done.append(row.completion)
        self.finished.clear()
        return done

    # --- to the device ---

    def _feed(self) -> None:
        """Prepare requests until ``wanted`` of them wait; those before a bad one too, which raises."""
        new: list[Taken] = []
        try:
            while self.waiting + len(new) < self.wanted and (taken := self.pending.take()) is not None:
                index, request, _ = taken
                if request.max_new_tokens == 0:
                    self.finished[index] = _Live(request, taken.completion("length"))
                    continue
                self.live[index] = _Live(request, taken.completion())
                self.kinds[self._kind(request)] += 1
                new.append(taken)
        finally:
            if new:
                self._put(new)

    @staticmethod
    def _kind(request: Request) -> Kind:
        known = request.sampling.numbers()
        filters = known.top_k > 0 or known.top_p > 0 or known.min_p < math.inf
        modes = (request.sampling.mode_of,)
        return _kernels().Kind(filters, request.repetition_penalty != 1, request.logprobs, modes)

    def _put(self, new: list[Taken]) -> None:
        """Write requests, and their states after their prompts, into the queue."""
        widest = max(len(request.eos) for _, request, _ in new)
        self.loop.widen(widest)
        columns, reals = [], []
        for index, request, _ in new:
            known, penalty = request.sampling.numbers(), request.repetition_penalty
            names = (signed(request.seed), signed(request.sequence))
            left = min(request.max_new_tokens, 2**62)
            eos = [*request.eos, *[-1] * (widest - len(request.eos))]
            columns.append([known.top_k, known.top_p, *names, 0, left, index, request.sampling.mode_of, 0, 0, *eos])
            reals.append([known.scale, known.min_p, penalty, 1 / penalty])
        zero = self.inference.zero_state(1)
        start = join([request.state.hidden if request.state else zero for _, request, _ in new])
        state = self.inference.prefill([prompt for _, _, prompt in new], start)
        slots = (torch.arange(len(new)) + self.first + self.waiting) % self.loop.capacity
        self.loop.put(
            slots.to(self.loop.device), torch.tensor(columns).t(), torch.tensor(reals).t(),
            torch.cat(state) if isinstance(state, tuple) else state, self._seen(new),
        )  # fmt: skip
        self.waiting += len(new)

    def _seen(self, new: list[Taken]) -> Tensor | None:
        """(n, V) bool: the ids that have occurred in each request, or None while nobody asks."""
        if any(request.repetition_penalty != 1 for _, request, _ in new):
            self.loop.remember_seen()
        if self.loop.seen is None:
            return None
        seen = torch.zeros(len(new), self.network.config.vocab_size, dtype=torch.bool, device=self.loop.device)
        for r, (_, request, prompt) in enumerate(new):
            seen[r, prompt.to(seen.device)] = True
            if request.state is not None:
                seen[r] |= request.state.seen
        return seen

    def _release(self) -> None:
        """Take the rows of stopped requests from them."""
        if self.released:
            self.loop.release(self.released)
            self.released = []

    # --- from the device ---

    def _collect(self, tokens: int, logprobs: bool) -> tuple[np.ndarray, np.ndarray]:
        """Give every request its new tokens; (items, tokens) of all, in the order in which they were drawn."""
        items, values = self.loop.events[:, :tokens, : self.rows].cpu().numpy().reshape(2, -1)
        taken = min(int(self.loop.taken[0]) - self.first, self.waiting)
        self.first, self.waiting = (self.first + taken) % self.loop.capacity, self.waiting - taken
        self.wanted = min(self.loop.capacity, max(2 * self.rows, 2 * taken))
        places = np.flatnonzero(items >= 0)
        items, values = items[places], values[places]
        logs = self.loop.logprobs[:tokens, : self.rows].cpu().numpy().reshape(-1)[places] if logprobs else None
        order = np.argsort(items, kind="stable")
        starts = np.flatnonzero(np.diff(items[order], prepend=-1))
        ended = []
        for part in np.split(order, starts[1:]) if len(order) else ():
            index = int(items[part[0]])
            row = self.live.get(index)
            if row is None:  # stopped while it waited
                self.released.append(index)
            elif self._extend(row, values[part], None if logs is None else logs[part]):
                ended.append((int(places[part[-1]]) // self.rows, index))
        for _, index in sorted(ended):
            self._finish(index)
        return items, values

    @staticmethod
    def _extend(row: _Live, values: np.ndarray, logs: np.ndarray | None) -> bool:
        """Append what was drawn for a request, -status at the end of one that failed; whether it has finished."""
        completion, drawn = row.completion, values.tolist()
        status = -drawn.pop() if drawn[-1] < 0 else 0
        completion.token_ids += drawn
        if completion.logprobs is not None:
            completion.logprobs += logs[: len(drawn)].tolist()
        done = len(completion.token_ids)
        if status:
            completion.error = f"token {done} cannot be drawn: {STATUS_TEXTS[status]}"
            completion.finish_reason = "error"
        elif drawn[-1] in row.request.eos:
            completion.finish_reason = "eos"
        elif done == row.request.max_new_tokens:
            completion.finish_reason = "length"
        return bool(completion.finish_reason)

    def _finish(self, index: int) -> None:
        row = self.finished[index] = self.live.pop(index)
        self.kinds[self._kind(row.request)] -= 1

    def _look(self, items: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, int]]:
        for index, token in zip(items.tolist(), values.tolist()):
            row = self.live.get(index) or self.finished.get(index)
            if token >= 0 and row is not None and index not in self.stopped:
                row.looked += 1
                yield index, token

    @staticmethod
    def _cut(completion: Completion, count: int | None) -> None:
        """Take back what a stopped request has drawn after its last token that was looked at."""
        if count is None or (count == len(completion.token_ids) and completion.finish_reason in ("eos", "error")):
            return
        del completion.token_ids[count:]
        if completion.logprobs is not None:
            del completion.logprobs[count:]
        completion.finish_reason, completion.error = "stop", None

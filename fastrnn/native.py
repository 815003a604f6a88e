"""The generation loops in C++ (csrc/cpu/session.h) and CUDA (csrc/cuda/generate_session.h), seen from Python: a packed
network, and an engine that feeds a loop.

They do what `engine.Engine` does, on a float32 network, without coming back to Python between tokens: a call runs for
some milliseconds, so that a signal or a streamed token never waits longer. What goes to a loop and comes from it is on
the CPU; the loop on a GPU keeps its weights, states and queue there.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .backends import function
from .network import Network, State
from .request import BATCH_ROWS, Completion, Pending, Request, Taken, signed
from .sampling import STATUS_TEXTS
from .sequence import SequenceState, window_tail

SLICE_MICROSECONDS = 20_000  # of one call: Ctrl-C waits no longer than that and a step
STREAM_MICROSECONDS = 5_000  # of one call when each token is looked at
STREAM_STEPS = {"cpu": 16, "cuda": 256}  # and how far rows may go on before they hear that they are to stop
FINISH = ("length", "eos", "error", "stop")
_NOTHING = torch.empty(0)


class PackedNetwork:
    """A copy of a network's weights as a loop reads them, in ``precision``: float32, bfloat16 or, on the CPU, int8.

    backend: ``cpu`` or ``cuda``, which runs on the GPU that holds the network.
    """

    def __init__(self, network: Network, precision: str = "float32", backend: str = "cpu") -> None:
        self.network, self.precision, self.backend = network, precision, backend
        config = network.config
        with torch.no_grad():
            inputs = None
            if config.input != "onehot":
                every = torch.arange(config.vocab_size, device=network.head.weight.device)
                inputs = _host(network.inputs(every))
            weights = [_host(weight) for weight in network.weights()]
            head, bias = network.head.weight, network.head.bias
            device = [head.device.index or 0] if backend == "cuda" else []
            self.number = self.op("pack")(
                config.cell, precision, inputs, weights, network.rnn.bias, _host(head),
                None if bias is None else _host(bias), *device,
            )  # fmt: skip
        self.threads = torch.get_num_threads()
        weakref.finalize(self, self.op("free_network"), self.number)

    def op(self, name: str) -> Callable:
        """The loop's op of that name."""
        return function(self.backend, f"generator_{name}")

    def read(self, prompt: Tensor, state: SequenceState | None, window: int | None) -> tuple[State, Tensor, Tensor]:
        """(hidden, logits, tail) after ``prompt``, 1-D int64, from ``state``: the parts of a `SequenceState`."""
        windowed = self.network.config.state == "window"
        zero = self.network.zero_state(1)
        start = zero if state is None or windowed else state.hidden
        ids = window_tail(prompt, state, window) if windowed else prompt
        h, c = start if isinstance(start, tuple) else (start, _NOTHING)
        if not len(ids):
            return start, state.logits, ids
        h, c, logits = self.op("read")(self.number, _host(ids), _host(h), _host(c), self.threads)
        h, c, logits = (part.to(self.network.head.weight.device) for part in (h, c, logits))
        if windowed:
            return zero, logits, ids
        return (h, c) if isinstance(start, tuple) else h, logits, ids[:0]


class NativeEngine:
    """Runs requests as `engine.Engine` does; `step` lets every row make many steps.

    events: whether `step` gives the tokens as they come, at the price of shorter calls.
    """

    def __init__(
        self, packed: PackedNetwork, requests: Iterable[Request], batch_rows: int | None = None, *, events: bool = True
    ) -> None:
        self.packed, self.network, self.events = packed, packed.network, events
        self.windowed = self.network.config.state == "window"
        self.pending = Pending(requests, self.network)
        self.rows = self.pending.rows(batch_rows or BATCH_ROWS)
        self.waiting = 0  # requests given to the session that have no row yet
        self.wanted = 2 * self.rows  # how many should be waiting, so that no row is idle before the next call
        self.live: dict[int, tuple[int, bool]] = {}  # index -> prompt_tokens, logprobs; of requests under way
        self.seen_tokens: dict[int, int] = {}  # index -> how many tokens the caller has looked at
        self.stopped: dict[int, int] = {}  # index -> how many tokens it had when it was stopped
        self.completions: list[Completion] = []
        self.results: list[tuple[Tensor, Tensor, Tensor]] = []
        self.session = packed.op("start")(packed.number, self.rows, self.windowed, packed.threads)
        weakref.finalize(self, packed.op("free_session"), self.session)

    @property
    def busy(self) -> bool:
        """Whether a request is running or may be pending, or results wait to be taken."""
        return bool(self.live or self.completions) or not self.pending.exhausted

    def step(self) -> Iterator[tuple[int, int]]:
        """Run for a while; an iterator over the (index, token) pairs drawn, of those requests that `stop` has not
        ended."""
        self._feed()
        if not self.live:
            return iter(())
        streams = (STREAM_MICROSECONDS, STREAM_STEPS[self.packed.backend])
        time, steps = streams if self.events else (SLICE_MICROSECONDS, 0)
        results, tokens, logprobs, events, waiting = self.packed.op("run")(
            _NOTHING, self.session, time, steps, not self.pending.exhausted, self.events
        )
        before, self.waiting = self.waiting, int(waiting[0])
        self.wanted = max(2 * self.rows, 2 * (before - self.waiting))
        if len(results):
            self.results.append((results, tokens, logprobs))
        return self._look(events.tolist())

    def stop(self, index: int) -> None:
        """End request ``index`` after the tokens that were looked at, with finish_reason ``stop`` unless those are all
        of a request that has failed or drawn an eos."""
        if index in self.live and index not in self.stopped:
            self.stopped[index] = self.seen_tokens.get(index, 0)
            self.packed.op("stop")(self.session, index)

    def take_completions(self) -> list[Completion]:
        """What has finished since the last call, in the order in which it finished."""
        done, self.completions = self.completions, []
        for results, tokens, logprobs in self.results:
            every, values, at, at_value = memoryview(tokens.numpy()), logprobs.tolist(), 0, 0
            for index, finish, status, count in results.view(-1, 4).tolist():
                prompt_tokens, wants = self.live.pop(index)
                own = values[at_value : at_value + count] if wants else None
                completion = Completion(index, every[at : at + count], own, prompt_tokens, FINISH[finish])
                at, at_value = at + count, at_value + (count if wants else 0)
                if status:
                    completion.error = f"token {count} cannot be drawn: {STATUS_TEXTS[status]}"
                self._cut(completion)
                done.append(completion)
        self.results = []
        return done

    def _look(self, events: list[int]) -> Iterator[tuple[int, int]]:
        for index, token in zip(events[::2], events[1::2]):
            if index not in self.stopped:
                self.seen_tokens[index] = self.seen_tokens.get(index, 0) + 1
                yield index, token

    def _cut(self, completion: Completion) -> None:
        """Take back what a stopped request has drawn after its last token that was looked at."""
        self.seen_tokens.pop(completion.index, None)
        count = self.stopped.pop(completion.index, None)
        if count is None or (count == len(completion.token_ids) and completion.finish_reason in ("eos", "error")):
            return
        del completion.token_ids[count:]
        if completion.logprobs is not None:
            del completion.logprobs[count:]
        completion.finish_reason, completion.error = "stop", None

    def _feed(self) -> None:
        """Give the session requests until ``wanted`` of them wait; those before a bad one too, which raises."""
        batch = _Batch()
        try:
            while self.waiting < self.wanted and (taken := self.pending.take()) is not None:
                if taken.request.max_new_tokens == 0:
                    self.completions.append(taken.completion("length"))
                    continue
                batch.add(taken, taken.request.window or self.network.config.window or 0)
                self.live[taken.index] = taken.prompt_tokens, taken.request.logprobs
                self.waiting += 1
        finally:
            batch.give(self.packed.op("add"), self.session)


class _Batch:
    """Requests on their way to a session, as the columns of `generator_add`."""

    def __init__(self) -> None:
        self.numbers, self.reals, self.ids = array("q"), array("f"), array("q")
        self.states: list[SequenceState] = []  # each once where neighbours share one

    def add(self, taken: Taken, window: int) -> None:
        index, request, prompt = taken
        state, kernel, penalty = request.state, request.sampling.numbers(), request.repetition_penalty
        if state is not None and not (self.states and self.states[-1] is state):
            self.states.append(state)
        self.numbers.extend((
            index, len(prompt), len(request.eos), request.max_new_tokens, kernel.top_k, kernel.top_p,
            signed(request.seed), signed(request.sequence), request.sampling.mode_of, request.logprobs, window,
            -1 if state is None else len(self.states) - 1,
        ))  # fmt: skip
        self.reals.extend((kernel.scale, kernel.min_p, penalty, 1 / penalty))
        self.ids.extend(prompt.tolist())
        self.ids.extend(request.eos)

    def give(self, add: Callable, session: int) -> None:
        if not self.numbers:
            return
        numbers, reals = _tensor(self.numbers, torch.int64).view(-1, 12), _tensor(self.reals, torch.float32).view(-1, 4)
        parts = [part for state in self.states for part in _parts(state)]
        add(session, numbers, reals, _tensor(self.ids, torch.int64), parts)


def _host(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous()


def _parts(state: SequenceState) -> list[Tensor]:
    """The tensors of a start state in the order of `generator_add`."""
    h, c = state.hidden if isinstance(state.hidden, tuple) else (state.hidden, _NOTHING)
    return [_host(part) for part in (h, c, state.logits, state.tail, state.seen)]


def _tensor(numbers: array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)

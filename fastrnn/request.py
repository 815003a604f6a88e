"""Request and Completion: what the generation loop takes and what it gives back, in token ids."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .network import Network
from .sampling import SamplingParams
from .sequence import SequenceState

BATCH_ROWS = 256  # rows at once when the caller does not say
_NO_IDS = torch.empty(0, dtype=torch.int64)


@dataclasses.dataclass
class Request:
    """One sequence to generate.

    prompt              ids, a list or a 1-D int64 tensor; not empty unless ``state`` is given
    sampling            how tokens are drawn;  repetition_penalty: > 1 makes ids that have occurred less likely
    seed, sequence      64-bit integers: which random numbers are used; two requests with both equal share them
    eos                 ids that end the sequence; the id that ended it is the last of the result
    state               start from here instead of from nothing; the prompt follows it
    logprobs            keep the log-probability of each token
    window              for a network with window state: ids that are run for each token, instead of the config's
    """

    prompt: Sequence[int] | Tensor
    max_new_tokens: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    seed: int = 0
    sequence: int = 0
    repetition_penalty: float = 1.0
    eos: frozenset[int] = frozenset()
    state: SequenceState | None = None
    logprobs: bool = False
    window: int | None = None


def changed(request: Request, **changes: object) -> Request:
    """A copy of a request with other values of some fields; what is common to thousands is not checked for each."""
    copy = object.__new__(Request)
    copy.__dict__.update(request.__dict__, **changes)
    return copy


class _Ids:
    """A list of ids that may be given as a memoryview, and becomes a list when it is first looked at.

    Native code draws faster than Python makes lists; whoever only counts or stores does not wait for them.
    """

    def __get__(self, owner: Completion | None, kind: type) -> list[int]:
        if owner is None:
            raise AttributeError("token_ids has no default")  # which tells dataclasses so
        ids = owner.__dict__["token_ids"]
        if isinstance(ids, memoryview):
            ids = owner.__dict__["token_ids"] = ids.tolist()
        return ids

    def __set__(self, owner: Completion, ids: list[int] | memoryview) -> None:
        owner.__dict__["token_ids"] = ids


@dataclasses.dataclass
class Completion:
    """What came of request number ``index``.

    finish_reason: ``length`` (max_new_tokens reached), ``eos``, ``stop`` (the callback said so) or ``error`` (``error``
    says why; the tokens before it are kept). logprobs: natural log of each token's probability under the network's own
    softmax at T = 1 without penalty and filters, or None when not asked for. prompt_tokens: ids read, those of the
    state included.
    """

    index: int
    token_ids: list[int] = _Ids()
    logprobs: list[float] | None
    prompt_tokens: int
    finish_reason: str = ""
    error: str | None = None


def check_request(request: Request, network: Network, known_state: SequenceState | None = None) -> Tensor:
    """The prompt as a 1-D int64 tensor; ``ValueError`` says what is wrong. ``known_state`` was checked before."""
    config = network.config
    if (
        isinstance(request.max_new_tokens, bool)
        or not isinstance(request.max_new_tokens, int)
        or request.max_new_tokens < 0
    ):
        raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {request.max_new_tokens!r}")
    if not 0 < request.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be positive and finite (1 = off), got {request.repetition_penalty}")
    if request.window is not None and config.state != "window":
        raise ValueError(f"window={request.window} needs a network with state='window', this one carries its state")
    if request.window is not None and request.window < 1:
        raise ValueError(f"window must be at least 1, got {request.window}")
    for name in ("seed", "sequence"):
        if not -(2**63) <= getattr(request, name) < 2**64:
            raise ValueError(f"{name} must fit in 64 bits, got {getattr(request, name)}")
    if request.state is not None and isinstance(request.prompt, Sequence) and not request.prompt:
        prompt = _NO_IDS
    else:
        prompt = torch.as_tensor(request.prompt, dtype=torch.int64).reshape(-1).cpu()
    if len(prompt) == 0 and request.state is None:
        raise ValueError("a request needs a prompt of at least one id, or a state to start from")
    if len(prompt) and not (0 <= int(prompt.min()) and int(prompt.max()) < config.vocab_size):
        wrong = prompt[(prompt < 0) | (prompt >= config.vocab_size)][0]
        raise ValueError(f"prompt ids must be in 0 .. {config.vocab_size - 1}, got {int(wrong)}")
    if request.state is not None:
        if request.state is not known_state:
            request.state.check(network)
        window = (request.window or config.window or 0) if config.state == "window" else 0
        if len(request.state.tail) < min(window, request.state.length):
            raise ValueError(
                f"this state keeps the last {len(request.state.tail)} of {request.state.length} ids, too few "
                f"for a window of {window}: prefill with window={window}"
            )
    return prompt


def signed(number: int) -> int:
    """The 64 bits of an integer read as int64."""
    return number - 2**64 if number >= 2**63 else number


class Taken(NamedTuple):
    """A request that a loop has taken, and its prompt as `check_request` gives it."""

    index: int
    request: Request
    prompt: Tensor

    @property
    def prompt_tokens(self) -> int:
        """Ids read before the first token is drawn."""
        return len(self.prompt) + (self.request.state.length if self.request.state else 0)

    def completion(self, finish_reason: str = "") -> Completion:
        """What comes of it, as yet without tokens."""
        return Completion(self.index, [], [] if self.request.logprobs else None, self.prompt_tokens, finish_reason)


class Pending:
    """A caller's requests in their order, each read and checked when it is taken."""

    def __init__(self, requests: Iterable[Request], network: Network) -> None:
        self.network, self.requests, self.count = network, iter(requests), 0
        self.exhausted = False  # there are no more
        self.known_state: SequenceState | None = None  # the last one that was checked: requests often share it

    def rows(self, most: int) -> int:
        """How many rows the requests fill, at least 1; reads so many ahead."""
        first = list(itertools.islice(self.requests, most))
        self.requests = itertools.chain(first, self.requests)
        return max(1, len(first))

    def take(self) -> Taken | None:
        """The next request, or None; `ValueError` for a bad one, which counts as taken."""
        request = None if self.exhausted else next(self.requests, None)
        if request is None:
            self.exhausted = True
            return None
        self.count += 1
        prompt = check_request(request, self.network, self.known_state)
        self.known_state = request.state
        return Taken(self.count - 1, request, prompt)

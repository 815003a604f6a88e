"""Batch generation on token ids, on whichever loop takes the network. It knows no text.

The rule: the tokens and log-probabilities of a request depend on (weights, precision, seed, request) alone, bit for
bit; not on the batch size, the order, the slot, the companions or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import backends
from .engine import Engine
from .graphed import DeviceNetwork, GraphedEngine
from .inference import Inference
from .native import NativeEngine, PackedNetwork
from .network import Network
from .request import Completion, Request, check_request
from .sequence import SequenceState

Runner = Inference | PackedNetwork | DeviceNetwork


def precision_of(dtype: torch.dtype | None, quantize: str | None) -> str:
    """``float32``, ``bfloat16`` or ``int8``: what a caller asks for with dtype= or quantize=.

    Raises:
        ValueError: another dtype or kind of quantization, or both at once.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be 'int8' or None, got {quantize!r}")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or None, got {dtype!r}")
    if quantize and dtype is not None:
        raise ValueError(f"give dtype= or quantize=, not both: got dtype={dtype} and quantize={quantize!r}")
    return quantize or str(dtype or torch.float32).removeprefix("torch.")


def make_runner(network: Network, *, dtype: torch.dtype | None = None, quantize: str | None = None) -> Runner:
    """The network's weights as they are now, ready to run: packed for the loop in C++ or in CUDA, in the tensors of the
    loop of Triton kernels, or for the loop in Python.

    dtype=torch.bfloat16 rounds the weights and quantize="int8" gives them 8 bits and a scale per row, with float32
    sums and state; None keeps the network's own numbers. `BackendRefusal` where no backend runs that.
    """
    precision, weight = precision_of(dtype, quantize), network.head.weight
    call = backends.Call(
        "generate", weight.device.type, weight.dtype, 1, 1, network.config.input_size, network.config.hidden_size,
        network.config.num_layers, precision=precision, vocabulary=network.config.vocab_size,
        window=network.config.state == "window", cell=network.config.cell,
    )  # fmt: skip
    backend = backends.choose(call).backend
    if backend in ("cpu", "cuda"):
        return PackedNetwork(network, precision, backend)
    return DeviceNetwork(network) if backend == "triton" else Inference(network)


def make_engine(
    runner: Runner, requests: Iterable[Request], batch_size: int | None = None, *, events: bool = True
) -> Engine | NativeEngine | GraphedEngine:
    """The loop of a runner. ``events``: whether the caller looks at each token as it comes."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(runner, PackedNetwork):
        return NativeEngine(runner, requests, batch_size, events=events)
    if isinstance(runner, DeviceNetwork):
        return GraphedEngine(runner, requests, batch_size, events=events)
    return Engine(runner, requests, batch_size)


def generate(
    network: Network,
    requests: Iterable[Request],
    *,
    batch_size: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> Iterator[Completion]:
    """Run every request and yield its `Completion` as soon as it is done, so in the order in which they finish.

    ``requests`` is read a little ahead of the places that get free, so a million need no memory. ``on_token(index,
    token)`` is called for each token; True ends that row with finish_reason ``stop``. ``dtype`` and ``quantize`` as in
    `make_runner`. The network's training flag and gradients are left alone.
    """
    runner = make_runner(network, dtype=dtype, quantize=quantize)
    engine = make_engine(runner, requests, batch_size, events=on_token is not None)
    while engine.busy:
        events = engine.step()
        if on_token is not None:
            for index, token in events:
                if on_token(index, token):
                    engine.stop(index)
        yield from engine.take_completions()


def prefill(
    network: Network,
    prompt: Sequence[int] | Tensor,
    state: SequenceState | None = None,
    *,
    window: int | None = None,
    runner: Runner | None = None,
) -> SequenceState:
    """The state after reading ``prompt`` from ``state`` (or from nothing): same bits as a request's own prefill."""
    prompt = check_request(Request(prompt, 0, state=state, window=window), network)
    runner, config = runner or make_runner(network), network.config
    window = window or config.window
    seen = torch.zeros(config.vocab_size, dtype=torch.bool)
    seen[prompt] = True
    length = len(prompt)
    if state is not None:
        seen, length = seen | state.seen.cpu(), length + state.length
    hidden, logits, tail = runner.read(prompt, state, window)
    device = network.head.weight.device
    return SequenceState(hidden, logits, tail.to(device), seen.to(device), length)

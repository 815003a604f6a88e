"""The rivals of generation on a GPU: PyTorch's loop, and its step in a CUDA graph; and what a GPU could do at most.

A graph replays the step's kernels without a word from Python: of all that PyTorch offers the fastest way to generate.
It draws by the exponential race, for `torch.multinomial` waits for the GPU and cannot be captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import FIRST, CellStep, Peer, Step, Unavailable, eager, multinomial, race
from fastrnn import Network, NetworkConfig

MODELS = {
    "lstm 4x256 scalar V=65": NetworkConfig(65, input="scalar", hidden_size=256, num_layers=4),
    "gru 1x32 E=16 V=64": NetworkConfig(64, embedding_dim=16, cell="gru", hidden_size=32),
    "lstm 1x64 onehot V=82": NetworkConfig(82, input="onehot", hidden_size=64),
    "lstm 1x128 E=128 V=10000": NetworkConfig(10000, hidden_size=128),
    "lstm 3x512 onehot V=128": NetworkConfig(128, input="onehot", hidden_size=512, num_layers=3),
    "lstm 2x1024 onehot V=256": NetworkConfig(256, input="onehot", hidden_size=1024, num_layers=2),
}
BATCHES = (1, 1024, 64, 16384)  # in the order in which they are measured

# Tokens a second of all rows that an H100 allows at most, by rows. Estimates, none measured: at few rows from published
# latencies (cycles: shared memory 30, that of another multiprocessor 180 to 213, L2 265 to 280; a barrier of the grid
# 1.1 us), at many from the published rates of the tensor cores and of exponentials.
BOUNDS: dict[str, dict[int, float]] = {
    "lstm 4x256 scalar V=65": {1: 0.71e6, 64: 34e6, 1024: 110e6, 16384: 218e6},
    "gru 1x32 E=16 V=64": {1: 5.7e6, 64: 367e6, 1024: 3.9e9, 16384: 20e9},
    "lstm 1x64 onehot V=82": {1: 4.2e6, 64: 269e6, 1024: 3.2e9, 16384: 8.6e9},
    "lstm 1x128 E=128 V=10000": {1: 1.3e6, 64: 58e6, 1024: 200e6, 16384: 250e6},
    "lstm 3x512 onehot V=128": {1: 0.54e6, 64: 12.8e6, 1024: 52e6, 16384: 76e6},
    "lstm 2x1024 onehot V=256": {1: 0.68e6, 64: 10.6e6, 1024: 29e6, 16384: 31e6},
}

TOKENS_A_GRAPH = 16  # of the long graph; a short one of a single step does the rest


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """A call that replays what ``function`` does on the GPU, after the calls beside the graph that PyTorch asks for."""
    if not torch.cuda.is_available():
        raise Unavailable("a CUDA graph needs a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def graphed(network: Network, batch: int, dtype: str = "float32", cells: bool = False) -> Peer:
    """The step in CUDA graphs of 1 and of `TOKENS_A_GRAPH` steps; made of cells, or of PyTorch's fused RNN (cuDNN)."""
    step = (CellStep if cells else Step)(network, race).to(getattr(torch, dtype))
    device, state = network.head.weight.device, step.zero_state(batch)
    token = torch.full((batch,), FIRST, device=device)
    tokens = torch.zeros(TOKENS_A_GRAPH, batch, dtype=torch.int64, device=device)
    scores = torch.zeros(batch, network.config.vocab_size, device=device)

    def advance(steps: int) -> None:
        now, current, found = token, state, scores
        for t in range(steps):
            now, found, *current = step(now, *current)
            tokens[t].copy_(now)
        scores.copy_(found)
        for kept, new in zip((token, *state), (now, *current)):
            kept.copy_(new)

    with torch.no_grad():
        one, many = capture(lambda: advance(1)), capture(lambda: advance(TOKENS_A_GRAPH))

    def start() -> None:
        token.fill_(FIRST)
        for part in state:
            part.zero_()

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            start()
            for row in ids:
                token.copy_(row)
                one()
            return scores.clone()

    def run(number: int) -> Tensor:
        with torch.no_grad():
            start()
            found = []
            for _ in range(number // TOKENS_A_GRAPH):
                many()
                found.append(tokens.clone())
            for _ in range(number % TOKENS_A_GRAPH):
                one()
                found.append(tokens[:1].clone())
            return torch.cat(found)

    return Peer(dtype, logits, run)


PEERS: dict[str, Callable[[Network, int], Peer]] = {
    "eager": functools.partial(eager, draw=multinomial),
    "eager bfloat16": functools.partial(eager, dtype="bfloat16", draw=multinomial),
    "graphed": graphed,
    "graphed cells": functools.partial(graphed, cells=True),
    "graphed bfloat16": functools.partial(graphed, dtype="bfloat16"),
    "graphed cells bfloat16": functools.partial(graphed, dtype="bfloat16", cells=True),
}

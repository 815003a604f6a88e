"""Every GPU kernel once or twice at small shapes, for compute-sanitizer: forward, backward, single steps, draws, loops.

Sizes are no multiples of a tile, so that every mask is needed, and so large that a sequence takes each of its forms.
Prints how many calls it made; status 1 where a result is not finite.
"""

import sys

import torch

import fastrnn
from fastrnn import Network, NetworkConfig
from fastrnn.generate import generate
from fastrnn.request import Request

SHAPES = [(3, 3, 7, 20), (1, 5, 9, 33), (2, 17, 16, 70)]  # T, B, I, H


def layers(backend: str) -> int:
    """Calls made of every cell on one backend."""
    calls = 0
    for kind in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN):
        for dtype in (torch.float32, torch.bfloat16):
            for time, batch, inputs, hidden in SHAPES:
                layer = kind(inputs, hidden).to("cuda", dtype)
                x = torch.randn(time, batch, inputs, device="cuda", dtype=dtype, requires_grad=True)
                with fastrnn.backend(backend):
                    y = layer(x)[0]
                    y.square().sum().backward()
                if not (y.isfinite().all() and x.grad.isfinite().all()):
                    sys.exit(f"{backend} {kind.__name__} {dtype} {(time, batch, inputs, hidden)}: not finite")
                calls += 2
    return calls


def draws(backend: str) -> int:
    """Calls made of the draw on one backend."""
    shapes, options = ((1, 65), (3, 300), (2, 10000)), ({}, {"top_k": 5, "top_p": 0.9}, {"return_details": True})
    for batch, vocabulary in shapes:
        for chosen in options:
            with fastrnn.backend(backend):
                found = fastrnn.sample(torch.randn(batch, vocabulary, device="cuda"), seed=1, **chosen)
            token = found.token if "return_details" in chosen else found
            if not ((token >= 0) & (token < vocabulary)).all():
                sys.exit(f"{backend} draw {(batch, vocabulary)} {chosen}: {token.tolist()}")
    return len(shapes) * len(options)


def loops(backend: str) -> int:
    """Requests run by the generation loop on one backend, more than there are rows."""
    count = 0
    sizes = [("lstm", 20), ("gru", 20), ("rnn_tanh", 20)]
    # In CUDA: networks that take a cluster of multiprocessors, where there are such, and that no cluster holds.
    sizes += [("lstm", 150), ("gru", 460)]
    for cell, hidden in sizes:
        network = Network(NetworkConfig(70, embedding_dim=5, hidden_size=hidden, num_layers=2, cell=cell)).to("cuda")
        asked = [Request([1] * (1 + row), 6, sequence=row, logprobs=True) for row in range(11)]
        with fastrnn.backend(backend):
            done = list(generate(network, asked, batch_size=9))
        if [len(completion.token_ids) for completion in done] != [6] * len(asked):
            sys.exit(f"{backend} loop of {cell} {hidden}: {[completion.error for completion in done]}")
        count += len(done)
    return count


def main() -> None:
    torch.manual_seed(0)
    for backend, missing in fastrnn.backends.available().items():
        if backend in ("reference", "aten", "cpu") or missing is not None:
            continue
        for run in (layers, draws, loops):
            try:
                print(f"{backend} {run.__name__}: {run(backend)} calls", flush=True)
            except fastrnn.BackendRefusal as refusal:
                print(f"{backend} {run.__name__}: none: {refusal}", flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

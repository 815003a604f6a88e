"""What the tests of the generation loop in Triton share: small networks, requests, and how they are run."""

from __future__ import annotations

import pytest
import torch

import fastrnn
import oracle
from fastrnn import graphed
from fastrnn.engine import Engine
from fastrnn.generate import generate, make_runner
from fastrnn.graphed import DeviceNetwork
from fastrnn.inference import BLOCK_ROWS, Blocks, Inference
from fastrnn.network import Network, NetworkConfig
from fastrnn.request import Completion, Request
from fastrnn.sampling import SamplingParams

SAMPLING = [
    SamplingParams(temperature=0.8), SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1), SamplingParams(mode_of=3), SamplingParams(temperature=1.5, top_k=9, top_p=0.9),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several looks of the host in a short sequence; where kernels are interpreted, prompts are read in the least
    blocks, for which ones are safe would take minutes to measure."""
    monkeypatch.setattr(graphed, "SIZES", (2, 4))
    if not torch.cuda.is_available():
        monkeypatch.setattr(Inference, "_cell_blocks", lambda self, steps: Blocks((BLOCK_ROWS[-1],), 1))


def make(device: str, vocab: int = 11, dtype: torch.dtype = torch.float32, **options) -> Network:
    config = NetworkConfig(**{"vocab_size": vocab, "hidden_size": 10, "cell": "gru", **options})
    torch.manual_seed(1)
    network = Network(config)
    with torch.no_grad():
        network.head.weight.mul_(6)  # sharper than at birth, so that context matters
    return network.to(device, dtype)


def requests(count: int, vocab: int = 11, **options) -> list[Request]:
    """Requests with prompts of 1 to 3 ids and 1 to 7 tokens to draw."""
    chance = torch.Generator().manual_seed(7)
    return [
        Request(
            torch.randint(vocab, (1 + i % 3,), generator=chance),
            **{
                "max_new_tokens": 1 + 3 * i % 7,
                "sampling": SAMPLING[i % 2],
                "seed": 2**63 + i % 3,
                "sequence": i << 32,
                "logprobs": True,
                **options,
            },
        )
        for i in range(count)
    ]  # fmt: skip


def run(network: Network, asked: list[Request], **options) -> list[Completion]:
    with fastrnn.backend("triton"):
        done = list(generate(network, asked, **options))
    assert sorted(c.index for c in done) == list(range(len(asked)))
    return sorted(done, key=lambda c: c.index)


def in_python(network: Network, asked: list[Request]) -> list[Completion]:
    with fastrnn.backend("reference"):
        engine, done = Engine(Inference(network), asked), []
        while engine.busy:
            engine.step()
            done += engine.take_completions()
    return sorted(done, key=lambda c: c.index)


def assert_agree(found: list[Completion], expected: list[Completion], strays: int = 1) -> None:
    """The same but where rounding of the logits decides: in one sequence at most."""
    same = 0
    for a, b in zip(found, expected, strict=True):
        if a.token_ids == b.token_ids:
            same += 1
            assert (a.finish_reason, a.prompt_tokens, a.error) == (b.finish_reason, b.prompt_tokens, b.error)
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs:
                oracle.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs).double(), what="logprobs")
    assert same >= len(expected) - strays, "more sequences differ than rounding explains"


def make_runner_here(network: Network) -> DeviceNetwork:
    with fastrnn.backend("triton"):
        return make_runner(network)

"""The CUDA kernels of sample and generate: why they refuse without a GPU; on one, the draw and the loop against the
reference. tests/native/sanitize_cuda runs the same kernels on a CPU.
"""

import pytest
import torch
from draws import assert_same, draw, random_columns

import oracle
from fastrnn import backends
from fastrnn.extension import extension_missing
from fastrnn.generate import generate, make_runner, prefill
from fastrnn.native import PackedNetwork
from fastrnn.network import CELLS, INPUTS, Network, NetworkConfig
from fastrnn.request import Completion, Request
from fastrnn.sampling import SamplingParams

CALL = backends.Call("generate", "cuda", torch.float32, 1, 1, 65, 64, precision="float32", cell="lstm", vocabulary=65)


def make(device: str = "cpu", **options) -> Network:
    torch.manual_seed(1)
    config = {"vocab_size": 13, "hidden_size": 24, "num_layers": 2, "cell": "lstm", **options}
    return Network(NetworkConfig(**config)).to(device)


def requests(count: int, vocabulary: int = 13, state=None) -> list[Request]:
    chance = torch.Generator().manual_seed(7)
    return [
        Request(
            torch.randint(vocabulary, (1 + 3 * i % 29,), generator=chance), 1 + 11 * i % 40, SamplingParams(0.9),
            sequence=i, logprobs=True, state=state,
        )
        for i in range(count)
    ]  # fmt: skip


def run(network: Network, asked: list[Request], **options) -> list[Completion]:
    with backends.backend("cuda"):
        return sorted(generate(network, asked, **options), key=lambda c: c.index)


def check_log_probabilities(network: Network, asked: list[Request], done: list[Completion]) -> None:
    """Those of the tokens that were drawn, against the network in float64."""

    def replay(dtype: torch.dtype) -> torch.Tensor:
        copy = Network(network.config, dtype=dtype)
        copy.load_state_dict(network.state_dict())
        parts = []
        for request, completion in zip(asked, done):
            tokens = torch.tensor(completion.token_ids)
            logits, _ = copy(torch.cat([torch.as_tensor(request.prompt), tokens])[None, :-1])
            own = logits[0, -len(tokens) :].log_softmax(-1)
            parts.append(own.gather(-1, tokens[:, None])[:, 0])
        return torch.cat(parts).detach()

    actual = torch.cat([torch.tensor(completion.logprobs) for completion in done])
    with backends.backend("reference"):
        oracle.assert_close(actual, replay(torch.float64), replay(torch.float32))


@pytest.mark.parametrize("op", ["sample", "generate"])
def test_tensors_on_the_cpu_are_refused(op: str) -> None:
    refusal = backends.TABLE["cuda"].refuse(CALL._replace(op=op, device="cpu"))
    assert "run on CUDA GPUs, these tensors are on cpu" in refusal


def test_a_machine_that_lacks_something_says_what() -> None:
    missing = backends.available()["cuda"]
    if missing is None:
        pytest.skip("this machine lacks nothing; one without a GPU runs this")
    assert backends.TABLE["cuda"].refuse(CALL) == missing
    choice = backends.automatic(CALL)
    assert (choice.backend, choice.refusals) == ("triton", (("cuda", missing),))


@pytest.mark.skipif("FASTRNN_CUDA" in (backends.available()["cuda"] or ""), reason="needs FASTRNN_CUDA=1 when building")
@pytest.mark.skipif(extension_missing() is not None, reason="needs the C++ extension (make build)")
def test_what_runs_a_network_is_known_without_a_gpu() -> None:
    refusal, way = torch.ops.fastrnn_cuda.generator_refusal, torch.ops.fastrnn_cuda.generator_way
    hopper, ampere = (227 << 10) - 1024, (163 << 10) - 1024
    for cell, precision, layers, hidden, vocabulary in [
        ("gru", "float32", 1, 32, 64), ("lstm", "float32", 1, 64, 82), ("lstm", "bfloat16", 1, 128, 65)
    ]:  # fmt: skip
        assert refusal(cell, precision, layers, hidden, vocabulary, hopper, 1) == ""
        assert way(cell, precision, layers, hidden, vocabulary, hopper, 1) == "cta"
    for layers, hidden, vocabulary in [(4, 256, 65), (1, 128, 10_000)]:
        assert way("lstm", "bfloat16", layers, hidden, vocabulary, hopper, 16) == "cluster"
        assert way("lstm", "bfloat16", layers, hidden, vocabulary, ampere, 1) == "steps"
        assert way("lstm", "float32", layers, hidden, vocabulary, hopper, 16) == "steps"
    for layers, hidden, vocabulary in [(3, 512, 128), (2, 1024, 256), (8, 4096, 200_000)]:
        assert refusal("lstm", "bfloat16", layers, hidden, vocabulary, ampere, 1) == ""
        assert way("lstm", "bfloat16", layers, hidden, vocabulary, hopper, 16) == "steps"
    assert "a draw from V=16777216 tokens needs" in refusal("gru", "bfloat16", 1, 64, 1 << 24, hopper, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [1, 2, 65, 256, 257, 4097, 200_000])
def test_the_draw_is_the_reference_bit_for_bit(vocabulary: int) -> None:
    rows = 64 if vocabulary < 10_000 else 8
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * 5
    logits[0, 0] = torch.nan
    columns = random_columns(rows, generator, filters=True)
    on_gpu = {name: column.cuda() for name, column in columns.items()}
    mask = torch.rand(rows, vocabulary, generator=generator) < 0.8
    for allowed in (None, mask, mask[:1]):
        for mode_of in (1, 9, 200):
            actual = draw("cuda", logits.cuda(), on_gpu, None if allowed is None else allowed.cuda(), mode_of)
            assert_same([part.cpu() for part in actual], draw("reference", logits, columns, allowed, mode_of))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_a_request_is_the_same_alone_and_in_any_company(cell: str, dtype: torch.dtype) -> None:
    network = make("cuda", cell=cell)
    asked = requests(60)
    alone = run(network, asked, batch_size=1, dtype=dtype)
    assert run(network, asked, batch_size=400, dtype=dtype) == alone
    assert run(network, asked, batch_size=7, dtype=dtype, on_token=lambda index, token: None) == alone


@pytest.mark.gpu
def test_tokens_come_while_the_kernel_runs_each_once_and_in_order() -> None:
    """Long enough for many launches; of the rows that are stopped nothing is kept that was not looked at."""
    network = make("cuda", cell="gru", num_layers=1)
    asked = [Request([1 + i % 12], 5000 + i, sequence=i, logprobs=i % 2 == 0) for i in range(9)]
    whole, heard = run(network, asked), [[] for _ in asked]

    def listen(index: int, token: int) -> bool:
        heard[index].append(token)
        return index % 3 == 2 and len(heard[index]) == 777

    done = run(network, asked, on_token=listen, batch_size=4)
    for i, (full, completion) in enumerate(zip(whole, done, strict=True)):
        kept = 777 if i % 3 == 2 else len(full.token_ids)
        assert completion.token_ids == heard[i] == full.token_ids[:kept]
        assert completion.logprobs == (full.logprobs[:kept] if i % 2 == 0 else None)
        assert completion.finish_reason == ("stop" if i % 3 == 2 else "length")


# Networks that no multiprocessor of an H100 holds: some together do, or the whole GPU is needed, which any GPU has.
LARGE = {
    "gru": {"cell": "gru", "hidden_size": 130, "vocab_size": 65, "num_layers": 2, "dtype": torch.bfloat16},
    "float32": {"cell": "lstm", "hidden_size": 128, "vocab_size": 65, "num_layers": 1, "dtype": torch.float32},
    "lstm": {"cell": "lstm", "hidden_size": 250, "vocab_size": 70, "num_layers": 2, "dtype": torch.bfloat16},
    "words": {"cell": "lstm", "hidden_size": 100, "vocab_size": 5000, "num_layers": 1, "dtype": torch.bfloat16},
    "steps lstm": {"cell": "lstm", "hidden_size": 512, "vocab_size": 128, "num_layers": 3, "dtype": torch.bfloat16},
    "steps float32": {"cell": "gru", "hidden_size": 450, "vocab_size": 65, "num_layers": 2, "dtype": torch.float32},
    "steps words": {"cell": "lstm", "hidden_size": 600, "vocab_size": 900, "num_layers": 2, "dtype": torch.bfloat16},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_large_network_gives_a_request_the_same_in_any_company(name: str) -> None:
    options = dict(LARGE[name])
    dtype, vocabulary = options.pop("dtype"), options["vocab_size"]
    network = make("cuda", **options)
    asked = requests(60, vocabulary)
    alone = run(network, asked, batch_size=1, dtype=dtype)
    assert run(network, asked, batch_size=2000, dtype=dtype) == alone
    assert run(network, asked, batch_size=7, dtype=dtype, on_token=lambda index, token: None) == alone


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 520])
@pytest.mark.parametrize("cell", CELLS)
def test_log_probabilities_of_a_large_network_are_those_of_the_network(cell: str, hidden: int) -> None:
    network = make("cuda", cell=cell, hidden_size=hidden, num_layers=2 if cell == "lstm" else 4)
    asked = requests(20)
    check_log_probabilities(network, asked, run(network, asked, batch_size=8))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_log_probabilities_are_those_of_the_network(cell: str, kind: str) -> None:
    network = make("cuda", cell=cell, input=kind)
    asked = requests(20)
    check_log_probabilities(network, asked, run(network, asked, batch_size=8))


@pytest.mark.gpu
def test_a_prefix_that_was_read_once_gives_the_same_tokens() -> None:
    network = make("cuda", cell="gru")
    prefix = torch.arange(40) % 13
    with backends.backend("cuda"):
        runner = make_runner(network)
        assert isinstance(runner, PackedNetwork)
        assert runner.backend == "cuda"
        state = prefill(network, prefix, runner=runner)
    from_state = run(network, requests(9, state=state))
    whole = [Request(torch.cat([prefix, torch.as_tensor(r.prompt)]), r.max_new_tokens, r.sampling, sequence=r.sequence,
                     logprobs=True) for r in requests(9)]  # fmt: skip
    assert [(c.token_ids, c.logprobs) for c in run(network, whole)] == [(c.token_ids, c.logprobs) for c in from_state]

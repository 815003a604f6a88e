"""The generation loop in C++: its products against float64, its tokens against the loop in Python, its freedoms."""

import itertools

import pytest
import torch

import fastrnn
import oracle
from fastrnn.engine import Engine
from fastrnn.generate import generate, make_engine, make_runner, prefill
from fastrnn.inference import Inference
from fastrnn.likelihood import precision_cost
from fastrnn.native import NativeEngine, PackedNetwork
from fastrnn.network import CELLS, INPUTS, Network, NetworkConfig
from fastrnn.request import Completion, Request
from fastrnn.sampling import SamplingParams

pytestmark = pytest.mark.skipif(
    fastrnn.backends.available()["cpu"] is not None, reason="needs the C++ extension (make build)"
)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
PRECISIONS = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}


def make(vocab: int = 13, sharpen: float = 6, **options) -> Network:
    config = NetworkConfig(**{"vocab_size": vocab, "hidden_size": 24, "num_layers": 2, "cell": "lstm", **options})
    torch.manual_seed(1)
    network = Network(config)
    with torch.no_grad():
        network.head.weight.mul_(sharpen)
    return network


def requests(count: int, vocab: int = 13, most: int = 40, **options) -> list[Request]:
    chance = torch.Generator().manual_seed(7)
    sampling = SamplingParams(temperature=0.9)
    return [
        Request(
            torch.randint(vocab, (1 + 3 * i % 29,), generator=chance),
            **{"max_new_tokens": 1 + 11 * i % most, "sampling": sampling, "sequence": i, "logprobs": True, **options},
        )
        for i in range(count)
    ]


def run(network: Network, asked: list[Request], **options) -> list[Completion]:
    return sorted(generate(network, asked, **options), key=lambda c: c.index)


def replayed(network: Network, asked: list[Request], done: list[Completion], dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities of the drawn tokens by the reference in ``dtype``, all requests one after another."""
    config, parts = network.config, []
    double = Network(config, dtype=dtype)
    double.load_state_dict(network.state_dict())
    with torch.no_grad(), fastrnn.backend("reference"):
        for request, completion in zip(asked, done, strict=True):
            ids = [*torch.as_tensor(request.prompt).tolist(), *completion.token_ids]
            logits = double(torch.tensor([ids]))[0][0, len(request.prompt) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0])
    return torch.cat(parts)


def logprobs(done: list[Completion]) -> torch.Tensor:
    return torch.tensor([value for completion in done for value in completion.logprobs])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "cell"), list(itertools.product(INPUTS, CELLS)))
def test_log_probabilities_are_those_of_float64(isa: str, kind: str, cell: str, set_isa) -> None:
    set_isa(isa)
    for hidden, vocab, layers in ((7, 5, 1), (33, 70, 2), (64, 300, 1)):
        network = make(vocab, hidden_size=hidden, num_layers=layers, cell=cell, input=kind, sharpen=3)
        asked = requests(9, vocab)
        done = run(network, asked)
        assert [len(c.token_ids) for c in done] == [r.max_new_tokens for r in asked]
        exact, plain = (replayed(network, asked, done, dtype) for dtype in (torch.float64, torch.float32))
        oracle.assert_close(logprobs(done), exact, plain, f"H={hidden} V={vocab}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_weights_cost_what_bfloat16_costs(isa: str, cell: str, set_isa) -> None:
    """Held to the error of the reference that computes in bfloat16 throughout, on the same tokens."""
    set_isa(isa)
    for hidden, kind in ((33, "embedding"), (70, "onehot"), (64, "scalar")):
        network = make(40, hidden_size=hidden, cell=cell, input=kind, sharpen=2)
        asked = requests(12, 40)
        done = run(network, asked, dtype=torch.bfloat16)
        exact, plain = (replayed(network, asked, done, dtype) for dtype in (torch.float64, torch.bfloat16))
        oracle.assert_close(logprobs(done), exact, plain, f"H={hidden} {kind}")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_request_depends_on_nothing_beside_it(cell: str, precision: str) -> None:
    """Tokens and log-probabilities, bit for bit: batch sizes around the tiles', any order, one and two threads."""
    network = make(cell=cell, hidden_size=40)
    options = PRECISIONS[precision]
    asked = requests(150)
    expected = run(network, asked, **options)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(5)).tolist()
    threads = torch.get_num_threads()
    try:
        for batch, number in ((1, 1), (15, 1), (17, 2), (33, 1), (64, 2), (150, 2)):
            torch.set_num_threads(number)
            some = order if batch > 1 else order[:10]
            found = run(network, [asked[i] for i in some], batch_size=batch, **options)
            for place, i in enumerate(some):
                assert (found[place].token_ids, found[place].logprobs) == (
                    expected[i].token_ids, expected[i].logprobs,
                ), f"batch {batch}, {number} threads"  # fmt: skip
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("state", ["carried", "window"])
def test_one_sequence_of_a_large_network_on_two_threads(state: str) -> None:
    """Threads share the weights of one lane; the bits are those of one thread."""
    window = {"window": 20} if state == "window" else {}
    network = make(50, hidden_size=256, state=state, **window)
    asked = requests(3, 50)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(network, asked, batch_size=2)
        torch.set_num_threads(2)
        assert run(network, asked, batch_size=2) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("state", ["carried", "window"])
@pytest.mark.parametrize("cell", CELLS)
def test_draws_what_the_loop_in_python_draws(cell: str, state: str) -> None:
    """Every option of a request; a token may differ only where its margin is as small as the logits' difference."""
    window = {"window": 6} if state == "window" else {}
    network = make(30, cell=cell, state=state, **window)
    sampling = [
        SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=5), SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1), SamplingParams(mode_of=5), SamplingParams(temperature=1.5, top_k=9, top_p=0.9),
    ]  # fmt: skip
    asked = requests(40, 30, logprobs=False)
    for i, request in enumerate(asked):
        request.sampling, request.repetition_penalty = sampling[i % 7], (1.0, 1.3)[i % 2]
        request.eos, request.logprobs = frozenset([3, 7] if i % 3 else []), i % 5 > 0
    inference = Inference(network)
    with torch.no_grad():
        engine = Engine(inference, asked)
        done: list[Completion] = []
        while engine.busy:
            engine.step()
            done += engine.take_completions()
    expected = sorted(done, key=lambda c: c.index)
    found = run(network, asked, batch_size=16)
    same = sum(a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True))
    assert same >= 39, "more than one of 40 sequences differs: that is no rounding"
    for a, b in zip(found, expected, strict=True):
        if a.token_ids == b.token_ids:
            assert (a.finish_reason, a.prompt_tokens, a.error) == (b.finish_reason, b.prompt_tokens, b.error)
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs:
                oracle.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs).double(), what="logprobs")


def test_a_shared_state_is_a_start(tmp_path) -> None:
    network = make(cell="gru")
    prompt = torch.arange(13).repeat(5)
    state = prefill(network, prompt)
    whole = run(network, [Request(prompt, 20, sequence=i, logprobs=True) for i in range(20)])
    state.save(tmp_path / "state")
    state = type(state).load(tmp_path / "state")
    parts = run(network, [Request((), 20, sequence=i, state=state, logprobs=True) for i in range(20)], batch_size=7)
    assert [(c.token_ids, c.logprobs) for c in parts] == [(c.token_ids, c.logprobs) for c in whole]
    longer = prefill(network, [1, 2, 3], state)
    assert torch.equal(longer.logits, prefill(network, torch.cat([prompt, torch.tensor([1, 2, 3])])).logits)


def test_long_prompts_are_read_in_stretches() -> None:
    """Prompts beyond a stretch, several of different lengths at once, and the same one id by id."""
    network = make(cell="lstm", hidden_size=48)
    lengths = (1, 2, 700, 5000, 4999, 3)
    asked = [Request(torch.arange(n) * 7 % 13, 5, sequence=n, logprobs=True) for n in lengths]
    together = run(network, asked)
    for request, completion in zip(asked, together, strict=True):
        state = None
        for piece in torch.as_tensor(request.prompt).split(997):
            state = prefill(network, piece, state)
        request.prompt, request.state = (), state
        alone = run(network, [request])[0]
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


def test_stopped_requests_keep_what_was_looked_at() -> None:
    network, asked = make(), requests(30, most=200)
    whole = run(network, asked)
    counts: dict[int, int] = {}

    def stop_after_seven(index: int, token: int) -> bool:
        counts[index] = counts.get(index, 0) + 1
        assert whole[index].token_ids[counts[index] - 1] == token
        return counts[index] == 7

    done = sorted(generate(network, asked, on_token=stop_after_seven, batch_size=8), key=lambda c: c.index)
    for completion, full in zip(done, whole, strict=True):
        assert completion.token_ids == full.token_ids[:7]
        assert completion.logprobs == full.logprobs[:7]
        assert completion.finish_reason == ("stop" if len(full.token_ids) >= 7 else "length")


def test_ids_become_a_list_when_they_are_looked_at() -> None:
    first, second = run(make(), requests(2)), run(make(), requests(2))
    assert all(isinstance(vars(completion)["token_ids"], memoryview) for completion in first)
    assert first == second
    assert all(type(vars(completion)["token_ids"]) is list for completion in first)
    assert "memory" not in repr(run(make(), requests(2)))


def test_requests_before_a_bad_one_are_served() -> None:
    network, asked = make(), requests(6)
    engine = make_engine(make_runner(network), [*asked, Request([99], 1)], 3)
    done: list[Completion] = []

    def finish() -> None:
        while engine.busy:
            engine.step()
            done.extend(engine.take_completions())

    with pytest.raises(ValueError, match="prompt ids must be in 0"):
        finish()
    finish()
    assert sorted(completion.index for completion in done) == list(range(6))


def test_a_network_that_is_not_a_number_says_so() -> None:
    network = make()
    with torch.no_grad():
        network.rnn.weight_hh_l0[3, 2] = float("nan")
    for options in ({}, {"dtype": torch.bfloat16}):
        for completion in run(network, requests(5), **options):
            assert completion.finish_reason == "error"
            assert "NaN" in completion.error


def test_calls_are_short_whatever_the_work() -> None:
    """A call returns soon enough for Ctrl-C: it stops between steps and in the middle of a long prompt."""
    network = make(hidden_size=256, num_layers=3)
    endless = Request(torch.zeros(100_000, dtype=torch.int64), 10**9)
    engine = NativeEngine(PackedNetwork(network), [endless], events=False)
    for _ in range(5):
        engine.step()
        assert not engine.take_completions()
        assert engine.busy


def test_who_runs_a_network() -> None:
    network = make()
    assert isinstance(make_runner(network), PackedNetwork)
    assert isinstance(make_engine(make_runner(network), []), NativeEngine)
    assert isinstance(make_runner(network.double()), Inference)
    network.float()
    with fastrnn.backend("reference"):
        assert isinstance(make_runner(network), Inference)
        with pytest.raises(fastrnn.BackendRefusal, match="own weights"):
            make_runner(network, dtype=torch.bfloat16)
    with pytest.raises(fastrnn.BackendRefusal, match="float64"), fastrnn.backend("cpu"):
        make_runner(network.double())
    explanation = str(fastrnn.explain(lambda: list(generate(network.float(), [Request([1], 2)]))))
    assert "generate cpu float32" in explanation
    assert "the whole loop runs in C++" in explanation


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": torch.float16}, "dtype must be torch.float32, torch.bfloat16 or None, got torch.float16"),
        ({"quantize": "int4"}, "quantize must be 'int8' or None, got 'int4'"),
        ({"quantize": "int8", "dtype": torch.bfloat16}, "not both"),
    ],
)
def test_bad_precisions_are_refused(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        run(make(), requests(1), **options)


def test_fewer_bits_cost_little_and_are_counted() -> None:
    """bfloat16 and int8 of a network that is sure of its next token; weights of its own cost nothing."""
    network = make(60, hidden_size=64, sharpen=8)
    costs = {name: precision_cost(network, **options) for name, options in PRECISIONS.items()}
    assert abs(costs["float32"]) < 1e-5
    assert all(1e-7 < abs(costs[name]) < 0.01 for name in ("bfloat16", "int8"))

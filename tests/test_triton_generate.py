"""The generation loop on a GPU against the loop in Python: on a GPU with its graphs, else in Triton's interpreter.

The networks are small and the sequences short, for an interpreted program takes a millisecond.
"""

import itertools

import pytest
import torch
from loop_cases import SAMPLING, assert_agree, in_python, make, make_runner_here, requests, run, small_runs  # noqa: F401
from triton_cases import NEEDED, runs_here

import fastrnn
import oracle
from fastrnn import backends, gpu
from fastrnn.generate import generate, make_engine, prefill
from fastrnn.graphed import DeviceNetwork, GraphedEngine, tokens_at_once
from fastrnn.network import CELLS, INPUTS
from fastrnn.request import Completion, Request
from fastrnn.sampling import STATUS_TEXTS

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

from fastrnn.kernels import generate as kernels

# NumPy, on which the interpreter computes, warns of -inf - -inf, which is meant, and of what idle rows hold.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

@pytest.mark.parametrize(("kind", "cell"), list(itertools.product(INPUTS, CELLS)))
def test_draws_what_the_loop_in_python_draws(device: str, kind: str, cell: str) -> None:
    network = make(device, input=kind, cell=cell, num_layers=2 if kind == "embedding" else 1)
    asked = requests(5)
    assert_agree(run(network, asked, batch_size=4), in_python(network, asked))


@pytest.mark.parametrize("kind", ["embedding", "scalar"])
def test_inputs_whose_products_are_too_many_to_keep(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TABLE_BYTES", 0)
    for cell in ("lstm", "gru", "rnn_tanh"):
        network = make(device, input=kind, cell=cell)
        assert make_runner_here(network).weights.layers[0].w_ih is not None
        assert_agree(run(network, requests(4)), in_python(network, requests(4)))


def test_every_option_of_a_request(device: str) -> None:
    network = make(device)
    asked = requests(14)
    for i, request in enumerate(asked):
        request.sampling, request.repetition_penalty = SAMPLING[i % 7], (1.0, 1.4)[i % 2]
        request.eos, request.logprobs = frozenset([3, 7, 8] if i % 3 else []), i % 5 > 0
    found = run(network, asked, batch_size=4)
    assert_agree(found, in_python(network, asked))
    assert {completion.finish_reason for completion in found} == {"eos", "length"}
    for i in (0, 1, 2, 5, 8):  # a plain draw, greedy with a penalty, a filter, a vote, greedy
        alone = run(network, [asked[i]])[0]
        assert (alone.token_ids, alone.logprobs) == (found[i].token_ids, found[i].logprobs)


@pytest.mark.parametrize("vocab", [1, 300])
def test_vocabularies_of_one_id_and_of_two_tiles(device: str, vocab: int) -> None:
    network = make(device, vocab, cell="rnn_relu")
    asked = requests(4, vocab)
    asked[3].sampling, asked[2].repetition_penalty = SAMPLING[2], 1.3
    found = run(network, asked, batch_size=2)
    assert_agree(found, in_python(network, asked))
    plain = run(network, asked[:2])
    assert [(c.token_ids, c.logprobs) for c in plain] == [(c.token_ids, c.logprobs) for c in found[:2]]


def test_a_request_depends_on_nothing_beside_it(device: str) -> None:
    """Tokens and log-probabilities, bit for bit, alone, in blocks of rows that are not full, in any order."""
    network = make(device, cell="lstm")
    asked = requests(18)
    for i, request in enumerate(asked):
        request.max_new_tokens = 1 + i % 3
    expected = run(network, asked)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(5)).tolist()
    for batch, some in ((1, order[:4]), (3, order), (17, order)):
        found = run(network, [asked[i] for i in some], batch_size=batch)
        for place, i in enumerate(some):
            assert found[place].token_ids == expected[i].token_ids, f"batch size {batch}"
            assert found[place].logprobs == expected[i].logprobs, f"batch size {batch}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probabilities_of_networks_in_halves(device: str, dtype: torch.dtype) -> None:
    network = make(device, dtype=dtype, cell="lstm")
    asked = requests(4)
    done, parts = run(network, asked), {torch.float64: [], dtype: []}
    for found, logs in parts.items():
        other = make(device, dtype=dtype, cell="lstm").to(found)
        with torch.no_grad(), fastrnn.backend("reference"):
            for request, completion in zip(asked, done, strict=True):
                ids = torch.tensor([[*request.prompt.tolist(), *completion.token_ids]], device=device)
                logits = other(ids)[0][0, len(request.prompt) - 1 : -1]
                drawn = torch.tensor(completion.token_ids, device=device)
                logs.append(logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0])
    exact, plain = (torch.cat(logs).cpu() for logs in parts.values())
    found = torch.tensor([value for completion in done for value in completion.logprobs])
    oracle.assert_close(found, exact, plain, "logprobs")


def test_eos_ends_a_row_and_is_its_last_token(device: str) -> None:
    network = make(device)
    plain = run(network, requests(8, max_new_tokens=6))
    ended = run(network, requests(8, max_new_tokens=6, eos=frozenset([2, 4, 9])), batch_size=3)
    assert any(c.finish_reason == "eos" for c in ended)
    for free, stopped in zip(plain, ended, strict=True):
        ends = [k for k, token in enumerate(free.token_ids) if token in (2, 4, 9)]
        assert stopped.token_ids == (free.token_ids[: ends[0] + 1] if ends else free.token_ids)
        assert stopped.finish_reason == ("eos" if ends else "length")
        assert stopped.logprobs == free.logprobs[: len(stopped.token_ids)]


def test_lengths_from_nothing_on(device: str) -> None:
    asked = [Request([1, 2], n, sequence=n) for n in (0, 1, 5, 0, 2)]
    done = run(make(device), asked, batch_size=2)
    assert [len(c.token_ids) for c in done] == [0, 1, 5, 0, 2]
    assert all((c.finish_reason, c.prompt_tokens, c.logprobs) == ("length", 2, None) for c in done)


def test_a_state_is_a_start(device: str) -> None:
    """Bit for bit the prompt itself, also where more of the prompt follows."""
    network = make(device, cell="lstm")
    prompt, options = [1, 2, 3], {"max_new_tokens": 4, "logprobs": True, "repetition_penalty": 1.3}
    direct = run(network, [Request(prompt, sequence=i, **options) for i in range(4)])
    with fastrnn.backend("triton"):
        whole, part = prefill(network, prompt), prefill(network, prompt[:2])
    shared = run(network, [Request([], sequence=i, state=whole, **options) for i in range(4)], batch_size=3)
    longer = run(network, [Request(prompt[2:], sequence=i, state=part, **options) for i in range(4)])
    assert shared == direct
    assert_agree(longer, direct, strays=0)


def test_the_callback_sees_every_token_and_can_stop_a_row(device: str) -> None:
    network, seen = make(device), {}
    whole = run(network, requests(7, max_new_tokens=6))

    def on_token(index: int, token: int) -> bool:
        seen.setdefault(index, []).append(token)
        return len(seen[index]) == 3 and index != 1

    done = run(network, requests(7, max_new_tokens=6), batch_size=2, on_token=on_token)
    assert [c.token_ids for c in done] == [seen[i] for i in range(7)]
    for completion, full in zip(done, whole, strict=True):
        many = 6 if completion.index == 1 else 3
        assert completion.token_ids == full.token_ids[:many]
        assert completion.logprobs == full.logprobs[:many]
        assert completion.finish_reason == ("length" if completion.index == 1 else "stop")


def test_requests_before_a_bad_one_are_served(device: str) -> None:
    engine = make_engine(make_runner_here(make(device)), [*requests(3), Request([99], 1), *requests(1)], 2)
    done: list[Completion] = []

    def finish() -> None:
        while engine.busy:
            list(engine.step())
            done.extend(engine.take_completions())

    with pytest.raises(ValueError, match="prompt ids must be in 0"):
        finish()
    finish()
    assert sorted(completion.index for completion in done) == [0, 1, 2, 4]


def test_a_network_that_is_not_a_number_says_so(device: str) -> None:
    """The rows of good requests, with states of their own, are not touched."""
    network = make(device)
    with fastrnn.backend("triton"):
        state = prefill(network, [1])
    bad = type(state)(state.hidden * float("nan"), state.logits, state.tail, state.seen, state.length)
    alone = run(network, [Request([], 4, state=state)])[0]
    done = run(network, [Request([], 4, state=bad, logprobs=True), Request([], 4, state=state)])
    assert (done[0].finish_reason, done[0].token_ids, done[0].logprobs) == ("error", [], [])
    assert done[0].error == "token 0 cannot be drawn: " + STATUS_TEXTS[1]
    assert done[1].token_ids == alone.token_ids


def test_requests_are_read_only_as_places_get_free(device: str) -> None:
    network, taken = make(device), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Request([1], 2, sequence=taken)

    with fastrnn.backend("triton"):
        source = generate(network, endless(), batch_size=2)
        assert len([next(source) for _ in range(5)]) == 5
    assert taken <= 20


@pytest.mark.gpu
def test_a_graph_draws_what_launches_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for graphs of every kind of draw, which are used more than once."""
    network = make("cuda", cell="lstm", hidden_size=40, num_layers=2)
    sampling = [SAMPLING[:2], SAMPLING]
    for kinds in sampling:
        asked = requests(40, max_new_tokens=30)
        for i, request in enumerate(asked):
            request.sampling, request.repetition_penalty = kinds[i % len(kinds)], 1.0 + (i % 2) * (len(kinds) - 2)
        engine, done = make_engine(make_runner_here(network), asked, 8, events=False), []
        while engine.busy:
            engine.step()
            done += engine.take_completions()
        assert engine.loop.graphs
        with monkeypatch.context() as patch:
            patch.setattr(kernels.Loop, "run", kernels.Loop._launch)
            launched = run(network, asked, batch_size=8)
        assert sorted(done, key=lambda c: c.index) == launched
        assert_agree(launched, in_python(network, asked))


# --- pure rules: no kernel runs below ---------------------------------------------------------------------------------


def test_how_many_tokens_the_host_waits_for() -> None:
    assert [tokens_at_once(n, False, True) for n in (1, 2, 3, 4, 5, 900)] == [2, 2, 4, 4, 4, 4]
    assert [tokens_at_once(n, True, True) for n in (1, 900)] == [2, 2]
    assert [tokens_at_once(n, False, False) for n in (1, 2, 3, 900)] == [2, 2, 4, 4]


def test_who_runs_a_network(monkeypatch) -> None:
    call = backends.Call("generate", "cuda", torch.float32, 1, 1, 8, 8)
    for way, order in [(None, ["cuda", "triton"]), ("cta", ["cuda", "triton"]), ("cluster", ["cuda", "triton"]),
                       ("steps", ["triton", "cuda"])]:  # fmt: skip
        monkeypatch.setattr(gpu, "loop_way", lambda call, way=way: way)
        assert [name for name, _ in backends.preference(call)] == [*order, "reference"]
    monkeypatch.undo()
    assert "run a window" not in (backends.TABLE["triton"].refuse(call) or "")
    assert "runs a window for each token" in backends.TABLE["triton"].refuse(call._replace(window=True))
    assert "bfloat16 weights" in backends.TABLE["triton"].refuse(call._replace(precision="bfloat16"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = make(device)
    assert isinstance(make_runner_here(network), DeviceNetwork)
    assert isinstance(make_engine(make_runner_here(network), []), GraphedEngine)
    with pytest.raises(fastrnn.BackendRefusal, match="not float64"):
        make_runner_here(network.double())
    with pytest.raises(fastrnn.BackendRefusal, match="a window for each token"):
        make_runner_here(make(device, state="window", window=3))

"""The generation loop against a plain PyTorch loop, and its rule: a request's tokens depend on nothing beside it."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastrnn
import oracle
from fastrnn import reference_sample
from fastrnn.engine import Engine
from fastrnn.generate import generate, prefill
from fastrnn.inference import ALONE, CHUNK_STEPS, Blocks, Inference, _measured, blocks, independent_blocks
from fastrnn.network import CELLS, INPUTS, Network, NetworkConfig
from fastrnn.request import Completion, Request
from fastrnn.sampling import SamplingParams
from fastrnn.sequence import SequenceState

V, H, WINDOW = 13, 8, 5
BACKENDS = ("reference", "aten", "cpu")
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}


def make(**options) -> Network:
    config = NetworkConfig(**{"vocab_size": V, "hidden_size": H, "num_layers": 2, "cell": "gru", **options})
    torch.manual_seed(1)
    network = Network(config)
    with torch.no_grad():
        network.head.weight.mul_(6)  # sharper than at birth, so that context matters
    return network


def requests(count: int, **options) -> list[Request]:
    """Requests with prompts of 1 to 11 ids and different lengths, parameters and seeds."""
    chance = torch.Generator().manual_seed(7)
    return [
        Request(
            torch.randint(V, (1 + i % 11,), generator=chance),
            **{
                "max_new_tokens": 3 + 5 * i % 17,
                "sampling": SamplingParams(temperature=(0.0, 0.7, 1.0, 1.5)[i % 4], top_k=i % 3 * 4, mode_of=1 + i % 2),
                "seed": 100 + i % 5,
                "sequence": i,
                "logprobs": True,
                **options,
            },
        )
        for i in range(count)
    ]


def run(network: Network, asked: list[Request], **options) -> list[Completion]:
    done = list(generate(network, asked, **options))
    assert sorted(c.index for c in done) == list(range(len(asked)))
    return sorted(done, key=lambda c: c.index)


def plain_logits(network: Network, ids: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits after ids by torch.nn's own layers from a zero state, all ids at once."""
    config = network.config
    options = {"nonlinearity": config.cell[4:]} if config.cell.startswith("rnn") else {}
    rnn = KINDS[config.cell](config.input_size, H, config.num_layers, batch_first=True, **options).to(dtype)
    rnn.load_state_dict(network.rnn.state_dict())
    tensor = torch.tensor([ids[-config.window :] if config.state == "window" else ids])
    if config.input == "embedding":
        x = network.embedding.weight.to(dtype)[tensor]
    else:
        x = F.one_hot(tensor, V).to(dtype) if config.input == "onehot" else (tensor.to(dtype) / V).unsqueeze(-1)
    with torch.no_grad():
        return F.linear(rnn(x)[0][0, -1], network.head.weight.to(dtype), network.head.bias.to(dtype))


def draw(logits: torch.Tensor, request: Request, step: int) -> tuple[int, float]:
    """(token, margin) of the definition of a draw."""
    n = request.sampling.numbers()
    columns = [torch.tensor([value]) for value in (n.scale, n.top_k, n.top_p, n.min_p)]
    place = [torch.tensor([value]) for value in (request.seed, request.sequence, step)]
    token, _, _, margin, status = reference_sample.sample(
        logits.float()[None], *columns, None, *place, request.sampling.mode_of, True
    )
    assert int(status) == 0
    return int(token), float(margin)


@pytest.mark.parametrize(
    ("kind", "cell", "head", "state"),
    list(itertools.product(INPUTS, CELLS, ("all", "last"), ("carried", "window"))),
)
def test_equals_a_plain_loop_token_by_token(kind: str, cell: str, head: str, state: str) -> None:
    """A mismatch is forgiven only where the draw's own margin says that rounding of the logits decides it."""
    network = make(input=kind, cell=cell, head=head, state=state, window=WINDOW if state == "window" else None)
    compared = 0
    for request, completion in zip(*(lambda asked: (asked, run(network, asked)))(requests(5)), strict=True):
        ids = request.prompt.tolist()
        found = []
        for step, token in enumerate(completion.token_ids):
            exact = plain_logits(network, ids)
            expected, margin = draw(exact, request, step)
            assert token == expected or margin < 1e-4
            compared += token == expected
            logs = exact.log_softmax(-1)[token]
            found.append((logs, plain_logits(network, ids, torch.float32).log_softmax(-1)[token]))
            ids.append(token)
        expected_logs, plain_logs = (torch.stack(column) for column in zip(*found, strict=True))
        oracle.assert_close(torch.tensor(completion.logprobs), expected_logs, plain_logs, "logprobs")
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == request.max_new_tokens
        assert completion.prompt_tokens == len(request.prompt)
    assert compared >= 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cell", "state"), [("lstm", "carried"), ("gru", "carried"), ("gru", "window")])
def test_a_request_depends_on_nothing_beside_it(backend: str, cell: str, state: str) -> None:
    """Tokens and log-probabilities, bit for bit, at batch sizes 1 to 256, in shuffled orders and after refills."""
    if why := fastrnn.backends.available()[backend]:
        pytest.skip(f"needs backend {backend}: {why}")
    window = {"state": "window", "window": WINDOW} if state == "window" else {}
    network = make(cell=cell, hidden_size=19, input="embedding", **window)
    count = {"cpu": 300, "aten": 120, "reference": 18}[backend]  # the reference's draw takes milliseconds
    asked = requests(count)
    with fastrnn.backend(backend):
        expected = run(network, asked)
        for batch in (1, 3, 64, 256):
            some = asked[:12] if batch == 1 else asked
            assert run(network, some, batch_size=batch) == expected[: len(some)], f"batch size {batch}"
        order = torch.randperm(count, generator=torch.Generator().manual_seed(5)).tolist()
        shuffled = run(network, [asked[i] for i in order], batch_size=32)
    for place, i in enumerate(order):
        assert (shuffled[place].token_ids, shuffled[place].logprobs) == (expected[i].token_ids, expected[i].logprobs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "vocab"), [(19, 13), (64, 82), (33, 1000), (1024, 256)])
def test_state_and_logits_of_a_row_are_the_same_bits_anywhere(backend: str, hidden: int, vocab: int) -> None:
    if why := fastrnn.backends.available()[backend]:
        pytest.skip(f"needs backend {backend}: {why}")
    network = Network(NetworkConfig(vocab, hidden_size=hidden, embedding_dim=32, cell="lstm"))
    ids, hx = torch.randint(vocab, (1, 300)), tuple(torch.randn(1, 300, hidden) for _ in range(2))
    expected = None
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with fastrnn.backend(backend):
            inference = Inference(network)
            with inference.running():
                state = inference.advance(ids, hx)
                found = [*state, inference.logits(state)]
                for rows in ([0], [299, 7, 3], list(range(40, 105)), torch.randperm(300).tolist()):
                    some = inference.advance(ids[:, rows], tuple(s[:, rows] for s in hx))
                    assert all(torch.equal(a, b[:, rows]) for a, b in zip(some, state, strict=True))
                    assert torch.equal(inference.logits(some), found[-1][rows])
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{threads} threads"


def test_rows_whose_bits_depend_on_their_place_are_run_alone() -> None:
    """`independent_blocks` measures: a product that adds the row's number in the block must not be trusted."""
    table = torch.randn(64, 3)
    assert independent_blocks(("test", "good"), lambda rows: table[rows], 64) == Blocks((64, 16), 1)
    by_place = lambda rows: table[rows] + torch.arange(len(rows))[:, None] * 1e-6  # noqa: E731
    assert independent_blocks(("test", "place"), by_place, 64) == ALONE
    by_size = lambda rows: table[rows] * (1 + (len(rows) == 64) * 1e-6)  # noqa: E731
    assert independent_blocks(("test", "size"), by_size, 64) == Blocks((16,), 1)
    torch.set_num_threads(2)
    by_threads = lambda rows: table[rows] * torch.get_num_threads()  # noqa: E731
    assert independent_blocks(("test", "threads"), by_threads, 64) == Blocks((64, 16), 1)
    assert independent_blocks(("test", "two threads"), lambda rows: table[rows], 64) == Blocks((64, 16), 2)
    assert list(blocks(100, (64, 16))) == [(0, 64), (64, 16), (80, 16), (96, 16)]


def test_finished_rows_make_room_at_once() -> None:
    """Lengths 1 to 40: every step but the last few runs all rows, so the steps are close to tokens / rows."""
    network = make()
    asked = [Request([1], 1 + 7 * i % 40, sequence=i) for i in range(200)]
    engine = Engine(Inference(network), asked, 8)
    steps = rows = 0
    while engine.busy:
        rows += len(engine.step())
        steps += 1
        engine.take_completions()
    tokens = sum(request.max_new_tokens for request in asked)
    assert rows == tokens
    assert steps <= math.ceil(tokens / 8) + 40
    assert tokens / (8 * steps) > 0.9


def test_requests_are_read_only_as_places_get_free() -> None:
    network, taken = make(), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Request([1], 2, sequence=taken)

    source = generate(network, endless(), batch_size=4)
    first = [next(source) for _ in range(10)]
    assert len(first) == 10
    assert taken <= 32  # a little ahead, so that no row waits


def test_eos_ends_a_row_and_is_its_last_token() -> None:
    network = make()
    plain = run(network, requests(20, max_new_tokens=40))
    ended = run(network, requests(20, max_new_tokens=40, eos=frozenset([4, 9])), batch_size=3)
    assert any(c.finish_reason == "eos" for c in ended)
    for free, stopped in zip(plain, ended, strict=True):
        ends = [k for k, token in enumerate(free.token_ids) if token in (4, 9)]
        assert stopped.token_ids == (free.token_ids[: ends[0] + 1] if ends else free.token_ids)
        assert stopped.finish_reason == ("eos" if ends else "length")
        assert stopped.logprobs == free.logprobs[: len(stopped.token_ids)]


def test_the_callback_sees_every_token_and_can_stop_a_row() -> None:
    network, seen = make(), {}

    def on_token(index: int, token: int) -> bool:
        seen.setdefault(index, []).append(token)
        return index == 2 and len(seen[2]) == 4

    done = run(network, requests(6, max_new_tokens=9), batch_size=2, on_token=on_token)
    assert [c.token_ids for c in done] == [seen[i] for i in range(6)]
    assert [c.finish_reason for c in done] == ["length", "length", "stop", "length", "length", "length"]
    assert len(done[2].token_ids) == 4


def test_an_interrupt_leaves_nothing_behind() -> None:
    network, asked = make().train(), requests(6)
    expected, threads = run(network, asked), torch.get_num_threads()

    def interrupt(index: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate(network, asked, on_token=interrupt))
    assert network.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == threads
    assert run(network, asked) == expected
    assert all(p.grad is None for p in network.parameters())
    network(torch.zeros(1, 2, dtype=torch.int64))[0].sum().backward()


def test_generation_ignores_dropout_and_leaves_random_state_alone() -> None:
    network = make(dropout=0.5).train()
    before = torch.get_rng_state()
    trained = run(network, requests(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert run(network.eval(), requests(4)) == trained


def test_no_tokens_asked_is_no_tokens_given() -> None:
    done = run(make(), [Request([1, 2], 0), Request([1], 2)])
    assert (done[0].token_ids, done[0].finish_reason, done[0].prompt_tokens) == ([], "length", 2)
    assert len(done[1].token_ids) == 2


@pytest.mark.parametrize("state", ["carried", "window"])
def test_a_state_is_a_value(state: str, tmp_path) -> None:
    """Prefill, then many samples = the prompt itself, bit for bit; also saved and read again, and never changed."""
    network = make(cell="lstm", state=state, window=WINDOW if state == "window" else None)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    kept = prefill(network, prompt)
    assert kept.length == 7
    assert not kept.logits.is_inference()
    assert not kept.logits.requires_grad
    copy = [kept.logits.clone(), kept.tail.clone(), kept.seen.clone()]
    kept.save(tmp_path / "state.safetensors")
    read = SequenceState.load(tmp_path / "state.safetensors")
    options = {"max_new_tokens": 9, "logprobs": True, "repetition_penalty": 1.3}
    direct = run(network, [Request(prompt, sequence=i, **options) for i in range(20)])
    for value in (kept, read):
        shared = run(network, [Request([], sequence=i, state=value, **options) for i in range(20)], batch_size=7)
        assert shared == direct
    assert all(torch.equal(a, b) for a, b in zip(copy, [kept.logits, kept.tail, kept.seen], strict=True))
    longer = prefill(network, [8, 9], kept)
    exact = plain_logits(network, [*prompt, 8, 9])
    oracle.assert_close(longer.logits, exact, plain_logits(network, [*prompt, 8, 9], torch.float32))
    assert longer.length == 9


def test_long_prompts_of_different_lengths_equal_plain_pytorch() -> None:
    network = make(cell="lstm")
    lengths = [1, 2, 3, 31, 32, 33, 1000, CHUNK_STEPS, CHUNK_STEPS + 1, 3 * CHUNK_STEPS + 77]
    prompts = [torch.randint(V, (n,)) for n in lengths]
    done = run(network, [Request(p, 1, SamplingParams(temperature=0), logprobs=True) for p in prompts])
    for prompt, completion in zip(prompts, done, strict=True):
        exact = plain_logits(network, prompt.tolist())
        assert completion.token_ids == [int(exact.argmax())]
        plain = plain_logits(network, prompt.tolist(), torch.float32).log_softmax(-1).max()
        oracle.assert_close(torch.tensor(completion.logprobs[0]), exact.log_softmax(-1).max(), plain)


def test_repetition_penalty_acts_on_ids_that_have_occurred() -> None:
    """Hugging Face's rule; the log-probabilities stay those of the network itself."""
    network = make()
    request = Request([1, 2, 3], 12, SamplingParams(temperature=0), repetition_penalty=1.8, logprobs=True)
    alone, [_, beside] = run(network, [request]), run(network, [Request([5], 3), request])
    assert alone[0].token_ids == beside.token_ids
    ids = [1, 2, 3]
    for token, log in zip(alone[0].token_ids, alone[0].logprobs, strict=True):
        logits = plain_logits(network, ids)
        changed = logits.clone()
        seen = torch.tensor(sorted(set(ids)))
        changed[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        assert token == int(changed.argmax())
        plain = plain_logits(network, ids, torch.float32).log_softmax(-1)
        oracle.assert_close(torch.tensor(log), logits.log_softmax(-1)[token], plain[token])
        ids.append(token)
    assert alone[0].token_ids != run(network, [Request([1, 2, 3], 12, SamplingParams(temperature=0))])[0].token_ids


def test_nan_ends_its_row_and_no_other() -> None:
    network = make()
    asked = requests(5)
    good = run(network, asked)
    broken = prefill(network, [1])
    broken.logits.fill_(math.nan)
    mixed = run(network, [*asked[:2], Request([], 4, state=broken), *asked[2:]], batch_size=3)
    bad = mixed.pop(2)
    assert bad.finish_reason == "error"
    assert "NaN" in bad.error
    assert bad.token_ids == []
    assert [(c.token_ids, c.logprobs) for c in mixed] == [(c.token_ids, c.logprobs) for c in good]
    with torch.no_grad():
        network.head.weight[3, 2] = math.nan
    _measured.clear()
    done = run(network, asked, batch_size=2)
    assert run(make(), asked) == good, "what is measured about the machine does not come from broken weights"
    assert all(c.finish_reason == "error" and c.error.startswith("token 0 cannot be drawn: NaN") for c in done)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], -1), "max_new_tokens must be a whole number of at least 0, got -1"),
        (Request([1], 2.5), "max_new_tokens"),
        (Request([], 3), "prompt of at least one id"),
        (Request([1, V], 3), f"prompt ids must be in 0 .. {V - 1}, got {V}"),
        (Request([-2], 3), "got -2"),
        (Request([1], 3, repetition_penalty=0.0), "repetition_penalty must be positive"),
        (Request([1], 3, seed=2**64), "seed must fit in 64 bits"),
        (Request([1], 3, window=4), "needs a network with state='window'"),
    ],
)
def test_bad_requests_say_what_is_wrong(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(generate(make(), [request_]))


def test_a_state_of_another_network_or_a_foreign_file_is_refused(tmp_path) -> None:
    state = prefill(make(), [1])
    with pytest.raises(ValueError, match="another network"):
        list(generate(make(num_layers=1), [Request([], 1, state=state)]))
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no state file"):
        SequenceState.load(path)
    state.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        SequenceState.load(path)


def test_a_window_given_with_the_request_replaces_the_config_s() -> None:
    """The Shakespeare notebook trains on windows of 100 and generates with one as long as its prompt."""
    narrow, wide = make(state="window", window=2), make(state="window", window=7)
    asked = requests(8)
    expected = run(wide, asked)
    assert run(narrow, asked) != expected
    assert run(narrow, requests(8, window=7)) == expected
    state = prefill(narrow, [1, 2, 3, 4, 5, 6], window=7)
    assert state.tail.tolist() == [1, 2, 3, 4, 5, 6]
    shared = run(narrow, [Request([], 9, state=state, window=7)])[0].token_ids
    assert shared == run(wide, [Request([1, 2, 3, 4, 5, 6], 9)])[0].token_ids
    with pytest.raises(ValueError, match="keeps the last 2 of 3 ids, too few for a window of 7: prefill with window=7"):
        run(narrow, [Request([], 9, state=prefill(narrow, [1, 2, 3]), window=7)])


def test_float64_networks_and_batch_size_zero() -> None:
    network = make().double()
    assert len(run(network, requests(3))) == 3
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        list(generate(network, requests(1), batch_size=0))

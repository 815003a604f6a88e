"""A loop in Triton and its graphs serve one generation after another: what is kept, what is noticed, what goes."""

import contextlib
import gc
import weakref

import pytest
import torch
from loop_cases import assert_agree, in_python, make, make_runner_here, requests, run, small_runs  # noqa: F401
from triton_cases import NEEDED, runs_here

import fastrnn
from fastrnn import graphed
from fastrnn.generate import generate, make_engine
from fastrnn.network import Network

if not runs_here():
    pytest.skip(NEEDED, allow_module_level=True)

from fastrnn.kernels import generate as kernels

# NumPy, on which the interpreter computes, warns of -inf - -inf, which is meant, and of what idle rows hold.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Loop]:
    """The loops that are made from here on."""
    loops, init = [], kernels.Loop.__init__

    def spied(self, *args, **options) -> None:
        init(self, *args, **options)
        loops.append(self)

    monkeypatch.setattr(kernels.Loop, "__init__", spied)
    return loops


class Graph:
    """A CUDA graph as far as the loop knows it, of launches that run elsewhere: captured once, run by each replay."""

    now: "Graph | None" = None  # being captured
    captured = 0

    def replay(self) -> None:
        self.launches()

    @contextlib.contextmanager
    def capture(self, **options):
        Graph.now, Graph.captured = self, Graph.captured + 1
        yield
        Graph.now = None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Has loops capture and replay graphs, on a machine without a GPU too."""
    launch, init = kernels.Loop._launch, kernels.Loop.__init__

    def graphed_from_here(loop: kernels.Loop, *args, **options) -> None:
        init(loop, *args, **options)
        loop.graphed = True

    def launched_or_captured(loop: kernels.Loop, tokens: int, kind: kernels.Kind) -> None:
        if Graph.now is None:
            launch(loop, tokens, kind)
        else:
            Graph.now.launches = lambda: launch(loop, tokens, kind)

    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels.Loop, "__init__", graphed_from_here)
        monkeypatch.setattr(kernels.Loop, "_launch", launched_or_captured)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph.capture(**options))
    return Graph


def kept(network: Network) -> list[kernels.Loop]:
    return list(graphed._idle.get(network, {}).values())


def test_a_second_generation_replays_the_graphs_of_the_first(device: str, made: list, graphs: type[Graph]) -> None:
    network = make(device, cell="lstm")
    asked = requests(4, max_new_tokens=5)
    first = run(network, asked, batch_size=3)
    (loop,) = kept(network)
    known = dict(loop.graphs)
    assert known
    assert run(network, asked, batch_size=3) == first
    assert (made, kept(network), loop.graphs) == ([loop], [loop], known)
    run(network, asked, batch_size=2)
    run(network, asked[:2], batch_size=3)
    assert len(made) == 2, "two rows are another shape, whatever the batch size"
    assert_agree(first, in_python(network, asked))


def test_graphs_are_few_and_know_how_products_are_taken(
    device: str, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "KEPT_GRAPHS", 2)
    network = make(device)
    loop = make_runner_here(network).borrow(1, network)
    kinds = [kernels.Kind(modes=(mode,)) for mode in (1, 2, 3)]
    for kind in (*kinds, *kinds):  # the first time by launches
        loop.run(2, kind)
    assert [key[1] for key in loop.graphs] == kinds[1:]
    loop.run(2, kinds[1])
    loop.run(2, kinds[0])
    assert [key[1] for key in loop.graphs] == [kinds[1], kinds[0]]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        loop.run(2, kinds[0])  # by launches: these kernels are not compiled yet
        assert {key[2] for key in loop.graphs} == {"tf32x3"}
        loop.run(2, kinds[0])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert {key[2] for key in loop.graphs} == {"tf32x3", "tf32"}


def replace_head(network: Network) -> None:
    network.head.weight = torch.nn.Parameter(network.head.weight.detach() * -1)


CHANGES = {
    "in place": lambda network: network.head.weight.data.neg_(),
    "of what the table is made of": lambda network: network.embedding.weight.data.neg_(),
    "of a layer": lambda network: network.rnn.weight_hh_l0.data.mul_(-3),
    "by loading": lambda network: network.load_state_dict({k: v * -0.5 for k, v in network.state_dict().items()}),
    "by another parameter": replace_head,
    "of the dtype": lambda network: network.half().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_noticed(device: str, graphs: type[Graph], change) -> None:
    network = make(device)
    asked = requests(1, max_new_tokens=2)
    before = run(network, asked)
    change(network)
    after = run(network, asked)
    fresh = make(device)
    fresh.load_state_dict(network.state_dict())
    assert after == run(fresh, asked)
    assert after == run(network, asked)
    assert [c.logprobs for c in after] != [c.logprobs for c in before]


def test_generations_at_the_same_time_share_nothing(device: str, made: list, graphs: type[Graph]) -> None:
    """Each as if alone, though one starts while another is half done, and what they leave behind is used again."""
    network = make(device)
    asked = [requests(2, max_new_tokens=5), requests(2, max_new_tokens=5, seed=5)]
    alone = [run(network, some) for some in asked]
    engines = [make_engine(make_runner_here(network), some, events=False) for some in asked]
    assert engines[0].loop is not engines[1].loop
    assert engines[0].loop is made[0]
    done = [[], []]
    while any(engine.busy for engine in engines):
        for engine, completions in zip(engines, done, strict=True):
            engine.step()
            completions += engine.take_completions()
    assert [sorted(some, key=lambda c: c.index) for some in done] == alone
    del engine, engines
    assert len(kept(network)) == 1, "one of a shape"


def test_a_generation_that_is_given_up_leaves_nothing_behind(device: str, made: list, graphs: type[Graph]) -> None:
    """Not its rows, its queue, its ids that end a row, nor the ids that it has seen."""
    network = make(device)
    plain = requests(2, max_new_tokens=4)
    expected = run(network, plain)
    source = iter(requests(8, max_new_tokens=20, eos=frozenset([1, 2]), repetition_penalty=1.5))
    with fastrnn.backend("triton"):
        next(generate(network, source, batch_size=2))
    assert run(network, plain) == expected
    assert made == kept(network)


def test_generations_in_inference_mode_and_outside_of_it(device: str, graphs: type[Graph]) -> None:
    network = make(device)
    asked = requests(2, max_new_tokens=3)
    expected = run(network, asked)
    for _ in range(2):
        with torch.inference_mode():
            assert run(network, asked) == expected
        assert run(network, asked) == expected


def test_few_loops_are_kept_and_none_longer_than_its_network(device: str, made: list) -> None:
    network = make(device)
    for rows in range(1, graphed.KEPT_LOOPS + 3):
        run(network, requests(rows, max_new_tokens=1))
    assert [loop.used for loop in kept(network)] == [3, 4, 5, 6]
    gone = [weakref.ref(loop) for loop in made]
    made.clear()
    del network
    gc.collect()
    assert not [loop for loop in gone if loop() is not None]

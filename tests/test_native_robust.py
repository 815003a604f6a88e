"""What the generation loop in C++ refuses: numbers that would be places outside its memory, or rows without end."""

import subprocess
import sys

import pytest
import torch
from draws import needs_cpu

from fastrnn import backends
from fastrnn.generate import generate, make_runner, prefill
from fastrnn.native import PackedNetwork
from fastrnn.network import Network, NetworkConfig
from fastrnn.request import Request

pytestmark = needs_cpu

V, H = 11, 6
ONE = {"index": 0, "prompt": 1, "eos": 0, "max_new": 2, "top_k": 0, "top_p": 0, "seed": 0, "sequence": 0, "mode_of": 1}


def make(**options) -> Network:
    torch.manual_seed(3)
    return Network(NetworkConfig(**{"vocab_size": V, "hidden_size": H, "cell": "lstm", **options}))


def op(name: str):
    return backends.function("cpu", f"generator_{name}")


def add(packed: PackedNetwork, ids: list[int], states: tuple = (), windowed: bool = False, **numbers) -> None:
    """Gives one request to a session of its own."""
    columns = {**ONE, "logprobs": 0, "window": 0, "state": -1, **numbers}
    session = op("start")(packed.number, 1, windowed, 1)
    try:
        real = torch.tensor([[1.0, torch.inf, 1.0, 1.0]])
        op("add")(session, torch.tensor([list(columns.values())]), real, torch.tensor(ids), list(states))
    finally:
        op("free_session")(session)


def state(tail: list[int]) -> tuple:
    ids = torch.tensor(tail, dtype=torch.int64)
    return (torch.zeros(H), torch.zeros(H), torch.zeros(V), ids, torch.zeros(V, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(ids=[V]), f"a prompt must hold ids in 0 .. {V - 1}, got {V}"),
        (dict(ids=[-1]), "got -1"),
        (dict(ids=[2**32]), "got 4294967296"),
        (dict(ids=[0], prompt=2), "ids must hold every prompt and eos"),
        (dict(ids=[0], prompt=2**62, eos=2**62), "ids must hold every prompt and eos"),
        (dict(ids=[0], prompt=0), "needs a prompt or a start state"),
        (dict(ids=[0], prompt=0, windowed=True, window=3, state=0, states=state([])), "needs a prompt or a start"),
        (dict(ids=[0], max_new=0), "max_new_tokens and mode_of must be at least 1"),
        (dict(ids=[0], mode_of=0), "max_new_tokens and mode_of must be at least 1"),
        (dict(ids=[0], windowed=True), "window must be at least 1"),
        (dict(ids=[0], state=0), "states must hold every state"),
        (dict(ids=[0], state=0, states=state([V])), f"tail must hold ids in 0 .. {V - 1}"),
        (dict(ids=[0], states=state([])[:4]), "five tensors"),
        (dict(ids=[0], states=(torch.zeros(H + 1), *state([])[1:])), f"h must have {H} elements, got {H + 1}"),
        (dict(ids=[0], states=(*state([])[:2], torch.zeros(1), *state([])[3:])), f"logits must have {V} elements"),
    ],
)
def test_a_request_that_a_session_cannot_run_is_refused(arguments: dict, says: str) -> None:
    packed = PackedNetwork(make())
    with pytest.raises(RuntimeError, match=says):
        add(packed, **arguments)


def test_a_session_and_a_network_that_cannot_be_are_refused() -> None:
    packed = PackedNetwork(make())
    zero = torch.zeros(1, 1, H)
    for rows, threads in ((0, 1), (1, 0), (2**60, 1), (1, 2**40)):
        with pytest.raises(RuntimeError, match="must be 1 to"):
            op("start")(packed.number, rows, False, threads)
    with pytest.raises(RuntimeError, match="threads must be 1 to"):
        op("read")(packed.number, torch.tensor([1]), zero, zero, 0)
    with pytest.raises(RuntimeError, match="ids must hold ids in"):
        op("read")(packed.number, torch.tensor([V]), zero, zero, 1)
    head = torch.zeros(V, H)
    for weights in ([], [torch.zeros(4 * H, V)]):
        with pytest.raises(RuntimeError, match="weights must be 2 tensors of each of one or more layers"):
            op("pack")("lstm", "float32", None, weights, False, head, None)
    with pytest.raises(RuntimeError, match=r"head must be \(V, H\)"):
        op("pack")("lstm", "float32", None, [head, head], False, torch.zeros(0, H), None)


def test_a_saved_tail_with_ids_of_another_vocabulary_is_refused() -> None:
    """The tail of a state read from a file is the one part of it whose numbers are used as places in memory."""
    network = make(state="window", window=4)
    start = prefill(network, [1, 2, 3])
    start.tail[1] = 10**9
    with pytest.raises(RuntimeError, match=f"ids in 0 .. {V - 1}, got 1000000000"):
        list(generate(network, [Request([], 3, state=start)]))
    with pytest.raises(RuntimeError, match=f"ids in 0 .. {V - 1}, got 1000000000"):
        prefill(network, [1], start)


def test_an_eos_beyond_the_vocabulary_ends_nothing() -> None:
    network = make()
    (free,) = generate(network, [Request([1], 20)])
    beyond = frozenset(2**32 + token for token in range(V)) | {-1, V}
    (same,) = generate(network, [Request([1], 20, eos=beyond)])
    assert same.finish_reason == "length"
    assert same.token_ids == free.token_ids


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("where", ["rnn", "head"])
def test_nan_weights_end_every_request_with_an_error(cell: str, precision: str, where: str) -> None:
    network = make(cell=cell)
    with torch.no_grad():
        (network.rnn if where == "rnn" else network.head).get_parameter(
            "weight_hh_l0" if where == "rnn" else "weight"
        ).fill_(torch.nan)
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    done = list(generate(network, [Request([1] * n, 5, sequence=n) for n in (1, 2, 9)], batch_size=2, dtype=dtype))
    assert len(done) == 3
    for completion in done:
        assert completion.finish_reason == "error"
        assert "NaN" in completion.error


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_hh_l0", "head.weight", "head.bias"])
def test_int8_refuses_weights_that_it_has_no_number_for(name: str, bad: float) -> None:
    network = make()
    with torch.no_grad():
        network.get_parameter(name).view(-1)[1] = bad
    with pytest.raises((RuntimeError, ValueError), match="int8 needs weights without NaN and infinity"):
        make_runner(network, quantize="int8")


def test_a_thread_that_cannot_start_is_an_error_and_no_crash() -> None:
    """Under a limit on address space, threads fail to start one after another; the process must live to say so."""
    script = """
import resource, torch
from fastrnn.generate import make_runner
from fastrnn.network import Network, NetworkConfig
network = Network(NetworkConfig(vocab_size=64, hidden_size=8, cell="gru"))
packed = make_runner(network)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
zero = torch.zeros(1, 1, 8)
try:
    packed.op("read")(packed.number, torch.tensor([1]), zero, torch.empty(0), 4000)
except RuntimeError as error:
    print("refused", error)
h, _, logits = packed.op("read")(packed.number, torch.tensor([1]), zero, torch.empty(0), 2)
print("lives", bool(logits.isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done
    assert "refused" in done.stdout, done
    assert "lives True" in done.stdout, done

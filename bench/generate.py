"""Generation: tokens a second of all rows together, ours against whatever else can run the same weights.

A token's cost is the slope between two lengths, so that set-up and packing are not in it; ours are reported apart. On
one thread the clock is CPU time, on more it is wall time. Every rival is checked before it is timed: what it predicts
after fixed ids against the float64 reference, and the ids it draws against the probabilities they should have. Ratios
are to the baseline: the PyTorch loop of step, softmax and multinomial, with oneDNN on or off, whichever is faster. Slow
rivals run in fewer rounds, never fewer than three; `torch.compile` costs up to half a minute for each network.

With ``--device cuda`` the networks, numbers of rows and rivals are those of `bench.peers_cuda`, the baseline is the
PyTorch loop, the clock is wall time after the GPU is done, and instead of roofs there are estimated bounds.

    python -m bench.generate [--threads 1] [--quick] [--models M ...] [--batches B ...] [--peers P ...] [--output CSV]
                             [--device cpu] [--seconds N]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrnn
from bench import peers, peers_cuda, peers_graph, roofs
from bench.gpu import KEY
from bench.timing import Slope, Timing, first_line, launch_errors, row, slopes, synchronised, write_csv
from fastrnn import Network, NetworkConfig
from fastrnn.generate import generate
from fastrnn.network import GATES
from fastrnn.request import Request

MODELS = {
    "gru 1x32 E=16 V=10": NetworkConfig(10, embedding_dim=16, cell="gru", hidden_size=32),
    "lstm 1x64 onehot V=82": NetworkConfig(82, input="onehot", hidden_size=64),
    "lstm 4x256 scalar V=65": NetworkConfig(65, input="scalar", hidden_size=256, num_layers=4),
    "lstm 2x256 onehot V=65": NetworkConfig(65, input="onehot", hidden_size=256, num_layers=2, head="last"),
    "rnn 1x128 onehot V=10000": NetworkConfig(10000, input="onehot", cell="rnn_tanh", hidden_size=128),
    "lstm 1x128 E=128 V=10000": NetworkConfig(10000, hidden_size=128),
    "gru 2x512 onehot V=128": NetworkConfig(128, input="onehot", cell="gru", hidden_size=512, num_layers=2),
    "lstm 3x512 onehot V=128": NetworkConfig(128, input="onehot", hidden_size=512, num_layers=3),
    "lstm 2x1024 onehot V=256": NetworkConfig(256, input="onehot", hidden_size=1024, num_layers=2),
}
BATCHES = (1, 16, 256, 1024)
QUICK = {"models": ["gru 1x32 E=16 V=10"], "batches": [1, 16]}
# Ours: the dtype whose honest error is allowed, keywords of `generate`, and the backend that is asked for, if any.
Own = tuple[str, dict[str, Any], str | None]
OURS: dict[str, Own] = {
    "fastrnn float32": ("float32", {}, None),
    "fastrnn bfloat16": ("bfloat16", {"dtype": torch.bfloat16}, None),
    "fastrnn int8": ("int8", {"quantize": "int8"}, None),
}
OURS_ON_GPU: dict[str, Own] = {
    "fastrnn cuda float32": ("float32", {}, "cuda"),
    "fastrnn cuda bfloat16": ("bfloat16", {"dtype": torch.bfloat16}, "cuda"),
    "fastrnn triton float32": ("float32", {}, "triton"),
}
PEERS: dict[str, Callable[[Network, int], peers.Peer]] = {
    **peers.PEERS,
    "onnxruntime step": peers_graph.ort_step,
    "onnxruntime loop": peers_graph.ort_loop,
    "openvino": peers_graph.openvino,
    "openvino bfloat16": functools.partial(peers_graph.openvino, dtype="bfloat16"),
    "jax loop": peers_graph.jax_loop,
}
COMPILED = {name for name in PEERS if name.startswith("compiled")}  # seconds to build each: not in --quick
CUDA_PACE = {"rounds": 3, "seconds": 0.02, "budget": 2.0}
PATIENCE = 2.0  # seconds that a call of two steps may take on a GPU, where time is short; above it is not timed
LOGITS_SPREAD = 2.0  # standard deviation of the logits, about that of a trained character model
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class Setting(NamedTuple):
    """Where is measured and how: ``pace`` are the keywords of `slopes`."""

    device: str
    pace: dict[str, Any]
    faults: list[str] | None = None  # of ours, which make the run on a GPU fail

    def clock(self) -> tuple[Callable[[], float], str]:
        if self.device == "cuda":
            return synchronised, "tokens/s"
        alone = torch.get_num_threads() == 1
        return (time.process_time, "tokens/s of CPU time") if alone else (time.perf_counter, "tokens/s")


class Rival(NamedTuple):
    """What is timed; ``tokens`` reads the ids (n, B) out of what ``run`` returns."""

    dtype: str
    run: Callable[[int], Any]
    tokens: Callable[[Any], Tensor]


def build(config: NetworkConfig, device: str = "cpu") -> Network:
    """The network of ``config`` with random weights of a fixed seed."""
    torch.manual_seed(0)
    network = Network(config).eval().requires_grad_(False)
    ids = torch.randint(config.vocab_size, (64, 8))
    network.head.weight *= LOGITS_SPREAD / network(ids)[0].std()
    return network.to(device)


class Judge:
    """The float64 reference of one network, and what it thinks of a rival."""

    ROWS, STEPS = 16, 5

    def __init__(self, network: Network, batch: int) -> None:
        self.network, self.batch, self.device = network, batch, network.head.weight.device
        double = Network(dataclasses.replace(network.config, head="all"), dtype=torch.float64)
        double.load_state_dict(network.state_dict())
        self.double = double.to(self.device).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(network.config.vocab_size, (self.STEPS, self.ROWS), generator=generator).to(self.device)
        self.ids = ids[:, torch.arange(batch) % self.ROWS]
        self.errors: dict[str, float] = {}  # of plain PyTorch, by dtype
        self.expected = self.log_probabilities(self.ids[:, : self.ROWS])[-1]

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """What follows each of ids (T, n), by the reference in float64: (T, n, V)."""
        with fastrnn.backend("reference"):
            return self.double(ids.t())[0].log_softmax(-1).transpose(0, 1)

    def error(self, logits: Tensor) -> float:
        """The largest error of the log-probabilities of logits (B, V) after ``self.ids``."""
        rows = torch.arange(len(logits), device=self.device) % self.ROWS
        return (logits.double().log_softmax(-1) - self.expected[rows]).abs().max().item()

    def allowed(self, dtype: str) -> float:
        """Three times the error of plain PyTorch in ``dtype`` on the same ids, and a floor of 64 float32 roundings."""
        if dtype not in self.errors:
            self.errors[dtype] = self.error(peers.PLAIN[dtype](self.network, self.batch).logits(self.ids))
        return 3 * self.errors[dtype] + 64 * torch.finfo(torch.float32).eps

    def surprise(self, tokens: Tensor) -> float:
        """How many standard deviations the surprise of drawn ids (n, B) is from its expectation, the entropy."""
        tokens = tokens[:, : self.ROWS].to(self.device)
        before = torch.cat([torch.full_like(tokens[:1], peers.FIRST), tokens[:-1]])
        logs = self.log_probabilities(before)
        entropy = -(logs.exp() * logs).sum(-1)
        variance = (logs.exp() * logs.square()).sum(-1) - entropy.square()
        found = -logs.gather(2, tokens.unsqueeze(-1))[..., 0]
        return ((found - entropy).sum() / variance.sum().sqrt()).item()

    def refuse(self, name: str, rival: Rival, error: float) -> None:
        """`peers.Wrong` where a rival is: it is not timed, and its row is missing."""
        if not error <= self.allowed(rival.dtype):
            raise peers.Wrong(f"{name} errs by {error:.2e}, allowed are {self.allowed(rival.dtype):.2e}")
        deviations = self.surprise(rival.tokens(rival.run(max(2, 64 // self.batch))))
        if not abs(deviations) <= 6:
            raise peers.Wrong(f"the ids {name} draws are {deviations:.1f} standard deviations off")


def requests(batch: int, number: int, **options: Any) -> list[Request]:
    return [Request([peers.FIRST], number, sequence=row, **options) for row in range(batch)]


def by_index(completions: list) -> list:
    return sorted(completions, key=lambda completion: completion.index)


def is_ours(name: str) -> bool:
    return name in OURS or name in OURS_ON_GPU


def ours(network: Network, batch: int, own: Own, judge: Judge) -> tuple[Rival, float]:
    """Our rival, and its error: of the log-probabilities it gives to the ids it draws."""
    dtype, keywords, backend = own
    missing = sorted(set(keywords) - set(inspect.signature(generate).parameters))
    if missing:
        raise peers.Unavailable(f"generate has no keyword {', '.join(missing)}")

    def run(number: int, **options: Any) -> list:
        with fastrnn.backend(backend):
            return list(generate(network, requests(batch, number, **options), batch_size=batch, **keywords))

    def tokens(completions: list) -> Tensor:
        return torch.tensor([completion.token_ids for completion in by_index(completions)]).t()

    try:
        done = by_index(run(judge.STEPS, logprobs=True))[-judge.ROWS :]
    except (ValueError, fastrnn.BackendRefusal) as refusal:  # what this network cannot have, in its own words
        raise peers.Unavailable(str(refusal)) from refusal
    drawn = tokens(done).to(judge.device)
    found = torch.tensor([completion.logprobs for completion in done], device=judge.device).t()
    before = torch.cat([torch.full_like(drawn[:1], peers.FIRST), drawn[:-1]])
    expected = judge.log_probabilities(before).gather(2, drawn.unsqueeze(-1))[..., 0]
    return Rival(dtype, run, tokens), (found - expected).abs().max().item()


def rivals(network: Network, batch: int, names: list[str], judge: Judge, faults: list[str]) -> dict[str, Rival]:
    """Every rival that can run here, checked; why another cannot is printed. ``faults`` gets what is wrong of ours."""
    found: dict[str, Rival] = {}
    on_gpu = judge.device.type == "cuda"
    own, offered = (OURS_ON_GPU, peers_cuda.PEERS) if on_gpu else (OURS, PEERS)
    for name in (*own, *names):
        try:
            if name in own:
                rival, error = ours(network, batch, own[name], judge)
            else:
                peer = offered[name](network, batch)
                rival, error = Rival(peer.dtype, peer.run, lambda tokens: tokens), judge.error(peer.logits(judge.ids))
            judge.refuse(name, rival, error)
            if on_gpu:
                refuse_the_slow(rival)
        except peers.Unavailable as reason:
            print(f"  {name}: not timed: {reason}", flush=True)
            faults += [str(reason)] if name in own and isinstance(reason, peers.Wrong) else []
            continue
        except launch_errors() as error:
            if not on_gpu:
                raise
            print(f"  {name}: not timed: it fails: {first_line(error)}", flush=True)
            faults += [f"{name} fails: {first_line(error)}"] if name in own else []
            synchronised()  # raises again where the error has left the GPU unusable
            continue
        found[name] = rival
    return found


def refuse_the_slow(rival: Rival) -> None:
    """`peers.Unavailable` where two steps take longer than `PATIENCE`."""
    start = synchronised()
    rival.run(2)
    if (took := synchronised() - start) > PATIENCE:
        raise peers.Unavailable(f"two steps take {took:.1f} s, more than the {PATIENCE:.0f} s there are for them")


def work(config: NetworkConfig) -> tuple[int, int]:
    """(operations a token, weights read a step): without layer 0's input product, which is a row of a table."""
    hidden, gates = config.hidden_size, GATES[config.cell]
    recurrent = gates * hidden * hidden
    weights = recurrent * (2 * config.num_layers - 1) + hidden * config.vocab_size
    return 2 * weights, weights


def weight_sizes(config: NetworkConfig) -> dict[str, int]:
    """The bytes of weights a step reads, by type."""
    return {dtype: work(config)[1] * size for dtype, size in WEIGHT_BYTES.items()}


def least_step(model: str, dtype: str, batch: int, top: roofs.Roofs) -> float:
    """The microseconds that a step takes at least under these roofs."""
    operations, weights = work(MODELS[model])
    return top.seconds(dtype, operations * batch, weights * WEIGHT_BYTES[dtype]) * 1e6


def report(
    model: str, name: str, dtype: str, batch: int, cost: Slope, base: float, device: str, top: roofs.Roofs | None
) -> str:  # fmt: skip
    """One printed line; ``base`` is the baseline's microseconds a step, ``top`` the roofs of a CPU."""
    step, spread = cost.step, f"({batch / cost.step.p80 * 1e6:,.0f} to {batch / cost.step.p20 * 1e6:,.0f})"
    line = f"  {name:<30} {batch / step.median * 1e6:>12,.0f} tokens/s {spread:<26} {base / step.median:8.2f}x"
    if bound := peers_cuda.BOUNDS.get(model, {}).get(batch) if device == "cuda" else None:
        line += f"  {100 * batch / step.median * 1e6 / bound:.2g} % of the estimated bound"
    if is_ours(name) and top is not None:
        operations, weights = work(MODELS[model])
        line += f"  {operations * batch / step.median / 1e3:.1f} GFLOP/s, "
        line += f"weights {weights * WEIGHT_BYTES[dtype] / step.median / 1e3:.1f} GB/s, "
        line += f"{100 * least_step(model, dtype, batch, top) / step.median:.0f} % of the roof"
    return line + (f"; set-up {cost.setup.median:,.0f} us" if is_ours(name) else "")


def possible(costs: dict[str, Slope]) -> dict[str, Slope]:
    """Those with a figure: others on the machine can make a longer loop take less wall time than a shorter one."""
    for name, cost in costs.items():
        if not cost.step.p20 > 0:
            print(f"  {name}: no figure: more steps took less time, the machine is too busy", flush=True)
    return {name: cost for name, cost in costs.items() if cost.step.p20 > 0}


def measure(model: str, batch: int, names: list[str], setting: Setting) -> list[dict]:
    """CSV rows of one network and number of rows; printed as they come."""
    config, device = models(setting.device)[model], setting.device
    start, (clock, unit) = time.perf_counter(), setting.clock()
    where = "GPU" if device == "cuda" else f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    print(f"{model}, B={batch}, {where}", flush=True)
    network = build(config, device)
    faults: list[str] = []
    entrants = rivals(network, batch, names, Judge(network, batch), faults)
    if setting.faults is not None:
        setting.faults.extend(f"{model} B={batch}: {fault}" for fault in faults)
    loops = {name: rival.run for name, rival in entrants.items()}
    tasks = {} if device == "cuda" else roofs.products() | roofs.reads(weight_sizes(config))
    loops |= {name: task.loop for name, task in tasks.items()}
    costs, top = possible(slopes(loops, clock, **setting.pace)), None
    if tasks and costs.keys() >= tasks.keys():
        top = roofs.Roofs.of_seconds(tasks, {name: costs[name].step.median / 1e6 for name in tasks})
        print(f"  {top}", flush=True)
    costs = {name: cost for name, cost in costs.items() if name not in tasks}
    base = min((costs[name].step.median for name in peers.BASELINES if name in costs), default=float("nan"))
    sizes = dict(B=batch, I=config.input_size, H=config.hidden_size, L=config.num_layers, V=config.vocab_size)
    rows = []
    for name, cost in costs.items():
        dtype = entrants[name].dtype
        line = report(model, name, dtype, batch, cost, base, device, top)
        if device == "cuda":
            same = [c.step.median for n, c in costs.items() if not is_ours(n) and entrants[n].dtype == dtype]
            if is_ours(name) and same:  # precision is no merit of a loop
                line += f"; {min(same) / cost.step.median:.2f}x of the fastest of PyTorch in {dtype}"
            line = f"{KEY}{model} B={batch}: {' '.join(line.split())}"
        print(line, flush=True)
        speed = Timing(*(batch / value * 1e6 for value in (cost.step.median, cost.step.p80, cost.step.p20)))
        rows.append(row(f"generate {model}", name, speed, unit, device, dtype=dtype, **sizes))
        if is_ours(name):
            rows.append(row(f"generate set-up {model}", name, cost.setup, "us", device, dtype=dtype, **sizes))
        if is_ours(name) and top is not None:
            bound = batch / least_step(model, dtype, batch, top) * 1e6
            rows.append(row(f"generate roof {model}", name, Timing(bound, bound, bound), unit, dtype=dtype, **sizes))
    print(f"  took {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def models(device: str) -> dict[str, NetworkConfig]:
    return peers_cuda.MODELS if device == "cuda" else MODELS


def cases(options: argparse.Namespace) -> tuple[list[tuple[str, int]], list[str]]:
    """The networks and numbers of rows to measure, in order, and the names of the peers."""
    on_gpu, some = options.device == "cuda", options.quick and options.device == "cpu"
    chosen = options.models or (QUICK["models"] if some else list(models(options.device)))
    batches = options.batches or (QUICK["batches"] if some else peers_cuda.BATCHES if on_gpu else BATCHES)
    names = list(peers_cuda.PEERS) if on_gpu else [n for n in PEERS if not options.quick or n not in COMPILED]
    names = names if options.peers is None else options.peers
    pairs = [(model, batch) for model in chosen for batch in batches]
    if on_gpu:  # where the time may end before the list does: every network at one number of rows, then the next
        pairs = [(model, batch) for batch in batches for model in chosen]
    return pairs, names


def main() -> int:
    """Measure every row and write the CSV after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further row is started")
    parser.add_argument("--quick", action="store_true", help="two small rows, few rounds, no torch.compile")
    parser.add_argument("--models", nargs="*", choices=[*MODELS, *peers_cuda.MODELS], help="some of the networks")
    parser.add_argument("--batches", nargs="*", type=int, help="some numbers of rows")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, *peers_cuda.PEERS], help="some peers; alone: none")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # said whenever oneDNN is switched off
    pairs, names = cases(options)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # cuDNN's RNN may take TF32 anyway
        setting, rows = Setting("cuda", CUDA_PACE, faults=[]), []
    else:
        pace = {"rounds": 3, "seconds": 0.01} if options.quick else {}
        setting, rows = Setting("cpu", pace), []
    start = time.perf_counter()
    for number, (model, batch) in enumerate(pairs):
        if time.perf_counter() - start > options.seconds:
            print(f"{KEY}{len(pairs) - number} of {len(pairs)} rows left out for want of time")
            break
        rows += measure(model, batch, names, setting)
        write_csv(options.output, rows)
    for fault in setting.faults or []:
        print(f"{KEY}not timed: {fault}")
    print(f"wrote {options.output}")
    return int(bool(setting.faults))


if __name__ == "__main__":
    raise SystemExit(main())

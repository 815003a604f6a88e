"""`make gpu` without a GPU: its runner with steps planted in it, and its measurements at tiny shapes on the CPU."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree: bench/ is not installed", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import generate, gpu, gpu_layers, gpu_native, peers, peers_cuda, sample, timing  # noqa: E402 (after the path)
from fastrnn import NetworkConfig  # noqa: E402
from fastrnn import gpu as machine  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
interpreted = pytest.mark.skipif(
    machine.triton_missing() is not None or not machine.interpreting(), reason="needs Triton and no GPU"
)


def python(name: str, code: str, limit: float = 60, **options) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], limit, **options)


# --- the runner -----------------------------------------------------------------------------------------------------


def test_every_step_is_reported_whatever_the_others_do(tmp_path, capsys):
    steps = [
        python("good", "print('key: 7 things'); print('all well')"),
        python("bad", "print('so far so good'); raise ValueError('planted')"),
        python("slow", f"{CHILD}; print('begun', flush=True); time.sleep(600)", limit=3, least=1),
        python("elsewhere", f"print('no such machine'); raise SystemExit({gpu.LEFT_OUT})"),
        python("last", "print('still here')", share=1),
    ]
    outcomes = gpu.run_steps(steps, 300, tmp_path)
    assert [o.status for o in outcomes] == ["ok", "failed", "timed out", "left out", "ok"]
    assert [o.name for o in outcomes] == [step.name for step in steps]
    good, bad, slow, elsewhere, last = outcomes
    assert good.keys == ("7 things",)
    assert good.text == "all well"
    assert bad.text == "status 1: ValueError: planted"
    assert "so far so good" in (tmp_path / "bad.log").read_text()
    assert slow.text == "after 3 s; its last line: begun"
    assert elsewhere.text == "no such machine"
    assert last.text == "still here"
    told = gpu.summary(outcomes, "title").splitlines()
    assert told[:2] == ["title", "2 ok, 1 failed, 1 timed out, 1 left out"]
    assert told[-2:] == ["good:", "  7 things"]
    assert all(str(outcome) in told for outcome in outcomes)
    printed = capsys.readouterr().out
    assert all(str(outcome) in printed for outcome in outcomes)
    assert not alive(int((tmp_path / "slow.log").read_text().split()[0])), "what a step has started ends with it"


CHILD = "import subprocess, time; child = subprocess.Popen(['sleep', '600']); print(child.pid)"


def alive(number: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_is_divided_and_what_does_not_fit_is_left_out(tmp_path):
    shared = [gpu.Step(name, ["echo", "{seconds}"], 1000, share=share) for name, share in (("one", 1), ("three", 3))]
    one, three, never = gpu.run_steps([*shared, gpu.Step("never", ["echo"], 9, least=500)], 410, tmp_path)
    assert 90 <= float(one.text) <= 410 / 4 - gpu.RESERVE
    assert 350 <= float(three.text) <= 410 - gpu.RESERVE
    assert never.status == "left out"
    assert never.text == "9 s are left for it, it needs 500"
    (late,) = gpu.run_steps([gpu.Step("late", ["echo"], 9)], 0, tmp_path)
    assert late.status == "left out"
    assert not (tmp_path / "late.log").exists()


def test_steps_of_a_stage_run_side_by_side(tmp_path):
    """Each waits for the file that the other writes."""
    code = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"
    paths = [str(tmp_path / name) for name in "ab"]
    steps = [python(str(k), code.format(paths[k], paths[1 - k]), stage="both") for k in range(2)]
    assert [outcome.status for outcome in gpu.run_steps(steps, 200, tmp_path)] == ["ok", "ok"]


@pytest.mark.parametrize(
    "log, expected",
    [
        ("F\nE   AssertionError: y: error 1\nE   more\nFAILED tests/x.py - Assert", "AssertionError: y: error 1"),
        ("Traceback\n  File x\nKeyError: 1\nduring\ntorch.AcceleratorError: CUDA error: bad\nnote", "torch.Acc"),
        ("compiling\na.cu(3): error: no such thing\n1 error detected", "a.cu(3): error: no such thing"),
        ("one\ntwo\n\n", "two"),
        ("", "it said nothing"),
    ],
)
def test_the_line_that_says_most(log, expected):
    assert gpu.first_error(log).startswith(expected)


def test_the_plan_has_every_gpu_test_and_a_log_for_each_step(tmp_path):
    steps = gpu.plan(tmp_path, "cuda", "9.0a", False)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[:3] == ["facts", "build", "exchange"]
    assert names[-3:] == ["layers", "sample", "generate"]
    assert {f"tests {path.stem.removeprefix('test_')}" for path in gpu.gpu_tests()} < set(names)
    assert {"test_triton_cells.py", "test_gpu.py"} <= {path.name for path in gpu.gpu_tests()}
    assert gpu.architecture([8, 0]) == "8.0"
    assert gpu.architecture([9, 0]) == "9.0a"


@without_gpu
def test_without_a_gpu_nothing_runs_and_the_status_says_so(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == gpu.NO_GPU
    assert done.stderr.startswith("no GPU, nothing was run: torch ")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_run_of_one_step_writes_its_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "plan", lambda *_: [python("only this", "print('key: 1')"), python("not this", "0")])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--output", str(tmp_path), "--only", "only"])
    assert gpu.main() == 0
    assert "only this" in (tmp_path / "summary.txt").read_text()
    assert "not this" not in (tmp_path / "summary.txt").read_text()
    monkeypatch.setattr(gpu, "plan", lambda *_: [python("wrong", "raise SystemExit(2)")])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--output", str(tmp_path)])
    assert gpu.main() == 1


# --- steps around the toolchain -------------------------------------------------------------------------------------


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(gpu_native.Refused, match="no-such-tool is not installed"):
        gpu_native.tool("no-such-tool")


@without_gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit")
def test_the_exchange_compiles_and_says_why_it_does_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_native", "--output", str(tmp_path), "exchange"])
    assert gpu_native.main() == gpu.LEFT_OUT
    assert capsys.readouterr().out.splitlines()[-1] == "compiled, not run: there is no GPU"


# --- the measurements, on the CPU -----------------------------------------------------------------------------------


@pytest.fixture
def tf32_restored():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@interpreted
@pytest.mark.usefixtures("tf32_restored")
def test_layers_are_measured_and_what_ran_is_listed(tmp_path, monkeypatch, capsys):
    words = ["--device", "cpu", "--quick", "--seconds", "250", "--output", str(tmp_path / "layers.csv")]
    monkeypatch.setattr(sys, "argv", ["gpu_layers", *words])
    assert gpu_layers.main() == 0
    found, ran = rows(tmp_path / "layers.csv"), rows(tmp_path / "layers-ran.csv")
    assert set(found[0]) == set(timing.COLUMNS)
    for op in ("LSTM forward", "LSTM forward+backward", "GRU forward packed", "GRU forward+backward packed"):
        assert {"torch", "auto", "triton"} <= {row["backend"] for row in found if row["op"] == op}
        listed = {row["backend"]: row["ran"] for row in ran if row["op"] == op}
        assert listed["auto"] in ("reference", "aten", "cpu", "triton")
        assert " x aten::" in listed["torch"]
    printed = capsys.readouterr().out
    assert "key: LSTM forward float16: triton " in printed
    assert "key: 2 of 2 shapes timed, 0 left out for want of time; kernels listed of 4 calls" in printed


@interpreted
@pytest.mark.usefixtures("tf32_restored")
def test_kernels_are_compiled_beforehand(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_layers", "--device", "cpu", "--quick", "--compile-only", "1/2"])
    assert gpu_layers.main() == 0
    assert "1 shapes called" in capsys.readouterr().out


def test_the_map_begins_with_plain_shapes_and_holds_them_all():
    every = gpu_layers.shapes(quick=False)
    assert len(set(every)) == len(every) == 2 * 3 * 5 * 5 * 3 * 2 * 2
    plain = [s.layers == 1 and not s.bidirectional and not s.packed for s in every]
    assert plain == sorted(plain, reverse=True)
    assert sum(plain) == 2 * 3 * 5 * 5


def test_a_wrong_rival_is_not_timed():
    expected = (torch.ones(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    results = {
        "torch": (torch.full((3,), 1.001), torch.zeros(2)), "near": (torch.full((3,), 1.002), torch.zeros(2)),
        "far": (torch.full((3,), 1.1), torch.zeros(2)), "nan": (torch.ones(3), torch.full((2,), float("nan"))),
    }  # fmt: skip
    rivals, problems = {name: (lambda found=found: found) for name, found in results.items()}, []
    gpu_layers.check(rivals, expected, 2**-20, problems, "a shape")
    assert set(rivals) == {"torch", "near"}
    assert [line.split(" on ")[0] for line in problems] == ["far is wrong", "nan is wrong"]


def test_a_rival_that_fails_is_named_and_a_refusal_is_not():
    def make(name):
        def run():
            if name == "refuses":
                raise gpu_layers.backends.BackendRefusal("not this")
            if name == "fails":
                raise RuntimeError("CUDA error: planted\nmore")

        return run

    problems: list[str] = []
    assert set(gpu_layers.tried(["runs", "refuses", "fails"], make, problems, "a shape")) == {"runs"}
    assert problems == ["fails fails on a shape: CUDA error: planted"]


def test_wrong_draws_are_not_timed(monkeypatch):
    def wrong(logits, backend):
        return sample.ours(logits.flip(1) if backend == "cpu" else logits, "reference")

    monkeypatch.setattr(sample, "OPS", {"sample": wrong})
    bench = sample.Bench("cpu", ["reference", "cpu"], {"rounds": 1, "seconds": 0})
    found = bench.rivals(torch.randn(8, 65))
    assert {backend for _, backend in found if not backend.startswith("torch")} == {"reference"}
    assert [line.split(" at ")[0] for line in bench.wrong] == ["sample of cpu"]


@interpreted
def test_draws_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "QUICK", [(2, 65)])
    monkeypatch.setattr(sys, "argv", ["sample", "--device", "cpu", "--quick", "--output", str(tmp_path / "sample.csv")])
    assert sample.main() == 0
    found = rows(tmp_path / "sample.csv")
    assert {row["op"] for row in found if row["backend"] == "triton"} == set(sample.OPS)
    assert "key: B=2    V=65     sample op           triton" in capsys.readouterr().out


def test_every_network_has_a_bound_at_every_number_of_rows():
    assert list(peers_cuda.BOUNDS) == list(peers_cuda.MODELS)
    for bounds in peers_cuda.BOUNDS.values():
        assert set(bounds) == set(peers_cuda.BATCHES)
        assert sorted(bounds.values()) == [bounds[rows] for rows in sorted(bounds)]


NETWORKS = {
    "lstm": NetworkConfig(11, embedding_dim=5, hidden_size=12, num_layers=2),
    "gru": NetworkConfig(11, input="scalar", cell="gru", hidden_size=12, num_layers=2, head="last"),
    "rnn": NetworkConfig(40, input="onehot", cell="rnn_tanh", hidden_size=12),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cell", NETWORKS)
@pytest.mark.parametrize("name", [name for name in peers_cuda.PEERS if name.startswith("graphed")])
def test_a_graphed_peer_computes_the_network(name, cell, device, monkeypatch):
    """On a CPU what would be captured is called instead."""
    if device == "cpu":
        monkeypatch.setattr(peers_cuda, "capture", lambda function: function)
    network = generate.build(NETWORKS[cell], device)
    judge = generate.Judge(network, 3)
    peer = peers_cuda.PEERS[name](network, 3)
    assert judge.error(peer.logits(judge.ids)) <= judge.allowed(peer.dtype)
    tokens = peer.run(2 * peers_cuda.TOKENS_A_GRAPH + 3)
    assert tokens.shape == (2 * peers_cuda.TOKENS_A_GRAPH + 3, 3)
    assert abs(judge.surprise(tokens)) <= 6
    assert not torch.equal(tokens, peer.run(len(tokens))), "a second run draws the same numbers"


@without_gpu
def test_a_graph_needs_a_gpu():
    with pytest.raises(peers.Unavailable, match="a CUDA graph needs a GPU"):
        peers_cuda.graphed(generate.build(NETWORKS["rnn"]), 2)


def test_a_fault_of_ours_is_told(monkeypatch):
    """A rival of ours that runs and draws greedily is a fault; one that is refused, and a wrong peer, are none."""
    network = generate.build(NETWORKS["gru"])
    peer = peers.eager(network, 2, draw=lambda logits: logits.argmax(-1))
    greedy = generate.Rival(peer.dtype, peer.run, lambda tokens: tokens)
    monkeypatch.setattr(generate, "ours", lambda *_: (greedy, 0.0))
    monkeypatch.setattr(generate, "OURS", {"fastrnn float32": ("float32", {}, None)})
    other = generate.build(NETWORKS["gru"])
    other.rnn.weight_hh_l0 *= 1.5
    monkeypatch.setattr(generate, "PEERS", {"wrong": lambda *_: peers.eager(other, 2)})
    faults: list[str] = []
    assert generate.rivals(network, 2, ["wrong"], generate.Judge(network, 2), faults) == {}
    assert [fault.split(" are ")[0] for fault in faults] == ["the ids fastrnn float32 draws"]


def test_a_slow_rival_is_not_timed(monkeypatch):
    clock = iter([0.0, 60.0])
    monkeypatch.setattr(generate, "synchronised", lambda: next(clock))
    with pytest.raises(peers.Unavailable, match=r"two steps take 60\.0 s"):
        generate.refuse_the_slow(generate.Rival("float32", lambda number: None, lambda tokens: tokens))


@pytest.mark.gpu
def test_the_clock_of_a_gpu_waits_for_it():
    """Products of some milliseconds, which a clock that does not wait would see as microseconds of launching."""
    a = torch.randn(4096, 4096, device="cuda")
    found = timing.interleaved({"product": lambda: a @ a}, rounds=3, seconds=0.01, clock=timing.synchronised)
    operations = 2 * 4096**3
    assert operations / (found["product"].median * 1e-6) < 1e15, "faster than any GPU multiplies float32"

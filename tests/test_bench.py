"""The benchmarks run and write their columns, and every peer of generation computes the network it is compared on."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree: bench/ is not installed", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import generate, peers, plot, timing  # noqa: E402 (after the path)
from fastrnn import NetworkConfig, backends  # noqa: E402

SMALL = {
    "lstm": NetworkConfig(11, embedding_dim=5, hidden_size=12, num_layers=2),
    "gru": NetworkConfig(11, input="scalar", cell="gru", hidden_size=12, num_layers=2, head="last"),
    "rnn": NetworkConfig(40, input="onehot", cell="rnn_tanh", hidden_size=12),
    "relu": NetworkConfig(11, input="onehot", cell="rnn_relu", hidden_size=12, num_layers=2),
}


def run(script: str, *arguments: str) -> str:
    # Interpreted Triton kernels are no rival: their draws take minutes.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{script}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path, some: bool = True) -> list[dict]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        assert tuple(reader.fieldnames or ()) == timing.COLUMNS
    assert found or not some
    assert all(float(row["p20"]) <= float(row["median"]) <= float(row["p80"]) for row in found)
    return found


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("bench") / "generate.csv"
    return run("generate", "--quick", "--output", str(path)), path


def test_generate_measures_or_says_why_not(generated):
    printed, path = generated
    found = rows(path)
    for batch in generate.QUICK["batches"]:
        timed = {row["backend"] for row in found if row["B"] == str(batch)}
        for name in {*generate.OURS, *generate.PEERS} - generate.COMPILED:
            assert name in timed or f"  {name}: not timed: " in printed or f"  {name}: no figure: " in printed
        for name in ("fastrnn float32", *peers.BASELINES):
            assert f"  {name}: not timed: " not in printed
    ours = [(row["op"], row["B"], row["backend"]) for row in found if row["backend"] in generate.OURS]
    if printed.count("  roofs: ") < len(generate.QUICK["batches"]):
        assert ": no figure: " in printed
        return  # a machine too busy for a roof has said so
    for op, batch, name in ours:  # each with what the machine allowed in the same rounds
        assert "set-up" in op or "roof" in op or (op.replace("generate", "generate roof"), batch, name) in ours


def test_plot_is_a_function_of_the_csv(generated, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    for folder in ("one", "two"):
        run("plot", "--csv", str(generated[1]), "--folder", str(tmp_path / folder))
    for batch in generate.QUICK["batches"]:
        one, two = (tmp_path / folder / f"generate-{batch}.svg" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert "best peer" in one.read_text()


def test_the_best_peer_is_never_ours():
    bars = plot.series({"net": {"fastrnn float32": 9.0, "eager": 1.0, "eager without oneDNN": 2.0, "jax loop": 3.0}})
    assert bars["baseline: eager PyTorch"] == [(0, 2.0, "")]
    assert bars["best peer"] == [(0, 3.0, "jax loop")]
    assert bars["fastrnn float32"] == [(0, 9.0, "4.5x")]


@pytest.mark.slow
@pytest.mark.skipif(backends.available()["cpu"] is not None, reason="needs the extension: setup.py build_ext --inplace")
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("sequence", ["--quick"]),
        ("sample", ["--quick"]),
        ("threads", ["--quick", "--models", *generate.QUICK["models"], "--batches", "3"]),
    ],
)
def test_the_others_write_their_columns(script, arguments, tmp_path):
    printed = run(script, *arguments, "--output", str(tmp_path / "out.csv"))
    rows(tmp_path / "out.csv", some="machine is too busy" not in printed)  # which leaves rows out and says so


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cell", SMALL)
@pytest.mark.parametrize("name", [name for name in generate.PEERS if name not in generate.COMPILED])
def test_a_peer_computes_the_network(name, cell, batch):
    network = generate.build(SMALL[cell])
    judge = generate.Judge(network, batch)
    try:
        peer = generate.PEERS[name](network, batch)
    except peers.Unavailable as reason:
        pytest.skip(f"not on this machine: {reason}")
    assert judge.error(peer.logits(judge.ids)) <= judge.allowed(peer.dtype)
    tokens = peer.run(32)
    assert tokens.shape == (32, batch)
    assert set(tokens.unique().tolist()) <= set(range(network.config.vocab_size))
    assert abs(judge.surprise(tokens)) <= 6


def test_a_wrong_peer_is_refused():
    network, other = generate.build(SMALL["lstm"]), generate.build(SMALL["lstm"])
    other.rnn.weight_hh_l0 *= 1.01
    peer, judge = peers.eager(other, 2), generate.Judge(network, 2)
    rival = generate.Rival(peer.dtype, peer.run, lambda tokens: tokens)
    with pytest.raises(peers.Unavailable, match="wrong errs by"):
        judge.refuse("wrong", rival, judge.error(peer.logits(judge.ids)))


def test_wrong_draws_are_refused():
    network = generate.build(SMALL["lstm"])
    peer, judge = peers.eager(network, 8, draw=lambda logits: logits.argmax(-1)), generate.Judge(network, 8)
    rival = generate.Rival(peer.dtype, peer.run, lambda tokens: tokens)
    with pytest.raises(peers.Unavailable, match="standard deviations off"):
        judge.refuse("greedy", rival, judge.error(peer.logits(judge.ids)))


def test_a_variant_that_generate_does_not_know_is_named():
    network = generate.build(SMALL["gru"])
    with pytest.raises(peers.Unavailable, match="no keyword no_such_keyword"):
        generate.ours(network, 1, ("float32", {"no_such_keyword": 1}, None), generate.Judge(network, 1))


def test_an_impossible_cost_is_no_figure(capsys):
    sure, noisy = (timing.Slope(timing.Timing(2.0, low, 3.0), timing.Timing(0, 0, 0)) for low in (1.0, -1.0))
    assert generate.possible({"sure": sure, "noisy": noisy}) == {"sure": sure}
    assert "noisy: no figure" in capsys.readouterr().out


def test_slopes_tell_setup_from_steps():
    clock = [0.0]

    def loop(steps: int) -> None:
        clock[0] += 5e-3 + 2e-4 * steps

    found = timing.slopes({"loop": loop}, lambda: clock[0], rounds=3)["loop"]
    assert torch.isclose(torch.tensor(found.step.median), torch.tensor(200.0), rtol=1e-3)
    assert torch.isclose(torch.tensor(found.setup.median), torch.tensor(5000.0), rtol=1e-3)

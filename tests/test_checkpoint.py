"""What training leaves on the disk: it resumes bit for bit, and no crash, interrupt or full disk spoils it."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_cases import LINES, TEXT, make, run, timeless

from fastrnn.checkpoint import CheckpointError, atomic_file, load_checkpoint, save_checkpoint
from fastrnn.metrics import MetricsLog, plot_losses, read_metrics
from fastrnn.models import LanguageModel
from fastrnn.train import CHECKPOINT, METRICS

RESUME = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_checkpoint import RUNS, make, run
torch.set_num_threads(1)
torch.manual_seed(12345)  # what was before must not matter
for name, changes in RUNS.items():
    run(*make(**changes), out=f"{sys.argv[2]}/{name}/parts", resume=True)
"""

RUNS = {
    "stream": {"network": {"num_layers": 2, "dropout": 0.3}, "schedule": "cosine", "log_every": 3},
    "lines": {"network": {"cell": "gru", "dropout": 0.2}, "corpus": LINES, "batching": "lines", "optimizer": "adamw"},
    "random": {"network": {"tie_weights": True, "embedding_dim": 12}, "batching": "random", "batches_per_epoch": 5,
               "optimizer": "sgd", "momentum": 0.9, "schedule": "plateau", "decay_patience": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A folder with each of RUNS twice: ``whole`` in 10 steps; ``parts`` in 5 steps here and 5 in a new process."""
    folder = tmp_path_factory.mktemp("resumed")
    torch.set_num_threads(1)
    for name, changes in RUNS.items():
        run(*make(**changes), out=folder / name / "whole")
        stopped = run(*make(**changes), out=folder / name / "parts", on_event=lambda record: record["step"] >= 5)
        assert (stopped.reason, stopped.step) == ("callback", 5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tests = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", RESUME, tests, str(folder)], check=True, env=environment)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_resume_in_a_new_process_is_bit_for_bit(resumed, name):
    """10 steps are 5 steps, a checkpoint, a new process and 5 steps: the same weights, moments and metrics."""
    folders = resumed / name / "whole", resumed / name / "parts"
    (whole, state), (parts, later) = (load_checkpoint(folder / CHECKPOINT) for folder in folders)
    assert state["step"] == later["step"] == 10
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, parts[key]), key
    for one in (state, later):
        one.pop("elapsed")
        one["best"].pop("elapsed")
    assert state == later
    assert timeless(folders[0] / METRICS) == timeless(folders[1] / METRICS)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_resume_refuses_other_settings_data_and_networks(tmp_path):
    model, prepared, config = make(max_steps=4)
    run(model, prepared, config, out=tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.01, now 0\.02.*new folder"):
        run(*make(lr=0.02), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="saved position belongs to other batches"):
        run(*make(TEXT.replace("fox", "cat")), out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="holds another network"):
        run(*make(network={"cell": "gru"}), out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run(*make(), out=tmp_path / "nowhere", resume=True)
    assert run(*make(max_steps=6), out=tmp_path, resume=True).step == 6


def test_the_folder_is_a_model(tmp_path):
    model, prepared, config = make(corpus=LINES, batching="lines")
    run(model, prepared, config, out=tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    assert (
        loaded.generate("", seed=1, max_new_tokens=9).token_ids
        == model.generate("", seed=1, max_new_tokens=9).token_ids
    )


# --- files ---


def test_metrics_lines(tmp_path):
    model, prepared, config = make()
    run(model, prepared, config, out=tmp_path)
    lines = (tmp_path / METRICS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if r["event"] == "train"] == [2, 4, 6, 8, 10]
    assert [r["step"] for r in records if r["event"] == "valid"] == [5, 10]
    assert {"loss", "nll", "lr", "grad_norm", "tokens", "tok_per_s", "elapsed", "epoch"} <= records[0].keys()


def test_metrics_after_a_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
    assert read_metrics(path) == [{"step": 5}, {"step": 10}]
    with MetricsLog(path, after_step=5) as log:
        log.append({"step": 6})
        assert read_metrics(path) == [{"step": 5}, {"step": 6}]
    path.write_text("nonsense\n{}\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_metrics(path)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot(tmp_path, kind):
    pytest.importorskip("matplotlib", reason="needs matplotlib, which the extra `plots` installs")
    model, prepared, config = make()
    run(model, prepared, config, out=tmp_path)
    image = plot_losses(tmp_path / METRICS, tmp_path / f"loss.{kind}").read_bytes()
    assert image.startswith(b"\x89PNG") if kind == "png" else b"<svg" in image
    (tmp_path / METRICS).write_text("")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_losses(tmp_path / METRICS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_error_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"x": torch.ones(3)}, {"step": 1})
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match="No space left on device; the previous checkpoint is intact"):
        save_checkpoint(path, {"x": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_full_disk(tmp_path):
    """A limit on the size of files, which the kernel enforces, in place of a full disk."""
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"x": torch.ones(3)}, {"step": 1})
    script = f"""
import resource, signal, torch
from fastrnn.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
save_checkpoint({str(path)!r}, {{"x": torch.zeros(100000)}}, {{"step": 2}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large; the previous checkpoint is intact" in done.stderr
    assert load_checkpoint(path)[1] == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


def test_an_interrupt_while_writing_leaves_no_half_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with atomic_file(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_bad_checkpoints(tmp_path):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"x": torch.ones(300)}, {"step": 1})
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            load_checkpoint(path)
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="from another program"):
        load_checkpoint(path)
    model, prepared, config = make(max_steps=2)
    run(model, prepared, config, out=tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "model" / "model.safetensors")

"""The command line as users run it, in real processes with signals, or in this one where that is enough."""

import json
import signal
import subprocess
import sys
import time

import pytest
from cli_cases import COMMAND, ENVIRONMENT, TEXT, fastrnn, folder, model

from fastrnn.__main__ import main
from fastrnn.cli import build_parser
from fastrnn.models import LanguageModel
from fastrnn.network import NetworkConfig
from fastrnn.train import CHECKPOINT

__all__ = ["folder", "model"]  # fixtures


# --- the whole ---


def test_help_is_instant_and_imports_no_torch():
    for arguments in (["--help"], ["train", "--help"], ["generate", "--help"], ["--version"]):
        code = (f"import sys; sys.argv = ['fastrnn', *{arguments}]\n"
                "from fastrnn.__main__ import main\n"
                "try: main()\n"
                "except SystemExit: pass\n"
                "assert not {'torch', 'tokenizers', 'numpy'} & set(sys.modules), 'help imports too much'")  # fmt: skip
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def test_every_command_has_help(capsys):
    parser = build_parser()
    for command in ("demo", "train", "generate", "score", "bench", "info", "recipe"):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([command, "--help"])
        assert end.value.code == 0
        assert f"usage: fastrnn {command}" in capsys.readouterr().out


def test_every_field_of_the_settings_is_an_option():
    options = build_parser().parse_args(["train", "x", "--seq-len", "7", "--max-time", "1m", "--lr", "1e-3"])
    assert (options.seq_len, options.max_time, options.lr) == (7, 60.0, 1e-3)
    assert not hasattr(options, "batch_size"), "only what was given is set, so that a checkpoint can supply the rest"


def test_no_command_and_version(capsys):
    assert fastrnn(capsys)[0] == 2
    code, out, _ = fastrnn(capsys, "--version")
    assert (code, out.count(".")) == (0, 2)


def test_errors_are_one_line_and_debug_is_a_traceback(capsys, monkeypatch):
    monkeypatch.delenv("FASTRNN_DEBUG", raising=False)
    code, out, err = fastrnn(capsys, "generate", "no/such/folder", "-p", "x")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("fastrnn generate: ")
    assert "no/such/folder" in err
    with pytest.raises((ValueError, OSError)):
        main(["generate", "no/such/folder", "-p", "x", "--debug"])
    monkeypatch.setenv("FASTRNN_DEBUG", "1")
    with pytest.raises((ValueError, OSError)):
        main(["generate", "no/such/folder", "-p", "x"])


def test_info(capsys):
    code, out, _ = fastrnn(capsys, "info")
    assert code == 0
    for word in (
        "torch",
        "isa",
        "gpu",
        "backend    reference: available",
        "lstm_forward",
        "sample",
        "not aten: PyTorch has",
    ):
        assert word in out
    facts = json.loads(fastrnn(capsys, "info", "--json")[1])
    assert {"versions", "cpu", "gpus", "built", "backends", "ops"} <= facts.keys()
    assert all(op["backend"] for op in facts["ops"])


def test_bench_lists_and_refuses(capsys, monkeypatch, tmp_path):
    from fastrnn import cli_bench

    assert fastrnn(capsys, "bench", "no-such-bench")[0] == 2
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    code, _, err = fastrnn(capsys, "bench")
    assert code == 2
    assert "not part of the installed package" in err
    (tmp_path / "one.py").write_text('import sys\nif __name__ == "__main__":\n    sys.exit(len(sys.argv))\n')
    assert fastrnn(capsys, "bench")[1] == "one\n"
    assert fastrnn(capsys, "bench", "one", "--a", "b")[0] == 3


# --- train ---


def small(folder, out, *more):
    return ("train", folder / "text.txt", "-o", out, "--hidden-size", 8, "--batch-size", 4, "--seq-len", 8,
            "--max-steps", 12, "--eval-every", 6, "--log-every", 3, *more)  # fmt: skip


def test_train_from_the_command_line(capsys, folder, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, which the extra `plots` installs")
    out = tmp_path / "run"
    more = ("--sample-every", 6, "--sample-tokens", 5, "--sample-prompt", "the", "--plot", out / "loss.svg")
    code, stdout, stderr = fastrnn(capsys, *small(folder, out, *more))
    assert code == 0
    assert stdout.count("the") >= 2, "samples are text, so they are on stdout"
    assert "step 12: validation loss" in stderr
    assert "bits/char" in stderr
    assert (out / "loss.svg").exists()
    assert LanguageModel.from_pretrained(out).generate("the", max_new_tokens=3, seed=0).text


def test_train_refuses_to_overwrite_and_resumes(capsys, folder, tmp_path):
    out = tmp_path / "run"
    assert fastrnn(capsys, *small(folder, out))[0] == 0
    code, _, err = fastrnn(capsys, *small(folder, out))
    assert code == 2
    assert "--resume" in err
    assert "--overwrite" in err
    assert fastrnn(capsys, "train", "-o", out, "--resume", "--max-steps", 20)[0] == 0
    whole = tmp_path / "whole"
    assert fastrnn(capsys, *small(folder, whole, "--max-steps", 20))[0] == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    code, _, err = fastrnn(capsys, "train", "-o", out, "--resume", "--hidden-size", 9)
    assert code == 2
    assert "--hidden-size: it was 8, now 9" in err
    assert fastrnn(capsys, *small(folder, out, "--overwrite"))[0] == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11 or newer, which has tomllib")
def test_train_with_a_config_file(capsys, folder, tmp_path):
    (tmp_path / "run.toml").write_text(
        'hidden_size = 8\nbatch_size = 4\nseq_len = 8\nmax_steps = 30\noptimizer = "sgd"\n'
    )
    out = tmp_path / "run"
    arguments = ("train", folder / "text.txt", "-o", out, "--config", tmp_path / "run.toml", "--max-steps", 2)
    assert fastrnn(capsys, *arguments)[0] == 0
    assert LanguageModel.from_pretrained(out).config.hidden_size == 8
    (tmp_path / "run.toml").write_text("hiden_size = 8\n")
    code, _, err = fastrnn(capsys, *arguments, "--overwrite")
    assert code == 2
    assert "no such option: hiden_size" in err
    (tmp_path / "run.toml").write_text("= 8\n")
    assert "is not TOML" in fastrnn(capsys, *arguments, "--overwrite")[2]


def test_train_with_bad_input(capsys, folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Übermut tut selten gut".encode("latin-1"))
    for file, code, text in (
        (tmp_path / "empty.txt", 1, "is empty; a corpus needs text"),
        (tmp_path / "latin.txt", 1, "is not utf-8: byte 0"),
        (tmp_path / "none.txt", 1, "there is no file"),
    ):
        got, out, err = fastrnn(capsys, "train", file, "-o", tmp_path / "run")
        assert (got, out) == (code, "")
        assert text in err
        assert "Traceback" not in err
    assert fastrnn(capsys, "train", folder / "text.txt")[0] == 2
    assert fastrnn(capsys, "train", "-o", tmp_path / "run")[0] == 2
    code, _, err = fastrnn(capsys, *small(folder, tmp_path / "run", "--lr", "-1"))
    assert (code, "lr must be above 0, got -1" in err) == (2, True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    code, _, err = fastrnn(capsys, "train", "-o", tmp_path / "run", "--resume")
    assert (code, "no whole checkpoint" in err or "not a training checkpoint" in err) == (1, True)


def wait_for(path, text, process, seconds=120):
    """Wait until a file holds ``text``, or fail when the process ends or time runs out."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail(f"{path} did not come to hold {text!r} in {seconds} s")


def test_ctrl_c_and_termination_save_a_checkpoint(folder, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / str(code)
        arguments = [str(a) for a in small(folder, out, "--max-steps", 10**6, "--save-every", 0, "--log-every", 1)]
        process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env=ENVIRONMENT)  # fmt: skip
        wait_for(out / "metrics.jsonl", '"step": 3', process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == code
        assert "a checkpoint is in" in err
        assert "Traceback" not in err
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        resumed = main(["train", "-o", str(out), "--resume", "--max-steps", str(last + 3)])
        assert resumed == 0


# --- score ---


def test_score(capsys, folder, model, tmp_path):
    loaded = LanguageModel.from_pretrained(model)
    expected = loaded.score(TEXT)
    facts = json.loads(fastrnn(capsys, "score", model, folder / "text.txt", "--json")[1])
    assert facts["nll"] == pytest.approx(expected.nll)
    assert facts["bits_per_char"] == pytest.approx(expected.bits_per_char)
    code, out, _ = fastrnn(capsys, "score", model, folder / "text.txt")
    assert code == 0
    assert f"perplexity {expected.perplexity:.3f}" in out
    (tmp_path / "lines.txt").write_text("the fox\nthe dog\n")
    lines = fastrnn(capsys, "score", model, tmp_path / "lines.txt", "--lines", "--json")[1].splitlines()
    assert [json.loads(line).get("text") for line in lines] == ["the fox", "the dog", None]
    assert json.loads(lines[0])["nll"] == pytest.approx(loaded.score("the fox").nll)


def test_generate_without_a_tokenizer(capsys, tmp_path):
    LanguageModel(NetworkConfig(5, hidden_size=4)).save_pretrained(tmp_path)
    code, _, err = fastrnn(capsys, "generate", tmp_path, "-p", "x")
    assert (code, "no tokenizer" in err) == (1, True)

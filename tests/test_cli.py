"""The command line as users run it, in real processes with pipes and signals, or in this one where that is enough."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from fastrnn import jsonl
from fastrnn.__main__ import main
from fastrnn.cli import UsageError, build_parser
from fastrnn.cli_generate import shard_of
from fastrnn.config import TrainConfig
from fastrnn.models import LanguageModel
from fastrnn.network import NetworkConfig
from fastrnn.prepare import prepare
from fastrnn.train import CHECKPOINT, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs.\n" * 30
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
COMMAND = [sys.executable, "-m", "fastrnn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model, its text and files of requests."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text(TEXT)
    config = TrainConfig(batch_size=4, seq_len=16, max_steps=40, lr=0.02, seed=3)
    prepared = prepare(TEXT, config)
    torch.manual_seed(3)
    model = prepared.model(hidden_size=16, embedding_dim=8)
    train(model, prepared.train, config, valid=prepared.valid, out=place / "model")
    return place


@pytest.fixture
def model(folder):
    return str(folder / "model")


def fastrnn(capsys, *arguments):
    """Run a command in this process: (exit code, stdout, stderr)."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


# --- generate ---


def test_generate_one_prompt(capsys, model):
    expected = LanguageModel.from_pretrained(model).generate("the", max_new_tokens=12, seed=5, temperature=0.7)
    options = ("-p", "the", "--max-new-tokens", 12, "--seed", 5, "--temperature", 0.7)
    code, out, err = fastrnn(capsys, "generate", model, *options)
    assert (code, err) == (0, "")
    assert out == expected.text + ("" if expected.text.endswith("\n") else "\n")
    answer = json.loads(fastrnn(capsys, "generate", model, *options, "--json", "--nll", "--logprobs")[1])
    assert answer["text"] == expected.text
    assert answer["nll"] == pytest.approx(-sum(answer["logprobs"]))
    texts = fastrnn(capsys, "generate", model, *options, "-n", 3)[1]
    assert texts.startswith(expected.text)


@pytest.mark.parametrize(
    "options, text",
    [
        (("--temperature", "-1"), "temperature must be 0"),
        (("--top-p", "0"), "top_p must be above 0"),
        (("--max-new-tokens", "-1"), "max_new_tokens must be"),
        (("-p", "the Ω"), "'Ω' (U+03A9) at 4"),
        (("-p", ""), "prompt is empty"),
    ],
)
def test_generate_with_bad_input(capsys, model, options, text):
    code, out, err = fastrnn(capsys, "generate", model, "-p", "the", *options)
    assert (code, out) == (1, "")
    assert text in err


def test_generate_edges(capsys, model):
    assert fastrnn(capsys, "generate", model, "-p", "the", "--max-new-tokens", 0)[:2] == (0, "")
    code, out, _ = fastrnn(capsys, "generate", model, "-p", "the Ω", "--unk", "skip", "--max-new-tokens", 3)
    assert (code, len(out.rstrip("\n")) <= 3) == (0, True)
    assert fastrnn(capsys, "generate", model, "-p", "x", "--shard", "0/2")[0] == 2
    stopped = fastrnn(capsys, "generate", model, "-p", "the", "--stop", "o", "--stop", "e")[1]
    assert not set("oe") & set(stopped)


REQUESTS = [
    "the quick",
    '{"prompt": "pack", "temperature": 0.5, "max_new_tokens": 4}',
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "my", "max_tokens": 3, "n": 2}}',
    "{broken",
    '{"prompt": "Ω"}',
    '{"prompt": "box", "temperature": -1}',
    '{"prompt": "box", "frequency_penalty": 1}',
    '{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"prompt": "box"}}',
    "the lazy",
    '{"prompt": "five", "stop": ["e", "o"], "seed": 4}',
    '{"prompt": [1, 2, 3], "max_tokens": 2, "custom_id": "ids"}',
]


@pytest.fixture
def requests(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(REQUESTS[:4] + [""] + REQUESTS[4:]) + "\n")
    return path


def test_generate_from_a_file(capsys, model, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    code, stdout, err = fastrnn(
        capsys, "generate", model, "-i", requests, "-o", out, "--max-new-tokens", 6, "--seed", 2
    )
    assert (code, stdout) == (1, "")
    assert "5 of the requests failed" in err
    lines = results(out)
    keys = [line.get("custom_id", line.get("index")) for line in lines]
    assert keys == [0, 1, "a", 3, 4, 5, 6, "b", 8, 9, "ids"], "in the order of the input"
    assert lines[2]["response"]["status_code"] == 200
    assert len(lines[2]["response"]["body"]["choices"]) == 2
    assert lines[2]["response"]["body"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    for index, text in ((3, "not JSON"), (4, "U+03A9"), (5, "temperature must be 0"), (6, "frequency_penalty")):
        assert text in lines[index]["error"]
    assert "only POST /v1/completions" in lines[7]["error"]["message"]
    loaded = LanguageModel.from_pretrained(model)
    assert lines[8]["text"] == loaded.generate("the lazy", max_new_tokens=6, seed=2, sequence_id=8).text
    assert lines[1]["text"] == loaded.generate("pack", max_new_tokens=4, seed=2, sequence_id=1, temperature=0.5).text
    assert (
        lines[9]["text"]
        == loaded.generate("five", max_new_tokens=6, seed=4, sequence_id=9, stop_strings=["e", "o"]).text
    )


def test_generate_again_adds_only_what_is_missing(capsys, model, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ("generate", model, "-i", requests, "-o", out, "--max-new-tokens", 6)
    fastrnn(capsys, *arguments)
    whole = out.read_bytes()
    fastrnn(capsys, *arguments)
    assert out.read_bytes() == whole
    cut = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(cut[:3]) + cut[3][:7])  # killed while writing the fourth
    _, _, err = fastrnn(capsys, *arguments)
    assert out.read_bytes() == whole
    assert "has 3 results; only what is missing is added" in err
    out.write_text("my notes\n")
    code, _, err = fastrnn(capsys, *arguments)
    assert (code, out.read_text()) == (1, "my notes\n")
    assert "line 1: not a result" in err


def test_shards_write_the_same_texts(capsys, model, requests, tmp_path, monkeypatch):
    options = ("--max-new-tokens", 6, "--seed", 9)
    fastrnn(capsys, "generate", model, "-i", requests, "-o", tmp_path / "whole", *options)
    for shard in range(3):
        fastrnn(capsys, "generate", model, "-i", requests, "-o", tmp_path / f"part{shard}", "--shard", f"{shard}/3",
                "--batch-size", 1, *options)  # fmt: skip
    parts = [results(tmp_path / f"part{shard}") for shard in range(3)]
    whole = results(tmp_path / "whole")
    assert [parts[index % 3][index // 3] for index in range(len(whole))] == whole
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    fastrnn(capsys, "generate", model, "-i", requests, "-o", tmp_path / "torchrun.jsonl", *options)
    assert results(tmp_path / "torchrun.1-of-3.jsonl") == parts[1]


def test_shards_as_text():
    assert shard_of("1/4", {}) == (1, 4)
    assert shard_of(None, {}) == (0, 1)
    assert shard_of(None, {"RANK": "2", "WORLD_SIZE": "5"}) == (2, 5)
    for text in ("4/4", "1", "-1/2", "a/b", "1/0"):
        with pytest.raises(UsageError, match="--shard must be I/N"):
            shard_of(text, {})


def test_pipes_in_and_out(model):
    """stdin to stdout in a real process; only text on stdout; a reader that goes away is no error."""
    arguments = [*COMMAND, "generate", model, "-i", "-", "--max-new-tokens", "3"]
    done = subprocess.run(arguments, input=b"the\n\xff\xfe\nbox\n", capture_output=True, env=ENVIRONMENT, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert "U+FFFD" in lines[1]["error"]
    assert done.returncode == 1
    many = [*COMMAND, "generate", model, "-p", "the", "--max-new-tokens", "1000000", "--seed", "1"]
    process = subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert select.select([process.stdout], [], [], 120)[0], "nothing came"
    assert process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0
    assert err == b""


def test_ctrl_c_while_generating(model):
    many = [*COMMAND, "generate", model, "-p", "the", "--max-new-tokens", "1000000"]
    process = subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert select.select([process.stdout], [], [], 120)[0], "nothing came"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err


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


# --- the lines ---


def test_results_of_requests():
    output = SimpleNamespace(
        text="t", finish_reason="eos", usage={"prompt_tokens": 1, "completion_tokens": 2}, error=None,
        logprobs=[-1.0, -2.0], nll=3.0, token_ids=[1, 2],
    )  # fmt: skip
    line = jsonl.parse_line('{"custom_id": "k", "body": {"prompt": "p"}}', 7)
    choice = jsonl.result_line(line, [output], "m")["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] == {"token_logprobs": [-1.0, -2.0], "token_ids": [1, 2]}
    assert jsonl.result_line(jsonl.parse_line("p", 7), [output], "m")["nll"] == 3.0


@pytest.mark.parametrize(
    "text, error",
    [
        ('{"body": {"prompt": "x"}}', "needs a custom_id"),
        ('{"body": 3, "custom_id": "a"}', "must be an object, got int"),
        ('{"max_tokens": 3}', "a prompt is needed"),
        ('{"prompt": ["a", "b"]}', "a prompt is needed"),
        ('{"prompt": "a", "max_tokens": "3"}', "max_tokens must be a number, got '3'"),
        ('{"prompt": "a", "seed": 1.5}', "seed must be a whole number"),
        ('{"prompt": "a", "n": 0}', "n must be from 1"),
        ('{"prompt": "a", "stop": [1]}', "stop must be a text"),
        ('{"prompt": "a"', "not JSON"),
    ],
)
def test_bad_lines(text, error):
    assert error in jsonl.parse_line(text, 0).error

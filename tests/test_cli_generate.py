"""``fastrnn generate``: one prompt, files of requests, shards, pipes and interrupts."""

import json
import re
import select
import signal
import subprocess
from types import SimpleNamespace

import pytest
from cli_cases import COMMAND, ENVIRONMENT, fastrnn, folder, model, results

from fastrnn import backends, jsonl
from fastrnn.cli import UsageError
from fastrnn.cli_generate import shard_of
from fastrnn.models import LanguageModel

__all__ = ["folder", "model"]  # fixtures


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


@pytest.mark.skipif(backends.extension_missing() is not None, reason="needs the C++ extension (make build)")
def test_fewer_bits_say_what_they_cost(capsys, model):
    expected = LanguageModel.from_pretrained(model).generate("the", max_new_tokens=12, seed=5, quantize="int8")
    options = ("-p", "the", "--max-new-tokens", 12, "--seed", 5, "--precision", "int8")
    code, out, err = fastrnn(capsys, "generate", model, *options)
    assert (code, out.rstrip("\n")) == (0, expected.text.rstrip("\n"))
    assert re.search(r"int8 weights cost -?\d\.\d{4} bits a token", err)


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
    process = subprocess.Popen(
        many, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert select.select([process.stdout], [], [], 120)[0], "nothing came"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err


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

"""``fastrnn generate``: one prompt streamed to the terminal, or a file of requests to a file of results."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from . import jsonl
from .cli import UsageError

CHUNK = 2048  # requests between two writes of results: enough to keep the batch full by refill
SWEPT = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def run(options: argparse.Namespace) -> int:
    """0, or 1 when a line of the input could not be served."""
    if options.shard and options.input is None:
        raise UsageError("--shard splits the lines of -i FILE; it means nothing for one prompt")
    shard = shard_of(options.shard, os.environ) if options.input is not None else (0, 1)
    from .devices import set_up
    from .models import LanguageModel

    model = LanguageModel.from_pretrained(options.model, device=set_up(options.device, options.threads))
    if options.precision != "float32":
        cost = model.precision_cost(**_precision(options))
        print(f"{options.precision} weights cost {cost:.4f} bits a token of the model's own text", file=sys.stderr)
    if options.input is None:
        return _one(model, options)
    return _many(model, options, shard)


def shard_of(text: str | None, environment: Any) -> tuple[int, int]:
    """(index, count) of ``I/N``, else of torchrun's RANK and WORLD_SIZE, else (0, 1).

    Raises:
        UsageError: the text is not ``I/N`` with 0 <= I < N.
    """
    if text is None:
        return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard must be I/N with I from 0 to N-1, such as 0/4, got {text!r}")
    return int(index), int(count)


def _precision(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `LanguageModel.generate` that ask for --precision."""
    import torch

    return {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}[options.precision]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in SWEPT}


def _one(model: Any, options: argparse.Namespace) -> int:
    """The prompt of ``-p``, streamed unless numbers or several results are asked for."""
    prompt = options.prompt or ""
    common = {"unk": options.unk, "stop_strings": options.stop, **_settings(options), **_precision(options)}
    if not (options.json or options.logprobs or options.nll or options.n > 1):
        last = "\n"
        for piece in model.stream(prompt, **common):
            print(piece, end="", flush=True)
            last = piece[-1]
        print(end="" if last == "\n" else "\n", flush=True)
        return 0
    outputs = model.generate(
        prompt, num_return_sequences=options.n, return_logprobs=options.logprobs, return_nll=options.nll,
        batch_size=options.batch_size, **common,
    )  # fmt: skip
    outputs = outputs if isinstance(outputs, list) else [outputs]
    line = jsonl.Line(0, 0, prompt)
    if options.json or options.logprobs or options.nll:
        print(json.dumps(jsonl.result_line(line, outputs, options.model), ensure_ascii=False))
    else:
        print("\n".join(output.text for output in outputs))
    if errors := [output.error for output in outputs if output.error]:
        raise RuntimeError(errors[0])
    return 0


def _many(model: Any, options: argparse.Namespace, shard: tuple[int, int]) -> int:
    """The requests of ``-i``, in order, those left out that the output already has."""
    output = options.output
    if output != "-" and options.shard is None and shard[1] > 1:  # torchrun gives every process the same command
        path = Path(output)
        output = str(path.with_name(f"{path.stem}.{shard[0]}-of-{shard[1]}{path.suffix}"))
    done = jsonl.finished_keys(output) if output != "-" else set()
    if done:
        print(f"{output} has {len(done)} results; only what is missing is added", file=sys.stderr)
    failures = 0
    with _input(options.input) as source, _output(output) as sink, _Meter() as meter:
        mine = (line for line in jsonl.read_lines(source) if line.index % shard[1] == shard[0])
        todo = (line for line in mine if line.key not in done)
        while chunk := list(itertools.islice(todo, CHUNK)):
            for result, tokens in _serve(model, chunk, options):
                failures += result.get("error") is not None
                sink.write(json.dumps(result, ensure_ascii=False) + "\n")
                meter.count(tokens)
            sink.flush()
    if failures:
        print(f"{failures} of the requests failed; each has a line with its error", file=sys.stderr)
    return 1 if failures else 0


@contextlib.contextmanager
def _input(path: str) -> Iterator[Iterable[str]]:
    """The lines of a file or of stdin, as UTF-8; a byte that is not becomes U+FFFD and spoils its own line only."""
    if path == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield sys.stdin
    else:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield file


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    if path == "-":
        yield sys.stdout
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            yield file


def _serve(model: Any, chunk: list[jsonl.Line], options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], int]]:
    """The results of a chunk in its order, each with its number of tokens; equal n and stop strings run together."""
    results: dict[int, tuple[list[Any], str | None]] = {}
    groups: dict[tuple, list[jsonl.Line]] = {}
    for line in chunk:
        if line.error is not None:
            results[line.index] = [], line.error
            continue
        stop = line.settings.get("stop", options.stop) or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        groups.setdefault((line.settings.get("n", options.n), stop, line.logprobs or options.logprobs), []).append(line)
    for group, lines in groups.items():
        results |= _run_group(model, lines, options, *group)
    for line in chunk:
        outputs, error = results[line.index]
        tokens = sum(output.usage["completion_tokens"] for output in outputs)
        yield jsonl.result_line(line, outputs, Path(options.model).name, error), tokens


def _run_group(
    model: Any, lines: list[jsonl.Line], options: argparse.Namespace, n: int, stop: tuple[str, ...], logprobs: bool
) -> dict[int, tuple[list[Any], str | None]]:
    """Results by line number. A request that the model refuses is found by asking for each alone, with no tokens."""

    def ask(some: list[jsonl.Line], **changed: Any) -> list[Any]:
        settings = [{**_settings(options), **line.settings} for line in some]
        swept = {name: [setting[name] for setting in settings] for name in SWEPT}
        return model.generate(
            [line.prompt for line in some], sequence_id=[line.index for line in some], num_return_sequences=n,
            stop_strings=list(stop), unk=options.unk, return_logprobs=logprobs, return_nll=options.nll,
            batch_size=options.batch_size, **{**swept, **changed}, **_precision(options),
        )  # fmt: skip

    refused: dict[int, tuple[list[Any], str | None]] = {}
    try:
        outputs = ask(lines)
    except (ValueError, TypeError):
        for line in lines:
            try:
                wanted = line.settings.get("max_new_tokens", options.max_new_tokens)
                ask([line], max_new_tokens=min(wanted, 0))
            except (ValueError, TypeError) as problem:
                refused[line.index] = [], str(problem)
        if not refused:
            raise
        lines = [line for line in lines if line.index not in refused]
        outputs = ask(lines) if lines else []
    served = {line.index: (outputs[k * n : (k + 1) * n], None) for k, line in enumerate(lines)}
    return {**refused, **served}


class _Meter:
    """Requests and tokens per second on stderr: a bar on a terminal, else a line every ten seconds and at the end."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.requests = self.tokens = 0
        self.start = self.told = time.monotonic()
        self.bar = tqdm(unit="request", desc="generating", disable=not sys.stderr.isatty())

    def __enter__(self) -> _Meter:
        return self

    def count(self, tokens: int) -> None:
        self.requests += 1
        self.tokens += tokens
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.told > 10:
            self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        speed = self.tokens / max(self.told - self.start, 1e-9)
        print(f"{self.requests} requests, {self.tokens} tokens, {speed:,.0f} tok/s", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self._tell()

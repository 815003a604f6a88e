"""Requests and results as lines: OpenAI's batch form, a short JSON form, and plain text.

One bad line is one error result; the others are not touched by it. A result's random numbers are named by its line's
number in the input, so splitting the input among processes, or interrupting and repeating a run, changes no text.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# OpenAI's name of a field of a completion request -> ours.
RENAMED = {"max_tokens": "max_new_tokens", "n": "n", "stop": "stop"}
NUMBERS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
FIELDS = {*NUMBERS, "n", "stop", "logprobs", "prompt", "model", "custom_id", "stream", "user", "echo"}


@dataclasses.dataclass
class Line:
    """One line of the input: a request, or what is wrong with it.

    Attributes:
        index: number of the line, from 0, blank lines not counted.
        key: its ``custom_id``, else the index: what tells in the output that it is done.
        settings: what the line itself sets, by the names of `NUMBERS`, ``n`` and ``stop``.
        batch_form: the line was in OpenAI's batch form, so its result is too.
    """

    index: int
    key: str | int
    prompt: str | list[int] = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_form: bool = False
    logprobs: bool = False
    error: str | None = None


def read_lines(lines: Iterable[str]) -> Iterator[Line]:
    """The requests of ``lines``, blank ones left out. A line that is wrong is a `Line` with an ``error``."""
    index = 0
    for text in lines:
        text = text.rstrip("\r\n")
        if not text.strip():
            continue
        yield parse_line(text, index)
        index += 1


def parse_line(text: str, index: int) -> Line:
    """One line as a request; text that does not begin like a JSON object is the prompt itself."""
    if not text.lstrip().startswith("{"):
        return Line(index, index, text)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as problem:
        return Line(index, index, error=f"not JSON: {problem.msg} at character {problem.pos}")
    batch_form = "body" in fields
    key = fields.get("custom_id", index)
    line = Line(index, key if isinstance(key, (str, int)) else index, batch_form=batch_form)
    body = fields["body"] if batch_form else fields
    line.error = _envelope_error(fields) if batch_form else None
    line.error = line.error or _body_error(body)
    if line.error is None:
        line.prompt = body["prompt"]
        line.logprobs = body.get("logprobs") not in (None, False)
        given = {RENAMED.get(name, name): value for name, value in body.items()}
        line.settings = {name: given[name] for name in (*NUMBERS, "n", "stop") if given.get(name) is not None}
    return line


def _envelope_error(fields: dict[str, Any]) -> str | None:
    if not isinstance(fields.get("custom_id"), (str, int)):
        return "a batch request needs a custom_id"
    if fields.get("method", "POST") != "POST" or fields.get("url", "/v1/completions") != "/v1/completions":
        return f"only POST /v1/completions is understood, got {fields.get('method')} {fields.get('url')}"
    return None


def _body_error(body: Any) -> str | None:
    if not isinstance(body, dict):
        return f"the body must be an object, got {type(body).__name__}"
    prompt = body.get("prompt")
    ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not isinstance(prompt, str) and not ids:
        return f"a prompt is needed, one text or one list of token ids, got {prompt!r:.60}"
    if unknown := sorted(set(body) - FIELDS - set(RENAMED)):
        return f"unknown field {', '.join(unknown)}; known are {', '.join(sorted(FIELDS | set(RENAMED)))}"
    for name in (*NUMBERS, "max_tokens", "n"):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"{name} must be a number, got {value!r}"
    for name in ("max_new_tokens", "max_tokens", "top_k", "seed", "n"):
        if isinstance(body.get(name), float):
            return f"{name} must be a whole number, got {body[name]!r}"
    if body.get("n") is not None and not 1 <= body["n"] <= 65536:
        return f"n must be from 1 to 65536, got {body['n']}"
    stop = body.get("stop") or []
    if not isinstance(stop, (str, list)) or not all(isinstance(text, str) and text for text in stop):
        return f"stop must be a text or a list of texts, got {stop!r}"
    return None


def result_line(line: Line, outputs: list[Any], model: str, error: str | None = None) -> dict[str, Any]:
    """The output object of a request, in the form of its input; it has no clock in it, so equal runs give equal files.

    Args:
        outputs: the `Generation`s of the request, empty with ``error``.
    """
    failed = [output.error for output in outputs if output.error]
    error = error or (failed[0] if failed else None)
    if line.batch_form:
        return _batch_result(line, outputs, model, error)
    result: dict[str, Any] = {"index": line.index}
    if line.key != line.index:
        result["custom_id"] = line.key
    if error:
        return {**result, "error": error}
    choices = [_choice(output) for output in outputs]
    result["prompt"] = line.prompt
    return {**result, **choices[0]} if len(choices) == 1 else {**result, "choices": choices}


def _choice(output: Any) -> dict[str, Any]:
    choice = {"text": output.text, "finish_reason": output.finish_reason, "usage": output.usage}
    if output.logprobs is not None:
        choice |= {"token_ids": output.token_ids, "logprobs": output.logprobs}
    if output.nll is not None:
        choice["nll"] = output.nll
    return choice


def _batch_result(line: Line, outputs: list[Any], model: str, error: str | None) -> dict[str, Any]:
    name = f"fastrnn-{line.index}"
    if error:
        return {
            "id": name,
            "custom_id": line.key,
            "response": None,
            "error": {"code": "invalid_request", "message": error},
        }
    choices = []
    for number, output in enumerate(outputs):
        choice = {"index": number, **_choice(output)}
        choice.pop("usage")
        logprobs, ids = choice.pop("logprobs", None), choice.pop("token_ids", None)
        choice["logprobs"] = None if logprobs is None else {"token_logprobs": logprobs, "token_ids": ids}
        choice["finish_reason"] = "stop" if output.finish_reason == "eos" else output.finish_reason
        choices.append(choice)
    prompt = outputs[0].usage["prompt_tokens"]
    written = sum(output.usage["completion_tokens"] for output in outputs)
    body = {
        "id": f"cmpl-{line.index}", "object": "text_completion", "created": 0, "model": model, "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written},
    }  # fmt: skip
    response = {"status_code": 200, "request_id": name, "body": body}
    return {"id": name, "custom_id": line.key, "response": response, "error": None}


def finished_keys(path: str | os.PathLike[str]) -> set[str | int]:
    """The keys of the results in an output file; a half-written last line is cut off the file.

    Raises:
        ValueError: a line before the last is no result of ours: the file is something else and must not be appended to.
    """
    path = Path(path)
    if not path.exists():
        return set()
    keys: set[str | int] = set()
    with open(path, "r+b") as file:
        whole = 0
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                file.truncate(whole)
                break
            try:
                result = json.loads(raw)
                keys.add(result["custom_id"] if "custom_id" in result else result["index"])
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(
                    f"{path}, line {number}: not a result of `fastrnn generate`; appending to it would spoil it. "
                    "Choose another -o, or remove the file"
                ) from problem
            whole += len(raw)
    return keys

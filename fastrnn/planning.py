"""From prompts and options to the requests that `LanguageModel.generate` runs, all checked before the first starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .defaults import PER_OUTPUT, SAMPLING, check_numbers, checked_stops, expand
from .generate import Runner, prefill
from .request import Request, changed, check_request
from .sampling import SamplingParams

# The options of `LanguageModel.generate` that decide what is made; the others decide how it is run and handed out.
OPTIONS = frozenset({
    *PER_OUTPUT, "num_return_sequences", "eos_token_id", "stop_strings", "seed", "sequence_id", "return_logprobs",
    "return_nll", "unk", "state", "window", "dtype", "quantize",
})  # fmt: skip


@dataclasses.dataclass
class Output:
    """One output to make: of which prompt, by which request, and whether other outputs share the prompt."""

    prompt: int
    request: Request
    shares: bool


def plan(model: Any, prompts: Sequence[Any], single: bool, given: Mapping[str, Any]) -> list[Output]:
    """The outputs to make, in order; ``ValueError`` for what cannot be made.

    model: a `LanguageModel`; prompts: texts or ids; single: there is one, and lists in ``given`` are a sweep over it;
    given: the options that are not None.
    """
    defaults, state = model.generation_config, given.get("state")
    settings = {name: given.get(name, getattr(defaults, name)) for name in PER_OUTPUT}
    settings["seed"] = given["seed"] if "seed" in given else int(torch.randint(2**62, ()))
    numbered = isinstance(settings["seed"], int) and not single
    settings["sequence_id"] = given.get("sequence_id", list(range(len(prompts))) if numbered else 0)
    n = given.get("num_return_sequences", defaults.num_return_sequences)
    check_numbers(0, 1.0, n)
    checked_stops(given.get("stop_strings"))
    rows = expand(settings, len(prompts), single)
    eos = eos_ids(model, given.get("eos_token_id", defaults.eos_token_id))
    logprobs = bool(given.get("return_logprobs") or given.get("return_nll"))
    outputs: list[Output] = []
    encoded = [model.encode(prompt, unk=given.get("unk"), state=state) for prompt in prompts]
    for k, row in enumerate(rows):
        which = 0 if single else k
        if not isinstance(row["sequence_id"], int) or not 0 <= row["sequence_id"] < 2**32:
            raise ValueError(f"sequence_id must be a whole number in 0 .. 2**32-1, got {row['sequence_id']!r}")
        request = Request(
            encoded[which], row["max_new_tokens"], SamplingParams(**{name: row[name] for name in SAMPLING}),
            row["seed"], row["sequence_id"] << 32, row["repetition_penalty"], eos, state, logprobs, given.get("window"),
        )  # fmt: skip
        check_request(request, model)
        shares = n > 1 or (single and len(rows) > 1)
        first = request.sequence
        outputs.extend(Output(which, changed(request, sequence=first + j), shares) for j in range(n))
    return outputs


def eos_ids(model: Any, wanted: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end a text: those wanted, or the tokenizer's eos where that is None."""
    if wanted is None:
        eos = None if model.tokenizer is None else model.tokenizer.eos_id
        return frozenset() if eos is None else frozenset([eos])
    ids = frozenset([wanted] if isinstance(wanted, int) else wanted)
    if wrong := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise ValueError(f"eos_token_id must be in 0 .. {model.config.vocab_size - 1}, got {wrong[0]}")
    return ids


def requests(model: Any, outputs: Sequence[Output], runner: Runner) -> Iterator[Request]:
    """The requests of ``outputs``; a prompt that several of them share is read once, when the first of them starts."""
    of, state = -1, None
    for output in outputs:
        request = output.request
        if output.shares and request.max_new_tokens:
            if output.prompt != of:
                state = prefill(model, request.prompt, request.state, window=request.window, runner=runner)
                of = output.prompt
            request = changed(request, prompt=(), state=state)
        yield request

"""What a language model gives back: Generation, Score and Scores."""

from __future__ import annotations

import dataclasses
import math

from .request import Completion, Request


@dataclasses.dataclass
class Generation:
    """One output of `LanguageModel.generate`.

    text           the new text, without the prompt, the eos token and the stop string;  token_ids: all new ids, eos
    included
    finish_reason  ``length``, ``eos``, ``stop`` (a stop string or the streamer) or ``error``, which ``error`` explains
    logprobs       natural log of each token's probability under the model at temperature 1 without penalty or filters
    nll            minus their sum;  both None unless asked for
    usage          ``prompt_tokens`` and ``completion_tokens``
    seed, sequence what names this output's random numbers: ``generate(prompt, seed=seed, sequence_id=sequence >> 32)``
                   makes the same text as its first output (see `LanguageModel.generate`)
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: dict[str, int]
    logprobs: list[float] | None = None
    nll: float | None = None
    error: str | None = None
    seed: int = 0
    sequence: int = 0


@dataclasses.dataclass
class Score:
    """How probable a text is: ``nll`` in nats, over ``tokens`` predicted tokens that spell ``chars`` characters."""

    nll: float
    tokens: int
    chars: int

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); NaN without tokens, inf beyond float range."""
        mean = self.nll / self.tokens if self.tokens else math.nan
        return math.inf if mean > 700 else math.exp(mean)

    @property
    def bits_per_char(self) -> float:
        return self.nll / math.log(2) / self.chars if self.chars else math.nan


class Scores(list[Score]):
    """One `Score` per text, in order; ``total`` adds them up."""

    @property
    def total(self) -> Score:
        return Score(math.fsum(s.nll for s in self), sum(s.tokens for s in self), sum(s.chars for s in self))


def generation(request: Request, completion: Completion, text: str, logprobs: bool, nll: bool) -> Generation:
    """The `Generation` of a finished request."""
    usage = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": len(completion.token_ids)}
    logs = completion.logprobs
    return Generation(
        text, completion.token_ids, completion.finish_reason, usage, logs if logprobs else None,
        -math.fsum(logs) if nll and logs is not None else None, completion.error, request.seed, request.sequence,
    )  # fmt: skip

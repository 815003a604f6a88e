"""GenerationConfig: a model's own defaults for generation, the content of generation_config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .sampling import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "mode_of")
PER_OUTPUT = (*SAMPLING, "repetition_penalty", "max_new_tokens")


@dataclasses.dataclass
class GenerationConfig:
    """What `LanguageModel.generate` does when it is not told otherwise; ``ValueError`` for a value out of range.

    max_new_tokens      most tokens of one output;  num_return_sequences: outputs per prompt
    temperature ... mode_of: as in `SamplingParams`;  repetition_penalty: 1 is off
    eos_token_id        id or ids that end a text; None is the tokenizer's eos;  stop_strings: texts that end a text
    start_token_id      an id that is put before every prompt and every scored text, as in training on lines; None: only
                        an empty prompt gets one, the tokenizer's bos or else its eos
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mode_of: int = 1
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    stop_strings: list[str] = dataclasses.field(default_factory=list)
    start_token_id: int | None = None

    def __post_init__(self) -> None:
        self.sampling()
        check_numbers(self.max_new_tokens, self.repetition_penalty, self.num_return_sequences)
        self.stop_strings = checked_stops(self.stop_strings)

    def sampling(self) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in SAMPLING})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GenerationConfig:
        """The config of ``fields``; an unknown name is a ``ValueError``."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"unknown generation setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**fields)


def check_numbers(max_new_tokens: Any, repetition_penalty: Any, num_return_sequences: Any = 1) -> None:
    """``ValueError`` for a number out of its range."""
    for name, value, low in (("max_new_tokens", max_new_tokens, 0), ("num_return_sequences", num_return_sequences, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    if not isinstance(repetition_penalty, (int, float)) or not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be positive and finite (1 = off), got {repetition_penalty!r}")


def checked_stops(stops: str | Sequence[str] | None) -> list[str]:
    """Stop strings as a list; ``ValueError`` for an empty one."""
    listed = [stops] if isinstance(stops, str) else list(stops or ())
    if not all(isinstance(stop, str) and stop for stop in listed):
        raise ValueError(f"stop_strings must be texts of at least one character, got {stops!r}")
    return listed


def expand(options: Mapping[str, Any], prompts: int, sweep: bool) -> list[dict[str, Any]]:
    """One dict of options per output from values that are one for all or a list with one each.

    ``sweep``: there is one prompt, and lists of any one length make that many outputs of it. Otherwise a list must have
    one value for each of the ``prompts``. Raises ``ValueError`` where lengths do not fit.
    """
    values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}
    lists = {name: list(value) for name, value in values.items() if isinstance(value, (list, tuple))}
    count = prompts
    if sweep and lists:
        count = max(map(len, lists.values()))
    for name, value in lists.items():
        if len(value) != count:
            need = f"the other lists have {count}" if sweep else f"there are {prompts} prompts"
            raise ValueError(f"{name} has {len(value)} values but {need}; give one value for all, or one each")
    return [{name: lists[name][k] if name in lists else values[name] for name in values} for k in range(count)]

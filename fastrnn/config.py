"""What a training run is asked to do: one frozen dataclass, checked on creation, without importing torch.

The command line builds its options from these fields (`fastrnn.cli_options`), so the help text of an option is the text
written here, and `fastrnn train --help` stays instant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

BATCHING = ("stream", "windows", "random", "document", "lines")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "step", "plateau")
REDUCTIONS = ("mean", "sum")
PRECISIONS = ("float32", "bfloat16")


def _option(default: Any, text: str, *, choices: tuple[str, ...] | None = None, limit: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "limit": limit})


def parse_duration(text: str | float | int) -> float:
    """Seconds from ``60``, ``"60s"``, ``"1.5m"``, ``"2h"`` or ``"1h30m"``.

    Raises:
        ValueError: the text is none of these, or not above zero.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        seconds = float(text)
    elif re.fullmatch(r"\d+(\.\d+)?", str(text).strip()):
        seconds = float(text)
    else:
        parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip())
        if parts is None or not any(parts.groups()):
            raise ValueError(f"a duration is seconds or like 60s, 1.5m, 2h, 1h30m; got {text!r}")
        seconds = sum(float(value or 0) * unit for value, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
    if not 0 < seconds < math.inf:
        raise ValueError(f"a duration must be above zero seconds, got {text!r}")
    return seconds


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Fields marked as limits may change on ``--resume``; all others must be what the checkpoint was written with, because
    the continued run would otherwise not be the run that was interrupted. Durations are seconds, rates are per step.

    Raises:
        ValueError: a value is out of its range; the text names the field, the value and the range.
    """

    batching: str = _option("stream", "how text becomes batches", choices=BATCHING)
    batch_size: int = _option(32, "rows in a batch")
    seq_len: int = _option(64, "steps in a row between two weight updates (or the window's length)")
    stride: int = _option(1, "windows: tokens between the starts of two windows")
    batches_per_epoch: int = _option(100, "random: batches that are called an epoch")
    max_rows: int | None = _option(None, "document: cut batches of more windows than this")
    valid_fraction: float = _option(0.05, "share of the corpus held out for validation; 0 = none")
    optimizer: str = _option("adam", "weight update rule", choices=OPTIMIZERS)
    lr: float = _option(3e-3, "highest learning rate")
    momentum: float = _option(0.0, "momentum of sgd")
    beta2: float = _option(0.99, "second moment's decay in adam and adamw")
    weight_decay: float = _option(0.0, "weight decay (decoupled in adamw)")
    schedule: str = _option("constant", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: int = _option(0, "steps of linear warm-up before the schedule")
    min_lr: float = _option(0.0, "lowest learning rate of cosine, linear, step and plateau")
    decay_factor: float = _option(0.5, "factor of one decay in step and plateau")
    decay_every: int = _option(1000, "steps between two decays in step")
    decay_patience: int = _option(2, "validations without progress before plateau decays")
    clip: float = _option(1.0, "gradient norm above which gradients are scaled down; 0 = off")
    reduction: str = _option("mean", "loss over the tokens of a batch", choices=REDUCTIONS)
    precision: str = _option("float32", "bfloat16 = autocast, weights stay float32", choices=PRECISIONS)
    seed: int = _option(0, "seed of weights, order of the data, dropout and samples")
    max_steps: int | None = _option(None, "stop after this many weight updates", limit=True)
    max_epochs: int | None = _option(None, "stop after this many passes over the data", limit=True)
    max_time: float | None = _option(None, "stop after this much training time, e.g. 60s, 10m, 1h30m", limit=True)
    eval_every: int = _option(200, "steps between two validations; 0 = only at the end")
    eval_batches: int = _option(50, "validate on at most this many batches; 0 = on all")
    patience: int | None = _option(None, "stop early after this many validations without progress", limit=True)
    log_every: int = _option(20, "steps between two lines of metrics", limit=True)
    save_every: int = _option(500, "steps between two checkpoints; 0 = only at the end", limit=True)
    sample_every: int = _option(0, "steps between two samples of text; 0 = none", limit=True)
    sample_tokens: int = _option(120, "tokens of one sample", limit=True)
    sample_prompt: str | None = _option(None, "text that a sample continues (default: a new line)", limit=True)
    sample_temperature: float = _option(0.8, "temperature of the samples", limit=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.max_time is not None:
            object.__setattr__(self, "max_time", parse_duration(self.max_time))
        for names, low in (
            (("batch_size", "seq_len", "decay_every", "decay_patience", "log_every", "sample_tokens", "stride"), 1),
            (("max_steps", "max_epochs", "patience", "batches_per_epoch", "max_rows"), 1),
            (("warmup_steps", "eval_every", "save_every", "sample_every", "eval_batches"), 0),
        ):
            for name in names:
                self._check(name, isinstance(getattr(self, name), (int, type(None))), "a whole number")
                self._check(name, getattr(self, name) is None or getattr(self, name) >= low, f"at least {low}")
        self._check("lr", 0 < self.lr < math.inf, "above 0")
        self._check("min_lr", 0 <= self.min_lr <= self.lr, f"between 0 and lr = {self.lr:g}")
        self._check("valid_fraction", 0 <= self.valid_fraction < 1, "at least 0 and below 1")
        self._check("decay_factor", 0 < self.decay_factor < 1, "between 0 and 1")
        for name in ("momentum", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("clip", "weight_decay", "sample_temperature"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "at least 0")

    def _check(self, name: str, right: bool, need: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {need}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from a mapping of field names.

        Raises:
            ValueError: a name is no field; the text lists the fields.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"no such training option: {', '.join(unknown)}; the options are {', '.join(names)}")
        return cls(**values)

    def resumed_from(self, saved: TrainConfig) -> None:
        """Check that a run saved with ``saved`` can be continued with this configuration.

        Raises:
            ValueError: a field that is not a limit differs; the text names each with both values.
        """
        differing = [
            f"{field.name} was {getattr(saved, field.name)!r}, now {getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if not field.metadata["limit"] and getattr(self, field.name) != getattr(saved, field.name)
        ]
        if differing:
            raise ValueError(
                f"cannot resume with other settings: {'; '.join(differing)}. Drop them, or train into a new folder."
            )

    def lr_at(self, step: int, progress: float, scale: float = 1.0) -> float:
        """The learning rate of update number ``step`` (from 0).

        Args:
            progress: share of the run that is done, 0 to 1 (of the tightest of max_steps, max_epochs and max_time).
            scale: the product of plateau's decays so far.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = min(max(progress, 0.0), 1.0)
        if self.schedule == "cosine":
            return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "linear":
            return self.min_lr + (self.lr - self.min_lr) * (1 - progress)
        if self.schedule == "step":
            return max(self.min_lr, self.lr * self.decay_factor ** (step // self.decay_every))
        if self.schedule == "plateau":
            return max(self.min_lr, self.lr * scale)
        return self.lr

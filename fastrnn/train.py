"""Train a language model: `train` is the front of the loop in `fastrnn.trainer`.

A run is stopped by a limit, a callback, SIGINT or SIGTERM, each time with a checkpoint, and resumed bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .config import TrainConfig
from .evaluate import Batches, TrainingError, evaluate, token_losses
from .metrics import MetricsLog, plot_losses, read_metrics
from .models import LanguageModel
from .trainer import CHECKPOINT, METRICS, Event, Run, TrainResult

__all__ = [
    "CHECKPOINT", "METRICS", "CheckpointError", "TrainConfig", "TrainResult", "TrainingError", "evaluate",
    "plot_losses", "read_metrics", "token_losses", "train",
]  # fmt: skip


def train(
    model: LanguageModel,
    batches: Batches,
    config: TrainConfig,
    *,
    valid: Batches | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_event: Callable[[Event], object] | None = None,
    chars_per_token: float | None = None,
    extra: dict[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place; with ``valid`` it ends with the best weights, otherwise with the last.

    Args:
        batches: the training data.
        valid: the validation data, read from the beginning each time.
        out: a folder for ``last.safetensors`` (everything `resume` needs), the best model as `LanguageModel` saves it,
            and ``metrics.jsonl``; None writes nothing.
        resume: continue from ``out``'s last checkpoint; the same data and settings are needed (limits may differ).
        on_event: called with each record of metrics.jsonl (``event``: "train", "valid", "sample"); a true answer stops
            the run after that step, with a checkpoint.
        chars_per_token: characters of text per token of ``valid``, for bits per character.
        extra: JSON-able values to keep in the checkpoint, such as where the data came from (see `read_state`).

    In the main thread SIGINT and SIGTERM end the run after the step in progress, with a checkpoint; a second one kills.

    Raises:
        TrainingError: the loss is not finite, or there is no data.
        CheckpointError: ``resume`` finds no whole checkpoint of this model and data, or one cannot be written.
        ValueError: ``config`` sets no limit, or differs from the checkpoint's.
    """
    if (config.max_steps, config.max_epochs, config.max_time, config.patience) == (None,) * 4:
        raise ValueError("training has no end: set max_steps, max_epochs, max_time or patience")
    if config.patience is not None and valid is None:
        raise ValueError("patience counts validations, and there is no validation data: set valid_fraction above 0")
    folder = Path(out) if out is not None else None
    run = Run(model, batches, config, valid, folder, on_event, chars_per_token, extra or {})
    with _signals(run):
        if resume:
            run.load()
        run.log = MetricsLog(folder / METRICS, run.step if resume else None) if folder else None
        try:
            return run.loop()
        finally:
            if run.log:
                run.log.close()


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets ``run.signal``; the handlers that were there before are back for the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        run.signal = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()

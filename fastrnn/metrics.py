"""metrics.jsonl, one JSON object a line, and the loss plot that is a function of that file alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastrnn.checkpoint import atomic_file


class MetricsLog:
    """Appends records to a JSON-lines file; each line is on its way to the disk when `append` returns.

    Args:
        path: the file; its folder is made.
        after_step: on resume, the step of the checkpoint: records of later steps and a half-written last line, which a
            crash leaves behind, are dropped, so that the continued file has no step twice. None starts a new file.
    """

    def __init__(self, path: str | os.PathLike[str], after_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        if after_step is not None and self.path.exists():
            kept = [record for record in read_metrics(self.path) if record.get("step", 0) <= after_step]
        with atomic_file(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file; a half-written last line is left out.

    Raises:
        ValueError: a line before the last is not JSON; the text says which.
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as problem:
            if number == len(lines):  # no newline after it: the writer was interrupted
                break
            raise ValueError(f"{path}, line {number}: not JSON ({problem.msg}); is this a metrics.jsonl?") from problem
    return records


def plot_losses(metrics: str | os.PathLike[str], image: str | os.PathLike[str]) -> Path:
    """Draw training and validation loss over the steps of a metrics file into ``image`` (.png, .svg or .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the file has no training or validation records.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    records = read_metrics(metrics)
    curves = {
        "training": [(r["step"], r["nll"]) for r in records if r.get("event") == "train"],
        "validation": [(r["step"], r["nll"]) for r in records if r.get("event") == "valid"],
    }
    if not any(curves.values()):
        raise ValueError(f"{metrics} has no losses yet: nothing to plot")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    kind = Path(image).suffix.lstrip(".") or "png"
    with atomic_file(image) as file:
        figure.savefig(file, format=kind, dpi=150)
    return Path(image)

"""Files that are either whole or absent: atomic writes, and training checkpoints as one safetensors file.

A checkpoint is a single file so that replacing it is one `os.replace`: tensors by name, and everything else as JSON in
the file's metadata. Nothing is pickled, so reading a stranger's file runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

FORMAT = "fastrnn-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, of another program, or could not be written; the text says which."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` for writing; on success it becomes ``path``, else ``path`` is untouched.

    The data reaches the disk (fsync) before the name does (`os.replace`), so a crash at any moment leaves the old file
    or the new one, never a part of one.

    Raises:
        OSError: the disk is full, the folder is not writable, and so on; the temporary file is gone by then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``state`` as the checkpoint ``path``, atomically.

    Raises:
        CheckpointError: the file could not be written; a checkpoint that was there before is still whole.
    """
    flat = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    content = save(flat, metadata={"format": FORMAT, "state": json.dumps(state)})
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as problem:
        kept = "the previous checkpoint is intact" if Path(path).exists() else "nothing was written"
        raise CheckpointError(
            f"cannot save the checkpoint {path} ({len(content)} bytes): {problem.strerror or problem}; {kept}. "
            "Free some space or choose another folder, then continue with --resume."
        ) from problem


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: there is no such file, or it is truncated, or it is not a training checkpoint of fastrnn.
    """
    with _opened(path) as file:
        state = _checked_state(path, file.metadata() or {})
        return {name: file.get_tensor(name) for name in list(file.keys())}, state


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON part of a checkpoint, without its tensors; errors as in `load_checkpoint`."""
    with _opened(path) as file:
        return _checked_state(path, file.metadata() or {})


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}: train into that folder first, or drop --resume")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"{path} is no whole checkpoint (truncated, damaged or from another program): {problem}. "
            "Restore it from a copy, or train anew into another folder."
        ) from problem


def _checked_state(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or "state" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file but not a training checkpoint: its format is "
            f"{metadata.get('format')!r}, needed is {FORMAT!r}"
        )
    return json.loads(metadata["state"])


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The optimizer's state as named tensors ``optim.<parameter>.<name>`` and named numbers."""
    tensors, numbers = {}, {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optim.{index}.{name}"] = value
            elif value is not None:
                numbers[f"optim.{index}.{name}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, float]
) -> None:
    """Put back what `flatten_optimizer` took; learning rates and the like stay those of ``optimizer``."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        kind, _, rest = key.partition(".")
        if kind == "optim":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random generators that dropout uses on ``device``, as ``random.<device>`` byte tensors."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_states` took. A generator that the checkpoint does not know stays as it is."""
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)

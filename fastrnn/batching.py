"""What all modes of batches share: the Batch, epochs and positions, and arrays of token ids."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .corpora import CorpusError


@dataclass(frozen=True)
class Batch:
    """inputs (B,T) int64; targets int64, (B,T) = inputs one step on, or (B,) = the token after each row; reset (B,T)
    bool or None: True zeroes the state before that step; weight (B,T) float32 or None = all 1: 0 where a target is
    padding; carry: row b goes on where row b of the batch before ended, so the state is kept; the first batch of an
    epoch starts from zero all the same."""

    inputs: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    carry: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        moved = (t if t is None else t.to(device) for t in (self.inputs, self.targets, self.reset, self.weight))
        return Batch(*moved, carry=self.carry)


class Batches:
    """What the five modes share: epochs, position, and saving both. `epoch` and `position` count from 0; `position` is
    the index in the epoch of the next batch; `targets` is the number of predictions in an epoch."""

    targets: int

    mode = ""

    def __init__(self, seed: int, data: np.ndarray, **layout: Any) -> None:
        self.epoch = 0
        self.position = 0
        self._same = {
            "mode": self.mode,
            "seed": int(seed),
            "tokens": data.size,
            "checksum": zlib.crc32(data.tobytes()),
            **layout,
        }
        self.seed = int(seed)

    def __len__(self) -> int:
        """Batches of the current epoch."""
        raise NotImplementedError

    def _batch(self, index: int) -> Batch:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; after its last batch the next epoch begins."""
        while self.position < len(self):
            self.position += 1
            yield self._batch(self.position - 1)
        self.epoch += 1
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position, and what must be the same to go on: plain numbers and strings."""
        return {"epoch": self.epoch, "position": self.position, **self._same}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError naming what differs when it belongs to other batches."""
        other = [f"{k} was {state.get(k)!r} and is {v!r}" for k, v in self._same.items() if state.get(k) != v]
        if other:
            raise ValueError(
                f"the saved position belongs to other batches: {'; '.join(other)}; "
                "resume with the same data and options"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def flat_ids(ids: Any) -> np.ndarray:
    """Ids as a contiguous int32 array (n,)."""
    array = np.asarray(ids)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be one flat sequence of integers, got shape {array.shape} of {array.dtype}")
    return np.ascontiguousarray(array, np.int32).reshape(-1)


def joined(parts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """All ids end to end, and the offsets (documents + 1,) int64 where each begins and the last ends."""
    arrays = [flat_ids(p) for p in parts]
    offsets = np.cumsum([0, *(a.size for a in arrays)])
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32), offsets


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int64, order="C"))


def at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def too_short(have: int, need: int, why: str, instead: str) -> CorpusError:
    return CorpusError(f"the corpus has {have} tokens and {why} need {need}; give more text, or {instead}")

"""Batches of windows that each start from a zero state: all of a corpus, random ones, or those of one document."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .batching import Batch, Batches, at_least_one, flat_ids, joined, tensor, too_short
from .corpora import CorpusError
from .shuffle import epoch_key, mix, shuffled


class Windows(Batches):
    """All windows of T tokens whose starts are `stride` apart, in an order shuffled anew each epoch.

    target "all": targets (B,T), the next token at every step; "last": (B,), the token after the window. The last batch
    of an epoch may have fewer rows.
    """

    mode = "windows"

    def __init__(
        self,
        ids: Any,
        *,
        batch: int,
        steps: int,
        stride: int = 1,
        target: str = "all",
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self._view = _windows(ids, steps, batch=batch, stride=stride)[::stride]
        self._batch_size, self._target, self._shuffle = batch, _checked_target(target), shuffle
        self.windows = len(self._view)
        self.targets = self.windows * (steps if target == "all" else 1)
        super().__init__(seed, flat_ids(ids), batch=batch, steps=steps, stride=stride, target=target, shuffle=shuffle)

    def __len__(self) -> int:
        return -(-self.windows // self._batch_size)

    def _batch(self, index: int) -> Batch:
        at = index * self._batch_size
        chosen = np.arange(at, min(at + self._batch_size, self.windows))
        if self._shuffle:
            chosen = shuffled(chosen, self.windows, self.seed, self.epoch)
        return _window_batch(self._view[chosen], self._target)


class RandomWindows(Batches):
    """`per_epoch` batches of B windows of T tokens that start anywhere, drawn with replacement."""

    mode = "random"

    def __init__(
        self, ids: Any, *, batch: int, steps: int, per_epoch: int = 100, target: str = "all", seed: int = 0
    ) -> None:
        at_least_one(per_epoch=per_epoch)
        self._view = _windows(ids, steps, batch=batch)
        self._batch_size, self._per_epoch, self._target = batch, per_epoch, _checked_target(target)
        self.targets = per_epoch * batch * (steps if target == "all" else 1)
        super().__init__(seed, flat_ids(ids), batch=batch, steps=steps, per_epoch=per_epoch, target=target)

    def __len__(self) -> int:
        return self._per_epoch

    def _batch(self, index: int) -> Batch:
        counter = np.arange(index * self._batch_size, (index + 1) * self._batch_size, dtype=np.uint64)
        unit = (mix(counter + epoch_key(self.seed, self.epoch)) >> np.uint64(11)) * 2.0**-53
        return _window_batch(self._view[(unit * len(self._view)).astype(np.int64)], self._target)


class DocumentWindows(Batches):
    """All windows of T tokens of one document are one batch, so B differs from batch to batch; a document of n tokens
    has n - T.

    min_windows: documents with fewer are skipped. max_rows: longer batches are cut into several (None: never).
    shuffle: a new order of the batches each epoch instead of the order given.
    """

    mode = "document"

    def __init__(
        self,
        documents: Sequence[Any],
        *,
        steps: int,
        min_windows: int = 1,
        max_rows: int | None = None,
        target: str = "all",
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        at_least_one(steps=steps, min_windows=min_windows, max_rows=1 if max_rows is None else max_rows)
        self._ids, offsets = joined(documents)
        sizes = np.diff(offsets) - steps
        kept = np.flatnonzero(sizes >= min_windows)
        if not len(kept):
            longest = int(sizes.max()) + steps if len(sizes) else 0
            raise CorpusError(
                f"no document is long enough: {min_windows} windows of {steps} tokens need {steps + min_windows}, "
                f"the longest of {len(sizes)} has {longest}; "
                "give longer documents, fewer steps or a smaller min_windows"
            )
        # One row (first window's start, windows) per batch.
        self._spans = [
            (int(offsets[d]) + at, min(int(sizes[d]) - at, max_rows or int(sizes[d])))
            for d in kept
            for at in range(0, int(sizes[d]), max_rows or int(sizes[d]))
        ]
        self._steps, self._target, self._shuffle = steps, _checked_target(target), shuffle
        self.documents = len(kept)
        self.targets = int(sizes[kept].sum()) * (steps if target == "all" else 1)
        super().__init__(
            seed,
            self._ids,
            steps=steps,
            min_windows=min_windows,
            max_rows=max_rows,
            target=target,
            shuffle=shuffle,
            lengths=zlib.crc32(offsets.tobytes()),
        )

    def __len__(self) -> int:
        return len(self._spans)

    def _batch(self, index: int) -> Batch:
        if self._shuffle:
            index = int(shuffled(np.array([index]), len(self), self.seed, self.epoch)[0])
        start, rows = self._spans[index]
        text = self._ids[start : start + rows + self._steps]
        return _window_batch(np.lib.stride_tricks.sliding_window_view(text, self._steps + 1), self._target)


def _windows(ids: Any, steps: int, **counts: int) -> np.ndarray:
    """View (n - T, T+1) of all windows with the token after them."""
    at_least_one(steps=steps, **counts)
    flat = flat_ids(ids)
    if flat.size < steps + 1:
        raise too_short(flat.size, steps + 1, f"one window of {steps} and the token after it", "fewer steps")
    return np.lib.stride_tricks.sliding_window_view(flat, steps + 1)


def _window_batch(rows: np.ndarray, target: str) -> Batch:
    return Batch(tensor(rows[:, :-1]), tensor(rows[:, 1:] if target == "all" else rows[:, -1]))


def _checked_target(target: str) -> str:
    if target not in ("all", "last"):
        raise ValueError(f"target must be 'all' or 'last', got {target!r}")
    return target

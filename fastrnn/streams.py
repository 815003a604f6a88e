"""Batches with carried state: contiguous streams of text, and whole lines packed end to end."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .batching import Batch, Batches, at_least_one, flat_ids, joined, tensor, too_short
from .corpora import CorpusError
from .shuffle import shuffled


class Stream(Batches):
    """B contiguous parts of the corpus side by side, T steps at a time: truncated back-propagation through time with
    carried state.

    starts: bool per token, True where a document starts; its state is reset there. The last batch of an epoch may have
    fewer steps; at the very end fewer than B tokens stay unused. A stream has one order, so `seed` changes nothing.
    """

    mode = "stream"

    def __init__(self, ids: Any, *, batch: int, steps: int, starts: Any = None, seed: int = 0) -> None:
        self._ids = flat_ids(ids)
        at_least_one(batch=batch, steps=steps)
        if len(self._ids) < batch + 1:
            raise too_short(len(self._ids), batch + 1, f"{batch} streams of at least one step", "a smaller batch")
        self._steps = steps
        self._columns = (len(self._ids) - 1) // batch
        self._first = np.arange(batch)[:, None] * self._columns
        self._starts = None if starts is None else np.asarray(starts, bool)
        if self._starts is not None and self._starts.shape != self._ids.shape:
            raise ValueError(f"starts must have one bool per token, {self._ids.shape}, got {self._starts.shape}")
        self.targets = batch * self._columns
        super().__init__(seed, self._ids, batch=batch, steps=steps)

    def __len__(self) -> int:
        return -(-self._columns // self._steps)

    def _batch(self, index: int) -> Batch:
        at = index * self._steps
        where = self._first + np.arange(at, min(at + self._steps, self._columns))
        reset = None if self._starts is None else torch.from_numpy(self._starts[where])
        return Batch(tensor(self._ids[where]), tensor(self._ids[where + 1]), reset, carry=True)


class Lines(Batches):
    """Whole lines packed end to end in B streams, T steps at a time: no step is spent on padding but a few at the end
    of an epoch.

    A line of n tokens takes n + 1 steps: inputs `start, line`, targets `line, eos`, where start is `bos`, or `eos`
    without a bos; so a model generates a line from start and a zero state. reset is True at each start (unless
    reset=False: the state runs on). Lines are shuffled anew each epoch; the number of batches may then differ by a
    few.
    """

    mode = "lines"

    def __init__(
        self,
        lines: Sequence[Any],
        *,
        batch: int,
        steps: int,
        eos: int,
        bos: int | None = None,
        reset: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        at_least_one(batch=batch, steps=steps)
        self._ids, self._offsets = joined(lines)
        self.lines = len(self._offsets) - 1
        if self.lines < batch:
            raise CorpusError(
                f"{batch} streams of lines need at least {batch} lines, the corpus has {self.lines}; "
                "use a smaller batch"
            )
        self._eos, self._start = int(eos), int(eos if bos is None else bos)
        self._rows, self._steps, self._reset, self._shuffle = batch, steps, reset, shuffle
        self.targets = len(self._ids) + self.lines
        self._packed: tuple[int, list[np.ndarray]] | None = None
        lengths = zlib.crc32(self._offsets.tobytes())
        super().__init__(
            seed,
            self._ids,
            batch=batch,
            steps=steps,
            eos=self._eos,
            bos=self._start,
            reset=reset,
            shuffle=shuffle,
            lengths=lengths,
        )

    def __len__(self) -> int:
        return -(-self._epoch_arrays()[0].shape[1] // self._steps)

    def _batch(self, index: int) -> Batch:
        part = slice(index * self._steps, (index + 1) * self._steps)
        inputs, targets, starts, real = (a[:, part] for a in self._epoch_arrays())
        return Batch(
            tensor(inputs),
            tensor(targets),
            torch.from_numpy(starts.copy()) if self._reset else None,
            None if real.all() else torch.from_numpy(real.astype(np.float32)),
            carry=True,
        )

    def _epoch_arrays(self) -> list[np.ndarray]:
        """inputs, targets, starts, real (B, steps of the epoch) of the current epoch."""
        if self._packed is None or self._packed[0] != self.epoch:
            self._packed = self.epoch, self._pack()
        return self._packed[1]

    def _pack(self) -> list[np.ndarray]:
        order = np.arange(self.lines)
        if self._shuffle:
            order = shuffled(order, self.lines, self.seed, self.epoch)
        sizes = np.diff(self._offsets)[order] + 1
        ends = np.cumsum(sizes)
        total = int(ends[-1])
        step = np.arange(total) - np.repeat(ends - sizes, sizes)  # step within its line
        source = np.repeat(self._offsets[order], sizes) + step
        last = step == np.repeat(sizes, sizes) - 1
        ids = np.append(self._ids, 0)
        steps = [np.where(step == 0, self._start, ids[source - 1]), np.where(last, self._eos, ids[source]), step == 0]
        # Each stream takes whole lines: it begins at the line's end that is nearest to its even share.
        shares = np.arange(1, self._rows) * (total / self._rows)
        near = np.searchsorted(ends - sizes / 2, shares)
        cuts = [0, *np.append(0, ends)[near].tolist(), total]
        columns = max(np.diff(cuts))
        packed = [np.full((self._rows, columns), fill) for fill in (self._start, self._eos, True, False)]
        for row, (a, b) in enumerate(pairwise(cuts)):
            for whole, part in zip(packed, steps, strict=False):
                whole[row, : b - a] = part[a:b]
            packed[3][row, : b - a] = True
        return packed

"""TextReader: the text of one sequence as its tokens come, cut at the first stop string, never half a code point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextReader:
    """Collects the text of pushed tokens; ``stopped`` is True once a stop string has occurred.

    The text ends before the stop string. What `push` returns is final: characters that might be the beginning of a stop
    string are held back until the next ones decide, so the pieces joined are the text.
    """

    def __init__(self, decoder: Any, stop_strings: Sequence[str] = (), eos: frozenset[int] = frozenset()) -> None:
        self._decoder, self._stops, self._eos = decoder, tuple(stop_strings), eos
        self._reach = max(map(len, self._stops), default=0)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The text that token makes certain; an eos token has none."""
        return "" if self.stopped or token in self._eos else self._take(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """The text still held back when no more tokens come."""
        return "" if self.stopped else self._take(self._decoder.flush(), last=True)

    def _take(self, new: str, last: bool) -> str:
        held = self._held + new
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, ready, self._held = True, held[: min(found)], ""
        else:
            keep = 0 if last else self._undecided(held)
            ready, self._held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            self._pieces.append(ready)
        return ready

    def _undecided(self, held: str) -> int:
        """Length of the longest end of ``held`` that begins a stop string."""
        for length in range(min(self._reach - 1, len(held)), 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stops):
                return length
        return 0

"""Corpora of token ids to batches: five modes, each an endless supply of epochs that stops and resumes anywhere.

============  ========================================================  ======================  =======================
mode          one batch                                                 one epoch               state between batches
============  ========================================================  ======================  =======================
``stream``    the next T steps of B parallel, contiguous streams        every token once        carried
``windows``   B windows of T tokens, drawn without replacement          every window once       none
``random``    B windows of T tokens, drawn with replacement             `per_epoch` batches     none
``document``  all windows of one document                               every document once     none
``lines``     T steps of B streams of whole lines packed end to end     every line once         carried, reset per line
============  ========================================================  ======================  =======================

B is the option `batch` (rows of a batch), T the option `steps`. The order is a function of (seed, epoch) alone, so the
state to save is an epoch and a position: no random generator, no list of windows. Iterating gives the rest of the
current epoch; then the next one begins. A resumed run gets the same batches bit for bit.
"""

from __future__ import annotations

from typing import Any

from .batching import Batch, Batches
from .corpora import NAMED, CorpusError, as_documents, load_corpus, read_ag_news, split
from .streams import Lines, Stream
from .windows import DocumentWindows, RandomWindows, Windows

__all__ = [
    "MODES",
    "NAMED",
    "Batch",
    "Batches",
    "CorpusError",
    "DocumentWindows",
    "Lines",
    "RandomWindows",
    "Stream",
    "Windows",
    "as_documents",
    "batches",
    "load_corpus",
    "read_ag_news",
    "split",
]


MODES: dict[str, type[Batches]] = {c.mode: c for c in (Stream, Windows, RandomWindows, DocumentWindows, Lines)}


def batches(mode: str, ids: Any, **options: Any) -> Batches:
    """The batches of a mode; see the classes in MODES for their options.

    ids: one flat sequence of token ids for "stream", "windows", "random"; a list of them for "document" and "lines".
    Raises CorpusError when the corpus is too short, ValueError for options out of range, TypeError for those a mode
    does not have.
    """
    if mode not in MODES:
        raise ValueError(f"the mode of batches is one of {', '.join(MODES)}, got {mode!r}")
    return MODES[mode](ids, **options)

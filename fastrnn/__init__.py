"""fastrnn: recurrent networks for PyTorch that run at the speed of the hardware.

``fastrnn.LSTM``, ``GRU``, ``RNN`` and their cells stand in for `torch.nn`'s; `sample` is one exact, reproducible draw;
`LanguageModel` trains, generates and scores sequences. Importing compiles nothing and needs neither a GPU nor the
extension; what each call runs on, and why, `explain` tells.

The names below are loaded when they are first used, so that the command line answers at once. A program that only
wants ``torch.ops.fastrnn``, for example to load an exported graph, says ``import fastrnn.ops``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .backends import BackendRefusal, backend, explain
    from .conversion import convert, to_torch
    from .layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
    from .models import LanguageModel
    from .network import Network, NetworkConfig
    from .sampling import Draw, SamplingParams, sample

_MODULES = {
    "backends": ("BackendRefusal", "backend", "explain"),
    "conversion": ("convert", "to_torch"),
    "layers": ("GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"),
    "models": ("LanguageModel",),
    "network": ("Network", "NetworkConfig"),
    "sampling": ("Draw", "SamplingParams", "sample"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GRU", "LSTM", "RNN", "BackendRefusal", "Draw", "GRUCell", "LSTMCell", "LanguageModel", "Network", "NetworkConfig",
    "RNNCell", "SamplingParams", "backend", "convert", "explain", "sample", "to_torch",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})

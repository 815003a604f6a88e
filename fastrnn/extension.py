"""Whether the compiled extension is there, and what it holds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch


@functools.cache
def extension_missing() -> str | None:
    """None when the C++ extension can be loaded, otherwise the sentence that says why not and what to do."""
    if importlib.util.find_spec("fastrnn._C") is None:
        return (
            "the C++ extension is not built; with a C++ compiler, "
            "`pip install --no-build-isolation -e .` in the source tree builds it"
        )
    try:
        importlib.import_module("fastrnn._C")
    except (ImportError, OSError) as problem:
        return f"the C++ extension does not load: {problem}"
    return None


@functools.cache
def cuda_kernels_missing() -> str | None:
    """None when the extension has the CUDA kernels and the current GPU runs them, otherwise why not."""
    if missing := extension_missing():
        return missing
    if not hasattr(torch.ops.fastrnn_cuda, "lstm_forward"):
        return "the extension was built without CUDA; FASTRNN_CUDA=1 where there is a CUDA toolkit builds it with"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the CUDA kernels need compute capability 8.0, this GPU has {major}.{minor}"


def native(library: str, op: str) -> Callable:
    """The function of an op of ``torch.ops.fastrnn_cpu`` or ``torch.ops.fastrnn_cuda``."""
    importlib.import_module("fastrnn._C")
    return getattr(getattr(torch.ops, library), op).default

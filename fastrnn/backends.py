"""The one table of backends, and the one place where a backend is chosen.

A backend is a name, a loader that returns its function for an op, and `refuse`, a pure function of the `Call` that
returns None or the sentence saying why this backend does not take it. An explicit choice (``FASTRNN_BACKEND`` or
`backend`) never falls back: it raises that sentence. An automatic choice keeps its reason and every refusal for
`explain`.

Ops: ``{lstm,gru,rnn}_{forward,backward}``; those of both directions, ``{lstm,gru,rnn}_both_{forward,backward}``; those
of packed rows, ``{lstm,gru,rnn}_packed_{forward,backward}``; ``{lstm,gru}_gates``; ``sample``; ``lstm``, ``gru``,
``rnn``, a whole stack of layers with autograd, for which ``aten`` runs PyTorch's fused RNN and every other backend runs
layer by layer; and ``generate``, the generation loop, which is in Python (`fastrnn.engine`) for every backend but
``cpu`` and ``cuda`` (`fastrnn.native`) and ``triton`` (`fastrnn.graphed`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import gpu
from .extension import cuda_kernels_missing, extension_missing, native

CELLS = ("lstm", "gru", "rnn")
WAYS = ("forward", "backward", "both_forward", "both_backward", "packed_forward", "packed_backward")
CELL_OPS = (*(f"{cell}_{way}" for cell in CELLS for way in WAYS), "lstm_gates", "gru_gates")
OPS = (*CELLS, *CELL_OPS, "sample", "generate")


class BackendRefusal(RuntimeError):
    """An explicitly chosen backend does not take a call; the text is the backend's own sentence."""


class Call(NamedTuple):
    """What a choice may depend on. Sizes as in `fastrnn.reference`; ``hidden`` is V for ``sample``."""

    op: str
    device: str
    dtype: torch.dtype
    time: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    lengths: bool = False
    reset: bool = False
    projection: bool = False
    needs_grad: bool = False
    training: bool = False
    dropout: bool = False
    precision: str = "float32"  # for generate: "float32", "bfloat16" or "int8" weights; so the next three
    cell: str = ""
    vocabulary: int = 0
    window: bool = False  # the last ids are run again for each token
    packed: bool = False  # rows of a PackedSequence
    bidirectional: bool = False
    recompute: bool = False  # nothing but y is kept for backward
    transform: str = ""  # "torch.func transforms", "forward-mode AD", "torch.compile", "torch.jit.trace" or nothing

    def __str__(self) -> str:
        told = ("packed", "lengths", "reset", "bidirectional", "projection", "needs_grad", "recompute")
        flags = [name for name in told if getattr(self, name)]
        sizes = f"T={self.time} B={self.batch} I={self.inputs} H={self.hidden} L={self.layers}"
        if self.op == "generate":
            sizes = f"I={self.inputs} H={self.hidden} L={self.layers}, {self.precision} weights"
        if self.op == "sample":
            sizes = f"B={self.batch} V={self.hidden}"
        return " ".join([self.op, self.device, str(self.dtype).removeprefix("torch."), sizes, *flags, self.transform])


class Choice(NamedTuple):
    """A backend's name, the reason for it, and the sentence of each backend that was asked before and refused."""

    backend: str
    reason: str
    refusals: tuple[tuple[str, str], ...] = ()


class Backend(NamedTuple):
    """A row of the table."""

    refuse: Callable[[Call], str | None]
    load: Callable[[str], Callable]


# --- the rows -------------------------------------------------------------------------------------------------------


def _refuse_reference(call: Call) -> str | None:
    return _refuse_precision(call)


def _refuse_precision(call: Call) -> str | None:
    """Why the loop in Python, which runs a network with its own weights, does not take a call."""
    if call.precision == "float32":
        return None
    return f"the loop in Python runs a network's own weights; {call.precision} weights are made by the C++ loop"


def _load_reference(op: str) -> Callable:
    return getattr(importlib.import_module("fastrnn.reference_sample" if op == "sample" else "fastrnn.reference"), op)


def _refuse_aten(call: Call) -> str | None:
    if call.op == "sample":
        return "PyTorch has no fused draw; use reference or cpu for sample"
    if call.op == "generate":
        return _refuse_precision(call)
    if call.time == 0:
        return "PyTorch's fused RNN takes no empty sequence"
    if call.recompute:
        return "PyTorch's fused RNN keeps the gates of every step for backward"
    if call.reset:
        return "PyTorch's fused RNN takes no reset mask"
    if call.lengths:
        return "PyTorch's fused RNN takes no lengths for padded input (a PackedSequence it does take)"
    if call.transform and call.transform != "torch.jit.trace":
        return f"PyTorch's fused RNN does not support {call.transform}"
    if call.op == "lstm" and call.device == "cpu" and call.dtype == torch.float16:
        return "oneDNN has no float16 LSTM on many CPUs"
    if call.device == "cuda" and call.needs_grad and not call.training and call.op in CELLS:
        return "cuDNN runs RNN backward in training mode only"
    if call.device == "cuda" and call.needs_grad and call.dropout:
        return "dropout inside cuDNN cannot be replayed for double backward; layer by layer it can"
    return None


def _load_aten(op: str) -> Callable:
    if op.endswith("_gates"):
        return _load_reference(op)
    return _of_single(op, lambda single: getattr(importlib.import_module("fastrnn.aten"), single))


def _of_single(op: str, load: Callable[[str], Callable]) -> Callable:
    """An op of a backend that has one direction at a time, and whose forward saves what backward needs as it goes."""
    cell, _, way = op.partition("_")
    if way == "gates":
        forward, kept = load(f"{cell}_forward"), slice(-2, None) if cell == "lstm" else -1
        return lambda *args: forward(*args[:-1], True)[kept]
    kind, _, way = way.rpartition("_")
    if kind not in ("both", "packed"):
        return load(op)
    reference, single = importlib.import_module("fastrnn.reference"), f"{cell}_{way}"
    return functools.partial(getattr(reference, kind), load(single), reference.parameters(single))


def _refuse_cpu(call: Call) -> str | None:
    if call.device != "cpu":
        return f"the C++ backend runs on CPU tensors, these are on {call.device}"
    if missing := extension_missing():
        return missing
    if call.op == "generate" and call.dtype != torch.float32:
        return f"the C++ loop packs float32 networks, this one is {str(call.dtype).removeprefix('torch.')}"
    if call.transform == "torch.jit.trace":
        return "a traced module is to load without fastrnn, so it records PyTorch's own operators"
    if call.transform and call.transform != "torch.compile":
        return f"the C++ kernels have no rule for {call.transform}; the reference has"
    if call.op != "sample" and call.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"the C++ kernels take float32, float64 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    return None


def _load_cpu(op: str) -> Callable:
    return _of_single(op, functools.partial(native, "fastrnn_cpu"))


TABLE: dict[str, Backend] = {
    "reference": Backend(_refuse_reference, _load_reference),
    "aten": Backend(_refuse_aten, _load_aten),
    "cpu": Backend(_refuse_cpu, _load_cpu),
    "triton": Backend(gpu.refuse_triton, gpu.load_triton),
    "cuda": Backend(gpu.refuse_cuda, lambda op: _of_single(op, gpu.load_cuda)),
}


def preference(call: Call) -> tuple[tuple[str, str], ...]:
    """The backends in the order in which an automatic choice asks them, each with the reason for its place."""
    if call.device == "cuda":
        return gpu.preference(call)
    last = ("reference", "it takes every call")
    if call.op == "generate":
        return ("cpu", "the whole loop runs in C++"), ("reference", "the loop in Python takes every network")
    if call.op not in CELLS:
        return ("cpu", "C++ kernels"), last
    whole = "PyTorch's fused RNN runs the whole stack in one call"
    fused = ("aten", whole if call.time > 1 else "PyTorch's own cell is a single call")
    ours = ("cpu", "C++ kernels")
    if call.time > 1 and _few_steps(call):
        return ("aten", "so few steps do not pay for the order in which the C++ kernels need the weights"), ours, last
    if _little_work(call) if call.time == 1 else _kernels_win(call):
        return ("cpu", "C++ kernels: no cost a step, gates fused with the products"), fused, last
    return fused, ours, last


def _kernels_win(call: Call) -> bool:
    """Where the C++ kernels are no slower than PyTorch on a CPU over a sequence (bench/results/sequence.csv):
    everywhere but for the LSTM in training that oneDNN does not have, where MKL's products are the faster ones.
    """
    if call.op != "lstm" or not call.needs_grad or call.dtype == torch.bfloat16:
        return True
    in_onednn = call.dtype == torch.float32 and not call.projection
    return in_onednn or call.batch <= 2 or call.batch * call.hidden <= 4096


def _few_steps(call: Call) -> bool:
    """Where so few steps of a GRU or RNN are PyTorch's (bench/results/epyc/short.csv).

    In bfloat16, and in training on many rows, because the weights are packed as a whole before the first step; in
    float32 because rows of weights that a core's own caches hold are read faster than transposed. Backward of 16 rows
    in all packs nothing.
    """
    gru, half = call.op == "gru", call.dtype == torch.bfloat16
    width = min(call.hidden, 1536) / call.time  # beyond, packing and a step grow alike
    if call.op == "lstm":
        return False
    if half and call.needs_grad:
        return call.time * call.batch > 16 and width >= (256 if gru else 384)
    if half:
        return width >= (700 if not gru else 350 if call.hidden < 768 else 200)
    if call.needs_grad:
        return gru and call.batch > 8 and width >= 384
    if gru or call.hidden < 384:
        return False
    few = call.time <= 8 and call.batch <= 8 and call.hidden < 1024
    return few or (call.time <= 12 and call.batch == 1 and call.hidden <= 1024)


def _little_work(call: Call) -> bool:
    """Where one step is so little work that PyTorch's fixed cost counts; less often for the LSTM, which oneDNN has.

    A single step's cost is Python and dispatch, of which the way to the kernels has less, and the weights: the kernels
    read them as they lie for 16 rows at most. With a gradient, PyTorch's products are the faster ones for many rows and
    wide states, and its RNN cell is hardly more than they; and the kernels' one node has the gradients of both weights
    in memory at once, which for one row is most of the work. In bfloat16 PyTorch's products of so few rows are slow.
    """
    area, half = call.batch * call.hidden, call.dtype == torch.bfloat16
    if not call.needs_grad:
        return half or call.batch <= 16 or area <= 16384
    if half:
        return call.hidden <= 128 or call.batch <= 4 or (call.batch <= 16 and call.hidden <= 256)
    if call.op == "rnn":
        return 1 < call.batch <= 16 and call.hidden >= 256
    if call.batch == 1:
        return call.hidden < 512
    return call.batch <= 16 or area <= (4096 if call.op == "lstm" else 16384)


# --- choosing -------------------------------------------------------------------------------------------------------

_explicit: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastrnn_backend", default=None)
_record: contextvars.ContextVar[list | None] = contextvars.ContextVar("fastrnn_record", default=None)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within this context every op runs on backend ``name``, one of `TABLE`, or raises why it cannot.

    None restores the automatic choice, also inside a context or under ``FASTRNN_BACKEND``.

    Raises:
        ValueError: no backend has that name.
    """
    token = _explicit.set(_checked_name(name, "fastrnn.backend") if name is not None else "")
    try:
        yield
    finally:
        _explicit.reset(token)


def explicit() -> str | None:
    """The backend asked for by `backend` or else by ``FASTRNN_BACKEND``; None when the choice is automatic."""
    name = _explicit.get()
    return (_environment() if name is None else name) or None


@functools.cache
def _environment() -> str:
    """``FASTRNN_BACKEND``, read when it is first needed: reading it takes longer than a small cell's step."""
    name = os.environ.get("FASTRNN_BACKEND", "")
    return _checked_name(name, "FASTRNN_BACKEND") if name else ""


def recording() -> bool:
    """Whether `explain` is listening."""
    return _record.get() is not None


def _checked_name(name: str, source: str) -> str:
    if name not in TABLE:
        raise ValueError(f"{source}: there is no backend {name!r}; the backends are {', '.join(TABLE)}")
    return name


def automatic(call: Call) -> Choice:
    """The automatic choice for ``call``."""
    return _choose(call, None)


def choose(call: Call) -> Choice:
    """Choose the backend for ``call``.

    Raises:
        BackendRefusal: the explicitly chosen backend refuses; the text says why and what would work.
    """
    choice = _choose(call, explicit())
    record = _record.get()
    if record is not None:
        record.append((call, choice))
    return choice


@functools.lru_cache(maxsize=8192)
def _choose(call: Call, name: str | None) -> Choice:
    if name is not None:
        why = TABLE[name].refuse(call)
        if why is not None:
            raise BackendRefusal(
                f"{call.op}: the backend {name!r} was asked for explicitly and refuses: {why} "
                f"(call: {call}). Choose another backend or leave the choice automatic."
            )
        return Choice(name, "asked for explicitly")
    refusals = []
    for name, reason in preference(call):
        why = TABLE[name].refuse(call)
        if why is None:
            return Choice(name, reason, tuple(refusals))
        refusals.append((name, why))
    told = "; ".join(f"{name}: {why}" for name, why in refusals)
    raise BackendRefusal(f"{call.op}: no backend takes this call ({call}): {told}")


@functools.cache
def function(name: str, op: str) -> Callable:
    """The function of backend ``name`` for an op of `CELL_OPS` or ``sample``."""
    return TABLE[name].load(op)


def pick(call: Call) -> Callable:
    """The function of the chosen backend for an op of `CELL_OPS` or ``sample``."""
    return function(choose(call).backend, call.op)


def available() -> dict[str, str | None]:
    """Each backend's name with None when it can run on this machine, or the sentence that says why not."""
    absent = {"cpu": extension_missing, "triton": gpu.triton_absent, "cuda": cuda_kernels_missing}
    return {name: absent[name]() if name in absent else None for name in TABLE}


# --- explaining -----------------------------------------------------------------------------------------------------


class Explanation(list):
    """A list of ``(Call, Choice)`` in the order of the calls; its text has one paragraph a distinct call."""

    def __str__(self) -> str:
        lines, seen = [], set()
        for call, choice in self:
            if (call, choice) in seen:
                continue
            seen.add((call, choice))
            lines.append(f"{call}\n  -> {choice.backend}: {choice.reason}")
            lines.extend(f"     not {name}: {why}" for name, why in choice.refusals)
        return "\n".join(lines) or "no fastrnn op was called"


def explain(module: Callable, *inputs, **kwargs) -> Explanation:
    """Run ``module(*inputs, **kwargs)`` and tell which backend ran each op, why, and what the others said.

    The module is run as it is called, in the current grad mode, without changing it; when a gradient is needed, the
    choice for the backward op is listed too.

    Returns:
        Explanation: print it, or read its ``(Call, Choice)`` pairs.
    """
    record: list = []
    token = _record.set(record)
    try:
        module(*inputs, **kwargs)
    finally:
        _record.reset(token)
    result = Explanation(record)
    for call, _ in record:
        if call.op.endswith("_forward") and call.needs_grad:
            backward = call._replace(op=call.op.replace("forward", "backward"))
            result.append((backward, _choose(backward, explicit())))
    return result

"""The ops as PyTorch knows them: schemas, fakes, autograd (any order), autocast.

``torch.ops.fastrnn.{lstm,gru,rnn}_{forward,backward}`` run one layer in one direction over a sequence, with the
arguments and results of the functions of the same names in `fastrnn.reference`, ``{lstm,gru,rnn}_both_{...}`` both
directions of a layer, ``{lstm,gru,rnn}_packed_{...}`` one or both over the rows of a PackedSequence, and
``{lstm,gru}_gates`` find again what a forward op did not save; ``torch.ops.fastrnn.sample`` draws tokens as
`fastrnn.reference_sample` defines it. Their bodies only ask `fastrnn.backends` for a function and call it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, reference
from .backends import Call

_library = torch.library.Library("fastrnn", "DEF")

_OPTIONS = "Tensor? lengths, Tensor? reset, bool reverse"
_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_LSTM = f"Tensor x, Tensor h0, Tensor c0, {_WEIGHTS}, Tensor? w_hr, {_OPTIONS}"
_GRU = f"Tensor x, Tensor h0, {_WEIGHTS}, {_OPTIONS}"
SCHEMAS = {
    "lstm_forward": f"({_LSTM}, bool save) -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor cells)",
    "lstm_backward": f"(Tensor dy, Tensor dhn, Tensor dcn, {_LSTM}, Tensor y, Tensor gates, Tensor cells)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_hr)",
    "gru_forward": f"({_GRU}, bool save) -> (Tensor y, Tensor hn, Tensor gates)",
    "gru_backward": f"(Tensor dy, Tensor dhn, {_GRU}, Tensor y, Tensor gates)"
    " -> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)",
    "rnn_forward": f"({_GRU}, str nonlinearity) -> (Tensor y, Tensor hn)",
    "rnn_backward": f"(Tensor dy, Tensor dhn, {_GRU}, str nonlinearity, Tensor y)"
    " -> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db)",
    "lstm_gates": f"({_LSTM}, Tensor y) -> (Tensor gates, Tensor cells)",
    "gru_gates": f"({_GRU}, Tensor y) -> Tensor gates",
    "sample": "(Tensor logits, Tensor scale, Tensor top_k, Tensor top_p, Tensor min_p, Tensor? mask, Tensor seed,"
    " Tensor sequence, Tensor step, int mode_of, bool logprobs)"
    " -> (Tensor token, Tensor logprob, Tensor tempered_logprob, Tensor margin, Tensor status)",
}

for _cell in ("lstm", "gru", "rnn"):
    for _way in ("forward", "backward"):
        _both = SCHEMAS[f"{_cell}_{_way}"].replace(", bool reverse", "")
        SCHEMAS[f"{_cell}_both_{_way}"] = _both
        SCHEMAS[f"{_cell}_packed_{_way}"] = _both.replace("Tensor? lengths", "Tensor lengths, Tensor offsets")

# For each argument of a forward op that has a gradient, the result of the backward op that holds it. Both biases of the
# LSTM and of the RNN have one gradient.
GRADIENTS = {
    "lstm": dict(x="dx", h0="dh0", c0="dc0", w_ih="dw_ih", w_hh="dw_hh", b_ih="db", b_hh="db", w_hr="dw_hr"),
    "gru": dict(x="dx", h0="dh0", w_ih="dw_ih", w_hh="dw_hh", b_ih="db_ih", b_hh="db_hh"),
    "rnn": dict(x="dx", h0="dh0", w_ih="dw_ih", w_hh="dw_hh", b_ih="db", b_hh="db"),
}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
ARGUMENTS: dict[str, tuple[str, ...]] = {}  # names by op, in the order of the schema
RESULTS: dict[str, tuple[str, ...]] = {}


def cell_of(op: str) -> str:
    """The cell an op belongs to."""
    return op.partition("_")[0]


def _cotangents(cell: str) -> tuple[str, ...]:
    return ("dy", "dhn", "dcn") if cell == "lstm" else ("dy", "dhn")


# --- bodies ---------------------------------------------------------------------------------------------------------


def run(op: str, args: Sequence) -> tuple[Tensor, ...]:
    """The body of every cell op: ask the table for a function and call it."""
    a = dict(zip(ARGUMENTS[op], args))
    x = a["x"]
    if (a["b_ih"] is None) != (a["b_hh"] is None):
        alone = "b_hh" if a["b_ih"] is None else "b_ih"
        raise ValueError(f"{op}: b_ih and b_hh must both be given or both be None, got only {alone}")
    packed, ways = "_packed_" in op, a["h0"].shape[:-2]
    time, batch = (a["offsets"].shape[0] - 1, a["h0"].shape[-2]) if packed else x.shape[:2]
    call = Call(
        op, x.device.type, x.dtype, time, batch, x.shape[-1], a["w_hh"].shape[-2] // GATES[cell_of(op)],
        lengths=a["lengths"] is not None, reset=a["reset"] is not None, projection=a.get("w_hr") is not None,
        needs_grad=a.get("save", True), bidirectional=2 in ways, packed=packed,
    )  # fmt: skip
    return backends.pick(call)(*args)


def run_sample(*args) -> tuple[Tensor, ...]:
    return backends.function(sample_backend(args[0]), "sample")(*args)


def sample_backend(logits: Tensor) -> str:
    """The name of the backend that the table gives a draw to."""
    batch, vocabulary = logits.shape
    return backends.choose(_sample_call(logits.device.type, logits.dtype, batch, vocabulary)).backend


@functools.lru_cache(maxsize=1024)
def _sample_call(device: str, dtype: torch.dtype, batch: int, vocabulary: int) -> Call:
    return Call("sample", device, dtype, 1, batch, 0, vocabulary)


# --- fakes ----------------------------------------------------------------------------------------------------------


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_forward(op: str, args: Sequence) -> tuple[Tensor, ...]:
    a = dict(zip(ARGUMENTS[op], args))
    x, states = a["x"], [a["h0"], a["c0"]] if "c0" in a else [a["h0"]]
    *ways, _, width = a["h0"].shape
    outputs = [x.new_empty((*ways, *x.shape[:-1], width)), *map(_like, states)]
    return *outputs, *(x.new_empty(shape if a["save"] else (*ways, 0)) for shape in _kept_shapes(op, a))


def _kept_shapes(op: str, a: dict) -> list[tuple[int, ...]]:
    """The shapes of what backward needs beside y."""
    *ways, _, hidden = a["c0" if "c0" in a else "h0"].shape
    widths = {"lstm": (4 * hidden, hidden), "gru": (4 * hidden,), "rnn": ()}[cell_of(op)]
    return [(*ways, *a["x"].shape[:-1], width) for width in widths]


def _fake_gates(op: str, args: Sequence) -> Tensor | tuple[Tensor, ...]:
    a = dict(zip(ARGUMENTS[op], args))
    found = tuple(a["x"].new_empty(shape) for shape in _kept_shapes(op, a))
    return found if len(found) > 1 else found[0]


def _fake_backward(op: str, args: Sequence) -> tuple[Tensor, ...]:
    a = dict(zip(ARGUMENTS[op], args))
    owner = {result: a[argument] for argument, result in GRADIENTS[cell_of(op)].items()}
    none = (*a["h0"].shape[:-2], 0)
    return tuple(a["x"].new_empty(none) if owner[name] is None else _like(owner[name]) for name in RESULTS[op])


def _fake_sample(logits, scale, top_k, top_p, min_p, mask, seed, sequence, step, mode_of, logprobs):
    batch = logits.shape[0]
    detail = [logits.new_empty(batch if logprobs else 0, dtype=torch.float32) for _ in range(3)]
    token, status = logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.int32)
    return token, *detail, status


# --- autograd -------------------------------------------------------------------------------------------------------


def _setup(op: str, ctx, inputs: Sequence, output: Tensor | Sequence[Tensor]) -> None:
    """Keep every argument, and of a forward op also the outputs that its backward op takes."""
    named = dict(zip(ARGUMENTS[op], inputs))
    if op.endswith("_gates"):
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
        return
    if op.endswith("_forward"):
        kept = ARGUMENTS[op.replace("forward", "backward")]
        named |= ((name, value) for name, value in zip(RESULTS[op], output) if name in kept)
        ctx.mark_non_differentiable(*(named[name] for name in ("gates", "cells") if name in named))
    ctx.names = [name for name, value in named.items() if isinstance(value, Tensor)]
    ctx.others = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
    ctx.save_for_backward(*(named[name] for name in ctx.names))


def _named(ctx) -> dict:
    return dict(zip(ctx.names, ctx.saved_tensors)) | ctx.others


def _forward_gradient(op: str, ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Autograd of a forward op: its backward op, after finding again what was not saved.

    A gradient that serves both biases is copied for the second.
    """
    a, cell, backward = _named(ctx), cell_of(op), op.replace("forward", "backward")
    a |= zip(_cotangents(cell), grads)
    if not a.get("save", True):
        a |= _gates_again(op, a)
    results = getattr(torch.ops.fastrnn, backward)(*(a[name] for name in ARGUMENTS[backward]))
    by_name = dict(zip(RESULTS[backward], results))
    gradients = {argument: by_name[result] for argument, result in GRADIENTS[cell].items() if a[argument] is not None}
    if gradients.get("b_hh") is not None and gradients["b_hh"] is gradients["b_ih"]:
        gradients["b_hh"] = gradients["b_ih"].clone()
    return tuple(gradients.get(name) for name in ARGUMENTS[op])


def _gates_again(op: str, a: dict) -> dict[str, Tensor]:
    """What backward needs beside y, by name, of a forward op that did not save it; packed rows are run once more."""
    if "_packed_" in op:
        with torch.no_grad():
            again = getattr(torch.ops.fastrnn, op)(*((a | {"save": True})[name] for name in ARGUMENTS[op]))
        return {name: value for name, value in zip(RESULTS[op], again) if name in ("gates", "cells")}
    gates = f"{cell_of(op)}_gates"
    find, names = getattr(torch.ops.fastrnn, gates), ARGUMENTS[gates]
    with torch.no_grad():
        if "_both_" in op:
            found = reference.both(find, names, *(a[name] for name in names if name != "reverse"))
        else:
            found = find(*(a[name] for name in names))
    return dict(zip(RESULTS[gates], found if isinstance(found, tuple) else (found,)))


def _backward_gradient(op: str, ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Autograd of a backward op: differentiate the gradient of the definition.

    What forward kept (``y``, ``gates``, ``cells``) is a function of the forward's arguments and is recomputed here, so
    it gets no gradient of its own. Made of plain PyTorch, this is differentiable any number of times.
    """
    a, cell, forward = _named(ctx), cell_of(op), op.replace("backward", "forward")
    names = [name for name in (*_cotangents(cell), *GRADIENTS[cell]) if a[name] is not None]
    arguments = names[len(_cotangents(cell)) :]
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Copies of their own, tied to the given tensors only where a graph of this gradient is wanted.
        given = a | {name: _own(a[name], higher) for name in names} | {"save": False}
        outputs = getattr(reference, forward)(*(given[name] for name in ARGUMENTS[forward]))
        cotangents = [given[name] for name in _cotangents(cell)]
        first = _gradients(outputs, [given[name] for name in arguments], cotangents, True)
    by_name = dict(zip(RESULTS[op], grads))
    weights = [by_name[GRADIENTS[cell][name]] for name in arguments]
    if cell != "gru" and "b_hh" in arguments:  # `db` serves both biases: its cotangent counts once
        weights[arguments.index("b_hh")] = torch.zeros_like(a["b_hh"])
    found = _gradients(first, [given[name] for name in names], weights, higher)
    gradients = dict(zip(names, found))
    return tuple(gradients.get(name) for name in ARGUMENTS[op])


def _no_gradient(op: str, ctx, *grads: Tensor) -> tuple[None, ...]:
    """Of what only backward reads, and what its own gradient finds again."""
    return (None,) * len(ARGUMENTS[op])


def _gradients(outputs: Sequence[Tensor], inputs: list[Tensor], weights: list[Tensor], graph: bool):
    """`torch.autograd.grad` that passes over outputs without a graph: an empty sequence has such."""
    used = [(output, weight) for output, weight in zip(outputs, weights) if output.requires_grad]
    if not used:
        return [torch.zeros_like(t) for t in inputs]
    outputs, weights = zip(*used)
    return torch.autograd.grad(outputs, inputs, weights, create_graph=graph, materialize_grads=True)


def _own(tensor: Tensor, tied: bool) -> Tensor:
    """The same values as a tensor to differentiate by; ``tied`` keeps it part of the graph of ``tensor``."""
    return tensor.view_as(tensor) if tied and tensor.requires_grad else tensor.detach().requires_grad_()


# --- autocast -------------------------------------------------------------------------------------------------------


def cast(tensors: Sequence, dtype: torch.dtype) -> list:
    """Floating tensors except float64 in ``dtype``, as torch's own autocast casts the arguments of `torch.nn.LSTM`."""
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _autocast(op: str, device: str, keyset, *args):
    """Autocast rule of an op: the cells run in the region's dtype; a draw is defined on float32 logits."""
    dtype = torch.float32 if op == "sample" else torch.get_autocast_dtype(device)
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return getattr(torch.ops.fastrnn, op)(*cast(args, dtype))


# --- registration ---------------------------------------------------------------------------------------------------


def _register(op: str) -> None:
    name = f"fastrnn::{op}"
    _library.define(op + SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
    schema = getattr(torch.ops.fastrnn, op).default._schema
    ARGUMENTS[op] = tuple(argument.name for argument in schema.arguments)
    RESULTS[op] = tuple(result.name for result in schema.returns)
    for device in ("cpu", "cuda"):
        kernel = functools.partial(_autocast, op, device)
        _library.impl(op, kernel, f"Autocast{device.upper()}", with_keyset=True)
    if op == "sample":
        _library.impl(op, run_sample, "CompositeExplicitAutograd")
        torch.library.register_fake(name, _fake_sample, lib=_library)
        return
    way = op.rpartition("_")[2]
    fake, gradient = {
        "forward": (_fake_forward, _forward_gradient),
        "backward": (_fake_backward, _backward_gradient),
        "gates": (_fake_gates, _no_gradient),
    }[way]
    _library.impl(op, lambda *args: run(op, args), "CompositeExplicitAutograd")
    torch.library.register_fake(name, lambda *args: fake(op, args), lib=_library)
    torch.library.register_autograd(
        name,
        lambda ctx, *grads: gradient(op, ctx, *grads),
        setup_context=lambda ctx, inputs, output: _setup(op, ctx, inputs, output),
        lib=_library,
    )


for _op in SCHEMAS:
    _register(_op)

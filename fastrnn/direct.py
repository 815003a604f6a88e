"""The short way of a call: plain tensors on the CPU straight to the C++ kernels, which give what `fastrnn.ops` gives.

Most of a small call's cost is Python and dispatch. So here nothing is boxed twice, the table of backends is asked once
for each kind of call, and a gradient needs one node. A call that anything surrounds (a compiler, a transform, autocast,
a mode, `explain`) or that is in any way unusual gets None and goes the long way, which also says
what is wrong with a call that does not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import aten, backends
from .backends import Call

_STATES = {"lstm": 2, "gru": 1, "rnn": 1}
_PLAIN = (Tensor, nn.Parameter, type(None))


# --- which calls ----------------------------------------------------------------------------------------------------


# Bound once: looking them up is a good part of what they cost.
_is_compiling = torch.compiler.is_compiling
_in_functorch = torch._C._are_functorch_transforms_active
_in_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def _surrounded() -> bool:
    """Whether something around this call may want to see it or to change how it runs."""
    return (
        _is_compiling()
        or _in_functorch()
        or _in_autocast()
        or _dispatch_modes() > 0
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or backends.recording()
    )


@functools.lru_cache(maxsize=8192)
def _backend(
    cell: str, dtype: torch.dtype, time: int, batch: int, inputs: int, hidden: int, layers: int, training: bool,
    needs_grad: bool, asked: str | None,
) -> str:  # fmt: skip
    """The table's choice for this call, remembered by less than a Call; `asked` is the explicit one."""
    del asked  # `choose` knows it: here it only tells the calls apart
    call = Call(cell, "cpu", dtype, time, batch, inputs, hidden, layers, training=training, needs_grad=needs_grad)
    return backends.choose(call).backend


def _states(cell: str, hx: Any, x: Tensor, shape: tuple[int, ...]) -> Sequence | None:
    """The initial states as a sequence, zeros where hx is None; None where hx is not what the cell takes."""
    if hx is None:
        return (x.new_zeros(shape),) * _STATES[cell]
    if cell != "lstm":
        return (hx,)
    return hx if isinstance(hx, (tuple, list)) and len(hx) == 2 else None


def _plain(x: Tensor, states: Sequence | None, shape: tuple[int, ...], weights: Sequence) -> bool:
    """Whether the states have this shape, all are ordinary tensors, and x, states and first weight go together."""
    if states is None or not x.is_cpu:
        return False
    dtype = x.dtype
    for state in states:
        if type(state) is not Tensor or state.dtype is not dtype or not state.is_cpu or state.shape != shape:
            return False
    first = weights[0]
    if first.dtype is not dtype or not first.is_cpu:
        return False
    for weight in weights:
        if type(weight) not in _PLAIN:
            return False
    return True


def _needs_grad(x: Tensor, states: Sequence[Tensor], weights: Sequence) -> bool:
    if torch.is_grad_enabled():
        for tensor in (*weights, x, *states):
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# --- the two calls --------------------------------------------------------------------------------------------------


def step(
    cell: str, x: Any, hx: Any, weights: Sequence[Tensor | None], inputs: int, hidden: int, nonlinearity: str = ""
) -> tuple[Tensor, ...] | None:
    """The new states of one step of a cell from x (B, I), hx (B, H); None: this call goes the long way."""
    if _surrounded() or type(x) is not Tensor or x.dim() != 2 or x.size(1) != inputs:
        return None
    batch = x.size(0)
    shape = (batch, hidden)
    states = _states(cell, hx, x, shape)
    if not _plain(x, states, shape, weights):
        return None
    needs_grad = _needs_grad(x, states, weights)
    backend = _backend(cell, x.dtype, 1, batch, inputs, hidden, 1, True, needs_grad, backends.explicit())
    if backend == "aten":
        return aten.step(cell, nonlinearity, x, states, weights)
    if backend != "cpu":
        return None
    if needs_grad:
        return _Layer.apply(cell, False, _tail(cell, False, nonlinearity), x, *states, *weights)
    if cell == "lstm":
        return _kernel("lstm_step")(x, *states, *weights)
    if cell == "gru":
        return (_kernel("gru_step")(x, *states, *weights),)
    return (_kernel("rnn_step")(x, *states, *weights, nonlinearity == "relu"),)


def stack(
    mode: str, x: Tensor, hx: Any, weights: Sequence[Tensor], *, inputs: int, hidden: int, bias: bool, num_layers: int,
    bidirectional: bool, training: bool,
):  # fmt: skip
    """`ops.stack` of x (T, B, I) without dropout, projection, lengths and reset; None: this call goes the long way."""
    if _surrounded() or type(x) is not Tensor or x.dim() != 3:
        return None
    time, batch, width = x.shape
    if width != inputs or time == 0:
        return None
    cell, _, nonlinearity = mode.lower().partition("_")
    directions = 1 + bidirectional
    slots, per_slot = num_layers * directions, 2 + 2 * bias
    shape = (slots, batch, hidden)
    states = _states(cell, hx, x, shape)
    if len(weights) != slots * per_slot or not _plain(x, states, shape, weights):
        return None
    needs_grad = _needs_grad(x, states, weights)
    asked = backends.explicit()
    backend = _backend(cell, x.dtype, time, batch, inputs, hidden, num_layers, training, needs_grad, asked)
    if backend == "aten":
        hx = states if cell == "lstm" else states[0]
        return aten.stack(mode, x, hx, weights, bias, num_layers, 0.0, training, bidirectional, None, needs_grad)
    if backend != "cpu":
        return None
    by_slot = (states,) if slots == 1 else tuple(zip(*(state.split(1) for state in states)))
    forward, ends, outputs = _kernel(f"{cell}_forward"), [], []
    for slot in range(slots):
        reverse = slot % directions == 1
        own = weights[slot * per_slot : (slot + 1) * per_slot]
        arguments = (*by_slot[slot], *own) if bias else (*by_slot[slot], *own, None, None)
        tail = _tail(cell, reverse, nonlinearity)
        if needs_grad:
            y, *end = _Layer.apply(cell, directions == 1 and slot == slots - 1, tail, x, *arguments)
        else:
            y, *end = forward(x, *arguments, *tail) if cell == "rnn" else forward(x, *arguments, *tail, False)
        ends.append(end[: _STATES[cell]])
        outputs.append(y)
        if len(outputs) == directions:
            x = y if directions == 1 else torch.cat(outputs, -1)
            outputs = []
    hx = ends[0] if slots == 1 else [torch.cat(state) for state in zip(*ends)]
    return x, tuple(hx) if cell == "lstm" else hx[0]


# --- one layer ------------------------------------------------------------------------------------------------------


def _kernel(op: str):
    return backends.function("cpu", op)


def _tail(cell: str, reverse: bool, nonlinearity: str) -> tuple:
    """What follows the weights in the arguments of the ops: no projection, no lengths, no reset, reverse."""
    if cell == "lstm":
        return None, None, None, reverse
    return (None, None, reverse, nonlinearity) if cell == "rnn" else (None, None, reverse)


class _Layer(torch.autograd.Function):
    """One layer in one direction by the C++ kernels, as one node; a graph of its backward is the registered op's.

    Results: y and the states for x (T, B, I), the states alone for x (B, I). States may be (B, H) or (1, B, H).
    """

    @staticmethod
    def forward(ctx, cell: str, private: bool, tail: tuple, x: Tensor, *states_and_weights: Tensor | None):
        forward, ends = _kernel(f"{cell}_forward"), 1 + _STATES[cell]
        if cell == "rnn":
            results = forward(x, *states_and_weights, *tail)
        else:
            results = forward(x, *states_and_weights, *tail, True)
        y = results[0]
        ctx.cell, ctx.tail = cell, tail
        # `private`: the caller gets y and may write into it, as after torch.nn.GRU, so backward keeps another.
        ctx.save_for_backward(x, *states_and_weights, y.clone() if private else y, *results[ends:])
        return results[1:ends] if x.dim() == 2 else results[:ends]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cell, saved = ctx.cell, ctx.saved_tensors
        inputs = 5 + _STATES[cell]
        given, kept = saved[:inputs], saved[inputs:]
        if given[0].dim() == 2:  # y and h are one: all of the gradient comes by way of h
            grads = (torch.zeros_like(grads[0]), *grads)
        if torch.is_grad_enabled() or _surrounded() or backends.explicit() not in (None, "cpu"):
            results = _registered_backward(cell, grads, given, ctx.tail, kept)
        else:
            results = _kernel(f"{cell}_backward")(*grads, *given, *ctx.tail, *kept, ctx.needs_input_grad[3])
        dx = results[0] if ctx.needs_input_grad[3] else None
        firsts = dx, *results[1 : inputs - 2]  # those of x, of the states, w_ih and w_hh
        if given[-1] is None:
            return None, None, None, *firsts, None, None
        b_ih = results[inputs - 2]
        return None, None, None, *firsts, b_ih, results[inputs - 1] if cell == "gru" else b_ih.clone()


def _registered_backward(cell: str, grads: Sequence, given: Sequence, tail: tuple, kept: Sequence) -> list[Tensor]:
    """The registered backward op on the arguments of `_Layer`, brought to its shapes: x (T, B, I) and states (B, H)."""
    x, states, weights = given[0], given[1:-4], given[-4:]

    def steps(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if x.dim() == 2 else tensor

    def rows(state: Tensor) -> Tensor:
        return state.squeeze(0) if state.dim() == 3 else state

    op = getattr(torch.ops.fastrnn, f"{cell}_backward")
    dx, *others = op(
        steps(grads[0]), *map(rows, grads[1:]), steps(x), *map(rows, states), *weights, *tail, *map(steps, kept)
    )
    dstates = [d.reshape(state.shape) for d, state in zip(others, states)]
    return [dx.reshape(x.shape), *dstates, *others[len(states) :]]

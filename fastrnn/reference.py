"""The definition of the recurrent cells, forward and backward, in plain PyTorch.

Every backend of fastrnn computes what this file computes; the tests hold them to it in float64. One call is one layer
in one direction over a whole sequence.

Notation (the same in every kernel): ``T`` time, ``B`` batch, ``I`` input size, ``H`` hidden size, ``P`` projection size
(``P = H`` without projection), ``G`` gates a unit (LSTM 4, GRU 3, RNN 1). Sequences are time-major ``(T, B, .)``.
Gates stand in PyTorch's order: LSTM ``i f g o``, GRU ``r z n``. ``s`` is the logistic function.

LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000; projection of Sak et al. 2014, arXiv:1402.1128;
as in ``torch.nn.LSTM``)::

    i = s(W_ii x + b_ii + W_hi h + b_hi)        c' = f * c + i * g
    f = s(W_if x + b_if + W_hf h + b_hf)        m' = o * tanh(c')
    g = tanh(W_ig x + b_ig + W_hg h + b_hg)     h' = W_hr m'  (h' = m' without projection)
    o = s(W_io x + b_io + W_ho h + b_ho)

GRU (Cho et al. 2014, arXiv:1406.1078, with the reset gate after the product as in ``torch.nn.GRU``)::

    r = s(W_ir x + b_ir + W_hr h + b_hr)        q = W_hn h + b_hn
    z = s(W_iz x + b_iz + W_hz h + b_hz)        n = tanh(W_in x + b_in + r * q)        h' = (1 - z) * n + z * h

RNN (Elman 1990; ``torch.nn.RNN``)::

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh)    or    h' = relu(...)

Arguments common to all functions:

* ``x (T, B, I)``, ``h0 (B, P)``, ``c0 (B, H)``, ``w_ih (G*H, I)``, ``w_hh (G*H, P)``, ``b_ih``, ``b_hh`` ``(G*H,)`` or
  None, ``w_hr (P, H)`` or None: floating point, one dtype, one device.
* ``lengths (B,)`` int64 or None: row ``b`` has the steps ``t < lengths[b]``. Beyond them every output of that row is 0
  and its state stands still.
* ``reset (T, B)`` bool or None: where True (and the step exists) the state is set to zero before step ``t``.
* ``reverse``: the steps run from the last to the first; ``y[t]`` belongs to ``x[t]`` in either direction.
* ``save``: return what backward needs; otherwise those tensors come back as empty ``(0,)`` tensors.

``{lstm,gru}_gates`` find what backward needs once more, from ``y``. ``{lstm,gru,rnn}_both_{forward,backward}`` run both
directions of a layer: every argument and result but ``x``, its gradient, ``lengths``, ``reset`` and ``save`` has one
dimension more, the first, for the forward and the reverse direction; ``reset[t]`` starts a new segment at step ``t``,
which the reverse direction, coming from the other side, enters at ``t - 1``.

``{lstm,gru,rnn}_packed_{forward,backward}`` run one direction or both, in that first dimension, over sequences of
different length whose steps lie together as in a PackedSequence: row ``offsets[t] + b`` of ``x (N, I)``, ``N`` the sum
of the lengths, is step ``t`` of sequence ``b``, and so it is of ``reset (N,)``, ``y``, ``gates``, ``cells`` and the
gradients of x and y. No sequence is longer than the one before it, and none is empty. ``offsets (T + 1,)`` is int64.

Nothing here is done in place, so autograd, forward-mode AD and ``torch.func`` transforms go through it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def lstm_forward(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one LSTM layer: ``(y (T,B,P), hn (B,P), cn (B,H), gates (T,B,4H), cells (T,B,H))``.

    ``gates`` holds ``i f g o`` after their nonlinearity and ``cells`` holds ``c'`` of every step.
    """
    gx = linear(x, w_ih, b_ih)
    h, c, ys, gates, cells = h0, c0, {}, {}, {}
    for t in _steps(x.shape[0], reverse):
        exists, fresh = _masks(t, lengths, reset)
        h_prev, c_prev = _zero_where(fresh, h), _zero_where(fresh, c)
        i, f, g, o = (gx[t] + linear(h_prev, w_hh, b_hh)).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_next = f * c_prev + i * g
        m = o * c_next.tanh()
        h_next = m if w_hr is None else linear(m, w_hr)
        ys[t], cells[t] = _zero_unless(exists, h_next), _zero_unless(exists, c_next)
        gates[t] = _zero_unless(exists, torch.cat((i, f, g, o), -1)) if save else None
        h, c = _keep_unless(exists, h_next, h), _keep_unless(exists, c_next, c)
    y = _stack(ys, h0)
    if not save:
        return y, _copy(h), _copy(c), x.new_empty(0), x.new_empty(0)
    return y, _copy(h), _copy(c), _stack(gates, c0, 4), _stack(cells, c0)


def lstm_gates(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, y: Tensor,
) -> tuple[Tensor, Tensor]:
    """``(gates, cells)`` of `lstm_forward`, from its ``y``: one product for all steps, then the cells step by step."""
    pre = linear(x, w_ih, b_ih) + linear(_previous(y, h0, lengths, reset, reverse), w_hh, b_hh)
    i, f, g, o = pre.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c, gates, cells = c0, {}, {}
    for t in _steps(x.shape[0], reverse):
        exists, fresh = _masks(t, lengths, reset)
        c_next = f[t] * _zero_where(fresh, c) + i[t] * g[t]
        gates[t] = _zero_unless(exists, torch.cat((i[t], f[t], g[t], o[t]), -1))
        cells[t], c = _zero_unless(exists, c_next), _keep_unless(exists, c_next, c)
    return _stack(gates, c0, 4), _stack(cells, c0)


def lstm_backward(
    dy: Tensor, dhn: Tensor, dcn: Tensor, x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None,
    reverse: bool, y: Tensor, gates: Tensor, cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one LSTM layer: ``(dx, dh0, dc0, dw_ih, dw_hh, db (4H,), dw_hr)``.

    ``dy``, ``dhn``, ``dcn`` are the gradients of ``y``, ``hn``, ``cn``. Both biases have the gradient ``db``. ``db``
    and ``dw_hr`` are empty ``(0,)`` tensors where the layer has no bias or no projection.
    """
    h_prev = _previous(y, h0, lengths, reset, reverse)
    c_prev = _previous(cells, c0, lengths, reset, reverse)
    dh, dc, dgates, dhs = dhn, dcn, {}, {}
    for t in _steps(x.shape[0], not reverse):
        exists, fresh = _masks(t, lengths, reset)
        i, f, g, o = gates[t].chunk(4, -1)
        tanh_c = cells[t].tanh()
        dh_t = dhs[t] = _zero_unless(exists, dh + dy[t])
        dm = dh_t if w_hr is None else dh_t @ w_hr
        dc_t = _zero_unless(exists, dc) + dm * o * (1 - tanh_c * tanh_c)
        di, df = dc_t * g * i * (1 - i), dc_t * c_prev[t] * f * (1 - f)
        dg, do = dc_t * i * (1 - g * g), dm * tanh_c * o * (1 - o)
        dgates[t] = _zero_unless(exists, torch.cat((di, df, dg, do), -1))
        dh = _keep_unless(exists, _zero_where(fresh, dgates[t] @ w_hh), dh)
        dc = _keep_unless(exists, _zero_where(fresh, dc_t * f), dc)
    dgx = _stack(dgates, c0, 4)
    db = x.new_empty(0) if b_ih is None and b_hh is None else dgx.sum((0, 1))
    if w_hr is None:
        dw_hr = x.new_empty(0)
    else:
        dw_hr = _outer_sum(_stack(dhs, h0), gates.chunk(4, -1)[3] * cells.tanh())
    return dgx @ w_ih, _copy(dh), _copy(dc), _outer_sum(dgx, x), _outer_sum(dgx, h_prev), db, dw_hr


def gru_forward(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None,
    reset: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one GRU layer: ``(y (T,B,H), hn (B,H), gates (T,B,4H))``; ``gates`` holds ``r z n q``."""
    gx = linear(x, w_ih, b_ih)
    h, ys, gates = h0, {}, {}
    for t in _steps(x.shape[0], reverse):
        exists, fresh = _masks(t, lengths, reset)
        h_prev = _zero_where(fresh, h)
        xr, xz, xn = gx[t].chunk(3, -1)
        hr, hz, q = linear(h_prev, w_hh, b_hh).chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * q).tanh()
        h_next = (1 - z) * n + z * h_prev
        ys[t] = _zero_unless(exists, h_next)
        gates[t] = _zero_unless(exists, torch.cat((r, z, n, q), -1)) if save else None
        h = _keep_unless(exists, h_next, h)
    return _stack(ys, h0), _copy(h), _stack(gates, h0, 4) if save else x.new_empty(0)


def gru_gates(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None,
    reset: Tensor | None, reverse: bool, y: Tensor,
) -> Tensor:
    """``gates`` of `gru_forward`, from its ``y``: two products for all steps."""
    xr, xz, xn = linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, q = linear(_previous(y, h0, lengths, reset, reverse), w_hh, b_hh).chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    gates = torch.cat((r, z, (xn + r * q).tanh(), q), -1)
    exists = None if lengths is None else _steps_of_rows(x, lengths)
    return _zero_unless(exists, gates)


def gru_backward(
    dy: Tensor, dhn: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, y: Tensor, gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one GRU layer: ``(dx, dh0, dw_ih, dw_hh, db_ih (3H,), db_hh (3H,))``, ``(0,)`` without bias."""
    h_prev = _previous(y, h0, lengths, reset, reverse)
    dh, dgx, dgh = dhn, {}, {}
    for t in _steps(x.shape[0], not reverse):
        exists, fresh = _masks(t, lengths, reset)
        r, z, n, q = gates[t].chunk(4, -1)
        dh_t = _zero_unless(exists, dh + dy[t])
        dn = dh_t * (1 - z) * (1 - n * n)
        dz = dh_t * (h_prev[t] - n) * z * (1 - z)
        dr = dn * q * r * (1 - r)
        dgx[t] = _zero_unless(exists, torch.cat((dr, dz, dn), -1))
        dgh[t] = _zero_unless(exists, torch.cat((dr, dz, dn * r), -1))
        dh = _keep_unless(exists, _zero_where(fresh, dh_t * z + dgh[t] @ w_hh), dh)
    dgx_all, dgh_all = _stack(dgx, h0, 3), _stack(dgh, h0, 3)
    db_ih = x.new_empty(0) if b_ih is None else dgx_all.sum((0, 1))
    db_hh = x.new_empty(0) if b_hh is None else dgh_all.sum((0, 1))
    return dgx_all @ w_ih, _copy(dh), _outer_sum(dgx_all, x), _outer_sum(dgh_all, h_prev), db_ih, db_hh


def rnn_forward(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None,
    reset: Tensor | None, reverse: bool, nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """Run one Elman layer, ``nonlinearity`` "tanh" or "relu": ``(y (T,B,H), hn (B,H))``; backward needs ``y`` alone."""
    activation = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
    gx = linear(x, w_ih, b_ih)
    h, ys = h0, {}
    for t in _steps(x.shape[0], reverse):
        exists, fresh = _masks(t, lengths, reset)
        h_next = activation(gx[t] + linear(_zero_where(fresh, h), w_hh, b_hh))
        ys[t] = _zero_unless(exists, h_next)
        h = _keep_unless(exists, h_next, h)
    return _stack(ys, h0), _copy(h)


def rnn_backward(
    dy: Tensor, dhn: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, nonlinearity: str, y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one Elman layer: ``(dx, dh0, dw_ih, dw_hh, db (H,))``; both biases have the gradient ``db``."""
    slope = {"tanh": lambda y: 1 - y * y, "relu": lambda y: (y > 0).to(y.dtype)}[nonlinearity]
    h_prev = _previous(y, h0, lengths, reset, reverse)
    dh, dgates = dhn, {}
    for t in _steps(x.shape[0], not reverse):
        exists, fresh = _masks(t, lengths, reset)
        dgates[t] = _zero_unless(exists, (dh + dy[t]) * slope(y[t]))
        dh = _keep_unless(exists, _zero_where(fresh, dgates[t] @ w_hh), dh)
    dgx = _stack(dgates, h0)
    db = x.new_empty(0) if b_ih is None and b_hh is None else dgx.sum((0, 1))
    return dgx @ w_ih, _copy(dh), _outer_sum(dgx, x), _outer_sum(dgx, h_prev), db


def both(function: Callable, names: Sequence[str], *args) -> tuple[Tensor, ...]:
    """A function of one direction, whose parameters have these names, for both directions."""
    given = dict(zip((name for name in names if name != "reverse"), args, strict=True))
    return _each_direction(function, names, given, 2)


def packed(function: Callable, names: Sequence[str], *args) -> tuple[Tensor, ...]:
    """A function of one direction, whose parameters have these names, for the rows of packed sequences."""
    order = [name for name in names if name != "reverse"]
    order.insert(order.index("reset"), "offsets")
    given = dict(zip(order, args, strict=True))
    offsets, lengths, rows = given.pop("offsets"), given["lengths"], given["x"].shape[0]
    steps = torch.arange(offsets.shape[0] - 1, device=offsets.device).unsqueeze(-1)
    exists = steps < lengths
    at = torch.where(exists, offsets[:-1].unsqueeze(-1) + torch.arange(len(lengths), device=lengths.device), 0)
    row = torch.arange(rows, device=offsets.device)
    t = torch.searchsorted(offsets, row, right=True) - 1
    b = row - offsets[t]
    for name in _ROWS:
        if given.get(name) is not None:
            given[name] = _zero_unless(exists.unsqueeze(-1), given[name][..., at, :])
    if given["reset"] is not None:
        given["reset"] = given["reset"][at] & exists
    results = _each_direction(function, names, given, given["h0"].shape[0])
    if "dy" in given:
        return results[0][t, b], *results[1:]
    return tuple(result[:, t, b] if result.dim() == 4 else result for result in results)


_ROWS = ("x", "dy", "y", "gates", "cells")
_SHARED = ("x", "lengths", "reset", "save", "nonlinearity")


def _each_direction(function: Callable, names: Sequence[str], given: dict, directions: int) -> tuple[Tensor, ...]:
    """The results of the forward direction and, of two, the reverse one, in a first dimension."""
    ways = []
    for direction in range(directions):
        own = {n: v if v is None or n in _SHARED else v[direction] for n, v in given.items()}
        own |= {"reset": reset_of(given["reset"], direction), "reverse": direction == 1}
        found = function(*(own[name] for name in names))
        ways.append(found if isinstance(found, tuple) else (found,))
    results = [torch.stack(each) for each in zip(*ways)]
    if "dy" in given:
        results[0] = results[0].sum(0)  # x is one for both
    return tuple(results)


def reset_of(reset: Tensor | None, direction: int) -> Tensor | None:
    """Before which steps a direction sets its state to zero, if a new segment starts where ``reset`` says."""
    if reset is None or direction == 0:
        return reset
    return torch.cat((reset[1:], torch.zeros_like(reset[:1])))


def parameters(op: str) -> tuple[str, ...]:
    """The names of the parameters of a function of this file."""
    return tuple(inspect.signature(globals()[op]).parameters)


def _made(kind: Callable, cell: str) -> tuple[Callable, Callable]:
    ops = f"{cell}_forward", f"{cell}_backward"
    return tuple(functools.partial(kind, globals()[op], parameters(op)) for op in ops)


lstm_both_forward, lstm_both_backward = _made(both, "lstm")
gru_both_forward, gru_both_backward = _made(both, "gru")
rnn_both_forward, rnn_both_backward = _made(both, "rnn")
lstm_packed_forward, lstm_packed_backward = _made(packed, "lstm")
gru_packed_forward, gru_packed_backward = _made(packed, "gru")
rnn_packed_forward, rnn_packed_backward = _made(packed, "rnn")


def _steps(time: int, reverse: bool) -> range:
    """The order in which the steps are processed."""
    return range(time - 1, -1, -1) if reverse else range(time)


def _masks(t: int, lengths: Tensor | None, reset: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """For step ``t``: which rows have it ``(B, 1)``, and which start afresh there ``(B, 1)``; None means all, none."""
    exists = None if lengths is None else (lengths > t).unsqueeze(-1)
    return exists, None if reset is None else reset[t].unsqueeze(-1)


def _steps_of_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Which rows have which step ``(T, B, 1)``."""
    return (lengths > torch.arange(x.shape[0], device=x.device).unsqueeze(-1)).unsqueeze(-1)


def _zero_where(mask: Tensor | None, value: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, torch.zeros_like(value), value)


def _zero_unless(mask: Tensor | None, value: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, torch.zeros_like(value))


def _keep_unless(mask: Tensor | None, value: Tensor, kept: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, kept)


def _copy(state: Tensor) -> Tensor:
    """A contiguous copy, so that no output aliases an input or another output."""
    return state.clone(memory_format=torch.contiguous_format)


def _stack(by_step: dict[int, Tensor], like: Tensor, gates: int = 1) -> Tensor:
    """Stack per-step tensors in time order; ``like`` gives batch, dtype and device of an empty sequence."""
    if by_step:
        return torch.stack([by_step[t] for t in range(len(by_step))])
    return like.new_empty((0, *like.shape[:-1], gates * like.shape[-1]))


def _previous(y: Tensor, first: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """The state ``(T, B, .)`` that each step started from, given every step's result ``y`` and the initial state."""
    time = y.shape[0]
    if time == 0:
        return y
    if reverse:
        before = torch.cat((y[1:], first.unsqueeze(0)))
        if lengths is not None:
            last = torch.arange(1, time + 1, device=y.device).unsqueeze(-1) >= lengths
            before = torch.where(last.unsqueeze(-1), first.unsqueeze(0), before)
    else:
        before = torch.cat((first.unsqueeze(0), y[:-1]))
    return before if reset is None else torch.where(reset.unsqueeze(-1), torch.zeros_like(before), before)


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the outer products over time and batch: ``(T,B,M), (T,B,N) -> (M,N)``, as one matrix product."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)

"""What backward needs of every step, found again from the layer's output: the gates of the LSTM and the GRU.

Interfaces as in `fastrnn.reference`. All pre-activations come from one product of matrices, or two, for all steps at
once, because every step's h is known; what is left has no product in it, and of the LSTM the cells follow from the
gates as a linear recurrence, whose steps can be composed in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .cell_math import load_float, load_gates, sigmoid, step_index, store_as, store_gates, tanh


@triton.jit
def compose(decay, added, decay_next, added_next):
    """Two steps of c' = decay * c + added as one; a step that forgets everything forgets a NaN too."""
    passed = tl.where(decay_next == 0.0, 0.0, decay_next * added)
    return decay * decay_next, passed + added_next


@triton.jit(**launch.SEQUENCE)
def lstm_gates_kernel(
    p_pre, p_c0, p_lengths, p_reset, p_gates, p_cells, T, B, H: tl.constexpr, DIRECTION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gates and cells of every step from the pre-activations, where a row has no such step zeros.

    Owns: BN units of a sequence. Keeps: c. Moves: pre-activations in; gates and cells out, BT steps at a time. Syncs:
    none but those of the scan. Limits: none.
    """
    b, o_n, o_s = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BT)
    m_n, length = o_n < H, T
    if p_lengths is not None:
        length = tl.load(p_lengths + b).to(tl.int32)
    c = load_float(p_c0 + b * H + o_n, m_n)
    for s in range(0, T, BT):
        t, here = step_index(s + o_s, T, DIRECTION == "reverse"), s + o_s < T
        row, exists = t.to(tl.int64) * B + b, (here & (t < length))[:, None]
        fresh = o_s[:, None] < 0
        if p_reset is not None:
            fresh = (tl.load(p_reset + row, here, other=0) != 0)[:, None]
        m = here[:, None] & m_n[None, :]
        i, f, g, o = load_gates(p_pre + row[:, None] * (4 * H) + o_n[None, :], m, H)
        i, f = sigmoid(i.to(tl.float32)), sigmoid(f.to(tl.float32))
        g, o = tanh(g.to(tl.float32)), sigmoid(o.to(tl.float32))
        decay, added = tl.where(exists, tl.where(fresh, 0.0, f), 1.0), tl.where(exists, i * g, 0.0)
        # The first of these steps starts from c.
        added += tl.where((o_s == 0)[:, None] & (decay != 0.0), decay * c[None, :], 0.0)
        cells = tl.associative_scan((decay, added), 0, compose)[1]
        c = tl.sum(tl.where((o_s == BT - 1)[:, None], cells, 0.0), 0)
        i, f = tl.where(exists, i, 0.0), tl.where(exists, f, 0.0)
        g, o = tl.where(exists, g, 0.0), tl.where(exists, o, 0.0)
        store_gates(p_gates + row[:, None] * (4 * H) + o_n[None, :], m, i, f, g, o, H)
        store_as(p_cells + row[:, None] * H + o_n[None, :], tl.where(exists, cells, 0.0), m)


@triton.jit(**launch.SEQUENCE)
def gru_gates_kernel(p_gx, p_gh, p_lengths, p_gates, T, B, H: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """Gates of every step from the two parts of the pre-activations, where a row has no such step zeros.

    Owns: BN units of BT steps of a sequence. Keeps: nothing. Moves: both parts in, gates out. Syncs: none. Limits:
    none.
    """
    slices, o_n, length = tl.cdiv(T, BT), tl.program_id(1) * BN + tl.arange(0, BN), T
    b, t = (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices * BT + tl.arange(0, BT)
    if p_lengths is not None:
        length = tl.load(p_lengths + b).to(tl.int32)
    row, exists, m = t.to(tl.int64) * B + b, (t < length)[:, None], (t < T)[:, None] & (o_n < H)[None, :]
    p_x, p_h = p_gx + row[:, None] * (3 * H) + o_n[None, :], p_gh + row[:, None] * (3 * H) + o_n[None, :]
    r, z = sigmoid(load_float(p_x, m) + load_float(p_h, m)), sigmoid(load_float(p_x + H, m) + load_float(p_h + H, m))
    q = load_float(p_h + 2 * H, m)
    n = tanh(load_float(p_x + 2 * H, m) + r * q)
    r, z, n, q = tl.where(exists, r, 0.0), tl.where(exists, z, 0.0), tl.where(exists, n, 0.0), tl.where(exists, q, 0.0)
    store_gates(p_gates + row[:, None] * (4 * H) + o_n[None, :], m, r, z, n, q, H)


def lstm_gates(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, y: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.lstm_gates`."""
    time, batch, _, hidden = launch.check_shapes("lstm", locals())
    gates, cells = x.new_empty(time, batch, 4 * hidden), x.new_empty(time, batch, hidden)
    if gates.numel() == 0:
        return gates, cells
    pre = launch.input_part(x, w_ih, launch.added(b_ih, b_hh)).flatten(0, 1)
    before = launch.previous(y, h0, lengths, reset, reverse).flatten(0, 1)
    torch.addmm(pre, before, w_hh.t(), out=pre)
    c0, lengths, fresh = launch.contiguous(c0, lengths, launch.flag(reset))
    args, sizes = (pre, c0, lengths, fresh, gates, cells, time, batch), dict(H=hidden)
    direction = launch.direction_of(h0, reverse)
    launch.run(lstm_gates_kernel, tuning.gates("lstm", hidden, batch, time), *args, **sizes, DIRECTION=direction)
    return gates, cells


def gru_gates(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    lengths: Tensor | None, reset: Tensor | None, reverse: bool, y: Tensor,
) -> Tensor:  # fmt: skip
    """`fastrnn.reference.gru_gates`."""
    time, batch, _, hidden = launch.check_shapes("gru", locals())
    gates = x.new_empty(time, batch, 4 * hidden)
    if gates.numel() == 0:
        return gates
    before = launch.previous(y, h0, lengths, reset, reverse)
    parts = launch.input_part(x, w_ih, b_ih), launch.input_part(before, w_hh, b_hh)
    args = (*parts, *launch.contiguous(lengths), gates, time, batch)
    launch.run(gru_gates_kernel, tuning.gates("gru", hidden, batch, time), *args, H=hidden)
    return gates


def variants() -> list[launch.Variant]:
    """The kernels with the arguments that they are launched with, for a check that they compile."""
    found = []
    for cell, kernel in (("lstm", lstm_gates_kernel), ("gru", gru_gates_kernel)):
        for dtype, hidden, given in ((torch.float32, 300, True), (torch.bfloat16, 512, False)):
            name = f"gates/{cell}_gates/{launch.TYPES[dtype]}/{hidden}{'/masked' * given}"
            plan = tuning.gates(cell, hidden, 64, 100)
            found.append(launch.variant(name, kernel, plan, dtype, hidden, given, {}))
    return found

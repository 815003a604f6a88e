"""The Elman network in Triton: forward and backward of one layer in one direction, and a single step.

Interfaces and equations as in `fastrnn.reference`. The input's part of the pre-activations comes from one product of
matrices before the loop, the gradients of weights and input from products after it; the loop is one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from . import tuning
from .cell_math import (
    add_back,
    add_product,
    copy_tiles,
    finish_state,
    first_row,
    input_rows,
    load_bias,
    load_float,
    load_lengths,
    load_weight,
    meet,
    starting_mask,
    step_index,
    store_as,
    tanh,
    unless_fresh,
)
from .launch import (
    Variant,
    check_shapes,
    contiguous,
    flag,
    precision,
    previous,
    processors,
    run,
    variants_of,
    weight_gradient,
)


@triton.jit
def activate(a, RELU: tl.constexpr):
    """h from its pre-activation; NaN stays NaN."""
    if RELU:
        return tl.where(a < 0, 0.0, a)
    else:
        return tanh(a)


@triton.jit
def slope(h, RELU: tl.constexpr):
    """The derivative of `activate`, told by its result."""
    if RELU:
        return tl.where(h > 0, 1.0, 0.0)
    else:
        return 1.0 - h * h


@triton.jit(do_not_specialize=["T", "B"])
def resident_forward_kernel(
    p_gx, p_h0, p_w, p_b, p_lengths, p_reset, p_y, p_hn, T, B, H: tl.constexpr, RELU: tl.constexpr,
    REVERSE: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch.

    Owns: all results of BB sequences. Keeps: W_hh and h on chip. Moves: gx in and y out. Syncs: none but those of
    the product. Limits: H <= BH, and W_hh must fit into one multiprocessor.
    """
    o_b = tl.program_id(0) * BB + tl.arange(0, BB)
    o_h, m_b = tl.arange(0, BH), o_b < B
    m_h, m = o_h < H, m_b[:, None] & (o_h < H)[None, :]
    w, bias = load_weight(p_w, o_h, o_h, H, H, 1, H), load_bias(p_b, o_h, m_h)
    at_state = o_b.to(tl.int64)[:, None] * H + o_h[None, :]
    h, length = load_float(p_h0 + at_state, m), load_lengths(p_lengths, o_b, m_b, T)
    row, move = first_row(o_b, T, B, REVERSE), (-B if REVERSE else B)
    x = tl.load(p_gx + row[:, None] * H + o_h[None, :], m, other=0.0)
    for s in range(T):
        exists, at, a = step_index(s, T, REVERSE) < length, row[:, None] * H + o_h[None, :], x.to(tl.float32) + bias
        h_prev = unless_fresh(p_reset, row, exists, h)
        row += move
        x = tl.load(p_gx + row[:, None] * H + o_h[None, :], m & (T > s + 1), other=0.0)  # of the next step, early
        a = tl.dot(h_prev.to(w.dtype), w, a, input_precision=PRECISION)
        h_next = activate(a, RELU)
        store_as(p_y + at, tl.where(exists[:, None], h_next, 0.0), m)
        h = tl.where(exists[:, None], h_next, h)
    store_as(p_hn + at_state, h, m)


@triton.jit(do_not_specialize=["T", "B"])
def tiled_forward_kernel(
    p_gx, p_h0, p_w, p_b, p_lengths, p_reset, p_y, p_hn, p_ring, p_turn, T, B, H: tl.constexpr, RELU: tl.constexpr,
    REVERSE: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; W_hh comes from the second-level cache.
    Moves: gx in, y out, W_hh once, h through `ring` (2, B, H), where steps take turns. Syncs: the group once a step.
    Limits: a group of more than one program needs a cooperative launch.
    """
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    m_b, n_first, turn = o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    row_b, length = o_b.to(tl.int64), load_lengths(p_lengths, o_b, m_b, T)
    copy_tiles(p_h0, p_ring, row_b, m_b, n_first, H, PROGRAMS, BN)
    meet(turn, PROGRAMS, PROGRAMS)
    row, move, half = first_row(o_b, T, B, REVERSE), (-B if REVERSE else B), B.to(tl.int64) * H
    for s in range(T):
        exists = step_index(s, T, REVERSE) < length
        m_from, p_old, p_new = starting_mask(p_reset, row, exists), p_ring + s % 2 * half, p_ring + (s + 1) % 2 * half
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m_n = o_n < H
            m = m_b[:, None] & m_n[None, :]
            a = load_float(p_gx + row[:, None] * H + o_n[None, :], m) + load_bias(p_b, o_n, m_n)
            a = add_product(a, p_old, row_b * H, m_from, H, p_w, o_n, H, 1, H, BK, PRECISION)
            finish_state(p_y, p_old, p_new, row, row_b, o_n, m, exists, activate(a, RELU), H)
        row += move
        meet(turn, PROGRAMS * (s + 2), PROGRAMS)
    copy_tiles(p_ring + T % 2 * half, p_hn, row_b, m_b, n_first, H, PROGRAMS, BN)


@triton.jit(do_not_specialize=["B"])
def step_kernel(
    p_x, p_ids, p_h0, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_lengths, p_reset, p_y, p_hn, B, I, H: tl.constexpr,
    RELU: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step: both products and the nonlinearity. With ids, x is a table of inputs; without W_ih, of their products.

    Owns: h' of BN units of BB sequences. Keeps: their sums. Moves: x, h and the units' rows of both weights in, y and
    h' out. Syncs: none. Limits: none.
    """
    o_b, o_n = tl.program_id(1) * BB + tl.arange(0, BB), tl.program_id(0) * BN + tl.arange(0, BN)
    m_b, m_n, row = o_b < B, o_n < H, o_b.to(tl.int64)
    exists = load_lengths(p_lengths, o_b, m_b, 1) > 0
    m, at = m_b[:, None] & m_n[None, :], row[:, None] * H + o_n[None, :]
    a = tl.zeros((BB, BN), tl.float32) + load_bias(p_b_ih, o_n, m_n) + load_bias(p_b_hh, o_n, m_n)
    row_x = input_rows(p_ids, row, m_b)
    if p_w_ih is None:
        a += load_float(p_x + row_x[:, None] * H + o_n[None, :], m)
    else:
        a = add_product(a, p_x, row_x * I, m_b, I, p_w_ih, o_n, H, 1, I, BK, PRECISION)
    m_from = starting_mask(p_reset, row, exists)
    a = add_product(a, p_h0, row * H, m_from, H, p_w_hh, o_n, H, 1, H, BK, PRECISION)
    h_next = activate(a, RELU)
    store_as(p_y + at, tl.where(exists[:, None], h_next, 0.0), m)
    store_as(p_hn + at, tl.where(exists[:, None], h_next, load_float(p_h0 + at, m)), m)


@triton.jit(do_not_specialize=["T", "B"])
def resident_backward_kernel(
    p_dy, p_dhn, p_w, p_lengths, p_reset, p_y, p_dgx, p_dh0, T, B, H: tl.constexpr, RELU: tl.constexpr,
    REVERSE: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch.

    Owns: dgx and dh0 of BB sequences. Keeps: W_hh and dh on chip. Moves: dy and y in, dgx out. Syncs: none but
    those of the product. Limits: as forward.
    """
    o_b = tl.program_id(0) * BB + tl.arange(0, BB)
    o_h, m_b = tl.arange(0, BH), o_b < B
    m = m_b[:, None] & (o_h < H)[None, :]
    w = load_weight(p_w, o_h, o_h, H, H, H, 1)
    at_state = o_b.to(tl.int64)[:, None] * H + o_h[None, :]
    dh, length = load_float(p_dhn + at_state, m), load_lengths(p_lengths, o_b, m_b, T)
    row, move = first_row(o_b, T, B, not REVERSE), (B if REVERSE else -B)
    at = row[:, None] * H + o_h[None, :]
    dy, y = tl.load(p_dy + at, m, other=0.0), tl.load(p_y + at, m, other=0.0)
    for s in range(T):
        exists, at = step_index(s, T, not REVERSE) < length, row[:, None] * H + o_h[None, :]
        da = tl.where(exists[:, None], (dh + dy.to(tl.float32)) * slope(y.to(tl.float32), RELU), 0.0)
        row_next = row + move
        at_next, m_next = row_next[:, None] * H + o_h[None, :], m & (T > s + 1)
        dy, y = tl.load(p_dy + at_next, m_next, other=0.0), tl.load(p_y + at_next, m_next, other=0.0)
        store_as(p_dgx + at, da, m)
        back = tl.dot(da.to(w.dtype), w, input_precision=PRECISION)
        dh = tl.where(exists[:, None], unless_fresh(p_reset, row, exists, back), dh)
        row = row_next
    store_as(p_dh0 + at_state, dh, m)


@triton.jit(do_not_specialize=["T", "B"])
def tiled_backward_kernel(
    p_dy, p_dhn, p_w, p_lengths, p_reset, p_y, p_dgx, p_dh0, p_dh, p_turn, T, B, H: tl.constexpr, RELU: tl.constexpr,
    REVERSE: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; dh (B, H) lies in float32 scratch. Moves:
    dy and y in, dgx out and in, W_hh once. Syncs: the group once a step. Limits: as forward.
    """
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    m_b, n_first, turn = o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    row_b, length = o_b.to(tl.int64), load_lengths(p_lengths, o_b, m_b, T)
    copy_tiles(p_dhn, p_dh, row_b, m_b, n_first, H, PROGRAMS, BN)
    tl.debug_barrier()
    row, move = first_row(o_b, T, B, not REVERSE), (B if REVERSE else -B)
    for s in range(T):
        exists = step_index(s, T, not REVERSE) < length
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m, at = m_b[:, None] & (o_n < H)[None, :], row[:, None] * H + o_n[None, :]
            dh = load_float(p_dh + row_b[:, None] * H + o_n[None, :], m) + load_float(p_dy + at, m)
            da = dh * slope(load_float(p_y + at, m), RELU)
            store_as(p_dgx + at, tl.where(exists[:, None], da, 0.0), m)
        meet(turn, PROGRAMS * (s + 1), PROGRAMS)
        add_back(p_dgx, p_dh, p_w, p_reset, row, row_b, m_b, exists, n_first, H, H, False, PROGRAMS, BN, BK,
                 PRECISION)  # fmt: skip
        row += move
    copy_tiles(p_dh, p_dh0, row_b, m_b, n_first, H, PROGRAMS, BN)


def rnn_forward(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    lengths: Tensor | None, reset: Tensor | None, reverse: bool, nonlinearity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.rnn_forward`."""
    time, batch, inputs, hidden = check_shapes("rnn", locals())
    y, hn = x.new_empty(time, batch, hidden), torch.empty_like(h0, memory_format=torch.contiguous_format)
    if time == 0:
        return y, hn.copy_(h0)
    h0, w_hh, b_hh, lengths, reset = contiguous(h0, w_hh, b_hh, lengths, flag(reset))
    sizes = dict(H=hidden, RELU=nonlinearity == "relu", PRECISION=precision(x))
    if time == 1:
        x, w_ih, b_ih = contiguous(x, w_ih, b_ih)
        plan = tuning.step("rnn", hidden, batch, x.dtype)
        run(step_kernel, plan, x, None, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, y, hn, batch, inputs, **sizes)
        return y, hn
    gx, sizes["REVERSE"] = linear(x, w_ih, b_ih).contiguous(), reverse
    plan = tuning.sequence("rnn", "forward", hidden, batch, x.dtype, processors(x))
    args = (gx, h0, w_hh, b_hh, lengths, reset, y, hn)
    if plan.resident:
        run(resident_forward_kernel, plan, *args, time, batch, **sizes)
    else:
        ring = x.new_empty(2, batch, hidden)
        run(tiled_forward_kernel, plan, *args, ring, plan.turns(x), time, batch, **sizes)
    return y, hn


def rnn_backward(
    dy: Tensor, dhn: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, nonlinearity: str, y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.rnn_backward`."""
    time, batch, _, hidden = check_shapes("rnn", locals())
    dgx, dh0 = torch.empty_like(y, memory_format=torch.contiguous_format), torch.empty_like(h0)
    dy, dhn, w, length, fresh, y = contiguous(dy, dhn, w_hh, lengths, flag(reset), y)
    sizes = dict(H=hidden, RELU=nonlinearity == "relu", REVERSE=reverse, PRECISION=precision(x))
    plan = tuning.sequence("rnn", "backward", hidden, batch, x.dtype, processors(x))
    args = (dy, dhn, w, length, fresh, y, dgx, dh0)
    if time == 0:
        dh0.copy_(dhn)
    elif plan.resident:
        run(resident_backward_kernel, plan, *args, time, batch, **sizes)
    else:
        scratch = torch.empty(batch, hidden, device=x.device, dtype=torch.float32)
        run(tiled_backward_kernel, plan, *args, scratch, plan.turns(x), time, batch, **sizes)
    db = x.new_empty(0) if b_ih is None and b_hh is None else dgx.sum((0, 1))
    dw_hh = weight_gradient(dgx, previous(y, h0, lengths, reset, reverse))
    return dgx @ w_ih, dh0, weight_gradient(dgx, x, lengths), dw_hh, db


def variants() -> list[Variant]:
    """The kernels with the arguments that they are launched with, for a check that they compile."""
    kernels = dict(
        resident_forward=resident_forward_kernel, tiled_forward=tiled_forward_kernel, step=step_kernel,
        resident_backward=resident_backward_kernel, tiled_backward=tiled_backward_kernel,
    )  # fmt: skip
    return variants_of("rnn", kernels, RELU=False)

"""The Elman network in Triton: forward and backward of one layer in one direction, and a single step.

Interfaces and equations as in `fastrnn.reference`. The input's part of the pre-activations comes from one product of
matrices before the loop, the gradients of weights and input from products after it; the loop is one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .cell_math import (
    add_back,
    add_product,
    at_step,
    copy_tiles,
    finish_state,
    has_step,
    in_memory,
    input_rows,
    inside,
    load_bias,
    load_float,
    load_fresh,
    load_lengths,
    load_weight,
    meet,
    next_row,
    place_of,
    span_of,
    store_as,
    tanh,
    tile_of,
    unless,
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


@triton.jit(**launch.SEQUENCE)
def resident_forward_kernel(
    p_gx, p_h0, p_w, p_lengths, p_offsets, p_reset, p_y, p_hn, T, B, H: tl.constexpr, RELU: tl.constexpr,
    DIRECTION: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch.

    Owns: all results of BB sequences. Keeps: W_hh and h on chip. Moves: gx in and y out. Syncs: none but those of
    the product. Limits: H <= BH, and W_hh must fit into one multiprocessor.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(0), B, BB, DIRECTION)
    o_b, o_h, p_w = tl.arange(0, BB), tl.arange(0, BH), p_w + d * H * H
    m_b = local_b + o_b < B
    m, length = m_b[:, None] & (o_h < H)[None, :], load_lengths(p_lengths, local_b, o_b, m_b, T)
    w, h = load_weight(p_w, o_h, o_h, H, H, 1, H), load_float(tile_of(p_h0, first_b, o_b, o_h, H), m)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, reverse)
    exists, there = at_step(p_offsets, p_lengths, length, m_b, m, 0, steps, reverse)
    h = unless(load_fresh(p_reset, row, o_b, exists), h)
    x = tl.load(tile_of(p_gx, row, o_b, o_h, H), there, other=0.0)
    for s in range(steps):
        exists, there = at_step(p_offsets, p_lengths, length, m_b, m, s, steps, reverse)
        a = x.to(tl.float32)
        # Of the next step, early.
        row_next = next_row(p_offsets, row, base, s + 1, steps, B, reverse)
        follows, m_next = at_step(p_offsets, p_lengths, length, m_b, m, s + 1, steps, reverse)
        fresh = load_fresh(p_reset, row_next, o_b, follows)
        x = tl.load(tile_of(p_gx, row_next, o_b, o_h, H), m_next, other=0.0)
        a = tl.dot(h.to(w.dtype), w, a, input_precision=PRECISION)
        h_next = activate(a, RELU)
        store_as(tile_of(p_y, row, o_b, o_h, H), tl.where(exists[:, None], h_next, 0.0), there)
        h = unless(fresh, tl.where(exists[:, None], h_next, h))
        row = row_next
    store_as(tile_of(p_hn, first_b, o_b, o_h, H), h, m)


@triton.jit(**launch.SEQUENCE)
def tiled_forward_kernel(
    p_gx, p_h0, p_w, p_lengths, p_offsets, p_reset, p_y, p_hn, p_ring, p_turn, T, B, H: tl.constexpr,
    RELU: tl.constexpr, DIRECTION: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; W_hh comes from the second-level cache.
    Moves: gx in, y out, W_hh once, h through `ring` (2, B, H), where steps take turns. Syncs: the group once a step.
    Limits: a group of more than one program needs a cooperative launch.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(1), B, BB, DIRECTION)
    o_b, p_w = tl.arange(0, BB), p_w + d * H * H
    m_b, n_first, turn = local_b + o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    copy_tiles(p_h0, p_ring, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    meet(turn, PROGRAMS, PROGRAMS)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, reverse)
    half = (2 if DIRECTION == "both" else 1) * B.to(tl.int64) * H
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, reverse)
        m_from = exists & ~load_fresh(p_reset, row, o_b, exists)
        p_old, p_new = p_ring + s % 2 * half, p_ring + (s + 1) % 2 * half
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m = m_b[:, None] & (o_n < H)[None, :]
            a = load_float(tile_of(p_gx, row, o_b, o_n, H), inside(p_offsets, m, exists))
            a = add_product(a, p_old + first_b * H, o_b * H, m_from, H, p_w, o_n, H, 1, H, BK, PRECISION)
            finish_state(p_offsets, p_y, p_old, p_new, row, first_b, o_b, o_n, m, exists, activate(a, RELU), H)
        row = next_row(p_offsets, row, base, s + 1, steps, B, reverse)
        meet(turn, PROGRAMS * (s + 2), PROGRAMS)
    copy_tiles(p_ring + steps % 2 * half, p_hn, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)


@triton.jit(do_not_specialize=["B"])
def step_kernel(
    p_x, p_ids, p_h0, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_lengths, p_reset, p_y, p_hn, B, I, H: tl.constexpr,
    RELU: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step: both products and the nonlinearity. With ids, x is a table of inputs; without W_ih, of their products.

    Owns: h' of BN units of BB sequences. Keeps: their sums. Moves: x, h and the units' rows of both weights in, y and
    h' out. Syncs: none. Limits: none.
    """
    first_b, o_b = tl.program_id(1).to(tl.int64) * BB, tl.arange(0, BB)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_b, m_n = first_b + o_b < B, o_n < H
    exists = load_lengths(p_lengths, first_b, o_b, m_b, 1) > 0
    m, m_from = m_b[:, None] & m_n[None, :], exists & ~load_fresh(p_reset, first_b, o_b, exists)
    a = tl.zeros((BB, BN), tl.float32) + load_bias(p_b_ih, o_n, m_n) + load_bias(p_b_hh, o_n, m_n)
    row_x = input_rows(p_ids, first_b, o_b, m_b)
    if p_w_ih is None:
        a += load_float(tile_of(p_x, 0, row_x, o_n, H), m)
    else:
        a = add_product(a, p_x, row_x * I, m_b, I, p_w_ih, o_n, H, 1, I, BK, PRECISION)
    a = add_product(a, p_h0 + first_b * H, o_b * H, m_from, H, p_w_hh, o_n, H, 1, H, BK, PRECISION)
    h_next, old = activate(a, RELU), load_float(tile_of(p_h0, first_b, o_b, o_n, H), m)
    store_as(tile_of(p_y, first_b, o_b, o_n, H), tl.where(exists[:, None], h_next, 0.0), m)
    store_as(tile_of(p_hn, first_b, o_b, o_n, H), tl.where(exists[:, None], h_next, old), m)


@triton.jit(**launch.SEQUENCE)
def resident_backward_kernel(
    p_dy, p_dhn, p_w, p_lengths, p_offsets, p_reset, p_y, p_dgx, p_dh0, T, B, H: tl.constexpr, RELU: tl.constexpr,
    DIRECTION: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch.

    Owns: dgx and dh0 of BB sequences. Keeps: W_hh and dh on chip. Moves: dy and y in, dgx out. Syncs: none but
    those of the product. Limits: as forward.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(0), B, BB, DIRECTION)
    o_b, o_h, p_w = tl.arange(0, BB), tl.arange(0, BH), p_w + d * H * H
    m_b = local_b + o_b < B
    m = m_b[:, None] & (o_h < H)[None, :]
    w, dh = load_weight(p_w, o_h, o_h, H, H, H, 1), load_float(tile_of(p_dhn, first_b, o_b, o_h, H), m)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    against = reverse == 0
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, against)
    follows, there = in_memory(p_offsets, p_lengths, length, m_b, m, 0, steps, against)
    fresh_next = load_fresh(p_reset, row, o_b, follows)
    dy = tl.load(tile_of(p_dy, row, o_b, o_h, H), there, other=0.0)
    y = tl.load(tile_of(p_y, row, o_b, o_h, H), there, other=0.0)
    for s in range(steps):
        exists, there = at_step(p_offsets, p_lengths, length, m_b, m, s, steps, against)
        fresh = fresh_next
        da = tl.where(exists[:, None], (dh + dy.to(tl.float32)) * slope(y.to(tl.float32), RELU), 0.0)
        row_next = next_row(p_offsets, row, base, s + 1, steps, B, against)
        follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, s + 1, steps, against)
        fresh_next = load_fresh(p_reset, row_next, o_b, follows)  # of the next step, early
        dy = tl.load(tile_of(p_dy, row_next, o_b, o_h, H), m_next, other=0.0)
        y = tl.load(tile_of(p_y, row_next, o_b, o_h, H), m_next, other=0.0)
        store_as(tile_of(p_dgx, row, o_b, o_h, H), da, there)
        back = tl.dot(unless(fresh, da).to(w.dtype), w, input_precision=PRECISION)
        dh = tl.where(exists[:, None], back, dh)
        row = row_next
    store_as(tile_of(p_dh0, first_b, o_b, o_h, H), dh, m)


@triton.jit(**launch.SEQUENCE)
def tiled_backward_kernel(
    p_dy, p_dhn, p_w, p_lengths, p_offsets, p_reset, p_y, p_dgx, p_dh0, p_dh, p_turn, T, B, H: tl.constexpr,
    RELU: tl.constexpr, DIRECTION: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; dh (B, H) lies in float32 scratch. Moves:
    dy and y in, dgx out and in, W_hh once. Syncs: the group once a step. Limits: as forward.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(1), B, BB, DIRECTION)
    o_b, p_w = tl.arange(0, BB), p_w + d * H * H
    m_b, n_first, turn = local_b + o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    copy_tiles(p_dhn, p_dh, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    tl.debug_barrier()
    against = reverse == 0
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, against)
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, against)
        fresh = load_fresh(p_reset, row, o_b, exists)
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m = m_b[:, None] & (o_n < H)[None, :]
            dh, there = load_float(tile_of(p_dh, first_b, o_b, o_n, H), m), inside(p_offsets, m, exists)
            dh += load_float(tile_of(p_dy, row, o_b, o_n, H), there)
            da = dh * slope(load_float(tile_of(p_y, row, o_b, o_n, H), there), RELU)
            store_as(tile_of(p_dgx, row, o_b, o_n, H), tl.where(exists[:, None], da, 0.0), there)
        meet(turn, PROGRAMS * (s + 1), PROGRAMS)
        add_back(p_dgx, p_dh, p_w, row, first_b, o_b, exists, fresh, n_first, H, H, False, PROGRAMS, BN, BK,
                 PRECISION)  # fmt: skip
        row = next_row(p_offsets, row, base, s + 1, steps, B, against)
    copy_tiles(p_dh, p_dh0, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)


def rnn_forward(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    lengths: Tensor | None, reset: Tensor | None, reverse: bool, nonlinearity: str, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.rnn_forward`."""
    time, batch, inputs, hidden = launch.check_shapes("rnn", locals())
    ways, (hn,) = h0.shape[:-2], launch.like(h0)
    y = x.new_empty(*ways, *x.shape[:2], hidden)
    if time == 0:
        return y, hn.copy_(h0)
    h0, w_hh, lengths, offsets, reset = launch.contiguous(h0, w_hh, lengths, offsets, launch.flag(reset))
    sizes = dict(H=hidden, RELU=nonlinearity == "relu", PRECISION=launch.precision(x))
    if time == 1 and not ways:
        x, w_ih, *biases = launch.contiguous(x, w_ih, b_ih, b_hh)
        plan = tuning.step("rnn", hidden, batch, x.dtype)
        launch.run(step_kernel, plan, x, None, h0, w_ih, w_hh, *biases, lengths, reset, y, hn, batch, inputs, **sizes)
        return y, hn
    gx, sizes["DIRECTION"] = launch.input_part(x, w_ih, launch.added(b_ih, b_hh)), launch.direction_of(h0, reverse)
    plan = launch.sequence_plan("rnn", "forward", x, h0, hidden)
    args = (gx, h0, w_hh, lengths, offsets, reset, y, hn)
    if plan.resident:
        launch.run(resident_forward_kernel, plan, *args, time, batch, **sizes)
    else:
        ring = x.new_empty(2, *h0.shape)
        launch.run(tiled_forward_kernel, plan, *args, ring, plan.turns(x), time, batch, **sizes)
    return y, hn


def rnn_backward(
    dy: Tensor, dhn: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, nonlinearity: str, y: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.rnn_backward`."""
    time, batch, _, hidden = launch.check_shapes("rnn", locals())
    ways, (dgx, dh0) = h0.shape[:-2], launch.like(y, h0)
    dy, dhn, w, length, place, y = launch.contiguous(dy, dhn, w_hh, lengths, offsets, y)
    sizes = dict(H=hidden, RELU=nonlinearity == "relu", PRECISION=launch.precision(x))
    sizes["DIRECTION"] = launch.direction_of(h0, reverse)
    plan = launch.sequence_plan("rnn", "backward", x, h0, hidden)
    args = (dy, dhn, w, length, place, launch.flag(reset), y, dgx, dh0)
    if time == 0:
        dh0.copy_(dhn)
    elif plan.resident:
        launch.run(resident_backward_kernel, plan, *args, time, batch, **sizes)
    else:
        scratch = launch.floats(x, *h0.shape)
        launch.run(tiled_backward_kernel, plan, *args, scratch, plan.turns(x), time, batch, **sizes)
    db = x.new_empty(*ways, 0) if b_ih is None and b_hh is None else dgx.sum((-3, -2))
    dw_hh = launch.weight_gradient(dgx, launch.previous(y, h0, lengths, reset, reverse, offsets))
    dx, dw_ih = launch.input_gradient(x, (dgx, w_ih)), launch.weight_gradient(dgx, x, lengths, offsets)
    return dx, dh0, dw_ih, dw_hh, db


rnn_both_forward, rnn_both_backward = launch.both(rnn_forward), launch.both(rnn_backward)
rnn_packed_forward, rnn_packed_backward = launch.packed(rnn_forward), launch.packed(rnn_backward)

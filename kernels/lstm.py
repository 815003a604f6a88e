"""The LSTM in Triton: forward and backward of one layer in one direction, and a single step.

Interfaces and equations as in `fastrnn.reference`. The input's part of the pre-activations comes from one product of
matrices before the loop, the gradients of weights and input from products after it; the loop is one launch. With
a projection h is P wide and is made from m = o * tanh(c) in a second product of each step; without, P = H and h = m.
"""

from __future__ import annotations

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
    is_first,
    load_bias,
    load_float,
    load_gates,
    load_lengths,
    load_previous,
    load_shared,
    load_weight,
    meet,
    sigmoid,
    starting_mask,
    step_index,
    store_as,
    store_gates,
    tanh,
    unless_fresh,
)
from .launch import (
    Variant,
    check_shapes,
    contiguous,
    flag,
    floats,
    like,
    precision,
    previous,
    processors,
    run,
    variants_of,
    weight_gradient,
)


@triton.jit
def cell(a_i, a_f, a_g, a_o, c):
    """Gates from their pre-activations, and the new states: i, f, g, o, c', m."""
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c_next = f * c + i * g
    return i, f, g, o, c_next, o * tanh(c_next)


@triton.jit
def cell_gradient(dm, dc, i, f, g, o, c_next, c):
    """The gradients of the four pre-activations and of c, from those of m and c'."""
    tanh_c = tanh(c_next)
    dc += dm * o * (1.0 - tanh_c * tanh_c)
    da_i, da_f = dc * g * i * (1.0 - i), dc * c * f * (1.0 - f)
    return da_i, da_f, dc * i * (1.0 - g * g), dm * tanh_c * o * (1.0 - o), dc * f


@triton.jit
def keep_step(p_gates, p_cells, row, o_n, m, exists, i, f, g, o, c, H: tl.constexpr):
    """What backward needs of a step, if it is wanted; zeros where a row has no such step."""
    if p_gates is not None:
        there = exists[:, None]
        i, f, g, o = tl.where(there, i, 0.0), tl.where(there, f, 0.0), tl.where(there, g, 0.0), tl.where(there, o, 0.0)
        store_gates(p_gates, row, o_n, m, i, f, g, o, H)
        store_as(p_cells + row[:, None] * H + o_n[None, :], tl.where(there, c, 0.0), m)


@triton.jit
def add_bias(p_b, o_n, m_n, a_i, a_f, a_g, a_o, H: tl.constexpr):
    """The pre-activations in float32 with a bias added."""
    b_i, b_f, b_g = load_bias(p_b, o_n, m_n), load_bias(p_b, H + o_n, m_n), load_bias(p_b, 2 * H + o_n, m_n)
    b_o = load_bias(p_b, 3 * H + o_n, m_n)
    return a_i.to(tl.float32) + b_i, a_f.to(tl.float32) + b_f, a_g.to(tl.float32) + b_g, a_o.to(tl.float32) + b_o


@triton.jit
def add_products(
    a_i, a_f, a_g, a_o, p_a, at, m_b, K, p_w, o_n, H: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """`cell_math.add_product` with the weights of four gates, for one pass over A."""
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        a = load_shared(p_a, at, o_k, m_b, K)
        a_i = tl.dot(a, load_weight(p_w, o_k, o_n, K, H, 1, K), a_i, input_precision=PRECISION)
        a_f = tl.dot(a, load_weight(p_w + H * K, o_k, o_n, K, H, 1, K), a_f, input_precision=PRECISION)
        a_g = tl.dot(a, load_weight(p_w + 2 * H * K, o_k, o_n, K, H, 1, K), a_g, input_precision=PRECISION)
        a_o = tl.dot(a, load_weight(p_w + 3 * H * K, o_k, o_n, K, H, 1, K), a_o, input_precision=PRECISION)
    return a_i, a_f, a_g, a_o


@triton.jit(do_not_specialize=["T", "B"])
def resident_forward_kernel(
    p_gx, p_h0, p_c0, p_w, p_b, p_lengths, p_reset, p_y, p_hn, p_cn, p_gates, p_cells, T, B, H: tl.constexpr,
    REVERSE: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch.

    Owns: all results of BB sequences. Keeps: W_hh, h and c on chip. Moves: gx in; y, gates and cells out. Syncs:
    none but those of the products. Limits: H <= BH, W_hh must fit into one multiprocessor; no projection.
    """
    o_b = tl.program_id(0) * BB + tl.arange(0, BB)
    o_h, m_b = tl.arange(0, BH), o_b < B
    m_h, m = o_h < H, m_b[:, None] & (o_h < H)[None, :]
    w_i, w_f = load_weight(p_w, o_h, o_h, H, H, 1, H), load_weight(p_w + H * H, o_h, o_h, H, H, 1, H)
    w_g, w_o = load_weight(p_w + 2 * H * H, o_h, o_h, H, H, 1, H), load_weight(p_w + 3 * H * H, o_h, o_h, H, H, 1, H)
    at_state = o_b.to(tl.int64)[:, None] * H + o_h[None, :]
    h, c = load_float(p_h0 + at_state, m), load_float(p_c0 + at_state, m)
    length = load_lengths(p_lengths, o_b, m_b, T)
    row, move = first_row(o_b, T, B, REVERSE), (-B if REVERSE else B)
    x_i, x_f, x_g, x_o = load_gates(p_gx, row, o_h, m, H)
    for s in range(T):
        exists = step_index(s, T, REVERSE) < length
        a_i, a_f, a_g, a_o = add_bias(p_b, o_h, m_h, x_i, x_f, x_g, x_o, H)
        x_i, x_f, x_g, x_o = load_gates(p_gx, row + move, o_h, m & (T > s + 1), H)  # of the next step, early
        from_h, from_c = unless_fresh(p_reset, row, exists, h).to(w_i.dtype), unless_fresh(p_reset, row, exists, c)
        a_i = tl.dot(from_h, w_i, a_i, input_precision=PRECISION)
        a_f = tl.dot(from_h, w_f, a_f, input_precision=PRECISION)
        a_g = tl.dot(from_h, w_g, a_g, input_precision=PRECISION)
        a_o = tl.dot(from_h, w_o, a_o, input_precision=PRECISION)
        i, f, g, o, c_next, h_next = cell(a_i, a_f, a_g, a_o, from_c)
        store_as(p_y + row[:, None] * H + o_h[None, :], tl.where(exists[:, None], h_next, 0.0), m)
        keep_step(p_gates, p_cells, row, o_h, m, exists, i, f, g, o, c_next, H)
        h, c = tl.where(exists[:, None], h_next, h), tl.where(exists[:, None], c_next, c)
        row += move
    store_as(p_hn + at_state, h, m)
    store_as(p_cn + at_state, c, m)


@triton.jit(do_not_specialize=["T", "B"])
def tiled_forward_kernel(
    p_gx, p_h0, p_c0, p_w, p_b, p_wr, p_lengths, p_reset, p_y, p_hn, p_cn, p_gates, p_cells, p_ring, p_c, p_m, p_turn,
    T, B, H: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; weights come from the second-level cache,
    c (B, H) lies in float32 scratch. Moves: gx in; y, gates and cells out; W_hh once; h through `ring` (2, B, P), where
    steps take turns, and with a projection m (B, H) through scratch. Syncs: the group once a step, twice with a
    projection. Limits: a group of more than one program needs a cooperative launch.
    """
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    m_b, n_first, turn, row_b = o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1), o_b.to(tl.int64)
    length, MEETINGS = load_lengths(p_lengths, o_b, m_b, T), 1 if p_wr is None else 2
    copy_tiles(p_h0, p_ring, row_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_c0, p_c, row_b, m_b, n_first, H, PROGRAMS, BN)
    meet(turn, PROGRAMS, PROGRAMS)
    row, move, half = first_row(o_b, T, B, REVERSE), (-B if REVERSE else B), B.to(tl.int64) * P
    for s in range(T):
        exists = step_index(s, T, REVERSE) < length
        m_from, p_old, p_new = starting_mask(p_reset, row, exists), p_ring + s % 2 * half, p_ring + (s + 1) % 2 * half
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m, at = m_b[:, None] & (o_n < H)[None, :], row_b[:, None] * H + o_n[None, :]
            a_i, a_f, a_g, a_o = load_gates(p_gx, row, o_n, m, H)
            c = load_float(p_c + at, m)
            a_i, a_f, a_g, a_o = add_bias(p_b, o_n, o_n < H, a_i, a_f, a_g, a_o, H)
            a_i, a_f, a_g, a_o = add_products(
                a_i, a_f, a_g, a_o, p_old, row_b * P, m_from, P, p_w, o_n, H, BK, PRECISION
            )
            i, f, g, o, c_next, m_next = cell(a_i, a_f, a_g, a_o, tl.where(m_from[:, None], c, 0.0))
            keep_step(p_gates, p_cells, row, o_n, m, exists, i, f, g, o, c_next, H)
            tl.store(p_c + at, c_next, m & exists[:, None])
            if p_wr is None:
                finish_state(p_y, p_old, p_new, row, row_b, o_n, m, exists, m_next, P)
            else:
                store_as(p_m + at, m_next, m)
        meet(turn, PROGRAMS * (MEETINGS * s + 2), PROGRAMS)
        if p_wr is not None:
            for n in range(n_first, P, PROGRAMS * BN):
                o_n = n + tl.arange(0, BN)
                h_next = tl.zeros((BB, BN), tl.float32)
                h_next = add_product(h_next, p_m, row_b * H, exists, H, p_wr, o_n, P, 1, H, BK, PRECISION)
                m = m_b[:, None] & (o_n < P)[None, :]
                finish_state(p_y, p_old, p_new, row, row_b, o_n, m, exists, h_next, P)
            meet(turn, PROGRAMS * (2 * s + 3), PROGRAMS)
        row += move
    copy_tiles(p_ring + T % 2 * half, p_hn, row_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_c, p_cn, row_b, m_b, n_first, H, PROGRAMS, BN)


@triton.jit(do_not_specialize=["B"])
def step_kernel(
    p_x, p_ids, p_h0, p_c0, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_lengths, p_reset, p_y, p_hn, p_cn, p_gates, p_cells, B,
    I, H: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step: both products and the gates. With ids, x is a table of inputs; without W_ih, of their products with it.

    Owns: h' and c' of BN units of BB sequences. Keeps: the sums of their gates. Moves: x, h, c and the units' rows of
    both weights in; y, h', c', gates and cells out. Syncs: none. Limits: no projection.
    """
    o_b, o_n = tl.program_id(1) * BB + tl.arange(0, BB), tl.program_id(0) * BN + tl.arange(0, BN)
    m_b, m_n, row = o_b < B, o_n < H, o_b.to(tl.int64)
    exists = load_lengths(p_lengths, o_b, m_b, 1) > 0
    m, at, m_from = m_b[:, None] & m_n[None, :], row[:, None] * H + o_n[None, :], starting_mask(p_reset, row, exists)
    zero = tl.zeros((BB, BN), tl.float32)
    a_i, a_f, a_g, a_o = add_bias(p_b_ih, o_n, m_n, zero, zero, zero, zero, H)
    a_i, a_f, a_g, a_o = add_bias(p_b_hh, o_n, m_n, a_i, a_f, a_g, a_o, H)
    row_x = input_rows(p_ids, row, m_b)
    if p_w_ih is None:
        x_i, x_f, x_g, x_o = load_gates(p_x, row_x, o_n, m, H)
        a_i, a_f, a_g, a_o = a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o
    else:
        a_i, a_f, a_g, a_o = add_products(a_i, a_f, a_g, a_o, p_x, row_x * I, m_b, I, p_w_ih, o_n, H, BK, PRECISION)
    a_i, a_f, a_g, a_o = add_products(a_i, a_f, a_g, a_o, p_h0, row * H, m_from, H, p_w_hh, o_n, H, BK, PRECISION)
    c = load_float(p_c0 + at, m)
    i, f, g, o, c_next, h_next = cell(a_i, a_f, a_g, a_o, tl.where(m_from[:, None], c, 0.0))
    keep_step(p_gates, p_cells, row, o_n, m, exists, i, f, g, o, c_next, H)
    store_as(p_y + at, tl.where(exists[:, None], h_next, 0.0), m)
    store_as(p_hn + at, tl.where(exists[:, None], h_next, load_float(p_h0 + at, m)), m)
    store_as(p_cn + at, tl.where(exists[:, None], c_next, c), m)


@triton.jit(do_not_specialize=["T", "B"])
def resident_backward_kernel(
    p_dy, p_dhn, p_dcn, p_c0, p_w, p_lengths, p_reset, p_gates, p_cells, p_dgx, p_dh0, p_dc0, T, B, H: tl.constexpr,
    REVERSE: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch.

    Owns: dgx, dh0 and dc0 of BB sequences. Keeps: W_hh, dh, dc and c on chip. Moves: dy, gates and cells in, dgx
    out. Syncs: none but those of the products. Limits: as forward.
    """
    o_b = tl.program_id(0) * BB + tl.arange(0, BB)
    o_h, m_b = tl.arange(0, BH), o_b < B
    m = m_b[:, None] & (o_h < H)[None, :]
    w_i, w_f = load_weight(p_w, o_h, o_h, H, H, H, 1), load_weight(p_w + H * H, o_h, o_h, H, H, H, 1)
    w_g, w_o = load_weight(p_w + 2 * H * H, o_h, o_h, H, H, H, 1), load_weight(p_w + 3 * H * H, o_h, o_h, H, H, H, 1)
    at_state = o_b.to(tl.int64)[:, None] * H + o_h[None, :]
    dh, dc, c0 = load_float(p_dhn + at_state, m), load_float(p_dcn + at_state, m), load_float(p_c0 + at_state, m)
    length = load_lengths(p_lengths, o_b, m_b, T)
    row, move = first_row(o_b, T, B, not REVERSE), (B if REVERSE else -B)
    i, f, g, o = load_gates(p_gates, row, o_h, m, H)
    dy = tl.load(p_dy + row[:, None] * H + o_h[None, :], m, other=0.0)
    c = tl.load(p_cells + row[:, None] * H + o_h[None, :], m, other=0.0)
    before = tl.load(p_cells + (row + move)[:, None] * H + o_h[None, :], m & (T > 1), other=0.0)
    for s in range(T):
        t = step_index(s, T, not REVERSE)
        exists, first = t < length, is_first(t, length, REVERSE)
        c_prev = unless_fresh(p_reset, row, exists, tl.where(first[:, None], c0, before.to(tl.float32)))
        dh_t = tl.where(exists[:, None], dh + dy.to(tl.float32), 0.0)
        da_i, da_f, da_g, da_o, dc_prev = cell_gradient(
            dh_t, tl.where(exists[:, None], dc, 0.0), i.to(tl.float32), f.to(tl.float32), g.to(tl.float32),
            o.to(tl.float32), c.to(tl.float32), c_prev,
        )  # fmt: skip
        at_next = (row + move)[:, None] * H + o_h[None, :]  # of the next step, early
        i, f, g, o = load_gates(p_gates, row + move, o_h, m & (T > s + 1), H)
        dy, c = tl.load(p_dy + at_next, m & (T > s + 1), other=0.0), before
        before = tl.load(p_cells + at_next + move.to(tl.int64) * H, m & (T > s + 2), other=0.0)
        store_gates(p_dgx, row, o_h, m, da_i, da_f, da_g, da_o, H)
        back = tl.dot(da_i.to(w_i.dtype), w_i, input_precision=PRECISION)
        back = tl.dot(da_f.to(w_i.dtype), w_f, back, input_precision=PRECISION)
        back = tl.dot(da_g.to(w_i.dtype), w_g, back, input_precision=PRECISION)
        back = tl.dot(da_o.to(w_i.dtype), w_o, back, input_precision=PRECISION)
        dh = tl.where(exists[:, None], unless_fresh(p_reset, row, exists, back), dh)
        dc = tl.where(exists[:, None], unless_fresh(p_reset, row, exists, dc_prev), dc)
        row += move
    store_as(p_dh0 + at_state, dh, m)
    store_as(p_dc0 + at_state, dc, m)


@triton.jit(do_not_specialize=["T", "B"])
def tiled_backward_kernel(
    p_dy, p_dhn, p_dcn, p_c0, p_w, p_wr, p_lengths, p_reset, p_gates, p_cells, p_dgx, p_dhs, p_dh0, p_dc0, p_dh, p_dc,
    p_turn, T, B, H: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; dh (B, P) and dc (B, H) lie in float32
    scratch. Moves: dy, gates and cells in; dgx out and in; W_hh once; with a projection dhs, the gradient of every
    step's h, out and in. Syncs: the group once a step, twice with a projection. Limits: as forward.
    """
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    m_b, n_first, turn, row_b = o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1), o_b.to(tl.int64)
    length, MEETINGS = load_lengths(p_lengths, o_b, m_b, T), 1 if p_wr is None else 2
    copy_tiles(p_dhn, p_dh, row_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_dcn, p_dc, row_b, m_b, n_first, H, PROGRAMS, BN)
    tl.debug_barrier()
    row, move = first_row(o_b, T, B, not REVERSE), (B if REVERSE else -B)
    for s in range(T):
        t = step_index(s, T, not REVERSE)
        exists, first = t < length, is_first(t, length, REVERSE)
        if p_wr is not None:
            for n in range(n_first, P, PROGRAMS * BN):
                o_n = n + tl.arange(0, BN)
                m, at = m_b[:, None] & (o_n < P)[None, :], row[:, None] * P + o_n[None, :]
                dh = load_float(p_dh + row_b[:, None] * P + o_n[None, :], m) + load_float(p_dy + at, m)
                store_as(p_dhs + at, tl.where(exists[:, None], dh, 0.0), m)
            meet(turn, PROGRAMS * (2 * s + 1), PROGRAMS)
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m, at_dc = m_b[:, None] & (o_n < H)[None, :], row_b[:, None] * H + o_n[None, :]
            at = row[:, None] * H + o_n[None, :]
            i, f, g, o = load_gates(p_gates, row, o_n, m, H)
            c_prev = load_previous(p_cells, p_c0, row + move, o_b, o_n, first, exists, o_n < H, H)
            if p_wr is None:
                dm = load_float(p_dh + at_dc, m) + load_float(p_dy + at, m)
            else:
                dm = tl.zeros((BB, BN), tl.float32)
                dm = add_product(dm, p_dhs, row * P, exists, P, p_wr, o_n, H, H, 1, BK, PRECISION)
            da_i, da_f, da_g, da_o, dc_prev = cell_gradient(
                tl.where(exists[:, None], dm, 0.0), tl.where(exists[:, None], load_float(p_dc + at_dc, m), 0.0),
                i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), load_float(p_cells + at, m),
                unless_fresh(p_reset, row, exists, c_prev),
            )  # fmt: skip
            store_gates(p_dgx, row, o_n, m, da_i, da_f, da_g, da_o, H)
            tl.store(p_dc + at_dc, unless_fresh(p_reset, row, exists, dc_prev), m & exists[:, None])
        meet(turn, PROGRAMS * (MEETINGS * (s + 1)), PROGRAMS)
        add_back(p_dgx, p_dh, p_w, p_reset, row, row_b, m_b, exists, n_first, 4 * H, P, False, PROGRAMS, BN, BK,
                 PRECISION)  # fmt: skip
        row += move
    copy_tiles(p_dh, p_dh0, row_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_dc, p_dc0, row_b, m_b, n_first, H, PROGRAMS, BN)


def lstm_forward(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.lstm_forward`."""
    time, batch, inputs, hidden = check_shapes("lstm", locals())
    width, (hn, cn) = h0.shape[1], like(h0, c0)
    y, none = x.new_empty(time, batch, width), x.new_empty(0)
    gates = x.new_empty(time, batch, 4 * hidden) if save else None
    cells = x.new_empty(time, batch, hidden) if save else None
    h0, c0, w_hh, b_hh, w_hr, lengths, fresh = contiguous(h0, c0, w_hh, b_hh, w_hr, lengths, flag(reset))
    results, sizes = (y, hn, cn, gates, cells), dict(H=hidden, PRECISION=precision(x))
    if time == 0:
        hn.copy_(h0), cn.copy_(c0)
    elif time == 1 and w_hr is None:
        x, w_ih, b_ih = contiguous(x, w_ih, b_ih)
        plan, biases = tuning.step("lstm", hidden, batch, x.dtype), (b_ih, b_hh)
        run(step_kernel, plan, x, None, h0, c0, w_ih, w_hh, *biases, lengths, fresh, *results, batch, inputs, **sizes)
    else:
        gx, sizes["REVERSE"] = linear(x, w_ih, b_ih).contiguous(), reverse
        plan = tuning.sequence("lstm", "forward", hidden, batch, x.dtype, processors(x), w_hr is not None)
        if plan.resident:
            args = (gx, h0, c0, w_hh, b_hh, lengths, fresh, *results, time, batch)
            run(resident_forward_kernel, plan, *args, **sizes)
        else:
            ring, m = x.new_empty(2, batch, width), x.new_empty(0 if w_hr is None else batch, hidden)
            scratch = (ring, floats(x, batch, hidden), m, plan.turns(x))
            args = (gx, h0, c0, w_hh, b_hh, w_hr, lengths, fresh, *results, *scratch, time, batch)
            run(tiled_forward_kernel, plan, *args, P=width, **sizes)
    return y, hn, cn, none if gates is None else gates, none.clone() if cells is None else cells


def lstm_backward(
    dy: Tensor, dhn: Tensor, dcn: Tensor, x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None,
    reverse: bool, y: Tensor, gates: Tensor, cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.lstm_backward`."""
    time, batch, _, hidden = check_shapes("lstm", locals())
    width, (dgx, dh0, dc0) = h0.shape[1], like(gates, h0, c0)
    dhs = None if w_hr is None else x.new_empty(time, batch, width)
    dy, dhn, dcn, c0, gates, cells = contiguous(dy, dhn, dcn, c0, gates, cells)
    w, w_r, length, fresh = contiguous(w_hh, w_hr, lengths, flag(reset))
    plan = tuning.sequence("lstm", "backward", hidden, batch, x.dtype, processors(x), w_hr is not None)
    sizes = dict(H=hidden, REVERSE=reverse, PRECISION=precision(x))
    if time == 0:
        dh0.copy_(dhn), dc0.copy_(dcn)
    elif plan.resident:
        args = (dy, dhn, dcn, c0, w, length, fresh, gates, cells, dgx, dh0, dc0, time, batch)
        run(resident_backward_kernel, plan, *args, **sizes)
    else:
        scratch = (floats(x, batch, width), floats(x, batch, hidden), plan.turns(x))
        args = (dy, dhn, dcn, c0, w, w_r, length, fresh, gates, cells, dgx, dhs, dh0, dc0, *scratch, time, batch)
        run(tiled_backward_kernel, plan, *args, P=width, **sizes)
    dw_hh = weight_gradient(dgx, previous(y, h0, lengths, reset, reverse))
    db = x.new_empty(0) if b_ih is None and b_hh is None else dgx.sum((0, 1))
    dw_hr = x.new_empty(0) if w_hr is None else weight_gradient(dhs, gates[..., 3 * hidden :] * cells.tanh())
    return dgx @ w_ih, dh0, dc0, weight_gradient(dgx, x, lengths), dw_hh, db, dw_hr


def variants() -> list[Variant]:
    """The kernels with the arguments that they are launched with, for a check that they compile."""
    kernels = dict(
        resident_forward=resident_forward_kernel, tiled_forward=tiled_forward_kernel, step=step_kernel,
        resident_backward=resident_backward_kernel, tiled_backward=tiled_backward_kernel,
    )  # fmt: skip
    return variants_of("lstm", kernels)

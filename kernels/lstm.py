"""The LSTM in Triton: forward and backward of one layer in one direction, and a single step.

Interfaces and equations as in `fastrnn.reference`. The input's part of the pre-activations comes from one product of
matrices before the loop, the gradients of weights and input from products after it; the loop is one launch. With
a projection h is P wide and is made from m = o * tanh(c) in a second product of each step; without, P = H and h = m.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .cell_math import (
    add_back,
    add_four_products,
    add_product,
    at_step,
    copy_tiles,
    finish_state,
    has_step,
    in_memory,
    input_rows,
    inside,
    is_first,
    load_bias,
    load_float,
    load_fresh,
    load_gates,
    load_lengths,
    load_previous,
    load_weight,
    meet,
    next_row,
    place_of,
    sigmoid,
    span_of,
    step_index,
    store_as,
    store_gates,
    tanh,
    tile_of,
    unless,
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
def keep_step(p_gates, p_cells, row, o_b, o_n, m, exists, i, f, g, o, c, H: tl.constexpr):
    """What backward needs of a step, if it is wanted; zeros where a row has no such step."""
    if p_gates is not None:
        there = exists[:, None]
        i, f, g, o = tl.where(there, i, 0.0), tl.where(there, f, 0.0), tl.where(there, g, 0.0), tl.where(there, o, 0.0)
        store_gates(tile_of(p_gates, row, o_b, o_n, 4 * H), m, i, f, g, o, H)
        store_as(tile_of(p_cells, row, o_b, o_n, H), tl.where(there, c, 0.0), m)


@triton.jit
def add_bias(p_b, o_n, m_n, a_i, a_f, a_g, a_o, H: tl.constexpr):
    """The pre-activations with a bias added."""
    a_i, a_f = a_i + load_bias(p_b, o_n, m_n), a_f + load_bias(p_b, H + o_n, m_n)
    return a_i, a_f, a_g + load_bias(p_b, 2 * H + o_n, m_n), a_o + load_bias(p_b, 3 * H + o_n, m_n)


@triton.jit(**launch.SEQUENCE)
def resident_forward_kernel(
    p_gx, p_h0, p_c0, p_w, p_lengths, p_offsets, p_reset, p_y, p_hn, p_cn, p_gates, p_cells, T, B, H: tl.constexpr,
    DIRECTION: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch.

    Owns: all results of BB sequences. Keeps: W_hh, h and c on chip. Moves: gx in; y, gates and cells out. Syncs:
    none but those of the products. Limits: H <= BH, W_hh must fit into one multiprocessor; no projection.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(0), B, BB, DIRECTION)
    o_b, o_h, p_w = tl.arange(0, BB), tl.arange(0, BH), p_w + d * 4 * H * H
    m_b = local_b + o_b < B
    m = m_b[:, None] & (o_h < H)[None, :]
    w_i, w_f = load_weight(p_w, o_h, o_h, H, H, 1, H), load_weight(p_w + H * H, o_h, o_h, H, H, 1, H)
    w_g, w_o = load_weight(p_w + 2 * H * H, o_h, o_h, H, H, 1, H), load_weight(p_w + 3 * H * H, o_h, o_h, H, H, 1, H)
    h, c = load_float(tile_of(p_h0, first_b, o_b, o_h, H), m), load_float(tile_of(p_c0, first_b, o_b, o_h, H), m)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, reverse)
    exists, there = at_step(p_offsets, p_lengths, length, m_b, m, 0, steps, reverse)
    fresh = load_fresh(p_reset, row, o_b, exists)
    h, c = unless(fresh, h), unless(fresh, c)
    x_i, x_f, x_g, x_o = load_gates(tile_of(p_gx, row, o_b, o_h, 4 * H), there, H)
    for s in range(steps):
        exists, there = at_step(p_offsets, p_lengths, length, m_b, m, s, steps, reverse)
        a_i, a_f, a_g, a_o = x_i.to(tl.float32), x_f.to(tl.float32), x_g.to(tl.float32), x_o.to(tl.float32)
        # Of the next step, early.
        row_next = next_row(p_offsets, row, base, s + 1, steps, B, reverse)
        follows, m_next = at_step(p_offsets, p_lengths, length, m_b, m, s + 1, steps, reverse)
        fresh = load_fresh(p_reset, row_next, o_b, follows)
        x_i, x_f, x_g, x_o = load_gates(tile_of(p_gx, row_next, o_b, o_h, 4 * H), m_next, H)
        from_h = h.to(w_i.dtype)
        a_i = tl.dot(from_h, w_i, a_i, input_precision=PRECISION)
        a_f = tl.dot(from_h, w_f, a_f, input_precision=PRECISION)
        a_g = tl.dot(from_h, w_g, a_g, input_precision=PRECISION)
        a_o = tl.dot(from_h, w_o, a_o, input_precision=PRECISION)
        i, f, g, o, c_next, h_next = cell(a_i, a_f, a_g, a_o, c)
        store_as(tile_of(p_y, row, o_b, o_h, H), tl.where(exists[:, None], h_next, 0.0), there)
        keep_step(p_gates, p_cells, row, o_b, o_h, there, exists, i, f, g, o, c_next, H)
        h = unless(fresh, tl.where(exists[:, None], h_next, h))
        c = unless(fresh, tl.where(exists[:, None], c_next, c))
        row = row_next
    store_as(tile_of(p_hn, first_b, o_b, o_h, H), h, m)
    store_as(tile_of(p_cn, first_b, o_b, o_h, H), c, m)


@triton.jit(**launch.SEQUENCE)
def tiled_forward_kernel(
    p_gx, p_h0, p_c0, p_w, p_wr, p_lengths, p_offsets, p_reset, p_y, p_hn, p_cn, p_gates, p_cells, p_ring, p_c, p_m,
    p_turn, T, B, H: tl.constexpr, P: tl.constexpr, DIRECTION: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; weights come from the second-level cache,
    c (B, H) lies in float32 scratch. Moves: gx in; y, gates and cells out; W_hh once; h through `ring` (2, B, P), where
    steps take turns, and with a projection m (B, H) through scratch. Syncs: the group once a step, twice with a
    projection. Limits: a group of more than one program needs a cooperative launch.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(1), B, BB, DIRECTION)
    o_b, p_w = tl.arange(0, BB), p_w + d * 4 * H * P
    m_b, n_first, turn = local_b + o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    length, MEETINGS = load_lengths(p_lengths, local_b, o_b, m_b, T), 1 if p_wr is None else 2
    copy_tiles(p_h0, p_ring, first_b, o_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_c0, p_c, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    meet(turn, PROGRAMS, PROGRAMS)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, reverse)
    half = (2 if DIRECTION == "both" else 1) * B.to(tl.int64) * P
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, reverse)
        m_from = exists & ~load_fresh(p_reset, row, o_b, exists)
        p_old, p_new = p_ring + s % 2 * half, p_ring + (s + 1) % 2 * half
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m, p_state = m_b[:, None] & (o_n < H)[None, :], tile_of(p_c, first_b, o_b, o_n, H)
            there = inside(p_offsets, m, exists)
            x_i, x_f, x_g, x_o = load_gates(tile_of(p_gx, row, o_b, o_n, 4 * H), there, H)
            a_i, a_f, a_g, a_o = x_i.to(tl.float32), x_f.to(tl.float32), x_g.to(tl.float32), x_o.to(tl.float32)
            c = load_float(p_state, m)
            a_i, a_f, a_g, a_o = add_four_products(a_i, a_f, a_g, a_o, p_old + first_b * P, o_b * P, m_from, P, p_w,
                                                   o_n, H, BK, PRECISION)  # fmt: skip
            i, f, g, o, c_next, m_next = cell(a_i, a_f, a_g, a_o, tl.where(m_from[:, None], c, 0.0))
            keep_step(p_gates, p_cells, row, o_b, o_n, there, exists, i, f, g, o, c_next, H)
            tl.store(p_state, c_next, m & exists[:, None])
            if p_wr is None:
                finish_state(p_offsets, p_y, p_old, p_new, row, first_b, o_b, o_n, m, exists, m_next, P)
            else:
                store_as(tile_of(p_m, first_b, o_b, o_n, H), m_next, m)
        meet(turn, PROGRAMS * (MEETINGS * s + 2), PROGRAMS)
        if p_wr is not None:
            for n in range(n_first, P, PROGRAMS * BN):
                o_n = n + tl.arange(0, BN)
                h_next, m = tl.zeros((BB, BN), tl.float32), m_b[:, None] & (o_n < P)[None, :]
                h_next = add_product(h_next, p_m + first_b * H, o_b * H, exists, H, p_wr + d * P * H, o_n, P, 1, H, BK,
                                     PRECISION)  # fmt: skip
                finish_state(p_offsets, p_y, p_old, p_new, row, first_b, o_b, o_n, m, exists, h_next, P)
            meet(turn, PROGRAMS * (2 * s + 3), PROGRAMS)
        row = next_row(p_offsets, row, base, s + 1, steps, B, reverse)
    copy_tiles(p_ring + steps % 2 * half, p_hn, first_b, o_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_c, p_cn, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)


@triton.jit(do_not_specialize=["B"])
def step_kernel(
    p_x, p_ids, p_h0, p_c0, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_lengths, p_reset, p_y, p_hn, p_cn, p_gates, p_cells, B,
    I, H: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step: both products and the gates. With ids, x is a table of inputs; without W_ih, of their products with it.

    Owns: h' and c' of BN units of BB sequences. Keeps: the sums of their gates. Moves: x, h, c and the units' rows of
    both weights in; y, h', c', gates and cells out. Syncs: none. Limits: no projection.
    """
    first_b, o_b = tl.program_id(1).to(tl.int64) * BB, tl.arange(0, BB)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_b, m_n = first_b + o_b < B, o_n < H
    exists = load_lengths(p_lengths, first_b, o_b, m_b, 1) > 0
    m, m_from = m_b[:, None] & m_n[None, :], exists & ~load_fresh(p_reset, first_b, o_b, exists)
    zero, row_x = tl.zeros((BB, BN), tl.float32), input_rows(p_ids, first_b, o_b, m_b)
    a_i, a_f, a_g, a_o = add_bias(p_b_ih, o_n, m_n, zero, zero, zero, zero, H)
    a_i, a_f, a_g, a_o = add_bias(p_b_hh, o_n, m_n, a_i, a_f, a_g, a_o, H)
    if p_w_ih is None:
        x_i, x_f, x_g, x_o = load_gates(tile_of(p_x, 0, row_x, o_n, 4 * H), m, H)
        a_i, a_f, a_g, a_o = a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o
    else:
        a_i, a_f, a_g, a_o = add_four_products(a_i, a_f, a_g, a_o, p_x, row_x * I, m_b, I, p_w_ih, o_n, H, BK,
                                               PRECISION)  # fmt: skip
    a_i, a_f, a_g, a_o = add_four_products(a_i, a_f, a_g, a_o, p_h0 + first_b * H, o_b * H, m_from, H, p_w_hh, o_n, H,
                                           BK, PRECISION)  # fmt: skip
    c, there = load_float(tile_of(p_c0, first_b, o_b, o_n, H), m), exists[:, None]
    i, f, g, o, c_next, h_next = cell(a_i, a_f, a_g, a_o, tl.where(m_from[:, None], c, 0.0))
    keep_step(p_gates, p_cells, first_b, o_b, o_n, m, exists, i, f, g, o, c_next, H)
    old = load_float(tile_of(p_h0, first_b, o_b, o_n, H), m)
    store_as(tile_of(p_y, first_b, o_b, o_n, H), tl.where(there, h_next, 0.0), m)
    store_as(tile_of(p_hn, first_b, o_b, o_n, H), tl.where(there, h_next, old), m)
    store_as(tile_of(p_cn, first_b, o_b, o_n, H), tl.where(there, c_next, c), m)


@triton.jit(**launch.SEQUENCE)
def resident_backward_kernel(
    p_dy, p_dhn, p_dcn, p_c0, p_w, p_lengths, p_offsets, p_reset, p_gates, p_cells, p_dgx, p_dh0, p_dc0, T, B,
    H: tl.constexpr, DIRECTION: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch.

    Owns: dgx, dh0 and dc0 of BB sequences. Keeps: W_hh, dh, dc and c on chip. Moves: dy, gates and cells in, dgx
    out. Syncs: none but those of the products. Limits: as forward.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(0), B, BB, DIRECTION)
    o_b, o_h, p_w = tl.arange(0, BB), tl.arange(0, BH), p_w + d * 4 * H * H
    m_b, against = local_b + o_b < B, reverse == 0
    m = m_b[:, None] & (o_h < H)[None, :]
    w_i, w_f = load_weight(p_w, o_h, o_h, H, H, H, 1), load_weight(p_w + H * H, o_h, o_h, H, H, H, 1)
    w_g, w_o = load_weight(p_w + 2 * H * H, o_h, o_h, H, H, H, 1), load_weight(p_w + 3 * H * H, o_h, o_h, H, H, H, 1)
    dh, dc = load_float(tile_of(p_dhn, first_b, o_b, o_h, H), m), load_float(tile_of(p_dcn, first_b, o_b, o_h, H), m)
    c0, length = load_float(tile_of(p_c0, first_b, o_b, o_h, H), m), load_lengths(p_lengths, local_b, o_b, m_b, T)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, against)
    row_next = next_row(p_offsets, row, base, 1, steps, B, against)
    follows, there = in_memory(p_offsets, p_lengths, length, m_b, m, 0, steps, against)
    fresh_next = load_fresh(p_reset, row, o_b, follows)
    follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, 1, steps, against)
    i, f, g, o = load_gates(tile_of(p_gates, row, o_b, o_h, 4 * H), there, H)
    dy = tl.load(tile_of(p_dy, row, o_b, o_h, H), there, other=0.0)
    c = tl.load(tile_of(p_cells, row, o_b, o_h, H), there, other=0.0)
    before = tl.load(tile_of(p_cells, row_next, o_b, o_h, H), m_next, other=0.0)
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, against)
        first, fresh = is_first(step_index(s, steps, against), length, reverse), fresh_next
        c_prev = unless(fresh, tl.where(first[:, None], c0, before.to(tl.float32)))
        dh_t = tl.where(exists[:, None], dh + dy.to(tl.float32), 0.0)
        da_i, da_f, da_g, da_o, dc_prev = cell_gradient(
            dh_t, tl.where(exists[:, None], dc, 0.0), i.to(tl.float32), f.to(tl.float32), g.to(tl.float32),
            o.to(tl.float32), c.to(tl.float32), c_prev,
        )  # fmt: skip
        follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, s + 1, steps, against)
        fresh_next = load_fresh(p_reset, row_next, o_b, follows)  # of the next step, early
        i, f, g, o = load_gates(tile_of(p_gates, row_next, o_b, o_h, 4 * H), m_next, H)
        dy, c = tl.load(tile_of(p_dy, row_next, o_b, o_h, H), m_next, other=0.0), before
        row_after = next_row(p_offsets, row_next, base, s + 2, steps, B, against)
        follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, s + 2, steps, against)
        before = tl.load(tile_of(p_cells, row_after, o_b, o_h, H), m_next, other=0.0)
        store_gates(tile_of(p_dgx, row, o_b, o_h, 4 * H), inside(p_offsets, m, exists), da_i, da_f, da_g, da_o, H)
        back = tl.dot(unless(fresh, da_i).to(w_i.dtype), w_i, input_precision=PRECISION)
        back = tl.dot(unless(fresh, da_f).to(w_i.dtype), w_f, back, input_precision=PRECISION)
        back = tl.dot(unless(fresh, da_g).to(w_i.dtype), w_g, back, input_precision=PRECISION)
        back = tl.dot(unless(fresh, da_o).to(w_i.dtype), w_o, back, input_precision=PRECISION)
        dh = tl.where(exists[:, None], back, dh)
        dc = tl.where(exists[:, None], unless(fresh, dc_prev), dc)
        row, row_next = row_next, row_after
    store_as(tile_of(p_dh0, first_b, o_b, o_h, H), dh, m)
    store_as(tile_of(p_dc0, first_b, o_b, o_h, H), dc, m)


@triton.jit(**launch.SEQUENCE)
def tiled_backward_kernel(
    p_dy, p_dhn, p_dcn, p_c0, p_w, p_wr, p_lengths, p_offsets, p_reset, p_gates, p_cells, p_dgx, p_dhs, p_dh0, p_dc0,
    p_dh, p_dc, p_turn, T, B, H: tl.constexpr, P: tl.constexpr, DIRECTION: tl.constexpr, PROGRAMS: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; dh (B, P) and dc (B, H) lie in float32
    scratch. Moves: dy, gates and cells in; dgx out and in; W_hh once; with a projection dhs, the gradient of every
    step's h, out and in. Syncs: the group once a step, twice with a projection. Limits: as forward.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(1), B, BB, DIRECTION)
    o_b, p_w = tl.arange(0, BB), p_w + d * 4 * H * P
    m_b, n_first, turn = local_b + o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    length, MEETINGS = load_lengths(p_lengths, local_b, o_b, m_b, T), 1 if p_wr is None else 2
    copy_tiles(p_dhn, p_dh, first_b, o_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_dcn, p_dc, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    tl.debug_barrier()
    against = reverse == 0
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, against)
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, against)
        first, fresh = is_first(step_index(s, steps, against), length, reverse), load_fresh(p_reset, row, o_b, exists)
        row_next = next_row(p_offsets, row, base, s + 1, steps, B, against)
        if p_wr is not None:
            for n in range(n_first, P, PROGRAMS * BN):
                o_n = n + tl.arange(0, BN)
                m = m_b[:, None] & (o_n < P)[None, :]
                dh, there = load_float(tile_of(p_dh, first_b, o_b, o_n, P), m), inside(p_offsets, m, exists)
                dh += load_float(tile_of(p_dy, row, o_b, o_n, P), there)
                store_as(tile_of(p_dhs, row, o_b, o_n, P), tl.where(exists[:, None], dh, 0.0), there)
            meet(turn, PROGRAMS * (2 * s + 1), PROGRAMS)
        for n in range(n_first, H, PROGRAMS * BN):
            o_n = n + tl.arange(0, BN)
            m, p_state = m_b[:, None] & (o_n < H)[None, :], tile_of(p_dc, first_b, o_b, o_n, H)
            there = inside(p_offsets, m, exists)
            i, f, g, o = load_gates(tile_of(p_gates, row, o_b, o_n, 4 * H), there, H)
            c_prev = load_previous(p_cells, p_c0, row_next, first_b, o_b, o_n, first, exists, o_n < H, H)
            if p_wr is None:
                dm = load_float(tile_of(p_dh, first_b, o_b, o_n, H), m)
                dm += load_float(tile_of(p_dy, row, o_b, o_n, H), there)
            else:
                dm = tl.zeros((BB, BN), tl.float32)
                dm = add_product(dm, p_dhs + row * P, o_b * P, exists, P, p_wr + d * P * H, o_n, H, H, 1, BK,
                                 PRECISION)  # fmt: skip
            da_i, da_f, da_g, da_o, dc_prev = cell_gradient(
                tl.where(exists[:, None], dm, 0.0), tl.where(exists[:, None], load_float(p_state, m), 0.0),
                i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32),
                load_float(tile_of(p_cells, row, o_b, o_n, H), there), unless(fresh, c_prev.to(tl.float32)),
            )  # fmt: skip
            store_gates(tile_of(p_dgx, row, o_b, o_n, 4 * H), there, da_i, da_f, da_g, da_o, H)
            tl.store(p_state, unless(fresh, dc_prev), m & exists[:, None])
        meet(turn, PROGRAMS * (MEETINGS * (s + 1)), PROGRAMS)
        add_back(p_dgx, p_dh, p_w, row, first_b, o_b, exists, fresh, n_first, 4 * H, P, False, PROGRAMS, BN, BK,
                 PRECISION)  # fmt: skip
        row = row_next
    copy_tiles(p_dh, p_dh0, first_b, o_b, m_b, n_first, P, PROGRAMS, BN)
    copy_tiles(p_dc, p_dc0, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)


def lstm_forward(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, save: bool,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.lstm_forward`."""
    time, batch, inputs, hidden = launch.check_shapes("lstm", locals())
    (*ways, _, width), (hn, cn) = h0.shape, launch.like(h0, c0)
    y, none = x.new_empty(*ways, *x.shape[:2], width), x.new_empty(*ways, 0)
    gates = x.new_empty(*ways, *x.shape[:2], 4 * hidden) if save else None
    cells = x.new_empty(*ways, *x.shape[:2], hidden) if save else None
    h0, c0, w_hh, w_hr, lengths, place = launch.contiguous(h0, c0, w_hh, w_hr, lengths, offsets)
    fresh, results, sizes = launch.flag(reset), (y, hn, cn, gates, cells), dict(H=hidden, PRECISION=launch.precision(x))
    if time == 0:
        hn.copy_(h0), cn.copy_(c0)
    elif time == 1 and w_hr is None and not ways:
        x, w_ih, *biases = launch.contiguous(x, w_ih, b_ih, b_hh)
        plan = tuning.step("lstm", hidden, batch, x.dtype)
        args = (x, None, h0, c0, w_ih, w_hh, *biases, lengths, fresh, *results, batch, inputs)
        launch.run(step_kernel, plan, *args, **sizes)
    else:
        gx, sizes["DIRECTION"] = launch.input_part(x, w_ih, launch.added(b_ih, b_hh)), launch.direction_of(h0, reverse)
        plan = launch.sequence_plan("lstm", "forward", x, h0, hidden, w_hr is not None)
        if plan.resident:
            args = (gx, h0, c0, w_hh, lengths, place, fresh, *results, time, batch)
            launch.run(resident_forward_kernel, plan, *args, **sizes)
        else:
            ring, m = x.new_empty(2, *h0.shape), x.new_empty(0 if w_hr is None else c0.numel())
            scratch = (ring, launch.floats(x, *c0.shape), m, plan.turns(x))
            args = (gx, h0, c0, w_hh, w_hr, lengths, place, fresh, *results, *scratch, time, batch)
            launch.run(tiled_forward_kernel, plan, *args, P=width, **sizes)
    return y, hn, cn, none if gates is None else gates, none.clone() if cells is None else cells


def lstm_backward(
    dy: Tensor, dhn: Tensor, dcn: Tensor, x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, lengths: Tensor | None, reset: Tensor | None,
    reverse: bool, y: Tensor, gates: Tensor, cells: Tensor, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.lstm_backward`."""
    time, batch, _, hidden = launch.check_shapes("lstm", locals())
    (*ways, _, width), (dgx, dh0, dc0) = h0.shape, launch.like(gates, h0, c0)
    dhs = None if w_hr is None else launch.like(y)[0]
    dy, dhn, dcn, c0, gates, cells = launch.contiguous(dy, dhn, dcn, c0, gates, cells)
    w, w_r, length, place, fresh = launch.contiguous(w_hh, w_hr, lengths, offsets, launch.flag(reset))
    plan = launch.sequence_plan("lstm", "backward", x, h0, hidden, w_hr is not None)
    sizes = dict(H=hidden, DIRECTION=launch.direction_of(h0, reverse), PRECISION=launch.precision(x))
    if time == 0:
        dh0.copy_(dhn), dc0.copy_(dcn)
    elif plan.resident:
        args = (dy, dhn, dcn, c0, w, length, place, fresh, gates, cells, dgx, dh0, dc0, time, batch)
        launch.run(resident_backward_kernel, plan, *args, **sizes)
    else:
        scratch = (launch.floats(x, *h0.shape), launch.floats(x, *c0.shape), plan.turns(x))
        args = (dy, dhn, dcn, c0, w, w_r, length, place, fresh, gates, cells, dgx, dhs, dh0, dc0, *scratch, time, batch)
        launch.run(tiled_backward_kernel, plan, *args, P=width, **sizes)
    dw_hh = launch.weight_gradient(dgx, launch.previous(y, h0, lengths, reset, reverse, offsets))
    none = x.new_empty(*ways, 0)
    db = none if b_ih is None and b_hh is None else dgx.sum((-3, -2))
    dw_hr = none if w_hr is None else launch.weight_gradient(dhs, gates[..., 3 * hidden :] * cells.tanh())
    dx, dw_ih = launch.input_gradient(x, (dgx, w_ih)), launch.weight_gradient(dgx, x, lengths, offsets)
    return dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr


lstm_both_forward, lstm_both_backward = launch.both(lstm_forward), launch.both(lstm_backward)
lstm_packed_forward, lstm_packed_backward = launch.packed(lstm_forward), launch.packed(lstm_backward)

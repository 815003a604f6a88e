"""The GRU in Triton: forward and backward of one layer in one direction, and a single step.

Interfaces and equations as in `fastrnn.reference`. The input's part of the pre-activations comes from one product of
matrices before the loop, the gradients of weights and input from products after it; the loop is one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .cell_math import (
    add_back,
    at_step,
    copy_tiles,
    counted,
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
    load_shared,
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
def cell(a_r, a_z, x_n, q, h):
    """Gates from their pre-activations, and the new state: r, z, n, h'."""
    r, z = sigmoid(a_r), sigmoid(a_z)
    n = tanh(x_n + r * q)
    return r, z, n, (1.0 - z) * n + z * h


@triton.jit
def cell_gradient(dh, r, z, n, q, h):
    """The gradients of the pre-activations of r and z, of q, of that of n, and the direct one of h."""
    dn = dh * (1.0 - z) * (1.0 - n * n)
    return dn * q * r * (1.0 - r), dh * (h - n) * z * (1.0 - z), dn * r, dn, dh * z


@triton.jit
def load_input(p, m, H: tl.constexpr):
    """The input's parts of r, z and n: three tiles that stand H apart; p points to the first."""
    return tl.load(p, m, other=0.0), tl.load(p + H, m, other=0.0), tl.load(p + 2 * H, m, other=0.0)


@triton.jit
def load_biases(p_b, o_n, m_n, H: tl.constexpr):
    """The three parts of a bias as rows of float32."""
    b_r, b_z = load_bias(p_b, o_n, m_n), load_bias(p_b, H + o_n, m_n)
    return b_r, b_z, load_bias(p_b, 2 * H + o_n, m_n)


@triton.jit
def keep_step(p_gates, row, o_b, o_n, m, exists, r, z, n, q, H: tl.constexpr):
    """What backward needs of a step, if it is wanted; zeros where a row has no such step."""
    if p_gates is not None:
        there = exists[:, None]
        r, z, n, q = tl.where(there, r, 0.0), tl.where(there, z, 0.0), tl.where(there, n, 0.0), tl.where(there, q, 0.0)
        store_gates(tile_of(p_gates, row, o_b, o_n, 4 * H), m, r, z, n, q, H)


@triton.jit
def add_products(
    a_r, a_z, a_n, p_a, at, m_b, K, p_w, o_n, H: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """`cell_math.add_product` with the weights of three gates, for one pass over A."""
    for k in range(0, counted(K), BK):
        o_k = k + tl.arange(0, BK)
        a = load_shared(p_a, at, o_k, m_b, K)
        a_r = tl.dot(a, load_weight(p_w, o_k, o_n, K, H, 1, K), a_r, input_precision=PRECISION)
        a_z = tl.dot(a, load_weight(p_w + H * K, o_k, o_n, K, H, 1, K), a_z, input_precision=PRECISION)
        a_n = tl.dot(a, load_weight(p_w + 2 * H * K, o_k, o_n, K, H, 1, K), a_n, input_precision=PRECISION)
    return a_r, a_z, a_n


@triton.jit(**launch.SEQUENCE)
def resident_forward_kernel(
    p_gx, p_h0, p_w, p_b, p_lengths, p_offsets, p_reset, p_y, p_hn, p_gates, T, B, H: tl.constexpr,
    DIRECTION: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch.

    Owns: all results of BB sequences. Keeps: W_hh and h on chip. Moves: gx in, y and gates out. Syncs: none but
    those of the products. Limits: H <= BH, and W_hh must fit into one multiprocessor.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(0), B, BB, DIRECTION)
    o_b, o_h, p_w = tl.arange(0, BB), tl.arange(0, BH), p_w + d * 3 * H * H
    m_b = local_b + o_b < B
    m = m_b[:, None] & (o_h < H)[None, :]
    w_r, w_z = load_weight(p_w, o_h, o_h, H, H, 1, H), load_weight(p_w + H * H, o_h, o_h, H, H, 1, H)
    w_n = load_weight(p_w + 2 * H * H, o_h, o_h, H, H, 1, H)
    b_r, b_z, b_n = load_biases(p_b, d * 3 * H + o_h, o_h < H, H)
    h, length = load_float(tile_of(p_h0, first_b, o_b, o_h, H), m), load_lengths(p_lengths, local_b, o_b, m_b, T)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, reverse)
    exists, there = at_step(p_offsets, p_lengths, length, m_b, m, 0, steps, reverse)
    h = unless(load_fresh(p_reset, row, o_b, exists), h)
    x_r, x_z, x_n = load_input(tile_of(p_gx, row, o_b, o_h, 3 * H), there, H)
    for s in range(steps):
        exists, there = at_step(p_offsets, p_lengths, length, m_b, m, s, steps, reverse)
        a_r, a_z, a_n = x_r.to(tl.float32) + b_r, x_z.to(tl.float32) + b_z, x_n.to(tl.float32)
        # Of the next step, early.
        row_next = next_row(p_offsets, row, base, s + 1, steps, B, reverse)
        follows, m_next = at_step(p_offsets, p_lengths, length, m_b, m, s + 1, steps, reverse)
        fresh = load_fresh(p_reset, row_next, o_b, follows)
        x_r, x_z, x_n = load_input(tile_of(p_gx, row_next, o_b, o_h, 3 * H), m_next, H)
        operand, q = h.to(w_r.dtype), tl.zeros((BB, BH), tl.float32) + b_n
        a_r = tl.dot(operand, w_r, a_r, input_precision=PRECISION)
        a_z = tl.dot(operand, w_z, a_z, input_precision=PRECISION)
        q = tl.dot(operand, w_n, q, input_precision=PRECISION)
        r, z, n, h_next = cell(a_r, a_z, a_n, q, h)
        store_as(tile_of(p_y, row, o_b, o_h, H), tl.where(exists[:, None], h_next, 0.0), there)
        keep_step(p_gates, row, o_b, o_h, there, exists, r, z, n, q, H)
        h = unless(fresh, tl.where(exists[:, None], h_next, h))
        row = row_next
    store_as(tile_of(p_hn, first_b, o_b, o_h, H), h, m)


@triton.jit(**launch.SEQUENCE)
def tiled_forward_kernel(
    p_gx, p_h0, p_w, p_b, p_lengths, p_offsets, p_reset, p_y, p_hn, p_gates, p_ring, p_h, p_turn, T, B, H: tl.constexpr,
    DIRECTION: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole sequence for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; W_hh comes from the second-level cache, h
    (B, H) lies in float32 scratch. Moves: gx in, y and gates out, W_hh once, h for the products through `ring`
    (2, B, H), where steps take turns. Syncs: the group once a step. Limits: a group of more than one program needs a
    cooperative launch.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(1), B, BB, DIRECTION)
    o_b, p_w = tl.arange(0, BB), p_w + d * 3 * H * H
    m_b, n_first, turn = local_b + o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    copy_tiles(p_h0, p_ring, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    copy_tiles(p_h0, p_h, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    meet(turn, PROGRAMS, PROGRAMS)
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, reverse)
    half = (2 if DIRECTION == "both" else 1) * B.to(tl.int64) * H
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, reverse)
        m_from = exists & ~load_fresh(p_reset, row, o_b, exists)
        p_old, p_new = p_ring + s % 2 * half, p_ring + (s + 1) % 2 * half
        for i_n in range(n_first, H, PROGRAMS * BN):
            o_n = i_n + tl.arange(0, BN)
            m, p_state = m_b[:, None] & (o_n < H)[None, :], tile_of(p_h, first_b, o_b, o_n, H)
            there = inside(p_offsets, m, exists)
            x_r, x_z, x_n = load_input(tile_of(p_gx, row, o_b, o_n, 3 * H), there, H)
            b_r, b_z, b_n = load_biases(p_b, d * 3 * H + o_n, o_n < H, H)
            h = load_float(p_state, m)
            a_r, a_z, q = x_r.to(tl.float32) + b_r, x_z.to(tl.float32) + b_z, tl.zeros((BB, BN), tl.float32) + b_n
            a_r, a_z, q = add_products(
                a_r, a_z, q, p_old + first_b * H, o_b * H, m_from, H, p_w, o_n, H, BK, PRECISION
            )
            r, z, n, h_next = cell(a_r, a_z, x_n.to(tl.float32), q, tl.where(m_from[:, None], h, 0.0))
            keep_step(p_gates, row, o_b, o_n, there, exists, r, z, n, q, H)
            tl.store(p_state, h_next, m & exists[:, None])
            finish_state(p_offsets, p_y, p_old, p_new, row, first_b, o_b, o_n, m, exists, h_next, H)
        row = next_row(p_offsets, row, base, s + 1, steps, B, reverse)
        meet(turn, PROGRAMS * (s + 2), PROGRAMS)
    copy_tiles(p_h, p_hn, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)


@triton.jit(do_not_specialize=["B"])
def step_kernel(
    p_x, p_ids, p_h0, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_lengths, p_reset, p_y, p_hn, p_gates, B, I,
    H: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step: both products and the gates. With ids, x is a table of inputs; without W_ih, of their products with it.

    Owns: h' of BN units of BB sequences. Keeps: the sums of their gates. Moves: x, h and the units' rows of both
    weights in; y, h' and gates out. Syncs: none. Limits: none.
    """
    first_b, o_b = tl.program_id(1).to(tl.int64) * BB, tl.arange(0, BB)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_b, m_n = first_b + o_b < B, o_n < H
    exists = load_lengths(p_lengths, first_b, o_b, m_b, 1) > 0
    m, m_from = m_b[:, None] & m_n[None, :], exists & ~load_fresh(p_reset, first_b, o_b, exists)
    b_r, b_z, b_n = load_biases(p_b_ih, o_n, m_n, H)
    c_r, c_z, c_n = load_biases(p_b_hh, o_n, m_n, H)
    zero = tl.zeros((BB, BN), tl.float32)
    a_r, a_z, x_n, row_x = zero + b_r + c_r, zero + b_z + c_z, zero + b_n, input_rows(p_ids, first_b, o_b, m_b)
    if p_w_ih is None:
        x_r, x_z, rest = load_input(tile_of(p_x, 0, row_x, o_n, 3 * H), m, H)
        a_r, a_z, x_n = a_r + x_r, a_z + x_z, x_n + rest
    else:
        a_r, a_z, x_n = add_products(a_r, a_z, x_n, p_x, row_x * I, m_b, I, p_w_ih, o_n, H, BK, PRECISION)
    a_r, a_z, q = add_products(
        a_r, a_z, zero + c_n, p_h0 + first_b * H, o_b * H, m_from, H, p_w_hh, o_n, H, BK, PRECISION
    )
    h = load_float(tile_of(p_h0, first_b, o_b, o_n, H), m)
    r, z, n, h_next = cell(a_r, a_z, x_n, q, tl.where(m_from[:, None], h, 0.0))
    keep_step(p_gates, first_b, o_b, o_n, m, exists, r, z, n, q, H)
    store_as(tile_of(p_y, first_b, o_b, o_n, H), tl.where(exists[:, None], h_next, 0.0), m)
    store_as(tile_of(p_hn, first_b, o_b, o_n, H), tl.where(exists[:, None], h_next, h), m)


@triton.jit
def store_gradients(p_dgh, p_dn, row, o_b, o_n, m, da_r, da_z, dq, dn, H: tl.constexpr):
    """The gradients of r, z and q side by side in rows of 3 H, and that of n."""
    p = tile_of(p_dgh, row, o_b, o_n, 3 * H)
    store_as(p, da_r, m)
    store_as(p + H, da_z, m)
    store_as(p + 2 * H, dq, m)
    store_as(tile_of(p_dn, row, o_b, o_n, H), dn, m)


@triton.jit(**launch.SEQUENCE)
def resident_backward_kernel(
    p_dy, p_dhn, p_h0, p_w, p_lengths, p_offsets, p_reset, p_y, p_gates, p_dgh, p_dn, p_dh0, T, B, H: tl.constexpr,
    DIRECTION: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch.

    Owns: dgh, dn and dh0 of BB sequences. Keeps: W_hh and dh on chip. Moves: dy, y and gates in, dgh and dn out.
    Syncs: none but those of the products. Limits: as forward.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(0), B, BB, DIRECTION)
    o_b, o_h, p_w = tl.arange(0, BB), tl.arange(0, BH), p_w + d * 3 * H * H
    m_b = local_b + o_b < B
    m = m_b[:, None] & (o_h < H)[None, :]
    w_r, w_z = load_weight(p_w, o_h, o_h, H, H, H, 1), load_weight(p_w + H * H, o_h, o_h, H, H, H, 1)
    w_n = load_weight(p_w + 2 * H * H, o_h, o_h, H, H, H, 1)
    dh, h0 = load_float(tile_of(p_dhn, first_b, o_b, o_h, H), m), load_float(tile_of(p_h0, first_b, o_b, o_h, H), m)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    against = reverse == 0
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, against)
    row_next = next_row(p_offsets, row, base, 1, steps, B, against)
    follows, there = in_memory(p_offsets, p_lengths, length, m_b, m, 0, steps, against)
    fresh_next = load_fresh(p_reset, row, o_b, follows)
    follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, 1, steps, against)
    r, z, n, q = load_gates(tile_of(p_gates, row, o_b, o_h, 4 * H), there, H)
    dy = tl.load(tile_of(p_dy, row, o_b, o_h, H), there, other=0.0)
    before = tl.load(tile_of(p_y, row_next, o_b, o_h, H), m_next, other=0.0)
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, against)
        first, fresh = is_first(step_index(s, steps, against), length, reverse), fresh_next
        h_prev = unless(fresh, tl.where(first[:, None], h0, before.to(tl.float32)))
        da_r, da_z, dq, dn, direct = cell_gradient(
            tl.where(exists[:, None], dh + dy.to(tl.float32), 0.0), r.to(tl.float32), z.to(tl.float32),
            n.to(tl.float32), q.to(tl.float32), h_prev,
        )  # fmt: skip
        follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, s + 1, steps, against)
        fresh_next = load_fresh(p_reset, row_next, o_b, follows)  # of the next step, early
        r, z, n, q = load_gates(tile_of(p_gates, row_next, o_b, o_h, 4 * H), m_next, H)
        dy = tl.load(tile_of(p_dy, row_next, o_b, o_h, H), m_next, other=0.0)
        row_after = next_row(p_offsets, row_next, base, s + 2, steps, B, against)
        follows, m_next = in_memory(p_offsets, p_lengths, length, m_b, m, s + 2, steps, against)
        before = tl.load(tile_of(p_y, row_after, o_b, o_h, H), m_next, other=0.0)
        store_gradients(p_dgh, p_dn, row, o_b, o_h, inside(p_offsets, m, exists), da_r, da_z, dq, dn, H)
        back = tl.dot(unless(fresh, da_r).to(w_r.dtype), w_r, unless(fresh, direct), input_precision=PRECISION)
        back = tl.dot(unless(fresh, da_z).to(w_r.dtype), w_z, back, input_precision=PRECISION)
        back = tl.dot(unless(fresh, dq).to(w_r.dtype), w_n, back, input_precision=PRECISION)
        dh = tl.where(exists[:, None], back, dh)
        row, row_next = row_next, row_after
    store_as(tile_of(p_dh0, first_b, o_b, o_h, H), dh, m)


@triton.jit(**launch.SEQUENCE)
def tiled_backward_kernel(
    p_dy, p_dhn, p_h0, p_w, p_lengths, p_offsets, p_reset, p_y, p_gates, p_dgh, p_dn, p_dh0, p_dh, p_turn, T, B,
    H: tl.constexpr, DIRECTION: tl.constexpr, PROGRAMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations for a slice of the batch, by a group of PROGRAMS programs.

    Owns: every PROGRAMS-th tile of BN units of BB sequences. Keeps: nothing; dh (B, H) lies in float32 scratch. Moves:
    dy, y and gates in, dgh out and in, dn out, W_hh once. Syncs: the group once a step. Limits: as forward.
    """
    d, reverse, local_b, first_b = place_of(tl.program_id(1), B, BB, DIRECTION)
    o_b, p_w = tl.arange(0, BB), p_w + d * 3 * H * H
    m_b, n_first, turn = local_b + o_b < B, tl.program_id(0) * BN, p_turn + tl.program_id(1)
    length = load_lengths(p_lengths, local_b, o_b, m_b, T)
    copy_tiles(p_dhn, p_dh, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)
    tl.debug_barrier()
    against = reverse == 0
    steps, base, row = span_of(p_offsets, p_lengths, d, local_b, T, B, against)
    for s in range(steps):
        exists = has_step(p_lengths, length, m_b, s, steps, against)
        first, fresh = is_first(step_index(s, steps, against), length, reverse), load_fresh(p_reset, row, o_b, exists)
        row_next = next_row(p_offsets, row, base, s + 1, steps, B, against)
        for i_n in range(n_first, H, PROGRAMS * BN):
            o_n = i_n + tl.arange(0, BN)
            m, p_state = m_b[:, None] & (o_n < H)[None, :], tile_of(p_dh, first_b, o_b, o_n, H)
            there = inside(p_offsets, m, exists)
            r, z, n, q = load_gates(tile_of(p_gates, row, o_b, o_n, 4 * H), there, H)
            h_prev = load_previous(p_y, p_h0, row_next, first_b, o_b, o_n, first, exists, o_n < H, H)
            dh = load_float(p_state, m) + load_float(tile_of(p_dy, row, o_b, o_n, H), there)
            da_r, da_z, dq, dn, direct = cell_gradient(
                tl.where(exists[:, None], dh, 0.0), r.to(tl.float32), z.to(tl.float32), n.to(tl.float32),
                q.to(tl.float32), unless(fresh, h_prev.to(tl.float32)),
            )  # fmt: skip
            store_gradients(p_dgh, p_dn, row, o_b, o_n, there, da_r, da_z, dq, dn, H)
            tl.store(p_state, direct, m & exists[:, None])
        meet(turn, PROGRAMS * (s + 1), PROGRAMS)
        add_back(p_dgh, p_dh, p_w, row, first_b, o_b, exists, fresh, n_first, 3 * H, H, True, PROGRAMS, BN, BK,
                 PRECISION)  # fmt: skip
        row = row_next
    copy_tiles(p_dh, p_dh0, first_b, o_b, m_b, n_first, H, PROGRAMS, BN)


def gru_forward(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    lengths: Tensor | None, reset: Tensor | None, reverse: bool, save: bool, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.gru_forward`."""
    time, batch, inputs, hidden = launch.check_shapes("gru", locals())
    ways, (hn,) = h0.shape[:-2], launch.like(h0)
    y = x.new_empty(*ways, *x.shape[:2], hidden)
    gates = x.new_empty(*ways, *x.shape[:2], 4 * hidden) if save else None
    h0, w_hh, b_hh, lengths, offsets = launch.contiguous(h0, w_hh, b_hh, lengths, offsets)
    fresh, results, sizes = launch.flag(reset), (y, hn, gates), dict(H=hidden, PRECISION=launch.precision(x))
    if time == 0:
        hn.copy_(h0)
    elif time == 1 and not ways:
        x, w_ih, b_ih = launch.contiguous(x, w_ih, b_ih)
        plan = tuning.step("gru", hidden, batch, x.dtype)
        args = (x, None, h0, w_ih, w_hh, b_ih, b_hh, lengths, fresh, *results, batch, inputs)
        launch.run(step_kernel, plan, *args, **sizes)
    else:
        gx, sizes["DIRECTION"] = launch.input_part(x, w_ih, b_ih), launch.direction_of(h0, reverse)
        plan = launch.sequence_plan("gru", "forward", x, h0, hidden)
        args = (gx, h0, w_hh, b_hh, lengths, offsets, fresh, *results)
        if plan.resident:
            launch.run(resident_forward_kernel, plan, *args, time, batch, **sizes)
        else:
            scratch = (x.new_empty(2, *h0.shape), launch.floats(x, *h0.shape), plan.turns(x))
            launch.run(tiled_forward_kernel, plan, *args, *scratch, time, batch, **sizes)
    return y, hn, x.new_empty(*ways, 0) if gates is None else gates


def gru_backward(
    dy: Tensor, dhn: Tensor, x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, lengths: Tensor | None, reset: Tensor | None, reverse: bool, y: Tensor, gates: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastrnn.reference.gru_backward`."""
    time, batch, inputs, hidden = launch.check_shapes("gru", locals())
    ways, (dn, dh0) = h0.shape[:-2], launch.like(y, h0)
    dgh, fresh = x.new_empty(*ways, *x.shape[:2], 3 * hidden), launch.flag(reset)
    dy, dhn, h, w, length, place, y, gates = launch.contiguous(dy, dhn, h0, w_hh, lengths, offsets, y, gates)
    plan = launch.sequence_plan("gru", "backward", x, h0, hidden)
    sizes = dict(H=hidden, DIRECTION=launch.direction_of(h0, reverse), PRECISION=launch.precision(x))
    args = (dy, dhn, h, w, length, place, fresh, y, gates, dgh, dn, dh0)
    if time == 0:
        dh0.copy_(dhn)
    elif plan.resident:
        launch.run(resident_backward_kernel, plan, *args, time, batch, **sizes)
    else:
        scratch = (launch.floats(x, *h0.shape), plan.turns(x))
        launch.run(tiled_backward_kernel, plan, *args, *scratch, time, batch, **sizes)
    cut, none = 2 * hidden, x.new_empty(*ways, 0)
    da = dgh[..., :cut]  # what r and z get from the input, as dn is what n gets
    dx = launch.input_gradient(x, (da, w_ih[..., :cut, :]), (dn, w_ih[..., cut:, :]))
    dw_ih = torch.cat([launch.weight_gradient(part, x, lengths, offsets) for part in (da, dn)], -2)
    dw_hh = launch.weight_gradient(dgh, launch.previous(y, h0, lengths, reset, reverse, offsets))
    sums = none if b_ih is None and b_hh is None else dgh.sum((-3, -2))
    db_ih = none if b_ih is None else torch.cat((sums[..., :cut], dn.sum((-3, -2))), -1)
    return dx, dh0, dw_ih, dw_hh, db_ih, none if b_hh is None else sums


gru_both_forward, gru_both_backward = launch.both(gru_forward), launch.both(gru_backward)
gru_packed_forward, gru_packed_backward = launch.packed(gru_forward), launch.packed(gru_backward)

"""What the kernels of every cell share on the device: the two nonlinearities, masks, tiles and products.

Names: ``p_`` pointers, ``i_`` program indices, ``o_`` offsets, ``m_`` masks. A *row* is one sequence at one step,
counted as ``t * B + b``, or as ``offsets[t] + b`` where rows are packed: only those that exist, a step's after those
of the step before. A program's rows follow each other: ``row`` is the first of them, and as the only number of 64 bits
it is one for all threads; ``o_b`` counts on from it. Arithmetic is in float32; only loads, stores and the
operands of products have the tensors' dtype.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """The logistic function; exp overflows to infinity for very negative x, which gives 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place, near 0 too, and without overflow.

    Below 0.5 it is x + x^3 P(x^2), P a Chebyshev fit of degree 4 with 0.7 ulp at most; elsewhere exp of a negative
    number.
    """
    size, square = tl.abs(x), x * x
    p = -6.779402881e-03 * square + 2.137844585e-02
    p = p * square - 5.391611266e-02
    p = p * square + 1.333310464e-01
    p = p * square - 3.333333051e-01
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.5, x + x * square * p, tl.where(x < 0, -far, far))


@triton.jit
def tile_of(p, row, o_b, o_n, WIDTH: tl.constexpr):
    """Pointers to columns o_n of the rows ``row + o_b`` of WIDTH numbers each."""
    return p + row * WIDTH + (o_b[:, None] * WIDTH + o_n[None, :])


@triton.jit
def load_float(pointers, mask):
    """The values as float32, 0 where masked."""
    return tl.load(pointers, mask, other=0.0).to(tl.float32)


@triton.jit
def store_as(pointers, value, mask):
    """Store in the dtype of the memory."""
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask)


@triton.jit
def load_bias(p_b, o_n, m_n):
    """A stretch of a bias as a row of float32; zeros where the layer has none."""
    if p_b is None:
        return (o_n * 0.0)[None, :]
    else:
        return load_float(p_b + o_n, m_n)[None, :]


@triton.jit
def load_weight(p_w, o_k, o_n, K, N, STRIDE_K, STRIDE_N):
    """The block W[o_k, o_n] of a K by N operand in memory, 0 beyond its edges."""
    mask = (o_k[:, None] < K) & (o_n[None, :] < N)
    return tl.load(p_w + o_k[:, None] * STRIDE_K + o_n[None, :] * STRIDE_N, mask, other=0.0)


@triton.jit
def load_shared(p_a, at, o_k, m_b, K):
    """Columns o_k of rows of K numbers that start ``at[b]``, 0 beyond their edges.

    Other programs may have written them, so they are read past the first-level cache, which does not see those writes.
    """
    mask = m_b[:, None] & (o_k < K)[None, :]
    return tl.load(p_a + at[:, None] + o_k[None, :], mask, other=0.0, cache_modifier=".cg")


@triton.jit
def counted(size):
    """`size`, as a number that the compiler does not know: grids have at most two dimensions, so the third counts 1.

    A loop of known length is unrolled as a whole, and its operands are read ahead until no register is left.
    """
    return size * tl.num_programs(2)


@triton.jit
def add_product(
    acc, p_a, at, m_b, K, p_w, o_n, N, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A W: row b of A is the K numbers from ``p_a + at[b]``, W[k, n] stands at k * STRIDE_K + n * STRIDE_N."""
    for k in range(0, counted(K), BK):
        o_k = k + tl.arange(0, BK)
        a = load_shared(p_a, at, o_k, m_b, K)
        acc = tl.dot(a, load_weight(p_w, o_k, o_n, K, N, STRIDE_K, STRIDE_N), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_four_products(
    a_i, a_f, a_g, a_o, p_a, at, m_b, K, p_w, o_n, H: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """`add_product` with the weights of four gates, for one pass over A."""
    for k in range(0, counted(K), BK):
        o_k = k + tl.arange(0, BK)
        a = load_shared(p_a, at, o_k, m_b, K)
        a_i = tl.dot(a, load_weight(p_w, o_k, o_n, K, H, 1, K), a_i, input_precision=PRECISION)
        a_f = tl.dot(a, load_weight(p_w + H * K, o_k, o_n, K, H, 1, K), a_f, input_precision=PRECISION)
        a_g = tl.dot(a, load_weight(p_w + 2 * H * K, o_k, o_n, K, H, 1, K), a_g, input_precision=PRECISION)
        a_o = tl.dot(a, load_weight(p_w + 3 * H * K, o_k, o_n, K, H, 1, K), a_o, input_precision=PRECISION)
    return a_i, a_f, a_g, a_o


@triton.jit
def place_of(program, B, BB: tl.constexpr, DIRECTION: tl.constexpr):
    """A program's direction, whether it is reverse, and its first sequence in the batch and among all directions'.

    DIRECTION is "forward", "reverse" or "both", a launch for both directions. Then every tensor but the lengths has the
    reverse one's part after the other's, and so are the programs ordered.
    """
    if DIRECTION == "both":
        slices = tl.cdiv(B, BB)
        d, local_b = (program // slices).to(tl.int64), (program % slices).to(tl.int64) * BB
        return d, d == 1, local_b, d * B + local_b
    else:
        local_b = program.to(tl.int64) * BB
        return 0, DIRECTION == "reverse", local_b, local_b


@triton.jit
def span_of(p_offsets, p_lengths, d, local_b, T, B, backwards):
    """How many steps a program takes, what its rows count from, and the first row of the first step.

    There is a step: a loop over steps that might not run would have what is computed after it kept from before it.
    Packed sequences are sorted, so that the first of a program is its longest.
    """
    if p_offsets is None:
        tl.assume(T > 0)
        base = local_b + d * T * B
        return T, base, base + tl.where(backwards, T - 1, 0).to(tl.int64) * B
    else:
        steps, base = tl.load(p_lengths + local_b).to(tl.int32), local_b + d * tl.load(p_offsets + T)
        tl.assume(steps > 0)
        return steps, base, base + tl.load(p_offsets + tl.where(backwards, steps - 1, 0))


@triton.jit
def next_row(p_offsets, row, base, s, steps, B, backwards):
    """The first row of the s-th step taken, from that of the one before."""
    if p_offsets is None:
        return row + tl.where(backwards, -B, B)
    else:
        return base + tl.load(p_offsets + step_index(s, steps, backwards), s < steps, other=0)


@triton.jit
def inside(p_offsets, m, exists):
    """The elements of a step's rows that memory has: where rows are packed, those of rows that exist."""
    if p_offsets is None:
        return m
    else:
        return m & exists[:, None]


@triton.jit
def in_memory(p_offsets, p_lengths, length, m_b, m, s, steps, backwards):
    """The sequences and the elements whose rows of the s-th step taken memory has; none where all have been taken."""
    if p_offsets is None:
        return m_b & (steps > s), m & (steps > s)
    else:
        return at_step(p_offsets, p_lengths, length, m_b, m, s, steps, backwards)


@triton.jit
def at_step(p_offsets, p_lengths, length, m_b, m, s, steps, backwards):
    """Which sequences have the s-th step taken, and the elements of its rows; none where all steps have been taken."""
    exists = has_step(p_lengths, length, m_b, s, steps, backwards) & (steps > s)
    return exists, inside(p_offsets, m & (steps > s), exists)


@triton.jit
def step_index(s, T, backwards):
    """The t of the s-th step taken."""
    return tl.where(backwards, T - 1 - s, s)


@triton.jit
def load_lengths(p_lengths, first_b, o_b, m_b, T):
    """The number of steps of each sequence; 0 for rows beyond the batch, so that they never have a step."""
    if p_lengths is None:
        return tl.where(m_b, T, 0)
    else:
        return tl.load(p_lengths + first_b + o_b, m_b, other=0).to(tl.int32)


@triton.jit
def has_step(p_lengths, length, m_b, s, T, backwards):
    """Which sequences have the s-th step taken, s < T."""
    if p_lengths is None:
        return m_b
    else:
        return step_index(s, T, backwards) < length


@triton.jit
def input_rows(p_ids, first_b, o_b, m_b):
    """Where the inputs of a single step stand: at the sequences' own places, or at those that ids name in a table."""
    if p_ids is None:
        return first_b + o_b
    else:
        return tl.load(p_ids + first_b + o_b, m_b, other=0)


@triton.jit
def load_fresh(p_reset, row, o_b, m_b):
    """Which rows start afresh at their step."""
    if p_reset is None:
        return o_b < 0
    else:
        return tl.load(p_reset + row + o_b, m_b, other=0) != 0


@triton.jit
def unless(fresh, value):
    """`value`, with zeros in the rows that start afresh."""
    return tl.where(fresh[:, None], 0.0, value)


@triton.jit
def is_first(t, length, reverse):
    """Whether a sequence's step t is the first that forward takes, so that it starts from the initial state."""
    return t == tl.where(reverse, length - 1, 0)


@triton.jit
def load_previous(p_states, p_first, row_before, first_b, o_b, o_n, first, exists, m_n, WIDTH: tl.constexpr):
    """The states that a step started from: those of the step before it, or the initial ones where it is the first."""
    m_before, m_first = (exists & ~first)[:, None] & m_n[None, :], (exists & first)[:, None] & m_n[None, :]
    before = tl.load(tile_of(p_states, row_before, o_b, o_n, WIDTH), m_before, other=0.0)
    return tl.where(m_first, tl.load(tile_of(p_first, first_b, o_b, o_n, WIDTH), m_first, other=0.0), before)


@triton.jit
def meet(p_turn, arrivals, PROGRAMS: tl.constexpr):
    """Wait until all PROGRAMS programs of a group are here; what each has written, all can read.

    `arrivals` is how often the group will have been reached in all. Programs of a group must run at the same time: the
    launch is cooperative.
    """
    tl.debug_barrier()
    if PROGRAMS > 1:
        tl.atomic_add(p_turn, 1, sem="release")
        while tl.atomic_add(p_turn, 0, sem="acquire") < arrivals:
            pass
        tl.debug_barrier()


@triton.jit
def load_gates(p, m, H: tl.constexpr):
    """Four tiles that stand H apart; p points to the first."""
    i, f = tl.load(p, m, other=0.0), tl.load(p + H, m, other=0.0)
    return i, f, tl.load(p + 2 * H, m, other=0.0), tl.load(p + 3 * H, m, other=0.0)


@triton.jit
def store_gates(p, m, i, f, g, o, H: tl.constexpr):
    """Store what `load_gates` loads."""
    store_as(p, i, m)
    store_as(p + H, f, m)
    store_as(p + 2 * H, g, m)
    store_as(p + 3 * H, o, m)


@triton.jit
def copy_tiles(p_from, p_to, first_b, o_b, m_b, n_first, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """Copy this program's tiles of a state, each in its memory's dtype."""
    for n in range(n_first, WIDTH, PROGRAMS * BN):
        o_n = n + tl.arange(0, BN)
        m = m_b[:, None] & (o_n < WIDTH)[None, :]
        value = load_float(tile_of(p_from, first_b, o_b, o_n, WIDTH), m)
        store_as(tile_of(p_to, first_b, o_b, o_n, WIDTH), value, m)


@triton.jit
def finish_state(p_offsets, p_y, p_old, p_new, row, first_b, o_b, o_n, m, exists, h_next, P: tl.constexpr):
    """A step's h into y and into the next state; where a row has no such step, 0 and the old state."""
    there, old = exists[:, None], load_float(tile_of(p_old, first_b, o_b, o_n, P), m)
    store_as(tile_of(p_y, row, o_b, o_n, P), tl.where(there, h_next, 0.0), inside(p_offsets, m, exists))
    store_as(tile_of(p_new, first_b, o_b, o_n, P), tl.where(there, h_next, old), m)


@triton.jit
def add_back(
    p_da, p_dh, p_w, row, first_b, o_b, exists, fresh, n_first, K: tl.constexpr, WIDTH: tl.constexpr,
    CARRY: tl.constexpr, PROGRAMS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program's tiles of the gradient of the state before a step: K gradients of pre-activations times W_hh.

    It goes into `dh` (B, WIDTH), float32 scratch that this program alone uses, with CARRY on top of what is there. Rows
    without this step keep what they have.
    """
    for n in range(n_first, WIDTH, PROGRAMS * BN):
        o_n = n + tl.arange(0, BN)
        m, p = exists[:, None] & (o_n < WIDTH)[None, :], tile_of(p_dh, first_b, o_b, o_n, WIDTH)
        if CARRY:
            back = load_float(p, m)
        else:
            back = tl.zeros((o_b.shape[0], BN), tl.float32)
        back = add_product(back, p_da + row * K, o_b * K, exists, K, p_w, o_n, WIDTH, WIDTH, 1, BK, PRECISION)
        tl.store(p, unless(fresh, back), m)
    tl.debug_barrier()

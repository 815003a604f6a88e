"""A model's head and the draw in one: tokens from ``h W^T + b`` without the logits in memory.

A vocabulary of one tile (V <= 256) takes one launch. A larger one takes two: the first computes each tile's logits and
keeps of them what a draw needs, ``m_t`` and ``W_t``; the second draws a tile for each row and computes its logits once
more, by the same instructions on the same rows and columns and so to the same bits. Where a second computation costs
more than memory, for many rows, and where a filter must see the whole row, the first launch writes the logits too and
`fastrnn.kernels.sample` draws from them.

Products are added up in float32: of float32 exactly multiplied ("ieee", no TF32), of float16 and bfloat16 on tensor
cores. The tokens are those of `fastrnn.reference_sample` on the logits so computed; `logits` asks for these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .draw import (
    greedy_tile,
    greedy_token,
    mark_bad,
    pick_tile,
    pick_token,
    plain_logprob,
    row_largest,
    row_total,
    tempered_logprob,
    tile_statistics,
)
from .draw_math import (
    INFINITY,
    LARGEST_FLOAT,
    LOG2_E,
    NAN,
    SCALE_MIN,
    STATUS_EMPTY,
    STATUS_INFINITE,
    STATUS_NAN,
    STATUS_PARAMETER,
    TILE,
    log_total,
    random_words,
)
from .launch import Variant
from .sample import MAX_VOCABULARY, Results, draw_rows, mask_bytes, on_device, row_columns, shape_of, statistics_of


@triton.jit
def head_tile(p_h, p_w, p_b, o_row, o_column, rows, vocabulary, H, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [M, N] of rows ``o_row`` and ids ``o_column``: -inf beyond the vocabulary.

    Every launch that computes a tile does it here, on whole blocks of rows, so that equal tiles have equal bits.
    """
    m_row, m_column = o_row < rows, o_column < vocabulary
    x = tl.zeros((o_row.shape[0], o_column.shape[0]), tl.float32)
    for first in range(0, H, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < H
        h = tl.load(p_h + o_row.to(tl.int64)[:, None] * H + o_k[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)
        p_block = p_w + o_column.to(tl.int64)[None, :] * H + o_k[:, None]
        w = tl.load(p_block, mask=m_column[None, :] & m_k[:, None], other=0.0)
        x = tl.dot(h.to(w.dtype), w, x, input_precision=PRECISION)
    if p_b is not None:
        x = x + tl.load(p_b + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    return tl.where(m_column[None, :], x, -INFINITY)


@triton.jit
def allowed_logits(x, p_mask, o_column, vocabulary):
    """Logits as they are drawn from: -inf for what the mask (of all rows) forbids or what is no number."""
    x = tl.where(x < INFINITY, x, -INFINITY)
    if p_mask is not None:
        allowed = tl.load(p_mask + o_column, mask=o_column < vocabulary, other=0) != 0
        x = tl.where(allowed[None, :], x, -INFINITY)
    return x


@triton.jit
def drawn_scale(scale):
    """``(scale, good, greedy)``: scale is 1 where nothing is drawn with it."""
    greedy = scale == 0.0
    good = greedy | ((scale >= SCALE_MIN) & (scale <= LARGEST_FLOAT))
    return tl.where(good & (scale != 0.0), scale, 1.0), good, greedy


@triton.jit
def head_statistics_kernel(
    p_h, p_w, p_b, p_mask, p_scale, p_logits, p_tops, p_sums, rows, vocabulary, H,
    LOGPROBS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``m_t`` and ``W_t`` of a head's logits, and the logits themselves if p_logits is given.

    Owns: each program the statistics of a tile for BM rows; neighbours share the tile, and so its rows of W.
    Keeps: BM x 256 logits in registers.
    Moves: reads 256 rows of W and BM of h, writes 12 bytes a row and tile (24 with LOGPROBS).
    Syncs: none.
    Limits: V up to 2**24.
    """
    blocks = tl.cdiv(rows, BM)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    i_tile = tl.program_id(0) // blocks
    o_column = i_tile * TILE + tl.arange(0, TILE)
    m_row = o_row < rows
    scale, _, _ = drawn_scale(tl.load(p_scale + o_row, mask=m_row, other=1.0))
    given = head_tile(p_h, p_w, p_b, o_row, o_column, rows, vocabulary, H, BK, PRECISION)
    if p_logits is not None:
        p_block = p_logits + o_row.to(tl.int64)[:, None] * vocabulary + o_column[None, :]
        tl.store(p_block, given, mask=m_row[:, None] & (o_column < vocabulary)[None, :])
    tiles = tl.cdiv(vocabulary, 256)
    o = o_row.to(tl.int64) * (2 * tiles if LOGPROBS else tiles) + i_tile
    top, mass = tile_statistics(allowed_logits(given, p_mask, o_column, vocabulary), scale[:, None])
    tl.store(p_tops + o, mark_bad(top, given), mask=m_row)
    tl.store(p_sums + o, mass, mask=m_row)
    if LOGPROBS:
        top, mass = tile_statistics(tl.where(given < INFINITY, given, -INFINITY), LOG2_E)
        tl.store(p_tops + o + tiles, top, mask=m_row)
        tl.store(p_sums + o + tiles, mass, mask=m_row)


@triton.jit
def head_token_kernel(
    p_h, p_w, p_b, p_mask, p_scale, p_seed, p_sequence, p_step, p_token, p_logprob, p_tempered, p_margin, p_status,
    p_tops, p_sums, rows, vocabulary, H,
    LOGPROBS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LEVEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A token a row from the statistics of `head_statistics_kernel`, whose BM, BK and warps it must share.

    Owns: program b the results of row b.
    Keeps: the logits of one tile for the rows of b's block, in registers.
    Moves: reads the statistics of a row, 256 rows of W and BM of h.
    Syncs: none.
    Limits: V up to 2**24.
    """
    i_row = tl.program_id(0)
    scale, good, greedy = drawn_scale(tl.load(p_scale + i_row))
    tiles = tl.cdiv(vocabulary, 256)
    p_tops += i_row.to(tl.int64) * (2 * tiles if LOGPROBS else tiles)
    p_sums += i_row.to(tl.int64) * (2 * tiles if LOGPROBS else tiles)
    largest, status = row_largest(p_tops, tiles, LEVEL)
    status = tl.where(good, status, STATUS_PARAMETER)
    tl.store(p_status + i_row, status)
    token = tl.full((), 0, tl.int32)
    plain, tempered, margin = tl.full((), NAN, tl.float64), tl.full((), NAN, tl.float64), tl.full((), NAN, tl.float64)
    if status == 0:
        total = row_total(p_tops, p_sums, tiles, largest, scale, LEVEL)
        seed, sequence, step = tl.load(p_seed + i_row), tl.load(p_sequence + i_row), tl.load(p_step + i_row)
        r_tile, r_token = random_words(seed, sequence, step, tl.zeros((1,), tl.int64))
        tile, tile_margin = pick_tile(p_tops, p_sums, tiles, largest, scale, total, r_tile, LEVEL)
        first, second = greedy_tile(p_tops, tiles, largest, LEVEL)
        i_tile = tl.where(greedy, first, tl.sum(tile))
        o_row = (i_row // BM) * BM + tl.arange(0, BM)
        o_column = i_tile * TILE + tl.arange(0, TILE)
        given = head_tile(p_h, p_w, p_b, o_row, o_column, rows, vocabulary, H, BK, PRECISION)
        mine = (o_row == i_row)[:, None]
        given = tl.reshape(tl.max(tl.where(mine, given, -INFINITY), axis=0), (1, TILE))
        o = i_tile * TILE + tl.arange(0, TILE)[None, :]
        x = allowed_logits(given, p_mask, o_column, vocabulary)
        i_drawn = i_tile + tl.arange(0, 1)
        index, drawn_margin = pick_token(x, tl.load(p_tops + i_drawn), tl.load(p_sums + i_drawn), scale, r_token)
        best, lead = greedy_token(x, o, largest + tl.zeros((1,), tl.float32), second)
        token = tl.sum(tl.where(greedy, best, i_drawn * TILE + index))
        margin = tl.sum(tl.where(greedy, lead, tl.minimum(tile_margin, drawn_margin)))
        if LOGPROBS:
            value = tl.max(tl.where(o == token, given, -INFINITY))
            tempered = tempered_logprob(value, largest, total, scale, greedy, tiles)
            plain = plain_logprob(value, p_tops + tiles, p_sums + tiles, tiles, LEVEL)
    tl.store(p_token + i_row, token.to(tl.int64))
    if LOGPROBS:
        tl.store(p_logprob + i_row, plain.to(tl.float32))
        tl.store(p_tempered + i_row, tempered.to(tl.float32))
        tl.store(p_margin + i_row, margin.to(tl.float32))


@triton.jit
def head_draw_kernel(
    p_h, p_w, p_b, p_mask, p_scale, p_seed, p_sequence, p_step, p_logits,
    p_token, p_logprob, p_tempered, p_margin, p_status, rows, vocabulary, H,
    LOGPROBS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A token a row from a vocabulary of one tile.

    Owns: program m the results of rows m * BM .. (m + 1) * BM - 1.
    Keeps: BM x BN logits in registers.
    Moves: reads W once and BM rows of h, writes the results (and the logits if p_logits is given).
    Syncs: none.
    Limits: V up to BN, a power of two up to 256.
    """
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_column = tl.arange(0, BN)
    m_row = o_row < rows
    scale, good, greedy = drawn_scale(tl.load(p_scale + o_row, mask=m_row, other=1.0))
    given = head_tile(p_h, p_w, p_b, o_row, o_column, rows, vocabulary, H, BK, PRECISION)
    if p_logits is not None:
        p_block = p_logits + o_row.to(tl.int64)[:, None] * vocabulary + o_column[None, :]
        tl.store(p_block, given, mask=m_row[:, None] & (o_column < vocabulary)[None, :])
    x = allowed_logits(given, p_mask, o_column, vocabulary)
    largest, total = tile_statistics(x, scale[:, None])
    marked = mark_bad(largest, given)
    status = tl.where(largest == -INFINITY, STATUS_EMPTY, 0)
    status = tl.where(marked == INFINITY, STATUS_INFINITE, tl.where(marked != marked, STATUS_NAN, status))
    status = tl.where(good, status, STATUS_PARAMETER)
    seed = tl.load(p_seed + o_row, mask=m_row, other=0)
    sequence = tl.load(p_sequence + o_row, mask=m_row, other=0)
    step = tl.load(p_step + o_row, mask=m_row, other=0)
    _, r_token = random_words(seed, sequence, step, tl.zeros((BM,), tl.int64))
    index, margin = pick_token(x, largest, total, scale[:, None], r_token)
    best, lead = greedy_token(x, o_column[None, :], largest, tl.full((BM,), -INFINITY, tl.float32))
    drawn = status == 0
    token = tl.where(drawn, tl.where(greedy, best, index), 0)
    tl.store(p_token + o_row, token.to(tl.int64), mask=m_row)
    tl.store(p_status + o_row, status, mask=m_row)
    if LOGPROBS:
        value = tl.max(tl.where(o_column[None, :] == token[:, None], given, -INFINITY), axis=1)
        tempered = tempered_logprob(value, largest, total, scale, greedy, 1)
        all_x = tl.where(given < INFINITY, given, -INFINITY)
        top, all_mass = tile_statistics(all_x, LOG2_E)
        plain = value.to(tl.float64) - top.to(tl.float64) - log_total(all_mass, 1)
        margin = tl.where(greedy, lead, margin)
        tl.store(p_logprob + o_row, tl.where(drawn, plain, NAN).to(tl.float32), mask=m_row)
        tl.store(p_tempered + o_row, tl.where(drawn, tempered, NAN).to(tl.float32), mask=m_row)
        tl.store(p_margin + o_row, tl.where(drawn, margin, NAN).to(tl.float32), mask=m_row)


# --- launching ------------------------------------------------------------------------------------------------------


class HeadShape(NamedTuple):
    """Rows, ids and units of the state in a block, and warps."""

    bm: int
    bn: int
    bk: int
    num_warps: int


def head_shape(rows: int, vocabulary: int, dtype: torch.dtype) -> HeadShape:
    """16 rows, the least that tensor cores take, so that a second computation of a tile for one row wastes little."""
    bn = min(256, max(16, triton.next_power_of_2(vocabulary)))
    return HeadShape(16, bn, 16 if dtype == torch.float32 else 32, 8 if bn == 256 else 4)


def recomputes(rows: int) -> bool:
    """Whether a tile is computed again for each row rather than all logits written: 256 H products a row against V
    logits in memory. An estimate, from no measurement: the blocks of few rows leave the GPU idle anyway."""
    return rows <= 64


def head_draw(
    h: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, seed: Tensor, sequence: Tensor, step: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None, mask: Tensor | None = None, logprobs: bool = False,
    logits: Tensor | None = None, recompute: bool | None = None,
) -> Results:  # fmt: skip
    """A token for each row of ``h (B, H)`` from the logits ``h weight^T + bias``, weight (V, H), bias (V,) or None.

    The other arguments and the results are those of the op ``sample``; filters: its (top_k, top_p, min_p), None where
    none is on for any row; mask: (1, V). h is rounded to the dtype of weight: float32, float16 or bfloat16. logits:
    where the logits are written, (B, V) float32, or None. recompute: whether a drawn tile's logits are computed again
    rather than read back, where there is a choice; None: `recomputes` chooses.

    Raises RuntimeError for shapes, dtypes or devices that do not fit.
    """
    (rows, hidden), vocabulary = h.shape, weight.shape[0]
    if weight.shape != (vocabulary, hidden) or weight.dtype not in _TYPES or not 1 <= vocabulary <= MAX_VOCABULARY:
        raise RuntimeError(
            f"head_draw: weight must be (V, H) = (1 to {MAX_VOCABULARY}, {hidden}) because h is {tuple(h.shape)}, in "
            f"float32, float16 or bfloat16, got {tuple(weight.shape)} {weight.dtype}"
        )
    if logits is not None and (logits.shape != (rows, vocabulary) or not logits.is_contiguous()):
        raise RuntimeError(f"head_draw: logits must be dense ({rows}, {vocabulary}), got {tuple(logits.shape)}")
    named = dict(scale=scale, seed=seed, sequence=sequence, step=step)
    scale, *names = row_columns("head_draw", h.device, rows, named)
    mask = mask_bytes("head_draw", h.device, 1, vocabulary, mask)
    results = Results.of(h, rows, logprobs)
    if rows == 0:
        return results
    shape = head_shape(rows, vocabulary, weight.dtype)
    head = (h.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous(), mask, scale)
    sizes = (rows, vocabulary, hidden)
    options = dict(
        LOGPROBS=logprobs, BM=shape.bm, BK=shape.bk, PRECISION="ieee", num_warps=shape.num_warps, num_stages=3,
        enable_fp_fusion=False,
    )  # fmt: skip
    blocks = triton.cdiv(rows, shape.bm)
    with on_device(h.device):
        if vocabulary <= 256 and filters is None:
            head_draw_kernel[(blocks,)](*head, *names, logits, *results, *sizes, BN=shape.bn, **options)
            return results
        statistics = statistics_of(h, rows, vocabulary, logprobs)
        again = filters is None and (recomputes(rows) if recompute is None else recompute)
        if not again and logits is None:
            logits = h.new_empty((rows, vocabulary), dtype=torch.float32)
        head_statistics_kernel[(blocks * triton.cdiv(vocabulary, 256),)](*head, logits, *statistics, *sizes, **options)
        if again:
            level = shape_of(vocabulary, 1).level
            head_token_kernel[(rows,)](*head, *names, *results, *statistics, *sizes, LEVEL=level, **options)
        else:
            columns = [scale, *(filters or _no_filters(scale)), *names]
            draw_rows(logits, mask, columns, statistics, results, 1, True, logprobs)
    return results


def _no_filters(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    return zeros, zeros, torch.full_like(scale, float("inf"))


# --- what is compiled -----------------------------------------------------------------------------------------------

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_SIGNATURE = dict(
    p_mask="*u8", p_scale="*fp32", p_seed="*i64", p_sequence="*i64", p_step="*i64", p_logits="*fp32", p_token="*i64",
    p_logprob="*fp32", p_tempered="*fp32", p_margin="*fp32", p_status="*i32", p_tops="*fp32", p_sums="*i64",
    rows="i32", vocabulary="i32", H="i32",
)  # fmt: skip


def _variant(fn, dtype: torch.dtype, vocabulary: int, logprobs: bool, store: bool) -> Variant:
    shape = head_shape(1, vocabulary, dtype)
    known = dict(LOGPROBS=logprobs, BM=shape.bm, BN=shape.bn, BK=shape.bk, PRECISION="ieee")
    known |= {"LEVEL": shape_of(vocabulary, 1).level} | ({} if store else {"p_logits": None, "p_mask": None})
    known = {name: value for name, value in known.items() if name in fn.arg_names}
    types = _SIGNATURE | dict.fromkeys(("p_h", "p_w", "p_b"), _TYPES[dtype])
    signature = {name: types[name] for name in fn.arg_names if name not in known}
    words = [str(dtype).removeprefix("torch."), f"V{vocabulary}", *["logprobs"] * logprobs, *["logits"] * store]
    aligned = (*(name for name in signature if name.startswith("p_")), "H")
    name = f"head/{fn.__name__.removesuffix('_kernel')}/{'/'.join(words)}"
    return Variant(name, fn, signature, known, shape.num_warps, 3, aligned)


def variants() -> list[Variant]:
    """Every kernel in every dtype and block, its options all on or all off."""
    found = []
    for dtype in _TYPES:
        found += [_variant(head_draw_kernel, dtype, V, V == 65, V == 65) for V in (65, 256)]
        found += [_variant(fn, dtype, 10007, True, False) for fn in (head_statistics_kernel, head_token_kernel)]
        found += [_variant(head_statistics_kernel, dtype, 10007, False, True)]
    ones = _variant(head_statistics_kernel, torch.float32, 10007, False, False)
    return [*found, ones._replace(name="head/head_statistics/one", constexprs=ones.constexprs | dict(rows=1, H=1))]

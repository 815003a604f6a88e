"""The parts of a draw that kernels put together: a row's tiles, the level above them, look-ups, and votes.

What the parts pass to each other lies in memory, a few bytes a tile: ``m_t`` (float32) and ``W_t`` (int64) of the
logits as they are drawn from, and behind them, where log-probabilities are wanted, those of all logits at T = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .draw_math import (
    INFINITY,
    LN_2,
    LOG2_E,
    NAN,
    STATUS_EMPTY,
    STATUS_INFINITE,
    STATUS_NAN,
    TILE,
    boundary_distance,
    exp_mass,
    log_total,
    look_up,
    mulhi64,
    row_mass,
)
from .filter import load_logits, survives

VOTES = tl.constexpr(32)  # draws of a vote that are compared with as many at once


# --- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_statistics(x, scale):
    """``m_t`` and ``W_t`` of tiles ``x [T, N]``, N <= 256, scale a number or (T, 1); NaN and +inf must be -inf here."""
    top = tl.max(x, axis=1)
    return top, tl.sum(exp_mass((x - top[:, None]) * scale), axis=1)


@triton.jit
def mark_bad(top, given):
    """``m_t`` as it is kept: NaN where a tile's logits ``given [T, N]`` have a NaN, or +inf where they have one."""
    worst = tl.max(tl.where(given != given, 2, tl.where(given == INFINITY, 1, 0)), axis=1)
    return tl.where(worst == 2, NAN, tl.where(worst == 1, INFINITY, top))


@triton.jit
def keep_statistics(p_row, p_mask, vocabulary, begin, end, tiles, filtered, cut, p_tops, p_sums,
                    LOGPROBS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Writes ``m_t`` and ``W_t`` of tiles begin .. end-1, and behind them those of all logits at T = 1."""
    scale = cut[3]
    for first in range(begin, end, TILES):
        i_tile = first + tl.arange(0, TILES)
        m_tile = i_tile < tiles
        o = i_tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x, given = load_logits(p_row, p_mask, o, vocabulary)
        if filtered:
            x = tl.where(survives(x, o, cut), x, -INFINITY)
        top, mass = tile_statistics(x, scale)
        tl.store(p_tops + i_tile, mark_bad(top, given), mask=m_tile)
        tl.store(p_sums + i_tile, mass, mask=m_tile)
        if LOGPROBS:
            top, mass = tile_statistics(tl.where(given < INFINITY, given, -INFINITY), LOG2_E)
            tl.store(p_tops + tiles + i_tile, top, mask=m_tile)
            tl.store(p_sums + tiles + i_tile, mass, mask=m_tile)


# --- the row --------------------------------------------------------------------------------------------------------


@triton.jit
def row_largest(p_tops, tiles, LEVEL: tl.constexpr):
    """``M`` of a row, and its status as far as the logits make it."""
    top = tl.full((LEVEL,), -INFINITY, tl.float32)
    worst = tl.zeros((LEVEL,), tl.int32)
    for first in range(0, tiles, LEVEL):
        i_tile = first + tl.arange(0, LEVEL)
        m = tl.load(p_tops + i_tile, mask=i_tile < tiles, other=-INFINITY)
        worst = tl.maximum(worst, tl.where(m != m, 2, tl.where(m == INFINITY, 1, 0)))
        top = tl.maximum(top, tl.where(m < INFINITY, m, -INFINITY))
    largest, bad = tl.max(top), tl.max(worst)
    empty = tl.where(largest == -INFINITY, STATUS_EMPTY, 0)
    return largest, tl.where(bad == 2, STATUS_NAN, tl.where(bad == 1, STATUS_INFINITE, empty))


@triton.jit
def level_masses(p_tops, p_sums, i_tile, tiles, largest, scale):
    """``U_t`` of tiles ``i_tile``, 0 beyond the last."""
    m_tile = i_tile < tiles
    top = tl.load(p_tops + i_tile, mask=m_tile, other=-INFINITY)
    return row_mass(tl.load(p_sums + i_tile, mask=m_tile, other=0), (top - largest) * scale, tiles)


@triton.jit
def row_total(p_tops, p_sums, tiles, largest, scale, LEVEL: tl.constexpr):
    """``U`` of a row."""
    masses = tl.zeros((LEVEL,), tl.int64)
    for first in range(0, tiles, LEVEL):
        masses += level_masses(p_tops, p_sums, first + tl.arange(0, LEVEL), tiles, largest, scale)
    return tl.sum(masses)


@triton.jit
def pick_tile(p_tops, p_sums, tiles, largest, scale, total, word, LEVEL: tl.constexpr):
    """The tiles [D] that words ``r_tile`` [D] draw, and the margins of these draws."""
    threshold = mulhi64(word, total)
    index = tl.zeros(threshold.shape, tl.int32)
    low = tl.zeros(threshold.shape, tl.int64)
    high = tl.full(threshold.shape, 0x7FFFFFFFFFFFFFFF, tl.int64)
    before = tl.full((), 0, tl.int64)
    for first in range(0, tiles, LEVEL):
        mass = level_masses(p_tops, p_sums, first + tl.arange(0, LEVEL), tiles, largest, scale)
        count, below, above = look_up((before + tl.cumsum(mass, 0))[None, :], threshold)
        index += count
        low, high = tl.maximum(low, below), tl.minimum(high, above)
        before += tl.sum(mass)
    return index, boundary_distance(low, high, threshold, total)


@triton.jit
def pick_token(x, top, total, scale, word):
    """The places [D] in tiles ``x [D, N]`` of statistics top and total that words ``r_token`` [D] draw, and margins."""
    threshold = mulhi64(word, total)
    index, low, high = look_up(tl.cumsum(exp_mass((x - top[:, None]) * scale), 1), threshold)
    return index, boundary_distance(low, high, threshold, total)


@triton.jit
def draw_tokens(p_row, p_mask, vocabulary, filtered, cut, p_tops, p_sums, tiles, largest, total, words,
                LEVEL: tl.constexpr):  # fmt: skip
    """The tokens that the words ``(r_tile [D], r_token [D])`` draw from a row, and their margins."""
    scale = cut[3]
    i_tile, margin = pick_tile(p_tops, p_sums, tiles, largest, scale, total, words[0], LEVEL)
    o = i_tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x, _ = load_logits(p_row, p_mask, o, vocabulary)
    if filtered:
        x = tl.where(survives(x, o, cut), x, -INFINITY)
    index, token_margin = pick_token(x, tl.load(p_tops + i_tile), tl.load(p_sums + i_tile), scale, words[1])
    return i_tile * TILE + index, tl.minimum(margin, token_margin)


@triton.jit
def greedy_tile(p_tops, tiles, largest, LEVEL: tl.constexpr):
    """The first tile that has a row's largest logit, and the largest logit of all other tiles."""
    best = tiles
    for first in range(0, tiles, LEVEL):
        i_tile = first + tl.arange(0, LEVEL)
        m = tl.load(p_tops + i_tile, mask=i_tile < tiles, other=-INFINITY)
        best = tl.minimum(best, tl.min(tl.where(m == largest, i_tile, tiles)))
    second = tl.full((LEVEL,), -INFINITY, tl.float32)
    for first in range(0, tiles, LEVEL):
        i_tile = first + tl.arange(0, LEVEL)
        m = tl.load(p_tops + i_tile, mask=i_tile < tiles, other=-INFINITY)
        second = tl.maximum(second, tl.where(i_tile == best, -INFINITY, m))
    return best, tl.max(second)


@triton.jit
def greedy_token(x, o, largest, second):
    """The first id [D] of a tile ``x [D, N]``, ids o, that has logit ``largest [D]``, and how far below it the largest
    of the others is, ``second [D]`` outside this tile among them (+inf if there is none)."""
    token = tl.min(tl.where(x == largest[:, None], o, 0x7FFFFFFF), axis=1)
    runner_up = tl.maximum(second, tl.max(tl.where(o == token[:, None], -INFINITY, x), axis=1))
    return token, largest.to(tl.float64) - runner_up.to(tl.float64)


@triton.jit
def tempered_logprob(value, largest, total, scale, greedy, tiles):
    """Natural logarithm, float64, of the probability with which a logit ``value`` was drawn; 0 for greedy."""
    gap = (value.to(tl.float64) - largest.to(tl.float64)) * scale.to(tl.float64)
    return tl.where(greedy, 0.0, LN_2 * gap - log_total(total, tiles))


@triton.jit
def plain_logprob(value, p_tops, p_sums, tiles, LEVEL: tl.constexpr):
    """Natural logarithm, float64, of the probability at T = 1 of a logit ``value``, from statistics of all logits."""
    top, _ = row_largest(p_tops, tiles, LEVEL)
    total = row_total(p_tops, p_sums, tiles, top, LOG2_E, LEVEL)
    return value.to(tl.float64) - top.to(tl.float64) - log_total(total, tiles)


# --- votes ----------------------------------------------------------------------------------------------------------


@triton.jit
def votes_for(p_tokens, token, mode_of):
    """How many of ``mode_of`` draws are each of ``token`` [VOTES]."""
    count = tl.zeros((VOTES,), tl.int32)
    for first in range(0, mode_of, VOTES):
        n = first + tl.arange(0, VOTES)
        other = tl.load(p_tokens + n, mask=n < mode_of, other=-1)
        count += tl.sum((token[:, None] == other[None, :]).to(tl.int32), axis=1)
    return count


@triton.jit
def vote(p_tokens, p_margins, mode_of):
    """The token most often drawn, the lowest on ties, and the margin of that result.

    A lead of L over the second token lasts until ceil(L / 2) draws (at least one) have changed: the margin is that of
    the so-many-th weakest draw.
    """
    best = tl.full((), 0, tl.int64)  # votes, then the complement of the token, so that the lowest wins
    for first in range(0, mode_of, VOTES):
        n = first + tl.arange(0, VOTES)
        token = tl.load(p_tokens + n, mask=n < mode_of, other=-2)
        score = (votes_for(p_tokens, token, mode_of).to(tl.int64) << 32) | (0x7FFFFFFF - token)
        best = tl.maximum(best, tl.max(tl.where(n < mode_of, score, 0)))
    winner = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    second = tl.full((), 0, tl.int32)
    for first in range(0, mode_of, VOTES):
        n = first + tl.arange(0, VOTES)
        token = tl.load(p_tokens + n, mask=n < mode_of, other=-2)
        rival = (n < mode_of) & (token != winner)
        second = tl.maximum(second, tl.max(tl.where(rival, votes_for(p_tokens, token, mode_of), 0)))
    flips = tl.maximum(((best >> 32).to(tl.int32) - second + 1) // 2, 1)
    margin = tl.full((), -INFINITY, tl.float64)
    for first in range(0, mode_of, VOTES):
        n = first + tl.arange(0, VOTES)
        mine = tl.load(p_margins + n, mask=n < mode_of, other=0.0)
        rank = tl.zeros((VOTES,), tl.int32)
        for other_first in range(0, mode_of, VOTES):
            k = other_first + tl.arange(0, VOTES)
            other = tl.load(p_margins + k, mask=k < mode_of, other=INFINITY)
            ahead = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & (k[None, :] < n[:, None]))
            rank += tl.sum((ahead & (k < mode_of)[None, :]).to(tl.int32), axis=1)
        margin = tl.maximum(margin, tl.max(tl.where((rank == flips - 1) & (n < mode_of), mine, -INFINITY)))
    return winner, margin

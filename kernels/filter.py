"""What top_k, top_p and min_p leave of a row of logits, exactly as `fastrnn.reference_sample` defines it.

Survivors in (value, lowest id) order are a prefix, so that a selection is its last member: a key in the order of the
values, and among equal keys the last id. The key is found two bits at a time from sums over the row, which need no
sorting, no memory but the logits, and come out the same in any order of addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .draw_math import INFINITY, TOP_P_SHIFT, exp_mass, mulhi64, order_key

LOWEST_KEY = tl.constexpr(-(2**31))  # below every float's
KEY_OFFSET = tl.constexpr(2**31)
DIGITS = tl.constexpr(16)  # of two bits in a key


@triton.jit
def load_logits(p_row, p_mask, o, vocabulary):
    """``(x, given)``: a row's logits at ids ``o`` in float32, and as drawn from: -inf for what is masked or no number.

    Ids beyond the vocabulary are -inf in both.
    """
    inside = o < vocabulary
    given = tl.load(p_row + o, mask=inside, other=-INFINITY).to(tl.float32)
    x = tl.where(given < INFINITY, given, -INFINITY)
    if p_mask is not None:
        x = tl.where(tl.load(p_mask + o, mask=inside, other=0) != 0, x, -INFINITY)
    return x, given


@triton.jit
def survives(x, o, cut):
    """Whether logits ``x`` of ids ``o`` survive ``cut = (key, id, largest, scale, min_p)``."""
    cut_key, cut_id, largest, scale, min_p = cut
    key = order_key(x)
    ahead = (key > cut_key) | ((key == cut_key) & (o <= cut_id))
    return ahead & (-((x - largest) * scale) <= min_p)


@triton.jit
def weigh(p_row, p_mask, o, vocabulary, cut, by_mass):
    """Keys, and weights of the survivors of ``cut``: 1, or ``by_mass`` the mass that top_p counts; 0 for others."""
    cut_key, cut_id, largest, scale = cut
    x, _ = load_logits(p_row, p_mask, o, vocabulary)
    key = order_key(x)
    ahead = (key > cut_key) | ((key == cut_key) & (o <= cut_id))
    weight = tl.full(x.shape, 1, tl.int64)
    if by_mass:
        weight = exp_mass((x - largest) * scale) >> TOP_P_SHIFT
    return key, tl.where(ahead & (x > -INFINITY), weight, 0)


@triton.jit
def key_reaching(p_row, p_mask, vocabulary, cut, target, by_mass, BLOCK: tl.constexpr):
    """The largest key from which on the weights reach ``target``."""
    found = tl.full((), 0, tl.int64)  # the key plus 2**31, bits still to be found 0
    for digit in range(DIGITS):
        step = tl.full((), 1, tl.int64) << (2 * (DIGITS - 1 - digit))
        one = tl.zeros((BLOCK,), tl.int64)
        two = tl.zeros((BLOCK,), tl.int64)
        three = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, vocabulary, BLOCK):
            key, weight = weigh(p_row, p_mask, first + tl.arange(0, BLOCK), vocabulary, cut, by_mass)
            rest = key.to(tl.int64) + KEY_OFFSET - found
            one += tl.where(rest >= step, weight, 0)
            two += tl.where(rest >= 2 * step, weight, 0)
            three += tl.where(rest >= 3 * step, weight, 0)
        reached = (tl.sum(one) >= target).to(tl.int64) + (tl.sum(two) >= target).to(tl.int64)
        found += step * (reached + (tl.sum(three) >= target).to(tl.int64))
    return (found - KEY_OFFSET).to(tl.int32)


@triton.jit
def id_reaching(p_row, p_mask, vocabulary, cut, last_key, target, by_mass, BLOCK: tl.constexpr):
    """The lowest id up to which those of key ``last_key``, with all of larger keys, reach ``target``."""
    above = tl.zeros((BLOCK,), tl.int64)
    each = tl.full((), 1, tl.int64)  # equal keys have equal weights
    for first in range(0, vocabulary, BLOCK):
        key, weight = weigh(p_row, p_mask, first + tl.arange(0, BLOCK), vocabulary, cut, by_mass)
        above += tl.where(key > last_key, weight, 0)
        each = tl.maximum(each, tl.max(tl.where(key == last_key, weight, 0)))
    ties = (target - tl.sum(above) + each - 1) // each
    seen = tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        o = first + tl.arange(0, BLOCK)
        key, weight = weigh(p_row, p_mask, o, vocabulary, cut, by_mass)
        tie = ((key == last_key) & (weight > 0)).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        last = tl.maximum(last, tl.max(tl.where((tie > 0) & (rank <= ties), o, -1)))
        seen += tl.sum(tie)
    return last


@triton.jit
def narrow(p_row, p_mask, vocabulary, cut_key, cut_id, largest, scale, amount, by_mass, BLOCK: tl.constexpr):
    """The cut (key, id) narrowed to the first ``amount`` survivors, or ``by_mass`` to those whose mass reaches the
    share ``amount`` (in units of 2**-63) of the mass of all."""
    cut = (cut_key, cut_id, largest, scale)
    weights = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocabulary, BLOCK):
        weights += weigh(p_row, p_mask, first + tl.arange(0, BLOCK), vocabulary, cut, by_mass)[1]
    total = tl.sum(weights)
    target = amount
    if by_mass:
        share = amount.to(tl.uint64)
        target = mulhi64(share, total * 2) + (share * (total * 2).to(tl.uint64) != 0).to(tl.int64)
    if target <= total:
        cut_key = key_reaching(p_row, p_mask, vocabulary, cut, target, by_mass, BLOCK)
        cut_id = id_reaching(p_row, p_mask, vocabulary, cut, cut_key, target, by_mass, BLOCK)
    return cut_key, cut_id


@triton.jit
def filter_row(p_row, p_mask, vocabulary, scale, top_k, top_p, BLOCK: tl.constexpr):
    """``(key, id, largest)``: the cut that top_k and top_p make, and the row's largest logit, which min_p needs."""
    largest = tl.full((BLOCK,), -INFINITY, tl.float32)
    for first in range(0, vocabulary, BLOCK):
        largest = tl.maximum(largest, load_logits(p_row, p_mask, first + tl.arange(0, BLOCK), vocabulary)[0])
    top = tl.max(largest)
    cut_key = tl.full((), LOWEST_KEY, tl.int32)
    cut_id = tl.full((), -1, tl.int32)
    for selection in range(2):  # a loop, so that the code of a selection is there once
        amount = tl.where(selection == 0, top_k, top_p)
        if amount > 0:
            cut_key, cut_id = narrow(
                p_row, p_mask, vocabulary, cut_key, cut_id, top, scale, amount, selection == 1, BLOCK
            )
    return cut_key, cut_id, top

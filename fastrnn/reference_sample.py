"""The definition of a draw in plain PyTorch: what every backend computes, bit for bit, on equal float32 logits.

Notation: ``x (B, V)`` float32 logits, ``c = log2(e) / T`` the row's float32 scale (0: greedy), id order = token order.

1. **Integer exponential.** For ``z <= 0``: ``k = floor(z)``, ``f = z - k`` (float32), ``q = P(f)`` clamped to [1, 2),
   ``P`` the float32 polynomial of :data:`EXP2_COEFFICIENTS` evaluated by Horner's rule with fused multiply-adds.
   ``E(z) = (m24 << 31) >> min(-k, 63)`` with ``m24`` the 24-bit significand of ``q``; ``E(0) = 2**54``.
2. **Tiles.** Tile ``t`` holds ids ``256 t .. 256 t + 255``. ``m_t = max x_i``, ``w_i = E((x_i - m_t) * c)`` (subtract,
   then multiply, each rounded to float32), ``W_t = sum w_i``.
3. **Row.** ``M = max m_t``, ``k_t`` and ``m24_t`` from ``(m_t - M) * c``,
   ``U_t = (((W_t >> 24) * m24_t) >> 16) >> min(-k_t, 63)``, ``U = sum U_t``. One tile: ``U = W_0``.
4. **Randomness.** Philox4x32-10 (Salmon et al., SC 2011), key ``(seed_lo, seed_hi)``, counter
   ``(draw, step, sequence_lo, sequence_hi)``; ``r_tile = w0 + 2**32 w1``, ``r_token = w2 + 2**32 w3``.
5. **Draw.** The tile is the first whose prefix sum of ``U_t`` exceeds ``floor(r_tile * U / 2**64)``, the token the
   first in it whose prefix sum of ``w_i`` exceeds ``floor(r_token * W_tile / 2**64)``.
6. **Filters**, before step 2, in this order, on the survivors sorted by (value, lowest id), where ``x_max`` is the
   largest allowed logit: top_k keeps the first k; top_p keeps the shortest prefix whose sum of
   ``E((x_i - x_max) * c) >> 16`` reaches ``ceil(top_p * total)``, ``total`` being that sum over the survivors of
   top_k and ``top_p`` a multiple of ``2**-63``; min_p keeps ``(x_max - x_i) * c <= min_p``, the argument being
   ``-log2`` of the user's min_p. The shift by 16 keeps every sum below ``2**63`` up to ``V = 2**24``.
7. **Greedy** (``c = 0``): the largest allowed logit, lowest id on ties; no filter can remove it.
8. **mode_of = N**: the token most often drawn in draws 0 .. N-1, lowest id on ties.

-0.0 equals 0.0; an id that is masked or -inf is never drawn. A row that cannot be sampled gets a nonzero status, token
0 and NaN floats, and touches no other row.

Over every float32 z in [-64, 0], measured once: E never decreases with z and is within ``1 + 2**(z + 32)`` of
``2**(z + 54)``; ``m24 * 2**(k - 23)`` is within a relative 1.561e-7 = 2**-22.6 of ``2**z``.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 256
MAX_VOCABULARY = 1 << 24
# Minimax fit of 2**f on [0, 1] in relative error with P(0) = 1, each coefficient rounded to float32 in turn.
EXP2_COEFFICIENTS = (
    float.fromhex("0x1.0000000000000p+0"),
    float.fromhex("0x1.62e4ba0000000p-1"),
    float.fromhex("0x1.ebdb6a0000000p-3"),
    float.fromhex("0x1.c91c100000000p-5"),
    float.fromhex("0x1.277c1c0000000p-7"),
    float.fromhex("0x1.e969120000000p-10"),
)
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
TILE_UNIT_BITS = 54  # E(0) = 2**54
ROW_UNIT_BITS = 37  # U_t of one token at z = 0: ((2**54 >> 24) * 2**23) >> 16
TOP_P_SHIFT = 16
SCALE_MIN = 2.0**-126  # smallest normal float32

STATUS_OK = 0
STATUS_NAN = 1  # a NaN among the row's logits, masked ones included
STATUS_INFINITE = 2  # a +inf among them: the softmax is undefined
STATUS_EMPTY = 3  # every logit is masked or -inf
STATUS_PARAMETER = 4  # scale, top_k, top_p or min_p outside its range

_LOW32 = 0xFFFFFFFF
_BLOCK = 1 << 20  # elements of the logits that are held in float64 at once


def fma32(a: Tensor, b: Tensor, c: float) -> Tensor:
    """float32 ``a * b + c`` with one rounding, ``c`` a float32 number; the result must be normal or zero.

    The product of two float32 is exact in float64. The float64 sum is made round-to-odd with its exact error (Knuth's
    TwoSum), after which rounding it to float32 is rounding the exact value (Boldo and Melquiond, 2008).
    """
    product = a.double() * b.double()
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


def exp2_parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """``(m24, -k)`` of ``2**z`` for float32 ``z <= 0`` as int64; ``z`` below -63 and NaN count as -63."""
    z = torch.where(z > -63.0, z, -63.0)
    k = torch.floor(z)
    f = z - k
    q = torch.full_like(f, EXP2_COEFFICIENTS[-1])
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        q = fma32(q, f, coefficient)
    q = q.clamp(1.0, 2.0 - 2.0**-23)
    return q.view(torch.int32).to(torch.int64) - 0x3F000000, -k.to(torch.int64)


def exp_mass(z: Tensor) -> Tensor:
    """``E(z)``: ``2**z`` as an int64 in units of ``2**-54``, float32 ``z <= 0``, zero below -54."""
    significand, shift = exp2_parts(z)
    return (significand << 31) >> shift


def mulhi64(a: Tensor, b: Tensor) -> Tensor:
    """High 64 bits of the product of two int64 tensors read as uint64."""
    a_low, a_high = a & _LOW32, (a >> 32) & _LOW32
    b_low, b_high = b & _LOW32, (b >> 32) & _LOW32
    middle = a_high * b_low + (((a_low * b_low) >> 32) & _LOW32)
    other = a_low * b_high + (middle & _LOW32)
    return a_high * b_high + ((middle >> 32) & _LOW32) + ((other >> 32) & _LOW32)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words (as int64) of ``seed`` (int64 read as uint64) and a counter of four words."""
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW32) ^ c1 ^ k0, p1 & _LOW32, ((p0 >> 32) & _LOW32) ^ c3 ^ k1, p0 & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def random_words(seed: Tensor, sequence: Tensor, step: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """``(r_tile, r_token)``, int64 read as uint64, of draws that broadcast against each other."""
    seed, sequence, step, draw = torch.broadcast_tensors(seed, sequence, step, draw)
    w = philox(seed, draw & _LOW32, step & _LOW32, sequence & _LOW32, (sequence >> 32) & _LOW32)
    return w[0] | (w[1] << 32), w[2] | (w[3] << 32)


def _as_tiles(x: Tensor) -> Tensor:
    """``x (b, V)`` as (b, tiles, 256), filled up with -inf; one tile is left as it is: (b, 1, V)."""
    if x.shape[1] <= TILE:
        return x[:, None]
    return torch.nn.functional.pad(x, (0, -x.shape[1] % TILE), value=float("-inf")).view(len(x), -1, TILE)


def _tiles(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masses ``w (b, tiles, 256)``, the row level ``U (b, tiles)`` and the row's largest logit (b,).

    x: (b, tiles, 256) float32 with -inf for what cannot be drawn; scale: (b,) float32, positive.
    """
    top = x.amax(-1)
    w = exp_mass((x - top[..., None]) * scale[:, None, None])
    w = torch.where(x > float("-inf"), w, 0)
    tile_sum = w.sum(-1)
    row_top = top.amax(-1)
    if x.shape[1] == 1:
        return w, tile_sum, row_top
    significand, shift = exp2_parts((top - row_top[:, None]) * scale[:, None])
    return w, (((tile_sum >> 24) * significand) >> 16) >> shift, row_top


def _log2_total(mass: Tensor) -> Tensor:
    """``log2(sum 2**z)`` in float64 of the row level (b, tiles) of :func:`_tiles`."""
    unit_bits = TILE_UNIT_BITS if mass.shape[1] == 1 else ROW_UNIT_BITS
    return torch.log2(mass.sum(-1).double()) - unit_bits


def _status(x: Tensor, allowed: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The status (b,) int32 of rows ``x (b, V)``."""
    scale_ok = (scale == 0) | ((scale >= SCALE_MIN) & (scale < float("inf")))
    parameters_ok = scale_ok & (top_k >= 0) & (top_p >= 0) & (min_p >= 0)
    empty = ~(allowed & (x > float("-inf"))).any(-1)
    status = torch.where(empty, STATUS_EMPTY, STATUS_OK)
    status = torch.where((x == float("inf")).any(-1), STATUS_INFINITE, status)
    status = torch.where(x.isnan().any(-1), STATUS_NAN, status)
    return torch.where(parameters_ok, status, STATUS_PARAMETER).to(torch.int32)


def top_p_target(top_p: Tensor, total: Tensor) -> Tensor:
    """``ceil(top_p * total)``, top_p int64 in units of ``2**-63`` and ``total`` int64 up to ``2**62``."""
    return mulhi64(top_p, total * 2) + (top_p * (total * 2) != 0)


def filter_logits(x: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """``x (b, V)`` with -inf where top_k, top_p or min_p removes an id; -inf entries are already removed ones."""
    values, ids = x.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(x.shape[-1], device=x.device)
    keep = (values > float("-inf")) & ((top_k == 0)[:, None] | (rank < top_k[:, None]))
    z = (values - values[:, :1]) * scale[:, None]
    mass = torch.where(keep, exp_mass(z) >> TOP_P_SHIFT, 0)
    before = mass.cumsum(-1) - mass
    keep &= (top_p == 0)[:, None] | (before < top_p_target(top_p, mass.sum(-1))[:, None])
    keep &= -z <= min_p[:, None]
    return x.masked_fill(~torch.zeros_like(keep).scatter(-1, ids, keep), float("-inf"))


def _boundary_distance(low: Tensor, high: Tensor, threshold: Tensor, total: Tensor) -> Tensor:
    """Distance of ``threshold`` in [low, high) from the nearest inner boundary, relative to ``total``, float64.

    The ends 0 and total are no boundaries: no change of logits can carry a threshold across them.
    """
    infinity = float("inf")
    below = torch.where(low == 0, infinity, (threshold - low).double())
    above = torch.where(high == total, infinity, (high - threshold).double())
    return torch.minimum(below, above) / total.double()


def _look_up(mass: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose prefix sum of ``mass (b, n)`` exceeds ``mulhi64(random, total)``, and its margin; (b, N)."""
    prefix = mass.cumsum(-1)
    total = prefix[..., -1:].expand_as(random).contiguous()
    threshold = mulhi64(random, total)
    index = torch.searchsorted(prefix, threshold, right=True)
    high = prefix.gather(-1, index)
    low = high - mass.gather(-1, index)
    return index, _boundary_distance(low, high, threshold, total)


def _draw(w: Tensor, mass: Tensor, r_tile: Tensor, r_token: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (b, N) int64 and margins (b, N) float64 of N draws; w (b, tiles, 256), mass (b, tiles)."""
    if w.shape[1] == 1:
        return _look_up(w[:, 0], r_token)
    tile, tile_margin = _look_up(mass, r_tile)
    picks = []
    for n in range(r_token.shape[1]):
        row = w.gather(1, tile[:, n, None, None].expand(-1, 1, TILE))[:, 0]
        picks.append(_look_up(row, r_token[:, n : n + 1]))
    token = tile * TILE + torch.cat([p[0] for p in picks], 1)
    return token, torch.minimum(tile_margin, torch.cat([p[1] for p in picks], 1))


def _vote(tokens: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """The most frequent of ``tokens (b, N)``, lowest id on ties, and its margin.

    A vote with a lead of L over the second token survives until ceil(L / 2) draws (at least one) have changed, so its
    margin is the margin of that many-th weakest draw; +inf where all draws' margins are.
    """
    ordered, _ = tokens.sort(-1)
    first = torch.searchsorted(ordered, ordered)
    counts = torch.searchsorted(ordered, ordered, right=True) - first
    best = counts.argmax(-1, keepdim=True)  # the first of the largest: the lowest id
    winner = ordered.gather(-1, best)
    lead = counts.amax(-1, keepdim=True) - torch.where(ordered == winner, 0, counts).amax(-1, keepdim=True)
    flips = ((lead + 1) // 2).clamp(min=1)
    return winner[:, 0], margins.sort(-1)[0].gather(-1, flips - 1)[:, 0]


def _greedy(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the largest of ``x (b, V)``, and its distance to the runner-up in logits (+inf if alone)."""
    token = (x == x.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    rest = x.scatter(-1, token[:, None], float("-inf")).amax(-1)
    return token, x.amax(-1).double() - rest.double()


def _sample_rows(x, scale, top_k, top_p, min_p, allowed, seed, sequence, step, mode_of, logprobs):
    """:func:`sample` for a block of rows, all tensors with b rows."""
    x = x + 0.0  # -0.0 becomes 0.0
    status = _status(x, allowed, scale, top_k, top_p, min_p)
    good = status == STATUS_OK
    greedy = scale == 0
    scale = torch.where(good & ~greedy, scale, 1.0)
    x = torch.where(good[:, None], x, 0.0)
    kept = x.masked_fill(~(allowed | ~good[:, None]), float("-inf"))
    token, margin = _greedy(kept)
    if bool(((top_k > 0) | (top_p > 0) | (min_p < float("inf"))).any()):
        kept = filter_logits(kept, scale, top_k.clamp(min=0), top_p.clamp(min=0), torch.where(min_p >= 0, min_p, 0.0))
    w, mass, top = _tiles(_as_tiles(kept), scale)
    draws = torch.arange(mode_of, device=x.device)
    r_tile, r_token = random_words(seed[:, None], sequence[:, None], step[:, None], draws)
    drawn, drawn_margin = _vote(*_draw(w, mass, r_tile, r_token))
    token = torch.where(good, torch.where(greedy, token, drawn), 0)
    if not logprobs:
        return token, status
    value = x.gather(-1, token[:, None])[:, 0].double()
    tempered = LN_2 * ((value - top.double()) * scale.double() - _log2_total(mass))
    one = torch.full_like(scale, LOG2_E)
    _, mass, top = _tiles(_as_tiles(x), one)
    plain = value - top.double() - LN_2 * _log2_total(mass)
    floats = (plain, torch.where(greedy, 0.0, tempered), torch.where(greedy, margin, drawn_margin))
    return (token, status, *(torch.where(good, f, float("nan")).float() for f in floats))


def sample(
    logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, mask: Tensor | None,
    seed: Tensor, sequence: Tensor, step: Tensor, mode_of: int = 1, logprobs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw one token a row.

    logits (B, V) float32; scale (B,) float32 = log2(e)/T, 0 for greedy; top_k (B,) int64, 0 = off; top_p (B,) int64 in
    units of 2**-63, 0 = off; min_p (B,) float32 = -log2(min_p), +inf = off; mask (1 or B, V) bool, True = allowed, or
    None; seed, sequence, step (B,) int64, the bits read as uint64, uint64, uint32.

    Returns token (B,) int64, logprob, tempered_logprob, margin (B,) float32 ((0,) without ``logprobs``), status (B,)
    int32. ``logprob`` is the token's under the softmax of all logits at T = 1, ``tempered_logprob`` under that at T of
    the survivors of mask and filters (0 for greedy). ``margin``: as long as the survivors stay the same and each logit
    changes by less than ``2 T margin`` (greedy: ``margin / 2``), less rounding, the token stays.

    Raises ValueError for mode_of < 1 and for V outside [1, 2**24].
    """
    rows, vocabulary = logits.shape
    if mode_of < 1:
        raise ValueError(f"sample: mode_of must be at least 1, got {mode_of}")
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"sample: logits must have 1 to {MAX_VOCABULARY} columns (tokens), got {vocabulary}")
    allowed = torch.ones(1, vocabulary, dtype=torch.bool, device=logits.device) if mask is None else mask
    allowed = allowed.expand(rows, vocabulary)
    block = max(1, _BLOCK // max(vocabulary, min(vocabulary, TILE) * mode_of))
    columns = [logits, scale, top_k, top_p, min_p, allowed, seed, sequence, step]
    parts = []
    for start in range(0, max(rows, 1), block):
        parts.append(_sample_rows(*(column[start : start + block] for column in columns), mode_of, logprobs))
    token, status, *floats = (torch.cat(part) for part in zip(*parts))
    logprob, tempered, margin = floats or [torch.empty(0, device=logits.device) for _ in range(3)]
    return token, logprob, tempered, margin, status

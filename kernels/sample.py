"""The draw of tokens from rows of logits, as `fastrnn.reference_sample` defines it: one launch, or two for few long
rows, without probabilities in memory and without a word from the host between them.

Seed, sequence and step are read from memory, so that a replayed CUDA graph draws anew when they are changed there.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .draw import (
    draw_tokens,
    greedy_tile,
    greedy_token,
    keep_statistics,
    plain_logprob,
    row_largest,
    row_total,
    tempered_logprob,
    vote,
)
from .draw_math import INFINITY, LARGEST_FLOAT, NAN, SCALE_MIN, STATUS_PARAMETER, TILE, random_words
from .filter import LOWEST_KEY, filter_row, load_logits
from .launch import Variant

MAX_VOCABULARY = 1 << 24


@triton.jit
def row_parameters(i_row, p_scale, p_top_k, p_top_p, p_min_p):
    """``(scale, top_k, top_p, min_p, good, greedy, filtered)`` of a row; scale is 1 where nothing is drawn with it."""
    scale = tl.load(p_scale + i_row)
    top_k = tl.load(p_top_k + i_row)
    top_p = tl.load(p_top_p + i_row)
    min_p = tl.load(p_min_p + i_row)
    greedy = scale == 0.0
    good = greedy | ((scale >= SCALE_MIN) & (scale <= LARGEST_FLOAT))
    good = good & (top_k >= 0) & (top_p >= 0) & (min_p >= 0.0)
    drawn = good & (scale != 0.0)
    filtered = drawn & ((top_k > 0) | (top_p > 0) | (min_p < INFINITY))
    return tl.where(drawn, scale, 1.0), top_k, top_p, min_p, good, greedy, filtered


@triton.jit
def statistics_kernel(
    p_logits, stride, p_mask, mask_stride, p_scale, p_top_k, p_top_p, p_min_p, p_tops, p_sums, vocabulary, share,
    LOGPROBS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``m_t`` and ``W_t`` of the rows that no filter touches.

    Owns: program (b, s) the statistics of tiles s * share .. (s + 1) * share - 1 of row b.
    Keeps: TILES tiles of logits in registers.
    Moves: reads each logit once, writes 12 bytes a tile, 24 with LOGPROBS.
    Syncs: none.
    Limits: V up to 2**24.
    """
    i_row = tl.program_id(0).to(tl.int64)
    scale, _, _, min_p, _, _, filtered = row_parameters(i_row, p_scale, p_top_k, p_top_p, p_min_p)
    if not filtered:
        p_row_mask = p_mask
        if p_mask is not None:
            p_row_mask = p_mask + i_row * mask_stride
        tiles = tl.cdiv(vocabulary, 256)
        o_row = i_row * (2 * tiles if LOGPROBS else tiles)
        begin = tl.program_id(1) * share
        keep_statistics(
            p_logits + i_row * stride, p_row_mask, vocabulary, begin, tl.minimum(begin + share, tiles), tiles, False,
            (LOWEST_KEY, -1, 0.0, scale, min_p), p_tops + o_row, p_sums + o_row, LOGPROBS, TILES,
        )  # fmt: skip


@triton.jit
def choose(
    p_row, p_mask, vocabulary, filtered, cut, p_tops, p_sums, tiles, largest, greedy, names, p_tokens, p_margins,
    mode_of, LEVEL: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """``(token, margin, U)`` of a row that can be drawn from; names: seed, sequence and step."""
    total = row_total(p_tops, p_sums, tiles, largest, cut[3], LEVEL)
    if greedy:
        i_tile, second = greedy_tile(p_tops, tiles, largest, LEVEL)
        o = i_tile * TILE + tl.arange(0, TILE)[None, :]
        x, _ = load_logits(p_row, p_mask, o, vocabulary)
        tokens, margins = greedy_token(x, o, largest + tl.zeros((1,), tl.float32), second)
        token, margin = tl.sum(tokens).to(tl.int64), tl.sum(margins)
    elif DRAWS == 1:
        words = random_words(names[0], names[1], names[2], tl.zeros((1,), tl.int64))
        tokens, margins = draw_tokens(
            p_row, p_mask, vocabulary, filtered, cut, p_tops, p_sums, tiles, largest, total, words, LEVEL
        )
        token, margin = tl.sum(tokens).to(tl.int64), tl.sum(margins)
    else:
        for first in range(0, mode_of, DRAWS):
            n = first + tl.arange(0, DRAWS)
            words = random_words(names[0], names[1], names[2], n.to(tl.int64))
            tokens, margins = draw_tokens(
                p_row, p_mask, vocabulary, filtered, cut, p_tops, p_sums, tiles, largest, total, words, LEVEL
            )
            tl.store(p_tokens + n, tokens.to(tl.int64), mask=n < mode_of)
            tl.store(p_margins + n, margins, mask=n < mode_of)
        tl.debug_barrier()
        token, margin = vote(p_tokens, p_margins, mode_of)
    return token, margin, total


@triton.jit
def draw_kernel(
    p_logits, stride, p_mask, mask_stride, p_scale, p_top_k, p_top_p, p_min_p, p_seed, p_sequence, p_step,
    p_token, p_logprob, p_tempered, p_margin, p_status, p_tops, p_sums, p_tokens, p_margins, vocabulary, mode_of,
    KEPT: tl.constexpr, LOGPROBS: tl.constexpr, TILES: tl.constexpr, LEVEL: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """A token a row; with KEPT from the statistics of `statistics_kernel`, where no filter touches the row.

    Owns: program b the results of row b.
    Keeps: TILES tiles of logits, LEVEL tiles' statistics, DRAWS look-ups in a tile, in registers.
    Moves: reads each logit once (not at all with KEPT), 20 times more for each of top_k and top_p, and the drawn tile.
    Syncs: one barrier of its threads between writing the statistics and reading them, one more for a vote.
    Limits: V up to 2**24.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride
    p_row_mask = p_mask
    if p_mask is not None:
        p_row_mask = p_mask + i_row * mask_stride
    scale, top_k, top_p, min_p, good, greedy, filtered = row_parameters(i_row, p_scale, p_top_k, p_top_p, p_min_p)
    tiles = tl.cdiv(vocabulary, 256)
    p_tops += i_row * (2 * tiles if LOGPROBS else tiles)
    p_sums += i_row * (2 * tiles if LOGPROBS else tiles)
    cut_key, cut_id = tl.full((), LOWEST_KEY, tl.int32), tl.full((), -1, tl.int32)
    cut_top = tl.full((), 0.0, tl.float32)
    if filtered:
        cut_key, cut_id, cut_top = filter_row(p_row, p_row_mask, vocabulary, scale, top_k, top_p, TILES * 256)
    cut = (cut_key, cut_id, cut_top, scale, min_p)
    if filtered | (not KEPT):
        keep_statistics(
            p_row, p_row_mask, vocabulary, 0, tiles, tiles, filtered, cut, p_tops, p_sums, LOGPROBS, TILES
        )
        tl.debug_barrier()
    largest, status = row_largest(p_tops, tiles, LEVEL)
    status = tl.where(good, status, STATUS_PARAMETER)
    tl.store(p_status + i_row, status)
    token = tl.full((), 0, tl.int64)
    plain, tempered, margin = tl.full((), NAN, tl.float64), tl.full((), NAN, tl.float64), tl.full((), NAN, tl.float64)
    if status == 0:
        names = (tl.load(p_seed + i_row), tl.load(p_sequence + i_row), tl.load(p_step + i_row))
        token, margin, total = choose(
            p_row, p_row_mask, vocabulary, filtered, cut, p_tops, p_sums, tiles, largest, greedy, names,
            p_tokens + i_row * mode_of, p_margins + i_row * mode_of, mode_of, LEVEL, DRAWS,
        )  # fmt: skip
        if LOGPROBS:
            value = tl.load(p_row + token).to(tl.float32)
            tempered = tempered_logprob(value, largest, total, scale, greedy, tiles)
            plain = plain_logprob(value, p_tops + tiles, p_sums + tiles, tiles, LEVEL)
    tl.store(p_token + i_row, token)
    if LOGPROBS:
        tl.store(p_logprob + i_row, plain.to(tl.float32))
        tl.store(p_tempered + i_row, tempered.to(tl.float32))
        tl.store(p_margin + i_row, margin.to(tl.float32))


# --- launching ------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """How a vocabulary is worked through: tiles of logits and of the level above at once, and warps."""

    tiles: int
    level: int
    num_warps: int


def shape_of(vocabulary: int, mode_of: int) -> Shape:
    """A program holds up to 8 tiles: eight logits a thread."""
    if vocabulary <= 256:
        return Shape(1, 16, 1 if mode_of == 1 else 8)
    return Shape(8, 256, 8)


def parts_of(rows: int, vocabulary: int, processors: int) -> int:
    """Into how many programs a row is split: as many as fill the GPU twice, none with less than 4096 logits; 1 = one
    launch, which is the faster one where rows alone fill the GPU."""
    return max(1, min(2 * processors // max(rows, 1), vocabulary // 4096))


def row_columns(op: str, device: torch.device, rows: int, columns: dict[str, Tensor]) -> list[Tensor]:
    """The parameters of rows, checked and dense."""
    for name, column in columns.items():
        dtype = torch.float32 if name in ("scale", "min_p") else torch.int64
        if column.shape != (rows,) or column.dtype != dtype or column.device != device:
            raise RuntimeError(
                f"{op}: {name} must be (B,) = ({rows},) {dtype} on {device}, "
                f"got {tuple(column.shape)} {column.dtype} on {column.device}"
            )
    return [column.contiguous() for column in columns.values()]


def mask_bytes(op: str, device: torch.device, rows: int, vocabulary: int, mask: Tensor | None) -> Tensor | None:
    """A mask (1, V) or (rows, V), checked, as the bytes that kernels read."""
    if mask is None:
        return None
    if mask.shape not in ((1, vocabulary), (rows, vocabulary)) or mask.dtype != torch.bool or mask.device != device:
        shapes = f"(1, V) = (1, {vocabulary})" + (f" or (B, V) = ({rows}, {vocabulary})" if rows != 1 else "")
        raise RuntimeError(
            f"{op}: mask must be {shapes} bool on {device}, got {tuple(mask.shape)} {mask.dtype} on {mask.device}"
        )
    return mask.contiguous().view(torch.uint8)


class Results(NamedTuple):
    """What a draw writes, as the op ``sample`` returns it; the floats are empty without ``logprobs``."""

    token: Tensor
    logprob: Tensor
    tempered_logprob: Tensor
    margin: Tensor
    status: Tensor

    @classmethod
    def of(cls, like: Tensor, rows: int, logprobs: bool) -> Results:
        floats = (like.new_empty(rows if logprobs else 0, dtype=torch.float32) for _ in range(3))
        return cls(like.new_empty(rows, dtype=torch.int64), *floats, like.new_empty(rows, dtype=torch.int32))


def statistics_of(like: Tensor, rows: int, vocabulary: int, logprobs: bool) -> tuple[Tensor, Tensor]:
    """Memory for ``m_t`` and ``W_t``."""
    shape = (rows, 2 if logprobs else 1, triton.cdiv(vocabulary, 256))
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.int64)


def draw_rows(
    logits: Tensor, mask: Tensor | None, columns: list[Tensor], statistics: tuple[Tensor, Tensor], results: Results,
    mode_of: int, kept: bool, logprobs: bool,
) -> None:  # fmt: skip
    """Launch `draw_kernel`; mask in bytes."""
    rows, vocabulary = logits.shape
    votes = rows * mode_of if mode_of > 1 else 0
    tokens, margins = logits.new_empty(votes, dtype=torch.int64), logits.new_empty(votes, dtype=torch.float64)
    shape = shape_of(vocabulary, mode_of)
    draw_kernel[(rows,)](
        logits, logits.stride(0), mask, mask_stride(mask), *columns, *results, *statistics, tokens, margins,
        vocabulary, mode_of, KEPT=kept, LOGPROBS=logprobs, TILES=shape.tiles, LEVEL=shape.level,
        DRAWS=1 if mode_of == 1 else 8, num_warps=shape.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def mask_stride(mask: Tensor | None) -> int:
    """Bytes from a row's mask to the next one's."""
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def sample(
    logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, mask: Tensor | None,
    seed: Tensor, sequence: Tensor, step: Tensor, mode_of: int = 1, logprobs: bool = False, parts: int | None = None,
) -> Results:  # fmt: skip
    """`fastrnn.reference_sample.sample` on a GPU. Logits of float16 or bfloat16 are drawn from as float32 ones.

    parts: into how many programs a row is split; above 1 it takes two launches. None: `parts_of` chooses.
    """
    rows, vocabulary = logits.shape
    if mode_of < 1:
        raise ValueError(f"sample: mode_of must be at least 1, got {mode_of}")
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"sample: logits must have 1 to {MAX_VOCABULARY} columns (tokens), got {vocabulary}")
    named = dict(scale=scale, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, sequence=sequence, step=step)
    columns = row_columns("sample", logits.device, rows, named)
    mask = mask_bytes("sample", logits.device, rows, vocabulary, mask)
    results = Results.of(logits, rows, logprobs)
    if rows == 0:
        return results
    if logits.stride(1) != 1 and vocabulary > 1:
        logits = logits.contiguous()
    statistics = statistics_of(logits, rows, vocabulary, logprobs)
    if parts is None:
        parts = parts_of(rows, vocabulary, processors(logits.device))
    with on_device(logits.device):
        if parts > 1:
            tiles, shape = triton.cdiv(vocabulary, 256), shape_of(vocabulary, 1)
            share = triton.cdiv(tiles, parts)
            statistics_kernel[(rows, triton.cdiv(tiles, share))](
                logits, logits.stride(0), mask, mask_stride(mask), *columns[:4], *statistics, vocabulary, share,
                LOGPROBS=logprobs, TILES=shape.tiles, num_warps=shape.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
        draw_rows(logits, mask, columns, statistics, results, mode_of, parts > 1, logprobs)
    return results


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --- what is compiled -----------------------------------------------------------------------------------------------

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_COLUMNS = dict(p_scale="*fp32", p_top_k="*i64", p_top_p="*i64", p_min_p="*fp32", p_seed="*i64", p_sequence="*i64")
_SIGNATURE = _COLUMNS | dict(
    stride="i64", mask_stride="i64", p_step="*i64", p_token="*i64", p_logprob="*fp32", p_tempered="*fp32",
    p_margin="*fp32", p_status="*i32", p_tops="*fp32", p_sums="*i64", p_tokens="*i64", p_margins="*fp64",
    vocabulary="i32", mode_of="i32", share="i32",
)  # fmt: skip


def _variant(fn, dtype: torch.dtype, vocabulary: int, mode_of: int, masked: bool, **constants) -> Variant:
    shape = shape_of(vocabulary, mode_of)
    known = dict(TILES=shape.tiles, LEVEL=shape.level, DRAWS=1 if mode_of == 1 else 8) | constants
    known |= {"p_mask": None, "mask_stride": 0} if not masked else {}
    known |= {"mode_of": 1} if mode_of == 1 else {}
    known = {name: value for name, value in known.items() if name in fn.arg_names}
    types = _SIGNATURE | {"p_logits": _TYPES[dtype], "p_mask": "*u8"}
    signature = {name: types[name] for name in fn.arg_names if name not in known}
    words = [str(dtype).removeprefix("torch."), f"V{vocabulary}", f"N{mode_of}"]
    words += ["mask"] * masked + ["logprobs"] * constants["LOGPROBS"] + ["kept"] * constants.get("KEPT", False)
    name = f"sample/{fn.__name__.removesuffix('_kernel')}/{'/'.join(words)}"
    aligned = tuple(parameter for parameter in signature if parameter.startswith("p_"))
    return Variant(name, fn, signature, known, shape.num_warps, 3, aligned)


def variants() -> list[Variant]:
    """Every kernel in every shape, each of its options with and without."""
    single = torch.float32
    found = [
        _variant(draw_kernel, dtype, vocabulary, 1, masked, LOGPROBS=masked, KEPT=False)
        for dtype in _TYPES
        for vocabulary in (65, 50257)
        for masked in (False, True)
        if masked or dtype == single
    ]
    found += [_variant(draw_kernel, single, 65, 80, True, LOGPROBS=True, KEPT=False)]
    found += [_variant(draw_kernel, single, 50257, n, n == 1, LOGPROBS=n == 1, KEPT=True) for n in (1, 80)]
    found += [_variant(statistics_kernel, dtype, 50257, 1, True, LOGPROBS=True) for dtype in _TYPES]
    found += [_variant(statistics_kernel, single, 50257, 1, False, LOGPROBS=False)]
    # Numbers that are 1 become constants where Triton compiles for a call.
    ones = _variant(draw_kernel, single, 1, 1, False, LOGPROBS=True, KEPT=False)
    return [*found, ones._replace(name="sample/draw/one", constexprs=ones.constexprs | dict(vocabulary=1, stride=1))]

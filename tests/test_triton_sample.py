"""The draw in Triton against its definition: on a GPU if there is one, otherwise in Triton's interpreter."""

import math

import draws
import pytest
import torch
import triton
import triton.language as tl
from draws import plain_columns, random_columns, random_logits
from torch import Tensor

import fastrnn
import oracle
from fastrnn import ops
from fastrnn import reference_sample as definition
from fastrnn.kernels import draw as draw_parts
from fastrnn.kernels import draw_math, head
from fastrnn.kernels import sample as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# NumPy, on which the interpreter computes, warns of -inf - -inf and of rows without mass, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def draw(x: Tensor, columns: dict, mask: Tensor | None = None, mode_of: int = 1, logprobs: bool = True, parts: int = 1):
    x, mask, *values = on_device(x, mask, *columns.values())
    given = dict(zip(columns, values), mask=mask, mode_of=mode_of, logprobs=logprobs, parts=parts)
    return tuple(t.cpu() for t in kernels.sample(x, **given))


def assert_defined(x: Tensor, columns: dict, mask: Tensor | None = None, mode_of: int = 1, parts: int = 1):
    """The kernel draws as the definition does; returns what it drew."""
    found = draw(x, columns, mask, mode_of, True, parts)
    expected = definition.sample(x, mask=mask, mode_of=mode_of, logprobs=True, **columns)
    draws.assert_same(found, expected, f"{tuple(x.shape)}, votes {mode_of}, parts {parts}")
    return found


def test_constants_are_those_of_the_definition():
    ours = [1.0, *(getattr(draw_math, f"C{k}").value for k in range(1, 6))]
    assert ours == list(definition.EXP2_COEFFICIENTS)
    assert torch.tensor(draw_math.LOG2_E.value) == torch.tensor(definition.LOG2_E)
    assert float(torch.tensor(definition.LOG2_E)) == draw_math.LOG2_E.value
    for name in ("LN_2", "TILE", "TILE_UNIT_BITS", "ROW_UNIT_BITS", "TOP_P_SHIFT", "SCALE_MIN"):
        assert getattr(draw_math, name).value == getattr(definition, name), name
    for name in ("STATUS_NAN", "STATUS_INFINITE", "STATUS_EMPTY", "STATUS_PARAMETER"):
        assert getattr(draw_math, name).value == getattr(definition, name), name
    assert kernels.MAX_VOCABULARY == definition.MAX_VOCABULARY


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 65, 255, 256, 257, 1000, 10007])
def test_draws_equal_reference(vocabulary):
    """Every temperature, greedy too, any 64-bit seeds and sequence ids, ties, zeros of both signs, -inf, 1e30."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 6 if vocabulary < 300 else 4
    x, columns = random_logits(rows, vocabulary, generator), random_columns(rows, generator, filters=False)
    columns["scale"][-1] = 0.0
    found = assert_defined(x, columns)
    bare = draw(x, columns, logprobs=False)
    assert torch.equal(bare[0], found[0])
    assert torch.equal(bare[4], found[4])
    assert [len(t) for t in bare[1:4]] == [0, 0, 0]


def test_many_rows():
    generator = torch.Generator().manual_seed(1)
    x, columns = random_logits(40, 3, generator), random_columns(40, generator, filters=False)
    assert len(assert_defined(x, columns)[0].unique()) == 3


@pytest.mark.parametrize("vocabulary", [5, 65, 257, 1000])
def test_filters_and_masks_equal_reference(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 4 if vocabulary < 257 else 3
    x, columns = random_logits(rows, vocabulary, generator), random_columns(rows, generator, filters=True)
    columns["top_k"][-1], columns["top_p"][-1], columns["scale"][-1] = 3, 2**62, 1.5
    mask = torch.rand(rows, vocabulary, generator=generator) < 0.7
    assert_defined(x, columns, mask[:1] if vocabulary == 65 else mask)


def test_each_size_of_top_k_among_ties():
    """Twelve logits of four values: a selection must take the lowest ids of the last value."""
    x = torch.tensor([[1.0, 2.0, 0.0, 2.0, 1.0, -0.0, 2.0, 1.0, 0.0, -math.inf, 1.0, -3.0]])
    sizes = torch.tensor([1, 2, 3, 4, 7, 8, 10, 11, 12, 13])
    x = x.expand(len(sizes), -1)
    columns = plain_columns(len(sizes), 10.0) | {"top_k": sizes, "seed": sizes}
    assert_defined(x, columns)


def test_exact_edges_of_top_p():
    """Four equal tokens have 1/4 each exactly: nuclei on, just below and just above the boundaries."""
    x = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0]).expand(8, -1)
    quarter = 2**61
    shares = [1, quarter - 1, quarter, quarter + 1, 2 * quarter, 2 * quarter + 1, 2**63 - 1, 0]
    columns = plain_columns(8) | {"top_p": torch.tensor(shares), "seed": torch.arange(8)}
    columns["scale"] = torch.full((8,), 100.0)  # the first token, at 2**-100, has no mass
    assert_defined(x, columns)


def test_rows_that_cannot_be_drawn_from():
    """Each status, each parameter out of its range, and neighbours that are drawn from as if alone."""
    generator = torch.Generator().manual_seed(2)
    x, columns = torch.randn(16, 300, generator=generator), random_columns(16, generator, filters=False)
    columns["scale"] = columns["scale"].clamp(min=1.0)
    mask = torch.ones(16, 300, dtype=torch.bool)
    alone = draw(x, columns, mask)
    x[1, 299], x[3, 0], x[5] = math.nan, math.inf, -math.inf
    x[6, 7], mask[6, 7] = math.nan, False  # a masked NaN counts
    x[7, 7], x[7, 280] = math.inf, math.nan  # NaN comes before +inf
    mask[8] = False
    columns["scale"][9], columns["scale"][10], columns["scale"][11] = math.nan, -1.0, 1e-40
    columns["top_k"][12], columns["top_p"][13], columns["min_p"][14] = -1, -5, math.nan
    found = assert_defined(x, columns, mask)
    assert found[4].tolist() == [0, 1, 0, 2, 0, 3, 1, 1, 3, 4, 4, 4, 4, 4, 4, 0]
    good = found[4] == 0
    draws.assert_same(tuple(t[good] for t in found), tuple(t[good] for t in alone))


def test_gaps_below_the_normal_numbers_count():
    """Of two tokens 1e-40 apart the first has a little more than half of the mass, enough for this top_p; taken for
    equal, as they are where so small a gap counts as zero, both would be kept."""
    x = torch.tensor([[0.0, -1e-40]])
    found = assert_defined(x, plain_columns(1) | {"top_p": torch.tensor([2**62 + 2**37])})
    assert found[2].tolist() == [0.0]


@pytest.mark.parametrize("votes", [2, 9, 33])
def test_votes_equal_reference(votes):
    generator = torch.Generator().manual_seed(votes)
    for vocabulary in (17,) if votes > 2 else (17, 700):
        x, columns = random_logits(2, vocabulary, generator), random_columns(2, generator, filters=votes == 9)
        columns["scale"][1] = 1.0
        assert_defined(x, columns, None, votes)


def test_a_row_in_parts_is_the_row_at_once():
    """Two launches, of which the first does not touch rows that a filter does, nor bad ones more than others."""
    generator = torch.Generator().manual_seed(5)
    x, columns = random_logits(5, 5000, generator), random_columns(5, generator, filters=False)
    columns["scale"][:] = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])
    columns["top_k"][2] = 40
    x[3, 4999] = math.nan
    mask = torch.rand(1, 5000, generator=generator) < 0.9
    for parts in (2, 3):
        assert_defined(x, columns, mask, parts=parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_drawn_from_as_float32(dtype):
    generator = torch.Generator().manual_seed(6)
    x, columns = torch.randn(4, 300, generator=generator).to(dtype), random_columns(4, generator, filters=False)
    draws.assert_same(draw(x, columns), definition.sample(x.float(), mask=None, logprobs=True, **columns))


def test_rows_apart_in_memory():
    generator = torch.Generator().manual_seed(7)
    wide, columns = random_logits(10, 400, generator), random_columns(10, generator, filters=False)
    taken = wide[::2, 50:350]
    assert taken.stride() == (800, 1)
    half = {name: column[::2] for name, column in columns.items()}
    assert_defined(taken, half)
    assert_defined(wide.t()[:60, ::2].t(), half)


def test_no_rows():
    columns = {name: column[:0] for name, column in plain_columns(1).items()}
    assert [tuple(t.shape) for t in draw(torch.zeros(0, 7), columns)] == [(0,)] * 5


def test_what_does_not_fit_is_refused():
    columns = plain_columns(2)
    x = torch.zeros(2, 7)
    with pytest.raises(RuntimeError, match=r"seed must be \(B,\) = \(2,\) torch.int64"):
        draw(x, columns | {"seed": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(RuntimeError, match=r"mask must be \(1, V\) = \(1, 7\) or \(B, V\) = \(2, 7\) bool"):
        draw(x, columns, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="mode_of must be at least 1, got 0"):
        draw(x, columns, mode_of=0)
    with pytest.raises(ValueError, match="1 to 16777216 columns"):
        draw(torch.zeros(2, 0), columns)


def draw_by_op(x: Tensor) -> tuple[Tensor, ...]:
    columns = {name: column.to(DEVICE) for name, column in plain_columns(len(x)).items()}
    return tuple(t.cpu() for t in ops.sample(x.to(DEVICE), mask=None, **columns))


def test_the_table_knows_the_kernel():
    x, columns = torch.randn(2, 30), dict(temperature=0.7, seed=5, step=3)
    expected = fastrnn.sample(x, **columns)
    with fastrnn.backend("triton"):
        assert torch.equal(fastrnn.sample(x.to(DEVICE), **columns).cpu(), expected)
        with pytest.raises(fastrnn.BackendRefusal, match="float32, float16 and bfloat16, not float64"):
            draw_by_op(x.double())
        assert torch.equal(draw_by_op(x)[0], definition.sample(x, mask=None, **plain_columns(2))[0])


@pytest.mark.gpu
def test_a_replayed_graph_draws_anew():
    """Seed, sequence and step are read from memory when the graph runs."""
    generator = torch.Generator().manual_seed(8)
    for rows, vocabulary in ((5, 65), (3, 50000)):
        x, columns = random_logits(rows, vocabulary, generator), random_columns(rows, generator, filters=False)
        fixed = {name: column.cuda() for name, column in columns.items()}
        logits, graph = x.cuda(), torch.cuda.CUDAGraph()
        kernels.sample(logits, mask=None, **fixed)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            token = kernels.sample(logits, mask=None, **fixed)[0]
        for step in range(4):
            fixed["step"].fill_(step)
            graph.replay()
            expected = definition.sample(x, mask=None, **(columns | {"step": torch.full((rows,), step)}))
            assert torch.equal(token.cpu(), expected[0])


# --- look-ups -------------------------------------------------------------------------------------------------------


@triton.jit
def found_by_look_up(p_prefix, p_threshold, p_index, p_low, p_high, D: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, D)
    prefix = tl.load(p_prefix + o[:, None] * N + tl.arange(0, N)[None, :])
    index, low, high = draw_math.look_up(prefix, tl.load(p_threshold + o))
    tl.store(p_index + o, index)
    tl.store(p_low + o, low)
    tl.store(p_high + o, high)


MASSES = {
    "zeros first, between and last": [0, 3, 0, 0, 5, 1, 0, 2**40, 0, 0],
    "neighbours of 1": [1] * 16,
    "all in the first": [2**62],
    "all in the last": [0] * 15 + [7],
    "near the largest sum": [2**62, 0, 2**62 - 2, 1],
}


@pytest.mark.parametrize("masses", MASSES.values(), ids=MASSES)
def test_a_look_up_finds_the_first_prefix_above_its_threshold(masses):
    """With thresholds on, one below and one above every prefix; those from the last prefix on find none."""
    prefix = torch.tensor(masses + [0] * (16 - len(masses))).cumsum(0)
    near = {int(p) + d for p in prefix for d in (-1, 0, 1)} | {0}
    thresholds = sorted(t for t in near if 0 <= t < 2**63)
    count = triton.next_power_of_2(len(thresholds))
    asked = torch.tensor(thresholds + thresholds[:1] * (count - len(thresholds)), device=DEVICE)
    index = torch.full((count,), -7, dtype=torch.int32, device=DEVICE)
    low, high = torch.full_like(asked, -7), torch.full_like(asked, -7)
    rows = prefix.to(DEVICE).repeat(count, 1)
    found_by_look_up[(1,)](rows, asked, index, low, high, D=count, N=16)
    drawn = torch.searchsorted(prefix, asked.cpu(), right=True)
    assert index.tolist() == drawn.tolist()
    assert all(masses[i] > 0 for i, t in zip(drawn.tolist(), thresholds) if t < prefix[-1])
    padded = torch.cat([torch.zeros(1, dtype=torch.int64), prefix, torch.tensor([2**63 - 1])])
    assert low.tolist() == padded[drawn].tolist()
    assert high.tolist() == padded[drawn + 1].tolist()


@triton.jit
def tiles_picked(p_tops, p_sums, tiles, p_words, p_tile, p_margin, D: tl.constexpr, LEVEL: tl.constexpr):
    o = tl.arange(0, D)
    total = draw_parts.row_total(p_tops, p_sums, tiles, 0.0, 1.0, LEVEL)
    words = tl.load(p_words + o).to(tl.uint64, bitcast=True)
    index, margin = draw_parts.pick_tile(p_tops, p_sums, tiles, 0.0, 1.0, total, words, LEVEL)
    tl.store(p_tile + o, index)
    tl.store(p_margin + o, margin)


def test_a_tile_is_looked_up_across_the_parts_of_a_level():
    """40 tiles in parts of 16, with empty ones at both ends and at the seams. Masses of 128 k at z = 0 add up to 2**20,
    so that the word ``threshold << 44`` has exactly this threshold."""
    masses = torch.zeros(40, dtype=torch.int64)
    masses[[3, 7, 14, 17, 31, 33, 38]] = 128 * torch.tensor([1, 2, 1, 1000, 3, 7000, 185])
    prefix, total = masses.cumsum(0), 2**20
    assert prefix[-1] == total
    near = {int(p) + d for p in prefix for d in (-1, 0, 1)} | {0}
    thresholds = sorted(t for t in near if 0 <= t < total)
    count = triton.next_power_of_2(len(thresholds))
    asked = torch.tensor(thresholds + thresholds[:1] * (count - len(thresholds)))
    words = torch.tensor([t << 44 if t < 2**19 else (t << 44) - 2**64 for t in asked.tolist()], device=DEVICE)
    tops, sums = torch.zeros(40, device=DEVICE), (masses << 17).to(DEVICE)
    tops[masses == 0] = -math.inf
    tile, margin = torch.empty(count, dtype=torch.int32, device=DEVICE), torch.empty(count, device=DEVICE).double()
    tiles_picked[(1,)](tops, sums, 40, words, tile, margin, D=count, LEVEL=16)
    drawn = torch.searchsorted(prefix, asked, right=True)
    assert tile.tolist() == drawn.tolist()
    low, high = (prefix - masses)[drawn].double(), prefix[drawn].double()
    below, above = (asked - low).masked_fill(low == 0, math.inf), (high - asked).masked_fill(high == total, math.inf)
    assert margin.tolist() == (torch.minimum(below, above) / total).tolist()


# --- head and draw --------------------------------------------------------------------------------------------------


def head_case(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, filters: bool):
    generator = torch.Generator().manual_seed(rows + hidden + vocabulary)
    h = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    columns = random_columns(rows, generator, filters=filters)
    columns["scale"][0], columns["scale"][-1] = 1.0, 0.0
    mask = torch.rand(1, vocabulary, generator=generator) < 0.8
    mask[0, 0] = True
    if rows > 3:
        h[1, hidden // 2], columns["scale"][2] = math.nan, -1.0
    return h, weight, bias, columns, mask


@pytest.mark.parametrize(
    ("rows", "hidden", "vocabulary", "dtype", "again"),
    [
        (1, 5, 1, torch.float32, None), (20, 20, 65, torch.float32, None), (3, 64, 256, torch.float16, None),
        (5, 70, 30, torch.bfloat16, None), (4, 20, 300, torch.float32, True), (4, 33, 1000, torch.float16, True),
        (2, 20, 513, torch.bfloat16, True), (17, 33, 300, torch.float32, False), (4, 20, 300, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_head_and_draw(rows, hidden, vocabulary, dtype, again):
    """The tokens are the definition's on the very logits that the kernel computed, and those are the product."""
    h, weight, bias, columns, mask = head_case(rows, hidden, vocabulary, dtype, False)
    logits = torch.full((rows, vocabulary), 7.0, device=DEVICE)
    names = ("scale", "seed", "sequence", "step")
    h_, weight_, bias_, mask_, *given = on_device(h, weight, bias, mask, *(columns[name] for name in names))
    found = head.head_draw(h_, weight_, bias_, *given, None, mask_, True, logits, again)
    expected = definition.sample(logits.cpu(), mask=mask, logprobs=True, **columns)
    draws.assert_same(tuple(t.cpu() for t in found), expected)
    bare = head.head_draw(h_, weight_, bias_, *given, mask=mask_, recompute=again)
    assert torch.equal(bare[0], found[0])
    assert torch.equal(bare[4], found[4])
    numbers = expected[4] != definition.STATUS_NAN
    assert bool(numbers.any())
    exact = h.double() @ weight.double().t() + bias.double()
    plain = h.float() @ weight.float().t() + bias.float()
    oracle.assert_close(logits.cpu()[numbers], exact[numbers], plain[numbers], "logits")


def test_head_and_draw_with_filters():
    h, weight, bias, columns, mask = head_case(4, 20, 300, torch.float32, True)
    logits = torch.full((4, 300), 7.0, device=DEVICE)
    given = on_device(h, weight, bias, *(columns[name] for name in ("scale", "seed", "sequence", "step")))
    filters = tuple(on_device(columns["top_k"], columns["top_p"], columns["min_p"]))
    found = head.head_draw(*given, filters, mask.to(DEVICE), True, logits)
    expected = definition.sample(logits.cpu(), mask=mask, logprobs=True, **columns)
    draws.assert_same(tuple(t.cpu() for t in found), expected)


def test_head_without_bias_and_what_does_not_fit():
    h, weight, _, columns, _ = head_case(2, 16, 40, torch.float32, False)
    names = on_device(*(columns[name] for name in ("scale", "seed", "sequence", "step")))
    logits = torch.empty(2, 40, device=DEVICE)
    h, weight = on_device(h, weight)
    found = head.head_draw(h, weight, None, *names, logits=logits)
    expected = definition.sample(logits.cpu(), mask=None, **columns)
    assert torch.equal(found.token.cpu(), expected[0])
    with pytest.raises(RuntimeError, match=r"weight must be \(V, H\) = \(1 to 16777216, 16\) because h is \(2, 16\)"):
        head.head_draw(h, weight[:, :15], None, *names)
    with pytest.raises(RuntimeError, match="logits must be dense"):
        head.head_draw(h, weight, None, *names, logits=logits.t())

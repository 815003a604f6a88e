"""The draw: each backend computes the definition bit for bit, and the definition's parts are what they claim to be."""

import functools
import math
import mmap
import random
import struct

import draws
import numpy as np
import pytest
import torch
from draw_oracle import exact_fma, python_draw, python_first_above, python_mass, python_parts
from draws import both_backends, draw, needs_cpu, plain_columns, random_columns, random_logits

from fastrnn import backends
from fastrnn import reference_sample as definition

# --- the parts ------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """Random123's kat_vectors: counter words, key words, expected words of philox4x32 with 10 rounds."""
    ones, zero = 0xFFFFFFFF, 0
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for counter, key, expected in (
        ((zero,) * 4, (zero,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi[:4], pi[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        seed = torch.tensor(struct.unpack("<q", struct.pack("<II", *key)))
        words = definition.philox(seed, *(torch.tensor([c]) for c in counter))
        assert tuple(int(w) for w in words) == expected


def test_mulhi64_is_exact():
    rng = random.Random(1)
    edge = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    pairs = [(a, b) for a in edge for b in edge] + [(rng.getrandbits(64), rng.getrandbits(64)) for _ in range(2000)]
    a, b = (torch.from_numpy(np.array(side, dtype=np.uint64).view(np.int64)) for side in zip(*pairs))
    found = definition.mulhi64(a, b).numpy().view(np.uint64).tolist()
    assert found == [(x * y) >> 64 for x, y in pairs]


def test_fma32_rounds_once():
    rng = random.Random(2)
    as_float32 = lambda v: struct.unpack("f", struct.pack("f", v))[0]  # noqa: E731
    cases = [tuple(as_float32(rng.uniform(-2, 2) * 2.0 ** rng.randint(-20, 2)) for _ in range(3)) for _ in range(3000)]
    # Near ties: a product just above or below half a unit of c, which float64 alone rounds twice.
    cases += [
        (1 + 2.0**-23, s * (2.0**-24 + d * 2.0**-47), c)
        for s in (1, -1)
        for d in (-1, 0, 1)
        for c in (1.0, 1.5, 1 + 2.0**-23)
    ]
    for a, b, c in cases:
        found = definition.fma32(torch.tensor([a]), torch.tensor([b]), c)
        assert float(found) == exact_fma(as_float32(a), as_float32(b), c), (a, b, c)


def test_exponential_against_float64():
    """A strided subset of all float32 in [-64, 0]; the bounds were measured over every one of them."""
    bits = torch.arange(0, 0x42800000, 4099, dtype=torch.int64)
    z = bits.to(torch.int32).view(torch.float32).neg().flip(0)
    mass = definition.exp_mass(z)
    exact = torch.exp2(z.double() + 54)
    assert bool((mass[1:] >= mass[:-1]).all()), "E decreases"
    assert bool(((mass.double() - exact).abs() <= 1 + exact * 2.0**-22).all())
    significand, shift = definition.exp2_parts(z)
    inside = z > -63
    relative = (torch.ldexp(significand.double(), 31 - shift) / exact - 1).abs()[inside]
    assert float(relative.max()) <= 1.561e-7 <= 2.0**-22
    assert int(definition.exp_mass(torch.tensor([0.0]))) == int(definition.exp_mass(torch.tensor([-0.0]))) == 2**54
    assert definition.exp_mass(torch.tensor([-54.5, -1e30, -math.inf, math.nan])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 10), (7, 60), (256, 8), (257, 8), (700, 5)])
def test_equals_the_definition_in_python_integers(vocabulary, rows):
    names = [name for name in ("reference", "cpu") if backends.available()[name] is None]
    generator = torch.Generator().manual_seed(vocabulary)
    for filters in (False, True):
        x = random_logits(rows, vocabulary, generator)
        x[:, -1] = 0.25  # something is always allowed
        columns = random_columns(rows, generator, filters=filters)
        singles = [{key: column[r].item() for key, column in columns.items()} for r in range(rows)]
        expected = [python_draw((x[r] + 0.0).tolist(), singles[r], 0) for r in range(rows)]
        for name in names:
            token, *_, status = draw(name, x, columns)
            assert status.tolist() == [0] * rows
            assert token.tolist() == expected, name


def test_masses_and_look_ups_in_python_integers():
    """What whole draws hardly see: the last bits of both levels, and thresholds that meet a prefix sum exactly."""
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(9)) * 6
    w, mass, _ = definition._tiles(definition._as_tiles(x), torch.full((4,), 1.7))
    scale = np.float32(1.7)
    for r, row in enumerate(x.tolist()):
        for t in range(3):
            tile = row[256 * t : 256 * t + 256]
            masses = [python_mass(float((np.float32(v) - np.float32(max(tile))) * scale)) for v in tile]
            significand, shift = python_parts(float((np.float32(max(tile)) - np.float32(max(row))) * scale))
            assert w[r, t, : len(tile)].tolist() == masses
            assert int(mass[r, t]) == (((sum(masses) >> 24) * significand) >> 16) >> shift
    small = [0, 1, 0, 2, 0, 1, 0]
    words = [0, 2**62 - 1, 2**62, 2**62 + 1, 2**63 - 1]
    index, _ = definition._look_up(torch.tensor([small]), torch.tensor([words]))
    assert index[0].tolist() == [python_first_above(small, word) for word in words] == [1, 1, 3, 3, 3]


def test_the_header_has_the_same_constants(root):
    text = (root / "csrc" / "sampling.h").read_text()
    for name, value in (
        ("kTile", definition.TILE), ("kTileUnitBits", definition.TILE_UNIT_BITS),
        ("kRowUnitBits", definition.ROW_UNIT_BITS), ("kTopPShift", definition.TOP_P_SHIFT),
    ):  # fmt: skip
        assert f"{name} = {value};" in text
    assert "q, f, 1.0f)" in text
    for coefficient in definition.EXP2_COEFFICIENTS[1:]:
        digits, exponent = coefficient.hex().split("p")
        assert f"{digits[:10]}p{exponent}f" in text, coefficient.hex()


# --- the C++ --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request):
    """Each instruction set that the C++ is compiled for."""
    if backends.extension_missing():
        pytest.skip(f"needs a build with the C++ extension: {backends.extension_missing()}")
    try:
        torch.ops.fastrnn_cpu.set_isa(request.param)
    except RuntimeError as refusal:
        pytest.skip(f"needs a CPU with {request.param}: {str(refusal).splitlines()[0]}")
    yield request.param
    torch.ops.fastrnn_cpu.set_isa("")


@functools.cache
def reference_case(vocabulary: int, filters: bool, mode_of: int):
    """Logits, parameters, mask and the reference's draws; of more than 40 rows, 5 to 10 cannot be drawn."""
    rows = max(2, min(600, 150_000 // vocabulary))
    generator = torch.Generator().manual_seed(vocabulary)
    x, columns = random_logits(rows, vocabulary, generator), random_columns(rows, generator, filters=filters)
    if rows > 40:
        x[5, 0], x[6, -1], x[7] = math.nan, math.inf, -math.inf
        columns["scale"][8], columns["top_k"][9], columns["min_p"][10] = math.nan, -1, -0.5
    mask = None if mode_of == 1 else torch.rand(rows, vocabulary, generator=generator) < 0.7
    return x, columns, mask, draw("reference", x, columns, mask, mode_of)


@pytest.mark.parametrize("vocabulary", draws.VOCABULARIES)
def test_cpp_equals_reference(isa, vocabulary):
    for filters in (False, True):
        for mode_of in (1, 7):
            x, columns, mask, expected = reference_case(vocabulary, filters, mode_of)
            cpp = draw("cpu", x, columns, mask, mode_of)
            draws.assert_same(cpp, expected, f"V={vocabulary} filters={filters} mode_of={mode_of}")
            if len(x) > 40:
                assert cpp[4][5:11].tolist() == [1, 2, 3, 4, 4, 4]
                assert cpp[0][5:11].tolist() == [0] * 6
                assert bool(torch.stack(cpp[1:4])[:, 5:11].isnan().all())


EDGES = (1, 2, 15, 16, 17, 64, 65, 255, 256, 257, 999, 4097, 50257)
SCALES = (1e-3, 0.1, 1.0, 1.8, 30.0, 1e3)


@functools.cache
def plain_case(vocabulary: int):
    """Rows without filters at each of `SCALES`: random ones with ties, then the edges that a row can have; their
    logits are the first columns of a wider table, whose other columns hold NaN. And the reference's draws."""
    generator = torch.Generator().manual_seed(1000 + vocabulary)
    rows = max(9, min(120, 60_000 // vocabulary))
    table = torch.full((rows + 11, vocabulary + 7), math.nan)
    x = table[:, :vocabulary]
    x[:rows] = random_logits(rows, vocabulary, generator)
    x[rows:] = torch.randn(11, vocabulary, generator=generator)
    last = vocabulary - 1
    edges = x[rows:]
    edges[0, last], edges[1, last], edges[2, 0] = math.nan, math.inf, -math.nan
    edges[3], edges[4], edges[5] = -math.inf, -0.0, 3.4e38
    edges[6, : max(1, last)] = -math.inf  # one token, in the last place, unless it is the only one
    edges[7, 0], edges[7, last] = math.inf, math.nan
    edges[8, ::2], edges[8, 1::2] = -3.4e38, 3.4e38
    edges[9, ::2], edges[9, 1::2] = 1e-45, -1e-45
    edges[10] -= 80 * (torch.arange(vocabulary) // definition.TILE == 0)
    columns = plain_columns(len(x) * len(SCALES), seed=2**63 - 7, step=2**32 - 1)
    columns["scale"] = torch.tensor(SCALES).repeat(len(x))
    x = table.repeat_interleave(len(SCALES), 0)[:, :vocabulary]
    mask = torch.rand(len(x), vocabulary, generator=generator) < 0.5
    expected = {
        (masked, logprobs): draw("reference", x, columns, mask if masked else None, logprobs=logprobs)
        for masked in (False, True)
        for logprobs in (False, True)
    }
    return x, columns, mask, expected


@pytest.mark.parametrize("vocabulary", EDGES)
def test_plain_draws_equal_reference(isa, vocabulary):
    """The way of a plain draw and the general one, from rows that are not side by side in memory."""
    x, columns, mask, expected = plain_case(vocabulary)
    assert x.stride() == (vocabulary + 7, 1)
    for (masked, logprobs), tensors in expected.items():
        found = draw("cpu", x, columns, mask if masked else None, logprobs=logprobs)
        draws.assert_same(found, tensors, f"V={vocabulary} masked={masked} logprobs={logprobs}")
    edges = expected[False, False][4][-11 * len(SCALES) :].view(11, len(SCALES))
    assert edges[:4, 0].tolist() == [1, 2, 1, 3]
    assert bool((edges == edges[:, :1]).all())
    assert edges[4:6, 0].tolist() == [0, 0]
    assert int(edges[7, 0]) == 1, "NaN comes before +inf"


def test_rows_of_one_batch_need_not_be_alike(isa):
    """Plain, greedy, filtered and refused rows side by side, in every place of a group of rows drawn together."""
    generator = torch.Generator().manual_seed(12)
    for vocabulary in (65, 700):
        x, columns = random_logits(200, vocabulary, generator), random_columns(200, generator, filters=False)
        columns["top_k"][torch.rand(200, generator=generator) < 0.1] = 3
        columns["min_p"][torch.rand(200, generator=generator) < 0.05] = -1.0
        x[torch.rand(200, generator=generator) < 0.05, 1] = math.nan
        expected = draw("reference", x, columns, logprobs=False)
        assert set(expected[4].tolist()) == {0, 1, 4}
        for rows in (1, 7, 8, 9, 200):
            part = {name: column[:rows] for name, column in columns.items()}
            draws.assert_same(draw("cpu", x[:rows], part, logprobs=False), tuple(t[:rows] for t in expected))


@pytest.mark.parametrize("votes", [2, 8, 9, 80])
def test_votes_equal_reference(isa, votes):
    generator = torch.Generator().manual_seed(votes)
    for vocabulary in (17, 256, 3000):
        x, columns = random_logits(12, vocabulary, generator), random_columns(12, generator, filters=True)
        for logprobs in (False, True):
            expected = draw("reference", x, columns, None, votes, logprobs)
            draws.assert_same(draw("cpu", x, columns, None, votes, logprobs), expected, f"V={vocabulary}")


@pytest.mark.parametrize("vocabulary", [40, 1500, 9000])
def test_filters_equal_reference(isa, vocabulary):
    """Selections among few and many candidates: every size of top_k relative to the vocabulary, top_p without it."""
    generator = torch.Generator().manual_seed(vocabulary)
    sizes = [1, 2, 16, 17, 39, 40, 100, 500, vocabulary - 1, vocabulary, vocabulary + 1]
    x = random_logits(2 * len(sizes), vocabulary, generator)
    columns = random_columns(len(x), generator, filters=True)
    columns["scale"].fill_(1.3)
    columns["top_k"] = torch.tensor(sizes + [0] * len(sizes))
    expected = draw("reference", x, columns)
    draws.assert_same(draw("cpu", x, columns), expected, f"V={vocabulary}")


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "rows"), [(5, 1_000_000), (65, 30_000), (300, 4_000)])
def test_cpp_equals_reference_on_a_million_draws(vocabulary, rows):
    generator = torch.Generator().manual_seed(rows)
    x = random_logits(rows, vocabulary, generator)
    columns = random_columns(rows, generator, filters=vocabulary == 65)
    draws.assert_same(draw("cpu", x, columns, logprobs=False), draw("reference", x, columns, logprobs=False))


@needs_cpu
def test_rows_beyond_two_to_the_32_elements():
    """257 x 2**24 logits; pages never written share the system's one page of zeros, so this needs little memory."""
    rows, vocabulary = 257, 1 << 24
    reserve_nothing = 0x4000  # MAP_NORESERVE of Linux on x86-64 and arm64
    try:
        pages = mmap.mmap(-1, 4 * rows * vocabulary, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    except (OSError, ValueError) as refusal:
        pytest.skip(f"needs a system that reserves 17 GB of address space without memory: {refusal}")
    x = torch.from_numpy(np.frombuffer(pages, dtype=np.float32)).view(rows, vocabulary)
    x[0, 3] = x[128, 4] = x[256, 5] = 1.0
    columns = plain_columns(rows, 0.0)
    looked_at = [0, 1, 128, 256]
    columns["top_k"].fill_(-1)[looked_at] = 0  # rows refused for their parameters are never read
    token, *_, status = draw("cpu", x, columns, logprobs=False)
    assert status[looked_at].tolist() == [0] * 4
    assert int((status == 4).sum()) == rows - 4
    assert token[looked_at].tolist() == [3, 0, 4, 5]


# --- what a row's draw depends on -----------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("vocabulary", [65, 700])
def test_a_row_does_not_depend_on_its_batch(name, vocabulary):
    generator = torch.Generator().manual_seed(3)
    rows = 60
    x, columns = random_logits(rows, vocabulary, generator), random_columns(rows, generator, filters=True)
    mask = torch.rand(rows, vocabulary, generator=generator) < 0.8
    whole = draw(name, x, columns, mask, 3)
    take = lambda index: (x[index], {k: c[index] for k, c in columns.items()}, mask[index], 3)  # noqa: E731
    order = torch.randperm(rows, generator=generator)
    draws.assert_same(draw(name, *take(order)), tuple(t[order] for t in whole), "permuted")
    parts = [draw(name, *take(torch.arange(a, b))) for a, b in ((0, 1), (1, 25), (25, rows))]
    draws.assert_same(tuple(torch.cat(t) for t in zip(*parts)), whole, "split")
    padded = torch.nn.functional.pad(x, (0, 300), value=-math.inf)
    draws.assert_same(draw(name, padded, columns, torch.nn.functional.pad(mask, (0, 300)), 3)[:1] * 5, whole[:1] * 5)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    draws.assert_same(draw(name, strided, columns, mask, 3), whole, "strided")
    torch.set_num_threads(2)
    draws.assert_same(draw(name, x, columns, mask, 3), whole, "two threads")


@both_backends
def test_bad_rows_leave_their_neighbours_alone(name):
    generator = torch.Generator().manual_seed(4)
    x, columns = torch.randn(64, 300, generator=generator), random_columns(64, generator, filters=True)
    good = draw(name, x, columns)
    bad = x.clone()
    bad[10, 7], bad[20] = math.nan, -math.inf
    bad[30, 299] = math.inf
    found = draw(name, bad, columns)
    assert found[4].nonzero()[:, 0].tolist() == [10, 20, 30]
    assert found[4][[10, 20, 30]].tolist() == [
        definition.STATUS_NAN, definition.STATUS_EMPTY, definition.STATUS_INFINITE,
    ]  # fmt: skip
    others = found[4] == 0
    draws.assert_same(tuple(t[others] for t in found), tuple(t[others] for t in good))


@both_backends
def test_random_words_are_named_by_seed_sequence_step(name):
    """Every bit of the 64-bit seed and sequence id and of the 32-bit step changes draws."""
    x = torch.zeros(1, 200).expand(32, -1)
    base = draw(name, x, plain_columns(32))[0]
    for field, bits in (("seed", (0, 31, 32, 63)), ("sequence", (8, 31, 32, 63)), ("step", (0, 31))):
        for bit in bits:
            columns = plain_columns(32)
            columns[field] = columns[field] ^ struct.unpack("<q", struct.pack("<Q", 1 << bit))[0]
            assert not torch.equal(draw(name, x, columns)[0], base), (field, bit)
    columns = plain_columns(32)
    columns["step"] += 1 << 32
    assert torch.equal(draw(name, x, columns)[0], base), "bits of step above 32 count"

"""The C++ kernels of lstm, gru and rnn, in every instruction set of this CPU, against the definition in float64."""

import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastrnn import backends, reference
from fastrnn.library import ARGUMENTS, GATES, RESULTS
from oracle import check

missing = backends.extension_missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")
if missing is None:
    import fastrnn._C  # noqa: F401  registers torch.ops.fastrnn_cpu

KINDS = ["lstm", "lstm-proj", "gru", "rnn-tanh", "rnn-relu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
NEEDS = {"portable": "nothing", "avx2": "AVX2 and FMA", "avx512": "AVX-512 (F, BW, DQ, VL)",
         "avx512_bf16": "AVX-512 with BF16 and VNNI", "amx": "AMX"}  # fmt: skip
cpu = torch.ops.fastrnn_cpu


@pytest.fixture(params=list(NEEDS), autouse=True)
def isa(request):
    """Runs a test once per instruction set, with every new result filled with NaN before its kernel sees it."""
    try:
        cpu.set_isa(request.param)
    except RuntimeError:
        pytest.skip(f"needs a CPU with {NEEDS[request.param]}")
    torch.use_deterministic_algorithms(True)  # this is what fills uninitialised memory
    yield request.param
    torch.use_deterministic_algorithms(False)
    cpu.set_isa("")


once = pytest.mark.parametrize("isa", ["portable"], indirect=True)  # for what no instruction set changes


def forward_case(
    kind, dtype=torch.float32, time=5, batch=3, inputs=7, hidden=5, masked=False, reverse=False, bias="both"
):
    """A cell and the arguments of its forward op by name."""
    cell, _, detail = kind.partition("-")
    width = max(1, hidden // 2 + 1) if detail == "proj" else hidden

    def make(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    a = {"x": make(time, batch, inputs), "h0": make(batch, width)}
    # Small enough that few units saturate: in float64 the oracle itself rounds 1 - y^2 there.
    rows, scale = GATES[cell] * hidden, 0.5 * hidden**-0.5
    a["w_ih"], a["w_hh"] = make(rows, inputs, scale=scale), make(rows, width, scale=scale)
    a["b_ih"] = make(rows, scale=0.3) if bias in ("both", "ih") else None
    a["b_hh"] = make(rows, scale=0.3) if bias in ("both", "hh") else None
    if cell == "lstm":
        a["c0"] = make(batch, hidden)
        a["w_hr"] = make(width, hidden, scale=hidden**-0.5) if detail == "proj" else None
    a["lengths"] = torch.randint(0, time + 1, (batch,)) if masked else None
    if masked and batch > 1:
        a["lengths"][0], a["lengths"][1] = 0, time
    a["reset"] = torch.rand(time, batch) < 0.3 if masked else None
    a["reverse"] = reverse
    if cell == "rnn":
        a["nonlinearity"] = detail
    else:
        a["save"] = True
    return cell, a


def call(op, named):
    """Results by name of a forward or backward op of the extension."""
    values = getattr(cpu, op)(*(named[n] for n in ARGUMENTS[op]))
    assert len(values) == len(RESULTS[op])
    return dict(zip(RESULTS[op], values))


def with_gradients(cell, a):
    """The arguments of the backward op by name: what forward returned, and gradients of its results."""
    named = a | call(f"{cell}_forward", a)
    named |= {"dy": torch.randn_like(named["y"]), "dhn": torch.randn_like(named["hn"])}
    if cell == "lstm":
        named["dcn"] = torch.randn_like(named["cn"])
    return named


def everything(cell, a, gradients=None):
    """Results of forward and of backward, by name."""
    named = with_gradients(cell, a) if gradients is None else a | call(f"{cell}_forward", a) | gradients
    results = {n: named[n] for n in RESULTS[f"{cell}_forward"]} | call(f"{cell}_backward", named)
    return results


def assert_same_bits(actual, expected, what):
    __tracebackhide__ = True
    assert actual.shape == expected.shape, what
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(as_bits), expected.contiguous().view(as_bits)), what


# Sizes around the tiles: 1 to 8 rows or 16, vectors of 2 to 16, 32 numbers of a row, blocks of 64 rows or more in the
# forward and chunks of 512 or 1024 in the backward pass; weights that are packed ahead, for several chunks of gx or
# more than 4 steps, and such as are read as they lie.
SHAPES = [
    dict(time=1, batch=1, inputs=1, hidden=1),
    dict(time=1, batch=5, inputs=37, hidden=19, masked=True),
    dict(time=1, batch=2, inputs=64, hidden=48, bias="ih"),
    dict(time=5, batch=3, inputs=7, hidden=5, masked=True),
    dict(time=5, batch=3, inputs=7, hidden=5, masked=True, reverse=True),
    dict(time=4, batch=37, inputs=33, hidden=64, reverse=True, bias="none"),
    dict(time=3, batch=2, inputs=130, hidden=67, masked=True, bias="hh"),
    dict(time=30, batch=13, inputs=16, hidden=17, masked=True, reverse=True, bias="ih"),
    dict(time=60, batch=7, inputs=3, hidden=33),
    dict(time=2, batch=6, inputs=150, hidden=140),
    dict(time=90, batch=13, inputs=5, hidden=20, masked=True, reverse=True),
    dict(time=5, batch=300, inputs=3, hidden=140, masked=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_against_the_definition(kind, dtype, shape):
    cell, a = forward_case(kind, dtype, **shape)
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        check(getattr(cpu, op), getattr(reference, op), [named[n] for n in ARGUMENTS[op]], f"{op} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_cells(kind, dtype):
    """Pre-activations of about 1e4 and of nearly 0 in one batch. One input: a sum would cancel in the oracle."""
    cell, a = forward_case(kind, dtype, batch=4, inputs=1, hidden=19)
    a["x"] *= 1e5
    a["x"][:, 1] = 0
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        check(getattr(cpu, op), getattr(reference, op), [named[n] for n in ARGUMENTS[op]], op)


def ulps(actual, exact):
    """Errors in units of the last place of `exact`, a longdouble array; actual is a float array."""
    step = np.spacing(np.abs(exact).astype(actual.dtype)).astype(np.longdouble)
    return np.abs(actual.astype(np.longdouble) - exact) / step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_and_sigmoid_keep_the_accuracy_that_cell_math_promises(dtype):
    size = np.concatenate([np.logspace(-30, 4, 4001), np.linspace(0, 100, 9001)])
    x = torch.from_numpy(np.concatenate([size, -size])).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    column, state = x.reshape(1, -1, 1), torch.zeros(len(x), 1, dtype=dtype)
    tanh = cpu.rnn_forward(column, state, one, zero, None, None, None, None, False, "tanh")[0].flatten().numpy()
    gates = cpu.lstm_forward(column, state, state, one.expand(4, 1), zero.expand(4, 1), *[None] * 5, False, True)[3]
    sigmoid = gates[0, :, 0].numpy()
    exact = x.numpy().astype(np.longdouble)
    assert ulps(tanh, np.tanh(exact)).max() <= 4
    # the logistic function through the side without cancellation; where it is below the least normal number, 0 will do
    e = np.exp(-np.abs(exact))
    expected = np.where(exact >= 0, 1 / (1 + e), e / (1 + e))
    normal = expected >= np.finfo(sigmoid.dtype).tiny
    assert ulps(sigmoid, expected)[normal].max() <= 3
    assert (np.abs(sigmoid[~normal]) <= 2 * np.finfo(sigmoid.dtype).tiny).all()


@pytest.mark.parametrize("time", [6, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind, dtype, time):
    cell, a = forward_case(kind, dtype, time=time, batch=37, inputs=21, hidden=35, masked=True)
    gradients = with_gradients(cell, a)
    whole = everything(cell, a, gradients)
    row_results = [n for n in ("y", "hn", "cn", "gates", "cells", "dx", "dh0", "dc0") if n in whole]

    def rows_of(named, index):
        tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor)}
        batched = {n: v for n, v in tensors.items() if not n.startswith(("w_", "b_"))}
        return named | {n: v[:, index] if v.dim() == 3 or n == "reset" else v[index] for n, v in batched.items()}

    for index in ([0], [5], [36], list(range(36, -1, -1)), [1, 30, 7, 7, 2]):
        part = rows_of(gradients, index)
        for name, value in (call(f"{cell}_forward", part) | call(f"{cell}_backward", part)).items():
            if name in row_results:
                expected = whole[name][:, index] if whole[name].dim() == 3 else whole[name][index]
                assert_same_bits(value, expected, f"{name} of rows {index}")


# Of two steps and more: a single step sums in another order (forward.h). Few steps read W_hh as it lies, for as many
# rows as a tile has (4) and by panels for more (11); nine have it packed.
@pytest.mark.parametrize("batch", [4, 11])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_parts_is_the_sequence_at_once(kind, reverse, batch):
    cell, a = forward_case(kind, time=9, batch=batch, inputs=21, hidden=35, reverse=reverse)
    whole = call(f"{cell}_forward", a)
    states = {"h0": "hn"} | ({"c0": "cn"} if cell == "lstm" else {})
    parts = [slice(0, 2), slice(2, 5), slice(5, 9)]
    a = dict(a)
    x = a["x"]
    for part in reversed(parts) if reverse else parts:
        a["x"] = x[part]
        results = call(f"{cell}_forward", a)
        for name in set(results) - set(states.values()):
            assert_same_bits(results[name], whole[name][part], f"{name}[{part}]")
        a |= {before: results[after] for before, after in states.items()}
    for before, after in states.items():
        assert_same_bits(a[before], whole[after], after)


@pytest.mark.parametrize("time", [12, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind, dtype, time):
    cell, a = forward_case(kind, dtype, time=time, batch=19, inputs=40, hidden=70, masked=True)
    gradients = with_gradients(cell, a)
    one = everything(cell, a, gradients)
    torch.set_num_threads(2)
    two = everything(cell, a, gradients)
    for name in one:
        assert_same_bits(two[name], one[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_arguments_and_no_aliasing(kind):
    cell, a = forward_case(kind, time=4, batch=6, inputs=9, hidden=8, masked=True)
    gradients = with_gradients(cell, a)
    expected = everything(cell, a, gradients)

    def strided(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.stack([value, torch.zeros_like(value)], -1)[..., 0]

    odd = {n: strided(v) for n, v in (a | gradients).items()}
    assert not odd["w_hh"].is_contiguous()
    found = call(f"{cell}_forward", odd) | call(f"{cell}_backward", odd)
    for name in expected:
        assert_same_bits(found[name], expected[name], name)
    inside = [v for v in (a | gradients).values() if isinstance(v, torch.Tensor)]
    starts = [v.untyped_storage().data_ptr() for v in [*found.values(), *inside] if v.numel()]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("sizes", [dict(time=0), dict(batch=0), dict(time=0, batch=0), dict(inputs=0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_sizes(kind, sizes):
    cell, a = forward_case(kind, masked=True, **sizes)
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        check(getattr(cpu, op), getattr(reference, op), [named[n] for n in ARGUMENTS[op]], op)


@pytest.mark.parametrize("kind", ["lstm", "lstm-proj", "gru"])
def test_nothing_is_saved_unless_asked(kind):
    cell, a = forward_case(kind, masked=True)
    saved, unsaved = call(f"{cell}_forward", a), call(f"{cell}_forward", a | {"save": False})
    for name, value in unsaved.items():
        if name in ("gates", "cells"):
            assert value.shape == (0,)
        else:
            assert_same_bits(value, saved[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind, dtype):
    cell, a = forward_case(kind, dtype, batch=4, hidden=6)
    clean = call(f"{cell}_forward", a)
    a["x"][2, 1, 3] = float("nan")
    dirty = call(f"{cell}_forward", a)
    assert dirty["y"][2:, 1].isnan().all()
    assert dirty["hn"][1].isnan().all()
    assert_same_bits(dirty["y"][:2, 1], clean["y"][:2, 1], "before the NaN")
    for row in (0, 2, 3):
        assert_same_bits(dirty["y"][:, row], clean["y"][:, row], "another row")
    a["x"][2, 1, 3] = float("inf")
    assert call(f"{cell}_forward", a)["y"].shape == clean["y"].shape  # any value, no crash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_a_length_does_not_matter(kind, dtype):
    cell, a = forward_case(kind, dtype, batch=5, masked=True)
    gradients = with_gradients(cell, a)
    clean = everything(cell, a, gradients)
    beyond = torch.arange(a["x"].shape[0]).unsqueeze(-1) >= a["lengths"]
    assert beyond.any()
    a = a | {"x": a["x"].masked_fill(beyond.unsqueeze(-1), float("nan"))}
    poisoned = gradients | {"x": a["x"], "dy": gradients["dy"].masked_fill(beyond.unsqueeze(-1), float("nan"))}
    found = everything(cell, a, poisoned)
    for name in clean:
        assert_same_bits(found[name], clean[name], name)
    for name in ("y", "gates", "cells", "dx"):
        assert name not in found or (found[name][beyond] == 0).all(), name


BAD = {
    "w_hh": (torch.zeros(12, 4), r"lstm_forward: w_hh must be \(4H, H\) = \(12, 3\) because h0 has H=3, got \(12, 4\)"),
    "w_ih": (torch.zeros(9, 2), r"w_ih must be \(4H, I\) = \(12, 2\) because h0 has H=3 and x has I=2, got \(9, 2\)"),
    "b_ih": (torch.zeros(3), r"b_ih must be \(4H,\) = \(12,\) because h0 has H=3, got \(3,\)"),
    "c0": (torch.zeros(1, 3), r"c0 must be \(B, H\) = \(2, 3\) because x has B=2 and h0 has H=3, got \(1, 3\)"),
    "x": (torch.zeros(2), r"lstm_forward: x must be \(T, B, I\), got \(2,\)"),
    "h0": (torch.zeros(2, 0), r"h0 must have at least one hidden unit, got \(2, 0\)"),
    "b_hh": (torch.zeros(12).double(), "b_hh must be float32, got float64"),
    "lengths": (torch.tensor([1, 9]), "lengths must be within 0 and T=5, got 9 for row 1"),
    "reset": (torch.zeros(5, 2), "reset must be bool, got float32"),
}


@once
@pytest.mark.parametrize("name", BAD)
def test_messages_say_what_is_needed_and_why(name):
    _, a = forward_case("lstm", time=5, batch=2, inputs=2, hidden=3)
    value, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call("lstm_forward", a | {name: value})


@once
def test_messages_of_other_arguments():
    _, a = forward_case("lstm-proj", hidden=4)
    with pytest.raises(RuntimeError, match=r"w_ih must be \(4H, I\) = \(16, 7\) because c0 has H=4 and x has I=7"):
        call("lstm_forward", a | {"w_ih": torch.zeros(12, 7)})
    with pytest.raises(RuntimeError, match=r"w_hh must be \(4H, P\) = \(16, 3\) because c0 has H=4 and h0 has P=3"):
        call("lstm_forward", a | {"w_hh": torch.zeros(16, 4)})
    _, a = forward_case("rnn-tanh")
    with pytest.raises(RuntimeError, match="rnn_forward: nonlinearity must be 'tanh' or 'relu', got 'sine'"):
        call("rnn_forward", a | {"nonlinearity": "sine"})
    _, a = forward_case("gru", dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"gru_forward: x must be float32, float64 or bfloat16.*got float16"):
        call("gru_forward", a)


DIGEST = """
import sys
sys.path.insert(0, "tests")
import test_cpu_cells as t
print(t.cpu.isa(), t.digest())
"""


def digest():
    """One hash over the results of every kernel."""
    torch.manual_seed(0)
    found = hashlib.sha256()
    for kind in KINDS:
        for value in everything(*forward_case(kind, time=7, batch=9, inputs=11, hidden=13, masked=True)).values():
            found.update(value.numpy().tobytes())
    return found.hexdigest()


def in_a_process(code, root, **environment):
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False)


def test_results_do_not_depend_on_what_memory_held(isa, root):
    """The environment variable picks the variant; glibc fills what malloc gives and takes back with a pattern."""
    done = in_a_process(DIGEST, root, FASTRNN_CPU_ISA=isa, MALLOC_PERTURB_="165")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [isa, digest()]


@once
def test_an_unknown_instruction_set_is_refused(isa, root):
    with pytest.raises(RuntimeError, match="set_isa must be portable, avx2, avx512, avx512_bf16 or amx, got 'sse9'"):
        cpu.set_isa("sse9")
    assert cpu.isa() == isa
    code = "import torch, fastrnn._C; print(torch.ops.fastrnn_cpu.isa())"
    done = in_a_process(code, root, FASTRNN_CPU_ISA="neon")
    assert done.returncode == 1
    assert "FASTRNN_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx, got 'neon'" in done.stderr


@once
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_portable_variant_alone_compiles(cell, root):
    """What a processor other than x86-64 gets."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = "-std=c++20 -O1 -Wall -Wextra -Werror -fsyntax-only -DFR_X86=0"
    command = [*compiler.split(), *flags.split(), str(root / "csrc" / "cpu" / f"{cell}.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@once
def test_build_info_names_the_compiler():
    assert cpu.build_info().startswith("compiler ")

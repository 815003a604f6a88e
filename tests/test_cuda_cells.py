"""The CUDA kernels of lstm, gru and rnn against the definition in float64: on a GPU, and without one on the CPU, where
the same sources run thread by thread (tests/native/cuda_on_cpu.h)."""

import subprocess

import cuda_on_cpu
import pytest
import torch
from test_cpu_cells import assert_same_bits, forward_case

from fastrnn import backends, reference
from fastrnn.library import ARGUMENTS, RESULTS
from oracle import assert_all_close, check, to_double

KINDS = ["lstm", "gru", "rnn-tanh", "rnn-relu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (row tiles, CTAs in a cluster): a launch a step, one CTA with 8 and with 32 rows, clusters.
PLANS = [(1, 0), (4, 0), (1, 1), (4, 1), (1, 2), (4, 4)]


class OnGpu:
    """The ops of the extension on the GPU, for arguments and results on the CPU."""

    def __getattr__(self, op):
        def run(*args, **options):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            results = getattr(torch.ops.fastrnn_cuda, op)(*moved, **options)
            return None if results is None else tuple(r.cpu() for r in results)

        return run


@pytest.fixture(scope="module", params=["on_cpu", pytest.param("on_gpu", marks=pytest.mark.gpu)])
def cuda(request):
    """The ops, with every new result filled with NaN before its kernel sees it."""
    if request.param == "on_gpu":
        assert backends.extension_missing() is None
        ops = OnGpu()
    elif why := cuda_on_cpu.refusal():
        pytest.skip(why)
    else:
        ops = cuda_on_cpu.ops()
    torch.use_deterministic_algorithms(True)  # this is what fills uninitialised memory
    yield ops
    torch.use_deterministic_algorithms(False)
    ops.want_plan(0, -1)


def call(ops, op, named, **options):
    values = getattr(ops, op)(*(named[n] for n in ARGUMENTS[op]), **options)
    return dict(zip(RESULTS[op], values))


def with_gradients(cell, a):
    """The arguments of the backward op by name: what the definition's forward returned, gradients of its results."""
    named = a | call(reference, f"{cell}_forward", a)
    named |= {"dy": torch.randn_like(named["y"]), "dhn": torch.randn_like(named["hn"])}
    return named | ({"dcn": torch.randn_like(named["cn"])} if cell == "lstm" else {})


def everything(ops, cell, gradients):
    return call(ops, f"{cell}_forward", gradients) | call(ops, f"{cell}_backward", gradients)


# Sizes around the tiles: 16 units, 8 or 32 rows, 16 numbers along k, of which registers keep the first.
SHAPES = [
    dict(time=1, batch=1, inputs=1, hidden=1),
    dict(time=1, batch=9, inputs=37, hidden=19, masked=True),
    dict(time=5, batch=3, inputs=7, hidden=5, masked=True),
    dict(time=4, batch=9, inputs=8, hidden=36, masked=True, reverse=True, bias="ih"),
    dict(time=3, batch=35, inputs=5, hidden=64, reverse=True, bias="none"),
    dict(time=2, batch=2, inputs=6, hidden=101, masked=True, bias="hh"),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_against_the_definition(cuda, kind, dtype, shape, plan):
    cuda.want_plan(*plan)
    cell, a = forward_case(kind, dtype, **shape)
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        check(getattr(cuda, op), getattr(reference, op), [named[n] for n in ARGUMENTS[op]], f"{op} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_registers_and_in_shared_memory(cuda, kind, dtype):
    """More tiles along k than registers keep, in a cluster of 4 whose last CTA has fewer warps with work."""
    cuda.want_plan(1, 4)
    cell, a = forward_case(kind, dtype, time=3, batch=2, inputs=3, hidden=265 if kind.startswith("rnn") else 167)
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        check(getattr(cuda, op), getattr(reference, op), [named[n] for n in ARGUMENTS[op]], op)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tf32_errs_as_the_float16_of_its_fraction(cuda, kind, plan):
    """TF32 rounds the factors of a product to float16's 10 bits of fraction."""
    cuda.want_plan(*plan)
    cell, a = forward_case(kind, time=4, batch=9, inputs=7, hidden=37, masked=True)
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        args = [named[n] for n in ARGUMENTS[op]]
        halves = [v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in args]
        found, exact = getattr(cuda, op)(*args, tf32=True), getattr(cuda, op)(*args)
        definition = getattr(reference, op)
        assert_all_close(found, definition(*to_double(tuple(args))), definition(*halves), op)
        assert any(not torch.equal(f, e) for f, e in zip(found, exact)), "tf32 changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh"])
def test_rows_do_not_depend_on_the_batch_nor_on_the_cluster(cuda, kind, dtype):
    cell, a = forward_case(kind, dtype, time=4, batch=11, inputs=5, hidden=52, masked=True)
    gradients = with_gradients(cell, a)
    forward, own = RESULTS[f"{cell}_forward"], (*RESULTS[f"{cell}_forward"], "dh0", "dc0")  # no product of torch's
    cuda.want_plan(1, 1)
    whole = everything(cuda, cell, gradients)
    for plan in ((4, 1), (1, 2), (1, 4)):
        cuda.want_plan(*plan)
        other = everything(cuda, cell, gradients)
        for name in set(own) & set(whole):
            assert_same_bits(other[name], whole[name], f"{name} of plan {plan}")
    cuda.want_plan(1, 1)
    for index in ([10], [9, 3, 3, 0]):
        batched = {n: v for n, v in gradients.items() if isinstance(v, torch.Tensor) and not n.startswith(("w_", "b_"))}
        part = gradients | {n: v[:, index] if v.dim() == 3 or n == "reset" else v[index] for n, v in batched.items()}
        found = call(cuda, f"{cell}_forward", part)
        for name in forward:
            expected = whole[name][:, index] if whole[name].dim() == 3 else whole[name][index]
            assert_same_bits(found[name], expected, f"{name} of rows {index}")


@pytest.mark.parametrize("plan", [(1, 0), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh"])
def test_a_sequence_in_parts_is_the_sequence_at_once(cuda, kind, reverse, plan):
    cuda.want_plan(*plan)
    cell, a = forward_case(kind, time=7, batch=3, inputs=5, hidden=35, reverse=reverse)
    whole = call(cuda, f"{cell}_forward", a)
    states = {"h0": "hn"} | ({"c0": "cn"} if cell == "lstm" else {})
    x, parts = a["x"], [slice(0, 2), slice(2, 7)]
    for part in reversed(parts) if reverse else parts:
        a = a | {"x": x[part]}
        results = call(cuda, f"{cell}_forward", a)
        for name in set(results) - set(states.values()):
            assert_same_bits(results[name], whole[name][part], f"{name}[{part}]")
        a = a | {before: results[after] for before, after in states.items()}
    for before, after in states.items():
        assert_same_bits(a[before], whole[after], after)


@pytest.mark.parametrize("plan", [(1, 0), (1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh"])
def test_what_lies_beyond_a_length_does_not_matter(cuda, kind, plan):
    cuda.want_plan(*plan)
    cell, a = forward_case(kind, batch=5, hidden=20, masked=True)
    gradients = with_gradients(cell, a)
    clean = everything(cuda, cell, gradients)
    beyond = (torch.arange(a["x"].shape[0]).unsqueeze(-1) >= a["lengths"]).unsqueeze(-1)
    assert beyond.any()
    poisoned = {n: gradients[n].masked_fill(beyond, float("nan")) for n in ("x", "dy")}
    found = everything(cuda, cell, gradients | poisoned)
    for name in clean:
        assert_same_bits(found[name], clean[name], name)


@pytest.mark.parametrize("sizes", [dict(time=0), dict(batch=0), dict(time=0, batch=0), dict(inputs=0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_sizes(cuda, kind, sizes):
    cuda.want_plan(0, -1)
    cell, a = forward_case(kind, masked=True, **sizes)
    for op, named in ((f"{cell}_forward", a), (f"{cell}_backward", with_gradients(cell, a))):
        check(getattr(cuda, op), getattr(reference, op), [named[n] for n in ARGUMENTS[op]], op)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-tanh"])
def test_strided_and_misaligned_arguments(cuda, kind):
    cuda.want_plan(0, -1)
    cell, a = forward_case(kind, time=4, batch=6, inputs=8, hidden=8, masked=True)
    gradients = with_gradients(cell, a)
    expected = everything(cuda, cell, gradients)

    def strided(value):
        return torch.stack([value, torch.zeros_like(value)], -1)[..., 0] if isinstance(value, torch.Tensor) else value

    def misaligned(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape)

    for change in (strided, misaligned):
        changed = {n: change(v) for n, v in gradients.items()}
        for op in (f"{cell}_forward", f"{cell}_backward"):
            check(getattr(cuda, op), getattr(reference, op), [changed[n] for n in ARGUMENTS[op]], change.__name__)
        # Of what goes into torch's own products, another layout may be another kernel and another rounding.
        found = everything(cuda, cell, changed | {n: gradients[n] for n in ("x", "w_ih", "y")})
        for name in expected:
            assert_same_bits(found[name], expected[name], f"{name}, {change.__name__}")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nothing_is_saved_unless_asked(cuda, kind):
    cuda.want_plan(0, -1)
    cell, a = forward_case(kind, masked=True)
    saved, unsaved = call(cuda, f"{cell}_forward", a), call(cuda, f"{cell}_forward", a | {"save": False})
    for name, value in unsaved.items():
        if name in ("gates", "cells"):
            assert value.shape == (0,)
        else:
            assert_same_bits(value, saved[name], name)


def test_messages(cuda):
    _, a = forward_case("lstm", hidden=3, batch=2, inputs=2)
    with pytest.raises(RuntimeError, match=r"lstm_forward: w_hh must be \(4H, H\) = \(12, 3\) because h0 has H=3"):
        call(cuda, "lstm_forward", a | {"w_hh": torch.zeros(12, 4)})
    with pytest.raises(RuntimeError, match=r"x must be float32, float16 or bfloat16.*, got float64"):
        call(cuda, "lstm_forward", a | {"x": a["x"].double()})
    _, a = forward_case("lstm-proj", hidden=4)
    with pytest.raises(RuntimeError, match=r"lstm_forward: the CUDA kernels have no projection \(w_hr\)"):
        call(cuda, "lstm_forward", a | {"c0": torch.zeros(3, 3)})
    _, a = forward_case("rnn-tanh")
    with pytest.raises(RuntimeError, match="rnn_forward: nonlinearity must be 'tanh' or 'relu', got 'sine'"):
        call(cuda, "rnn_forward", a | {"nonlinearity": "sine"})
    with pytest.raises(RuntimeError, match=r"want_plan: row_tiles must be 0, 1 or 4.*got 2 and 3"):
        cuda.want_plan(2, 3)


def test_plans_of_all_sizes_fit(root):
    """tests/native/plan_test.cpp: the choice of kernels is arithmetic, and holds on every device for every size."""
    compiler = cuda_on_cpu.compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = cuda_on_cpu.OUT / "plan_test"
    program.parent.mkdir(parents=True, exist_ok=True)
    flags = "-std=c++20 -O1 -Wall -Wextra -Werror -fsanitize=undefined -fno-sanitize-recover=all"
    source = root / "tests" / "native" / "plan_test.cpp"
    command = [*compiler.split(), *flags.split(), str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("plans hold\n")

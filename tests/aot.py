"""Compiles every Triton kernel for GPUs that are not there, and fails where one would run badly or draw differently.

    python tests/aot.py [--arch 80,90] [--only WORD] [--jobs N] [--list] [--bad]

Every ``variants()`` of the modules of kernels/ is compiled by the triton that Python imports, once for each
architecture; neither a GPU nor a driver is needed. A line a variant tells registers, stack, shared memory and the
matrix instruction. It fails on

    stack      a kernel spills registers or keeps an array in local memory, of more than KEPT_BYTES or in a loop
    shared     more shared memory than a program can have
    inexact    a kernel that decides draws (modules of EXACT) has an approximate instruction, flushes denormals, lets
               ptxas contract a multiplication and an addition, or has a fma that the definition of a draw does not

and on anything the compiler refuses. ``--bad`` compiles kernels that are wrong in each of these ways instead, and fails
where one of them passes. The exit status is 1 after a failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
os.environ.pop("TRITON_INTERPRET", None)  # triton decides when it is imported whether it compiles
warnings.simplefilter("ignore")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that one program can have, bytes: CUDA C++ Programming Guide, table of technical specifications.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes a thread that may lie in local memory while a loop runs that does not touch them: what is needed before it and
# after it is computed once. So written and read once, they cost nothing; nor does one access in a loop.
KEPT_BYTES, LOOPED = 32, 1
EXACT = ("sample", "head")  # their kernels are launched with enable_fp_fusion=False
MATRIX = ("tcgen05.mma", "wgmma", "mma.sync")


class Report(NamedTuple):
    """What a compiled kernel takes of a GPU."""

    registers: int
    stack: int  # bytes a thread: spills and local arrays
    looped: int  # instructions within loops that read or write them
    shared: int  # bytes a program
    matrix: str
    ptx: str


def kernel_modules() -> list[str]:
    """The modules of this checkout's kernels/ that have variants, imported under a name that no installation has."""
    spec = importlib.util.spec_from_file_location(
        "checked_kernels", ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["checked_kernels"] = package
    spec.loader.exec_module(package)
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__")
    return [name for name in names if hasattr(importlib.import_module(f"checked_kernels.{name}"), "variants")]


def compile_variant(variant, arch: int, exact: bool) -> Report:
    """Raises what the compiler raises."""
    fn, constants = variant.fn, variant.constexprs
    types = {name: "constexpr" if name in constants else variant.signature[name] for name in fn.arg_names}
    places = {name: place for place, name in enumerate(fn.arg_names)}
    source = ASTSource(
        fn=fn, signature=types, constexprs=constants,
        attrs={(places[name],): [["tt.divisibility", 16]] for name in variant.aligned if name not in constants},
    )  # fmt: skip
    options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, maxnreg=variant.maxnreg)
    options["enable_fp_fusion"] = not exact
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = cuobjdump("-res-usage", file.name)
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told).groups())
        looped = local_in_loops(cuobjdump("-sass", file.name)) if stack + local else 0
    ptx = compiled.asm["ptx"]
    matrix = next((name for name in MATRIX if name in ptx), "-")
    return Report(registers, stack + local, looped, compiled.metadata.shared, matrix, ptx)


def cuobjdump(option: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def local_in_loops(sass: str) -> int:
    """How many instructions between a branch back and its target read or write local memory."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    branches = [(int(to.group(1), 16), at) for at, text in code if (to := re.search(r"\bBRA 0x([0-9a-f]+)", text))]
    places = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in branches) for at in places)


def inexact(ptx: str, product_by_fma: bool) -> list[str]:
    """Why a draw decided by this code could differ from its definition.

    An instruction without .rn may be contracted by ptxas (PTX ISA, floating-point instructions). The definition's only
    fma are the five after each rounding of z to an integer; a matrix product without tensor cores has its own too.
    Instructions of float64 do not count: log-probabilities and margins are made by them, no decision is.
    """
    found = re.findall(r"^\s*(?:@%\w+\s+)?([a-z][\w.:]*)\s", ptx, re.MULTILINE)
    found = [name for name in found if not name.endswith(".f64")]
    approximate = {name for name in found if ".approx" in name or name.startswith("div.full") or ".ftz" in name}
    loose = {name for name in found if re.fullmatch(r"(add|sub|mul|mad|fma)(\.sat)?\.f32", name)}
    problems = [f"has {name}" for name in sorted(approximate)]
    problems += [f"has {name}, which ptxas may contract" for name in sorted(loose)]
    rounded = found.count("cvt.rzi.s32.f32")
    fused = sum(name.startswith("fma.rn.f32") for name in found)
    if rounded == 0:
        problems.append("has no exponential of a draw")
    if fused < 5 * rounded or (fused != 5 * rounded and not product_by_fma):
        problems.append(f"has {fused} fma for {rounded} exponentials of 5 each")
    return problems


def problems(report: Report, arch: int, exact: bool, matrix_product: bool) -> list[str]:
    """What is wrong with a compiled kernel, in words; nothing if it is right."""
    found = []
    if report.looped > LOOPED or report.stack > KEPT_BYTES:
        found.append(f"stack: {report.stack} bytes a thread, {report.looped} accesses in loops; spills or local arrays")
    if report.shared > SHARED_LIMIT[arch]:
        found.append(f"shared: {report.shared} bytes, sm_{arch} has {SHARED_LIMIT[arch]}")
    if exact:
        by_fma = matrix_product and report.matrix == "-"
        found += [f"inexact: {problem}" for problem in inexact(report.ptx, by_fma)]
    return found


# --- kernels that are wrong ------------------------------------------------------------------------------------------


@triton.jit
def wrong_draw(p_x, p_y, SIZE: tl.constexpr, WAY: tl.constexpr):
    """A fit of 2**z with what must not stand on the path of a decision."""
    o = tl.arange(0, SIZE)
    x = tl.load(p_x + o)
    f = x - x.to(tl.int32).to(tl.float32)
    if WAY == "exp2":
        f = tl.exp2(f)
    elif WAY == "divide":
        f = f / x
    elif WAY == "floor":
        f = tl.floor(f)
    else:
        f = f * x + f
    for _ in tl.static_range(5):
        f = tl.fma(f, x, x)
    tl.store(p_y + o, f)


@triton.jit
def wrong_size(p_x, p_y, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Products of matrices of SIZE columns, with as many of them on their way as there are stages."""
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(COUNT):
        x = tl.load(p_x + k * SIZE * SIZE + o)
        total = tl.dot(x, tl.trans(tl.load(p_x + (COUNT + k) * SIZE * SIZE + o)), total)
    tl.store(p_y + o, total)


@triton.jit
def wrong_shape(p_x, p_y, SIZE: tl.constexpr):
    """A block whose size is no power of two."""
    o = tl.arange(0, SIZE)
    tl.store(p_y + o, tl.load(p_x + o))


def bad_variants() -> list[tuple]:
    """The arguments of `check` but for the architecture, and a word of the failure that must come."""
    kernel_modules()
    variant_type = importlib.import_module("checked_kernels.launch").Variant

    def variant(name: str, fn, types: str, warps: int, stages: int, **constants):
        return variant_type(name, fn, {"p_x": types, "p_y": "*fp32"}, constants, warps, stages, ("p_x", "p_y"))

    return [
        (variant("spill", wrong_size, "*fp16", 1, 2, SIZE=128, COUNT=64), False, True, True, "stack"),
        (variant("shared", wrong_size, "*fp16", 4, 16, SIZE=64, COUNT=64), False, True, True, "shared"),
        (variant("shape", wrong_shape, "*fp32", 4, 3, SIZE=48), False, False, True, "refused"),
        (variant("exp2", wrong_draw, "*fp32", 4, 3, SIZE=128, WAY="exp2"), True, False, False, "approx"),
        (variant("divide", wrong_draw, "*fp32", 4, 3, SIZE=128, WAY="divide"), True, False, False, "div.full"),
        (variant("contracted", wrong_draw, "*fp32", 4, 3, SIZE=128, WAY="sum"), True, False, True, "fma for"),
        (variant("loose", wrong_draw, "*fp32", 4, 3, SIZE=128, WAY="sum"), True, False, True, "may contract"),
        (variant("flushed", wrong_draw, "*fp32", 4, 3, SIZE=128, WAY="floor"), True, False, False, "ftz"),
    ]


def check(variant, arch: int, exact: bool, matrix_product: bool, fusion: bool) -> tuple[str, list[str]]:
    """A line about a variant on an architecture, and what is wrong with it."""
    start = time.perf_counter()
    try:
        report = compile_variant(variant, arch, not fusion)
    except Exception as refusal:  # noqa: BLE001 (whatever a compiler raises is its refusal of this variant)
        reason = str(refusal).strip().splitlines() or [""]
        return f"{variant.name:44s} sm_{arch}", [f"refused: {type(refusal).__name__}: {reason[-1][:160]}"]
    line = (
        f"{variant.name:44s} sm_{arch} {time.perf_counter() - start:6.2f} s {report.registers:4d} registers "
        f"{report.stack:5d} stack {report.shared:7d} shared {variant.num_warps:3d} warps {report.matrix}"
    )
    return line, problems(report, arch, exact, matrix_product)


def all_variants() -> list[tuple]:
    """The arguments of `check` but for the architecture, and no word to look for."""
    found = []
    for name in kernel_modules():
        module = importlib.import_module(f"checked_kernels.{name}")
        found += [(v, name in EXACT, name == "head", name not in EXACT, "") for v in module.variants()]
    return found


def in_parts(jobs: int) -> int:
    """Runs this program in ``jobs`` processes of which each takes its share; the exit status."""
    command = [sys.executable, __file__, *sys.argv[1:], "--share"]
    running = [subprocess.Popen([*command, f"{k}/{jobs}"]) for k in range(jobs)]
    return max(process.wait() for process in running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--bad", action="store_true")
    arguments = parser.parse_args()
    if arguments.jobs > 1 and not arguments.share:
        return in_parts(arguments.jobs)
    work = bad_variants() if arguments.bad else all_variants()
    work = [item for item in work if arguments.only in item[0].name]
    part, parts = map(int, (arguments.share or "0/1").split("/"))
    if arguments.list:
        print(*[item[0].name for item in work], sep="\n")
        return 0
    failed = count = 0
    for variant, exact, matrix_product, fusion, word in work[part::parts]:
        for arch in map(int, arguments.arch.split(",")):
            line, wrong = check(variant, arch, exact, matrix_product, fusion)
            print("; ".join([line, *wrong]), flush=True)
            failed += not any(word in problem for problem in wrong) if word else bool(wrong)
            count += 1
    print(f"triton {triton.__version__}: {count} compiled, {failed} {'not caught' if arguments.bad else 'wrong'}")
    return 1 if failed or not work else 0


if __name__ == "__main__":
    sys.exit(main())

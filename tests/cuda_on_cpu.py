"""Builds the cells' CUDA kernels and their bindings to run on the CPU (tests/native/cuda_on_cpu.h), without a GPU."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "cuda_on_cpu"
SOURCES = [
    *(f"csrc/cuda/{name}.cu" for name in ("lstm", "gru", "rnn", "cells")),
    "tests/native/cuda_on_cpu.cpp",
    "csrc/bindings_cuda_cells.cpp",
]
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wno-unknown-pragmas -DFR_CUDA_ON_CPU "
    "-DTORCH_TARGET_VERSION=0x020b000000000000 -Itests/native"
)


def refusal() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if platform.machine() != "x86_64":
        return "running CUDA kernels on the CPU needs an x86-64 machine"
    if not (_cuda() / "cuda_runtime_api.h").exists():
        return f"running CUDA kernels on the CPU needs CUDA's headers; none in {_cuda()}, set CUDA_HOME"
    return None if compiler() else "running CUDA kernels on the CPU needs a C++ compiler"


@functools.cache
def ops():
    """The namespace ``torch.ops.fastrnn_cuda_on_cpu``, built when its sources are newer than what was built."""
    library = OUT / "cells.so"
    headers = [p for folder in ("csrc", "tests/native") for p in (ROOT / folder).rglob("*") if p.suffix != ".cpp"]
    newest = max(p.stat().st_mtime for p in [*headers, *(ROOT / s for s in SOURCES)] if p.is_file())
    if not library.exists() or library.stat().st_mtime < newest:
        _build(library)
    torch.ops.load_library(library)
    return torch.ops.fastrnn_cuda_on_cpu


def _cuda() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def _build(library: Path) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    command = shlex.split(compiler() or "c++")
    system = [word for folder in [*cpp_extension.include_paths(), str(_cuda())] for word in ("-isystem", folder)]

    def compiled(source: str) -> str:
        made = str(OUT / Path(source).name) + ".o"
        _run([*command, *FLAGS.split(), *system, "-x", "c++", "-c", "-o", made, source])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    torch_libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    _run([*command, "-shared", "-o", str(library), *objects, *torch_libraries])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-4000:]}"

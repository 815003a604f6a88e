"""Builds fastrnn._C, the C++ (and CUDA) extension. Everything else about the package is in pyproject.toml.

The extension uses only torch's stable C++ interface of version 2.11 and CPython's limited API of 3.10, so one binary
serves every later torch, CPU-only or CUDA, and every later Python. Environment variables:

FASTRNN_EXTENSION     auto (default): build when a working C++ compiler is found, else install without it and warn
                      0: leave it out | 1: demand it
FASTRNN_CUDA          auto (default): build csrc/cuda/*.cu when torch is a CUDA build and an nvcc of its major version
                      is found | 0: leave the CUDA kernels out
                      1: demand them, also for a CPU-only torch (proves without a GPU that they compile, link and load)
TORCH_CUDA_ARCH_LIST  GPU architectures to compile for; default 8.0;9.0;10.0;12.0+PTX, cut to what nvcc knows
FASTRNN_OPTIMIZE      the C++ compiler's level, default -O2; -O0 compiles in a quarter of the time
CXX, CUDA_HOME, MAX_JOBS   the C++ compiler, the CUDA toolkit, the number of compile jobs
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

CXX_FLAGS = [
    os.environ.get("FASTRNN_OPTIMIZE", "-O2"),
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # A fused multiply-add rounds once, not twice. The sampler's definition names each one; the compiler must add none.
    "-ffp-contract=off",
    # torch 2.11 is the oldest whose stable interface has all that the bindings use.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-lineinfo",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fvisibility=hidden",
    # torch's build helper switches the operators of half and bfloat16 off; the kernels use them.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]


def say(text: str) -> None:
    print(f"fastrnn: {text}", file=sys.stderr, flush=True)


def choice(name: str) -> str:
    """The value of an `auto | 0 | 1` environment variable; SystemExit when it is something else."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"fastrnn: {name} must be auto, 0 or 1, got {value!r}")
    return value


def files(*patterns: str) -> list[str]:
    """Paths relative to the root, sorted so that every machine links in the same order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def compiler_refusal() -> str | None:
    """Why no extension can be compiled here, with the remedy, or None. Sets CXX: compiling and linking both obey it."""
    cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if cxx is None:
        return "no C++ compiler was found (c++, g++, clang++); install one (Debian, Ubuntu: apt install g++) or set CXX"
    os.environ["CXX"] = cxx
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        needs = {"version": "a C++20 standard library", "Python.h": "Python's headers (apt install python3-dev)"}
        for header, remedy in needs.items():
            source.write_text(f"#include <{header}>\nint main() {{ return 0; }}\n")
            includes = [f"-I{sysconfig.get_path(key)}" for key in ("include", "platinclude")]
            command = [*cxx.split(), "-std=c++20", *includes, "-fsyntax-only", str(source)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                return f"the C++ compiler {cxx!r} cannot be run ({error}); install one or correct CXX"
            if done.returncode:
                first = (done.stderr.strip().splitlines() or ["no message"])[0]
                return f"{cxx} cannot compile `#include <{header}>` as C++20: install {remedy}; it said: {first}"
    return None


def find_nvcc() -> tuple[str, tuple[int, int]] | None:
    """(CUDA home, nvcc's version) or None. A folder counts only with headers: the nvcc on PATH may be a wrapper."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [str(Path(on_path).resolve().parent.parent)] if on_path else []
    for home in [*homes, "/usr/local/cuda"]:
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            told = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release (\d+)\.(\d+)", told)
            if release:
                return home, (int(release[1]), int(release[2]))
    return None


def cuda_refusal(sources: list[str], nvcc: tuple[str, tuple[int, int]] | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA kernels stay out, or None to build them. SystemExit when FASTRNN_CUDA=1 cannot be met."""
    mode = choice("FASTRNN_CUDA")
    if mode == "0":
        return "FASTRNN_CUDA=0"
    if not sources:
        refusal = "csrc/cuda holds no kernel"
    elif nvcc is None:
        refusal = "no CUDA toolkit found (nvcc with its headers; set CUDA_HOME)"
    elif mode == "1":
        return None
    elif torch_cuda is None:
        refusal = "this torch is CPU-only"
    elif int(torch_cuda.split(".")[0]) != nvcc[1][0]:
        refusal = f"nvcc {nvcc[1][0]}.{nvcc[1][1]} and torch's CUDA {torch_cuda} differ in their major version"
    else:
        return None
    if mode == "1":
        raise SystemExit(f"fastrnn: FASTRNN_CUDA=1 asks for the CUDA kernels, but {refusal}")
    return refusal


def extension() -> dict:
    """The keyword arguments of setup() that build fastrnn._C with torch's helper."""
    from torch import version as torch_version
    from torch.utils import cpp_extension

    sources = files("csrc/bindings*.cpp", "csrc/pyinit.c", "csrc/cpu/*.cpp")
    headers = files("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inc")
    # torch's own headers are not clean under -Wextra; as system headers they stay silent and ours still speak.
    quiet = [word for folder in cpp_extension.include_paths() for word in ("-isystem", folder)]
    flags = {"cxx": CXX_FLAGS + quiet, "nvcc": list(NVCC_FLAGS)}
    options: dict = {"extra_link_args": ["-Wl,--exclude-libs,ALL", "-s"] if sys.platform == "linux" else []}
    cuda_sources, nvcc = files("csrc/cuda/*.cu"), find_nvcc()
    left_out = cuda_refusal(cuda_sources, nvcc, torch_version.cuda)
    built = f"C++ for the CPU ({len(sources)} files)"
    if left_out is None and nvcc is not None:
        home, version = nvcc
        cpp_extension.CUDA_HOME = home  # None for a CPU-only torch, whatever the environment says
        # With no GPU in sight and no list, torch's helper fails with an IndexError, so there is always a list.
        default = "8.0;9.0;10.0;12.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"
        arches = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)
        sources += cuda_sources
        flags["cxx"].append("-DFASTRNN_WITH_CUDA")
        options["include_dirs"] = [f"{home}/include"]
        folders = (Path(home, "lib64"), Path(home, "targets/x86_64-linux/lib"))
        options["library_dirs"] = [str(folder) for folder in folders if folder.is_dir()]
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]  # static: the module loads without CUDA too
        built += f" and CUDA {version[0]}.{version[1]} for {arches} ({len(cuda_sources)} files)"
    say(f"building fastrnn._C: {built}" + (f"; CUDA left out: {left_out}" if left_out else ""))
    # CppExtension also with CUDA sources: CUDAExtension links libtorch_cuda, which a CPU-only torch does not have.
    module = cpp_extension.CppExtension(
        "fastrnn._C", sources, depends=headers, py_limited_api=True, extra_compile_args=flags, **options
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def main() -> None:
    mode = choice("FASTRNN_EXTENSION")
    refusal = "FASTRNN_EXTENSION=0" if mode == "0" else compiler_refusal()
    if refusal is None:
        setup(**extension(), options={"bdist_wheel": {"py_limited_api": "cp310"}})
        return
    if mode == "1":
        raise SystemExit(f"fastrnn: FASTRNN_EXTENSION=1 asks for fastrnn._C, but {refusal}")
    if mode == "auto":
        say(f"WARNING: fastrnn._C is left out, fastrnn will run on its reference path: {refusal}")
    setup()


main()

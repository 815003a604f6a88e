"""The steps of `bench.gpu` around the toolchain: machine facts, the extension, CUDA programs, compute-sanitizer.

    python -m bench.gpu_native [--arch 9.0a] [--output FOLDER] facts|build|exchange|device|sanitizer [TOOL]

Exit status 77 where a step cannot run on this machine; the last line says why.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu import KEY, LEFT_OUT, ROOT
from bench.timing import cuda, machine

PACKAGES = ("torch", "triton", "numpy", "setuptools", "ninja", "pytest", "hypothesis", "safetensors", "tokenizers")
# What compute-sanitizer prints where it cannot look at this GPU at all.
REFUSALS = ("Device not supported", "not supported on this", "Insufficient", "Unable to find injection", "No CUDA")


class Refused(Exception):
    """Why a step cannot run on this machine."""


def say(text: str) -> None:
    print(text, flush=True)


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    places = [Path(home, "bin", name) for home in homes if home]
    found = next((str(place) for place in places if place.exists()), shutil.which(name))
    if found is None:
        raise Refused(f"{name} is not installed (looked on PATH and in {', '.join(map(str, places))})")
    return found


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, show its output, and return it."""
    say(f"$ {' '.join(command)}")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    env = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, errors="replace", check=False, **streams)
    say(done.stdout.rstrip())
    return done


def facts() -> int:
    """nvidia-smi, the versions of what is installed, and what fastrnn makes of this machine."""
    for name, words in (("nvidia-smi", []), ("nvcc", ["--version"]), ("compute-sanitizer", ["--version"])):
        try:
            call(tool(name), *words)
        except Refused as reason:
            say(f"{name}: {reason}")
    say(f"python {platform.python_version()}, {os.cpu_count()} processors, {platform.platform()}")
    for name in PACKAGES:
        there = importlib.util.find_spec(name) is not None
        say(f"{name} {importlib.metadata.version(name) if there else 'not installed'}")
    return call(sys.executable, "-m", "fastrnn", "info").returncode


def build(arch: str) -> int:
    """The extension, for this GPU alone, in as many jobs as there are processors."""
    folders = [str(Path(sys.executable).parent)]
    if importlib.util.find_spec("ninja") is not None:  # without it the files are compiled one after another
        import ninja

        folders.append(str(getattr(ninja, "BIN_DIR", folders[0])))
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    jobs = str(len(os.sched_getaffinity(0)))
    done = call(
        sys.executable, "setup.py", "build_ext", "--inplace",
        PATH=path, MAX_JOBS=jobs, TORCH_CUDA_ARCH_LIST=arch, FASTRNN_EXTENSION="1",
    )  # fmt: skip
    say(next((line for line in done.stdout.splitlines() if line.startswith("fastrnn: building")), "nothing was built"))
    return done.returncode


def compiled(source: Path, arch: str) -> str:
    """The program that nvcc makes of one file, for this GPU alone."""
    target = ROOT / "build" / f"{source.stem}-{arch}"
    target.parent.mkdir(exist_ok=True)
    flags = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-ffp-contract=off", f"-arch=sm_{arch.replace('.', '')}"]
    done = call(tool("nvcc"), *flags, "-o", str(target), str(source))
    if done.returncode:
        raise SystemExit(f"nvcc error: {source.name} does not compile for {arch}")
    return str(target)


def exchange(arch: str, folder: Path) -> int:
    """What an exchange between multiprocessors costs: bench/exchange.cu, its rows as a CSV with the device's name."""
    program = compiled(ROOT / "bench" / "exchange.cu", arch)
    if not torch.cuda.is_available():
        raise Refused("compiled, not run: there is no GPU")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    rows = list(csv.DictReader(done.stdout.splitlines()))
    told = {"machine": machine("cuda"), "cuda": cuda("cuda"), "torch": torch.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "exchange.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["measure", "parameter", "value", "unit", *told])
        writer.writeheader()
        writer.writerows(row | told for row in rows)
    for row in rows:
        say(f"{KEY}{row['measure']}, {row['parameter']}: {row['value']} {row['unit']}")
    if done.returncode:
        say(f"error: {done.stderr.strip() or done.returncode}")
    return done.returncode


def device(arch: str) -> int:
    """Every CUDA program of tests/device, compiled and run; their status 2 says that there is no GPU."""
    worst = 0
    for source in sorted((ROOT / "tests" / "device").glob("*.cu")):
        status = call(compiled(source, arch)).returncode
        if status == 2:
            raise Refused("compiled, not run: there is no GPU")
        worst = max(worst, abs(status))
    return worst


def sanitizer(name: str) -> int:
    """compute-sanitizer over tests/device/small_shapes.py."""
    program = tool("compute-sanitizer")
    if not torch.cuda.is_available():
        raise Refused("there is no GPU")
    options = ["--tool", name, "--error-exitcode", "9", "--target-processes", "application-only", "--print-limit", "20"]
    # torch's allocator hands out parts of large blocks, beyond whose ends memcheck would see nothing.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
    done = call(program, *options, sys.executable, "tests/device/small_shapes.py", **apart)
    said = [line.lstrip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
    refused = [line for line in said if any(words in line for words in REFUSALS)]
    if refused:
        raise Refused(f"compute-sanitizer {name} refuses: {refused[0]}")
    errors = [line for line in said if "Error" in line or "Invalid" in line or "hazard" in line]
    say(f"error: {errors[0]}" if done.returncode and errors else (said or ["it said nothing"])[-1])
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="9.0a", help="compute capability, as TORCH_CUDA_ARCH_LIST names it")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("step", choices=["facts", "build", "exchange", "device", "sanitizer"])
    parser.add_argument("tool", nargs="?", choices=["memcheck", "racecheck"], default="memcheck")
    options = parser.parse_args()
    steps = {
        "facts": facts, "build": lambda: build(options.arch), "device": lambda: device(options.arch),
        "exchange": lambda: exchange(options.arch, options.output), "sanitizer": lambda: sanitizer(options.tool),
    }  # fmt: skip
    try:
        return steps[options.step]()
    except Refused as reason:
        say(str(reason))
        return LEFT_OUT


if __name__ == "__main__":
    raise SystemExit(main())

"""The check of tests/aot.py: what it lets through and what it catches. `make aot` runs it over every variant."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is on Linux")


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one's triton interprets."""
    command = [sys.executable, ROOT / "tests" / "aot.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.parametrize("form", ["resident", "tiled"])
def test_lengths_and_batch_sizes_compile_nothing_anew(form):
    """Wherever the states lie; of the tiled form each way of cutting a batch for the device is a kernel of its own."""
    command = [sys.executable, ROOT / "tests" / "specializations.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found = {name: counts for name, counts in json.loads(done.stdout).items() if form in name}
    assert len(found) == (6 if form == "resident" else 3)
    for name, counts in found.items():
        plans = counts.pop("plans", 2)
        assert sorted(counts) == [f"{form}_backward_kernel", f"{form}_forward_kernel"], name
        assert sum(counts.values()) <= plans < 10, f"{name}: {counts}"


@pytest.mark.slow
def test_each_wrong_kernel_is_caught_for_its_fault():
    done = aot("--bad", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 compiled, 0 not caught" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("only", ["head/head_draw/float16/V65", "sample/statistics/float32/V50257/N1"])
def test_variants_pass(only):
    done = aot("--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout
    assert "sm_80" in done.stdout
    assert "sm_90" in done.stdout


def test_a_filter_that_leaves_nothing_is_no_success():
    assert aot("--only", "there is no such kernel").returncode == 1


def test_every_kernel_has_a_variant():
    """A kernel is a @triton.jit function whose name ends in _kernel; the parts of kernels do not."""
    listed = aot("--list")
    assert listed.returncode == 0, listed.stderr
    compiled = {tuple(line.split("/")[:2]) for line in listed.stdout.split()}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel"):
                name = line[4:].split("(")[0].removesuffix("_kernel")
                assert (path.stem, name) in compiled, f"{path.name}: {name}_kernel is in no variant"

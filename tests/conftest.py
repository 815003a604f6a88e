"""Settings shared by every test: seeds, threads, marks, and the fixtures that know where optional data lives."""

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# What cuBLAS needs to be deterministic, read when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Triton decides when it is imported whether kernels are compiled or interpreted; without a GPU they are interpreted
# here, and are compiled in processes of their own.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

# Derandomised: a failure on one machine is a failure on every machine, today and tomorrow. No deadline: the machine may
# be busy, and the speed of a test is no property of the code under test.
settings.register_profile(
    "fastrnn", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fastrnn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is none, and says which machine would run them."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and a CUDA build of torch"))


@pytest.fixture
def set_isa() -> Iterator[Callable[[str], None]]:
    """Forces an instruction set of the C++ kernels for the rest of a test; skips where this CPU lacks it."""

    def force(name: str) -> None:
        try:
            torch.ops.fastrnn_cpu.set_isa(name)
        except RuntimeError as problem:
            pytest.skip(f"needs another CPU: {problem}")

    yield force
    torch.ops.fastrnn_cpu.set_isa("")


@pytest.fixture(autouse=True)
def fixed_state() -> Iterator[None]:
    """Every test starts from the same seeds, one thread and torch's default dtype, and leaves torch as it found it.

    A test that wants more threads calls torch.set_num_threads itself.
    """
    threads, dtype, gradients = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of larger corpora beside the checkout; FASTRNN_TEST_DATA names another. Skips where there is none."""
    folder = Path(os.environ.get("FASTRNN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the test corpora: a folder ../shared/data beside the checkout, or FASTRNN_TEST_DATA=folder")
    return folder


@pytest.fixture(scope="session")
def shakespeare(shared_data: Path) -> Path:
    """The path of a plain-text file of Shakespeare among the corpora. Skips where there is none."""
    found = sorted(shared_data.rglob("*shakespeare*.txt"))
    if not found:
        pytest.skip("needs a file *shakespeare*.txt in ../shared/data, or FASTRNN_TEST_DATA=folder that has one")
    return found[0]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a Triton kernel runs: compiled on a GPU, or interpreted on the CPU where there is none."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        pytest.skip("TRITON_INTERPRET=1 on a machine without a GPU runs this")
    torch.use_deterministic_algorithms(True)  # this is what fills uninitialised memory with NaN
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "tiled", "group"])
def form(request, monkeypatch):
    """Has every sequence in Triton run in one form, which larger or smaller sizes take by themselves."""
    from triton_cases import take_form

    take_form(request.param, monkeypatch)
    return request.param

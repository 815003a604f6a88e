"""The three ways to install, each from a clean copy of the checkout: sdist, wheel, and ``pip install .``.

One compile serves all: the wheel is built from the unpacked sdist, and ``pip install .`` runs in that same folder,
where the compiled objects still lie. Nothing is downloaded: a fresh environment borrows torch from the running one.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastrnn

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux")]

PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]

# Run inside each installed copy, away from the checkout.
CHECK = """
import importlib.metadata, pathlib, sys
import torch, fastrnn, fastrnn.kernels
home = pathlib.Path(sys.prefix).resolve()
assert home in pathlib.Path(fastrnn.__file__).resolve().parents, fastrnn.__file__
assert home in pathlib.Path(fastrnn.kernels.__file__).resolve().parents, fastrnn.kernels.__file__
assert pathlib.Path(fastrnn.__file__).with_name("py.typed").exists()
assert importlib.metadata.version("fastrnn") == fastrnn.__version__
try:
    import kernels
except ModuleNotFoundError:
    pass
else:
    raise AssertionError(f"the installation put a top-level `kernels` at {kernels.__file__}")
"""
CHECK_EXTENSION = """
import fastrnn._C
assert home in pathlib.Path(fastrnn._C.__file__).resolve().parents, fastrnn._C.__file__
assert fastrnn.backends.available()["cpu"] is None
x, h0, one = torch.ones(2, 1, 1), torch.zeros(1, 1), torch.ones(1, 1)
y, hn = torch.ops.fastrnn_cpu.rnn_forward(x, h0, one, one, None, None, None, None, False, "relu")
assert y.flatten().tolist() == [1.0, 2.0] and hn.item() == 2.0
"""
CHECK_WITHOUT = """
reason = fastrnn.backends.available()["cpu"]
assert reason, "the C++ backend must say why it is not there"
y, hn = fastrnn.RNN(1, 1)(torch.ones(2, 1, 1))
assert y.shape == (2, 1, 1)
print(reason)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command writes to both its streams; fails with all of it when the command does."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_REQUIRE_VIRTUALENV")} | environment
    # What is proven here is the same at every level, and with the kernels' portable variant alone.
    env = {"FASTRNN_OPTIMIZE": "-O0", "CPPFLAGS": "-DFR_X86=0"} | env
    words, streams = [str(word) for word in command], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, cwd=cwd, env=env, text=True, check=False, **streams)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files under version control or about to be, without anything that a build has left."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("needs a git checkout: an unpacked sdist cannot tell its own files from others")
    target = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    run(sys.executable, "-c", code, cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    command = [*PIP, "wheel", *OFFLINE, "--wheel-dir", "dist", "."]
    run(sys.executable, *command, cwd=unpacked, FASTRNN_EXTENSION="1", FASTRNN_CUDA="0")
    (path,) = (unpacked / "dist").glob("*.whl")
    return path


def new_environment(folder: Path) -> Path:
    """The Python of a fresh virtual environment in which torch, pip and the rest come from the running one.

    Editable installs of the running one are not seen: their .pth files count only in a site folder.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    borrowed = [entry for entry in sys.path if entry.endswith("-packages")]
    Path(purelib, "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def test_sdist_holds_what_a_build_and_a_test_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    csrc = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt"}
    wanted |= {"kernels/__init__.py", "tests/conftest.py", "tests/oracle.py", "fastrnn/py.typed"}
    assert wanted | csrc <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_serves_every_python_and_holds_only_the_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"fastrnn-{fastrnn.__version__}-cp310-abi3-linux_")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {"_C.abi3.so", "py.typed", "kernels/__init__.py", "reference.py"}
    assert {f"fastrnn/{name}" for name in wanted} <= set(names)
    assert {name.split("/")[0] for name in names} == {"fastrnn", f"fastrnn-{fastrnn.__version__}.dist-info"}


def test_wheel_from_the_sdist_installs_and_computes(wheel: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv")
    run(python, *PIP, "install", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=tmp_path)
    run(python, "-c", CHECK + CHECK_EXTENSION, cwd=tmp_path)
    assert "usage: fastrnn" in run(tmp_path / "venv" / "bin" / "fastrnn", "--help", cwd=tmp_path)


@pytest.mark.usefixtures("wheel")  # its compiled objects lie in the same folder, and serve the same Python
def test_pip_install_of_the_folder(unpacked: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv")
    command = [*PIP, "install", *OFFLINE, "--ignore-installed", "--prefix", tmp_path / "venv", "."]
    run(sys.executable, *command, cwd=unpacked, FASTRNN_EXTENSION="1", FASTRNN_CUDA="0")
    run(python, "-c", CHECK + CHECK_EXTENSION, cwd=tmp_path)


def test_without_a_compiler_the_package_installs_and_works(checkout: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv")
    command = ["-m", "pip", "install", "-v", *OFFLINE, "--ignore-installed", "."]
    told = run(python, *command, cwd=checkout, CXX="no-such-compiler")
    assert "WARNING: fastrnn._C is left out" in told
    assert run(python, "-c", CHECK + CHECK_WITHOUT, cwd=tmp_path).strip()


def test_a_demand_for_the_extension_fails_without_a_compiler(checkout: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    environment = os.environ | {"FASTRNN_EXTENSION": "1", "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=checkout, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert "FASTRNN_EXTENSION=1 asks for fastrnn._C" in done.stderr
    assert "no-such-compiler" in done.stderr

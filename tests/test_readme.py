"""The README's examples run as they stand: its Python in one session, its commands in a shell, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


@pytest.mark.slow
def test_python_examples(tmp_path):
    code = "\n".join(blocks("python"))
    assert code.count("\n") > 20
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment()
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_console_examples(tmp_path):
    """Every line that starts with `$` in a console block, each followed by what it prints in the README."""
    commands = [line[2:] for text in blocks("console") for line in text.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 5
    script = "set -euo pipefail\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment()
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_file_that_it_names_exists():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README.read_text()))
    assert named
    assert not [name for name in named if not (README.parent / name).exists()]


def environment():
    """This interpreter's `fastrnn` command first on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

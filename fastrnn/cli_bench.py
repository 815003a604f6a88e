"""``fastrnn bench``: the scripts of bench/, which are in the source tree and not in an installed package."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .cli import UsageError

FOLDER = Path(__file__).resolve().parent.parent / "bench"


def run(options: argparse.Namespace) -> int:
    """Run ``bench/NAME.py`` with the rest of the command line, or list what there is; the script's exit code."""
    scripts = {
        path.stem: path for path in sorted(FOLDER.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()
    }
    if not scripts:
        raise UsageError("the benchmarks are not part of the installed package: clone the source, install it with "
                         "`make demo` or `pip install -e .`, and run `fastrnn bench` there")  # fmt: skip
    if options.name is None:
        print("\n".join(scripts))
        return 0
    if options.name not in scripts:
        raise UsageError(f"there is no bench {options.name!r}; there are {', '.join(scripts)}")
    done = subprocess.run([sys.executable, str(scripts[options.name]), *options.rest], check=False)
    return done.returncode

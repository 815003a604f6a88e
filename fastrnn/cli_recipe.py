"""``fastrnn recipe NAME``: one of the tutorials' systems, by `fastrnn.recipes`."""

from __future__ import annotations

import argparse

from .cli import UsageError


def run(options: argparse.Namespace) -> int:
    if options.quick and options.as_written:
        raise UsageError("--quick and --as-written exclude each other")
    from . import recipes

    recipes.run(options.name, quick=options.quick, as_written=options.as_written, data=options.data, out=options.out)
    return 0

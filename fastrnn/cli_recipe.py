"""``fastrnn recipe NAME``: one of the tutorials' systems, by `fastrnn.recipes`."""

from __future__ import annotations

import argparse

from .cli import UsageError


def run(options: argparse.Namespace) -> int:
    """Run the recipe; 0, or 128 + the signal that ended its training."""
    if options.quick and options.as_written:
        raise UsageError("--quick and --as-written exclude each other")
    from . import recipes
    from .devices import set_up

    result = recipes.run(
        options.name, quick=options.quick, as_written=options.as_written, data=options.data, out=options.out,
        seed=options.seed, device=set_up(options.device),
    )  # fmt: skip
    return 128 + result.signal if result.signal else 0

"""The kernels of the cells with the arguments that they are launched with, for a check that they compile."""

from __future__ import annotations

from types import ModuleType

import torch

from . import gru, lstm, rnn, tuning
from .launch import TYPES, Variant, variant


def variants() -> list[Variant]:
    """Every kernel of every cell."""
    return [v for cell, module in (("lstm", lstm), ("gru", gru), ("rnn", rnn)) for v in _of_cell(cell, module)]


def _of_cell(cell: str, module: ModuleType) -> list[Variant]:
    """A cell's kernels as calls compile them: each dtype, each form and its extremes.

    Of the resident form that is the widest block, where registers are scarcest, at a width of whole vectors and one of
    none, and half of it, which takes fewer warps; of the tiled form a group of programs, and the tallest blocks.
    """
    found = []

    def add(form, plan: tuning.Plan, dtype: torch.dtype, hidden: int, given: bool, packed=False, **others) -> None:
        size = f"{hidden}to{others['P']}" if "P" in others else str(hidden)
        title = f"{cell}/{form}/{TYPES[dtype]}/{size}{'/masked' * given}{'/packed' * packed}"
        title += "" if others.get("DIRECTION", "forward") == "forward" else f"/{others['DIRECTION']}"
        kernel = getattr(module, f"{form}_kernel")
        found.append(variant(title, kernel, plan, dtype, hidden, given, dict(RELU=False) | others, packed))

    for dtype in TYPES:
        wide = tuning.widest(cell, dtype)
        cases = [(wide, 64, "", "forward"), (512, 16, "", "forward")]
        if dtype != torch.float16:  # compiled as bfloat16 is
            cases += [(wide - 7, 64, "masked", "reverse"), (wide // 2 - 7, 64, "masked", "forward")]
            cases += [(*size, rows, "both") for size in ((wide, 64), (300, 10_000)) for rows in ("masked", "packed")]
        for hidden, batch, rows, direction in cases:
            for way in ("forward", "backward"):
                plan = tuning.sequence(cell, way, hidden, batch, dtype, 132, directions=1 + (direction == "both"))
                form = f"{'resident' if plan.resident else 'tiled'}_{way}"
                add(form, plan, dtype, hidden, rows != "", rows == "packed", DIRECTION=direction)
        for hidden, batch, given in ((20, 3, True), (512, 64, False)):
            if given or dtype != torch.float16:
                add("step", tuning.step(cell, hidden, batch, dtype), dtype, hidden, given)
        for way in ("forward", "backward") if cell == "lstm" and dtype != torch.float16 else ():
            plan = tuning.sequence(cell, way, 20, 3, dtype, 132, projection=True, directions=2)
            add(f"tiled_{way}", plan, dtype, 20, True, P=10, DIRECTION="both")
    return found

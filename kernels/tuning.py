"""The launch configuration of every kernel: a pure function of the cell, the sizes, the dtype and the device's size.

A sequence runs in one of two forms. *Resident*: one program has a slice of the batch, all of H, and W_hh on chip.
*Tiled*: a group of programs has a slice of the batch, each a part of H, and reads its part of W_hh from cache in every
step; groups of more than one need all their programs to run at once, so their grid is never larger than the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
# What W_hh may take of the 256 KiB of registers, or of the 163 KiB of shared memory, of a multiprocessor of
# compute capability 8.0; the compiler decides which. The rest is for sums, states and the next step's input.
RESIDENT_BYTES = 128 * 1024


class Plan(NamedTuple):
    """A grid, its block sizes as the kernels' constants, and warps and stages.

    ``maxnreg`` is how many registers a thread may have: by default all that an instruction can name. Without a limit
    the assembler guesses how many programs should share a multiprocessor, and spills for their sake, though a sequence
    has no use for a second one.
    """

    resident: bool
    grid: tuple[int, ...]
    blocks: dict[str, int]
    warps: int
    stages: int
    programs: int = 1
    maxnreg: int = 255

    def turns(self, like: Tensor) -> Tensor:
        """The counters at which groups meet, one a group; zero bytes of them where a group is one program."""
        return like.new_zeros(self.grid[-1] if self.programs > 1 else 0, dtype=torch.int32)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(size: int) -> int:
    """The least block of at least `size`: a power of two, and 16 for the tensor cores."""
    return max(16, 1 << (size - 1).bit_length())


def resident_bytes(cell: str, hidden: int, dtype: torch.dtype) -> int:
    """What W_hh takes in registers; an element of float32 is kept as two parts of TF32."""
    return GATES[cell] * padded(hidden) ** 2 * (8 if dtype == torch.float32 else 2)


def widest(cell: str, dtype: torch.dtype) -> int:
    """The largest block of units that is resident."""
    return max(block for block in (16, 32, 64, 128, 256) if resident_bytes(cell, block, dtype) <= RESIDENT_BYTES)


def sequence(
    cell: str, way: str, hidden: int, batch: int, dtype: torch.dtype, sms: int, projection: bool = False,
    directions: int = 1,
) -> Plan:  # fmt: skip
    """The plan of a whole sequence, `way` "forward" or "backward", on a device of `sms` multiprocessors.

    Two directions share no slice of the batch and no group, so a slice is cut as for one.
    """
    size = resident_bytes(cell, hidden, dtype)
    if size <= RESIDENT_BYTES and not projection:
        warps = 4 if size <= RESIDENT_BYTES // 4 else 8
        # With more the assembler for compute capability 9.0 reads ahead in float32 until it spills.
        registers = 208 if (cell, way) == ("gru", "backward") else 255
        return Plan(True, (directions * cdiv(batch, 16),), dict(BB=16, BH=padded(hidden)), warps, 1, maxnreg=registers)
    rows = _rows(directions * batch, sms)
    units, (depth, stages) = (32 if cell == "rnn" else 16), _pipeline(cell if way == "forward" else "", dtype)
    groups, tiles = directions * cdiv(batch, rows), cdiv(hidden, units)
    room = max(1, sms // max(groups, 1))
    programs = min(tiles, 1 << (room.bit_length() - 1))  # powers of two, so that few batch sizes compile anew
    programs = cdiv(tiles, cdiv(tiles, programs))  # no more than needed for as few tiles each
    blocks = dict(BB=rows, BN=units, BK=depth, PROGRAMS=programs)
    warps = 8 if rows > (16 if way == "forward" else 32) else 4
    return Plan(False, (programs, groups), blocks, warps, stages, programs)


def step_microseconds(cell: str, hidden: int, batch: int, dtype: torch.dtype, sms: int) -> float:
    """An estimate of a step of the forward pass, not a measurement: what its slowest program waits for.

    A resident step waits for its products, which read W_hh from shared memory where the compiler puts it, and for its
    tiles to change layout, about 1.2 us. A tiled one waits for the group, about 1.2 us as a grid does, and for its
    tiles of W_hh from the second-level cache, which gives each of 132 multiprocessors 40 kB a us.
    """
    plan = sequence(cell, "forward", hidden, batch, dtype, sms)
    if plan.resident:
        return 1.2 * cdiv(plan.grid[0], sms)
    waves = cdiv(plan.grid[0] * plan.grid[1], sms)
    tiles = cdiv(cdiv(hidden, plan.blocks["BN"]), plan.programs)
    moved = tiles * plan.blocks["BN"] * GATES[cell] * hidden * (4 if dtype == torch.float32 else 2)
    return (1.2 if plan.programs > 1 else 0.0) + waves * moved / 40_000


def _rows(batch: int, sms: int) -> int:
    """Sequences a program: as few as the tensor cores take until the device is full, then more to share the weights."""
    return 16 if batch <= 16 * sms else 32 if batch <= 32 * sms else 64


def _pipeline(products: str, dtype: torch.dtype) -> tuple[int, int]:
    """How many terms of a sum are added at once, 128 bytes of a row of a weight, and in how many stages they come.

    The four products of an LSTM in float32 take three products of TF32 each, whose operands of 128 bytes do not fit
    into a thread's registers; they take half of that, with as many bytes on their way.
    """
    if dtype != torch.float32:
        return 64, 3
    return (16, 5) if products == "lstm" else (32, 3)


def gates(cell: str, hidden: int, batch: int, time: int) -> Plan:
    """The plan of finding gates again, of 16 steps of a sequence at once; of the LSTM one program has all its steps."""
    return Plan(False, (batch * (cdiv(time, 16) if cell == "gru" else 1), cdiv(hidden, 64)), dict(BT=16, BN=64), 4, 1)


def step(cell: str, hidden: int, batch: int, dtype: torch.dtype) -> Plan:
    """The plan of a single step: sums over the inputs and the state in blocks, one program a tile of units and rows."""
    rows = 16 if batch <= 16 else 32 if batch <= 32 else 64
    units, (depth, stages) = 32 if cell == "rnn" else 16, _pipeline(cell, dtype)
    return Plan(False, (cdiv(hidden, units), cdiv(batch, rows)), dict(BB=rows, BN=units, BK=depth), 4, stages)


def token_step(cell: str, hidden: int, batch: int, dtype: torch.dtype) -> Plan:
    """The plan of a step of generation: as `step`, but in blocks that do not depend on the batch, nor do then a row's
    bits: 16 rows, the least that tensor cores take."""
    alone = step(cell, hidden, 1, dtype)
    return alone._replace(grid=(alone.grid[0], cdiv(batch, alone.blocks["BB"])))

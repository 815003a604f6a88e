"""What a kernel module tells of its kernels to whoever compiles them without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Variant(NamedTuple):
    """One way in which a kernel is compiled.

    signature   Triton's type of each parameter ("*fp32", "i32", "i64", "fp32"); those in constexprs may be left out
    constexprs  the values of the parameters that are constants of the compilation
    aligned     the pointer parameters whose addresses are divisible by 16
    """

    name: str
    fn: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...]

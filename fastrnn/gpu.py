"""What the table of backends knows of GPUs: which backend a call prefers there, which calls the Triton
and the CUDA kernels take, and whether Triton can run.

The preference is a pure rule of the cell, the sizes and the dtype. PyTorch's RNN is cuDNN on a GPU. For some calls
PyTorch has it run persistent kernels, whose weights stay on chip for the whole sequence; those keep the call. For all
others cuDNN launches a product and the gates for every step, and the Triton kernels, one launch for the sequence, are
preferred where an estimate of their step is shorter than such launches. The estimates are from published figures, not
from measurements of this package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .extension import cuda_kernels_missing, native

if TYPE_CHECKING:
    from .backends import Call

# Two launches of a stream, 2.1 to 2.5 us each on an H100: the least that a step costs where every step is launched.
LAUNCHED_STEP_US = 4.5
H100_MULTIPROCESSORS = 132
# float16 products at large sizes run at about this part of what an H100 publishes (989 TFLOP/s).
GEMM_TFLOPS = 500.0
# Of a block's shared memory, what the kernel of the loop and CUDA keep beside the network.
BLOCKS_OWN_BYTES = 1024


def preference(call: Call) -> tuple[tuple[str, str], ...]:
    """The backends for an op on a GPU in the order in which to ask them, each with the reason for its place."""
    last = ("reference", "it takes every call")
    if call.op == "sample":
        return ("cuda", "one CUDA kernel reads the logits and draws"), ("triton", "one launch or two a draw"), last
    if call.op == "generate":
        within = ("cuda", "the whole loop in one launch, each multiprocessor or cluster of them with a whole network")
        graphs = ("triton", "the whole loop runs on the GPU, many tokens a CUDA graph")
        beyond = ("cuda", "kernels for each step, 32 steps a CUDA graph, for networks that no cluster holds")
        order = (graphs, beyond) if loop_way(call) == "steps" else (within, graphs)
        return *order, ("reference", "the loop in Python takes every network")
    if call.op.partition("_")[2]:
        return ("triton", "Triton kernels: one launch for the whole sequence"), last
    fused, kernels = "aten", "triton"
    if call.time == 1:
        return (kernels, "Triton kernels: products and gates of a step in one launch"), (fused, "cuDNN"), last
    if (reason := persistent(call)) is not None:
        return (fused, reason), (kernels, "Triton kernels"), last
    if estimated_win(call):
        reason = "Triton kernels: one launch for the sequence, where cuDNN launches every step (an estimate)"
        return (kernels, reason), (fused, "cuDNN"), last
    return (fused, "cuDNN: steps so large that each is a product of matrices (an estimate)"), (kernels, "Triton"), last


def persistent(call: Call) -> str | None:
    """Why PyTorch has cuDNN run persistent kernels for this call, or None.

    Source: ``get_algo`` and the heuristics it asks in PyTorch's ``aten/src/ATen/native/cudnn/RNN.cpp``.
    """
    if call.packed or call.lengths or call.reset or call.projection or call.dtype == torch.float64:
        return None
    gated = call.op in ("lstm", "gru")
    limit = (128 if gated else 256) if call.needs_grad else (192 if gated else 384)
    if call.hidden <= limit:
        return f"cuDNN's persistent kernels for small H (here up to {limit})"
    in_halves = call.dtype == torch.float16 and call.layers == 1 and not call.bidirectional and call.op != "gru"
    sizes = call.hidden <= 1024 and call.hidden % 128 == 0 and call.inputs % 128 == 0
    rows = call.batch % 8 == 0 and call.batch <= 128 and (gated or call.batch < 96 or call.hidden < 896)
    if in_halves and sizes and rows:
        return "cuDNN's persistent kernels for float16"
    return None


def estimated_win(call: Call) -> bool:
    """Whether a step of the Triton kernels should take less time than launching it as a product and the gates does."""
    tuning = importlib.import_module("fastrnn.kernels.tuning")
    ours = tuning.step_microseconds(call.op, call.hidden, call.batch, call.dtype, H100_MULTIPROCESSORS)
    rate = GEMM_TFLOPS * (0.5 if call.dtype == torch.float32 else 1.0) * 1e6  # operations a microsecond
    product = 2 * tuning.GATES[call.op] * call.hidden * call.hidden * call.batch / rate
    return ours <= max(LAUNCHED_STEP_US, product)


# --- the rows of the table ------------------------------------------------------------------------------------------


def refuse_triton(call: Call) -> str | None:
    if missing := triton_missing():
        return missing
    if call.op == "generate" and call.precision != "float32":
        return f"the loop on the GPU runs a network's own weights; {call.precision} weights are made by the C++ loop"
    if call.window:
        return "the loop on the GPU carries the state on; a network that runs a window for each token needs another"
    if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
        return f"the Triton kernels run on CUDA GPUs, these tensors are on {call.device}"
    if call.transform and call.transform != "torch.compile":
        return f"the Triton kernels have no rule for {call.transform}; the reference has"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels take float32, float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.device == "cuda" and (old := too_old()):
        return old
    return None


def load_triton(op: str) -> Callable:
    module = "gates" if op.endswith("_gates") else op.partition("_")[0]
    return getattr(importlib.import_module(f"fastrnn.kernels.{module}"), op)


def refuse_cuda(call: Call) -> str | None:
    if call.device != "cuda":
        return f"the CUDA kernels run on CUDA GPUs, these tensors are on {call.device}"
    if missing := cuda_kernels_missing():
        return missing
    if call.op == "generate":
        return _refuse_cuda_loop(call)
    if call.transform and call.transform != "torch.compile":
        return f"the CUDA kernels have no rule for {call.transform}; the reference has"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the CUDA kernels take float32, float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.projection:
        return "the CUDA kernels have no projection"
    return None


def _refuse_cuda_loop(call: Call) -> str | None:
    """Why the loop in CUDA does not take a call."""
    if call.dtype != torch.float32:
        return f"the loop in CUDA packs float32 networks, this one is {str(call.dtype).removeprefix('torch.')}"
    if call.precision == "int8":
        return "the loop in CUDA has float32 and bfloat16 weights, not int8"
    if call.window:
        return "the loop in CUDA carries its state from token to token; this network runs a window of ids for each"
    return _of_network("generator_refusal", call) or None


def loop_way(call: Call) -> str | None:
    """What runs a network in the loop in CUDA: a multiprocessor ("cta"), a "cluster" of them, or the whole GPU, kernel
    after kernel ("steps"); None where the loop does not take it."""
    return None if refuse_cuda(call) else _of_network("generator_way", call)


def _of_network(op: str, call: Call) -> str:
    shared = torch.cuda.get_device_properties().shared_memory_per_block_optin - BLOCKS_OWN_BYTES
    cluster = largest_cluster(torch.cuda.current_device())
    sizes = (call.layers, call.hidden, call.vocabulary)
    return native("fastrnn_cuda", op)(call.cell, call.precision, *sizes, shared, cluster)


@functools.cache
def largest_cluster(device: int) -> int:
    """How many multiprocessors of a GPU can share a network, each with all of its shared memory."""
    return native("fastrnn_cuda", "generator_largest_cluster")(device)


def load_cuda(op: str) -> Callable:
    run = native("fastrnn_cuda", op)
    if not op.endswith(("_forward", "_backward")):
        return run

    def with_precision(*args):
        """Products of float32 are taken as torch.matmul takes them on a GPU."""
        return run(*args, tf32=torch.backends.cuda.matmul.fp32_precision == "tf32")

    return with_precision


# --- whether Triton can run ----------------------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on tensors of the CPU: for their tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_missing() -> str | None:
    """None when Triton and the kernels are installed, otherwise the sentence that says what is missing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` installs it (on Linux)"
    if importlib.util.find_spec("fastrnn.kernels") is None:
        return "the kernels/ folder is not installed as fastrnn.kernels; `make build` in the source tree does that"
    return None


@functools.cache
def too_old() -> str | None:
    """Why the GPU at hand is too old for the kernels, or None: they need tensor cores that know bfloat16 and TF32."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
        return None
    return "the Triton kernels need a GPU of compute capability 8.0 or newer, this one has {}.{}".format(
        *torch.cuda.get_device_capability()
    )


def triton_absent() -> str | None:
    """None when the Triton kernels can serve this machine, otherwise the sentence that says why not."""
    if missing := triton_missing():
        return missing
    if torch.cuda.is_available():
        return too_old()
    how = "its interpreter runs them on the CPU for tests" if interpreting() else "they run on CUDA GPUs"
    return f"torch sees no CUDA GPU for the Triton kernels; {how}"

"""What this machine is, what was built, and which backend each op would run on, with every refusal."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends

PACKAGES = ("numpy", "triton", "safetensors", "tokenizers", "tqdm", "matplotlib", "ninja")
# The processor's vector extensions that kernels here or in torch's libraries ask for.
ISA_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16",
             "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "sve", "sve2")  # fmt: skip


def collect() -> dict[str, Any]:
    """All of it as plain values: ``versions``, ``cpu``, ``gpus``, ``built``, ``backends``, ``environment``, ``ops``."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "built": _built(),
        "backends": backends.available(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTRNN_")},
        "ops": _ops(),
    }


def _versions() -> dict[str, str]:
    versions = {"fastrnn": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {}
    for line in reversed(lines):
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({
            "name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        })  # fmt: skip
    return gpus


def _built() -> dict[str, Any]:
    folder = Path(__file__).parent
    return {
        "extension": [path.name for path in sorted(folder.glob("_C*"))],
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "folder": str(folder),
    }


def _ops() -> list[dict[str, Any]]:
    """For a small call of each op on each kind of device here: the choice, its reason and the refusals before it."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = []
    for device in devices:
        for op in backends.OPS:
            for steps in (1, 100) if op in backends.CELLS else (1,) if op == "sample" else (100,):
                call = backends.Call(op, device, torch.float32, steps, 32, 128, 128)
                chosen.append(_choice(call))
    return chosen


def _choice(call: backends.Call) -> dict[str, Any]:
    asked = {"op": call.op, "device": call.device, "steps": call.time}
    try:
        choice = backends.choose(call)
    except backends.BackendRefusal as refusal:
        return {**asked, "backend": None, "reason": str(refusal), "refusals": {}}
    named = dict(choice.refusals)
    for name, row in backends.TABLE.items():  # the others as well: why could they not have been chosen?
        why = row.refuse(call)
        if name != choice.backend and why is not None:
            named.setdefault(name, why)
    return {**asked, "backend": choice.backend, "reason": choice.reason, "refusals": named}


def report(facts: dict[str, Any]) -> str:
    """`collect`'s values as text."""
    cpu, built = facts["cpu"], facts["built"]
    lines = ["versions   " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())]
    lines.append(f"cpu        {cpu['name']}; {cpu['system']}; {cpu['cores']} cores, torch uses {cpu['torch_threads']} "
                 f"threads and {cpu['torch_isa']}")  # fmt: skip
    lines.append(f"isa        {' '.join(cpu['isa']) or 'unknown'}")
    lines += [
        f"gpu        {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} multiprocessors"
        for gpu in facts["gpus"]
    ] or ["gpu        none that torch can see"]
    lines.append(f"built      extension: {', '.join(built['extension']) or 'none'}; torch's CUDA: "
                 f"{built['torch_cuda']}; in {built['folder']}")  # fmt: skip
    lines += [f"backend    {name}: {why or 'available'}" for name, why in facts["backends"].items()]
    lines += [f"setting    {name}={value}" for name, value in facts["environment"].items()]
    lines.append("")
    for op in facts["ops"]:
        lines.append(f"{op['op']:<14} {op['device']}, T={op['steps']}: {op['backend'] or 'refused'} ({op['reason']})")
        lines += [f"{'':<14}   not {name}: {why}" for name, why in op["refusals"].items()]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """``fastrnn info``."""
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else report(facts), file=sys.stdout)
    return 0

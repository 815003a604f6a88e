"""Which device a command runs on."""

from __future__ import annotations

import torch


def set_up(device: str = "auto", threads: int | None = None) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` names; sets torch's CPU threads where asked.

    Raises:
        ValueError: there is no such device here, or ``threads`` is below 1.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as problem:
        raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}") from problem
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"there is no {device} here: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return chosen

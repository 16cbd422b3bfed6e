"""Devices, as a person names them."""

import os

import torch

from sievit.config import ConfigError


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one. Each of torchrun's processes has a GPU of its own.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError("nothing was tried on it")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} is not to be had here ({reason}); use cpu, cuda or auto") from error
    return device


def device_name(device: torch.device) -> str:
    """What figures were measured on: the GPU's name, or "cpu" with the number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"

"""What a training runs on: processes, devices and precision."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

from sievit.config import ConfigError
from sievit.engine.recipe import TrainConfig
from sievit.measure.clock import clocked

SLOW = 1.25
"""So many times slower than float32 is worth a line."""


def launched(config: TrainConfig) -> Fabric:
    """Devices and processes by torchrun's environment variables, else one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if config.batch_size % (processes * config.accumulate):
        raise ConfigError(
            f"train.batch_size {config.batch_size} does not split over {processes} processes and "
            f"{config.accumulate} accumulated parts"
        )
    precision: dict[str, Any] = {"precision": config.precision}
    if config.precision == "16-mixed":
        if not torch.cuda.is_available():
            raise ConfigError("train.precision 16-mixed needs a CUDA device; use bf16-mixed")
        scaler = torch.amp.GradScaler("cuda", init_scale=config.loss_scale)
        precision = {"plugins": [MixedPrecision("16-mixed", "cuda", scaler)]}
    strategy = "ddp" if processes > 1 else "auto"
    return Fabric(devices=local, num_nodes=processes // local, strategy=strategy, **precision)


def slow_bfloat16(config: TrainConfig, device: torch.device) -> str:
    """A line that says so where a CPU multiplies faster in float32 than in the bfloat16 of `bf16-mixed`; else ""."""
    if device.type != "cpu" or config.precision != "bf16-mixed":
        return ""
    times = []
    for dtype in (torch.bfloat16, torch.float32):
        rows, weights = torch.ones(1024, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        times.append(min(clocked(lambda x=rows, w=weights: F.linear(x, w), device)[0] for _ in range(4)))
    slower = times[0] / times[1]
    if slower < SLOW:
        return ""
    return f"this CPU multiplies {slower:.1f} times faster in float32; --train.precision 32-true may be quicker"

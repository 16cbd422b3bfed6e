"""Matrices in 8 bits, to store them: an integer for each weight, and a scale for each row."""

import torch
from torch import Tensor

from sievit.config import ConfigError

SCALE = ".int8_scale"
"""How the name of the scales ends, behind that of the matrix."""
LEAST = 4096
"""Weights of the smallest matrix for which this pays."""


def pays(tensor: Tensor) -> bool:
    """Whether this is a large matrix, or a convolution's weights."""
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[0] > 1 and tensor.numel() >= LEAST


def quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (rows, ...) as int8, and the scales (rows,) in float32; the error is at most half a scale."""
    rows = tensor.float().flatten(1)
    scale = rows.abs().amax(dim=1).clamp(min=1e-30) / 127
    return (rows / scale[:, None]).round().to(torch.int8).view_as(tensor), scale


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those of int8 multiplied by their scales, in float32.

    Raises:
        ConfigError: an int8 tensor without a scale for each row.
    """
    whole = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            continue
        scale = whole.pop(name + SCALE, None)
        if scale is None or tensor.ndim < 2 or scale.shape != tensor.shape[:1]:
            raise ConfigError(f"damaged: {name} is of 8 bits and has no scale for each of its rows")
        whole[name] = tensor.float() * scale.float().view(-1, *[1] * (tensor.ndim - 1))
    return whole

"""Normalisation of maps."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.distributed import global_sum, world_size


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on CPU and CUDA alike (torch's SyncBatchNorm is CUDA only).

    Where its weights take no gradients, it stays in inference mode: frozen are its statistics too.
    """

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float()
        total = global_sum(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]))  # (2, c)
        count = global_sum(x.new_tensor(x.numel() / x.shape[1]))
        mean, square = total / count
        var = square - mean.square()
        with torch.no_grad():
            momentum = self.momentum or 0.0
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * count / (count - 1), momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def conv_norm_relu(layers: nn.Module, x: Tensor) -> Tensor:
    """A convolution, a batch norm and a ReLU; in inference as one convolution, for the norm is an affine map then."""
    assert isinstance(layers, nn.Sequential)
    conv, norm = layers[0], layers[1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm2d)
    if norm.training or torch.is_grad_enabled():
        return layers(x)
    assert norm.running_mean is not None and norm.running_var is not None and conv.bias is None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = (conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    shift = norm.bias - norm.running_mean * scale
    return F.relu_(F.conv2d(x, weight, shift, conv.stride, conv.padding))

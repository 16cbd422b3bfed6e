"""What a machine reaches on the products that a detector consists of: where the floor of its parts is."""

import statistics

import torch
import torch.nn.functional as F

from sievit.measure.clock import clocked
from sievit.vit import ViTConfig

CALLS = 5
"""That are timed, after two that are not."""


def machine_rates(
    config: ViTConfig, grid: tuple[int, int], batch: int, channels: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """GF/s by product, two operations per multiply-add; medians of a few calls.

    `linear` is the MLP's first layer on all grid tokens of the batch, `conv3x3` a convolution from `channels` to
    `channels` on the map of stride 4, channels last, and `attention` the fused attention of each image's grid tokens,
    with the backbone's heads.

    Args:
        grid: (h, w) of the tokens, at stride 16.
        channels: of the FPN.
    """
    (h, w), c = grid, config.embed_dim
    n = h * w

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tokens, weight, bias = random(batch * n, c), random(config.hidden_dim, c), random(config.hidden_dim)
    q, k, v = (random(batch, config.num_heads, n, c // config.num_heads) for _ in range(3))
    last = torch.channels_last
    maps = random(batch, channels, 4 * h, 4 * w).contiguous(memory_format=last)
    kernel, offset = random(channels, channels, 3, 3).contiguous(memory_format=last), random(channels)
    products = {
        "linear": (lambda: F.linear(tokens, weight, bias), batch * n * c * config.hidden_dim),
        "conv3x3": (lambda: F.conv2d(maps, kernel, offset, padding=1), batch * 16 * n * 9 * channels**2),
        "attention": (lambda: F.scaled_dot_product_attention(q, k, v), 2 * batch * n * n * c),
    }
    rates = {}
    for name, (call, macs) in products.items():
        times = [clocked(call, device)[0] for _ in range(2 + CALLS)][2:]
        rates[name] = round(2 * macs / statistics.median(times) / 1e6, 1)
    return rates

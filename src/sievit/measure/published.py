"""The rule of counting behind the figures that SegViT and DToP published (arXiv 2308.01045).

It is what the papers' tool counts in the released code: products as everywhere here, layer norms at five per value
(batch norms at two), and two bilinear resizings to the image, from the head to pixels and once more by the code around
it. Auxiliary heads do not count in an image of which no token left at one of them: their predictions are not used.

Letters: r rows of a trace, t tokens that a head looks at, c channels, k classes.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sievit.config import ConfigError, kind_of
from sievit.heads import ATMConfig, LinearConfig, MLPConfig, SemanticHeadConfig, SETRNaiveConfig, SETRPUPConfig
from sievit.heads.semantic import extents
from sievit.measure.flops import block_macs
from sievit.tokens import Trace
from sievit.vit import ViTConfig


def published_macs(
    vit: ViTConfig, head: SemanticHeadConfig, num_classes: int, out_indices: tuple[int, ...], trace: Trace
) -> Tensor:
    """(r,) multiply-adds of a pass of a segmenter, float64.

    Args:
        head: of every stage. out_indices: the blocks behind which heads stand.

    Raises:
        ConfigError: a head for which there is no such rule.
    """
    rows, columns = extents(trace.valid, trace.grid)
    cells = (rows * columns).double()
    tokens, seen = trace.counts(), trace.seen()
    seen_by_heads = torch.stack([head_tokens(trace, block) for block in out_indices])
    early = (trace.exited[-2] if len(trace.exited) > 1 else torch.zeros_like(trace.valid)).any(1)
    c, pixels = vit.embed_dim, vit.stride**2
    norms = 5 * c * (tokens + torch.maximum(tokens, seen)).double()
    blocks = (block_macs(vit, tokens, seen, projected=trace.projected()) + norms).sum(0)
    heads = torch.stack([_head(head, row.double(), cells, c, num_classes) for row in seen_by_heads])
    final_norm = 5 * c * seen_by_heads[-1] if vit.final_norm else 0
    resizing = 2 * 4 * num_classes * pixels * cells
    return (
        3 * vit.patch_size**2 * c * cells + blocks + final_norm + torch.where(early, heads.sum(0), heads[-1]) + resizing
    )


def head_tokens(trace: Trace, block: int) -> Tensor:
    """(r,) tokens that the head behind `block` looks at."""
    if not trace.exited:
        return trace.valid.sum(1)
    return trace.aux[block].get("asked_keep", trace.keep[block]).sum(1)  # over frames those that are reused too


def _head(head: SemanticHeadConfig, t: Tensor, cells: Tensor, c: int, k: int) -> Tensor:
    """(r,) multiply-adds of one head, norms and resizing inside it included."""
    if isinstance(head, ATMConfig):
        d = head.channels
        of_queries = 6 * k * d**2 + 2 * k**2 * d + 2 * k * d * int(d * head.mlp_ratio) + 15 * k * d
        return t * c * d + 5 * t * d + head.num_layers * (of_queries + 2 * t * d**2 + 2 * k * t * d) + 2 * k * d
    if isinstance(head, LinearConfig):
        return 5 * t * c + t * c * k
    if isinstance(head, MLPConfig):
        widths = [c, *[head.hidden_dim] * (head.num_layers - 1), k]
        return t * sum(a * b for a, b in pairwise(widths))
    if isinstance(head, SETRNaiveConfig):
        return 5 * t * c + t * head.channels * (c + 2 + k)
    if isinstance(head, SETRPUPConfig):
        d, n = head.channels, head.num_convs
        convs = sum(4**i * (9 * (d if i else c) * d + 2 * d + 4 * 4 * d) for i in range(n))
        return cells * (5 * c + convs + 4**n * d * k)
    raise ConfigError(f"the head {kind_of(head) or type(head).__name__!r} has no published rule of counting")

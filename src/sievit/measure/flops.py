"""What a pass costs, from its trace.

One GFLOP is 1e9 multiply-adds, as in both papers. Blocks, gates and semantic heads are counted by formula from the
tokens that took part; everything else by running the modules on shapes alone. Additions, norms, activations and softmax
are left out, as in the papers; the sampling of deformable attention is counted, which the papers' tools leave out. The
bilinear resizing of what a segmenter says is counted too, at four per value that comes out, as DToP counts it; what
happens to images before the network is not. Every image is counted as if it were alone: the padding of a batch costs it
nothing, unless the model computes it too (`DetectorConfig.padding`).

The figures that DToP published follow a rule of their own: `published_gflops`.

Letters: b images, n grid tokens, t tokens that take part, c channels, k classes.
"""

from collections.abc import Callable
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sievit.config import ConfigError, kind_of
from sievit.heads import (
    SETRPUP,
    ATMConfig,
    LinearConfig,
    MaskRCNN,
    MLPConfig,
    SemanticHead,
    SETRNaiveConfig,
    SETRPUPConfig,
)
from sievit.heads.semantic import extents
from sievit.models.backbone import Backbone
from sievit.models.detector import Detector, Output
from sievit.models.segmenter import Segmentation, SegmentationNet, Segmenter, SegmenterConfig
from sievit.necks.adapter import ViTAdapter
from sievit.policies import KeepAllConfig, build_policy
from sievit.tokens import Trace
from sievit.vit import Sizes, ViTConfig


def model_gflops(model: Detector | Segmenter, output: Output | Segmentation) -> Tensor:
    """(b,) GFLOPs of the whole model for each image of `output`, a pass of evaluation."""
    return torch.stack(list(by_module(model, output).values())).sum(0)


def by_module(model: Detector | Segmenter, output: Output | Segmentation) -> dict[str, Tensor]:
    """(b,) GFLOPs for each image of `output` by part of the model; their sum is that of the whole model.

    Of both kinds `patch_embed`, `blocks` and `policy`; of a segmenter `heads.0`, ... and `upsampling`; of a detector
    `neck`, `fpn`, `rpn`, and `box` (at the limit of proposals per image) and `mask` (on the detections that there are).
    """
    if isinstance(model, Segmenter):
        assert isinstance(output, Segmentation)
        return _segmenter_by_module(model, output)
    assert isinstance(output, Output)
    return _detector_by_module(model, output)


def block_macs(config: ViTConfig, tokens: Tensor, seen: Tensor | None = None, mlp: Tensor | None = None) -> Tensor:
    """Multiply-adds of one block.

    Its attention computes `tokens` tokens of an image from `seen` visible ones, its MLP `mlp` tokens (None: the same).

    2 t c^2 + 2 s c^2 for queries, keys, values and the projection, 2 t s c for the attention, 2 m c (mlp c), or of a
    gated MLP 3 m c (mlp c). Without tokens the block is not computed.
    """
    t, c = tokens.double(), config.embed_dim
    s = t if seen is None else seen.double() * (t > 0)
    m = t if mlp is None else mlp.double()
    return 2 * t * c**2 + 2 * s * c**2 + 2 * t * s * c + (3 if config.gated_mlp else 2) * m * c * config.hidden_dim


def traced_macs(config: ViTConfig, trace: Trace) -> Tensor:
    """(b,) multiply-adds of all blocks of a trace."""
    return block_macs(config, trace.counts(), trace.seen(), trace.mlp_counts()).sum(0)


def blocks_gflops(config: ViTConfig, trace: Trace) -> Tensor:
    """(b,) GFLOPs of all blocks of a trace."""
    return traced_macs(config, trace) / 1e9


def backbone_gflops(backbone: Backbone, trace: Trace, sizes: Sizes) -> Tensor:
    """(b,) GFLOPs of the backbone: blocks as traced, the policy's own cost, and the rest on each image's own size."""
    return torch.stack(list(_backbone_by_module(backbone, trace, sizes).values())).sum(0)


def detector_gflops(model: Detector, output: Output) -> Tensor:
    """(b,) GFLOPs of the whole detector for the images of `output`, see `by_module`."""
    return model_gflops(model, output)


def segmenter_gflops(model: Segmenter, output: Segmentation) -> Tensor:
    """(b,) GFLOPs of the whole segmenter for the images of `output`, all windows of each, see `by_module`."""
    return model_gflops(model, output)


def _segmenter_by_module(model: Segmenter, output: Segmentation) -> dict[str, Tensor]:
    net, trace = model.net, output.trace
    config = net.vit.config
    parts = {
        "patch_embed": trace.valid.sum(1).double() * 3 * config.patch_size**2 * config.embed_dim,
        "blocks": traced_macs(config, trace),
        "policy": net.policy.macs(trace).double(),
    }
    parts |= {f"heads.{i}": macs for i, macs in enumerate(heads_macs(net, trace))}
    parts["upsampling"] = _upsampling_macs(model, trace)
    owner = torch.tensor(output.owner, device=trace.valid.device)
    none = torch.zeros(len(output.resized), dtype=torch.float64, device=owner.device)
    of_images = {name: none.index_add(0, owner, macs) for name, macs in parts.items()}
    for i, (labels, seen) in enumerate(zip(output.labels, output.resized, strict=False)):
        if tuple(labels.shape) != tuple(seen):
            of_images["upsampling"][i] += 4 * len(model.config.classes) * labels.numel()
    return {name: macs / 1e9 for name, macs in of_images.items()}


def heads_macs(net: SegmentationNet, trace: Trace) -> Tensor:
    """(stages, b) multiply-adds of each head in a pass of evaluation; zero where it was not asked."""
    rows = []
    for block, asked, head in zip(net.out_indices, _asked(net, trace), net.heads, strict=True):
        assert isinstance(head, SemanticHead)
        macs = _on_own_grid(trace, _judged(trace, block), head.macs)
        rows.append(macs if asked else torch.zeros_like(macs))
    return torch.stack(rows)


def _asked(net: SegmentationNet, trace: Trace) -> list[bool]:
    """Which heads were asked: those whose answer the trace holds, or without early exits the last one."""
    asked = trace.asked if trace.exited else net.out_indices[-1:]
    return [block in asked for block in net.out_indices]


def _judged(trace: Trace, block: int) -> Tensor:
    """(b,) tokens that the head behind `block` looks at."""
    return (trace.keep[block] if trace.exited else trace.valid).sum(1)


def _own_grids(trace: Trace) -> list[tuple[int, int]]:
    """Per image the (h, w) of its tokens, without what pads it."""
    rows, columns = extents(trace.valid, trace.grid)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _on_own_grid(trace: Trace, tokens: Tensor, count: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """(b,) what `count` says of (b,) `tokens`, each image on the grid of its own."""
    grids = _own_grids(trace)
    macs = torch.zeros(len(grids), dtype=torch.float64, device=tokens.device)
    for grid in set(grids):
        rows = torch.tensor([i for i, own in enumerate(grids) if own == grid], device=tokens.device)
        macs[rows] = count(tokens[rows], grid).double()
    return macs


def _upsampling_macs(model: Segmenter, trace: Trace) -> Tensor:
    """(b,) multiply-adds of resizing what the last head says to the window's pixels."""
    stride, last = model.vit.config.stride, model.net.heads[-1]
    fine = 2 ** len(last.convs) if isinstance(last, SETRPUP) else 1  # what it says per token and side
    values = 0 if fine == stride else 4 * len(model.config.classes) * stride**2
    return torch.tensor([float(values * h * w) for h, w in _own_grids(trace)], device=trace.valid.device).double()


def published_gflops(config: SegmenterConfig, size: tuple[int, int]) -> float:
    """GFLOPs of an image of `size` (height, width) by the rule behind DToP's dense figures, for one window.

    The rule is what the papers' tool counts in the released code: products as everywhere here, layer norms at five per
    value (batch norms at two), and two bilinear resizings to the image, from the head to pixels and once more by the
    code around it. Auxiliary heads are computed and not counted: nothing comes of what they say while no token leaves.
    """
    stride, depth = config.vit.stride, config.vit.depth
    grid = (-(-size[0] // stride), -(-size[1] // stride))
    everyone = torch.tensor([grid[0] * grid[1]])
    blocks = (everyone + config.vit.num_prefix).expand(depth, 1)
    judged = everyone.expand(len(config.out_indices), 1)
    return _published_macs(config, [grid], blocks, blocks, judged, everyone < 0).item() / 1e9


def published_gflops_of(config: SegmenterConfig, output: Trace | Segmentation) -> Tensor:
    """(b,) GFLOPs by the rule of `published_gflops` of a pass; for a `Segmentation` per image, all windows of each.

    The auxiliary heads count too in an image of which a token left at one of them.
    """
    trace = output.trace if isinstance(output, Segmentation) else output
    counts = trace.counts()
    judged = torch.stack([_judged(trace, block) for block in config.out_indices])
    early = trace.exited[-2] if len(trace.exited) > 1 else torch.zeros_like(trace.valid)
    total = _published_macs(config, _own_grids(trace), counts, trace.seen(), judged, early.any(1)) / 1e9
    if not isinstance(output, Segmentation):
        return total
    none = torch.zeros(len(output.resized), dtype=torch.float64, device=total.device)
    return none.index_add(0, torch.tensor(output.owner, device=total.device), total)


def _published_macs(
    config: SegmenterConfig, grids: list[tuple[int, int]], tokens: Tensor, seen: Tensor, judged: Tensor, left: Tensor
) -> Tensor:
    """(b,) by the published rule.

    Args:
        grids: (h, w) of each image in tokens.
        tokens, seen: (depth, b), of the blocks.
        judged: (stages, b), tokens that the heads look at.
        left: (b,) bool, whether a token left before the last head.
    """
    vit = config.vit
    c, pixels = vit.embed_dim, vit.stride**2
    cells = torch.tensor([h * w for h, w in grids], dtype=torch.float64, device=tokens.device)
    norms = 5 * c * (tokens + torch.maximum(tokens, seen)).double()
    blocks = (block_macs(vit, tokens, seen) + norms).sum(0)
    heads = torch.stack([_published_head(config, row.double(), cells) for row in judged])
    final_norm = 5 * c * judged[-1] if vit.final_norm else 0
    resizing = 2 * 4 * len(config.classes) * pixels * cells
    return (
        3 * vit.patch_size**2 * c * cells + blocks + final_norm + torch.where(left, heads.sum(0), heads[-1]) + resizing
    )


def _published_head(config: SegmenterConfig, t: Tensor, cells: Tensor) -> Tensor:
    """(b,) multiply-adds of one head on `t` tokens by the published rule, norms and resizing inside it included.

    Raises:
        ConfigError: a head for which there is no such rule.
    """
    head, c, k = config.head, config.vit.embed_dim, len(config.classes)
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


def _detector_by_module(model: Detector, output: Output) -> dict[str, Tensor]:
    sizes = output.sizes
    if model.config.padding == "seen":
        sizes = [output.image_size] * len(sizes)
    parts = _backbone_by_module(model.backbone, output.trace, sizes)
    heads = [
        _head(model.head, _padded(size, model.backbone.size_divisor), len(found["boxes"]))
        for size, found in zip(sizes, output.detections, strict=True)
    ]
    device = parts["blocks"].device
    for name in heads[0]:
        parts[name] = torch.tensor([macs[name] for macs in heads], dtype=torch.float64, device=device) / 1e9
    return parts


def _backbone_by_module(backbone: Backbone, trace: Trace, sizes: Sizes) -> dict[str, Tensor]:
    config, padded = backbone.vit.config, [_padded(size, backbone.size_divisor) for size in sizes]
    per_pixel = 3 * config.embed_dim * (config.patch_size / config.stride) ** 2
    patches = [per_pixel * height * width for height, width in padded]
    rest = [_rest_of_backbone(backbone, size) - embed for size, embed in zip(padded, patches, strict=True)]
    blocks = traced_macs(config, trace)
    parts = {
        "patch_embed": torch.tensor(patches, dtype=torch.float64, device=blocks.device),
        "blocks": blocks,
        "policy": backbone.policy.macs(trace).double(),
        "neck": torch.tensor(rest, dtype=torch.float64, device=blocks.device),
    }
    return {name: macs / 1e9 for name, macs in parts.items()}


_CACHE: WeakKeyDictionary[nn.Module, dict[tuple, float]] = WeakKeyDictionary()


def _rest_of_backbone(backbone: Backbone, size: tuple[int, int]) -> float:
    """Multiply-adds of everything in the backbone that is neither a block nor the policy."""
    known = _CACHE.setdefault(backbone, {})
    if size not in known:
        config = backbone.vit.config
        dense = build_policy(KeepAllConfig(), embed_dim=config.embed_dim, depth=config.depth)
        images = torch.empty(1, 3, *size, device="meta")
        total = _count(backbone, images, policy=dense)
        tokens = backbone.vit.num_prefix + (size[0] // config.stride) * (size[1] // config.stride)
        blocks = config.depth * float(block_macs(config, torch.tensor(tokens)))
        known[size] = total - blocks + _sampling_macs(backbone, size)
    return known[size]


def _sampling_macs(backbone: Backbone, size: tuple[int, int]) -> float:
    """Multiply-adds of bilinear sampling: four per channel and point, and one for its weight."""
    if not isinstance(backbone, ViTAdapter):
        return 0.0
    cells = [(size[0] // s) * (size[1] // s) for s in (8, 16, 32)]
    channels = backbone.vit.config.embed_dim * backbone.config.deform_ratio * backbone.config.num_points * 5
    injected = len(backbone.injectors) * cells[1] * 3
    extracted = len(backbone.extractors) * sum(cells)
    return (injected + extracted) * channels


def _head(head: MaskRCNN, size: tuple[int, int], detections: int) -> dict[str, float]:
    """Multiply-adds of FPN, proposals, box branch and mask branch."""
    known = _CACHE.setdefault(head, {})
    if ("fpn", *size) not in known:
        channels = next(p for p in head.fpn.inner_blocks.parameters() if p.ndim == 4).shape[1]
        maps = {
            str(i): torch.empty(1, channels, size[0] // s, size[1] // s, device="meta")
            for i, s in enumerate((4, 8, 16, 32))
        }
        known["fpn", *size] = _count(head.fpn, maps)
        levels = [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)] + [(size[0] // 64, size[1] // 64)]
        known["rpn", *size] = _count(
            head.rpn.head, [torch.empty(1, head.config.fpn_channels, h, w, device="meta") for h, w in levels]
        )
    return {
        "fpn": known["fpn", *size],
        "rpn": known["rpn", *size],
        "box": head.config.rpn.post_nms_test * _per_box(head, "box"),
        "mask": detections * _per_box(head, "mask"),
    }


def _per_box(head: MaskRCNN, branch: str) -> float:
    """Multiply-adds of the box or the mask branch for one box."""
    known = _CACHE.setdefault(head, {})
    if (branch,) not in known:
        config, heads = head.config, head.roi_heads
        total = 0.0
        if branch == "box":
            pooled = torch.empty(1, config.fpn_channels, config.box.pool, config.box.pool, device="meta")
            total = _count(heads.box_head, pooled)
            total += _count(heads.box_predictor, torch.empty(1, config.box.fc, device="meta"))
        elif config.with_masks:
            pooled = torch.empty(1, config.fpn_channels, config.mask.pool, config.mask.pool, device="meta")
            total = _count(heads.mask_head, pooled)
            features = torch.empty(1, config.mask.convs[-1], config.mask.pool, config.mask.pool, device="meta")
            total += _count(heads.mask_predictor, features)
        known[(branch,)] = total
    return known[(branch,)]


def _count(module: nn.Module, *args: object, **kwargs: object) -> float:
    """Multiply-adds of a call on shapes alone, without touching the module."""
    state = {
        name: value.to("meta", torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(module, state, args, kwargs)
    finally:
        module.train(training)
    return counter.get_total_flops() / 2


def _padded(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width

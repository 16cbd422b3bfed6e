"""What a pass costs, from its trace.

One GFLOP is 1e9 multiply-adds, as in both papers. Blocks and gates are counted by formula from the tokens that took
part; everything else by running the modules on shapes alone. Additions, norms, activations and softmax are left out, as
in the papers; the sampling of deformable attention is counted, which the papers' tools leave out.

Letters: b images, n grid tokens, t tokens that take part, c channels.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sievit.detector import Detector, Output
from sievit.heads import MaskRCNN, SemanticHead
from sievit.necks.adapter import ViTAdapter
from sievit.necks.build import Backbone
from sievit.policies import KeepAllConfig, build_policy
from sievit.segmenter import Segmentation, SegmentationNet, Segmenter
from sievit.tokens import Trace
from sievit.vit import Sizes, ViTConfig


def model_gflops(model: Detector | Segmenter, output: Output | Segmentation) -> Tensor:
    """(b,) GFLOPs of the whole model for each image of `output`."""
    if isinstance(model, Segmenter):
        assert isinstance(output, Segmentation)
        return segmenter_gflops(model, output)
    assert isinstance(output, Output)
    return detector_gflops(model, output)


def block_macs(config: ViTConfig, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
    """Multiply-adds of one block on `tokens` tokens of one image, which see `seen` tokens (None: just themselves).

    2 t c^2 + 2 s c^2 for queries, keys, values and the projection, 2 t s c for the attention, 2 t c (mlp c).
    """
    t, c = tokens.double(), config.embed_dim
    s = t if seen is None else seen.double()
    return 2 * t * c**2 + 2 * s * c**2 + 2 * t * s * c + 2 * t * c * int(c * config.mlp_ratio)


def blocks_gflops(config: ViTConfig, trace: Trace) -> Tensor:
    """(b,) GFLOPs of all blocks that the trace has seen."""
    return block_macs(config, trace.counts(), trace.seen()).sum(0) / 1e9


def backbone_gflops(backbone: Backbone, trace: Trace, sizes: Sizes) -> Tensor:
    """(b,) GFLOPs of the backbone: blocks as traced, the policy's own cost, and the rest on each image's own size."""
    rest = [_rest_of_backbone(backbone, _padded(size, backbone.size_divisor)) for size in sizes]
    blocks = block_macs(backbone.vit.config, trace.counts(), trace.seen()).sum(0)
    policy = backbone.policy.macs(trace).double()
    return (blocks + policy + torch.tensor(rest, dtype=torch.float64, device=blocks.device)) / 1e9


def detector_gflops(model: Detector, output: Output) -> Tensor:
    """(b,) GFLOPs of the whole detector for the images of `output`.

    The box branch is counted at the limit of proposals per image, the mask branch on the detections that there are.
    """
    backbone = backbone_gflops(model.backbone, output.trace, output.sizes)
    head = [
        _head(model.head, _padded(size, model.backbone.size_divisor), len(found["boxes"]))
        for size, found in zip(output.sizes, output.detections, strict=True)
    ]
    return backbone + torch.tensor(head, dtype=torch.float64, device=backbone.device) / 1e9


def segmenter_gflops(model: Segmenter, output: Segmentation) -> Tensor:
    """(b,) GFLOPs of the whole segmenter for the images of `output`, all windows of each."""
    net, trace = model.net, output.trace
    config = net.vit.config
    of_window = trace.valid.sum(1).double() * 3 * config.patch_size**2 * config.embed_dim
    of_window = of_window + block_macs(config, trace.counts(), trace.seen()).sum(0) + net.policy.macs(trace)
    of_window = of_window + heads_macs(net, trace).sum(0)
    total = torch.zeros(len(output.resized), dtype=torch.float64, device=of_window.device)
    return total.index_add_(0, torch.tensor(output.owner, device=total.device), of_window) / 1e9


def heads_macs(net: SegmentationNet, trace: Trace) -> Tensor:
    """(stages, b) multiply-adds of each head; zero where it was not asked."""
    exits, rows = bool(trace.exited), []
    for block, head in zip(net.out_indices, net.heads, strict=True):
        assert isinstance(head, SemanticHead)
        asked = "maps" in trace.aux[block + 1] if exits else block == net.out_indices[-1]
        judged = trace.keep[block] if exits else trace.valid
        macs = head.macs(judged.sum(1), trace.grid).double()
        rows.append(macs if asked else torch.zeros_like(macs))
    return torch.stack(rows)


_CACHE: WeakKeyDictionary[nn.Module, dict[tuple, float]] = WeakKeyDictionary()


def _rest_of_backbone(backbone: Backbone, size: tuple[int, int]) -> float:
    """Multiply-adds of everything in the backbone that is neither a block nor the policy."""
    known = _CACHE.setdefault(backbone, {})
    if size not in known:
        config = backbone.vit.config
        dense = build_policy(KeepAllConfig(), embed_dim=config.embed_dim, depth=config.depth)
        images = torch.empty(1, 3, *size, device="meta")
        total = _count(backbone, images, policy=dense)
        tokens = backbone.vit.num_prefix + (size[0] // config.patch_size) * (size[1] // config.patch_size)
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


def _head(head: MaskRCNN, size: tuple[int, int], detections: int) -> float:
    """Multiply-adds of FPN, proposals, box branch and mask branch."""
    known = _CACHE.setdefault(head, {})
    if size not in known:
        channels = next(p for p in head.fpn.inner_blocks.parameters() if p.ndim == 4).shape[1]
        maps = {
            str(i): torch.empty(1, channels, size[0] // s, size[1] // s, device="meta")
            for i, s in enumerate((4, 8, 16, 32))
        }
        pyramid = _count(head.fpn, maps)
        levels = [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)] + [(size[0] // 64, size[1] // 64)]
        proposals = _count(
            head.rpn.head, [torch.empty(1, head.config.fpn_channels, h, w, device="meta") for h, w in levels]
        )
        known[size] = pyramid + proposals + head.config.rpn_post_nms_test * _per_box(head, "box")
    return known[size] + detections * _per_box(head, "mask")


def _per_box(head: MaskRCNN, branch: str) -> float:
    """Multiply-adds of the box or the mask branch for one box."""
    known = _CACHE.setdefault(head, {})
    if (branch,) not in known:
        config, heads = head.config, head.roi_heads
        total = 0.0
        if branch == "box":
            pooled = torch.empty(1, config.fpn_channels, config.box_pool, config.box_pool, device="meta")
            total = _count(heads.box_head, pooled)
            total += _count(heads.box_predictor, torch.empty(1, config.box_fc, device="meta"))
        elif config.with_masks:
            pooled = torch.empty(1, config.fpn_channels, config.mask_pool, config.mask_pool, device="meta")
            total = _count(heads.mask_head, pooled)
            features = torch.empty(1, config.mask_convs[-1], config.mask_pool, config.mask_pool, device="meta")
            total += _count(heads.mask_predictor, features)
        known[(branch,)] = total
    return known[(branch,)]


def _count(module: nn.Module, *args: object, **kwargs: object) -> float:
    """Multiply-adds of a call on shapes alone, without touching the module."""
    state = {name: value.to("meta") for name, value in (*module.named_parameters(), *module.named_buffers())}
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

"""Models of random weights that leave out as many tokens as trained ones do, on the images that they are timed on.

Times depend on shapes and counts, not on what is found.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.heads import ATM, ATMConfig, MaskRCNN, MaskRCNNConfig
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.necks.adapter import AdapterConfig, ViTAdapter
from sievit.policies import DToPConfig, KeepAllConfig, Policy, PolicyConfig, PolicyOptions, SViTConfig, chosen_policy
from sievit.policies.dtop import leave
from sievit.policies.svit import SViT
from sievit.tokens import Prediction, Trace
from sievit.vit import ViT, ViTConfig

SIZES = {
    "vit_t": ViTConfig(embed_dim=192, num_heads=3),
    "vit_s": ViTConfig(embed_dim=384, num_heads=6),
    "vit_b": ViTConfig(embed_dim=768, num_heads=12),
    "vit_l": ViTConfig(embed_dim=1024, num_heads=16, depth=24),
}
ADAPTERS = {
    "vit_t": AdapterConfig(deform_num_heads=6),
    "vit_s": AdapterConfig(deform_num_heads=6),
    "vit_b": AdapterConfig(deform_num_heads=12, deform_ratio=0.5),
    "vit_l": AdapterConfig(deform_num_heads=16, deform_ratio=0.5),
}
"""The neck of the SViT paper, by backbone."""
SEGMENTERS = {
    "vit_b": (ATMConfig(channels=384, num_heads=6), (5, 7, 11)),
    "vit_l": (ATMConfig(channels=512, num_heads=8), (7, 15, 23)),
}
"""The head of the DToP paper, and the blocks behind which it stands, by backbone."""
CLASSES = 150
HEAD = MaskRCNNConfig(num_classes=80)
"""The head of the SViT paper, on COCO."""
IMAGES, EXIT_IMAGES = 4, 12
"""On which gates, dials and scores are set, and thresholds of exits."""


def is_given(options: PolicyOptions) -> bool:
    """Whether they choose another policy than the default one."""
    return options.policy is not None or bool(options.set)


def random_vit(
    config: ViTConfig, images: Tensor, options: PolicyOptions, targets: tuple[float, ...]
) -> tuple[ViT, Policy]:
    """A backbone of random weights, and a policy for it that keeps `targets` of the tokens of the images.

    By default the policy is SViT with `targets` spread over its gated blocks: the gates are set one after the other,
    each one's bias to the quantile of its logits that keeps its share. Of another policy with weights the mean over
    these blocks is that of `targets`; one without weights, or without a dial, runs as it is configured.

    Args:
        images: (b, 3, h, w), normalised.
    """
    torch.manual_seed(0)
    vit = ViT(config).eval().to(images)
    svit = SViT(SViTConfig(targets=targets), embed_dim=config.embed_dim, depth=config.depth).eval().to(images)
    if is_given(options):
        kept = 1 - sum(1 - target for target in svit.targets) / config.depth
        return vit, turned(vit.build_policy, chosen_policy(svit.config, options), vit, images, kept)
    canvases = [vit.embed(image[None]) for image in images[:IMAGES]]
    traces = [Trace.start(tokens) for tokens in canvases]
    first = svit.config.first_block
    for index in range(config.depth):
        if index >= first:
            gate = svit.gates[index - first]
            logits = torch.cat([gate(tokens).float().flatten(0, 1) for tokens in canvases])
            margin = (logits[:, 0] - logits[:, 1]).quantile(1 - svit.targets[index - first])
            bias = gate.get_parameter("fc2.bias")
            bias[0] -= margin.to(bias.dtype)
        steps = [
            vit.run_blocks(tokens, svit, trace, start=index, stop=index + 1)
            for tokens, trace in zip(canvases, traces, strict=True)
        ]
        canvases, traces = [step[0] for step in steps], [step[1] for step in steps]
    return vit, svit


def turned(
    build: Callable[[PolicyConfig], Policy],
    config: PolicyConfig,
    network: Callable[..., tuple[object, Trace]],
    images: Tensor,
    kept: float,
) -> Policy:
    """A policy with its first dial where `kept` of the tokens take part, mean over blocks and images.

    One without weights, or without a dial, stays as it is configured.
    """
    first = build(config).eval().to(images)

    def like_first(config: PolicyConfig) -> Policy:
        policy = build(config).eval().to(images)
        policy.load_state_dict(first.state_dict())
        return policy

    def traces(config: PolicyConfig) -> Iterable[Trace]:
        policy = like_first(config)
        return (network(image[None], policy=policy)[1] for image in images[:IMAGES])

    dials = first.dials(traces) if any(True for _ in first.parameters()) else []
    if not dials:
        return first

    def too_many(position: float) -> bool:
        shares = [trace.shares().double().mean().item() for trace in traces(dials[0](position))]
        return sum(shares) / len(shares) > kept

    return like_first(dials[0](bisected(too_many, 0.0, 1.0, steps=8)))


def bisected(is_below: Callable[[float], bool], low: float, high: float, *, steps: int) -> float:
    """The smallest number between `low` and `high` for which `is_below` is false, to the accuracy of some steps."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


def random_adapter(name: str, images: Tensor, options: PolicyOptions, targets: tuple[float, ...]) -> ViTAdapter:
    """A ViT-Adapter of random weights, see `random_vit`.

    Fresh injectors add nothing to the tokens, so that a policy that is set on the plain ViT keeps as many here.
    """
    vit, policy = random_vit(SIZES[name], images, options, targets)
    return ViTAdapter(ADAPTERS[name], vit=vit, policy=policy).eval().to(images)


def random_segmenter(vit: ViTConfig, head: ATMConfig, out_indices: tuple[int, ...]) -> Segmenter:
    """A segmenter of random weights whose heads tell tokens apart.

    Fresh heads grade all tokens and classes nearly alike. The maps of these have a standard deviation of 3, as those of
    trained ones, and few classes are likely to be in the image.
    """
    torch.manual_seed(0)
    classes = tuple(f"class {i}" for i in range(CLASSES))
    config = SegmenterConfig(
        vit=vit, policy=KeepAllConfig(), input=InputConfig(), classes=classes, head=head, out_indices=out_indices
    )
    segmenter = Segmenter.from_config(config)
    for each in segmenter.net.heads:
        assert isinstance(each, ATM)
        attention = each.layers[-1].get_submodule("cross_attn")
        spread = math.sqrt(3 * math.sqrt(head.num_heads))  # of queries and keys, whose product is maps * sqrt(heads)
        for name in ("q.weight", "k.weight"):
            nn.init.normal_(attention.get_parameter(name), std=spread / math.sqrt(head.channels))
        nn.init.normal_(each.class_embed.weight, std=4 / math.sqrt(2 * head.channels))
        with torch.no_grad():
            each.class_embed.bias.copy_(torch.tensor([-3.0, 3.0]))
    return segmenter


def random_exits(
    segmenter: Segmenter, images: Tensor, options: PolicyOptions, left: tuple[float, ...], keep_per_class: int = 5
) -> Policy:
    """A policy for a random segmenter, by which the shares `left` of the tokens of the images leave.

    By default the policy is DToP, and `left` are gone after each stage: thresholds are found one after the other, by
    bisection on the share that really leaves, mean over the images, each of which goes through the network by itself.
    Another policy is set as `random_vit` does it.

    Args:
        images: (b, 3, h, w), normalised.

    Raises:
        ConfigError: not one share for each auxiliary head, or shares that fall or do not lie between 0 and 1.
    """
    net, thresholds = segmenter.net, ()
    if len(left) != len(net.out_indices) - 1 or sorted(left) != list(left) or not 0 < left[0] <= left[-1] < 1:
        raise ConfigError(f"left {left}: one rising share between 0 and 1 for each of {len(net.out_indices) - 1} heads")
    if is_given(options):
        starts = [0, *(index + 1 for index in net.out_indices)]
        kept = sum((1 - s) * (b - a) for s, a, b in zip((0.0, *left), starts, starts[1:], strict=False)) / starts[-1]
        config = chosen_policy(DToPConfig(keep_per_class=keep_per_class), options)
        return turned(net.build_policy, config, net, images, kept)
    images = images[:EXIT_IMAGES]
    for stage, share in enumerate(left):
        rest = (1.0,) * (len(left) - stage - 1)
        policy = net.build_policy(DToPConfig(thresholds=(*thresholds, 0.0, *rest), keep_per_class=keep_per_class))
        traces = [net(image[None], policy=policy)[1] for image in images]
        predictions = [trace.predictions[stage] for trace in traces]
        prediction = Prediction(
            torch.cat([each.maps for each in predictions]),
            torch.cat([each.classes for each in predictions if each.classes is not None]),
        )
        there = torch.cat([~trace.exited[stage - 1] if stage else trace.valid for trace in traces])

        def too_many(threshold: float, prediction=prediction, there=there, share=share) -> bool:
            leaving = leave(prediction, there, threshold, keep_per_class=keep_per_class, grade="max")
            return (leaving | ~there).double().mean().item() > share

        thresholds = (*thresholds, bisected(too_many, 0.0, 1.0, steps=40))
    return net.build_policy(DToPConfig(thresholds=thresholds, keep_per_class=keep_per_class))


def random_detector(
    name: str, images: Tensor, options: PolicyOptions, targets: tuple[float, ...], candidates: int
) -> Detector:
    """ViT-Adapter with Mask R-CNN of random weights, see `random_adapter`.

    Fresh heads find nothing, or everything; here class scores spread, and the background's is such that on average
    `candidates` boxes of an image are above the least score.
    """
    backbone = random_adapter(name, images.float(), options, targets)
    head = MaskRCNN(HEAD, in_channels=backbone.out_channels).eval().to(images.device)
    config = DetectorConfig(
        vit=SIZES[name],
        neck=backbone.config,
        policy=backbone.policy.config,
        head=head.config,
        input=InputConfig(min_size=None, antialias=False),
        classes=tuple(f"class {i}" for i in range(HEAD.num_classes)),
        category_ids=tuple(range(1, HEAD.num_classes + 1)),
    )
    size = (images.shape[2], images.shape[3])
    predictor = head.roi_heads.box_predictor.cls_score
    nn.init.normal_(predictor.weight, std=0.1)
    of_images = []
    for image in images[:IMAGES].float():
        maps = head.pyramid(backbone(image[None])[0])
        proposals, _ = head.rpn(maps, size, [size], None)
        of_images.append(head.roi_heads.box_branch(maps[:4], proposals)[0])
    logits = torch.cat(of_images)
    spread = 2.0 / logits[:, 1:].std()
    predictor.weight *= spread
    logits = logits * spread

    def too_many(bias: float) -> bool:
        scores = torch.cat([logits[:, :1] + bias, logits[:, 1:]], 1).softmax(1)[:, 1:]
        return (scores > head.config.box.min_score).sum().item() > candidates * len(of_images)

    predictor.bias.zero_()
    predictor.bias[0] = bisected(too_many, -50.0, 50.0, steps=30)
    return Detector(config, backbone=backbone, head=head).eval()

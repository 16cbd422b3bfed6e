"""The released SegViT and DToP segmenters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from sievit.config import ConfigError, Count, Finite, Natural, Positive, Share
from sievit.convert.dtop import SOURCE, left_out, num_stages, read_network, segvit_segmenter
from sievit.convert.keys import need
from sievit.convert.pth import Checkpoint
from sievit.data.label_files import read_palette
from sievit.data.presets import preset
from sievit.heads import ATM, ATMConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.recipes import recipe
from sievit.released.common import Converted, ReleasedOptions, class_names, described, lines

RECIPES = {
    (150, 768, 512): "ade20k_segvit_b_dtop",
    (150, 1024, 640): "ade20k_segvit_l_dtop",
    (59, 1024, 480): "pascal_context_segvit_l_dtop",
    (60, 1024, 480): "pascal_context_segvit_l_dtop",
    (171, 1024, 512): "coco_stuff10k_segvit_l_dtop",
}
"""By number of classes, width of the ViT, and edge of the training images."""

DATA_SETS = {150: "ade20k", 59: "pascal_context59", 60: "pascal_context60", 171: "coco_stuff10k"}
"""By number of classes."""


@dataclass(frozen=True, kw_only=True)
class SegViTOptions(ReleasedOptions):
    """What the file of a segmenter does not hold; of the released models on ADE20K, Pascal Context and COCO-Stuff all
    of it is known.

    Attributes:
        classes: file with the names of the classes, one a line, in the order of training.
        palette: file with a line `red green blue name` for each class, in place of --classes.
        num_heads: of the ViT's attention; default one for every 64 channels.
        head_num_heads: of the attention in the heads' decoders.
        out_indices: blocks behind which the heads stand, counted from 0, the last block included.
        crop: edge in pixels of the window that moves over a test image; default that of the training images.
        stride: pixels by which it moves.
        short_edge: test images are fitted into this and --long-edge; default --crop.
        long_edge: default four times --short-edge.
        mean: of the pixels, RGB in 0..255.
        std: of the pixels, RGB in 0..255.
    """

    family = "segvit"
    classes: Path | None = None
    palette: Path | None = None
    num_heads: Count | None = None
    head_num_heads: Count | None = None
    out_indices: tuple[Natural, ...] | None = None
    crop: Count | None = None
    stride: Count | None = None
    short_edge: Count | None = None
    long_edge: Count | None = None
    mean: tuple[Finite, Finite, Finite] | None = None
    std: tuple[Positive, Positive, Positive] | None = None


@dataclass(frozen=True, kw_only=True)
class DToPOptions(SegViTOptions):
    """What the file of a sparse segmenter does not hold.

    Attributes:
        thresholds: grades above which tokens leave; default those of the release.
    """

    family = "dtop"
    thresholds: tuple[Share, ...] | None = None


def assemble(checkpoint: Checkpoint, options: SegViTOptions) -> Converted:
    """The segmenter in a checkpoint; a dense one unless `options` are those of DToP."""
    state = checkpoint.state
    stages = num_stages(state)
    if isinstance(options, DToPOptions) and stages < 2:
        raise ConfigError("has no auxiliary heads at which tokens could leave; use `sievit convert segvit`")
    base = _base(checkpoint, options, stages)
    if not isinstance(options, DToPOptions):
        base = replace(base, policy=KeepAllConfig())
    elif options.thresholds is not None:
        base = replace(base, policy=DToPConfig(thresholds=options.thresholds))
    elif not isinstance(base.policy, DToPConfig):
        raise ConfigError("is none of the released models; also give --thresholds, such as 0.95")
    assert isinstance(base.head, ATMConfig)
    net = segvit_segmenter(
        state,
        num_heads=base.vit.num_heads,
        head_num_heads=base.head.num_heads,
        out_indices=base.out_indices,
        policy=base.policy,
        drop_path_rate=base.vit.drop_path_rate,
    )
    head = net.heads[-1]
    assert isinstance(head, ATM)
    config = replace(base, vit=net.vit.config, head=head.config)
    facts = {
        "model": f"SegViT with heads behind blocks {', '.join(map(str, config.out_indices))}",
        "backbone": described(net.vit),
        "classes": f"{len(config.classes)} ({', '.join(config.classes[:3])}, ...)",
        "input": f"images within {config.input.min_size} x {config.input.max_size} pixels, windows of {config.crop} "
        f"moved by {config.stride}",
        "policy": "keep_all: every token is computed",
        "unused": "the first row of backbone.pos_embed, the class token's",
    }
    if isinstance(config.policy, DToPConfig):
        facts["policy"] = f"dtop, thresholds {', '.join(map(str, config.policy.thresholds))}"
    return Converted(model=Segmenter(config, net).eval(), facts=facts, keys=len(state), dropped=left_out(state))


def _base(checkpoint: Checkpoint, options: SegViTOptions, stages: int) -> SegmenterConfig:
    """Everything that does not follow from a shape, of the recipe of the same model or the options.

    Raises:
        ConfigError: neither has some of it; the message lists what.
    """
    state, vit = read_network(checkpoint.state, num_heads=options.num_heads)
    num_classes = len(need(state, "heads.0.queries", source=SOURCE, ndim=2))
    name = RECIPES.get((num_classes, vit.embed_dim, vit.grid[0] * vit.patch_size))
    known = None if name is None else cast(SegmenterConfig, recipe(name).model)
    data = preset(DATA_SETS[num_classes]) if num_classes in DATA_SETS else None
    classes, palette = class_names(
        num_classes,
        checkpoint.classes,
        None if data is None else (data.classes, data.palette),
        {"--classes": (options.classes, lines), "--palette": (options.palette, _palette)},
        way_out="none of the data sets of the papers; name them with --classes FILE (a name a line, in the order of "
        "training) or --palette FILE (lines `red green blue name`)",
    )
    crop = options.crop or vit.grid[0] * vit.patch_size
    given: dict[str, Any] = {
        "--stride": options.stride,
        "--head-num-heads": options.head_num_heads,
        "--out-indices": options.out_indices or ((vit.depth - 1,) if stages == 1 else None),
        "--mean and --std": None,
    }
    if options.mean is not None and options.std is not None:
        given["--mean and --std"] = [tuple(value / 255 for value in values) for values in (options.mean, options.std)]
    if known is not None:
        assert isinstance(known.head, ATMConfig) and known.stride is not None
        theirs = (known.stride[0], known.head.num_heads, known.out_indices, (known.input.mean, known.input.std))
        given = {name: value or other for (name, value), other in zip(given.items(), theirs, strict=True)}
    if missing := [name for name, value in given.items() if value is None]:
        raise ConfigError(
            f"has a ViT {vit.embed_dim} wide for {num_classes} classes, trained on images of {crop} pixels, which is "
            f"none of the released models; also give {', '.join(missing)}"
        )
    stride, head_heads, out_indices, (mean, std) = given.values()
    short = options.short_edge or (crop if known is None else known.input.min_size)
    assert short is not None
    long = options.long_edge or (4 * short if known is None or options.short_edge else known.input.max_size)
    return SegmenterConfig(
        vit=vit if known is None else replace(vit, drop_path_rate=known.vit.drop_path_rate),
        policy=KeepAllConfig() if known is None else known.policy,
        input=InputConfig(
            mean=mean,
            std=std,
            min_size=short,
            max_size=long,
            size_divisor=vit.patch_size,
            antialias=False,
        ),
        classes=classes,
        head=ATMConfig(channels=head_heads, num_heads=head_heads),  # its width is read from the weights
        out_indices=out_indices,
        crop=(crop, crop),
        stride=(stride, stride),
        palette=palette,
    )


def _palette(path: Path) -> tuple[tuple[str, ...], tuple]:
    palette = read_palette(path)
    return palette.names or tuple(map(str, range(len(palette.colours)))), palette.colours

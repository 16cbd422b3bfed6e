"""Telling released checkpoints apart by their keys, so that the wrong one is refused by name."""

from collections.abc import Iterable

from sievit.config import ConfigError

Signs = tuple[str, ...]

FAMILIES: dict[str, tuple[Signs, str, str]] = {
    "sievit": (
        ("backbone.vit.", "net.vit.", "vit.blocks."),
        "a model of sievit's own",
        "it needs no conversion: give the file itself to `sievit eval`, `predict` or `train --train.init-from`",
    ),
    "svit": (
        ("backbone.selective_modules.", "selective_modules."),
        "a released SViT-Adapter",
        "use `sievit convert svit`",
    ),
    "vit_adapter": (
        ("backbone.interactions.", "interactions."),
        "a dense ViT-Adapter",
        "use `sievit convert vit_adapter`",
    ),
    "segvit": (
        ("decode_head.q.", "decode_head.decoder.layers."),
        "a SegViT or DToP segmenter",
        "use `sievit convert dtop`, or `sievit convert segvit` for the dense one",
    ),
    "transformers": (
        ("embeddings.patch_embeddings.", "vit.embeddings.", "encoder.layer."),
        "a ViT of Hugging Face's transformers",
        "it is a backbone alone: take it in Python with `sievit.from_transformers`",
    ),
    "timm": (
        ("patch_embed.proj.", "blocks.0.attn."),
        "a plain ViT, without anything that detects or segments",
        "train a model that starts from it: `sievit train RECIPE --train.vit-from FILE`",
    ),
    "mmdet": (
        ("backbone.layers.", "backbone.layer1.", "rpn_head.", "roi_head.", "bbox_head.", "decode_head."),
        "another detector or segmenter of mmdet or mmsegmentation",
        "of these SViT-Adapter, ViT-Adapter, SegViT and DToP can be converted",
    ),
}
"""By name: how keys of the family begin, what it is called, and what to do with it. The first that fits counts."""

ACCEPTED = {"svit": "svit", "vit_adapter": "vit_adapter", "dtop": "segvit", "segvit": "segvit"}
"""Which family each conversion takes."""


def family(keys: Iterable[str]) -> str | None:
    """The name of the family that has keys like these, None for none."""
    keys = tuple(keys)
    for name, (signs, _, _) in FAMILIES.items():
        if any(key.startswith(signs) for key in keys):
            return name
    return None


def require_family(keys: Iterable[str], wanted: str) -> None:
    """Raise unless the keys are of the family that the conversion `wanted` takes.

    Raises:
        ConfigError: it says which family it is, and the way out.
    """
    keys = tuple(keys)
    found, own = family(keys), ACCEPTED[wanted]
    if found == own:
        return
    expected = FAMILIES[own][1]
    if found is None:
        some = ", ".join(sorted(keys)[:4])
        raise ConfigError(f"is not {expected}, nor anything else that is known; its keys are like {some}")
    _, name, way_out = FAMILIES[found]
    raise ConfigError(f"is {name}, not {expected}; {way_out}")

"""A backbone with its neck, ViT-Adapter, dense against SViT."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sievit.bench.blocks import calibrated
from sievit.bench.common import SIZES, Bench, Place, alternately, check_known, peak_mb, run, summary, table_of
from sievit.flops import backbone_gflops
from sievit.inputs import Size
from sievit.necks.adapter import AdapterConfig, ViTAdapter
from sievit.policies import Policy
from sievit.tokens import Trace

ADAPTERS = {
    "vit_t": AdapterConfig(deform_num_heads=6),
    "vit_s": AdapterConfig(deform_num_heads=6),
    "vit_b": AdapterConfig(deform_num_heads=12, deform_ratio=0.5),
    "vit_l": AdapterConfig(deform_num_heads=16, deform_ratio=0.5),
}
"""The paper's, by backbone."""


@dataclass(frozen=True, kw_only=True)
class BackboneBench(Bench):
    """ViT-Adapter, from normalised images to its four maps, dense against SViT.

    Attributes:
        models: names of backbones, random weights.
        targets: share of tokens that the gates keep, spread over blocks 3 to 11; they are set to it on the images.
    """

    models: tuple[str, ...] = ("vit_s",)
    targets: tuple[float, ...] = (0.7, 0.49, 0.343)


@torch.inference_mode()
def bench_backbone(config: BackboneBench, console: Console | None = None) -> dict[str, Any]:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, or a folder without pictures.
    """
    check_known(config.models, ADAPTERS)

    def row_of(model: str, size: Size | None, batch: int, place: Place) -> dict[str, Any]:
        assert size is not None
        pictures = place.pictures((_up(size[0]), _up(size[1])), batch)
        backbone, dense = random_adapter(model, pictures, config.targets)
        return {"mode": "dynamic", **time_backbone(backbone, dense, pictures.split(batch))}

    def table(rows: list[dict[str, Any]]):
        keep = [f"{statistics.mean(row['keep'][3:]):.0%}" for row in rows]
        return table_of("ViT-Adapter: dense against SViT, gates included", rows, {"keep": keep})

    return run("backbone", config, config.models, config.sizes, row_of, table, console)


def random_adapter(model: str, pictures: Tensor, targets: tuple[float, ...]) -> tuple[ViTAdapter, Policy]:
    """A ViT-Adapter of random weights whose gates keep `targets` on these pictures, and a dense policy for it.

    Fresh injectors add nothing to the tokens, so that gates which are set on the plain ViT keep as many here.
    """
    vit, (dense, sparse) = calibrated(SIZES[model], pictures, targets)
    return ViTAdapter(ADAPTERS[model], vit=vit, policy=sparse).eval().to(pictures), dense


def time_backbone(backbone: ViTAdapter, dense: Policy, batches: tuple[Tensor, ...]) -> dict[str, Any]:
    """All tokens and those of the backbone's policy alternately on the same images."""

    def call(policy: Policy | None) -> Callable[[Tensor], Trace]:
        return lambda images: backbone(images, policy=policy)[1]

    device = batches[0].device
    pairs = alternately(call(dense), call(None), batches, device)
    sizes = [(batches[0].shape[2], batches[0].shape[3])] * len(batches[0])
    costs = [[backbone_gflops(backbone, t, sizes).sum().item() for t in (pair.dense, pair.sparse)] for pair in pairs]
    keep = torch.stack([pair.sparse.shares().mean(1) for pair in pairs]).mean(0)
    return {
        "tokens": pairs[0].dense.valid.shape[1],
        **summary(pairs, [a / b for a, b in costs]),
        "gflops": [round(statistics.fmean(column) / len(sizes), 4) for column in zip(*costs, strict=True)],
        "keep": [round(share, 3) for share in keep.tolist()],
        "memory_mb": [peak_mb(lambda policy=policy: call(policy)(batches[0]), device) for policy in (dense, None)],
    }


def _up(side: int) -> int:
    """The next multiple of 32."""
    return -(-side // 32) * 32

"""A backbone with its neck, ViT-Adapter, dense against SViT."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit.bench.blocks import CALIBRATED, BlocksBench, calibrated, frozen
from sievit.bench.common import SIZES, ModesBench, Place, check_known, kept, run, table_of
from sievit.bench.modes import calls_of
from sievit.bench.timing import Cost, time_modes
from sievit.models.backbone import backbone_gflops
from sievit.models.inputs import Size
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
class BackboneBench(BlocksBench):
    """ViT-Adapter, from normalised images to its four maps, dense against SViT."""


@torch.inference_mode()
def bench_backbone(config: BackboneBench, console: Console | None = None) -> dict[str, Any]:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, or a folder without pictures.
    """
    check_known(config.models, ADAPTERS)

    def rows_of(
        model: str, size: Size | None, batch: int, place: Place, modes: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        assert size is not None
        pictures = place.pictures((_up(size[0]), _up(size[1])), batch)
        backbone, dense = random_adapter(model, pictures, config.targets)
        return time_backbone(backbone, dense, pictures.split(batch), replace(config, modes=modes))

    def table(rows: list[dict[str, Any]]) -> Table:
        return table_of("ViT-Adapter: dense against SViT, gates included", rows, {"keep": kept(rows)})

    return run("backbone", config, config.models, config.sizes, config.modes, rows_of, table, console)


def random_adapter(model: str, pictures: Tensor, targets: tuple[float, ...]) -> tuple[ViTAdapter, Policy]:
    """A ViT-Adapter of random weights whose gates keep `targets` on these pictures, and a dense policy for it.

    Fresh injectors add nothing to the tokens, so that gates which are set on the plain ViT keep as many here.
    """
    vit, (dense, sparse) = calibrated(SIZES[model], pictures, targets)
    return ViTAdapter(ADAPTERS[model], vit=vit, policy=sparse).eval().to(pictures), dense


Maps = dict[str, Tensor]


def time_backbone(
    backbone: ViTAdapter, dense: Policy, batches: Sequence[Tensor], config: ModesBench
) -> Iterator[dict[str, Any]]:
    """All tokens and those of the backbone's policy alternately on the same images, a row for each mode."""
    sizes = [(batches[0].shape[2], batches[0].shape[3])] * len(batches[0])

    def cost(policy: Policy, result: tuple[Maps, Trace]) -> Cost:
        _, trace = result
        return Cost.of(trace, torch.stack(list(backbone_gflops(backbone, trace, sizes).values())).sum(0), policy)

    traces = [backbone(images)[1] for images in batches[:CALIBRATED]]
    sparse = backbone.policy
    ways = {"dense": dense, "dynamic": sparse, "bucketed": sparse, "static": frozen(sparse, traces, config.multiple)}
    call_of = calls_of(backbone, autotune=config.autotune)
    return time_modes(config, ways, call_of, batches, batches[0].device, cost, list(backbone.vit.blocks))


def _up(side: int) -> int:
    """The next multiple of 32."""
    return -(-side // 32) * 32

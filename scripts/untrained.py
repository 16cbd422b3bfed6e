"""What a pre-trained backbone's features keep when tokens are left out without any training.

    python scripts/untrained.py dinov2_s.safetensors examples/facade/images/val

The backbone is DINOv2-S; its weights are a file in timm's naming, or timm:NAME. Images become squares of `size` pixels;
all policies see one after the other, in turns with the dense backbone. The cosine is that of the features behind the
last block with the dense ones, the mean over tokens and images.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import sievit
from sievit.data.images import list_images, read_image
from sievit.engine.initial import start_vit_from
from sievit.measure.clock import clocked, in_turns
from sievit.measure.flops import traced_macs
from sievit.models.features import Features, SievedViT
from sievit.models.inputs import InputConfig, as_tensor
from sievit.recipes.common import DINOV2_S

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"policy": "keep_all"},
    "random": {"policy": "random"},
    "largest norm": {"policy": "top_norm"},
    "attention": {"policy": "attention"},
    "random, propagate": {"policy": "random", "propagate": True},
    "largest norm, propagate": {"policy": "top_norm", "propagate": True},
    "attention, propagate": {"policy": "attention", "propagate": True},
    "spread": {"policy": "spread"},
    "ToMe": {"policy": "tome", "share": 0.06},
}


@torch.inference_mode()
def main(weights: Path, images: Path, /, size: int = 448, number: int = 10, threads: int = 1) -> None:
    """Print a row for each policy.

    Args:
        number: images that are read, at equal distances in the folder.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    vit = sievit.ViT(DINOV2_S)
    start_vit_from(vit, weights)
    sieved = [sievit.sieve(vit, **options) for options in POLICIES.values()]
    files = list_images(images)
    inputs = [pixels(file, size) for file in files[:: max(1, len(files) // number)][:number]]
    for each in sieved:
        each(inputs[0])
    calls = [partial(SievedViT.__call__, each) for each in sieved]
    taken = in_turns(calls, inputs, lambda _, call: clocked(call, torch.device("cpu")), lambda i, found: found)
    dense = taken[0]
    print(f"{'policy':26} {'tokens':>6} {'GFLOPs':>7} {'cosine':>7} {'ms':>6} {'speed-up':>8} {'realised':>8}")
    for name, backbone, rows in zip(POLICIES, sieved, taken, strict=True):
        features: list[Features] = [found for _, found in rows]
        cosine = [torch.cosine_similarity(a.map, b[1].map).mean().item() for a, b in zip(features, dense, strict=True)]
        gflops = statistics.fmean(cost(backbone, found) for found in features)
        share = statistics.fmean(found.trace.shares().mean().item() for found in features)
        faster = statistics.median(a[0] / b[0] for a, b in zip(dense, rows, strict=True))
        promised = statistics.fmean(cost(sieved[0], found) for _, found in dense) / gflops
        ms = statistics.median(milliseconds for milliseconds, _ in rows)
        print(
            f"{name:26} {share:6.0%} {gflops:7.1f} {statistics.fmean(cosine):7.3f} {ms:6.0f} {faster:8.2f} "
            f"{faster / promised:8.2f}"
        )


def pixels(file: Path, size: int) -> Tensor:
    """(1, 3, size, size), normalised."""
    given = InputConfig()
    image = as_tensor(read_image(file).resize((size, size))).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (given.mean, given.std))
    return ((image - mean) / std)[None]


def cost(backbone: SievedViT, found: Features) -> float:
    """GFLOPs of the blocks and of the policy."""
    macs = traced_macs(backbone.vit.config, found.trace) + backbone.policy.cost(found.trace)
    return macs.item() / 1e9


if __name__ == "__main__":
    tyro.cli(main)

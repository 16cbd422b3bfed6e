"""Does the clock show what the FLOPs promise? Dense against skipping, alternately, on real images.

Predicted is the ratio of multiply-adds of the blocks alone; the time of the sparse side includes the gates, packing and
unpacking, so that every overhead counts against us.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sievit.config import ConfigError, nearest
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import draw
from sievit.devices import device_name, pick_device
from sievit.engine.recipe import default_data_root
from sievit.flops import blocks_gflops
from sievit.policies import KeepAllConfig, SViTConfig, build_policy
from sievit.policies.svit import SViT
from sievit.tokens import Tokens, Trace
from sievit.vit import Mode, ViT, ViTConfig

T = TypeVar("T")

SIZES = {
    "vit_t": ViTConfig(embed_dim=192, num_heads=3),
    "vit_s": ViTConfig(embed_dim=384, num_heads=6),
    "vit_b": ViTConfig(embed_dim=768, num_heads=12),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class BlocksBench:
    """The backbone's blocks alone, dense against SViT.

    Attributes:
        models: names of backbones, random weights.
        sizes: (height, width) of the images in pixels; 512x512 are 1024 tokens, 800x1216 are 3800.
        batches: images at once.
        targets: share of tokens that the gates keep, spread over blocks 3 to 11; they are set to it on the images.
        images: folder of pictures; by default photos/ in the folder of data sets, and without it generated scenes.
        repeats: timed pairs per row, each on other images.
        threads: CPU threads; torch's own choice where it is not given.
        device: "auto" takes CUDA where there is one.
        precision: "float32", or "bfloat16".
    """

    models: tuple[str, ...] = ("vit_s",)
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (800, 1216))
    batches: tuple[int, ...] = (1, 4)
    targets: tuple[float, ...] = (0.7, 0.49, 0.343)
    images: Path | None = None
    repeats: int = 9
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


@torch.inference_mode()
def bench_blocks(config: BlocksBench, console: Console | None = None) -> dict:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, or a folder without pictures.
    """
    console = console or Console()
    for name in config.models:
        if name not in SIZES:
            raise ConfigError(f"unknown model {name!r}{nearest(name, SIZES)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    photos = default_data_root() / "photos"
    images = photos if config.images is None and photos.is_dir() else config.images
    dtype = getattr(torch, config.precision)
    jobs = [(model, size, batch) for model in config.models for size in config.sizes for batch in config.batches]
    rows = []
    for model, size, batch in track(jobs, "timing", console=console, transient=True):
        pictures = load_pictures(images, size, config.repeats * batch).to(device, dtype)
        vit, policies = calibrated(SIZES[model], pictures, config.targets)
        row = {"model": model, "size": list(size), "batch": batch, "device": device_name(device)}
        row |= {"precision": config.precision, "mode": "dynamic"}
        row |= time_blocks(vit, policies, pictures.split(batch))
        rows.append(row)
    console.print(_table(rows))
    return {
        "bench": "blocks",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": "scenes" if images is None else images.name,
        "rows": rows,
    }


def time_blocks(vit: ViT, policies: tuple, batches: tuple[Tensor, ...], mode: Mode = "auto") -> dict:
    """Dense and sparse blocks alternately on the same canvases; medians over the batches, and their spread."""
    dense, sparse = policies
    canvases = [vit.embed(batch) for batch in batches]

    def run(policy, tokens: Tokens) -> Trace:
        return vit.run_blocks(tokens, policy, Trace.start(tokens), mode=mode)[1]

    for policy in (dense, sparse, dense, sparse):
        run(policy, canvases[0])
    dense_ms, sparse_ms, predicted, keep = [], [], [], []
    for i, tokens in enumerate(canvases):
        pair = {}
        for policy in (dense, sparse) if i % 2 else (sparse, dense):
            elapsed, trace = clocked(lambda policy=policy, tokens=tokens: run(policy, tokens), tokens.x.device)
            pair[policy] = elapsed, trace
        dense_ms.append(pair[dense][0])
        sparse_ms.append(pair[sparse][0])
        cost = [blocks_gflops(vit.config, pair[policy][1]).sum().item() for policy in (dense, sparse)]
        predicted.append(cost[0] / cost[1])
        keep.append(pair[sparse][1].shares().mean(1))
    ratios = [a / b for a, b in zip(dense_ms, sparse_ms, strict=True)]
    shares = [a / b for a, b in zip(ratios, predicted, strict=True)]
    return {
        "tokens": canvases[0].x.shape[1],
        "dense_ms": round(statistics.median(dense_ms), 2),
        "sparse_ms": round(statistics.median(sparse_ms), 2),
        "speedup": round(statistics.median(ratios), 3),
        "predicted": round(statistics.median(predicted), 3),
        "realised": round(statistics.median(shares), 3),
        "realised_quartiles": [round(q, 3) for q in statistics.quantiles(shares, n=4)[::2]],
        "keep": [round(share, 3) for share in torch.stack(keep).mean(0).tolist()],
        "pairs": len(ratios),
    }


def calibrated(config: ViTConfig, pictures: Tensor, targets: tuple[float, ...]) -> tuple[ViT, tuple]:
    """A backbone with random weights, and a dense and an SViT policy whose gates keep `targets` on these pictures.

    Gates are set one after the other: each one's bias moves to the quantile of its logits that keeps its share.
    """
    torch.manual_seed(0)
    vit = ViT(config).eval().to(pictures)
    dense = build_policy(KeepAllConfig(), embed_dim=config.embed_dim, depth=config.depth)
    sparse = build_policy(SViTConfig(targets=targets), embed_dim=config.embed_dim, depth=config.depth)
    assert isinstance(sparse, SViT)
    sparse.eval().to(pictures)
    canvases = [vit.embed(picture[None]) for picture in pictures[:4]]
    traces = [Trace.start(tokens) for tokens in canvases]
    first = sparse.config.first_block
    for index in range(config.depth):
        if index >= first:
            gate = sparse.gates[index - first]
            logits = torch.cat([gate(tokens.patches).float().flatten(0, 1) for tokens in canvases])
            margin = (logits[:, 0] - logits[:, 1]).quantile(1 - sparse.targets[index - first])
            bias = gate.get_parameter("fc2.bias")
            bias[0] -= margin.to(bias.dtype)
        steps = [
            vit.run_blocks(tokens, sparse, trace, start=index, stop=index + 1)
            for tokens, trace in zip(canvases, traces, strict=True)
        ]
        canvases, traces = [step[0] for step in steps], [step[1] for step in steps]
    return vit, (dense, sparse)


def clocked(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Milliseconds that a call took, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3, result


def load_pictures(folder: Path | None, size: tuple[int, int], count: int) -> Tensor:
    """(count, 3, h, w), normalised: the pictures of a folder, cropped to the aspect and resized, in turn.

    Without a folder they are generated scenes.
    """
    if folder is None:
        arrays = [torch.from_numpy(draw(seed=1, index=i, size=size)[0]) for i in range(min(count, 4))]
        pictures = [array.permute(2, 0, 1).float() / 255 for array in arrays]
    else:
        paths = list_images(folder)[:count]
        pictures = [_fitted(to_tensor(read_image(path)).float() / 255, size) for path in paths]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    repeated = pictures * math.ceil(count / len(pictures))
    return torch.stack([(picture - mean) / std for picture in repeated[:count]])


def _fitted(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) in 0..1: resized to cover `size`, then cropped around the middle."""
    scale = max(size[0] / picture.shape[1], size[1] / picture.shape[2])
    shape = [max(side, round(own * scale)) for side, own in zip(size, picture.shape[1:], strict=True)]
    resized = F.interpolate(picture[None], shape, mode="bilinear", antialias=True)[0]
    top, left = (resized.shape[1] - size[0]) // 2, (resized.shape[2] - size[1]) // 2
    return resized[:, top : top + size[0], left : left + size[1]].clamp(0, 1)


def _table(rows: list[dict]) -> Table:
    table = Table(title="blocks: dense against SViT, gates included", box=SIMPLE)
    for column in ("model", "tokens", "batch", "dense ms", "sparse ms", "keep", "speed-up", "predicted", "realised"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        keep = statistics.mean(row["keep"][3:])
        figures = (row["dense_ms"], row["sparse_ms"], f"{keep:.0%}", row["speedup"], row["predicted"])
        table.add_row(row["model"], str(row["tokens"]), str(row["batch"]), *map(str, figures), f"{row['realised']:.0%}")
    return table

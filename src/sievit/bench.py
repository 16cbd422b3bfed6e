"""Does the clock show what the FLOPs promise? Dense against sparse, alternately, on real images.

Predicted is the ratio of multiply-adds: of the blocks alone, or of everything in a network. The time of the sparse side
includes gates, heads, packing and unpacking, so that every overhead counts against us.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

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
from sievit.flops import blocks_gflops, model_gflops
from sievit.heads import ATM, ATMConfig, SemanticHead
from sievit.inputs import InputConfig
from sievit.policies import DToPConfig, KeepAllConfig, Policy, SViTConfig, build_policy
from sievit.policies.dtop import leave
from sievit.policies.svit import SViT
from sievit.segmenter import Segmentation, Segmenter, SegmenterConfig
from sievit.tokens import Prediction, Tokens, Trace
from sievit.vit import Mode, ViT, ViTConfig

T = TypeVar("T")

SIZES = {
    "vit_t": ViTConfig(embed_dim=192, num_heads=3),
    "vit_s": ViTConfig(embed_dim=384, num_heads=6),
    "vit_b": ViTConfig(embed_dim=768, num_heads=12),
    "vit_l": ViTConfig(embed_dim=1024, num_heads=16, depth=24),
}
SEGMENTERS = {
    "vit_b": (ATMConfig(channels=384, num_heads=6), (5, 7, 11)),
    "vit_l": (ATMConfig(channels=512, num_heads=8), (7, 15, 23)),
}
"""The papers' head, and the blocks behind which it stands."""
CLASSES = 150
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is timed, and how.

    Attributes:
        sizes: (height, width) of the images in pixels; 512x512 are 1024 tokens, 800x1216 are 3800.
        batches: images at once.
        images: folder of pictures; by default photos/ in the folder of data sets, and without it generated scenes.
        repeats: timed pairs per row, each on other images; at least 2.
        threads: CPU threads; torch's own choice where it is not given.
        device: "auto" takes CUDA where there is one.
        precision: "float32", or "bfloat16".
    """

    sizes: tuple[tuple[int, int], ...] = ((512, 512), (800, 1216))
    batches: tuple[int, ...] = (1, 4)
    images: Path | None = None
    repeats: int = 9
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class BlocksBench(Bench):
    """The backbone's blocks alone, dense against SViT.

    Attributes:
        models: names of backbones, random weights.
        targets: share of tokens that the gates keep, spread over blocks 3 to 11; they are set to it on the images.
    """

    models: tuple[str, ...] = ("vit_s",)
    targets: tuple[float, ...] = (0.7, 0.49, 0.343)


@dataclass(frozen=True, kw_only=True)
class NetworkBench(Bench):
    """A whole SegViT network, from normalised images to scores on their pixels, dense against DToP.

    Attributes:
        models: names of backbones, random weights; with the papers' heads for 150 classes.
        left: share of tokens that have left after each auxiliary head; the thresholds are set to it on the images.
        keep_per_class: DToP's k.
    """

    models: tuple[str, ...] = ("vit_b",)
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (640, 640))
    left: tuple[float, ...] = (0.35, 0.55)
    keep_per_class: int = 5


class Pair(NamedTuple):
    """A dense and a sparse run on the same images: milliseconds, and what happened."""

    dense_ms: float
    sparse_ms: float
    dense: Trace
    sparse: Trace


@torch.inference_mode()
def bench_blocks(config: BlocksBench, console: Console | None = None) -> dict:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, or a folder without pictures.
    """

    def rows_of(model: str, pictures: Tensor, batch: int) -> dict:
        vit, policies = calibrated(SIZES[model], pictures, config.targets)
        return {"mode": "dynamic", **time_blocks(vit, policies, pictures.split(batch))}

    return _run("blocks", config, config.models, SIZES, rows_of, _blocks_table, console)


@torch.inference_mode()
def bench_network(config: NetworkBench, console: Console | None = None) -> dict:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, a folder without pictures, or shares that do not go with the heads.
    """

    def rows_of(model: str, pictures: Tensor, batch: int) -> dict:
        segmenter = random_segmenter(SIZES[model], *SEGMENTERS[model])
        segmenter.eval().to(pictures)
        policy = calibrated_exits(segmenter, pictures[:12], config.left, config.keep_per_class)
        return time_network(segmenter, policy, pictures.split(batch))

    return _run("network", config, config.models, SEGMENTERS, rows_of, _network_table, console)


def _run(
    name: str,
    config: Bench,
    models: tuple[str, ...],
    known: Sequence[str] | dict,
    row_of: Callable[[str, Tensor, int], dict],
    table: Callable[[list[dict]], Table],
    console: Console | None,
) -> dict:
    """Every combination of model, size and batch: a table for people, and a dict."""
    console = console or Console()
    for model in models:
        if model not in known:
            raise ConfigError(f"unknown model {model!r}{nearest(model, known)}")
    if config.repeats < 2:
        raise ConfigError(f"repeats is at least 2, not {config.repeats}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    photos = default_data_root() / "photos"
    images = photos if config.images is None and photos.is_dir() else config.images
    dtype = getattr(torch, config.precision)
    jobs = [(model, size, batch) for model in models for size in config.sizes for batch in config.batches]
    rows = []
    for model, size, batch in track(jobs, "timing", console=console, transient=True):
        pictures = load_pictures(images, size, config.repeats * batch).to(device, dtype)
        row = {"model": model, "size": list(size), "batch": batch, "device": device_name(device)}
        rows.append({**row, "precision": config.precision, **row_of(model, pictures, batch)})
    console.print(table(rows))
    return {
        "bench": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": "scenes" if images is None else images.name,
        "rows": rows,
    }


def time_blocks(vit: ViT, policies: tuple, batches: tuple[Tensor, ...], mode: Mode = "auto") -> dict:
    """Dense and sparse blocks alternately on the same canvases; medians over the batches, and their spread."""
    canvases = [vit.embed(batch) for batch in batches]

    def run(policy: Policy) -> Callable[[Tokens], Trace]:
        return lambda tokens: vit.run_blocks(tokens, policy, Trace.start(tokens), mode=mode)[1]

    pairs = alternately(run(policies[0]), run(policies[1]), canvases, canvases[0].x.device)
    costs = [[blocks_gflops(vit.config, trace).sum().item() for trace in (pair.dense, pair.sparse)] for pair in pairs]
    keep = torch.stack([pair.sparse.shares().mean(1) for pair in pairs]).mean(0)
    return {
        "tokens": canvases[0].x.shape[1],
        **summary(pairs, [dense / sparse for dense, sparse in costs]),
        "keep": [round(share, 3) for share in keep.tolist()],
    }


def time_network(segmenter: Segmenter, policy: Policy, batches: Sequence[Tensor]) -> dict:
    """A whole network without early exits and with those of `policy`, alternately on the same images.

    Without, only the last head is computed. `predicted_with_heads` is the ratio of multiply-adds to a dense network
    that computes the auxiliary heads too, as the released one does.
    """
    net = segmenter.net
    dense = net.build_policy(KeepAllConfig())

    def run(policy: Policy) -> Callable[[Tensor], Trace]:
        return lambda images: net(images, policy=policy)[1]

    pairs = alternately(run(dense), run(policy), batches, batches[0].device)
    size = (batches[0].shape[2], batches[0].shape[3])
    costs = [[_gflops(segmenter, trace, size) for trace in (pair.dense, pair.sparse)] for pair in pairs]
    heads = [_unasked_heads(segmenter, pair.dense) for pair in pairs]
    left = torch.stack([_left(pair.sparse) for pair in pairs]).mean(0)
    with_heads = [(a + extra) / b for (a, b), extra in zip(costs, heads, strict=True)]
    return {
        "tokens": pairs[0].dense.valid.shape[1],
        **summary(pairs, [a / b for a, b in costs]),
        "predicted_with_heads": round(statistics.median(with_heads), 3),
        "gflops": [round(statistics.fmean(column) / len(batches[0]), 2) for column in zip(*costs, strict=True)],
        "left": [round(share, 3) for share in left.tolist()],
    }


def alternately(
    dense: Callable[[T], Trace], sparse: Callable[[T], Trace], inputs: Sequence[T], device: torch.device
) -> list[Pair]:
    """Both calls on each input, warmed up on the first, in turns as to which comes first."""
    for call in (dense, sparse, dense, sparse):
        call(inputs[0])
    pairs = []
    for i, images in enumerate(inputs):
        done = {}
        for call in (dense, sparse) if i % 2 else (sparse, dense):
            done[call] = clocked(lambda call=call, images=images: call(images), device)
        (dense_ms, dense_trace), (sparse_ms, sparse_trace) = done[dense], done[sparse]
        pairs.append(Pair(dense_ms, sparse_ms, dense_trace, sparse_trace))
    return pairs


def summary(pairs: Sequence[Pair], predicted: Sequence[float]) -> dict:
    """Medians over the pairs, and their spread; `predicted` is the ratio of multiply-adds of each pair."""
    ratios = [pair.dense_ms / pair.sparse_ms for pair in pairs]
    shares = [a / b for a, b in zip(ratios, predicted, strict=True)]
    figures: dict = {}
    for name in ("dense_ms", "sparse_ms"):
        ordered = sorted(getattr(pair, name) for pair in pairs)
        figures[name] = round(statistics.median(ordered), 2)
        figures[f"{name}_p95"] = round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2)
    return {
        **figures,
        "speedup": round(statistics.median(ratios), 3),
        "predicted": round(statistics.median(predicted), 3),
        "realised": round(statistics.median(shares), 3),
        "realised_quartiles": [round(q, 3) for q in statistics.quantiles(shares, n=4)[::2]],
        "pairs": len(pairs),
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


def random_segmenter(vit: ViTConfig, head: ATMConfig, out_indices: tuple[int, ...]) -> Segmenter:
    """A segmenter of random weights whose heads tell tokens apart.

    Fresh heads grade all tokens and classes nearly alike. These spread as trained ones do: their maps have a standard
    deviation of 3, and few classes are likely to be in the image.
    """
    torch.manual_seed(0)
    classes = tuple(f"class {i}" for i in range(CLASSES))
    config = SegmenterConfig(
        vit=vit, policy=KeepAllConfig(), input=InputConfig(), classes=classes, head=head, out_indices=out_indices
    )
    segmenter = Segmenter.from_config(config)
    for each in segmenter.net.heads:
        assert isinstance(each, ATM)
        looking = each.layers[-1].get_submodule("cross_attn")
        spread = math.sqrt(3 * math.sqrt(head.num_heads))  # of queries and keys, whose product is maps * sqrt(heads)
        for name in ("q.weight", "k.weight"):
            torch.nn.init.normal_(looking.get_parameter(name), std=spread / math.sqrt(head.channels))
        torch.nn.init.normal_(each.class_embed.weight, std=4 / math.sqrt(2 * head.channels))
        with torch.no_grad():
            each.class_embed.bias.copy_(torch.tensor([-3.0, 3.0]))
    return segmenter


def calibrated_exits(segmenter: Segmenter, pictures: Tensor, left: tuple[float, ...], keep_per_class: int) -> Policy:
    """DToP with thresholds such that on these pictures the shares `left` of the tokens are gone after each stage.

    Thresholds are found one after the other, by bisection on the share that really leaves, on average over the
    pictures, each of which the heads judge by itself.

    Raises:
        ConfigError: not one share for each auxiliary head, or shares that fall or do not lie between 0 and 1.
    """
    net, thresholds = segmenter.net, ()
    if len(left) != len(net.out_indices) - 1 or sorted(left) != list(left) or not 0 < left[0] <= left[-1] < 1:
        raise ConfigError(f"left {left}: one rising share between 0 and 1 for each of {len(net.out_indices) - 1} heads")
    for stage, share in enumerate(left):
        rest = (1.0,) * (len(left) - stage - 1)
        policy = net.build_policy(DToPConfig(thresholds=(*thresholds, 0.0, *rest), keep_per_class=keep_per_class))
        traces = [net(picture[None], policy=policy)[1] for picture in pictures]
        said = [trace.predictions[stage] for trace in traces]
        prediction = Prediction(
            torch.cat([each.maps for each in said]),
            torch.cat([each.classes for each in said if each.classes is not None]),
        )
        there = torch.cat([~trace.exited[stage - 1] if stage else trace.valid for trace in traces])
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            leaving = leave(prediction, there, middle, keep_per_class=keep_per_class, grade="max")
            if (leaving | ~there).double().mean().item() > share:
                low = middle
            else:
                high = middle
        thresholds = (*thresholds, high)
    return net.build_policy(DToPConfig(thresholds=thresholds, keep_per_class=keep_per_class))


def _gflops(segmenter: Segmenter, trace: Trace, size: tuple[int, int]) -> float:
    """GFLOPs of everything in a pass of the network over images of `size`."""
    b = len(trace.valid)
    whole = ((0, 0, *size),) * b
    output = Segmentation([], {}, trace, tuple(range(b)), whole, [size] * b, size)
    return model_gflops(segmenter, output).sum().item()


def _unasked_heads(segmenter: Segmenter, trace: Trace) -> float:
    """GFLOPs of the auxiliary heads on all tokens of a pass that did without them."""
    heads = [head for head in segmenter.net.heads if isinstance(head, SemanticHead)]
    return sum(head.macs(trace.valid.sum(1), trace.grid).sum().item() for head in heads[:-1]) / 1e9


def _left(trace: Trace) -> Tensor:
    """(stages,) share of the tokens that have left after each auxiliary head."""
    return torch.stack([exited.double().mean() for exited in trace.exited[:-1]])


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


def _blocks_table(rows: list[dict]) -> Table:
    keep = [f"{statistics.mean(row['keep'][3:]):.0%}" for row in rows]
    return _table("blocks: dense against SViT, gates included", rows, {"keep": keep})


def _network_table(rows: list[dict]) -> Table:
    left = [" ".join(f"{share:.0%}" for share in row["left"]) for row in rows]
    return _table("network: dense against DToP, heads included", rows, {"left": left})


def _table(title: str, rows: list[dict], extra: dict[str, list[str]]) -> Table:
    table = Table(title=title, box=SIMPLE)
    for column in ("model", "tokens", "batch", "dense ms", "sparse ms", *extra, "speed-up", "predicted", "realised"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        figures = [row["tokens"], row["batch"], row["dense_ms"], row["sparse_ms"]]
        figures += [*(column[i] for column in extra.values()), row["speedup"], row["predicted"]]
        table.add_row(row["model"], *map(str, figures), f"{row['realised']:.0%}")
    return table

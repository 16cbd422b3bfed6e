"""Where the time of a whole model goes: each part of one pass by itself, dense and sparse.

The clock is read around the parts while they run, so that the parts of a pass and its rest add up to it. On CUDA that
means waiting for the device at each of them: their sum is then more than the pass takes undisturbed, which is given
beside it.
"""

import statistics
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sievit.bench.backbone import ADAPTERS, random_adapter
from sievit.bench.common import SIZES, Bench, Place, check_known, run
from sievit.bench.network import found_figures, named, opened
from sievit.bench.rates import machine_rates
from sievit.bench.timing import Cost, figures_of, memory_figures
from sievit.heads import MaskRCNN, MaskRCNNConfig
from sievit.measure.clock import Pair, alternately, clocked
from sievit.measure.meters import counted_syncs, memory
from sievit.models.base import Answer, Model
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.inputs import InputConfig, Size
from sievit.policies import KeepAllConfig, Policy, SViTConfig
from sievit.vit.execution import Execution

HEAD = MaskRCNNConfig(num_classes=80)
"""The papers' on COCO."""
CHANNELS = HEAD.fpn_channels
"""Of the convolution whose rate is measured by itself."""
SIDES = ("dense", "sparse")


@dataclass(frozen=True, kw_only=True)
class HeadsBench(Bench):
    """A whole model by parts, dense against its policy.

    Attributes:
        checkpoints: trained models, each with its own policy; by default none, but `models`.
        policy: takes the place of the checkpoints' own.
        models: names of backbones of random ViT-Adapters with Mask R-CNN for 80 classes and SViT.
        sizes: (height, width) of the images in pixels.
        targets: share of tokens that a random model's gates keep; they are set to it on the images.
        candidates: boxes of a random model's image above the least score, which go into the last NMS; the scores are
            set to it on the images.
    """

    checkpoints: tuple[Path, ...] = ()
    policy: str | None = None
    models: tuple[str, ...] = ("vit_s",)
    sizes: tuple[tuple[int, int], ...] = ((800, 1216),)
    batches: tuple[int, ...] = (1,)
    targets: tuple[float, ...] = (0.7, 0.49, 0.343)
    candidates: int = 300


@torch.inference_mode()
def bench_heads(config: HeadsBench, console: Console | None = None) -> dict[str, Any]:
    """Run, print a table, and return it as a dict with `rows`, each with `parts`.

    Raises:
        ConfigError: an unknown model, a folder without pictures, a checkpoint that cannot be loaded.
    """
    trained = {name: opened(path, config.policy, None) for name, path in named(config.checkpoints).items()}
    if not trained:
        check_known(config.models, ADAPTERS)

    def rows_of(name: str, size: Size | None, batch: int, place: Place, modes: tuple[str, ...]) -> list[dict[str, Any]]:
        assert size is not None
        if trained:
            model = trained[name].as_given().to(place.device)
        else:
            model = random_detector(name, place.pictures(size, 1), config.targets, config.candidates)
        return [{"mode": mode, **time_parts(model, place.images(size, batch), place.dtype)} for mode in modes]

    return run("heads", config, trained or config.models, config.sizes, ("dynamic",), rows_of, _table, console)


def random_detector(model: str, pictures: Tensor, targets: tuple[float, ...], candidates: int) -> Detector:
    """ViT-Adapter with Mask R-CNN of random weights, as large as the papers' on COCO.

    Gates keep `targets`. Fresh heads find nothing, or everything; here class scores spread, and the background's is
    such that on average `candidates` boxes of an image are above the least score.
    """
    backbone, _ = random_adapter(model, pictures.float(), targets)
    head = MaskRCNN(HEAD, in_channels=backbone.out_channels).eval().to(pictures.device)
    config = DetectorConfig(
        vit=SIZES[model],
        neck=backbone.config,
        policy=SViTConfig(targets=targets),
        head=head.config,
        input=InputConfig(min_size=None, antialias=False),
        classes=tuple(f"class {i}" for i in range(HEAD.num_classes)),
        category_ids=tuple(range(1, HEAD.num_classes + 1)),
    )
    size = (pictures.shape[2], pictures.shape[3])
    predictor = head.roi_heads.box_predictor.cls_score
    nn.init.normal_(predictor.weight, std=0.1)
    said = []
    for picture in pictures[:4].float():
        maps = head.pyramid(backbone(picture[None])[0])
        proposals, _ = head.rpn(maps, size, [size], None)
        said.append(head.roi_heads.box_branch(maps[:4], proposals, size)[0])
    logits = torch.cat(said)
    spread = 2.0 / logits[:, 1:].std()  # of the scores of classes, in logits
    predictor.weight *= spread
    logits = logits * spread
    low, high = -50.0, 50.0
    for _ in range(30):
        middle = (low + high) / 2
        scores = torch.cat([logits[:, :1] + middle, logits[:, 1:]], 1).softmax(1)
        if (scores[:, 1:] > head.config.box.min_score).sum().item() > candidates * len(said):
            low = middle
        else:
            high = middle
    predictor.bias.zero_()
    predictor.bias[0] = high
    return Detector(config, backbone=backbone, head=head).eval()


@contextmanager
def stopwatch(parts: Sequence[tuple[object, str, str]], device: torch.device) -> Generator[dict[str, float]]:
    """Milliseconds spent in each part, itself alone, while the context lasts."""
    spent = dict.fromkeys((name for _, _, name in parts), 0.0)
    inside: list[float] = []  # per call that is running, what its inner calls took

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            elapsed, result = clocked(lambda: call(*args, **kwargs), device)
            spent[name] += elapsed - inside.pop()
            if inside:
                inside[-1] += elapsed
            return result

        return wrapper

    try:
        for owner, attribute, name in parts:
            setattr(owner, attribute, timed(getattr(owner, attribute), name))
        yield spent
    finally:
        for owner, attribute, _ in parts:
            owner.__dict__.pop(attribute, None)


def time_parts(model: Model, batches: Sequence[list[Tensor]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A model with every token computed and with its own policy, alternately: whole passes, then passes by parts.

    Args:
        batches: images (3, h, w) in 0..1.
        dtype: of automatic mixed precision, where it is not float32.

    Returns:
        Times and ratios of whole passes; `parts` by name: milliseconds `dense_ms` and `sparse_ms` (medians over the
        batches), and where they are counted `dense_gflops` and `sparse_gflops` per image (1e9 multiply-adds, means) and
        `sparse_gflops_per_s`, the rate that is reached (two operations per multiply-add); the rates of single products
        in the same units, `machine_gflops_per_s`; of a detector `detections` per image.
    """
    device, parts, counted = model.device, model.timed_parts(), model.counted_parts()

    def whole(policy: Policy | None) -> Callable[[list[Tensor]], Answer]:
        def of(images: list[Tensor]) -> Answer:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
                return model(images, policy=policy, execution=Execution())

        return of

    def by_parts(policy: Policy | None) -> Callable[[list[Tensor]], dict[str, float]]:
        def of(images: list[Tensor]) -> dict[str, float]:
            with stopwatch(parts, device) as spent:
                whole(policy)(images)
            return spent

        return of

    def cost(policy: Policy) -> Callable[[Answer], Cost]:
        def of(answer: Answer) -> Cost:
            gflops = {name: each.sum().item() for name, each in model.count(answer).items()}
            of_parts = {name: sum(gflops[key] for key in keys) for name, keys in counted.items()}
            images = len(answer.sizes)
            more = {"parts": of_parts, "grid": answer.trace.grid, "found": answer.found()}
            return Cost.of(answer.trace, model.gflops(answer), policy, images=images, **more)

        return of

    def as_it_is(spent: dict[str, float]) -> dict[str, float]:
        return spent

    dense = model.build_policy(KeepAllConfig())
    pairs = alternately((whole(dense), cost(dense)), (whole(None), cost(model.policy)), batches, device)
    watched = alternately((by_parts(dense), as_it_is), (by_parts(None), as_it_is), batches, device)
    held = [
        memory(lambda policy=policy: whole(policy)(batches[0]), device, list(model.vit.blocks))
        for policy in (dense, None)
    ]
    with counted_syncs(device) as places:
        whole(None)(batches[0])
    grid = pairs[0].dense.more["grid"]
    return {
        **figures_of(pairs),
        **memory_figures(held[0], held[1], pairs[0].sparse.keep),
        "syncs": places.total(),
        "sync_places": dict(places),
        **found_figures(pairs),
        "parts": _part_rows(pairs, watched, counted),
        "machine_gflops_per_s": machine_rates(model.vit.config, grid, len(batches[0]), CHANNELS, device, dtype),
    }


def _part_rows(
    pairs: Sequence[Pair[Cost]], watched: Sequence[Pair[dict[str, float]]], counted: Collection[str]
) -> dict[str, dict[str, float]]:
    """Times, GFLOPs and rates by part; a part of parts stands before them, with their sum."""
    images = sum(pair.sparse.images for pair in pairs)
    rows: dict[str, dict[str, float]] = {}
    for name in watched[0].dense:
        whole, colon, _ = name.partition(": ")
        times = {f"{side}_ms": statistics.median(getattr(pair, side)[name] for pair in watched) for side in SIDES}
        for part in (whole, name) if colon else (name,):
            row = rows.setdefault(part, dict.fromkeys(times, 0.0))
            row |= {key: round(row[key] + ms, 2) for key, ms in times.items()}
    for name in counted:
        for side in SIDES:
            gflops = sum(getattr(pair, side).more["parts"][name] for pair in pairs)
            rows[name][f"{side}_gflops"] = round(gflops / images, 4)
    for name, rate in _rates(pairs, watched, counted).items():
        rows[name]["sparse_gflops_per_s"] = rate
    return rows


def _rates(
    pairs: Sequence[Pair[Cost]], watched: Sequence[Pair[dict[str, float]]], counted: Collection[str]
) -> dict[str, float]:
    """GF/s of the sparse passes, by the parts that took time and have counted operations; medians over the batches."""
    rates = {}
    for name in counted:
        gflops = [pair.sparse.more["parts"][name] for pair in pairs]
        spent = [
            sum(ms for part, ms in pair.sparse.items() if part == name or part.startswith(f"{name}: "))
            for pair in watched
        ]
        reached = [2e3 * counted / ms for counted, ms in zip(gflops, spent, strict=True) if counted and ms]
        if reached:
            rates[name] = round(statistics.median(reached), 1)
    return rates


PRODUCTS = {"linear": "linear layer", "conv3x3": "3x3 convolution", "attention": "attention"}
"""What a table calls those of `machine_rates`."""


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="models by parts, dense against sparse",
        caption="GFLOPs: 1e9 multiply-adds per image; GF/s: two operations per multiply-add",
        box=SIMPLE,
        collapse_padding=True,
    )
    columns = ("part", "dense\nms", "sparse\nms", "share of\nsparse", "dense\nGFLOPs", "sparse\nGFLOPs", "sparse\nGF/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for row in rows:
        size = "x".join(map(str, row["size"]))
        table.add_row(f"{row['model']} {size}, batch {row['batch']}", style="bold")
        table.add_row("whole pass", f"{row['dense_ms']:.1f}", f"{row['sparse_ms']:.1f}")
        table.add_row("speed-up (predicted)", "", f"{row['speedup']:.2f}", f"({row['predicted']:.2f})")
        for name, part in row["parts"].items():
            share = f"{part['sparse_ms'] / row['sparse_ms']:.0%}"
            gflops = [f"{part[key]:.1f}" if key in part else "" for key in ("dense_gflops", "sparse_gflops")]
            rate = f"{part['sparse_gflops_per_s']:.0f}" if "sparse_gflops_per_s" in part else ""
            table.add_row(f"  {name}", f"{part['dense_ms']:.1f}", f"{part['sparse_ms']:.1f}", share, *gflops, rate)
        table.add_row("this machine, alone:")
        for name, rate in row["machine_gflops_per_s"].items():
            table.add_row(f"  {PRODUCTS[name]}", "", "", "", "", "", f"{rate:.0f}")
        table.add_section()
    return table

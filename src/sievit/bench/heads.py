"""Where the time of a whole detector goes: each part of one pass by itself, dense and sparse.

The clock is read around the parts while they run, so that the parts of a pass and its rest add up to it. On CUDA that
means waiting for the device at each of them: their sum is then more than the pass takes undisturbed, which is given
beside it.
"""

import statistics
from collections.abc import Callable, Generator, Sequence
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
from sievit.bench.network import as_given, dense_policy, named, opened
from sievit.bench.rates import machine_rates
from sievit.bench.timing import Cost, figures_of, memory_figures
from sievit.config import ConfigError
from sievit.heads import MaskRCNN, MaskRCNNConfig
from sievit.measure.clock import Pair, alternately, clocked
from sievit.measure.flops import by_module
from sievit.measure.meters import counted_syncs, memory
from sievit.models.detector import Detector, DetectorConfig, Output
from sievit.models.inputs import InputConfig, Size
from sievit.necks.adapter import ViTAdapter
from sievit.policies import Policy, SViTConfig
from sievit.vit.execution import Execution

HEAD = MaskRCNNConfig(num_classes=80)
"""The papers' on COCO."""
COUNTED = {
    "patch embedding": ("patch_embed",),
    "blocks, gates": ("blocks", "policy"),
    "neck": ("neck",),
    "FPN": ("fpn",),
    "RPN layers": ("rpn",),
    "box layers": ("box",),
    "mask layers": ("mask",),
}
"""Parts, and what `flops` calls them."""
PARTS = ("patch embedding", "blocks, gates", "neck", "neck: spatial prior", "neck: injectors", "neck: extractors")
PARTS += ("neck: pyramid", "neck: maps", "neck: rest", "FPN", "RPN layers", "RPN proposals")
PARTS += ("box pooling", "box layers", "box NMS", "mask pooling", "mask layers", "mask pasting", "rest")
"""In the order of a table; `neck` is the sum of what follows it."""


@dataclass(frozen=True, kw_only=True)
class HeadsBench(Bench):
    """A whole detector by parts, dense against its policy.

    Attributes:
        checkpoints: trained detectors, each with its own policy; by default none, but `models`.
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
        ConfigError: an unknown model, a folder without pictures, a checkpoint that is no detector or cannot be loaded.
    """
    trained = {name: _detector(path, config.policy) for name, path in named(config.checkpoints).items()}
    if not trained:
        check_known(config.models, ADAPTERS)

    def rows_of(name: str, size: Size | None, batch: int, place: Place, modes: tuple[str, ...]) -> list[dict[str, Any]]:
        assert size is not None
        if trained:
            model = as_given(trained[name]).to(place.device)
        else:
            model = random_detector(name, place.pictures(size, 1), config.targets, config.candidates)
        return [{"mode": mode, **time_parts(model, place.images(size, batch), place.dtype)} for mode in modes]

    return run("heads", config, trained or config.models, config.sizes, ("dynamic",), rows_of, _table, console)


def _detector(path: Path, policy: str | None) -> Detector:
    model = opened(path, policy, None)
    if not isinstance(model, Detector):
        raise ConfigError(f"{path}: is a segmenter; the parts that are timed are a detector's")
    return model


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


def parts_of(model: Detector) -> list[tuple[object, str, str]]:
    """Owner and name of every method that is timed, and what its part is called; where one calls another the inner one
    counts."""
    backbone, head = model.backbone, model.head
    parts: list[tuple[object, str, str]] = [
        (model, "forward", "rest"),
        (backbone, "forward", "neck: rest"),
        (backbone.vit, "embed", "patch embedding"),
        (backbone.vit, "run_blocks", "blocks, gates"),
    ]
    if isinstance(backbone, ViTAdapter):
        parts.append((backbone.spm, "forward", "neck: spatial prior"))
        parts += [(injector, "forward", "neck: injectors") for injector in backbone.injectors]
        parts += [(extractor, "forward", "neck: extractors") for extractor in backbone.extractors]
        parts.append((backbone, "_maps", "neck: maps"))
    else:
        parts.append((backbone.pyramid, "forward", "neck: pyramid"))
    roi = head.roi_heads
    parts += [
        (head, "pyramid", "FPN"),
        (head.rpn.head, "forward", "RPN layers"),
        (head.rpn, "forward", "RPN proposals"),
        (roi, "box_branch", "box pooling"),
        (roi.box_head, "forward", "box layers"),
        (roi.box_predictor, "forward", "box layers"),
        (roi, "detect", "box NMS"),
    ]
    if head.config.with_masks:
        parts += [
            (roi, "mask_branch", "mask pooling"),
            (roi.mask_head, "forward", "mask layers"),
            (roi.mask_predictor, "forward", "mask layers"),
        ]
    return [*parts, (model, "_on_image", "mask pasting")]


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


def time_parts(model: Detector, batches: Sequence[list[Tensor]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A detector with every token computed and with its own policy, alternately: whole passes, then passes by parts.

    Args:
        batches: images (3, h, w) in 0..1.
        dtype: of automatic mixed precision, where it is not float32.

    Returns:
        Times and ratios of whole passes; `parts` by name: milliseconds `dense_ms` and `sparse_ms` (medians over the
        batches), and where they are counted `dense_gflops` and `sparse_gflops` per image (1e9 multiply-adds, means) and
        `sparse_gflops_per_s`, the rate that is reached (two operations per multiply-add); the rates of single products
        in the same units, `machine_gflops_per_s`; `detections` per image.
    """
    device, parts = model.device, parts_of(model)

    def whole(policy: Policy | None) -> Callable[[list[Tensor]], Output]:
        def of(images: list[Tensor]) -> Output:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
                return model(images, policy=policy, execution=Execution())

        return of

    def by_parts(policy: Policy | None) -> Callable[[list[Tensor]], dict[str, float]]:
        def of(images: list[Tensor]) -> dict[str, float]:
            with stopwatch(parts, device) as spent:
                whole(policy)(images)
            return spent

        return of

    def cost(policy: Policy) -> Callable[[Output], Cost]:
        def of(answer: Output) -> Cost:
            parts = by_module(model, answer)
            total = torch.stack(list(parts.values())).sum(0)
            found = sum(len(each["boxes"]) for each in answer.detections)
            counted = {
                name: sum(parts[key].sum().item() for key in keys if key in parts) for name, keys in COUNTED.items()
            }
            return Cost.of(answer.trace, total, policy, found=found, parts=counted, grid=answer.trace.grid)

        return of

    def as_it_is(spent: dict[str, float]) -> dict[str, float]:
        return spent

    dense = dense_policy(model)
    pairs = alternately((whole(dense), cost(dense)), (whole(None), cost(model.backbone.policy)), batches, device)
    watched = alternately((by_parts(dense), as_it_is), (by_parts(None), as_it_is), batches, device)
    held = [
        memory(lambda policy=policy: whole(policy)(batches[0]), device, list(model.vit.blocks))
        for policy in (dense, None)
    ]
    with counted_syncs(device) as places:
        whole(None)(batches[0])
    images = sum(pair.sparse.images for pair in pairs)
    rows: dict[str, dict[str, float]] = {}
    for name in watched[0].dense:
        rows[name] = {
            "dense_ms": round(statistics.median(pair.dense[name] for pair in watched), 2),
            "sparse_ms": round(statistics.median(pair.sparse[name] for pair in watched), 2),
        }
    for name in COUNTED:
        for side in ("dense", "sparse"):
            gflops = sum(getattr(pair, side).more["parts"][name] for pair in pairs)
            rows.setdefault(name, {})[f"{side}_gflops"] = round(gflops / images, 4)
    neck = [row for name, row in rows.items() if name.startswith("neck: ")]
    rows["neck"] |= {key: round(sum(row[key] for row in neck), 2) for key in ("dense_ms", "sparse_ms")}
    for name, rate in _rates(pairs, watched).items():
        rows[name]["sparse_gflops_per_s"] = rate
    rows = {name: rows[name] for name in sorted(rows, key=[*PARTS, *rows].index)}
    grid, channels = pairs[0].dense.more["grid"], model.head.config.fpn_channels
    return {
        **figures_of(pairs),
        **memory_figures(held[0], held[1], pairs[0].sparse.keep),
        "syncs": places.total(),
        "sync_places": dict(places),
        "detections": round(sum(pair.sparse.more["found"] for pair in pairs) / images, 1),
        "parts": rows,
        "machine_gflops_per_s": machine_rates(model.vit.config, grid, len(batches[0]), channels, device, dtype),
    }


def _rates(pairs: Sequence[Pair[Cost]], watched: Sequence[Pair[dict[str, float]]]) -> dict[str, float]:
    """GF/s of the sparse passes, by the parts that took time and have counted operations; medians over the batches."""
    rates = {}
    for name in COUNTED:
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
        title="detectors by parts, dense against sparse",
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

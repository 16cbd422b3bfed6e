"""Where the time of a whole model goes: each part of one pass by itself, dense and sparse.

The clock is read around the parts while they run, so that the parts of a pass and its rest add up to it. On CUDA that
means waiting for the device at each of them: their sum is then more than the pass takes undisturbed, which is given
beside it.
"""

import statistics
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit.bench.common import Bench, known, run
from sievit.bench.network import found_figures, opened, timed_model
from sievit.bench.random_models import ADAPTERS, HEAD, random_detector
from sievit.bench.timing import Cost, Timed
from sievit.config import Count, Share
from sievit.devices import pick_device
from sievit.measure.clock import Pair, alternately, clocked
from sievit.measure.modes import DENSE
from sievit.models.base import Answer, Model
from sievit.models.inputs import Size
from sievit.policies import Policy
from sievit.vit import ViTConfig
from sievit.vit.execution import Execution

SIDES = ("dense", "sparse")
CALLS = 5
"""Of each product of `machine_rates` that are timed, after two that are not."""
PRODUCTS = {"linear": "linear layer", "conv3x3": "3x3 convolution", "attention": "attention"}
"""What a table calls those of `machine_rates`."""


@dataclass(frozen=True, kw_only=True)
class HeadsBench(Bench):
    """A whole model by parts, dense against a policy.

    Attributes:
        checkpoints: trained models, with their policy; by default none, but `models`.
        models: names of backbones of random ViT-Adapters with Mask R-CNN for 80 classes and SViT.
        sizes: (height, width) of the images in pixels.
        targets: share of tokens that a random model keeps, see `bench blocks`.
        candidates: boxes of a random model's image above the least score, which go into the last NMS; the scores are
            set to it on the images.
    """

    name, title = "heads", "models by parts, dense against sparse"

    checkpoints: tuple[Path, ...] = ()
    models: tuple[str, ...] = ("vit_s",)
    sizes: tuple[tuple[Count, Count], ...] = ((800, 1216),)
    batches: tuple[Count, ...] = (1,)
    targets: tuple[Share, ...] = (0.7, 0.49, 0.343)
    candidates: Count = 300

    def networks(self) -> dict[str, Any]:
        return opened(self.checkpoints, self) or known(self.models, ADAPTERS)

    def timed(self, network: Any, size: Size | None, batch: int) -> Timed:
        assert size is not None
        if isinstance(network, str):
            model = random_detector(network, self.normalised(size, 1), self, self.targets, self.candidates)
        else:
            model = network.as_given().to(pick_device(self.device))
        return with_parts(model, self.unchanged(size, batch), precision=self.precision)

    def table(self, rows: list[dict[str, Any]]) -> Table:
        """The parts of each row's passes, and the rates of single products."""
        table = Table(
            title=self.title,
            caption="GFLOPs: 1e9 multiply-adds per image; GF/s: two operations per multiply-add",
            box=SIMPLE,
            collapse_padding=True,
        )
        columns = ("dense\nms", "sparse\nms", "share of\nsparse", "dense\nGFLOPs", "sparse\nGFLOPs", "sparse\nGF/s")
        for column in ("part", *columns):
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
                table.add_row(f"  {PRODUCTS[name]}", *[""] * 5, f"{rate:.0f}")
            table.add_section()
        return table


def bench_heads(config: HeadsBench, console: Console | None = None) -> dict[str, Any]:
    """Time the parts of models, see `run`; rows have `parts`."""
    return run(config, console)


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


def with_parts(
    model: Model, batches: Sequence[list[Tensor]], *, precision: Literal["float32", "bfloat16"] = "float32"
) -> Timed:
    """`timed_model`, whose rows have further passes by parts.

    `parts` by name: milliseconds `dense_ms` and `sparse_ms` (medians over the batches), and where they are counted
    `dense_gflops` and `sparse_gflops` per image (1e9 multiply-adds, means) and `sparse_gflops_per_s`, the rate that is
    reached (two operations per multiply-add); and the rates of single products in the same units,
    `machine_gflops_per_s`.
    """
    device, counted, execution = model.device, model.counted_parts(), Execution(precision=precision)

    def by_parts(policy: Policy, images: list[Tensor]) -> dict[str, float]:
        with stopwatch(model.timed_parts(), device) as spent:
            model(images, policy=policy, execution=execution)
        return spent

    def extra(answer: Answer) -> dict[str, Any]:
        gflops = {name: each.sum().item() for name, each in model.count(answer).items()}
        parts = {name: sum(gflops[key] for key in keys) for name, keys in counted.items()}
        return {"found": answer.found(), "parts": parts, "grid": answer.trace.grid}

    def figures(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
        dense, sparse = (partial(by_parts, policy) for policy in (model.build_policy(DENSE), model.policy))
        watched = alternately((dense, dict), (sparse, dict), batches, device)
        grid, dtype, channels = pairs[0].dense.extra["grid"], getattr(torch, precision), HEAD.fpn_channels
        rates = machine_rates(model.vit.config, grid, len(batches[0]), channels, device, dtype)
        parts = _part_rows(pairs, watched, counted)
        return {**found_figures(pairs), "parts": parts, "machine_gflops_per_s": rates}

    return replace(timed_model(model, batches, precision=precision), extra=extra, figures=figures)


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
        gflops = {side: [getattr(pair, side).extra["parts"][name] for pair in pairs] for side in SIDES}
        rows[name] |= {f"{side}_gflops": round(sum(values) / images, 4) for side, values in gflops.items()}
        times = [sum(ms for p, ms in w.sparse.items() if p == name or p.startswith(f"{name}: ")) for w in watched]
        rates = [2e3 * count / ms for count, ms in zip(gflops["sparse"], times, strict=True) if count and ms]
        if rates:
            rows[name]["sparse_gflops_per_s"] = round(statistics.median(rates), 1)
    return rows


def machine_rates(
    config: ViTConfig, grid: tuple[int, int], batch: int, channels: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """GF/s by product, two operations per multiply-add; medians of a few calls.

    `linear` is the MLP's first layer on all grid tokens of the batch, `conv3x3` a convolution from `channels` to
    `channels` on the map of stride 4, channels last, and `attention` the fused attention of each image's grid tokens,
    with the backbone's heads.

    Args:
        grid: (h, w) of the tokens, at stride 16.
        channels: of the FPN.
    """
    (h, w), c = grid, config.embed_dim
    n = h * w

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tokens, weight, bias = random(batch * n, c), random(config.hidden_dim, c), random(config.hidden_dim)
    q, k, v = (random(batch, config.num_heads, n, c // config.num_heads) for _ in range(3))
    last = torch.channels_last
    maps = random(batch, channels, 4 * h, 4 * w).contiguous(memory_format=last)
    kernel, offset = random(channels, channels, 3, 3).contiguous(memory_format=last), random(channels)
    products = {
        "linear": (lambda: F.linear(tokens, weight, bias), batch * n * c * config.hidden_dim),
        "conv3x3": (lambda: F.conv2d(maps, kernel, offset, padding=1), batch * 16 * n * 9 * channels**2),
        "attention": (lambda: F.scaled_dot_product_attention(q, k, v), 2 * batch * n * n * c),
    }
    rates = {}
    for name, (call, macs) in products.items():
        times = [clocked(call, device)[0] for _ in range(2 + CALLS)][2:]
        rates[name] = round(2 * macs / statistics.median(times) / 1e6, 1)
    return rates

"""What all benches share: options, pictures, the clock, runs in turns, and the table."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sievit.bench.meters import Memory, counted_syncs, memory
from sievit.bench.modes import USUAL, Way, reason
from sievit.bench.plot import draw_rows
from sievit.config import ConfigError, nearest
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import draw
from sievit.devices import device_name, pick_device
from sievit.engine.recipe import default_data_root
from sievit.files import write_atomically
from sievit.inputs import Size
from sievit.policies import Policy
from sievit.tokens import Trace
from sievit.vit import ViTConfig

T = TypeVar("T")
R = TypeVar("R")
C = TypeVar("C")

SIZES = {
    "vit_t": ViTConfig(embed_dim=192, num_heads=3),
    "vit_s": ViTConfig(embed_dim=384, num_heads=6),
    "vit_b": ViTConfig(embed_dim=768, num_heads=12),
    "vit_l": ViTConfig(embed_dim=1024, num_heads=16, depth=24),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCENE = (480, 640)
"""Height and width of the scenes that stand in where there are no pictures and no size is asked for."""


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
        precision: "float32", or "bfloat16": random models have weights of it, trained ones run under autocast, as in
            `sievit eval`.
        out: folder for the rows as JSON and their picture, both named after the bench; by default neither is written.
    """

    sizes: tuple[tuple[int, int], ...] = ((512, 512), (800, 1216))
    batches: tuple[int, ...] = (1, 4)
    images: Path | None = None
    repeats: int = 9
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ModesBench(Bench):
    """A bench that times several modes.

    Attributes:
        modes: each in turns with the dense model as it stands: dense, dynamic, bucketed and static, the first and the
            last two also with _compiled (torch.compile) and _graphs (with CUDA graphs) behind them; docs/speed.md says
            what they are. By default dense, which shows how much the clock wanders, dynamic, and static where the
            policy has such a mode.
        multiple: static counts are rounded up to a multiple of it.
        autotune: graphs are compiled with `max-autotune` instead of `reduce-overhead`, which takes much longer.
    """

    modes: tuple[str, ...] = ()
    multiple: int = 8
    autotune: bool = False


@dataclass(frozen=True)
class Place:
    """Where a bench runs, and the pictures it runs on.

    Attributes:
        folder: of the pictures; None: generated scenes.
        count: pictures per image of a batch, one for each timed pair.
    """

    device: torch.device
    dtype: torch.dtype
    folder: Path | None
    count: int

    def pictures(self, size: Size, batch: int) -> Tensor:
        """(count * batch, 3, h, w), normalised, cropped to the aspect of `size` and resized to it."""
        return load_pictures(self.folder, size, self.count * batch).to(self.device, self.dtype)

    def images(self, size: Size | None, batch: int) -> list[list[Tensor]]:
        """`count` batches of images (3, h, w) in 0..1, in memory: of their own sizes, or fitted to one."""
        images = load_images(self.folder, size, self.count * batch)
        return [images[start : start + batch] for start in range(0, len(images), batch)]


class Pair(NamedTuple, Generic[C]):
    """A dense and a sparse run on the same images: milliseconds, and what is kept of what came of it."""

    dense_ms: float
    sparse_ms: float
    dense: C
    sparse: C


@dataclass(frozen=True)
class Cost:
    """What a pass over a batch took, by its trace.

    Attributes:
        images: of the batch. tokens: grid tokens of all of them.
        gflops: 1e9 multiply-adds of everything that was timed, all images.
        policy: the share of the policy's own products in it: gates.
        keep: per block the share of tokens that took part, mean over the images.
        more: what else a bench reports, by name.
    """

    images: int
    tokens: float
    gflops: float
    policy: float
    keep: tuple[float, ...]
    more: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(trace: Trace, gflops: Tensor, policy: Policy, *, images: int | None = None, **more: Any) -> "Cost":
        """The cost of a pass from its trace.

        Args:
            gflops: (b,) of everything that was timed.
            images: where the trace's batch is one of windows.
        """
        return Cost(
            images=len(trace.valid) if images is None else images,
            tokens=trace.valid.sum().item(),
            gflops=gflops.sum().item(),
            policy=policy.macs(trace).double().sum().item() / 1e9,
            keep=tuple(trace.shares().double().mean(1).tolist()),
            more=more,
        )


def _line(row: dict[str, Any]) -> str:
    """A row in short."""
    what = f"{row['model']} {row['size']}, batch {row['batch']}, {row['mode']}"
    if "skipped" in row:
        return f"{what}: {row['skipped']}"
    times = f"{row['dense_ms']:.0f} to {row['sparse_ms']:.0f} ms"
    return f"{what}: {times}, speed-up {row['speedup']:.2f}, predicted {row['predicted']:.2f}"


def run(
    name: str,
    config: Bench,
    models: Iterable[str],
    sizes: Sequence[Size | None],
    rows_of: Callable[[str, Size | None, int, Place], Iterable[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], Table],
    console: Console | None,
) -> dict[str, Any]:
    """Every combination of model, size and batch: a table for people, and a dict.

    Args:
        sizes: None among them: images of their own sizes.
        rows_of: (model, size, batch, place) to the figures of rows, one for each mode.

    Raises:
        ConfigError: fewer than two repeats, an unknown precision, or a folder without pictures.
    """
    console = console or Console()
    if config.repeats < 2:
        raise ConfigError(f"repeats is at least 2, not {config.repeats}")
    if config.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"unknown precision {config.precision!r}{nearest(config.precision, ('float32', 'bfloat16'))}")
    if config.threads:
        torch.set_num_threads(config.threads)
    photos = default_data_root() / "photos"
    folder = photos if config.images is None and photos.is_dir() else config.images
    place = Place(pick_device(config.device), getattr(torch, config.precision), folder, config.repeats)
    jobs = [(model, size, batch) for model in models for size in sizes for batch in config.batches]
    rows = []
    for model, size, batch in track(jobs, "timing", console=console, transient=True):
        shown = "own" if size is None else list(size)
        row = {"model": model, "size": shown, "batch": batch, "device": device_name(place.device)}
        row["precision"] = config.precision
        for figures in rows_of(model, size, batch, place):
            rows.append({**row, **figures})
            console.print(_line(rows[-1]), style="dim", highlight=False)  # a run that is stopped has said this much
    console.print(table([row for row in rows if "skipped" not in row]))
    result = {
        "bench": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": "scenes" if folder is None else folder.name,
        "rows": rows,
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        draw_rows(rows, config.out / f"{name}.png", title=f"sievit bench {name}")
    return result


def check_known(models: Sequence[str], known: Iterable[str]) -> None:
    """Raise unless all are known.

    Raises:
        ConfigError: an unknown model; the nearest name is given.
    """
    for model in models:
        if model not in known:
            raise ConfigError(f"unknown model {model!r}{nearest(model, known)}")


def time_modes(
    config: ModesBench,
    policies: Mapping[str, Policy | str],
    call_of: Callable[[Policy, Way], Callable[[T], R]],
    inputs: Sequence[T],
    device: torch.device,
    cost: Callable[[Policy, R], Cost],
    blocks: Sequence[nn.Module] = (),
    more: Callable[[list[Pair[Cost]]], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """A row for each mode, dense and that mode in turns on the same inputs.

    Args:
        policies: by `Way.base`; a text instead of a policy: why there is none. `dense` computes every token.
        call_of: what is timed, ready to be called with an input.
        cost: of what a call returned, with the policy it was called with.
        blocks: the backbone's, whose memory is told apart.
        more: further figures of a row.

    Returns:
        Rows of `mode`, `summary`'s figures, `gflops` per image (dense, sparse), `keep` by block, `memory_mb` (dense,
        sparse; None where graphs hold their own), `block_memory_mb`, the mean over the blocks in which tokens were left
        out, `syncs`, and `sync_places`. Rows of a mode that could not be timed have `skipped`, which says why.
    """
    usual = [name for name in USUAL if isinstance(policies[Way.of(name).base], Policy)]
    dense = policies["dense"]
    assert isinstance(dense, Policy)
    as_it_is = Way.of("dense")
    held = memory(lambda: call_of(dense, as_it_is)(inputs[0]), device, blocks)
    rows = []
    for way in map(Way.of, config.modes or usual):
        policy = policies[way.base]
        if isinstance(policy, str):
            rows.append({"mode": way.name, "skipped": policy})
            continue
        try:
            rows.append(_time_mode(way, (dense, policy), call_of, inputs, device, cost, blocks, held, more))
        except Exception as error:  # a compiler has many kinds of them, and none shall cost the other rows
            if way.how == "eager" and not isinstance(error, torch.OutOfMemoryError):
                raise
            rows.append({"mode": way.name, "skipped": reason(error)})
    return rows


def _time_mode(
    way: Way,
    policies: tuple[Policy, Policy],
    call_of: Callable[[Policy, Way], Callable[[T], R]],
    inputs: Sequence[T],
    device: torch.device,
    cost: Callable[[Policy, R], Cost],
    blocks: Sequence[nn.Module],
    held: Memory,
    more: Callable[[list[Pair[Cost]]], dict[str, Any]] | None,
) -> dict[str, Any]:
    dense, policy = policies
    if way.how == "graphs" and device.type != "cuda":
        return {"mode": way.name, "skipped": "graphs are CUDA's"}
    reference, call = call_of(dense, Way.of("dense")), call_of(policy, way)
    with way.many_shapes():
        pairs = alternately(
            (reference, lambda result: cost(dense, result)),
            (call, lambda result: cost(policy, result)),
            inputs,
            device,
            warm_up=3 if way.how == "graphs" else 2,
            warm_on=len(inputs) if way.how != "eager" and not way.one_graph else 1,
        )
        own = (
            None
            if way.how == "graphs"
            else memory(lambda: call(inputs[0]), device, () if way.how != "eager" else blocks)
        )
        as_it_stands = call if device.type == "cuda" else call_of(policy, replace(way, how="eager"))
        with counted_syncs(device) as places:
            as_it_stands(inputs[0])
    figures = {"mode": way.name, **figures_of(pairs), **memory_figures(held, own, pairs[0].sparse.keep)}
    figures |= {"syncs": places.total(), "sync_places": dict(places)}
    return figures if more is None else {**figures, **more(pairs)}


def figures_of(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """Times, ratios, costs and shares of a row."""
    images = sum(pair.dense.images for pair in pairs)
    figures = {
        "tokens": round(sum(pair.dense.tokens for pair in pairs) / images),
        **summary(pairs, [pair.dense.gflops / pair.sparse.gflops for pair in pairs]),
        "gflops": [round(sum(cost.gflops for cost in side) / images, 4) for side in _sides(pairs)],
        "keep": [round(statistics.fmean(shares), 3) for shares in zip(*(p.sparse.keep for p in pairs), strict=True)],
    }
    if any(pair.sparse.policy for pair in pairs):
        without = [(p.dense.gflops - p.dense.policy) / (p.sparse.gflops - p.sparse.policy) for p in pairs]
        figures["predicted_blocks"] = round(statistics.median(without), 3)
    return figures


def _sides(pairs: Sequence[Pair[C]]) -> tuple[list[C], list[C]]:
    return [pair.dense for pair in pairs], [pair.sparse for pair in pairs]


def memory_figures(dense: Memory, sparse: Memory | None, keep: Sequence[float]) -> dict[str, Any]:
    """What a row says of memory: at the peak of the pass, and in the blocks in which tokens were left out."""
    figures: dict[str, Any] = {"memory_mb": [dense.peak, None if sparse is None else sparse.peak]}
    pruned = [i for i, share in enumerate(keep) if share < 1]
    if sparse is not None and sparse.blocks and pruned:
        of_blocks = [[side.blocks[i] for i in pruned] for side in (dense, sparse)]
        figures["block_memory_mb"] = [round(statistics.fmean(side), 1) for side in of_blocks]
    return figures


def alternately(
    dense: tuple[Callable[[T], R], Callable[[R], C]],
    sparse: tuple[Callable[[T], R], Callable[[R], C]],
    inputs: Sequence[T],
    device: torch.device,
    *,
    warm_up: int = 2,
    warm_on: int = 1,
) -> list[Pair[C]]:
    """Both calls on each input, in turns as to which comes first.

    Args:
        dense, sparse: what is timed, and what is kept of its result, which is found out at once and not timed: graphs
            overwrite their results.
        warm_up: calls of each before the first that is timed.
        warm_on: on so many of the inputs.
    """
    for images in inputs[:warm_on]:
        for call, _ in (dense, sparse) * warm_up:
            call(images)
    pairs = []
    for i, images in enumerate(inputs):
        done = {}
        for side in (0, 1) if i % 2 else (1, 0):
            call, kept = (dense, sparse)[side]
            elapsed, result = clocked(lambda call=call, images=images: call(images), device)
            done[side] = (elapsed, kept(result))
        (dense_ms, of_dense), (sparse_ms, of_sparse) = done[0], done[1]
        pairs.append(Pair(dense_ms, sparse_ms, of_dense, of_sparse))
    return pairs


def summary(pairs: Sequence[Pair], predicted: Sequence[float]) -> dict[str, Any]:
    """Medians over the pairs, and their spread; `predicted` is the ratio of multiply-adds of each pair."""
    ratios = [pair.dense_ms / pair.sparse_ms for pair in pairs]
    shares = [a / b for a, b in zip(ratios, predicted, strict=True)]
    figures: dict[str, Any] = {}
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


def clocked(call: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """Milliseconds that a call took, and what it returned."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3, result


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_pictures(folder: Path | None, size: Size, count: int) -> Tensor:
    """(count, 3, h, w), normalised: the pictures of a folder, cropped to the aspect and resized, in turn.

    Without a folder they are generated scenes.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return torch.stack([(picture - mean) / std for picture in load_images(folder, size, count)])


def load_images(folder: Path | None, size: Size | None, count: int) -> list[Tensor]:
    """`count` images (3, h, w) in 0..1 of a folder, in turn; of their own sizes, or fitted to one.

    Without a folder they are generated scenes.
    """
    if folder is None:
        scenes = [torch.from_numpy(draw(seed=1, index=i, size=size or SCENE)[0]) for i in range(min(count, 4))]
        pictures = [scene.permute(2, 0, 1).float() / 255 for scene in scenes]
    else:
        pictures = [to_tensor(read_image(path)).float() / 255 for path in list_images(folder)[:count]]
        pictures = pictures if size is None else [fitted(picture, size) for picture in pictures]
    return (pictures * math.ceil(count / len(pictures)))[:count]


def fitted(picture: Tensor, size: Size) -> Tensor:
    """(3, h, w) in 0..1: resized to cover `size`, then cropped around the middle."""
    scale = max(size[0] / picture.shape[1], size[1] / picture.shape[2])
    shape = [max(side, round(own * scale)) for side, own in zip(size, picture.shape[1:], strict=True)]
    resized = F.interpolate(picture[None], shape, mode="bilinear", antialias=True)[0]
    top, left = (resized.shape[1] - size[0]) // 2, (resized.shape[2] - size[1]) // 2
    return resized[:, top : top + size[0], left : left + size[1]].clamp(0, 1)


def table_of(title: str, rows: list[dict[str, Any]], extra: dict[str, list[str]]) -> Table:
    """Times and ratios of all rows; `extra` columns by name, one text per row.

    The memory is that of the blocks in which tokens are left out, dense and sparse, or else of the whole pass.
    """
    table = Table(title=title, box=SIMPLE, collapse_padding=True, pad_edge=False)
    left = ("model", "mode")
    headers = ("model", "tokens", "mode", "dense\nms", "sparse\nms", *extra)
    headers += ("speed-\nup", "pre-\ndicted", "real-\nised", "MB", "syncs")
    for column in headers:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for i, row in enumerate(rows):
        tokens = f"{row['batch']} x {row['tokens']}"
        figures = [
            f"{row[name]:.0f}" if row[name] >= 1000 else f"{row[name]:.1f}" for name in ("dense_ms", "sparse_ms")
        ]
        figures += [*(column[i] for column in extra.values()), f"{row['speedup']:.2f}", f"{row['predicted']:.2f}"]
        held = " > ".join("?" if mb is None else f"{mb:.0f}" for mb in row.get("block_memory_mb", row["memory_mb"]))
        figures += [f"{row['realised']:.0%}", held, str(row["syncs"])]
        table.add_row(row["model"], tokens, row["mode"], *figures)
    return table


def kept(rows: list[dict[str, Any]]) -> list[str]:
    """In a cell of a table: the mean share of tokens in the blocks in which some were left out."""
    texts = []
    for row in rows:
        pruned = [share for share in row["keep"] if share < 1]
        texts.append(f"{statistics.fmean(pruned) if pruned else 1:.0%}")
    return texts


def percent(shares: Iterable[float]) -> str:
    """Shares in a cell of a table."""
    return " ".join(f"{share:.0%}" for share in shares)

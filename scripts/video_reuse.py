"""Measures reuse over frames on videos that are made of photographs: a moving camera, and a still one.

    python scripts/video_reuse.py facade_setr_dtop examples/facade/images/val --out reuse.jsonl

The moving camera pans over a photograph for 60 frames, then cuts to the next. The still one has a patch of another
photograph moving through the picture, and cuts twice; both have noise. Every frame is computed as an image of its own
and with reuse at each setting, in turns. A line of the file is one video at one setting: sums over frames, so that
lines of several parts of a video can be added; `--table` prints what the lines of a file come to, and
`--plot` draws it.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from PIL import Image

import sievit
from sievit.config import to_json
from sievit.data.images import list_images, read_image
from sievit.models.inputs import as_tensor
from sievit.policies.reuse import ReuseConfig
from sievit.report.plot import draw_curves

SIZE, PATCH, NOISE = 448, 96, 1.0
PAN = 60
PART = 25
CUTS = (75, 225)


def moving(index: int, photographs: list[Path]) -> Image.Image:
    """A window that goes over a photograph from one corner to the other."""
    scene, step = divmod(index, PAN)
    image = read_image(photographs[scene % len(photographs)])
    x, y = (round((side - SIZE) * step / (PAN - 1)) for side in image.size)
    return image.crop((x, y, x + SIZE, y + SIZE))


def still(index: int, photographs: list[Path]) -> Image.Image:
    """One window, with a patch that runs in a circle."""
    scene = sum(index >= cut for cut in CUTS)
    image = read_image(photographs[scene]).crop((0, 0, SIZE, SIZE))
    x, y = (round((SIZE - PATCH) * (1 + of(index / 20)) / 2) for of in (math.cos, math.sin))
    image.paste(read_image(photographs[-1]).crop((200, 200, 200 + PATCH, 200 + PATCH)), (x, y))
    return image


VIDEOS: dict[str, Callable[[int, list[Path]], Image.Image]] = {"moving": moving, "still": still}


def frames(video: str, photographs: list[Path], start: int, stop: int) -> Iterator[torch.Tensor]:
    for index in range(start, stop):
        pixels = np.asarray(VIDEOS[video](index, photographs), dtype=float)
        noise = np.random.default_rng(index).normal(0, NOISE, pixels.shape)
        yield as_tensor((pixels + noise).round().clip(0, 255).astype(np.uint8))


def main(
    model: str,
    images: Path,
    /,
    out: Path,
    video: tuple[str, ...] = tuple(VIDEOS),
    thresholds: tuple[float, ...] = (0.2, 0.4, 0.8, 1.2),
    refresh: tuple[int, ...] = (32,),
    start: int = 0,
    stop: int = 300,
    min_size: int | None = None,
    table: bool = False,
    plot: Path | None = None,
) -> None:
    """Append lines to the file `out`, and print the table of all its lines.

    Args:
        start, stop: the frames of the video.
        min_size: of what the network sees, in pixels, instead of the model's own.
        table: print alone.
        plot: a PNG of the table: a curve for each video, over what is not the same in all its settings.
    """
    if not table:
        loaded = sievit.load(model)
        if min_size is not None:
            loaded = loaded.with_config(input=replace(loaded.config.input, min_size=min_size))
        if not isinstance(loaded, sievit.Segmenter):
            raise sievit.ConfigError(f"{model}: is no segmenter")
        photographs = list_images(images)[::9]
        for name in video:
            part = {"model": model, "video": name, "start": start, "min_size": loaded.config.input.min_size}
            configs = [ReuseConfig(threshold=t, refresh=r) for t in thresholds for r in refresh]
            for line in measured(loaded, frames(name, photographs, start, stop), [None, *configs]):
                with out.open("a") as file:
                    file.write(json.dumps({**part, **line}) + "\n")
    show([json.loads(line) for line in out.read_text().splitlines()], plot)


@torch.no_grad()
def measured(
    model: sievit.Segmenter, source: Iterator[torch.Tensor], configs: list[ReuseConfig | None]
) -> Iterator[dict]:
    """A line for each configuration, the first of which is None, without reuse; again after every PART frames."""
    calls = [model if config is None else model.stream(config) for config in configs]
    classes = len(model.config.classes)
    while part := list(islice(source, PART)):
        spent = np.zeros((len(calls), 3))
        pairs = torch.zeros(len(calls), classes**2, dtype=torch.int64)
        for number, frame in enumerate(part):
            dense = torch.zeros(())
            for i in range(len(calls)) if number % 2 else (0, *range(len(calls) - 1, 0, -1)):
                began = time.perf_counter()
                answer = calls[i]([frame])
                elapsed = (time.perf_counter() - began) * 1e3
                labels = answer.results[0].flatten()
                dense = dense if i else labels
                spent[i] += model.gflops(answer).item(), elapsed, answer.shares().mean().item()
                pairs[i] += torch.bincount(dense * classes + labels, minlength=classes**2)
        for config, (gflops, ms, computed), counts in zip(
            configs, spent.tolist(), pairs.unflatten(1, (classes, -1)), strict=True
        ):
            both = counts.diagonal()
            either = counts.sum(0) + counts.sum(1) - both
            sums = {"frames": len(part), "gflops": gflops, "ms": ms, "computed": computed}
            yield {"reuse": config and to_json(config), **sums, "both": both.tolist(), "either": either.tolist()}


def show(lines: list[dict], plot: Path | None) -> None:
    """What a frame takes, and how its labels agree with the full computation's, of each video and threshold."""
    print("model                video    threshold refresh frames computed  GFLOPs   mIoU  pixels     ms")
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        reuse = line["reuse"] or {"threshold": "off", "refresh": ""}
        key = Path(line["model"]).stem, line["video"], reuse["threshold"], reuse["refresh"]
        groups.setdefault(key, []).append(line)
    points = []
    for (model, video, threshold, refresh), parts in groups.items():
        number = sum(part["frames"] for part in parts)
        computed, gflops = (sum(part[key] for part in parts) / number for key in ("computed", "gflops"))
        ms = median(part["ms"] / part["frames"] for part in parts)
        both, either = (np.sum([part[key] for part in parts], axis=0) for key in ("both", "either"))
        miou, pixels = (both[either > 0] / either[either > 0]).mean(), 2 * both.sum() / (both + either).sum()
        text = f"{model:<20} {video:<8} {threshold:>9} {refresh:>7} {number:>6} {computed:>8.3f} {gflops:>7.2f}"
        print(f"{text} {miou:>6.3f} {pixels:>7.4f} {ms:>6.0f}")
        value = refresh if len({key[3] for key in groups if key[1] == video}) > 2 else threshold
        figures = {"gflops": gflops, "ms_per_image": ms, "miou": miou}
        points.append({"model": f"{video} camera", "value": value or "off", **figures})
    if plot:
        draw_curves(points, plot, measure="miou", label="mIoU against the full computation", device="CPU")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,))

"""Measures reuse over frames on videos that are made of photographs: a moving camera, and a still one.

    python scripts/video_reuse.py facade_setr_dtop examples/facade/images/val --out reuse.jsonl

The moving camera pans over a photograph for 60 frames, then cuts to the next. The still one has a patch of another
photograph moving through the picture, and cuts twice; both have noise. Every frame is computed as an image of its own
and with reuse at each threshold, in turns. A line of the file is one video at one threshold: sums over frames, so that
lines of several parts of a video can be added; `--table` prints what the lines of a file come to.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

import sievit
from sievit.config import to_json
from sievit.data.images import list_images, read_image
from sievit.models.inputs import as_tensor
from sievit.policies.reuse import ReuseConfig

SIZE, PATCH, NOISE = 448, 96, 1.0
PAN = 60
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
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8),
    start: int = 0,
    stop: int = 300,
    table: bool = False,
) -> None:
    """Append lines to the file `out`, and print the table of all its lines."""
    if not table:
        loaded, photographs = sievit.load(model), list_images(images)[::9]
        for name in video:
            for line in measured(loaded, frames(name, photographs, start, stop), thresholds):
                with out.open("a") as file:
                    file.write(json.dumps({"model": model, "video": name, "start": start, "stop": stop, **line}) + "\n")
    show([json.loads(line) for line in out.read_text().splitlines()])


@torch.no_grad()
def measured(model: sievit.Segmenter, source: Iterator[torch.Tensor], thresholds: tuple[float, ...]) -> list[dict]:
    """Sums over the frames; None stands for no reuse."""
    configs = [None, *(ReuseConfig(threshold=value) for value in thresholds)]
    calls = [model if config is None else model.stream(config) for config in configs]
    classes = len(model.config.classes)
    sums = [
        {"gflops": 0.0, "ms": 0.0, "computed": 0.0, "both": np.zeros(classes), "either": np.zeros(classes)}
        for _ in calls
    ]
    number = 0
    for number, frame in enumerate(source, start=1):
        truth = None
        order = range(len(calls)) if number % 2 else [0, *range(len(calls) - 1, 0, -1)]
        for i in order:
            began = time.perf_counter()
            answer = calls[i]([frame])
            ms = (time.perf_counter() - began) * 1e3
            labels = answer.results[0].flatten()
            truth = labels if i == 0 else truth
            counts = torch.bincount(truth * classes + labels, minlength=classes**2).view(classes, classes).numpy()
            both = counts.diagonal()
            for key, value in {
                "gflops": model.gflops(answer).item(),
                "ms": ms,
                "computed": answer.shares().mean().item(),
                "both": both,
                "either": counts.sum(0) + counts.sum(1) - both,
            }.items():
                sums[i][key] = sums[i][key] + value
    lists = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in each.items()}
        for each in sums
    ]
    return [{"reuse": c and to_json(c), "frames": number, **each} for c, each in zip(configs, lists, strict=True)]


def show(lines: list[dict]) -> None:
    """GFLOPs, mIoU with the full computation and milliseconds, of each video and threshold."""
    print("model                video    threshold frames computed  GFLOPs   mIoU  pixels     ms")
    groups = {(line["model"], line["video"], line["reuse"] and line["reuse"]["threshold"]): [] for line in lines}
    for line in lines:
        groups[line["model"], line["video"], line["reuse"] and line["reuse"]["threshold"]].append(line)
    for (model, video, threshold), parts in groups.items():
        number = sum(part["frames"] for part in parts)
        computed, gflops, ms = (sum(part[key] for part in parts) / number for key in ("computed", "gflops", "ms"))
        both, either = (np.sum([part[key] for part in parts], axis=0) for key in ("both", "either"))
        miou = (both[either > 0] / either[either > 0]).mean()
        pixels = 2 * both.sum() / (both + either).sum()
        off = "off" if threshold is None else threshold
        text = f"{Path(model).stem:<20} {video:<8} {off:>9} {number:>6} {computed:>8.3f} {gflops:>7.2f}"
        print(f"{text} {miou:>6.3f} {pixels:>7.4f} {ms:>6.0f}")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.FlagConversionOff,))

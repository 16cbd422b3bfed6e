"""`sievit predict` on a video."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sievit import terminal, viz
from sievit.config import Config, ConfigError, Count, NonNegative, Positive, to_json
from sievit.data.images import to_tensor
from sievit.engine.signals import Interrupted, Stop, stopping
from sievit.files import held
from sievit.models.base import Model
from sievit.policies.reuse import ReuseConfig
from sievit.tasks import task_of
from sievit.video.sink import Sink
from sievit.video.source import Frame, opened

VIDEO, LINES = "video.mp4", "frames.jsonl"
BOX = (768, 768)
"""Width and height that a panel fits into."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions(Config):
    """Frames of a video instead of images.

    Attributes:
        video: the images of the folder are the frames of a video, by name; not needed for a video file or a camera.
        reuse: tokens are computed only where the picture changed by more than this (0.4 is a good start); needs a
            policy that only selects tokens. None: every frame is computed like an image of its own.
        refresh: with reuse, frames after which a token is computed in any case.
        fps: frames per second of a folder of frames, by default 25.
        frames: only the first so many frames.
    """

    video: bool = False
    reuse: NonNegative | None = None
    refresh: Count = 32
    fps: Positive | None = None
    frames: Count | None = None


def predict_video(
    model: Model,
    source: Path,
    out: Path,
    options: VideoOptions,
    *,
    batch_size: int,
    score_threshold: float | None,
    force: bool,
) -> int:
    """Write video.mp4, with the results and beside them the tokens that were computed, and frames.jsonl into `out`.

    frames.jsonl begins with a line about the model, and has a line for each frame: `frame` (from 0), `time` (seconds),
    `width`, `height`, `gflops`, `ms`, `computed` (share of the tokens, over all blocks), `annotations` in COCO's
    format. Files have their names when they are whole. SIGINT ends a camera's video, and keeps what was done of
    another one.

    Returns:
        The exit status: 1 when a part of the video could not be decoded, else 0.

    Raises:
        ConfigError: no such video or camera, results that are there already, or options that contradict each other.
        Interrupted: a signal came.
    """
    min_score = 0.5 if score_threshold is None else score_threshold
    if score_threshold is not None and not task_of(model.config).has_scores:
        raise ConfigError("--score-threshold: the results of this model have no scores; leave it out")
    if options.reuse is not None and batch_size > 1:
        raise ConfigError("--batch-size: with --reuse each frame waits for the one before; leave out one of them")
    for path in (out / VIDEO, out / LINES):
        if path.exists() and source.exists() and path.samefile(source):
            raise ConfigError(f"{path}: is the video that is read; give another --out")
        if path.exists() and not force:
            raise ConfigError(f"{path}: is there already; give another --out, or --force to write over it")
    frames, console = opened(source, options.fps), terminal.console()
    runner = VideoRunner(model, options)
    with held(out), stopping("--force") as stop, Sink(out / VIDEO, out / LINES, frames.fps) as sink:
        sink.line(runner.header(source))
        limit = options.frames if options.frames is not None else frames.total
        shown = terminal.track(runner.answers(frames, batch_size), "predicting", total=limit, console=console)
        number = _written(shown, sink, runner, min_score, stop)
        if number:
            sink.keep()
    for failure in dict.fromkeys(frames.failures):
        console.print(f"error: {failure}", soft_wrap=True)
    if not number:
        raise ConfigError(f"{source}: has no frame that can be decoded")
    console.print(f"{number} frames, {runner.spent(number)}: {out / VIDEO}, {out / LINES}", soft_wrap=True)
    if stop.received and not frames.live:
        raise Interrupted(f"stopped after {number} frames, which are kept; to do them all, add --force")
    return 1 if frames.failures else 0


@dataclass(frozen=True)
class Seen:
    """A frame, and what a model answered for it."""

    frame: Frame
    result: Any
    keep: torch.Tensor
    line: dict[str, Any]


class VideoRunner:
    """A model over the frames of a video."""

    def __init__(self, model: Model, options: VideoOptions) -> None:
        self.model, self.options, self.task = model, options, task_of(model.config)
        reuse = options.reuse
        self.config = None if reuse is None else ReuseConfig(threshold=reuse, refresh=options.refresh)
        self.run = model if self.config is None else model.stream(self.config)
        self.gflops = self.ms = 0.0

    def header(self, source: Path) -> dict[str, Any]:
        """The first line of the results."""
        config = self.model.config
        settings = {"policy": to_json(config.policy), "reuse": self.config and to_json(self.config)}
        return {"kind": "sievit frames", "video": source.name, "categories": self.task.categories(), **settings}

    def answers(self, frames: Iterable[Frame], batch_size: int) -> Iterator[Seen]:
        """Frame by frame."""
        source = islice(frames, self.options.frames)
        while batch := list(islice(source, batch_size)):
            start = time.perf_counter()
            with torch.no_grad():
                answer = self.run([to_tensor(frame.picture) for frame in batch])
            ms = (time.perf_counter() - start) * 1e3 / len(batch)  # results are read below, which waits for a device
            gflops, shares = self.model.gflops(answer), answer.shares().mean(1)
            for i, (frame, result) in enumerate(zip(batch, answer.results, strict=True)):
                line = self._line(frame, result, gflops[i].item(), ms, shares[i].item())
                yield Seen(frame, result, answer.computed(i), line)

    def _line(self, frame: Frame, result: Any, gflops: float, ms: float, share: float) -> dict[str, Any]:
        self.gflops, self.ms = self.gflops + gflops, self.ms + ms
        width, height = frame.picture.size
        return {
            "frame": frame.index,
            "time": round(frame.time, 6),
            "width": width,
            "height": height,
            "gflops": round(gflops, 3),
            "ms": round(ms, 2),
            "computed": round(share, 4),
            "annotations": self.task.annotations(result),
        }

    def picture(self, seen: Seen, *, min_score: float) -> Image.Image:
        """The frame with what was found, and beside it how many blocks computed each token."""
        picture = seen.frame.picture
        panels = [self.task.picture(picture, seen.result, min_score=min_score, box=BOX)]
        panels.append(viz.heat_map(picture, seen.keep.float().mean(0), box=BOX))
        return _beside(panels)

    def spent(self, number: int) -> str:
        """What a frame took."""
        return f"{self.gflops / number:.1f} GFLOPs and {self.ms / number:.0f} ms each"


def _written(answers: Iterator[Seen], sink: Sink, runner: VideoRunner, min_score: float, stop: Stop) -> int:
    """Puts frames into the sink, until a signal comes; their number."""
    number = 0
    for seen in answers:
        sink.picture(runner.picture(seen, min_score=min_score), seen.frame.time)
        sink.line(seen.line)
        number += 1
        if stop.received:
            break
    return number


def _beside(panels: list[Image.Image]) -> Image.Image:
    """Pictures of one size, side by side; wide ones one above the other."""
    width, height = panels[0].size
    across = width < 1.6 * height
    sheet = Image.new("RGB", (2 * width, height) if across else (width, 2 * height))
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * width, 0) if across else (0, i * height))
    return sheet

"""A video in, the same video with what was found and which tokens were computed out; all of it in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from itertools import chain

from sievit.config import Config, ConfigError, Count, Positive
from sievit.data.images import ImageTooLarge
from sievit.serve.desk import Refused, too_large
from sievit.serve.runner import Runner
from sievit.video import VideoOptions
from sievit.video.command import VideoRunner
from sievit.video.memory import NAME, NotAVideo, in_memory, length
from sievit.video.sink import VideoFile
from sievit.video.source import Source, require_av

SCORE = 0.5
"""Of objects that are drawn."""


@dataclass(frozen=True, kw_only=True)
class VideoLimits(Config):
    """How much of a video is taken.

    Attributes:
        max_video_megabytes: of a video file.
        max_video_seconds: that a video lasts.
        max_video_frames: that a video has.
    """

    max_video_megabytes: Positive = 100
    max_video_seconds: Positive = 30
    max_video_frames: Count = 900

    @property
    def max_bytes(self) -> int:
        return int(self.max_video_megabytes * 1e6)


@dataclass(frozen=True)
class Film:
    """An MP4 file, the GFLOPs of its frames together, and in words what it took."""

    content: bytes
    gflops: float
    says: str


def film(
    runner: Runner,
    content: bytes,
    limits: VideoLimits,
    *,
    max_pixels: int,
    policy: str | None = None,
    budget: float | None = None,
    reuse: float | None = None,
    gone: Callable[[], bool] = lambda: False,
) -> Film:
    """The frames of a video with the results of a model, as `sievit predict` draws them.

    Args:
        content: the bytes of a video file.
        max_pixels: of a frame.
        policy, budget: as of `Runner.run`; the dial is turned on the first frame.
        reuse: as --reuse of `sievit predict`.
        gone: whether nobody waits for it any more, asked before each frame.

    Raises:
        Refused: it is no video that can be taken, the setting does not fit, or nobody waits.
    """
    try:
        require_av()
    except ConfigError as error:
        raise Refused(501, str(error)) from error
    try:
        source = _taken(content, limits, max_pixels)
        options = VideoOptions(reuse=reuse, frames=limits.max_video_frames)
        return _filmed(runner, source, policy, budget, options, gone)
    except ConfigError as error:
        raise Refused({NotAVideo: 415, ImageTooLarge: 413}.get(type(error), 422), str(error)) from error


def _taken(content: bytes, limits: VideoLimits, max_pixels: int) -> Source:
    """
    Raises:
        Refused: it is too long, or no video.
        ConfigError: as of `in_memory`.
    """
    if not content:
        raise Refused(400, "the request has no video; send its bytes as the body, or as a file of a form")
    if len(content) > limits.max_bytes:
        raise too_large(limits.max_bytes)
    frames, seconds = length(content, max_pixels=max_pixels)
    for number, most, unit in (
        (frames, limits.max_video_frames, "frames"),
        (seconds, limits.max_video_seconds, "seconds"),
    ):
        if number > most:
            raise Refused(413, f"{NAME} has {number:.4g} {unit}; at most {most:g} are taken: cut it")
    return in_memory(content, max_pixels=max_pixels)


def _filmed(
    runner: Runner,
    source: Source,
    policy: str | None,
    budget: float | None,
    options: VideoOptions,
    gone: Callable[[], bool],
) -> Film:
    frames = iter(source)
    first = next(frames, None)
    if first is None:
        raise ConfigError(f"{NAME} has no frame that can be decoded")
    video = VideoRunner(runner.chosen(first.picture, policy, budget), options)
    written, number = BytesIO(), 0
    file = VideoFile(written, source.fps)
    try:
        for seen in video.answers(chain([first], frames), 1):
            if gone():
                raise Refused(499, "the client has gone")
            file.picture(video.picture(seen, min_score=SCORE), seen.frame.time)
            number += 1
        file.finish()
    finally:
        file.close()
        source.container.close()
    says = [f"{number} frames, {video.spent(number)}", *dict.fromkeys(source.failures)]
    return Film(written.getvalue(), video.gflops, "; ".join(says))

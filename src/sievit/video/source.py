"""Frames of a video file, a folder of pictures or a camera, one at a time."""

import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from sievit.config import ConfigError
from sievit.data.images import ImageTooLarge, list_images, read_image

SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".wmv",
    ".flv",
    ".ogv",
    ".3gp",
)
CAMERA = re.compile(r"camera:(\d+)")
DEVICES = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
"""Format and file of a camera, by platform."""
FPS = 25
"""Of what does not say it."""
UNREADABLE = "is no video that can be read, or is cut short"


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: from 0, of those that could be decoded. time: in seconds from the first one.
        picture: RGB, upright.
    """

    index: int
    time: float
    picture: Image.Image


@dataclass
class Source:
    """A video that can be read once.

    Attributes:
        fps: frames per second, on average.
        total: how many frames there are, where that is known.
        live: a camera, which has no end.
        failures: what could not be decoded, so far.
        max_pixels: of a frame of a video; a larger one ends the reading with an ImageTooLarge.
    """

    path: Path
    fps: Fraction
    total: int | None
    live: bool = False
    container: Any = None
    pictures: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    max_pixels: float = math.inf

    def __iter__(self) -> Iterator[Frame]:
        found = self._decoded() if self.container is not None else self._read()
        first, last = None, -1.0
        for index, (time, picture) in enumerate(found):
            first = (time or 0.0) if first is None else first
            at = last + float(1 / self.fps) if index and time is None else (time or 0.0) - first
            last = at if index == 0 or at > last else last + float(1 / self.fps)  # a clock that stands or jumps back
            yield Frame(index, last, picture)

    def _read(self) -> Iterator[tuple[float, Image.Image]]:
        for number, path in enumerate(self.pictures):
            try:
                yield float(number / self.fps), read_image(path)
            except ConfigError as error:
                self.failures.append(str(error))

    def _decoded(self) -> Iterator[tuple[float | None, Image.Image]]:
        import av

        stream = self.container.streams.video[0]
        stream.thread_type = "AUTO"
        with closing(self.container):
            packets = self.container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                    if packet is None:
                        return
                    frames = packet.decode()
                except av.error.EOFError:
                    return
                except av.error.FFmpegError as error:  # a damaged part; what follows may be whole
                    self.failures.append(f"{self.path}: a part cannot be decoded ({error.strerror})")
                    continue
                if any(frame.is_corrupt for frame in frames):
                    self.failures.append(f"{self.path}: a part is damaged, and was filled in")
                for frame in frames:
                    yield frame.time, self._picture(frame, stream.sample_aspect_ratio)

    def _picture(self, frame: Any, aspect: Fraction | None) -> Image.Image:
        """RGB, with square pixels, turned upright."""
        width = round(frame.width * aspect) if aspect else frame.width
        if width * frame.height > self.max_pixels:
            raise ImageTooLarge(
                f"{self.path} has frames of {width} x {frame.height} pixels; at most {self.max_pixels / 1e6:.3g} "
                "megapixels are taken: make it smaller"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = frame.to_image(width=width, height=frame.height)
        return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def is_video(path: Path) -> bool:
    """Whether the name is a camera's or a video file's."""
    return bool(CAMERA.fullmatch(str(path))) or (path.suffix.lower() in SUFFIXES and not path.is_dir())


def opened(path: Path, fps: float | None) -> Source:
    """
    Args:
        path: a video file, a folder of frames, or camera:N.
        fps: of a folder of frames.

    Raises:
        ConfigError: there is no such file or camera, or no video in it; or PyAV is missing.
    """
    if path.is_dir():
        pictures = list_images(path)
        return Source(path, Fraction(fps or FPS).limit_denominator(1000), len(pictures), pictures=pictures)
    if fps is not None:
        raise ConfigError("--fps: a video says it itself; the option is of a folder of frames")
    av = require_av()
    camera = CAMERA.fullmatch(str(path))
    try:
        container = _camera(av, int(camera[1])) if camera else av.open(str(path))
    except FileNotFoundError as error:
        what = "no such camera; camera:0 is the first one" if camera else "no such file"
        raise ConfigError(f"{path}: {what}") from error
    except (av.error.FFmpegError, OSError) as error:
        what = "cannot be opened" if camera else UNREADABLE
        raise ConfigError(f"{path}: {what} ({error.strerror})") from error
    return of_container(path, container, live=bool(camera))


def of_container(path: Path, container: Any, **fields: Any) -> Source:
    """The frames of what PyAV has opened; `fields` of the source.

    Raises:
        ConfigError: there are no pictures in it.
    """
    if not container.streams.video:
        raise ConfigError(f"{path}: has no pictures in it, only sound or data")
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate or Fraction(FPS)
    total = None if fields.get("live") else stream.frames or None
    return Source(path, rate, total, container=container, **fields)


def require_av() -> Any:
    """PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("videos need av: pip install 'sievit[video]'") from error
    return av


def _camera(av: Any, number: int) -> Any:
    if sys.platform not in DEVICES:
        raise ConfigError(f"camera:{number}: cameras are read on {' and '.join(DEVICES)} alone; give a video file")
    kind, name = DEVICES[sys.platform]
    return av.open(name.format(number), format=kind)

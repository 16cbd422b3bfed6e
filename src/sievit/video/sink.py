"""A video and its lines of results, which have their names when they are whole."""

import json
import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from PIL import Image

from sievit.video.source import require_av

CODECS = ("libx264", "h264", "mpeg4")
"""The first that there is."""
CLOCK = Fraction(1, 90_000)
"""Of the times of frames, in seconds."""


class VideoFile:
    """Writes pictures of one size as an MP4 file, by its path or into a file object; `finish` makes it whole."""

    def __init__(self, file: Any, fps: Fraction) -> None:
        self.fps = fps
        self._video = require_av().open(file, "w", format="mp4")
        self._stream: Any = None
        self._last = -1

    def picture(self, picture: Image.Image, time: float) -> None:
        """One picture of the video, at so many seconds; those after the first are cut or filled to its size."""
        import av

        if self._stream is None:
            codec = next(name for name in CODECS if name in av.codecs_available)
            size = picture.width + picture.width % 2, picture.height + picture.height % 2
            self._stream = self._video.add_stream(codec, rate=self.fps)
            self._stream.width, self._stream.height = size
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = self._stream.codec_context.time_base = CLOCK
            if codec != "mpeg4":
                self._stream.options = {"crf": "20", "preset": "veryfast"}
        size = (self._stream.width, self._stream.height)
        if picture.size != size:
            sheet = Image.new("RGB", size, "white")
            sheet.paste(picture)
            picture = sheet
        frame = av.VideoFrame.from_image(picture)
        self._last = frame.pts = max(self._last + 1, round(time / CLOCK))
        frame.time_base = CLOCK
        self._video.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what is still to come, and the index."""
        if self._stream is not None:
            self._video.mux(self._stream.encode(None))
        self._video.close()

    def close(self) -> None:
        """Leave it, whole or not."""
        with suppress(Exception):
            self._video.close()


class Sink(VideoFile):
    """Writes pictures of one size and lines of JSON; `keep` gives both files their names, else they are removed."""

    def __init__(self, video: Path, lines: Path, fps: Fraction) -> None:
        self.names = {path: path.with_name(f".{path.name}.part") for path in (video, lines)}
        super().__init__(str(self.names[video]), fps)
        self._lines = self.names[lines].open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._lines.close()
        for part in self.names.values():
            part.unlink(missing_ok=True)

    def line(self, values: dict[str, Any]) -> None:
        """One line of JSON."""
        self._lines.write(json.dumps(values) + "\n")

    def keep(self) -> None:
        """Both files are whole, and get their names."""
        self.finish()
        self._lines.flush()
        os.fsync(self._lines.fileno())
        for path, part in self.names.items():
            part.replace(path)

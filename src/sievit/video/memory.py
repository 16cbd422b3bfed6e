"""Videos that come from elsewhere: bytes in memory, of formats that cannot name another file."""

from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from sievit.config import ConfigError
from sievit.video.source import UNREADABLE, Source, of_container, require_av

NAME = Path("the video")
"""What errors call it."""
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg"
"""FFmpeg's names; playlists are not among them, for they name files and addresses that would be opened."""


class NotAVideo(ConfigError):
    """Bytes that are no video of these formats."""


def in_memory(content: bytes, *, max_pixels: int) -> Source:
    """The frames of a video file.

    Args:
        max_pixels: of a frame.

    Raises:
        NotAVideo: it is no video of a known format, or is cut short.
        ConfigError: no pictures in it; or PyAV is missing.
    """
    return of_container(NAME, _opened(content, max_pixels), max_pixels=max_pixels)


def length(content: bytes, *, max_pixels: int) -> tuple[int, float]:
    """Frames, and seconds from the first to the last one, counted without decoding; arguments and errors as of
    `in_memory`."""
    source, frames, times = in_memory(content, max_pixels=max_pixels), 0, []
    with closing(source.container), suppress(require_av().error.FFmpegError):  # who decodes it tells what is damaged
        for packet in source.container.demux(source.container.streams.video[0]):
            frames += packet.size > 0
            if packet.pts is not None:
                times.append(float(packet.pts * packet.time_base))
    return frames, max(times, default=0.0) - min(times, default=0.0)


def _opened(content: bytes, max_pixels: int) -> Any:
    av = require_av()
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        return av.open(
            BytesIO(content),
            container_options=options,
            options={"max_pixels": str(max_pixels)},  # of the decoder, before it takes memory for a frame
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, OSError) as error:
        raise NotAVideo(f"{NAME} {UNREADABLE} ({error.strerror})") from error

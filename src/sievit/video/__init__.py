"""Models over videos: a file, a folder of frames or a camera in; a video and a line of results for each frame out."""

from sievit.video.command import VideoOptions, predict_video
from sievit.video.source import is_video

__all__ = ["VideoOptions", "is_video", "predict_video"]

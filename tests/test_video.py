"""Videos in and out: frames, times and results of each; what is refused, and what is kept."""

import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sievit
from sievit.policies import SViTConfig, policy_config
from sievit.tasks import task_of
from sievit.video import command as video_command
from sievit.video.sink import Sink
from tiny import image_folder, random_pixels, refused, saved, tiny_detector, tiny_segmenter

av = pytest.importorskip("av", reason="needs av")
SIZE = (48, 80)
TIMES = (0, 40, 120, 160, 400)
"""Milliseconds of the frames: no two of them are as far apart."""


def corners() -> np.ndarray:
    """A picture (h, w, 3) that is dark but for its upper left corner."""
    pixels = np.full((*SIZE, 3), 40, dtype=np.uint8)
    pixels[:16, :16] = 230
    return pixels


def write_video(path: Path, pictures: list[np.ndarray], *, turned: int = 0) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if turned:
            stream.set_display_rotation(turned)
        for time, pixels in zip(TIMES, pictures, strict=False):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 500 + time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_command, "BOX", (96, 96))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five frames, of which the last three are the same."""
    pictures = [random_pixels(i, *SIZE, 3) // 2 + 60 for i in range(3)]
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [*pictures, pictures[2], pictures[2]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "segmenter": saved(tiny_segmenter(policy=policy_config("dtop")), folder / "s.safetensors"),
        "detector": saved(tiny_detector(policy=SViTConfig(first_block=1, targets=(0.6,))), folder / "d.safetensors"),
    }


def read(path: Path) -> list[tuple[float, Image.Image]]:
    """Times and pictures of a video."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_image()) for frame in container.decode(video=0)]


def lines(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of the results, and those of frames."""
    first, *rest = (json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines())
    return first, rest


@pytest.mark.parametrize("kind", ["segmenter", "detector"])
def test_frames_are_images_where_nothing_is_reused(
    kind: str, models: dict[str, Path], clip: Path, tmp_path: Path, command: Callable[..., Any]
):
    command("predict", models[kind], clip, "--out", tmp_path, "--batch-size", 2)
    first, frames = lines(tmp_path)
    model = sievit.load(models[kind])
    task, pictures = task_of(model.config), [picture for _, picture in read(clip)]
    assert first["video"] == "clip.mp4" and first["reuse"] is None
    assert [each["id"] for each in first["categories"]] == [each["id"] for each in task.categories()]
    assert [line["frame"] for line in frames] == [0, 1, 2, 3, 4]
    assert [round(1000 * line["time"]) for line in frames] == list(TIMES)
    for line, result in zip(frames, model.predict(pictures), strict=True):
        assert (line["height"], line["width"]) == SIZE
        assert len(line["annotations"]) == len(task.annotations(result)) > 0
        for own, alone in zip(line["annotations"], task.annotations(result), strict=True):
            assert own["category_id"] == alone["category_id"] and "segmentation" in own
            assert kind == "detector" or own == alone
            assert own.get("score", 0) == pytest.approx(alone.get("score", 0), abs=1e-5)
    written = read(tmp_path / "video.mp4")
    assert [round(1000 * time) for time, _ in written] == list(TIMES)
    assert {picture.size for _, picture in written} == {(96, 2 * 58)}  # one above the other, since they are wide
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames.jsonl", "video.mp4"]


def test_with_reuse_a_frame_that_stands_costs_little(
    models: dict[str, Path], clip: Path, tmp_path: Path, command: Callable[..., Any]
):
    command("predict", models["segmenter"], clip, "--out", tmp_path, "--reuse", 0.4, "--frames", 5)
    first, frames = lines(tmp_path)
    assert first["reuse"]["threshold"] == 0.4
    assert frames[3]["computed"] > 0.2 and frames[4]["computed"] == 0  # after two that moved, one that is remembered
    assert frames[4]["gflops"] < frames[3]["gflops"]
    assert frames[4]["annotations"] == frames[3]["annotations"] == frames[2]["annotations"]


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_a_video_that_was_taken_upright_is_looked_at_upright(
    turned: int, models: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
):
    """A player turns the picture counterclockwise by the angle in the file."""
    clip = write_video(tmp_path / "clip.mp4", [corners()], turned=turned)
    command("predict", models["detector"], clip, "--out", tmp_path / "out", "--score-threshold", 1)
    (line,) = lines(tmp_path / "out")[1]
    assert (line["width"], line["height"]) == (SIZE if turned != 180 else SIZE[::-1])
    ((_, picture),) = read(tmp_path / "out" / "video.mp4")
    expected = np.asarray(Image.fromarray(corners()).rotate(turned, expand=True).resize((8, 8)))[..., 0] > 128
    width, height = line["width"], line["height"]
    box = (picture.width // 2, picture.height) if width < 1.6 * height else (picture.width, picture.height // 2)
    assert ((np.asarray(picture.crop((0, 0, *box)).resize((8, 8)))[..., 0] > 128) == expected).all()


def test_a_folder_of_frames_is_a_video_and_a_broken_one_costs_itself(
    models: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
):
    folder = image_folder(tmp_path / "frames", SIZE, SIZE, (32, 32), SIZE)
    (folder / "1.png").write_bytes(b"broken")
    options = ("--video", "--fps", 10, "--out", tmp_path / "out")
    printed = command("predict", models["segmenter"], folder, *options, status=1)
    assert "1.png" in printed.err
    _, frames = lines(tmp_path / "out")
    assert [(line["time"], line["height"]) for line in frames] == [(0, 48), (0.2, 32), (0.3, 48)]
    assert len(read(tmp_path / "out" / "video.mp4")) == 3


def test_what_is_no_video_is_said(
    models: dict[str, Path], clip: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    model, out = models["segmenter"], tmp_path / "out"
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "short.mp4").write_bytes(clip.read_bytes()[:900])
    folder = image_folder(tmp_path / "frames", (32, 32))
    for words, *args in (
        ("no video that can be read", tmp_path / "text.mp4"),
        ("cut short", tmp_path / "short.mp4"),
        ("no such file", tmp_path / "none.mp4"),
        ("no such camera", "camera:97"),
        ("leave out one", clip, "--reuse", 0.4, "--batch-size", 2),
        ("--fps", clip, "--fps", 5),
        ("--ids", clip, "--ids", tmp_path / "ids.json"),
        ("no scores", clip, "--score-threshold", 0.3),
        ("options of a video", folder, "--reuse", 0.4),
        ("exported file|only select", clip, "--reuse", 0.4, "--policy", "tome"),
    ):
        printed = command("predict", model, *args, "--out", out, status=2)
        assert any(word in printed.err for word in words.split("|")), (words, printed.err)
        assert not out.exists()
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'sievit[video]'" in command("predict", model, clip, "--out", out, status=2).err


def test_a_video_that_is_there_is_not_written_over(
    models: dict[str, Path], clip: Path, tmp_path: Path, command: Callable[..., Any]
):
    out = tmp_path / "out"
    command("predict", models["segmenter"], clip, "--out", out, "--frames", 1)
    assert "--force" in command("predict", models["segmenter"], clip, "--out", out, status=2).err
    own = out / "video.mp4"
    assert "is the video" in command("predict", models["segmenter"], own, "--out", out, "--force", status=2).err
    command("predict", models["segmenter"], clip, "--out", out, "--force")
    assert len(lines(out)[1]) == len(read(own)) == 5


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", ["killed", "signal"])
def test_a_video_has_its_name_when_it_is_whole(
    how: str, models: dict[str, Path], clip: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: Any
):
    original = Sink.picture

    def picture(self: Sink, *args: Any) -> None:
        original(self, *args)
        if self._last > 0:  # the second one
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Sink, "picture", picture)
    out = tmp_path / "out"
    if how == "killed":
        with pytest.raises(Killed):
            command("predict", models["segmenter"], clip, "--out", out)
        assert not out.exists()
        return
    assert "2 frames, which are kept" in command("predict", models["segmenter"], clip, "--out", out, status=130).err
    assert len(lines(out)[1]) == len(read(out / "video.mp4")) == 2


def test_results_are_what_supervision_takes(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    if find_spec("supervision") is None:
        pytest.skip("needs supervision")
    picture = Image.fromarray(random_pixels(0, *SIZE, 3))
    detector, segmenter = (sievit.load(models[kind]) for kind in ("detector", "segmenter"))
    found = detector.predict([picture])[0]
    boxes = found.to_supervision()
    assert len(boxes) == len(found["boxes"]) > 0
    assert (boxes.class_id == found["labels"].numpy() - 1).all() and boxes.mask.shape[1:] == SIZE
    assert boxes["class_name"][0] == detector.config.classes[boxes.class_id[0]]
    labels = segmenter.predict([picture])[0]
    masks = segmenter.to_supervision(labels)
    assert sorted(masks.class_id) == labels.unique().tolist()
    assert (masks.mask.sum(0) == 1).all()
    monkeypatch.setitem(sys.modules, "supervision", None)
    refused("sievit\\[video\\]", found.to_supervision)


def test_the_page_on_videos_runs(
    models: dict[str, Path], clip: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    page = (Path(__file__).parents[1] / "docs" / "video.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, "clip.mp4")
    image_folder(Path("frames"), SIZE, SIZE)
    for line in block.splitlines():
        _, name, _, *args = shlex.split(line)
        missing = "camera:0" in args and not Path("/dev/video0").exists()
        command(name, models["segmenter"], *args, status=2 if missing else 0)
    assert [len(lines(Path(out))[1]) for out in ("found", "reused", "from_frames")] == [5, 5, 2]

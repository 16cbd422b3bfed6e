"""Videos on the page and by REST: the answer is what `sievit predict` draws, limits are kept, and nothing is stored."""

import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.models.build import save
from sievit.serve import QUIET
from sievit.video import command as video_command
from test_serve import EARLY, GOOD, PATHS, ask, form, picture, served, service_of, until
from tiny import random_pixels

av = pytest.importorskip("av", reason="needs av")
if TYPE_CHECKING:
    from sievit.serve.rest import Service

SIZE = (48, 80)


def clip(frames: int = 5, *, size: tuple[int, int] = SIZE, fps: int = 25, kind: str = "mp4", aspect: int = 1) -> bytes:
    """A video file of noise; the last frames are the same."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "20"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for i in range(frames):
            pixels = random_pixels(min(i, 2), *size, 3) // 2 + 60
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def read(content: bytes) -> list[tuple[float, Image.Image]]:
    """Times and pictures."""
    with av.open(io.BytesIO(content)) as container:
        return [(frame.time, frame.to_image()) for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple["Service", int]]:
    """A segmenter that takes eight frames of a second, and a folder for whatever would be stored, which stays empty."""
    from sievit.serve.film import VideoLimits

    stored = tmp_path_factory.mktemp("stored")
    limits = VideoLimits(max_video_megabytes=3, max_video_frames=8, max_video_seconds=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "TMPDIR"):
            patch.setenv(name, str(stored))
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.setattr("tempfile.tempdir", str(stored))
        patch.setattr(video_command, "BOX", (96, 96))
        torch.manual_seed(0)
        with served(replace(service_of(EARLY), video=limits)) as both:
            yield both
    assert not [path for path in stored.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi"])
def test_a_video_comes_back_as_predict_writes_it(
    kind: str, segmenter: tuple["Service", int], tmp_path: Path, command: Callable[..., Any]
):
    service, port = segmenter
    sent = clip(kind=kind)
    (tmp_path / "clip.mp4").write_bytes(sent)
    save(service.runner.model, tmp_path / "model.safetensors")
    command("predict", tmp_path / "model.safetensors", tmp_path / "clip.mp4", "--out", tmp_path / "out")
    expected = read((tmp_path / "out" / "video.mp4").read_bytes())
    body, form_kind = form(sent, "video")
    for status, answer in (ask(port, "/video", sent), ask(port, "/video", body, Content_Type=form_kind)):
        found = read(answer)
        assert status == 200 and [time for time, _ in found] == [time for time, _ in expected] and len(found) == 5
        for (_, own), (_, other) in zip(found, expected, strict=True):
            assert own.size == (96, 2 * 58) and own.tobytes() == other.tobytes()


def test_the_setting_is_that_of_the_request(segmenter: tuple["Service", int]):
    service, _ = segmenter
    sent, spent = clip(), {}
    for name, setting in {
        "all": {"policy": "attention", "budget": 1},
        "few": {"policy": "attention", "budget": 0.2},
        "reused": {"policy": "attention", "budget": 1, "reuse": 0.4},
    }.items():
        made = service.film(sent, **setting)
        assert made.says.startswith("5 frames, ")
        spent[name] = made.gflops
    assert spent["few"] < spent["all"] > spent["reused"]
    assert len(read(ask(segmenter[1], "/video?reuse=0.4", sent)[1])) == 5


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n"
REFUSED = {
    "empty": (400, "has no video", "/video", b""),
    "text": (415, "no video that can be read", "/video", b"hello, world"),
    "an image": (415, "no video that can be read", "/video", GOOD),
    "cut short": (415, "cut short", "/video", clip()[:900]),
    "sound": (422, "only sound", "/video", sound()),
    "nine frames": (413, "9 frames; at most 8 are taken", "/video", clip(9)),
    "four seconds": (413, "4 seconds; at most 1 are taken", "/video", clip(5, fps=1)),
    "large frames": (413, "1280 x 800 pixels; at most 1 megapixels", "/video", clip(1, size=(800, 1280))),
    "wide pixels": (413, "at most 1 megapixels", "/video", clip(1, size=(480, 640), aspect=4)),
    "many bytes": (413, "at most 3 mb", "/video", bytes(3_000_001)),
    "more bytes": (413, "at most 3 mb", "/video", bytes(6_000_000)),
    "policy": (422, "did you mean 'attention'", "/video?policy=attentoin", clip()),
    "merging": (422, "only select", "/video?policy=tome&reuse=0.4", clip()),
    "reuse": (422, "reuse: input should be greater", "/video?reuse=-1", clip()),
    "option": (422, "dense", "/video?dense=true", clip()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_said_kindly(name: str, segmenter: tuple["Service", int]):
    status, words, path, body = REFUSED[name]
    answered, content = ask(segmenter[1], path, body)
    error = json.loads(content)["error"]
    assert answered == status and words in error.lower(), (answered, error)


def test_a_playlist_opens_no_file(segmenter: tuple["Service", int], tmp_path: Path):
    (tmp_path / "secret.ts").write_bytes(clip(kind="mpegts"))
    playlist = PLAYLIST % str(tmp_path / "secret.ts").encode()
    assert ask(segmenter[1], "/video", playlist)[0] == 415
    concatenated = f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n".encode()
    assert ask(segmenter[1], "/video", concatenated)[0] == 415


def test_what_is_damaged_is_done_in_part_or_refused(segmenter: tuple["Service", int]):
    """Bytes changed at random: an answer, or a sentence; no other error, and no path of this machine."""
    from sievit.serve.desk import Refused

    service, _ = segmenter
    random, statuses = np.random.default_rng(0), set()
    for seed in range(40):
        content = bytearray(clip(3, kind=("mp4", "avi", "matroska", "mpegts")[seed % 4]))
        for at in random.integers(0, len(content), 1 + seed):
            content[at] = random.integers(256)
        try:
            status, words = 200, service.film(bytes(content)).says
        except Refused as error:
            status, words = error.status, error.message
        statuses.add(status)
        assert not PATHS.search(words)
    assert 200 in statuses and statuses <= {200, 413, 415, 422}


def test_without_pyav_it_is_said(segmenter: tuple["Service", int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    status, answer = ask(segmenter[1], "/video", b"anything")
    assert status == 501 and "pip install 'sievit[video]'" in json.loads(answer)["error"]
    assert json.loads(ask(segmenter[1], "/predict", GOOD)[1])["width"] == 96


def test_nobody_waits_and_the_next_gets_its_turn(segmenter: tuple["Service", int], monkeypatch: pytest.MonkeyPatch):
    """A client goes away while the second of eight frames is drawn: that is the last."""
    import socket

    service, port = segmenter
    drawn, go, original = [], threading.Event(), video_command.VideoRunner.picture

    def slow(self: Any, seen: Any, **options: Any) -> Any:
        drawn.append(seen.frame.index)
        if len(drawn) == 2:
            assert go.wait(60)
        return original(self, seen, **options)

    monkeypatch.setattr(video_command.VideoRunner, "picture", slow)
    sent = clip(8)
    head = f"POST /video HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.sendall(head + sent)
        until(lambda: len(drawn) == 2)
    until(lambda: service.desk.inside == 0)
    go.set()
    assert ask(port, "/predict", GOOD)[0] == 200
    assert drawn == [0, 1]


def test_the_page_gives_a_video_back(segmenter: tuple["Service", int], tmp_path: Path):
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("needs chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    address = f"http://127.0.0.1:{segmenter[1]}/"
    for name, content in {
        "clip.mp4": clip(),
        "long.mp4": clip(9),
        "large.mp4": bytes(3_500_000),
        "good.png": picture(),
    }.items():
        (tmp_path / name).write_bytes(content)
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.set_input_files("#picker input", tmp_path / "clip.mp4")
        page.wait_for_selector("#clip video[src^=blob]")
        assert page.locator("#clip [role=status]").inner_text().startswith("5 frames, ")
        with page.expect_download() as file:
            page.click("#clip >> text=Video, MP4")
        assert file.value.suggested_filename == "found.mp4"
        first = Path(file.value.path()).read_bytes()
        assert len(read(first)) == 5
        slider = page.locator("#budget input[type=range]")
        with page.expect_response(lambda answer: "/video?budget=0.2" in answer.url):
            slider.fill("20")
            slider.dispatch_event("pointerup")
        page.wait_for_selector("#clip video[src^=blob]")
        for name, words in (("long.mp4", "at most 8 are taken"), ("large.mp4", "at most 3 MB")):
            page.set_input_files("#picker input", tmp_path / name)
            page.wait_for_selector(f"#clip [role=status]:has-text('{words}')")
        page.set_input_files("#picker input", tmp_path / "good.png")
        page.wait_for_selector("#result figure img")
        assert page.locator("#clip [role=status]").count() == 0
        chromium.close()
    assert said == []

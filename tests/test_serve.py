"""The page and the REST calls: answers are the model's, bad requests get a kind one, and nothing leaves the machine."""

import asyncio
import base64
import http.client
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from sievit.data.scenes import CLASSES
from sievit.models.build import build
from sievit.policies import DToPConfig, SViTConfig
from sievit.serve import QUIET
from sievit.serve.desk import Desk, Refused
from tiny import saved, tiny_detector, tiny_segmenter, tiny_vit

if TYPE_CHECKING:
    from sievit.serve.rest import Service
if find_spec("gradio") is None:  # imported by the tests alone: it takes seconds
    pytest.skip("needs gradio: pip install 'sievit[serve]'", allow_module_level=True)

ROOT = Path(__file__).parents[1]
PATHS = re.compile(r"/(?:tmp|root|home|work|usr|var|opt)/|site-packages|\.py\b|Traceback| at 0x")


def picture(width: int = 96, height: int = 64, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


def black_png(width: int, height: int) -> bytes:
    """All black, of one bit: its file is a thousandth of its pixels."""
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


DEEP = tiny_vit(patch_size=8, depth=12)
EARLY = tiny_segmenter(vit=DEEP, policy=DToPConfig(thresholds=(0.2,)), out_indices=(5, 8, 11))


def service_of(config: Any) -> "Service":
    from sievit.serve.rest import Service
    from sievit.serve.runner import Runner

    runner = Runner(build(config).eval())
    return Service(name="tiny", runner=runner, desk=Desk(1, 60.0), max_bytes=2_000_000, max_pixels=1_000_000)


@contextmanager
def served(service: "Service") -> Generator[tuple["Service", int]]:
    """The application on a free port."""
    from sievit.serve.page import server

    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = server(service, hosts=["127.0.0.1"], seconds=60, log_level="critical")
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not running.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield service, listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple["Service", int]]:
    """A segmenter with early exits, with the page; whatever Gradio would store goes into a folder that stays empty."""
    stored = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(stored))
        for name, value in QUIET.items():
            patch.setenv(name, value)
        torch.manual_seed(0)
        with served(service_of(EARLY)) as both:
            yield both
    assert not [path for path in stored.rglob("*") if path.is_file()]


def ask(port: int, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, bytes]:
    """Status and body of an answer, in which nothing is said about this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names, encode_chunked="Transfer-Encoding" in names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.getheader("content-type", "").startswith(("text/html", "application/json")):
        assert not PATHS.search(content.decode()), content
    return answer.status, content


def form(content: bytes, name: str = "image") -> tuple[bytes, str]:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'.encode()
    return head + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def test_a_segmenter_answers_as_predict_does(segmenter: tuple["Service", int]):
    service, port = segmenter
    image = picture()
    expected = service.runner.model.predict([Image.open(io.BytesIO(image))])[0]
    body, kind = form(image)
    for status, answer in (ask(port, "/predict?dense=true", image), ask(port, "/predict", body, Content_Type=kind)):
        found = json.loads(answer)
        labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["label_map"]))))
        assert status == 200 and torch.equal(torch.from_numpy(labels.copy()).long(), expected.long())
        assert found["classes"] == ["ground", *CLASSES] and sum(found["shares"]) == pytest.approx(1, abs=1e-3)
        assert (found["width"], found["height"], found["budget"]) == (96, 64, None) and found["policy"][
            "kind"
        ] == "dtop"
    dense = json.loads(ask(port, "/predict?dense=true", image)[1])["dense"]
    assert set(dense["keep"]) == {1.0} and sum(dense["tokens"]) > sum(found["tokens"]) and len(found["tokens"]) == 12


def test_a_detector_answers_as_predict_does():
    with served(service_of(tiny_detector(policy=SViTConfig(first_block=1, targets=(0.7,))))) as (service, port):
        image = picture()
        expected = service.runner.model.predict([Image.open(io.BytesIO(image))])[0]
        found = json.loads(ask(port, "/predict", image)[1])
        for name in ("boxes", "scores", "labels"):
            assert torch.allclose(torch.tensor(found[name]).float(), expected[name].float(), atol=1e-4)
        assert found["names"] == [CLASSES[label - 1] for label in expected["labels"]]
        for mask, other in zip(found["masks"], expected["masks"], strict=True):
            assert np.array_equal(coco_mask.decode(mask).astype(bool), other[0].numpy())
        figure = Image.open(io.BytesIO(ask(port, "/picture?budget=0.5", image)[1]))
        assert figure.format == "PNG" and figure.width > 1000


def test_a_budget_turns_the_dial_of_every_policy_that_has_one(segmenter: tuple["Service", int]):
    service, port = segmenter
    about = json.loads(ask(port, "/model", method="GET")[1])
    assert about["policies"][0] == "dtop" and {"keep_all", "attention", "random"} <= set(about["policies"])
    assert set(service.runner.dialled) == set(about["policies"]) - {"keep_all"} and "svit" not in about["policies"]
    for policy in ("dtop", "attention", "tome"):
        spent = []
        for budget in (1, 0.5, 0.1):
            status, answer = ask(port, f"/predict?policy={policy}&budget={budget}", picture())
            assert status == 200, answer
            spent.append(sum(json.loads(answer)["tokens"]))
        assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1], policy


GOOD = picture()
REFUSED = {
    "text": (415, "no image", "/predict", b"hello, world"),
    "postscript": (415, "no image", "/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "empty": (400, "has no image", "/predict", b""),
    "cut short": (422, "damaged", "/predict", GOOD[: len(GOOD) // 2]),
    "50 megapixels": (413, "50 megapixels; at most 1 are taken", "/predict", black_png(8000, 6250)),
    "a zip bomb": (413, "too many pixels", "/picture", black_png(30_000, 30_000)),
    "many bytes": (413, "at most 2 mb", "/predict", bytes(2_000_001)),
    "more bytes": (413, "at most 2 mb", "/predict", bytes(4_000_000)),
    "policy": (
        422,
        "did you mean 'attention'",
        "/predict?policy=attentoin",
        GOOD,
    ),
    "no dial": (422, "takes no budget", "/predict?policy=keep_all&budget=0.5", GOOD),
    "budget": (422, "budget: input should be less than or equal to 1", "/predict?budget=2", GOOD),
    "unknown option": (422, "bugdet", "/predict?bugdet=0.5", GOOD),
    "gradio's upload": (404, "nothing at this address", "/gradio_api/upload", GOOD),
    "gradio's files": (404, "nothing at this address", "/gradio_api/file=/etc/passwd", None),
    "gradio's proxy": (404, "nothing at this address", "/gradio_api/proxy=https://example.com", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_said_kindly(name: str, segmenter: tuple["Service", int]):
    status, words, path, body = REFUSED[name]
    answered, content = ask(segmenter[1], path, body)
    error = json.loads(content)["error"]
    assert answered == status and words in error.lower(), error


def test_forms_and_chunks_and_other_sites(segmenter: tuple["Service", int]):
    port = segmenter[1]
    body, kind = form(b"")
    assert [ask(port, "/predict", each, Content_Type=kind)[0] for each in (body, b"nonsense")] == [400, 400]
    assert ask(port, "/predict", b"nonsense", Content_Type="multipart/form-data")[0] == 400
    chunks = iter([bytes(1_000_000)] * 4)
    assert ask(port, "/predict", chunks, Transfer_Encoding="chunked")[0] == 413
    assert ask(port, "/predict", GOOD, Origin="http://127.0.0.1:1")[0] == 403
    assert ask(port, "/predict", GOOD, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(port, "/model", method="GET", Host="elsewhere.example")[0] == 400
    assert ask(port, "/predict", method="GET")[0] == 405
    assert ask(port, "/predict", GOOD, Content_Length="many")[0] == 400


@contextmanager
def held_up(service: "Service", monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[list[int], threading.Event]]:
    """The model, which begins with an image, and waits for the event."""
    begun, go, run = [], threading.Event(), service.runner.run

    def slow(image: Image.Image, **setting: Any) -> Any:
        begun.append(image.width)
        assert go.wait(60)
        return run(image, **setting)

    monkeypatch.setattr(service.runner, "run", slow)
    try:
        yield begun, go
    finally:
        go.set()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_is_served_one_waits_and_the_next_is_told_to_come_back(
    segmenter: tuple["Service", int], monkeypatch: pytest.MonkeyPatch
):
    service, port = segmenter
    answers: list[int] = []
    with held_up(service, monkeypatch) as (begun, go):
        threads = [
            threading.Thread(target=lambda w=width: answers.append(ask(port, "/predict", picture(w))[0]))
            for width in (64, 72)
        ]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda number=number: service.desk.inside == number)
        until(lambda: bool(begun))
        status, answer = ask(port, "/predict", GOOD)
        assert status == 503 and "try again in a few seconds" in json.loads(answer)["error"]
        assert ask(port, "/model", method="GET")[0] == 200 and begun == [64]
        go.set()
        for thread in threads:
            thread.join()
    assert answers == [200, 200] and begun == [64, 72]


def test_a_client_that_goes_away_is_not_served_and_blocks_nobody(
    segmenter: tuple["Service", int], monkeypatch: pytest.MonkeyPatch
):
    service, port = segmenter
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode()
    with held_up(service, monkeypatch) as (begun, go):
        first = threading.Thread(target=ask, args=(port, "/predict", picture(64)))
        first.start()
        until(lambda: bool(begun))
        for sent in (head + GOOD, head + GOOD[:100]):  # one leaves while it waits, one before its image is there
            with socket.create_connection(("127.0.0.1", port)) as leaving:
                leaving.sendall(sent)
                until(lambda: service.desk.inside == 2)
            until(lambda: service.desk.inside == 1)
        go.set()
        first.join()
        assert ask(port, "/predict", GOOD)[0] == 200
    assert begun == [64, 96]


def test_a_mistake_of_ours_is_no_traceback_in_an_answer(
    segmenter: tuple["Service", int], monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("in /root/secret.py")

    monkeypatch.setattr(segmenter[0].runner, "run", fail)
    status, answer = ask(segmenter[1], "/predict", GOOD)
    assert status == 500 and "something went wrong" in json.loads(answer)["error"]


def test_a_turn_that_does_not_come_and_a_body_that_is_too_slow():
    from sievit.serve.limits import Limits

    async def never(*_: Any) -> Any:
        await asyncio.sleep(60)

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def both() -> list[int]:
        desk, statuses = Desk(3, 0.01), []
        await desk._turn.acquire()
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        for work in (desk.serve(lambda: None), Limits(reads, max_bytes=10, seconds=0.01)(scope, never, never)):
            with pytest.raises(Refused) as refused:
                await work
            statuses.append(refused.value.status)
        return statuses

    assert asyncio.run(both()) == [503, 408]


def test_the_page_in_a_browser(segmenter: tuple["Service", int], tmp_path: Path):
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("needs chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    address = f"http://127.0.0.1:{segmenter[1]}/"
    (tmp_path / "good.png").write_bytes(GOOD)
    (tmp_path / "other.jpg").write_bytes(picture(128, 96, "JPEG"))
    (tmp_path / "bad.png").write_bytes(b"hello")
    said, elsewhere = [], []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        page.set_input_files("#picker input", [tmp_path / "good.png", tmp_path / "other.jpg"])
        page.wait_for_selector("#result figure img")
        titles = page.locator("#result figcaption b").all_inner_texts()
        assert titles == ["every token", "dtop, thresholds 0.2", "where tokens left"]
        slider = page.locator("#budget input[type=range]")
        slider.fill("20")
        slider.dispatch_event("pointerup")
        page.wait_for_selector("#result code:has-text('budget=0.2')")
        assert page.locator("#policy input").input_value() == "dtop, by budget"
        with page.expect_download() as file:
            page.click("text=Results, JSON")
        assert json.loads(Path(file.value.path()).read_text())["budget"] == 0.2
        with page.expect_download() as file:
            page.click("text=Picture, PNG")
        assert Path(file.value.path()).read_bytes()[1:4] == b"PNG"
        page.locator("#picker .thumbs button").nth(1).click()
        page.wait_for_selector("#picker button[aria-pressed=true] img[alt='other.jpg']")
        page.set_input_files("#picker input", tmp_path / "bad.png")
        page.wait_for_selector("#result .notice:has-text('no image that can be read')")
        page.goto(address + "docs")
        chromium.close()
    assert said == []
    assert all(url.startswith((address, "data:", "blob:")) for url in elsewhere), elsewhere


def test_what_the_page_of_the_documentation_says_works(
    segmenter: tuple["Service", int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(picture(kind="JPEG"))
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    page = page.replace("localhost:7860", f"127.0.0.1:{segmenter[1]}")
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    assert "/video?reuse=0.4" in lines.pop() and lines.pop(0) == "sievit serve facade_setr_dtop" and len(lines) == 4
    for line in lines:
        done = subprocess.run([*shlex.split(line), "--silent", "--fail"], capture_output=True, check=True)
        assert done.stdout or (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    found: dict[str, Any] = {}
    exec(*re.findall(r"```python\n(.*?)```", page, re.DOTALL), found)
    assert found["labels"].size == (96, 64)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_command_says_where_and_to_whom(
    host: str, warned: bool, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    import uvicorn

    asked: list[tuple[str, int]] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        asked.append(sockets[0].getsockname())

    monkeypatch.setattr(uvicorn.Server, "run", run)
    for name in QUIET:
        monkeypatch.setenv(name, "")
    model = saved(tiny_segmenter(), tmp_path / "tiny.safetensors")
    text = command("serve", model, "--host", host, "--port", 0).err
    assert f"http://{host}:{asked[0][1]}/" in text and ("whoever reaches this machine" in text) == warned


def test_a_port_that_is_taken(command: Callable[..., Any]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        printed = command("serve", "facade_svit", "--port", taken.getsockname()[1], status=2)
    assert "--port 0 takes a free one" in printed.err

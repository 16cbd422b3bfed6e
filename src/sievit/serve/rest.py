"""The application: REST calls for programs, in front of them the limits, behind them the page."""

import asyncio
import io
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from sievit import __version__
from sievit.config import ConfigError, kind_of, to_json
from sievit.data.images import FORMATS, ImageTooLarge, NotAnImage, decode_image
from sievit.serve.desk import Desk, Refused, too_large
from sievit.serve.docs import docs_page
from sievit.serve.film import Film, VideoLimits, film
from sievit.serve.limits import Limits, refusal
from sievit.serve.runner import Outcome, Runner

R = TypeVar("R")


@dataclass(frozen=True)
class Service:
    """Everything that requests share.

    Attributes:
        name: of the model, for people.
        max_bytes, max_pixels: of an image.
        video: how much of a video is taken.
    """

    name: str
    runner: Runner
    desk: Desk
    max_bytes: int
    max_pixels: int
    video: VideoLimits = VideoLimits()  # noqa: RUF009

    def outcome(self, content: bytes, **setting: Any) -> Outcome:
        """What was found in the bytes of an image file, for `Desk.serve`.

        Raises:
            Refused: they are no image that can be taken, or the setting does not fit.
        """
        try:
            return self.runner.run(self.decoded(content), **setting)
        except ConfigError as error:
            raise Refused(422, str(error)) from error

    def film(self, content: bytes, **setting: Any) -> Film:
        """As `outcome`, of a video file."""
        return film(self.runner, content, self.video, max_pixels=self.max_pixels, **setting)

    def decoded(self, content: bytes) -> Image.Image:
        """
        Raises:
            Refused: they are no image that can be taken.
        """
        if not content:
            raise Refused(400, "the request has no image; send its bytes as the body, or as a file of a form")
        if len(content) > self.max_bytes:
            raise too_large(self.max_bytes)
        try:
            return decode_image(content, max_pixels=self.max_pixels)
        except ConfigError as error:
            status = {NotAnImage: 415, ImageTooLarge: 413}.get(type(error), 422)
            raise Refused(status, str(error)) from error

    def about(self) -> dict[str, Any]:
        """The model, for programs."""
        config = self.runner.model.config
        return {
            "model": self.name,
            "task": kind_of(config),
            "classes": list(config.classes),
            "policies": list(self.runner.policies),
            "formats": list(FORMATS),
            "max_megabytes": self.max_bytes / 1e6,
            "max_megapixels": self.max_pixels / 1e6,
            "video": to_json(self.video) if find_spec("av") else None,
            "version": __version__,
        }


class _Policy(BaseModel):
    """What tokens are computed, by the options behind the question mark of an address."""

    model_config = ConfigDict(extra="forbid")
    policy: Annotated[str | None, Field(description="One of /model's policies; by default the model's own.")] = None
    budget: Annotated[
        float | None,
        Field(ge=0, le=1, description="From 1, every token, to 0, hardly any; by default the policy's own setting."),
    ] = None


class Setting(_Policy):
    """The options of a request with an image."""

    dense: Annotated[bool, Field(description="Also run with every token, to compare.")] = False


class VideoSetting(_Policy):
    """The options of a request with a video."""

    reuse: Annotated[
        float | None,
        Field(ge=0, description="Compute again only what changed by more than this; 0.4 is a good start."),
    ] = None


class Error(BaseModel):
    """Why there is no answer."""

    error: str


STATUSES = {
    400: "no file in the request",
    408: "the file arrived too slowly",
    413: "too many bytes or pixels, or a video that is too long",
    415: "no image or video of a known format",
    422: "a damaged file, or options that do not fit",
    501: "a video, and PyAV is not installed",
    503: "others are being served; try again after the seconds of Retry-After",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _body(kind: str) -> dict[str, Any]:
    """The body of a request in OpenAPI: the bytes of a file, or a form with it."""
    form = {"schema": {"type": "object", "properties": {kind: _BINARY["schema"]}, "required": [kind]}}
    return {"requestBody": {"required": True, "content": {f"{kind}/*": _BINARY, "multipart/form-data": form}}}


def application(service: Service, *, hosts: list[str] | None = None, seconds: float = 30) -> FastAPI:
    """The REST calls and their limits.

    Args:
        hosts: names of this machine that requests may address; None for any.
        seconds: that the body of a request may take.
    """
    app = FastAPI(title="sievit", version=__version__, docs_url=None, redoc_url=None)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": words} for status, words in STATUSES.items()
    }

    @app.post("/predict", openapi_extra=_body("image"), responses=refused, response_class=JSONResponse)
    async def predict(request: Request, setting: Annotated[Setting, Query()]) -> Response:
        """What the model finds in an image, and what that took.

        The answer has `width`, `height` and the `policy`; of a detector `boxes` (xyxy, in pixels), `labels` (from 1),
        `names`, `scores` and `masks` (COCO's compressed RLE); of a segmenter `labels` (a PNG in base64 whose values
        are classes), `classes` and `shares`; then `gflops` (1e9 multiply-adds), `ms`, and by block `tokens` and `keep`,
        the number and share of the tokens that were computed. With `dense` the same figures for all tokens.
        """
        options = setting.model_dump()

        def found(content: bytes) -> bytes:
            return json.dumps(service.outcome(content, **options).to_json()).encode()

        return Response(await _served(service, request, found), media_type="application/json")

    @app.post("/picture", openapi_extra=_body("image"), responses=refused, response_class=Response)
    async def picture(request: Request, setting: Annotated[Setting, Query()]) -> Response:
        """The same as a picture, a PNG: the image, what was found in it, and which tokens were computed."""
        options = setting.model_dump()
        drawn = await _served(service, request, lambda content: png(service.outcome(content, **options).figure()))
        return Response(drawn, media_type="image/png")

    @app.post("/video", openapi_extra=_body("video"), responses=refused, response_class=Response)
    async def video(request: Request, setting: Annotated[VideoSetting, Query()]) -> Response:
        """The frames of a video, with what was found in them and which tokens were computed, as an MP4 file.

        The header `Sievit-Video` says how many frames there are and what each took.
        """
        gone = threading.Event()
        options = {**setting.model_dump(), "gone": gone.is_set}
        try:
            made = await _served(service, request, lambda content: service.film(content, **options))
        finally:
            gone.set()
        return Response(made.content, media_type="video/mp4", headers={"Sievit-Video": made.says})

    @app.get("/model", response_class=JSONResponse)
    async def model() -> Response:
        """The name of the model, its task, classes and policies, and what the server takes."""
        return JSONResponse(service.about())

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url)))

    _with_refusals(app)
    other = {"/video": service.video.max_bytes}
    app.add_middleware(Limits, max_bytes=service.max_bytes, seconds=seconds, other=other)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return app


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


async def _served(service: Service, request: Request, work: Callable[[bytes], R]) -> R:
    """What some work makes of the file of a request, in the thread of the model."""
    with service.desk.place():
        content = await _content(request)
        return await _unless_gone(request, service.desk.serve(lambda: work(content)))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of some work, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.1))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()


class _InMemory(MultiPartParser):
    spool_max_size = 2**31
    """Bytes of a file that are kept in memory before it goes to the disk; `Limits` takes fewer."""


async def _content(request: Request) -> bytes:
    """The bytes of the file: the body as it stands, or the file of a form. They stay in memory.

    Raises:
        Refused: a form without a file.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    form = await _InMemory(request.headers, request.stream(), max_files=1, max_fields=4).parse()
    try:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        return await files[0].read() if files else b""
    finally:
        await form.close()


def _with_refusals(app: FastAPI) -> None:
    """Every error as JSON with one plain sentence; what is a mistake of ours is told to the log alone."""

    def answer(status: int, message: str) -> Response:
        return refusal(Refused(status, message))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(MultiPartException)
    async def malformed(request: Request, error: MultiPartException) -> Response:
        return answer(400, "the form is malformed; it takes one file")

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return answer(499, "the client has gone")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = error.errors()[0]
        return answer(422, f"{wrong['loc'][-1]}: {wrong['msg'].lower()}; /docs lists the options")

    @app.exception_handler(HTTPException)
    async def usual(request: Request, error: HTTPException) -> Response:
        return answer(error.status_code, f"{error.detail}; /docs says what there is")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(500, "something went wrong here; the server's own window says what")

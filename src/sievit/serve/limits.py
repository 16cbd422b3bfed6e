"""What stands in front of the whole application: which addresses there are, and how much is taken how slowly."""

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sievit.serve.desk import Refused, too_large

POST = ("/predict", "/picture", "/video")
GET = ("/", "/model", "/docs", "/openapi.json")
GRADIO = (
    "/assets/", "/static/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/info",
    "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/startup-events", "/gradio_api/cancel",
    "/gradio_api/reset", "/gradio_api/app_id",
)  # fmt: skip
"""What the page needs of Gradio: nothing that stores a file, reads one, or fetches something from elsewhere."""
OVERHEAD = 65536
"""Bytes of a request beside those of the image."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""With the first a browser lets the page talk to this server alone."""


def refusal(error: Refused) -> JSONResponse:
    return JSONResponse({"error": error.message}, error.status, error.headers)


class Limits:
    """Refuses other addresses, requests that pages of other sites send, and bodies that are too large or too slow.

    Args:
        max_bytes: of an image; a body may be as long as base64 makes one.
        seconds: that a body may take.
        other: max_bytes by path, where it is another.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, seconds: float, other: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.app, self.max_bytes, self.seconds, self.other = app, max_bytes, seconds, other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        most = self.other.get(scope["path"], self.max_bytes)
        try:
            self._check(scope["path"], scope["method"], headers, most)
        except Refused as error:
            await refusal(error)(scope, receive, sent)
        else:
            await self.app(scope, self._limited(receive, most), sent)

    def _check(self, path: str, method: str, headers: Headers, most: int) -> None:
        if path not in POST + GET and not path.startswith(GRADIO):
            raise Refused(404, "there is nothing at this address; /docs says what there is")
        if path in POST and method != "POST":
            raise Refused(405, f"{path} takes a file, by POST; /docs says how", Allow="POST")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refused(403, "requests of pages of other sites are not answered")
        if int(headers.get("content-length", "0")) > _longest(most):
            raise too_large(most)

    def _limited(self, receive: Receive, most: int) -> Receive:
        received, done, until = 0, False, asyncio.get_running_loop().time() + self.seconds

        async def limited() -> Message:
            nonlocal received, done
            if done:  # what is left to come is that the client goes away
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                done = True
                raise Refused(408, f"the file did not arrive within {self.seconds:g} seconds") from error
            received += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if received > _longest(most):
                raise too_large(most)
            return message

        return limited


def _longest(most: int) -> int:
    """Bytes of the body of a request with a file of so many."""
    return most * 4 // 3 + OVERHEAD

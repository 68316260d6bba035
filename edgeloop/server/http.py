"""HTTP around the routes: errors in OpenAI's shape, the key, the size of bodies, streams of events."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeloop.errors import LoopError
from edgeloop.server.engine import Engine, Job
from edgeloop.server.errors import RequestError, Stopped

# nothing of another origin is loaded or shown, and no file is taken for another kind
SECURITY_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
]

logger = logging.getLogger(__name__)


def error_json(problem: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body for an error."""
    if isinstance(problem, LoopError):
        problem = RequestError(str(problem), status=422, param="loop", code="invalid_loop")
    if isinstance(problem, UnicodeEncodeError):
        problem = RequestError("a text is not Unicode: it holds half of a surrogate pair")
    if not isinstance(problem, RequestError):
        problem = RequestError("the server failed; its log says more", status=500)
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    body = {"message": str(problem), "type": kind, "param": problem.param, "code": problem.code}
    return problem.status, {"error": body}


def error_response(problem: Exception) -> Response:
    status, body = error_json(problem)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(body, status, headers)


class Guard:
    """ASGI middleware: asks for the key except for `/health` and the page, bounds bodies, adds headers."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body: int):
        self._app = app
        self._wanted = f"Bearer {api_key}".encode() if api_key else None
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        size = 0

        async def receive_bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, self._too_large())
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *SECURITY_HEADERS]}
            await send(message)

        app = self._app
        length = headers.get(b"content-length", b"0")
        if not self._may_pass(scope["path"], headers.get(b"authorization", b"")):
            problem = RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")
            app = error_response(problem)
        elif not length.isdigit() or int(length) > self._max_body:
            app = error_response(RequestError(self._too_large(), status=413))
        await app(scope, receive_bounded, send_with_headers)

    def _may_pass(self, path: str, given: bytes) -> bool:
        if self._wanted is None or path in ("/", "/health") or path.startswith("/web/"):
            return True
        return hmac.compare_digest(given, self._wanted)

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body} bytes"


@asynccontextmanager
async def watched(engine: Engine, job: Job, receive: Receive) -> AsyncIterator[None]:
    """Meanwhile a job is cancelled as soon as its client closes the connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        engine.cancel(job)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """Server-sent events. The job behind them ends when the client goes or does not read for `patience` seconds."""

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, job: Job, chunks: AsyncIterator[dict[str, Any]], patience: float):
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._engine, self._job, self._chunks, self._patience = engine, job, chunks, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with watched(self._engine, self._job, receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for event in self._events():
                    with anyio.fail_after(self._patience):
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            logger.warning("a client did not read for %g s; its answer was stopped", self._patience)
        finally:
            self._engine.cancel(self._job)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield _event(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))
        except Stopped:
            return
        except Exception as problem:  # the status was sent long ago
            yield _event(json.dumps(error_json(problem)[1]))
        yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()

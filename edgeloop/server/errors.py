"""What a request can fail with."""

from __future__ import annotations

from edgeloop.errors import EdgeloopError


class RequestError(EdgeloopError):
    """A request that cannot be answered, in the terms of OpenAI's errors."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class Stopped(Exception):
    """The client has gone or the server is stopping."""

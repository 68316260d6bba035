"""A port to listen on, and uvicorn, ended in a way that suits one busy model."""

from __future__ import annotations

import errno
import socket

import uvicorn
from fastapi import FastAPI

from edgeloop.errors import EdgeloopError
from edgeloop.server.engine import Engine

BACKLOG = 2048  # connections that wait to be accepted
CLOSE_SECONDS = 3  # that connections and the model get to end


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises EdgeloopError when the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise EdgeloopError(f"port {port} of {host} is in use; choose another with --port") from None
        raise EdgeloopError(f"cannot listen on {host} port {port}: {problem.strerror or problem}") from None


class Server(uvicorn.Server):
    """Serves an application on a listening socket until Ctrl-C or SIGTERM, then ends running answers at their next token."""

    def __init__(self, app: FastAPI, engine: Engine, access_log: bool = False):
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", log_config=None, access_log=access_log, timeout_graceful_shutdown=CLOSE_SECONDS
            )
        )
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()
        await super().shutdown(sockets)

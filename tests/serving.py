"""A real server on loopback, in a thread of this process."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import Any, Iterator

import httpx

from edgeloop.server.app import create_app
from edgeloop.server.engine import Engine
from edgeloop.server.model import ServerLlama
from edgeloop.server.run import Server, listen

KEPT_BY_KERNEL = 4096  # bytes of an answer that a client does not read; little, so that tests see the rest pile up


class Running:
    """A server that runs; `client` talks to it."""

    def __init__(self, engine: Engine, port: int, **headers: str):
        self.engine = engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=300)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def metric(self, name: str) -> float:
        """The sum over its labels, but for a filter such as `requests_total{...outcome="stopped"`."""
        name, _, label = name.partition("{")
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"edgeloop_{name}") and label in line)

    def raw(self, path: str, body: bytes, receive_buffer: int | None = None) -> socket.socket:
        """A connection that has sent its request and not read anything."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(("127.0.0.1", self.port))
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        return sock


@contextmanager
def running(path: str, *, n_ctx: int = 256, loop: str = "off", name: str = "tiny", **options: Any) -> Iterator[Running]:
    llm = ServerLlama(str(path), loop=loop, n_ctx=n_ctx, n_threads=1, n_threads_batch=1)
    engine = Engine(llm)
    with listen("127.0.0.1", 0) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KEPT_BY_KERNEL)
        server = Server(create_app(engine, name=name, **options), engine)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield Running(engine, sock.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive() and engine.close(30)
            llm.close()

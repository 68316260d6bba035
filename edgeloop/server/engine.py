"""The one thread that owns the model, and the queue in front of it: first come, first served. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from edgeloop import log
from edgeloop.aio import StopFlag
from edgeloop.errors import LoopError
from edgeloop.loop import Loop
from edgeloop.server.errors import RequestError, Stopped
from edgeloop.server.model import ServerLlama

MAX_WAITING = 1000  # requests
MAX_UNREAD = 64  # pieces of an answer between the model and the socket

logger = logging.getLogger(__name__)


@dataclass
class Usage:
    """What one request used. Filled while it is worked on, so that it is right for one that was stopped, too."""

    prompt_tokens: int = 0
    evaluated_tokens: int = 0  # of the prompt; the others were known from the request before
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0


Work = Callable[[ServerLlama, Usage], Generator[Any, None, None]]


class Job:
    """A request on its way through the engine. `work` runs in the engine's thread, the rest in the event loop's."""

    def __init__(self, work: Work, loop: Loop):
        self.loop = loop
        self.usage = Usage()
        self._work = work
        self._event_loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Any] = asyncio.Queue()
        self._room = threading.Semaphore(MAX_UNREAD)
        self._flag = StopFlag()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """The pieces of the answer. Raises what the work raised, Stopped after `cancel`."""
        while (piece := await self._pieces.get()) is not None:
            self._room.release()
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Ends the work, amid a batch where the backend can; does nothing once it is done."""
        self._flag.set()
        self._room.release()

    def is_cancelled(self) -> bool:
        return bool(self._flag)

    def run(self, llm: ServerLlama) -> None:
        """Does the work and waits where its reader is slow."""
        with llm.stopped_by(self._flag), closing(self._work(llm, self.usage)) as pieces:
            # not put back afterwards: the next request with the same loop reuses what is evaluated
            llm.use(self.loop)
            for piece in pieces:
                self._room.acquire()
                self._flag.check()
                self.put(piece)

    def put(self, piece: Any) -> None:
        try:
            self._event_loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the event loop is closed, nobody waits
            self._flag.set()


class Busy(RequestError):
    def __init__(self, message: str):
        super().__init__(message, status=503, code="busy")


class Engine:
    """Runs jobs on a model, one after another, and counts.

    The model belongs to the engine's thread until `close`.
    """

    def __init__(self, llm: ServerLlama):
        self.llm = llm
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that reached the model, by how they ended", "outcome")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were evaluated")
        self._generated_tokens = self._counter("generated_tokens", "Tokens that were generated")
        self._prompt_seconds = self._counter("prompt_seconds", "Time spent on prompts")
        self._generation_seconds = self._counter("generation_seconds", "Time spent on generation")
        self._waiting: dict[Job, None] = {}
        self._running: Job | None = None
        self._gauge("waiting_requests", "Requests in the queue", lambda: len(self._waiting))
        self._gauge("busy", "1 while the model works, else 0", lambda: self._running is not None)
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="edgeloop-engine", daemon=True)
        self._thread.start()

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"edgeloop_{name}", about, ["loop", *labels], registry=self.registry)

    def _gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(f"edgeloop_{name}", about, registry=self.registry).set_function(value)

    def submit(self, work: Work, loop: Loop) -> Job:
        """Puts a request into the queue. Raises Busy when it is full or the engine is closed."""
        if self._closed:
            raise Busy("the server is stopping")
        if len(self._waiting) >= MAX_WAITING:
            raise Busy(f"{MAX_WAITING} requests are waiting already; try again later")
        job = Job(work, loop)
        self._waiting[job] = None
        self._queue.put(job)
        return job

    def cancel(self, job: Job) -> None:
        self._waiting.pop(job, None)
        job.cancel()

    def stop(self) -> None:
        """Ends all requests at their next token and takes no more."""
        self._closed = True
        for job in [*self._waiting, self._running]:
            if job:
                job.cancel()

    def close(self, timeout: float | None = None) -> bool:
        """Stops, and waits for the thread; False when it is still in a batch after `timeout` seconds."""
        self.stop()
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while job := self._queue.get():
            self._running = job
            self._waiting.pop(job, None)
            outcome, end = self._run(job)
            self._running = None
            self._count(job, outcome)
            job.put(end)

    def _run(self, job: Job) -> tuple[str, Exception | None]:
        try:
            with log.collect_errors() as said:
                job.run(self.llm)
        except Exception as problem:
            if job.is_cancelled():  # whatever that broke
                return "stopped", Busy("the server is stopping") if self._closed else Stopped()
            if isinstance(problem, (RequestError, LoopError, UnicodeEncodeError)):
                return "refused", problem
            logger.exception("a request failed; llama.cpp said: %s", "; ".join(said) or "nothing")
            self.llm.reset()  # what was evaluated is not certain
            return "failed", RequestError(f"the engine failed: {problem}", status=500, code="engine_failed")
        return "answered", None

    def _count(self, job: Job, outcome: str) -> None:
        loop, used = "on" if job.loop else "off", job.usage
        self._requests.labels(loop, outcome).inc()
        self._prompt_tokens.labels(loop).inc(used.evaluated_tokens)
        self._generated_tokens.labels(loop).inc(used.generated_tokens)
        self._prompt_seconds.labels(loop).inc(used.prompt_seconds)
        self._generation_seconds.labels(loop).inc(used.generation_seconds)

"""`AsyncLlama`: edgeloop.Llama for asyncio, so that no window and no server waits for the model.

    async with edgeloop.AsyncLlama("model.gguf", loop="12-20x3") as llm:
        async for piece in llm.chat([{"role": "user", "content": "Hello"}], max_tokens=200):
            print(piece, end="", flush=True)
        answer = await llm.create_chat_completion(messages, loop="off")

Threads. Every AsyncLlama has one compute thread, which loads the model, answers the requests one after another in the
order in which they were first awaited, and frees the model; besides it llama.cpp computes with `n_threads`. Nothing
else touches the model: what is not offered here is called through `run`. The methods belong to the thread of an event
loop, also to different ones in turn. Several AsyncLlama are independent.

Stopping. A request stops when its task is cancelled, its `async for` is left, its stream closed, or the model closed:
before the next token, and amid a prompt or a token at the next operation on backends that can be interrupted (CPU,
Metal), elsewhere after the batch in work. The whole batches until then are kept for the next prompt that begins alike.

It prints nothing and uses no network. A stream is at most `buffer` pieces ahead of its reader; then the compute thread
waits, and with it all requests behind, so read streams to their end or leave them.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from typing import Any, AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence, TypeVar

import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library
from llama_cpp._ggml import libggml_base_path

from edgeloop import log
from edgeloop.errors import EdgeloopError
from edgeloop.generate import Generation
from edgeloop.llama import Llama
from edgeloop.loop import Loop

BUFFER = 64  # pieces that a stream may be ahead of its reader

T = TypeVar("T")
Messages = list[dict[str, Any]]


class AsyncLlama:
    """A model whose requests are awaited; see the module for threads and stopping.

    Args:
        model_path: a GGUF file.
        loop: the loop of every request that names no other; as for `Llama`.
        buffer: pieces that a stream may be ahead of its reader.
        **options: everything else that `Llama` takes.

    Entering it (or `open`) raises what `Llama(...)` raises.
    """

    def __init__(
        self, model_path: str | os.PathLike, *, loop: str | Loop | None = "off", buffer: int = BUFFER, **options: Any
    ):
        self._path = os.fspath(model_path)
        self._options = options
        self._buffer = buffer
        self._loop = Loop.parse(loop)
        self._llm: StoppableLlama | None = None
        self._requests: set[_Request] = set()

    async def __aenter__(self) -> AsyncLlama:
        await self.open()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.close()

    async def open(self) -> None:
        """Load the model."""
        if self._llm:
            raise EdgeloopError(f"{self._path}: is open already")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edgeloop")
        load = self._thread.submit(StoppableLlama, self._path, loop=self._loop, **self._options)
        self._llm = await asyncio.wrap_future(load)
        self._loop = self._llm.loop

    async def close(self) -> None:
        """Stop what runs, refuse what waits, free the model; returns when the compute thread is done with it."""
        llm, self._llm = self._llm, None
        if not llm:
            return
        for request in self._requests:
            request.stop()
        try:
            await asyncio.wrap_future(self._thread.submit(llm.close))
        finally:
            self._thread.shutdown(wait=False)

    @property
    def n_layer(self) -> int:
        """The number of layers of the model."""
        return self._opened().n_layer

    @property
    def loop(self) -> Loop:
        """The loop of requests that name no other. Assign a spec, a Loop or None; requests that wait already keep theirs."""
        return self._loop

    @loop.setter
    def loop(self, spec: str | Loop | None) -> None:
        self._loop = self._opened().resolve(spec)

    def chat(
        self, messages: Messages, *, loop: str | Loop | None = None, max_tokens: int = -1, **sampling: Any
    ) -> AsyncIterator[str]:
        """The answer to chat messages, piece by piece.

        Args:
            max_tokens: -1 for no limit but the context.
            **sampling: temperature, top_p and what else `Llama.create_chat_completion` takes.

        Raises LoopError for a wrong loop; edgeloop.generate.ContextFull, when it is read, for messages that do not fit the context.
        """
        return self._stream(loop, lambda llm: iter(Generation(llm, messages, max_tokens=max_tokens, **sampling)))

    async def create_chat_completion(
        self, messages: Messages, *, loop: str | Loop | None = None, stream: bool = False, **options: Any
    ) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
        """What `Llama.create_chat_completion` returns; with stream=True its chunks as an async iterator."""
        return await self._create(Llama.create_chat_completion, messages, loop, stream, options)

    async def create_completion(
        self, prompt: str | list[int], *, loop: str | Loop | None = None, stream: bool = False, **options: Any
    ) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
        """What `Llama.create_completion` returns; with stream=True its chunks as an async iterator."""
        return await self._create(Llama.create_completion, prompt, loop, stream, options)

    async def embed(self, text: str | list[str], *, loop: str | Loop | None = None, **options: Any) -> list:
        """What `Llama.embed` returns; the model must have been given embedding=True."""
        return await self._call(loop, lambda llm: llm.embed(text, **options))

    async def run(self, function: Callable[[Llama], T]) -> T:
        """Call `function` with the model in the compute thread, when it is its turn; what it returns.

        The model has the loop of the request before.
        """
        return await self._call(_KEEP, function)

    async def _create(self, create: Callable, prompt: Any, loop: str | Loop | None, stream: bool, options: dict):
        if stream:
            return self._stream(loop, lambda llm: create(llm, prompt, stream=True, **options))
        return await self._call(loop, lambda llm: create(llm, prompt, **options))

    async def _call(self, spec: Any, function: Callable[[Llama], T]) -> T:
        async with aclosing(self._stream(spec, lambda llm: iter([function(llm)]))) as results:
            return await anext(results)

    def _stream(self, spec: Any, make: Callable[[Llama], Iterator[T]]) -> AsyncGenerator[T, None]:
        llm = self._opened()
        return self._items(self._loop if spec is None else spec if spec is _KEEP else llm.resolve(spec), make)

    async def _items(self, loop: Any, make: Callable[[Llama], Iterator[T]]) -> AsyncGenerator[T, None]:
        llm = self._opened()
        request = _Request(make, loop, self._buffer)
        self._requests.add(request)
        try:
            self._thread.submit(request.serve, llm)
            while (item := await request.get()) is not _END:
                yield item
        finally:
            request.stop()
            self._requests.discard(request)

    def _opened(self) -> StoppableLlama:
        if not self._llm:
            raise EdgeloopError(f"{self._path}: is not open; use `async with` or await open() first")
        return self._llm


_END = object()
_KEEP = object()  # instead of a loop: the one that is set


class _Stopped(Exception):
    """Ends a request in the compute thread."""


class _Request:
    """One call: served in the compute thread, read in the event loop."""

    def __init__(self, make: Callable[[Llama], Iterator], loop: Any, buffer: int):
        self._make = make
        self._loop = loop
        self._flag = StopFlag()
        self._room = threading.Semaphore(buffer)
        self._queue: asyncio.Queue = asyncio.Queue()
        self._reader = asyncio.get_running_loop()

    async def get(self) -> Any:
        item, error = await self._queue.get()
        self._room.release()
        if error:
            raise error
        return item

    def stop(self) -> None:
        self._flag.set()
        self._room.release()  # for a compute thread that waits in serve

    def serve(self, llm: StoppableLlama) -> None:
        """In the compute thread: make the items and send them."""
        try:
            with log.collect_errors(), llm.stopped_by(self._flag):
                if self._loop is not _KEEP:
                    llm.loop = self._loop
                for item in self._make(llm):
                    self._room.acquire()
                    self._flag.check()
                    self._send(item)
            self._send(_END)
        except BaseException as error:
            # a reader that did not stop it is still there
            self._send(
                None, EdgeloopError("the model was closed before the answer was complete") if self._flag else error
            )

    def _send(self, item: Any, error: BaseException | None = None) -> None:
        with suppress(RuntimeError):  # the event loop was closed: nobody reads
            self._reader.call_soon_threadsafe(self._queue.put_nowait, (item, error))


class StoppableLlama(Llama):
    """A Llama that another thread can stop through a flag; what it was doing then fails, with one error or another.

    Half a batch harms nothing: llama.cpp forgets it, and llama-cpp-python starts again where a memory cannot go back.
    """

    _flag: StopFlag | None = None

    @contextmanager
    def stopped_by(self, flag: StopFlag) -> Iterator[None]:
        flag.check()
        self._flag = flag
        llama_cpp.llama_set_abort_callback(self.ctx, flag.callback, flag.address)
        try:
            yield
        finally:
            self._flag = None
            llama_cpp.llama_set_abort_callback(self.ctx, llama_cpp.ggml_abort_callback(), None)

    def eval(self, tokens: Sequence[int]) -> None:
        if self._flag:
            raise _Stopped
        try:
            super().eval(tokens)
        except RuntimeError:
            self._requires_eval = True  # the logits of what was evaluated before are gone
            raise

    def embed(self, *args: Any, **kwargs: Any) -> list:
        self.reset()  # it clears the memory: no prompt is there any more, also if it is stopped
        return super().embed(*args, **kwargs)

    def resolve(self, spec: str | Loop | None) -> Loop:
        """A loop in layers of this model; in any thread."""
        return self._resolve(spec)


class _ggml_init_params(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_ggml = load_shared_library("ggml-base", libggml_base_path)
_ggml.ggml_init.restype, _ggml.ggml_init.argtypes = ctypes.c_void_p, [_ggml_init_params]
_ggml.ggml_free.restype, _ggml.ggml_free.argtypes = None, [ctypes.c_void_p]
_ggml.ggml_get_no_alloc.restype, _ggml.ggml_get_no_alloc.argtypes = ctypes.c_bool, [ctypes.c_void_p]
_ggml.ggml_set_no_alloc.restype, _ggml.ggml_set_no_alloc.argtypes = None, [ctypes.c_void_p, ctypes.c_bool]


class StopFlag:
    """A flag that llama.cpp reads before every operation without waiting for Python's interpreter lock.

    A callback in Python would have to wait for it hundreds of times a token, 5 ms each while another thread is busy. ggml
    has a getter with the signature of the callback, and its setter, for a context's "no_alloc"; an empty one has no other use for that.
    """

    callback = ctypes.cast(_ggml.ggml_get_no_alloc, llama_cpp.ggml_abort_callback)

    def __init__(self) -> None:
        self.address = _ggml.ggml_init(_ggml_init_params())

    def __del__(self) -> None:
        _ggml.ggml_free(self.address)

    def __bool__(self) -> bool:
        return _ggml.ggml_get_no_alloc(self.address)

    def set(self) -> None:
        _ggml.ggml_set_no_alloc(self.address, True)

    def check(self) -> None:
        if self:
            raise _Stopped

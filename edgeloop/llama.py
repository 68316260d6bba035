"""`Llama`: llama_cpp.Llama with a loop that can be changed at any time without reloading weights."""

from __future__ import annotations

import os
import zlib
from contextlib import ExitStack, contextmanager
from typing import Any, Generator, Iterator, Sequence

import llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from edgeloop import log, native, recipes
from edgeloop.errors import LoopError, ModelError
from edgeloop.gguf_file import check_magic
from edgeloop.loop import OFF, Loop


class Llama(llama_cpp.Llama):
    """A `llama_cpp.Llama` whose spans of layers may be applied more than once.

    Args:
        model_path: a GGUF file.
        loop: a loop spec such as "12-20x3" (see edgeloop.loop), "off", "auto" (see edgeloop.recipes), or a Loop.
        **kwargs: everything that `llama_cpp.Llama` takes. `verbose` is False by default.

    Raises:
        ModelError: the file is missing, truncated or not a GGUF model.
        LoopError: the spec is wrong or the model cannot be looped.

    With loop="off" it gives the tokens of `llama_cpp.Llama`. Not thread-safe, as its base; several of them are independent.
    """

    def __init__(self, model_path: str, *, loop: str | Loop | None = "off", verbose: bool = False, **kwargs: Any):
        self._stack = ExitStack()  # the base closes it even when it was never set up
        wanted = Loop.parse(loop)
        check_magic(model_path)
        self._loop = OFF
        self._phase: str | None = None  # set while generate() runs
        with log.collect_errors() as errors:
            try:
                super().__init__(os.fspath(model_path), verbose=verbose, **kwargs)
            except ValueError as error:
                raise ModelError(f"{model_path}: {errors[-1] if errors else error}") from error
        native.set_loop(self.ctx, [])  # the argument counts, not LLAMA_LOOP
        self.loop = wanted

    @property
    def n_layer(self) -> int:
        """The number of layers of the model."""
        return llama_cpp.llama_model_n_layer(self.model)

    @property
    def loop(self) -> Loop:
        """The loop that is set, in layers of this model. Assign a spec, a Loop or None to change it.

        A change forgets the evaluated prompt: keys and values made under one loop are never used under another.
        """
        return self._loop

    @loop.setter
    def loop(self, spec: str | Loop | None) -> None:
        loop = self._resolve(spec)
        if loop == self._loop:
            return
        try:
            native.set_loop(self.ctx, **native_arguments(loop))
        except native.NativeLoopError as error:
            raise LoopError(str(error)) from error
        self._loop = loop
        self.reset()
        memory = llama_cpp.llama_get_memory(self.ctx)
        if memory:
            llama_cpp.llama_memory_clear(memory, False)

    def _resolve(self, spec: str | Loop | None) -> Loop:
        loop = Loop.parse(spec)
        return (recipes.choose(self.metadata).loop if loop.is_auto else loop).resolve(self.n_layer)

    @contextmanager
    def looped(self, spec: str | Loop | None) -> Iterator[Llama]:
        """`with llm.looped("12-20x4"):` sets a loop and puts the old one back at the end."""
        before = self._loop
        self.loop = spec
        try:
            yield self
        finally:
            self.loop = before

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval`; several tokens, or any before the first generated one, are a prompt for the loop's scope."""
        native.set_phase(self.ctx, self._phase or ("gen" if len(tokens) == 1 else "prompt"))
        super().eval(tokens)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate`; drafted tokens are generated ones for the loop's scope."""
        steps = super().generate(tokens, *args, **kwargs)
        self._phase = "prompt"
        try:
            token = next(steps, None)
            self._phase = "gen"
            while token is not None:
                more = yield token
                try:
                    token = steps.send(more)
                except StopIteration:
                    return
        finally:
            self._phase = None
            steps.close()

    def loop_memory_size(self) -> int:
        """Bytes that the loop holds beyond the plain model's: keys and values with kv=own, recurrent states always."""
        return native.loop_memory_size(self.ctx)

    def create_completion(self, *args: Any, loop: str | Loop | None = None, **kwargs: Any):
        """`llama_cpp.Llama.create_completion`, under `loop` if one is given."""
        return self._under(loop, super().create_completion, args, kwargs)

    def create_chat_completion(self, *args: Any, loop: str | Loop | None = None, **kwargs: Any):
        """`llama_cpp.Llama.create_chat_completion`, under `loop` if one is given."""
        return self._under(loop, super().create_chat_completion, args, kwargs)

    def __call__(self, *args: Any, loop: str | Loop | None = None, **kwargs: Any):
        """`create_completion`."""
        return self.create_completion(*args, loop=loop, **kwargs)

    def _under(self, spec: str | Loop | None, create, args, kwargs):
        if spec is None:
            return create(*args, **kwargs)
        loop = self._resolve(spec)  # a wrong spec fails here, not at the first token
        if kwargs.get("stream"):
            return self._stream_under(loop, create, args, kwargs)
        with self.looped(loop):
            return create(*args, **kwargs)

    def _stream_under(self, loop: Loop, create, args, kwargs):
        with self.looped(loop):
            yield from create(*args, **kwargs)

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """A cache of states; one that was made under another loop is not found."""
        super().set_cache(cache if cache is None else _LoopCache(cache, self))

    def save_state(self):
        state = super().save_state()
        state.loop = str(self._loop)
        return state

    def load_state(self, state) -> None:
        """Raises LoopError when the state was saved under another loop."""
        saved = getattr(state, "loop", "off")
        if saved != str(self._loop):
            raise LoopError(
                f"the state was saved with loop '{saved}', this model has '{self._loop}'; set that loop first"
            )
        super().load_state(state)


def native_arguments(loop: Loop) -> dict[str, Any]:
    """A resolved loop as the keywords of native.set_loop, native.reserve and native.environment."""
    spans = [native.NativeSpan(s.first, s.last, m) for s, m in zip(loop.spans, loop.mixes())]
    choices = {name: getattr(loop, name) for name in native.ENUMS}
    return {"spans": spans, **choices}


class _LoopCache(BaseLlamaCache):
    """A cache whose keys begin with the loop, so that no prefix is shared between loops."""

    def __init__(self, cache: BaseLlamaCache, llama: Llama):
        self._cache = cache
        self._llama = llama

    @property
    def cache_size(self) -> int:
        return self._cache.cache_size

    def _key(self, tokens) -> tuple[int, ...]:
        # no token is negative; a checksum stays the same from process to process, for caches on disk
        return (-1 - zlib.crc32(str(self._llama.loop).encode()), *tokens)

    def __getitem__(self, key):
        state = self._cache[self._key(key)]
        if getattr(state, "loop", "off") != str(self._llama.loop):
            raise KeyError("Key not found")
        return state

    def __contains__(self, key) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def __setitem__(self, key, value) -> None:
        self._cache[self._key(key)] = value

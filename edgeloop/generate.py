"""One streamed answer and its figures. Used by the commands; knows nothing of terminals."""

from __future__ import annotations

import re
import signal
import threading
import time
from contextlib import contextmanager
from itertools import chain
from typing import Any, Iterator

import llama_cpp

from edgeloop.errors import EdgeloopError
from edgeloop.llama import Llama

Messages = list[dict[str, Any]]

_TOO_LONG = re.compile(r"(?:Requested tokens \(|Prompt exceeds n_ctx: )(\d+)")  # llama-cpp-python's own words


class ContextFull(EdgeloopError):
    """A prompt of `n_tokens` does not fit the context of `n_ctx`."""

    def __init__(self, n_tokens: int, n_ctx: int):
        super().__init__(
            f"the prompt has {n_tokens} tokens, longer than the context of {n_ctx} tokens; use -c for a larger one"
        )
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


class Generation:
    """Iterate to get the answer in pieces; afterwards `text`, `tokens` and `as_dict()` hold the whole.

    Args:
        prompt: chat messages, or a text to continue as it is.
        max_tokens: -1 for no limit but the context.

    Raises ContextFull when the prompt does not fit the context.
    """

    def __init__(self, llm: Llama, prompt: str | Messages, *, max_tokens: int = -1, **sampling: Any):
        self._llm = llm
        self._prompt = prompt
        self._sampling = {"max_tokens": max_tokens if max_tokens >= 0 else None, "stream": True, **sampling}
        self._steps = 0  # tokens sampled, an end token too
        self._seconds_to_last = 0.0
        self.loop = str(llm.loop)
        self.text = ""
        self.tokens: list[int] = []  # generated ones, without the end token
        self.prompt_tokens = 0  # known as soon as their evaluation starts
        self.finish_reason: str | None = None
        self.seconds = 0.0
        self.seconds_to_first = 0.0

    def __iter__(self) -> Iterator[str]:
        if self._sampling["max_tokens"] == 0:  # llama-cpp-python takes 0 for no limit
            return
        self.loop = str(self._llm.loop)
        start = time.perf_counter()
        try:
            with self._watched(start):
                pieces = self._pieces()
                with _ctrl_c_stops(self._llm):
                    first = next(pieces, ("", None))
                for piece, reason in chain([first], pieces):
                    self.finish_reason = reason or self.finish_reason
                    if piece:
                        self.text += piece
                        yield piece
        except ValueError as problem:
            too_long = _TOO_LONG.search(str(problem))
            if not too_long:
                raise
            raise ContextFull(int(too_long[1]), self._llm.n_ctx()) from None
        except RuntimeError as problem:
            # within a character of several tokens llama-cpp-python does not look whether there is room for the next one
            if "llama_decode returned 1" not in str(problem):
                raise
            self.finish_reason = "length"
            self.tokens.pop()
        finally:
            self.seconds = time.perf_counter() - start

    def _pieces(self) -> Iterator[tuple[str, str | None]]:
        if isinstance(self._prompt, str):
            for chunk in self._llm.create_completion(self._prompt, **self._sampling):
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"]
        else:
            for chunk in self._llm.create_chat_completion(self._prompt, **self._sampling):
                choice = chunk["choices"][0]
                yield choice["delta"].get("content") or "", choice["finish_reason"]

    @contextmanager
    def _watched(self, start: float) -> Iterator[None]:
        """Meanwhile `llm.generate` is watched: a stream of llama-cpp-python does not say which tokens it holds."""
        llm, generate = self._llm, self._llm.generate
        vocab = llama_cpp.llama_model_get_vocab(llm.model)

        def watch(tokens, *args, **kwargs):
            self.prompt_tokens = len(tokens)
            for token in generate(tokens, *args, **kwargs):
                self._steps += 1
                self._seconds_to_last = time.perf_counter() - start
                self.seconds_to_first = self.seconds_to_first or self._seconds_to_last
                if not llama_cpp.llama_vocab_is_eog(vocab, token):
                    self.tokens.append(token)
                yield token

        llm.generate = watch
        try:
            yield
        finally:
            del llm.generate

    @property
    def progress(self) -> str:
        """What happens before the first word, in a few words."""
        if not self.prompt_tokens:
            return "reading the prompt"
        return f"reading the prompt, {min(self._llm.n_tokens, self.prompt_tokens)} of {self.prompt_tokens} tokens"

    @property
    def is_context_full(self) -> bool:
        """The answer ended because the context did."""
        return self.finish_reason == "length" and self.prompt_tokens + len(self.tokens) >= self._llm.n_ctx()

    @property
    def tokens_per_second(self) -> float | None:
        """Of generation alone, the prompt's evaluation left out; None where fewer than two tokens were sampled."""
        seconds = self._seconds_to_last - self.seconds_to_first
        return (self._steps - 1) / seconds if seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """The answer and its figures, for --json."""
        rate = self.tokens_per_second
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.tokens),
            "tokens_per_second": None if rate is None else round(rate, 3),
            "seconds": round(self.seconds, 4),
            "seconds_to_first_token": round(self.seconds_to_first, 4),
        }


@contextmanager
def _ctrl_c_stops(llm: Llama) -> Iterator[None]:
    """Ctrl-C stops the evaluation of a prompt at once, where the backend can (CPU, Metal); Python alone would wait for
    the end of the batch, which may take a minute. Only in the main thread, which signals are for."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def press(number, frame) -> None:
        nonlocal pressed
        pressed = True

    callback = llama_cpp.ggml_abort_callback(lambda data: pressed)
    signal.signal(signal.SIGINT, press)
    llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
    try:
        yield
    except Exception:
        if not pressed:
            raise
    finally:
        llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt

"""One streamed answer and its figures. Used by the commands; knows nothing of terminals."""

from __future__ import annotations

import time
from typing import Any, Iterator

from edgeloop.errors import EdgeloopError
from edgeloop.llama import Llama


class Generation:
    """Iterate to get the answer in pieces; afterwards `text` and `as_dict()` hold the whole.

    Args:
        prompt: chat messages, or a text to continue as it is.
        max_tokens: -1 for no limit but the context.

    Raises EdgeloopError when the prompt does not fit the context.
    """

    def __init__(self, llm: Llama, prompt: str | list[dict[str, str]], *, max_tokens: int = -1, **sampling: Any):
        self._llm = llm
        self._prompt = prompt
        self._sampling = {"max_tokens": max_tokens if max_tokens >= 0 else None, "stream": True, **sampling}
        self.text = ""
        self.finish_reason: str | None = None
        self.seconds = 0.0
        self.seconds_to_first = 0.0

    def __iter__(self) -> Iterator[str]:
        if self._sampling["max_tokens"] == 0:  # llama-cpp-python takes 0 for no limit
            return
        start = time.perf_counter()
        try:
            for piece, reason in self._pieces():
                self.finish_reason = reason or self.finish_reason
                if piece:
                    self.seconds_to_first = self.seconds_to_first or time.perf_counter() - start
                    self.text += piece
                    yield piece
        except ValueError as problem:
            if "exceed context window" not in str(problem):
                raise
            raise EdgeloopError(
                f"the conversation is longer than the context of {self._llm.n_ctx()} tokens; use -c for a larger one"
            ) from None
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

    def as_dict(self) -> dict[str, Any]:
        """The answer and its figures, for --json."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "seconds": round(self.seconds, 4),
            "seconds_to_first_token": round(self.seconds_to_first, 4),
        }

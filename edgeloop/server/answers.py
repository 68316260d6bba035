"""Pieces of text -> the JSON of OpenAI's answers, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from edgeloop.server.chat import ToolCalls
from edgeloop.server.completion import Piece, TokenLogprob
from edgeloop.server.engine import Job, Usage

Json = dict[str, Any]


class Answer:
    """One answer. Subclasses say what its choice looks like."""

    id_prefix: str
    object_whole: str
    object_chunk: str

    def __init__(self, model: str, job: Job, include_usage: bool = False):
        """`include_usage`: a stream ends with a chunk of its own for the usage."""
        self._usage = job.usage
        self._include_usage = include_usage
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "loop": str(job.loop),
        }

    def whole(self, pieces: list[Piece]) -> Json:
        figures = {"usage": usage_json(self._usage), "timings": timings_json(self._usage)}
        return {**self._head, "object": self.object_whole, "choices": [self._choice(pieces)], **figures}

    def chunks(self, piece: Piece) -> Iterator[Json]:
        head = {**self._head, "object": self.object_chunk}
        for choice in self._chunk_choices(piece):
            is_last = choice["finish_reason"] and not self._include_usage
            yield {**head, "choices": [choice], **({"timings": timings_json(self._usage)} if is_last else {})}
        if piece.finish_reason and self._include_usage:
            yield {**head, "choices": [], "usage": usage_json(self._usage), "timings": timings_json(self._usage)}

    def _choice(self, pieces: list[Piece]) -> Json:
        raise NotImplementedError

    def _chunk_choices(self, piece: Piece) -> Iterator[Json]:
        """The last one has a finish_reason."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    id_prefix = "cmpl"
    object_whole = object_chunk = "text_completion"

    def __init__(self, model: str, job: Job, include_usage: bool = False, offset: int = 0):
        """`offset`: characters before the answer, for logprobs."""
        super().__init__(model, job, include_usage)
        self._offset = offset

    def _choice(self, pieces: list[Piece]) -> Json:
        choices = [choice for piece in pieces for choice in self._chunk_choices(piece)]
        found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = {key: [entry for some in found for entry in some[key]] for key in found[0]} if found else None
        text = "".join(choice["text"] for choice in choices)
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": choices[-1]["finish_reason"]}

    def _chunk_choices(self, piece: Piece) -> Iterator[Json]:
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        yield {"index": 0, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, entries: list[TokenLogprob]) -> Json:
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(_text(entry.token))
        return {
            "tokens": [_text(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{_text(token): logprob for token, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def __init__(self, model: str, job: Job, include_usage: bool = False, with_tools: bool = False):
        super().__init__(model, job, include_usage)
        self._calls = ToolCalls() if with_tools else None
        self._is_first = True

    def _choice(self, pieces: list[Piece]) -> Json:
        parts = [part for piece in pieces for part in self._parts(piece)]
        calls = [part for part in parts if isinstance(part, dict)]
        text = "".join(part for part in parts if isinstance(part, str))
        message = {"role": "assistant", "content": text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs([entry for piece in pieces for entry in piece.logprobs]),
            "finish_reason": self._reason(pieces[-1]),
        }

    def _chunk_choices(self, piece: Piece) -> Iterator[Json]:
        deltas: list[Json] = [{"role": "assistant", "content": ""}] if self._is_first else []
        self._is_first = False
        for part in self._parts(piece):
            call = isinstance(part, dict)
            deltas.append({"tool_calls": [{"index": self._calls.n_calls - 1, **part}]} if call else {"content": part})
        if piece.finish_reason or (piece.logprobs and not deltas):
            deltas.append({})
        reasons = [None] * (len(deltas) - 1) + [self._reason(piece)]
        logprobs = [None] * (len(deltas) - 1) + [self._logprobs(piece.logprobs)]
        for delta, logprob, reason in zip(deltas, logprobs, reasons):
            yield {"index": 0, "delta": delta, "logprobs": logprob, "finish_reason": reason}

    def _parts(self, piece: Piece) -> Iterator[str | Json]:
        """Texts and tool calls."""
        if self._calls:
            yield from self._calls.feed(piece.text, is_last=piece.finish_reason is not None)
        elif piece.text:
            yield piece.text

    def _reason(self, piece: Piece) -> str | None:
        has_calls = self._calls and self._calls.n_calls
        return "tool_calls" if piece.finish_reason == "stop" and has_calls else piece.finish_reason

    @staticmethod
    def _logprobs(entries: list[TokenLogprob]) -> Json | None:
        def token(raw: bytes, logprob: float) -> Json:
            return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}

        if not entries:
            return None
        content = [
            {**token(entry.token, entry.logprob), "top_logprobs": [token(*top) for top in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


def usage_json(usage: Usage) -> Json:
    total = usage.prompt_tokens + usage.generated_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": total,
    }


def timings_json(usage: Usage) -> Json:
    """As llama-server has them: the prompt's tokens are those that were evaluated, times are milliseconds."""
    seconds = usage.generation_seconds
    return {
        "prompt_n": usage.evaluated_tokens,
        "prompt_ms": usage.prompt_seconds * 1e3,
        "predicted_n": usage.generated_tokens,
        "predicted_ms": seconds * 1e3,
        "predicted_per_second": usage.generated_tokens / seconds if seconds else 0.0,
    }


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")

"""A prompt -> pieces of text, token by token: stop strings, log-probabilities, limits. Runs in the engine's thread."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

from edgeloop.server.engine import Usage
from edgeloop.server.errors import RequestError
from edgeloop.server.model import Grammar, ServerLlama
from edgeloop.server.types import CompletionRequest, EmbeddingRequest, SamplingFields

# fields of a request that are keywords of Llama.generate
_SAMPLERS = (
    *("top_k", "top_p", "min_p", "mirostat_mode", "mirostat_tau", "mirostat_eta"),
    *("repeat_penalty", "frequency_penalty", "presence_penalty"),
)


@dataclass(frozen=True)
class TokenLogprob:
    token: bytes
    logprob: float  # of the model's own distribution, before any sampler
    top: list[tuple[bytes, float]]  # the most likely tokens


@dataclass(frozen=True)
class Piece:
    """Some text of an answer. The last one has the reason for the end."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


def complete_text(llm: ServerLlama, body: CompletionRequest, usage: Usage) -> Generator[Piece, None, None]:
    """Yields the continuation of a text, after the text itself with `echo`."""
    text = body.text
    if text is None:
        tokens = check_tokens(llm, body.prompt, "prompt")
        text = llm.detokenize(tokens).decode("utf-8", "replace")
    else:
        tokens = llm.tokenize(text.encode(), special=True)
    pieces = complete(llm, tokens, body, usage, max_tokens=body.max_tokens, n_top=body.logprobs)
    first = next(pieces)  # fails before anything is sent
    if body.echo:
        yield Piece(text)
    yield first
    yield from pieces


def embed(llm: ServerLlama, body: EmbeddingRequest, usage: Usage) -> Generator[np.ndarray, None, None]:
    """Yields a unit vector for every input."""
    for text in [body.input] if isinstance(body.input, str) else body.input:
        start = time.perf_counter()
        vector, n_tokens = llm.embedding(text)
        usage.prompt_tokens += n_tokens
        usage.evaluated_tokens += n_tokens
        usage.prompt_seconds += time.perf_counter() - start
        yield vector


def check_tokens(llm: ServerLlama, tokens: list[int], param: str) -> list[int]:
    """The same tokens; RequestError when one is none of this model's, on which llama.cpp would end the process."""
    wrong = next((token for token in tokens if not 0 <= token < llm.n_vocab()), None)
    if wrong is not None:
        raise RequestError(f"{wrong} is not a token of this model; it has 0 to {llm.n_vocab() - 1}", param=param)
    return tokens


def complete(
    llm: ServerLlama,
    prompt: Sequence[int],
    body: SamplingFields,
    usage: Usage,
    *,
    max_tokens: int | None,
    n_top: int | None = None,
    stop: Sequence[str] = (),
    gbnf: str | None = None,
) -> Generator[Piece, None, None]:
    """Yields the continuation of `prompt` and fills `usage`.

    Args:
        max_tokens: None for no limit but the context.
        n_top: alternatives for each token; None for no log-probabilities.
        stop: strings that end the text beside those of the request.
        gbnf: a grammar that the text must follow.

    Raises RequestError when the prompt is empty or does not fit the context, or the grammar is wrong.
    """
    if not llm.can_generate:
        raise RequestError("this model generates no text; it makes embeddings only", param="model")
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    if len(prompt) >= llm.n_ctx():
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the context {llm.n_ctx()}; shorten it, or start the server with a larger -c",
            code="context_length_exceeded",
        )
    usage.prompt_tokens = len(prompt)
    room = llm.n_ctx() - len(prompt)
    limit = room if max_tokens is None else min(max_tokens, room)
    if limit == 0:
        yield Piece("", finish_reason="length")
        return
    grammar = llm.grammar = Grammar(llm, gbnf) if gbnf else None
    try:
        yield from _generate(llm, prompt, body, usage, limit, n_top, StopStrings([*body.stops(), *stop]))
    finally:
        llm.grammar = None
        if grammar:
            grammar.close()


def _generate(
    llm, prompt, body, usage: Usage, limit: int, n_top: int | None, stops: StopStrings
) -> Generator[Piece, None, None]:
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # a character may span tokens
    reason = "length"
    # without a seed, llama-cpp-python would draw the same ones after every start
    llm.set_seed(secrets.randbits(32) if body.seed is None else body.seed & 0xFFFFFFFF)
    sampling = {name: getattr(body, name) for name in _SAMPLERS}
    steps = llm.generate(prompt, temp=body.temperature, logits_processor=_processors(llm, body), **sampling)
    with closing(steps), closing(_timed(llm, steps, usage)) as tokens:
        for token in tokens:
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                reason = "stop"
                break
            usage.generated_tokens += 1
            logprobs = [] if n_top is None else [_logprob(llm, token, n_top)]
            text = stops.feed(decoder.decode(llm.detokenize([token])))
            if text or logprobs:
                yield Piece(text, logprobs)
            if stops.found:
                reason = "stop"
                break
            if usage.generated_tokens == limit:
                break
    yield Piece(stops.rest(), finish_reason=reason)


def _timed(llm: ServerLlama, tokens: Iterator[int], usage: Usage) -> Iterator[int]:
    """The same tokens. All that is evaluated before the first one is the prompt."""
    start, before, first = time.perf_counter(), llm.n_evaluated, None
    try:
        for token in tokens:
            if first is None:
                first, usage.evaluated_tokens = time.perf_counter(), llm.n_evaluated - before
            yield token
    finally:
        now = time.perf_counter()
        if first is None:  # stopped in the prompt
            first, usage.evaluated_tokens = now, llm.n_evaluated - before
        usage.prompt_seconds, usage.generation_seconds = first - start, now - first


def _logprob(llm: ServerLlama, token: int, n_top: int) -> TokenLogprob:
    logits = llm.logits().astype(np.float64)
    logprobs = logits - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    top = np.argpartition(-logprobs, n_top)[:n_top]
    top = top[np.argsort(-logprobs[top], kind="stable")]
    return TokenLogprob(
        llm.detokenize([token]), float(logprobs[token]), [(llm.detokenize([int(i)]), float(logprobs[i])) for i in top]
    )


def _processors(llm: ServerLlama, body: SamplingFields) -> llama_cpp.LogitsProcessorList | None:
    processors = []
    if body.logit_bias:
        bias = _bias_by_token(llm, body)
        ids, values = np.array(list(bias)), np.array(list(bias.values()), dtype=np.float32)

        def add_bias(input_ids, scores):
            scores[ids] += values
            return scores

        processors.append(add_bias)
    if body.min_tokens:
        processors.append(llama_cpp.MinTokensLogitsProcessor(body.min_tokens, llm.token_eos()))
    return llama_cpp.LogitsProcessorList(processors) if processors else None


def _bias_by_token(llm: ServerLlama, body: SamplingFields) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in body.logit_bias.items():
        if body.logit_bias_type == "tokens":
            bias |= dict.fromkeys(llm.tokenize(key.encode(), add_bos=False, special=True), value)
        elif key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < llm.n_vocab():
            bias[int(key)] = value
        else:
            raise RequestError(f"'{key[:20]}' is not a token of this model; it has {llm.n_vocab()}", param="logit_bias")
    return bias


class StopStrings:
    """Passes text on up to the first of some strings, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]):
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if found:  # the one that is complete first
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        held = max((overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back and turned out to be no stop string."""
        return self._held


def overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that `string` begins with."""
    return next((n for n in range(min(len(text), len(string)), 0, -1) if string.startswith(text[-n:])), 0)

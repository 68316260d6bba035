"""A Llama that another thread can stop and that no request can bring down."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Sequence

import llama_cpp
import numpy as np
import psutil

from edgeloop import native
from edgeloop.aio import StoppableLlama
from edgeloop.errors import LoopError, ModelError
from edgeloop.gguf_tools import inspect
from edgeloop.llama import Llama
from edgeloop.loop import Loop
from edgeloop.server.errors import RequestError


class ServerLlama(StoppableLlama):
    """A Llama for untrusted requests. Raises ModelError for an encoder with a decoder.

    Attributes:
        info: what the file says, see gguf_tools.
        grammar: what the next tokens must follow. Not through `generate`, where llama.cpp ends the process as soon as a
            grammar allows no token.
        n_evaluated: tokens evaluated so far, those of a reused prompt left out.
    """

    grammar: Grammar | None = None
    n_evaluated = 0

    def __init__(self, model_path: str, **kwargs: Any):
        super().__init__(model_path, **kwargs)
        if llama_cpp.llama_model_has_encoder(self.model) and llama_cpp.llama_model_has_decoder(self.model):
            raise ModelError(f"{model_path}: has an encoder and a decoder, which llama-cpp-python cannot run together")
        self.info = inspect(model_path)
        # llama.cpp rounds the context up, llama-cpp-python has an array for what was asked for
        self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)

    def use(self, loop: Loop) -> None:
        """Sets a loop. Raises LoopError, also where the memory for its keys and values is not there."""
        needed = (self.info.loop_memory_bytes(loop, self.n_ctx()) or 0) - self.loop_memory_size()
        free = psutil.virtual_memory().available
        if needed > free:
            raise LoopError(
                f"'{loop}' needs {needed / 1e6:,.0f} MB more for keys and values, {free / 1e6:,.0f} MB are free"
            )
        self.loop = loop

    def eval(self, tokens: Sequence[int]) -> None:
        for i in range(0, len(tokens), self.n_batch):
            batch = tokens[i : i + self.n_batch]
            super().eval(batch)
            self.n_evaluated += len(batch)

    def logits(self, index: int = -1) -> np.ndarray:
        """Of a token of the last batch, shape (vocabulary,); valid until the next one."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, index), (self._n_vocab,))

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        logits = self.logits(-1 if idx is None else idx - self.n_tokens)
        if not math.isfinite(logits.max()):  # samplers of llama.cpp must not see NaN
            raise RequestError(
                f"the model gives no numbers under loop '{self.loop}'; use fewer passes or a smaller step"
            )
        if self.grammar is None:
            return super().sample(*args, idx=idx, **kwargs)
        array = self._candidates
        array.copy_logits(logits)
        self.grammar.apply(array.candidates)
        if array.candidates_data.logit.max() == -math.inf:
            raise RequestError("the schema allows no token here", param="response_format")
        llama_cpp.llama_sampler_apply(self._sampler.sampler, ctypes.byref(array.candidates))
        token = array.candidates.data[array.candidates.selected].id
        llama_cpp.llama_sampler_accept(self._sampler.sampler, token)
        self.grammar.accept(token)
        return token

    @property
    def can_generate(self) -> bool:
        """Not a model for embeddings only, which has no memory of its tokens."""
        return llama_cpp.llama_get_memory(self.ctx) is not None

    def embedding(self, text: str) -> tuple[np.ndarray, int]:
        """The unit vector of a text, shape (n_embd,), and its number of tokens.

        Pooled as the model says, else the mean over its tokens. Raises RequestError for an empty or too long text.
        """
        n_tokens = len(self.tokenize(text.encode()))
        if not 0 < n_tokens <= self.n_batch:
            raise RequestError(
                f"an input has {n_tokens} tokens; 1 to {self.n_batch} are possible",
                param="input",
                code="context_length_exceeded" if n_tokens else None,
            )
        if self.pooling_type() == llama_cpp.LLAMA_POOLING_TYPE_RANK:
            raise RequestError("this model ranks texts; it makes no embeddings", param="model")
        native.set_phase(self.ctx, "prompt")
        llama_cpp.llama_set_embeddings(self.ctx, True)
        self.context_params.embeddings = True  # or embed() refuses
        try:
            states = np.array(self.embed(text, truncate=False), dtype=np.float32)
        finally:
            llama_cpp.llama_set_embeddings(self.ctx, False)
        vector = states if states.ndim == 1 else states.mean(axis=0)
        return vector / (np.linalg.norm(vector) or 1.0), n_tokens


class Grammar:
    """A GBNF grammar as a sampler of llama.cpp. Raises RequestError when llama.cpp cannot use it."""

    def __init__(self, llm: Llama, gbnf: str):
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise RequestError("llama.cpp cannot make a grammar of this schema", param="response_format")

    def apply(self, candidates: llama_cpp.llama_token_data_array) -> None:
        """Sets the logits of tokens that are not allowed to -inf."""
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)

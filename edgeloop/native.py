"""ctypes for llama-loop.h, over the vendored llama_cpp. Knows loops as numbers only, not as specs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from llama_cpp.llama_cpp import _lib as lib

# the enums of llama-loop.h by name, in the order of llama_loop_params; the first of each is the default
ENUMS = {
    "unit": {"block": 0, "layer": 1},
    "kv": {"frozen": 0, "own": 1, "first": 2, "last": 3},
    "routing": {"free": 0, "frozen": 1},
    "scope": {"all": 0, "prompt": 1, "gen": 2},
    "rule": {"mix": 0, "running-mean": 1, "auto-align": 2},
    "norm": {"none": 0, "hold": 1, "interp": 2},
}
PHASES = {"auto": 0, "prompt": 1, "gen": 2}


class NativeLoopError(Exception):
    """llama_set_loop refused; `code` is the llama_loop_error."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class llama_loop_span(ctypes.Structure):
    _fields_ = [
        ("first", ctypes.c_int32),
        ("last", ctypes.c_int32),
        ("n_passes", ctypes.c_int32),
        ("mix", ctypes.POINTER(ctypes.c_float)),
    ]


class llama_loop_params(ctypes.Structure):
    _fields_ = [
        ("spans", ctypes.POINTER(llama_loop_span)),
        ("n_spans", ctypes.c_int32),
        *((name, ctypes.c_int) for name in ENUMS),
    ]


for _function in (lib.llama_set_loop, lib.llama_loop_reserve):
    _function.argtypes = [ctypes.c_void_p, ctypes.POINTER(llama_loop_params)]
    _function.restype = ctypes.c_int32
lib.llama_loop_set_phase.argtypes = [ctypes.c_void_p, ctypes.c_int]
lib.llama_loop_set_phase.restype = None
lib.llama_get_loop.argtypes = [ctypes.c_void_p]
lib.llama_get_loop.restype = ctypes.POINTER(llama_loop_params)
lib.llama_loop_memory_size.argtypes = [ctypes.c_void_p]
lib.llama_loop_memory_size.restype = ctypes.c_size_t
lib.llama_loop_version.argtypes = []
lib.llama_loop_version.restype = ctypes.c_int32
lib.llama_version.argtypes = []
lib.llama_version.restype = ctypes.c_char_p
lib.llama_loop_last_error.argtypes = []
lib.llama_loop_last_error.restype = ctypes.c_char_p


@dataclass(frozen=True)
class NativeSpan:
    first: int
    last: int
    mix: list[list[float]]  # lower-triangular rows, row i with i + 1 entries


def set_loop(ctx: int, spans: list[NativeSpan], **choices: str) -> bool:
    """Set the loop of a llama_context; no spans turn it off. `choices` are the names of ENUMS and of their values.

    Returns True when room for more K/V had to be made and the context's memory was cleared.
    Raises NativeLoopError, after which the old loop is still set.
    """
    return _call(lib.llama_set_loop, ctx, spans, choices)


def reserve(ctx: int, spans: list[NativeSpan], **choices: str) -> bool:
    """Make room now for a loop given as to `set_loop`, and for every smaller one; the loop that is set stays."""
    return _call(lib.llama_loop_reserve, ctx, spans, choices)


def environment(spans: list[NativeSpan], **choices: str) -> str:
    """The value of LLAMA_LOOP that gives any program linked to the library this loop."""
    parts = [[s.first, s.last, len(s.mix), *(f"{m:.9g}" for row in s.mix for m in row)] for s in spans]
    return "/".join(",".join(map(str, part)) for part in [_numbers(choices), *parts])


def _numbers(choices: dict[str, str]) -> list[int]:
    """The enums in the order of llama_loop_params; what is not chosen is the first of its table."""
    return [table[choices.get(name, next(iter(table)))] for name, table in ENUMS.items()]


def _call(function, ctx: int, spans: list[NativeSpan], choices: dict[str, str]) -> bool:
    if not spans:
        return _check(function(ctx, None))
    array = (llama_loop_span * len(spans))()
    keep = []
    for c_span, span in zip(array, spans):
        passes = len(span.mix)
        mix = (ctypes.c_float * (passes * passes))()
        for i, row in enumerate(span.mix):
            mix[i * passes : i * passes + len(row)] = row
        keep.append(mix)
        c_span.first, c_span.last, c_span.n_passes = span.first, span.last, passes
        c_span.mix = ctypes.cast(mix, ctypes.POINTER(ctypes.c_float))
    params = llama_loop_params(array, len(spans), *_numbers(choices))
    return _check(function(ctx, ctypes.byref(params)))


def set_phase(ctx: int, phase: str) -> None:
    """Say what the next batches hold: "prompt", "gen", or "auto" (one token of a sequence is generated, more are a prompt)."""
    lib.llama_loop_set_phase(ctx, PHASES[phase])


def _check(code: int) -> bool:
    if code < 0:
        raise NativeLoopError(lib.llama_loop_last_error().decode("utf-8", "replace"), code)
    return code > 0


def loop_memory_size(ctx: int) -> int:
    """Bytes of K/V and recurrent states that the loop holds beyond the plain model's."""
    return lib.llama_loop_memory_size(ctx)

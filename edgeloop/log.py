"""llama.cpp's log: quiet, shown, or kept for an error message."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
import threading
from contextlib import contextmanager, nullcontext
from typing import Iterator

import llama_cpp
from llama_cpp import _internals, _logger, llama

_LEVEL_ERROR = 4
_LEVEL_CONT = 5

_collected = threading.local()  # .errors: two models may be loaded at a time
_level = 0


@llama_cpp.llama_log_callback
def callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    global _level
    _level = level if level != _LEVEL_CONT else _level
    line = text.decode("utf-8", "replace")
    errors = getattr(_collected, "errors", None)
    if errors is not None and _level == _LEVEL_ERROR and line.strip():
        errors.append(re.sub(r"^\w+: ", "", line.strip()))
    if _logger.logger.level == logging.DEBUG or (errors is None and _level == _LEVEL_ERROR):
        print(line, end="", flush=True, file=sys.stderr)


llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))


# llama-cpp-python sends the whole process's stdout and stderr to nowhere while it loads a model: what other threads print is
# lost, and after two loads at a time all the rest. The callback is enough to be quiet.
llama.suppress_stdout_stderr = _internals.suppress_stdout_stderr = lambda disable: nullcontext()


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """The error lines that llama.cpp logs meanwhile in this thread; they are not printed unless the log is verbose."""
    before = getattr(_collected, "errors", None)
    _collected.errors = []
    try:
        yield _collected.errors
    finally:
        _collected.errors = before

"""llama.cpp's log: quiet, shown, or kept for an error message."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from contextlib import contextmanager
from typing import Iterator

import llama_cpp
from llama_cpp import _logger

_LEVEL_ERROR = 4
_LEVEL_CONT = 5

_errors: list[str] | None = None
_level = 0


@llama_cpp.llama_log_callback
def _callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    global _level
    _level = level if level != _LEVEL_CONT else _level
    line = text.decode("utf-8", "replace")
    if _errors is not None and _level == _LEVEL_ERROR and line.strip():
        _errors.append(re.sub(r"^\w+: ", "", line.strip()))
    if _logger.logger.level == logging.DEBUG or (_errors is None and _level == _LEVEL_ERROR):
        print(line, end="", flush=True, file=sys.stderr)


llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """The error lines that llama.cpp logs meanwhile; they are not printed unless the log is verbose."""
    global _errors
    before, _errors = _errors, []
    try:
        yield _errors
    finally:
        _errors = before

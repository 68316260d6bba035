"""What goes to stderr: notes and errors, one line each."""

from __future__ import annotations

import sys


def _is_color() -> bool:
    import os

    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def note(text: str) -> None:
    """Say what happens, dimmed on a terminal."""
    print(f"\033[2m{text}\033[0m" if _is_color() else text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """One line, whatever the message held."""
    line = " ".join(text.split())
    print(f"\033[31mError:\033[0m {line}" if _is_color() else f"Error: {line}", file=sys.stderr, flush=True)


def size(n_bytes: float) -> str:
    """A size that a person reads: 98 MB, 1.1 GB (powers of ten, as in file listings)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            value = n_bytes / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{n_bytes:.0f} B"

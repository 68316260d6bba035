"""What a person sees while a command runs: notes, errors and a spinner on stderr, one line each; and text that grows."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from os.path import commonprefix
from typing import Callable, Iterator, TextIO

SPINNER_AFTER = 2.0  # seconds
SECONDS_BETWEEN_DRAWS = 0.05
SHARE_OF_TIME = 0.05  # that drawing may take

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def is_styled(stream: TextIO) -> bool:
    """A terminal that shows colours and moves its cursor, whose user wants that."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def note(text: str) -> None:
    """Say what happens, dimmed on a terminal."""
    text = printable(text)
    print(f"\033[2m{text}\033[0m" if is_styled(sys.stderr) else text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Something that was asked for, on stderr all the same."""
    print(printable(text), file=sys.stderr, flush=True)


def error(text: str) -> None:
    """One line, whatever the message held."""
    line = printable(" ".join(text.split()))
    print(f"\033[31mError:\033[0m {line}" if is_styled(sys.stderr) else f"Error: {line}", file=sys.stderr, flush=True)


def size(n_bytes: float) -> str:
    """A size that a person reads: 98 MB, 1.1 GB (powers of ten, as in file listings)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            value = n_bytes / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{n_bytes:.0f} B"


def printable(text: str) -> str:
    """Text for a terminal: without the control characters with which a model could move the cursor."""
    return text.translate(_CONTROLS)


@contextmanager
def spinner(text: Callable[[], str], after: float = SPINNER_AFTER) -> Iterator[None]:
    """Show on stderr that something is going on, if it takes longer than `after` seconds; only on a terminal."""
    stream = sys.stderr
    if not is_styled(stream):
        yield
        return
    done = threading.Event()

    def spin() -> None:
        if done.wait(after):
            return
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        wheel = Spinner("line", text(), style="dim")
        # no redirection: llama-cpp-python changes sys.stdout meanwhile, too
        with Live(wheel, console=Console(file=stream), transient=True, redirect_stdout=False, redirect_stderr=False):
            while not done.wait(0.2):
                wheel.update(text=text())

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def no_echo() -> Iterator[None]:
    """What is typed meanwhile waits for the next one who reads, and does not appear on the terminal."""
    if os.name == "nt" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Pace:
    """When to draw again, so that drawing takes little time away from the model."""

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def drawing(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        end = time.monotonic()
        self._next = end + max(SECONDS_BETWEEN_DRAWS, (end - start) / SHARE_OF_TIME)


class Region:
    """The lines at the end of a terminal that may still change; redrawn from the first that did, in one write.

    Lines may hold escape sequences, which end with the line, and are not wider than the terminal. The cursor stands at
    the end of the last one.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._shown = [""]

    def draw(self, final: list[str], changing: list[str]) -> None:
        """Replace the region by lines that stay for good and, below them, the new region. Its beginning is not shown
        when it is higher than the terminal."""
        changing = changing[-self.height() :] or [""]
        lines = final + changing
        if lines != self._shown:
            same = len(commonprefix([lines[:-1], self._shown]))
            up = len(self._shown) - 1 - same
            back = "\r\033[J" if up >= 0 else "\n"
            self._stream.write((f"\033[{up}A" if up > 0 else "") + back + "\n".join(lines[same:]))
            self._stream.flush()
        self._shown = changing

    @staticmethod
    def height() -> int:
        """Lines of a region that can be redrawn: none may have left the screen."""
        return max(1, shutil.get_terminal_size().lines - 1)

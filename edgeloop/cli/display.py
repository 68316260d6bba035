"""Progress bars on stderr and tables on stdout, drawn by rich."""

from __future__ import annotations

import sys
from typing import Iterable

WIDE = 10_000  # columns where no terminal cuts a line


class Progress:
    """`with Progress() as progress: progress(what, done, total)` draws a bar for each file; only on a terminal."""

    def __enter__(self) -> Progress:
        self._bars = None
        self._tasks: dict[str, int] = {}
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bars is None:
            self._start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, completed=done, total=total)
        self._bars.update(self._tasks[what], completed=done)

    def __exit__(self, *exc) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _start(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bars.start()


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Columns as wide as the terminal allows; what is not a terminal gets every line whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(drawn)

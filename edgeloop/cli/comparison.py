"""Two answers to one prompt, without and with the loop: side by side, one below the other, or as plain text."""

from __future__ import annotations

import sys

from edgeloop.chat import Comparison
from edgeloop.cli.console import Pace, Region, is_styled, note, printable
from edgeloop.generate import Generation

WIDTH_FOR_TWO = 100  # columns
MARK = "||"  # where the answers part, on what shows no colours


def show(comparison: Comparison) -> None:
    """Make both answers and print them to stdout, on a terminal while they come."""
    note("greedy (temperature 0), so that only the loop makes a difference")
    if not is_styled(sys.stdout):
        for _ in comparison:
            pass
        print(_plain(comparison), flush=True)
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    region, pace = Region(sys.stdout), Pace()
    try:
        for _ in comparison:
            if pace.is_due:
                with pace.drawing():
                    region.draw([], _lines(comparison, console))
    finally:
        region.draw(_lines(comparison, console), [])
    print(verdict(comparison), flush=True)


def verdict(comparison: Comparison) -> str:
    """Where the answers part, in a line."""
    plain, looped = comparison.plain, comparison.looped
    n, chars = comparison.common_tokens, len(comparison.common_text)
    if comparison.is_identical:
        cut = ", where both are cut" if plain.finish_reason == looped.finish_reason == "length" else ""
        return f"identical: {n} tokens, {chars} characters{cut}"
    if not n:
        return "they part at the first token"
    return f"they part after {n} tokens, {chars} characters"


def _titles(comparison: Comparison) -> tuple[tuple[str, Generation], ...]:
    return ("without the loop", comparison.plain), (f"with {comparison.looped.loop}", comparison.looped)


def _figures(generation: Generation) -> str:
    rate = generation.tokens_per_second
    return f"{len(generation.tokens)} tokens" + (f", {rate:.1f} tokens/s" if rate else "")


def _plain(comparison: Comparison) -> str:
    parts = []
    at = len(comparison.common_text)
    is_marked = at and not comparison.is_identical
    for title, answer in _titles(comparison):
        text = answer.text[:at] + MARK + answer.text[at:] if is_marked else answer.text
        parts.append(f"{title} ({_figures(answer)}):\n{text.strip()}\n")
    return "\n".join([*parts, verdict(comparison) + (f", at {MARK}" if is_marked else "")])


def _lines(comparison: Comparison, console) -> list[str]:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    at = len(comparison.common_text)
    columns = []
    for title, answer in _titles(comparison):
        body = Text.assemble((printable(answer.text[:at]), "dim"), printable(answer.text[at:]))
        columns.append((Text(title, style="bold"), body, Text(_figures(answer), style="dim")))
    if console.width >= WIDTH_FOR_TWO:
        view = Table.grid(padding=(0, 4), expand=True)
        view.add_column(ratio=1)
        view.add_column(ratio=1)
        for row in zip(*columns):
            view.add_row(*row)
    else:
        view = Group(*columns[0], "", *columns[1])
    with console.capture() as capture:
        console.print(view)
    return [line.rstrip() for line in capture.get().rstrip("\n").split("\n")]

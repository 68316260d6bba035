"""Markdown on a terminal while it comes: block by block, of which only the last may still change."""

from __future__ import annotations

import re
from typing import TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console
from rich.markdown import CodeBlock, Heading, HorizontalRule, ListItem, Markdown
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment
from rich.syntax import Syntax
from rich.theme import Theme

from edgeloop.cli.console import Pace, Region, printable

MAX_WIDTH = 100  # columns; longer lines are hard to read

# the terminal's own colours and no backgrounds, for dark and light ones
THEME = Theme(
    {
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.h4": "bold",
        "markdown.h5": "bold",
        "markdown.h6": "bold",
        "markdown.code": "cyan",
        "markdown.block_quote": "dim",
        "markdown.item.bullet": "dim",
        "markdown.link": "none",
        "markdown.link_url": "dim underline",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)

_SPACE_AT_END = re.compile(r" +((?:\033\[[0-9;]*m)*)$")
_EMPTY = re.compile(r"(?: |\033\[[0-9;]*m)*")


class _Heading(Heading):
    def __rich_console__(self, console, options):
        yield self.text


class _Code(CodeBlock):
    """Without a box, so that it can be copied."""

    def __rich_console__(self, console, options):
        code = str(self.text).rstrip()
        syntax = Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True)
        yield Padding(syntax, (0, 0, 0, 2))


class _Item(ListItem):
    """Numbers keep their full stop."""

    def render_number(self, console, options, number, last_number):
        width = len(str(last_number)) + 3
        lines = console.render_lines(self.elements, options.update(width=options.max_width - width), style=self.style)
        for i, line in enumerate(lines):
            yield Segment(" " * width if i else f"{number}. ".rjust(width))
            yield from line
            yield Segment.line()


class _Rule(HorizontalRule):
    def __rich_console__(self, console, options):
        yield Rule(style="dim")


class _Block(Markdown):
    """One block that is parsed already."""

    elements = Markdown.elements | {
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "list_item_open": _Item,
        "hr": _Rule,
    }

    def __init__(self, tokens: list[Token]):
        super().__init__("", hyperlinks=False)  # addresses are shown: a link may say one thing and lead to another
        self.parsed = tokens


class MarkdownStream:
    """Write pieces, then close: the text stands rendered on the terminal, all of it in the scrollback."""

    def __init__(self, stream: TextIO):
        self._console = Console(file=stream, theme=THEME, highlight=False)
        self._region = Region(stream)
        # HTML and images are text like any other here
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")
        self._text = ""  # from the first block on that is not complete
        self._n_complete = 0  # blocks before it
        self._n_scrolled = 0  # lines of it that have left the screen
        self._pace = Pace()

    def write(self, piece: str) -> None:
        self._text += printable(piece)
        if self._pace.is_due:
            with self._pace.drawing():
                self._draw(self._take_complete())

    def close(self) -> None:
        final = self._lines(self._blocks(self._text))
        self._text = ""
        self._draw(final)

    def _take_complete(self) -> list[str]:
        """The lines of the blocks that nothing more can be added to; whole lines tell which."""
        *complete, last = self._blocks(self._text[: self._text.rfind("\n") + 1]) or [[]]
        if not complete:
            return []
        lines = self._lines(complete)
        self._text = "\n".join(self._text.split("\n")[last[0].map[0] :])
        self._n_complete += len(complete)
        self._n_scrolled = 0
        return lines

    def _draw(self, final: list[str]) -> None:
        blocks = self._blocks(self._text)
        changing = self._lines(blocks)
        too_many = len(changing) - self._region.height()
        # what is written grows at its end, but for the columns of a table: those lines wait for the last row
        if too_many > 0 and blocks[0][0].type != "table_open":
            final = final + changing[:too_many]
            changing = changing[too_many:]
            self._n_scrolled += too_many
        self._region.draw(final, changing)

    def _blocks(self, text: str) -> list[list[Token]]:
        blocks: list[list[Token]] = []
        for token in self._parser.parse(text):
            if token.level == 0 and token.nesting >= 0:
                blocks.append([])
            blocks[-1].append(token)
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"  # a model breaks lines where it means to, in verses and addresses
        return blocks

    def _lines(self, blocks: list[list[Token]]) -> list[str]:
        """Rendered, with an empty line between two blocks; those that have left the screen are left out."""
        lines: list[str] = []
        for number, tokens in enumerate(blocks, self._n_complete):
            with self._console.capture() as capture:
                self._console.print(_Block(tokens), width=min(self._console.width, MAX_WIDTH))
            block = [_SPACE_AT_END.sub(r"\1", line) for line in capture.get().split("\n")]
            while block and _EMPTY.fullmatch(block[-1]):
                block.pop()
            while block and _EMPTY.fullmatch(block[0]):
                block.pop(0)
            lines += [""] * (number > 0) + block
        return lines[self._n_scrolled :]

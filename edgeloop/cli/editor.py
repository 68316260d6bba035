"""The line editor of `edgeloop chat`: history, messages of several lines, completion of commands, loops and files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Iterable, Iterator

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from edgeloop.cli.console import note
from edgeloop.loop import CHOICES, DEFAULT_SOLVER
from edgeloop.solvers import SOLVERS

PROMPT = "> "

# the terminal's own colours, for dark and light ones
STYLE = Style.from_dict(
    {
        "completion-menu": "noinherit",
        "completion-menu.completion.current": "noinherit reverse",
        "completion-menu.meta.completion": "noinherit fg:ansibrightblack",
        "completion-menu.meta.completion.current": "noinherit reverse",
        "scrollbar.background": "noinherit",
        "scrollbar.button": "bg:ansibrightblack",
    }
)


def history_file() -> Path | None:
    """Where messages are remembered: EDGELOOP_HISTORY, by default in the user's state folder; None for off."""
    wanted = os.environ.get("EDGELOOP_HISTORY")
    if wanted == "off":
        return None
    return Path(wanted).expanduser() if wanted else platformdirs.user_state_path("edgeloop") / "history"


def complete_loop(spec: str) -> Iterator[tuple[str, int]]:
    """What the end of a loop spec may become: words, and how many characters of it each replaces."""
    span, colon, options = spec.partition(":")
    if not colon:
        words = ["off", "auto"]
        last = span
    else:
        *before, last = options.split(",")
        solver = before[0] if before and before[0] in SOLVERS else DEFAULT_SOLVER
        key, equals, value = last.partition("=")
        if equals:
            words, last = list(CHOICES.get(key, ())), value
        else:
            chosen = SOLVERS[solver]
            keys = [*chosen.parameters, *["weights"] * chosen.takes_weights, *CHOICES]
            given = {option.partition("=")[0] for option in before}
            words = [*(() if before else SOLVERS), *(f"{key}=" for key in keys if key not in given)]
    return ((word, len(last)) for word in words if word.startswith(last))


class _ChatCompleter(Completer):
    def __init__(self, commands: dict[str, str], file_commands: Iterable[str]):
        self._commands = commands
        self._file_commands = set(file_commands)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text.partition(" ")
        if not space:
            for command, meaning in self._commands.items():
                if command.startswith(name):
                    yield Completion(command, -len(name), display_meta=meaning)
        elif name == "/loop":
            for word, length in complete_loop(argument):
                yield Completion(word, -length)
        elif name in self._file_commands:
            yield from self._paths.get_completions(Document(argument), complete_event)


def _history() -> History:
    path = history_file()
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # what people ask is private
        return FileHistory(str(path))
    except OSError as problem:
        note(f"messages are not remembered: {path}: {problem.strerror}; EDGELOOP_HISTORY names another file, or off")
        return InMemoryHistory()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _newline(event) -> None:
        event.current_buffer.newline()

    @keys.add("c-c")
    def _clear(event) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


class Editor:
    """Reads messages from the person at the terminal.

    Args:
        commands: names with their slash, and what they do.
        file_commands: those whose argument is a file.
    """

    def __init__(self, commands: dict[str, str], file_commands: Iterable[str]):
        self._prompt: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=" " * len(PROMPT),
            history=_history(),
            completer=_ChatCompleter(commands, file_commands),
            # the menu takes room under the line, so it comes for commands only
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            key_bindings=_keys(),
            style=STYLE,
            enable_suspend=True,
            enable_open_in_editor=True,
            # where answers go into a file, the terminal is stderr's
            output=None if sys.stdout.isatty() else create_output(always_prefer_tty=True),
        )

    def read(self) -> str:
        """One message, of one or several lines. Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C on an empty line."""
        return self._prompt.prompt()

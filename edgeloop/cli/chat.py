"""`edgeloop chat`: talk to a model; the loop can be changed between answers."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Callable, Iterator, Optional

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import error, is_styled, no_echo, note, printable, say, size, spinner
from edgeloop.errors import EdgeloopError

if TYPE_CHECKING:
    from edgeloop.chat import Chat

KEYS = """\
Alt-Enter, Esc Enter, or \\ at the end of a line: another line
Ctrl-C stops an answer, Ctrl-D leaves; a space before / makes it text"""


def chat(
    model: o.Model = None,
    model_flag: o.ModelFlag = None,
    loop: o.LoopSpec = "off",
    prompt: Annotated[
        Optional[str], typer.Option("-p", "--prompt", help="The first question.", show_default=False)
    ] = None,
    single_turn: Annotated[
        bool, typer.Option("-st", "--single-turn", help="Leave after one answer.", envvar="EDGELOOP_SINGLE_TURN")
    ] = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown/--no-markdown", help="Render answers on a terminal.", envvar="EDGELOOP_MARKDOWN"),
    ] = True,
    ctx_size: o.CtxSize = None,
    predict: o.Predict = -1,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = -1,
    temp: o.Temp = 0.8,
    top_k: o.TopK = 40,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    seed: o.Seed = -1,
    system: o.System = None,
    mmproj: o.Mmproj = None,
    rpc: o.Rpc = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
) -> None:
    """Talk to a model; /help lists the commands."""
    from edgeloop.chat import Chat

    path = o.model_path(model, model_flag, offline)
    llm = o.load(
        path,
        loop=loop,
        ctx_size=ctx_size,
        threads=threads,
        gpu_layers=gpu_layers,
        seed=seed,
        rpc=rpc,
        verbose=verbose,
        mmproj=mmproj,
    )
    with closing(llm):
        talk = Talk(
            Chat(llm, system, max_tokens=predict, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p),
            markdown=markdown and is_styled(sys.stdout),
        )
        note(f"{path.name}, {llm.n_layer} layers, {talk.loop_line()}")
        if not single_turn:
            note("/help lists the commands, /exit leaves")
        try:
            for text in chain([prompt] if prompt else [], _messages()):
                if single_turn and text.strip() and not text.startswith("/"):
                    talk.show(talk.chat.ask(text))
                    return
                with suppress(KeyboardInterrupt):  # pressed once more while the first one is dealt with
                    talk.take(text)
        except EOFError:
            pass


@dataclass(frozen=True)
class Command:
    usage: str
    meaning: str
    run: Callable[[Talk, str], None]


COMMANDS: dict[str, Command] = {}


def _command(usage: str, meaning: str):
    def register(run: Callable[[Talk, str], None]):
        COMMANDS[usage.split()[0]] = Command(usage, meaning, run)
        return run

    return register


class Talk:
    """A Chat on a terminal or a pipe: shows answers, carries out commands, and survives what goes wrong in them."""

    def __init__(self, chat: Chat, markdown: bool):
        self.chat = chat
        self.markdown = markdown

    def take(self, text: str) -> None:
        """Answer a message, or carry out one that begins with /. Raises EOFError to leave."""
        from edgeloop.generate import ContextFull

        try:
            if text.startswith("/"):
                self.command(text)
            elif text.strip():
                self.show(self.chat.ask(text))
        except KeyboardInterrupt:
            note("stopped")
        except ContextFull as full:
            error(
                f"the context is full: the conversation with this question has {full.n_tokens} tokens, and {full.n_ctx} "
                "fit, so the question was left out; /reset forgets the conversation, /undo the last exchange, and -c "
                "makes more room"
            )
        except EdgeloopError as problem:
            error(str(problem))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as problem:
            # one answer that fails, in a chat template for instance, must not cost the conversation
            if os.environ.get("EDGELOOP_DEBUG"):
                raise
            error(f"{type(problem).__name__}: {problem} (EDGELOOP_DEBUG=1 shows where)")

    def show(self, pieces: Iterator[str]) -> None:
        """Print an answer to stdout while it comes."""
        with closing(pieces), no_echo(), closing(self._stream()) as stream:
            with spinner(lambda: self.chat.generation.progress):
                first = next(pieces, "")
            stream.write(first)
            for piece in pieces:
                stream.write(piece)
        answer = self.chat.generation
        if not answer.text:
            note("the model ended its answer before the first word; the question was left out")
        elif answer.is_context_full:
            note(f"cut: the context of {self.chat.llm.n_ctx()} tokens is full; /reset forgets the conversation")
        elif answer.finish_reason == "length":
            note(f"cut after {len(answer.tokens)} tokens (-n)")
        _gap()

    def _stream(self):
        if self.markdown:
            from edgeloop.cli.markdown import MarkdownStream

            return MarkdownStream(sys.stdout)
        return _PlainStream()

    def loop_line(self) -> str:
        """The loop and its price in a few words."""
        llm = self.chat.llm
        if llm.loop.is_off:
            return "loop off"
        extra = llm.loop_memory_size()
        memory = f", {size(extra)} more keys and values" if extra else ""
        return f"loop {llm.loop}, {llm.loop.cost(llm.n_layer):.2f} times the layers{memory}"

    def command(self, line: str) -> None:
        name, *argument = line.strip().split(maxsplit=1)
        if name in COMMANDS:
            COMMANDS[name].run(self, argument[0] if argument else "")
            return
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise EdgeloopError(f"{name} is not a command; " + (f"did you mean {near[0]}?" if near else "/help lists them"))

    @_command("/loop [SPEC|off|auto]", "loop from now on, as in /loop 12-20x3; alone: show it")
    def _loop(self, spec: str) -> None:
        if spec:
            self.chat.llm.loop = spec
        if spec == "auto":
            from edgeloop.recipes import choose

            note(choose(self.chat.llm.metadata).why)
        note(self.loop_line())

    @_command("/compare [TEXT]", "TEXT or the last question without and with the loop")
    def _compare(self, text: str) -> None:
        from edgeloop.cli.comparison import show

        with no_echo():
            show(self.chat.compare(text))
        _gap()

    @_command("/retry", "another answer to the last question")
    def _retry(self, _: str) -> None:
        self.show(self.chat.retry())

    @_command("/undo", "take back the last question and its answer")
    def _undo(self, _: str) -> None:
        question = " ".join(self.chat.undo().split())
        note(f"taken back: {question if len(question) <= 60 else question[:57] + '...'}")

    @_command("/system [TEXT|off]", "set the system message; alone: show it")
    def _system(self, text: str) -> None:
        if text:
            self.chat.set_system(None if text == "off" else text)
        note(f"system message: {self.chat.system}" if self.chat.system else "no system message")

    @_command("/image FILE", "goes with the next question (needs --mmproj)")
    def _image(self, argument: str) -> None:
        path = _path(argument, "/image FILE")
        self.chat.attach(path)
        note(f"{path} goes with the next question")

    @_command("/save FILE", "write the conversation as JSON")
    def _save(self, argument: str) -> None:
        note(f"saved in {self.chat.save(_path(argument, '/save FILE'))}")

    @_command("/load FILE", "go on with a saved conversation, under its loop")
    def _load(self, argument: str) -> None:
        path = _path(argument, "/load FILE")
        for difference in self.chat.load(path):
            note(f"note: {difference}")
        note(f"{_count(len(self.chat.messages) // 2, 'exchange')}, {self.loop_line()}")

    @_command("/stats", "tokens, speed and memory")
    def _stats(self, _: str) -> None:
        for label, value in _figures(self.chat, self.loop_line()):
            say(f"{label:<14}{value}")

    @_command("/reset", "forget the conversation")
    def _reset(self, _: str) -> None:
        self.chat.reset()
        note("the conversation is forgotten")

    @_command("/help", "this text")
    def _help(self, _: str) -> None:
        for command in COMMANDS.values():
            say(f"{command.usage:<23}{command.meaning}")
        say(KEYS)

    @_command("/exit", "leave")
    def _exit(self, _: str) -> None:
        raise EOFError


class _PlainStream:
    """The text as it is."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._is_empty = True

    def write(self, piece: str) -> None:
        print(printable(piece) if self._is_terminal else piece, end="", flush=True)
        self._is_empty = self._is_empty and not piece

    def close(self) -> None:
        if not self._is_empty:
            print(flush=True)


def _messages() -> Iterator[str]:
    """What the person types, or the lines of standard input; a \\ at the end of a line continues it."""
    if sys.stdin.isatty():
        from edgeloop.cli.editor import Editor

        editor = Editor(
            {name: command.meaning for name, command in COMMANDS.items()},
            [name for name, command in COMMANDS.items() if command.usage.endswith("FILE")],
        )
        while True:
            try:
                yield editor.read().strip("\n")
            except KeyboardInterrupt:
                note("Ctrl-D or /exit leaves")
            except EOFError:
                return
    message = ""
    for line in sys.stdin:
        message += line.rstrip("\r\n")
        if message.endswith("\\"):
            message = message[:-1] + "\n"
        else:
            yield message
            message = ""
    if message:
        yield message


def _gap() -> None:
    """An empty line between what was said and the next question."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(flush=True)


def _figures(chat: Chat, loop_line: str) -> Iterator[tuple[str, str]]:
    import psutil

    llm = chat.llm
    n_tokens, is_counted = chat.n_tokens()
    yield "loop", loop_line.removeprefix("loop ")
    yield (
        "conversation",
        f"{_count(len(chat.messages) // 2, 'exchange')}, {'' if is_counted else 'about '}{n_tokens} of {llm.n_ctx()} tokens "
        f"({100 * n_tokens / llm.n_ctx():.0f} %)",
    )
    if chat.last:
        last = chat.last
        rate = f", {last.tokens_per_second:.1f} tokens/s" if last.tokens_per_second else ""
        yield "last answer", f"{_count(len(last.tokens), 'token')} in {last.seconds:.1f} s{rate}, loop {last.loop}"
        yield "its prompt", f"{_count(last.prompt_tokens, 'token')}, {last.seconds_to_first:.1f} s to the first token"
    yield "memory", f"{size(psutil.Process().memory_info().rss)} in this process"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _path(argument: str, usage: str) -> str:
    """A file as people type and drop it: with blanks, in quotes, or with a backslash before each blank."""
    if not argument:
        raise EdgeloopError(f"no file is named; {usage}")
    if os.name == "nt":
        return argument.strip('"')
    try:
        words = shlex.split(argument)
    except ValueError:
        return argument
    return words[0] if len(words) == 1 else argument

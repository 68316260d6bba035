"""`edgeloop chat`: talk to a model; the loop can be changed between answers."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import error, note, size
from edgeloop.errors import EdgeloopError

HELP = """\
/loop SPEC  apply a loop from now on, for example /loop 12-20x3
/loop off   the plain model
/loop       show the loop that is set
/reset      forget the conversation
/help       this text
/exit       leave (also Ctrl-D)
Ctrl-C stops an answer."""


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
    rpc: o.Rpc = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
) -> None:
    """Talk to a model; /help lists the commands."""
    path = o.model_path(model, model_flag, offline)
    llm = o.load(
        path, loop=loop, ctx_size=ctx_size, threads=threads, gpu_layers=gpu_layers, seed=seed, rpc=rpc, verbose=verbose
    )
    sampling = {"max_tokens": predict, "temperature": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    session = ChatSession(llm, system, sampling)
    note(f"{path.name}, {llm.n_layer} layers, {session.loop_line()}")
    if not single_turn:
        note("/help lists the commands, /exit leaves")
    if prompt:
        _answer(session, prompt)
        if single_turn:
            return
    for line in _lines():
        if line.startswith("/"):
            if not _command(session, line):
                return
        elif line.strip():
            _answer(session, line)
            if single_turn:
                return


class ChatSession:
    """A conversation with one model. Knows nothing of terminals."""

    def __init__(self, llm, system: str | None, sampling: dict):
        self.llm = llm
        self.sampling = sampling
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def loop_line(self) -> str:
        """The loop and its price in a few words."""
        loop = self.llm.loop
        if loop.is_off:
            return "loop off"
        extra = self.llm.loop_memory_size()
        memory = f", {size(extra)} more keys and values" if extra else ""
        return f"loop {loop}, {loop.cost(self.llm.n_layer):.2f} times the layers{memory}"

    def answer(self, text: str):
        """Yields the answer in pieces; what was said is remembered, an answer that was stopped too."""
        from edgeloop.generate import Generation

        self.messages.append({"role": "user", "content": text})
        generation = Generation(self.llm, self.messages, **self.sampling)
        try:
            yield from generation
        except BaseException:
            if not generation.text:
                self.messages.pop()
            raise
        finally:
            if generation.text:
                self.messages.append({"role": "assistant", "content": generation.text})


def _lines():
    """Lines that the user types, or those of standard input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  arrow keys and history for input()
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /exit leaves")


def _answer(session: ChatSession, text: str) -> None:
    try:
        for piece in session.answer(text):
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        note("stopped")
    except EdgeloopError as problem:
        error(str(problem))


def _command(session: ChatSession, line: str) -> bool:
    """Carry out a line that begins with /; False to leave."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name == "/exit":
        return False
    if name == "/help":
        note(HELP)
    elif name == "/reset":
        session.reset()
        note("the conversation is forgotten")
    elif name == "/loop":
        try:
            if argument:
                session.llm.loop = argument
            note(session.loop_line())
        except EdgeloopError as problem:
            error(str(problem))
    else:
        error(f"{name} is not a command; /help lists them")
    return True

"""`edgeloop env`: a loop for any other program that is linked to the library."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeloop.cli import options as o
from edgeloop.errors import LoopError


def env(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="Loop spec, for example 12-20x3.", show_default=False)],
    model: o.ModelFlag = None,
    offline: o.Offline = False,
) -> None:
    """Print LLAMA_LOOP=... for programs such as llama-server that are linked to edgeloop's libllama."""
    from edgeloop.gguf_tools import inspect
    from edgeloop.llama import native_arguments
    from edgeloop.loop import Loop
    from edgeloop.native import environment

    wanted = Loop.parse(spec)
    if not wanted.spans:
        raise LoopError(f"'{spec}' is no loop that could be written; give one such as 12-20x3")
    loop = wanted.resolve(inspect(o.model_path(None, model, offline)).n_layer)
    print(f"LLAMA_LOOP={environment(**native_arguments(loop))}")

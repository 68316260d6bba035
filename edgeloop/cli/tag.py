"""`edgeloop tag` and `edgeloop export`: a model file with a loop in its metadata, or with its layers repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import note
from edgeloop.cli.display import Progress

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="GGUF file, or USER/REPO[:QUANT] on the Hugging Face hub.", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace OUT if it is there.")]


def tag(
    model: Source,
    out: Out,
    loop: Annotated[
        str,
        typer.Option(
            "--loop", help="Loop spec, for example 12-20x3; off removes it.", metavar="SPEC", show_default=False
        ),
    ],
    force: Force = False,
    offline: o.Offline = False,
) -> None:
    """Copy a model with a loop written into its metadata.

    `--loop auto` finds it there. The tensors are copied bit for bit.
    """
    from edgeloop.gguf_tools import tag as write

    path = o.model_path(model, None, offline)
    with Progress() as progress:
        written = write(path, out, loop, lambda *bytes: progress(out.name, *bytes), overwrite=force)
    note(f"{out}: loop {written}")


def export(
    model: Source,
    out: Out,
    loop: Annotated[
        str,
        typer.Option(
            "--loop",
            help="A naive loop with kv=own, for example 45-51x2:naive,kv=own.",
            metavar="SPEC",
            show_default=False,
        ),
    ],
    force: Force = False,
    offline: o.Offline = False,
) -> None:
    """Copy a model with layers physically repeated.

    For programs that know no loops; only naive loops with kv=own can be written like this.
    """
    from edgeloop.gguf_tools import export as write

    path = o.model_path(model, None, offline)
    with Progress() as progress:
        order = write(path, out, loop, lambda *bytes: progress(out.name, *bytes), overwrite=force)
    note(f"{out}: {len(order)} layers")

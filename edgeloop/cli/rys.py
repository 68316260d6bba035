"""`edgeloop rys`: between the notation of RYS and loop specs."""

from __future__ import annotations

from typing import Annotated

import typer


def rys(
    what: Annotated[
        str, typer.Argument(metavar="I,J|SPEC", help="For example 45,52 or 45-51x2:naive,kv=own.", show_default=False)
    ],
) -> None:
    """Translate what RYS writes into a loop spec, or back.

    I,J are layers I to J - 1 run twice.
    """
    from edgeloop.recipes import from_rys, to_rys

    print(to_rys(what) if "x" in what or what.strip() == "off" else from_rys(what))

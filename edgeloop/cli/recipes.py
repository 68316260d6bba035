"""`edgeloop recipes`: the loops that are known, with the evidence for and against them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Iterator, Optional

import typer

from edgeloop.cli.console import note
from edgeloop.cli.display import table
from edgeloop.errors import EdgeloopError

if TYPE_CHECKING:
    from edgeloop.recipes import Recipe


def recipes(
    name: Annotated[
        Optional[str],
        typer.Argument(metavar="NAME", help="Only those with this in their name, in full.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """List the known loops, and how good the evidence is."""
    from edgeloop.recipes import load_recipes, user_folder

    known = [recipe for recipe in load_recipes() if (name or "").lower() in recipe.name.lower()]
    if not known:
        raise EdgeloopError(f"no recipe has '{name}' in its name; `edgeloop recipes` lists them all")
    if json:
        import json as j

        print(j.dumps([recipe.as_dict() for recipe in known], ensure_ascii=False))
    elif name:
        print("\n\n".join("\n".join(_in_full(recipe)) for recipe in known))
    else:
        rows = ([r.name, "yes" if r.recommended else "no", str(r.loop), "\n".join(map(str, r.evidence))] for r in known)
        table(["model", "auto", "loop", "gain in points [95 % interval]"], rows)
        note(f"--loop auto takes those with yes; recipes of your own go into {user_folder()}")
        note("`edgeloop recipes NAME` says where the figures come from")


def _in_full(recipe: Recipe) -> Iterator[str]:
    yield f"{'model':<18}{recipe.name}"
    yield f"{'recognised by':<18}{', '.join(f'{key} {value}' for key, value in recipe.match.items())}"
    yield f"{'loop':<18}{recipe.loop}"
    yield f"{'auto':<18}{'yes' if recipe.recommended else f'no, {recipe.doubt}'}"
    for evidence in recipe.evidence:
        yield f"{'evidence':<18}{evidence}"
        yield from (f"{'':<18}  {text}" for text in (evidence.note, evidence.source) if text)
    yield f"{'file':<18}{recipe.path}"

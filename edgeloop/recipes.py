"""`auto`: a loop from the file's own metadata, else from a recipe for its model family, else off.

A recipe is a TOML file in models/: how to recognise the model, the loop, and the evidence both ways.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Mapping

from edgeloop._llama_cpp import vendor_dir
from edgeloop.loop import OFF, Loop

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METADATA_KEY = "edgeloop.loop"


@dataclass(frozen=True)
class Recipe:
    name: str
    loop: Loop
    match: Mapping[str, Any]  # metadata keys without the architecture's prefix, and `architecture` itself
    evidence: tuple[Mapping[str, Any], ...]

    def fits(self, metadata: Mapping[str, Any]) -> bool:
        """Compare with a file's metadata; values may be strings, as llama.cpp gives them."""
        arch = metadata.get("general.architecture")
        wanted = {f"{arch}.{key}": value for key, value in self.match.items() if key != "architecture"}
        return arch == self.match["architecture"] and all(str(metadata.get(k)) == str(v) for k, v in wanted.items())


@dataclass(frozen=True)
class Choice:
    """What `auto` means for a model, and a sentence that says why."""

    loop: Loop
    why: str


def load_recipes() -> list[Recipe]:
    """The recipes that edgeloop carries, by file name."""
    recipes = []
    for path in sorted((vendor_dir() / "models").glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        recipes.append(Recipe(data["name"], Loop.parse(data["loop"]), data["match"], tuple(data["evidence"])))
    return recipes


def choose(metadata: Mapping[str, Any]) -> Choice:
    """The loop of a model. Raises LoopError when the file's own metadata holds a wrong one."""
    own = metadata.get(METADATA_KEY)
    if own is not None:
        return Choice(Loop.parse(own), f"loop {own} from the file's own metadata")
    for recipe in load_recipes():
        if recipe.fits(metadata):
            evidence = "; ".join(f"{e['gain']:+.2f} points on {e['task']} ({e['source']})" for e in recipe.evidence)
            return Choice(recipe.loop, f"loop {recipe.loop} from the recipe for {recipe.name}: {evidence}")
    return Choice(OFF, "no recipe is known for this model, so the loop stays off; give one with --loop")

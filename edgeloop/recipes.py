"""`auto`: a loop from the file's own metadata, else from a recipe for its model family, else off.

A recipe is a TOML file, in models/ or in the user's own folder: how to recognise the model, the loop, and the evidence
for and against it. Only a recipe with recommended = true is ever taken without being asked for.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Mapping

import platformdirs

from edgeloop._llama_cpp import vendor_dir
from edgeloop.errors import LoopError
from edgeloop.loop import OFF, Loop

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METADATA_KEY = "edgeloop.loop"

_RECIPE_KEYS = {"name", "loop", "recommended", "doubt", "match", "evidence"}
_RYS = re.compile(r"\(?\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)?")


@dataclass(frozen=True)
class Evidence:
    """One measurement: points of accuracy gained and their 95 % interval, or in words where no figure is known."""

    task: str
    source: str
    kind: str  # published, follow-up (by the same authors), replication (by others)
    gain: float | None = None
    interval: tuple[float, float] | None = None
    result: str = "no figure"  # instead of a gain
    note: str = ""

    def __str__(self) -> str:
        """+0.57 [+0.15, +1.00] on MMLU (replication)"""
        gain = self.result if self.gain is None else f"{self.gain:+.2f}"
        interval = " [{:+.2f}, {:+.2f}]".format(*self.interval) if self.interval else ""
        return f"{gain}{interval} on {self.task} ({self.kind})"


@dataclass(frozen=True)
class Recipe:
    name: str
    loop: Loop
    recommended: bool
    doubt: str  # why it is not recommended, empty if it is
    match: Mapping[str, Any]  # metadata keys without the architecture's prefix; `architecture`; `name`, a regex
    evidence: tuple[Evidence, ...]
    path: Path

    def fits(self, metadata: Mapping[str, Any]) -> bool:
        """Compare with a file's metadata; values may be strings, as llama.cpp gives them."""
        arch = metadata.get("general.architecture")
        if arch != self.match["architecture"] or f"{arch}.pooling_type" in metadata:  # an embedding model
            return False
        name = re.search(self.match.get("name", ""), str(metadata.get("general.name", "")), re.IGNORECASE)
        numbers = {k: v for k, v in self.match.items() if k not in ("architecture", "name")}
        return name is not None and all(str(metadata.get(f"{arch}.{k}")) == str(v) for k, v in numbers.items())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {
            "loop": str(self.loop),
            "evidence": [vars(evidence) for evidence in self.evidence],
            "path": str(self.path),
        }


@dataclass(frozen=True)
class Choice:
    """What `auto` means for a model, and a sentence that says why."""

    loop: Loop
    why: str


def user_folder() -> Path:
    """Where recipes of the user are looked for: EDGELOOP_CONFIG/recipes, by default in the user's config folder."""
    return Path(os.environ.get("EDGELOOP_CONFIG") or platformdirs.user_config_dir("edgeloop")) / "recipes"


def load_recipes() -> list[Recipe]:
    """The user's recipes, then those that edgeloop carries, by file name. Raises LoopError for one that is wrong."""
    return [
        _load(path) for folder in (user_folder(), vendor_dir() / "models") for path in sorted(folder.glob("*.toml"))
    ]


def _load(path: Path) -> Recipe:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        _check_keys(data, _RECIPE_KEYS)
        if "architecture" not in data["match"]:
            raise LoopError("[match] needs architecture")
        re.compile(data["match"].get("name", ""))
        evidence = tuple(map(_evidence, data.get("evidence", ())))
        loop = Loop.parse(data["loop"])
        if loop.is_auto:
            raise LoopError("loop must be a loop, not auto")
        doubt = data.get("doubt", "")
        return Recipe(data["name"], loop, data.get("recommended", not doubt), doubt, data["match"], evidence, path)
    except KeyError as error:
        raise LoopError(f"{path}: the recipe needs {error.args[0]}") from error
    except (LoopError, TypeError, ValueError, re.error, OSError) as error:
        raise LoopError(f"{path}: {error}") from error


def _evidence(item: Mapping[str, Any]) -> Evidence:
    _check_keys(item, {field.name for field in fields(Evidence)})
    evidence = Evidence(**item)
    low, high = item.get("interval", (0, 0))
    if not all(isinstance(number, (int, float)) for number in (item.get("gain", 0), low, high)):
        raise LoopError("gain is a number, interval two of them")
    return replace(evidence, interval=(low, high) if "interval" in item else None)


def _check_keys(table: Mapping[str, Any], known: set[str]) -> None:
    unknown = table.keys() - known
    if unknown:
        raise LoopError(f"'{min(unknown)}' is not a key here; there are {', '.join(sorted(known))}")


def choose(metadata: Mapping[str, Any]) -> Choice:
    """The loop of a model. Raises LoopError when the file's own metadata or a recipe holds a wrong one."""
    own = metadata.get(METADATA_KEY)
    if own is not None:
        return Choice(Loop.parse(own), f"loop {own} from the file's own metadata")
    recipe = next((recipe for recipe in load_recipes() if recipe.fits(metadata)), None)
    if recipe is None:
        return Choice(
            OFF,
            "no recipe is known for this model, so the loop stays off; four layers near the middle are a beginning, "
            "--loop 45%-55%x3 for example: compare it with the plain model on your own task",
        )
    if not recipe.recommended:
        return Choice(
            OFF,
            f"the loop stays off: the recipe for {recipe.name} is not recommended, {recipe.doubt}; --loop '{recipe.loop}' tries it",
        )
    evidence = ", ".join(map(str, recipe.evidence)) or "it gives no evidence"
    return Choice(recipe.loop, f"loop {recipe.loop} from the recipe for {recipe.name}: {evidence}")


def from_rys(pair: str) -> Loop:
    """The loop that RYS writes I,J: layers I to J - 1 run twice, each time with keys and values of their own; 0,0 is off."""
    numbers = _RYS.fullmatch(pair.strip())
    if numbers is None:
        raise LoopError(f"'{pair}' is not what RYS writes; give two numbers such as 45,52")
    first, end = map(int, numbers.groups())
    if first == end == 0:
        return OFF
    if first >= end:
        raise LoopError(
            f"'{pair}': the second number must be larger, it is the layer after the last one that is repeated"
        )
    return Loop.parse(f"{first}-{end - 1}x2:naive,kv=own")


def to_rys(spec: str | Loop) -> str:
    """What RYS writes for a loop. Raises LoopError for all but one span that naively runs twice with kv=own."""
    loop = Loop.parse(spec)
    if loop == OFF:
        return "0,0"
    span = loop.spans[0] if len(loop.spans) == 1 and not loop.spans[0].is_fraction else None
    pair = f"{span.first},{span.last + 1}" if span else "0,0"
    if from_rys(pair) != loop:
        raise LoopError(f"'{loop}' has no form in RYS, which knows only one span such as 45-51x2:naive,kv=own")
    return pair

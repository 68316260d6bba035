"""Write the generated parts of docs/: the help texts, the recipes and the pictures of loops.

    python scripts/docs.py            writes them
    python scripts/docs.py --check    fails when one is stale

Needs an installed edgeloop.
"""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
CELL, GAP, ROW, MARGIN = 30, 14, 52, 14  # pixels of a picture


# ---- help texts ----------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command's help, in tables: how a terminal breaks the lines is the libraries' business."""
    import typer

    from edgeloop.cli import app

    group = typer.main.get_command(app)
    lines = ["# Commands", "", "What `edgeloop COMMAND --help` says; written by `scripts/docs.py`.", ""]
    lines += ["| command | |", "|---|---|"]
    shown = {name: command for name, command in group.commands.items() if not command.hidden}
    lines += [f"| [`{name}`](#edgeloop-{name}) | {cell(first_line(command.help))} |" for name, command in shown.items()]
    for name, command in shown.items():
        lines += ["", f"## edgeloop {name}", "", *command.help.strip().splitlines(), ""]
        lines += ["| | | default | variable |", "|---|---|---|---|", *map(parameter, command.params)]
    return "\n".join(lines) + "\n"


def parameter(param: Any) -> str:
    names = (
        [*param.opts, *param.secondary_opts]
        if param.param_type_name == "option"
        else [param.metavar or param.name.upper()]
    )
    value = f" {param.metavar}" if param.param_type_name == "option" and param.metavar else ""
    default = "" if param.default in (None, False) or not getattr(param, "show_default", True) else f"`{param.default}`"
    variable = f"`{param.envvar}`" if param.envvar else ""
    return f"| {', '.join(f'`{n}`' for n in names)}{value} | {cell(param.help or '')} | {default} | {variable} |"


def first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- recipes -------------------------------------------------------------------------------------------------------


def recipes() -> str:
    """The recipes with their evidence, both ways."""
    from edgeloop.recipes import load_recipes, user_folder

    lines = [
        "# Recipes",
        "",
        "Loops that are known for a model family, with what speaks for and against them; written by `scripts/docs.py` from",
        "`models/*.toml`. `--loop auto` takes the file's own metadata first, then a recommended recipe. A published gain is what its authors",
        "report on their task; measure on your own.",
        "",
    ]
    for recipe in load_recipes():
        if recipe.path.parent != user_folder():
            lines += recipe_section(recipe)
    return "\n".join(lines)


def recipe_section(recipe: Any) -> list[str]:
    match = ", ".join(f"{key} {value}" for key, value in recipe.match.items())
    verdict = "**Recommended.**" if recipe.recommended else f"Not recommended: {recipe.doubt}."
    lines = [f"## {recipe.name}", "", f"Loop `{recipe.loop}`. {verdict}", "", f"Recognised by {match}.", ""]
    lines += ["| points of accuracy | | source |", "|---|---|---|"]
    lines += [f"| {cell(str(item))} | {cell(item.note)} | {cell(item.source)} |" for item in recipe.evidence]
    return [*lines, ""]


# ---- pictures ------------------------------------------------------------------------------------------------------

# of loops on a model of twelve layers, and what a text reader gets
LOOPS = {
    "block": ("4-6x3", "Layers 0 to 3, then layers 4 to 6 three times as a whole, then layers 7 to 11."),
    "layer": (
        "4-6x3:unit=layer",
        "Layers 0 to 3, then layer 4 three times, layer 5 three times, layer 6 three times, then layers 7 to 11.",
    ),
    "spans": (
        "2-3x2+7-9x3",
        "Layers 0 and 1, layers 2 and 3 twice, layers 4 to 6, layers 7 to 9 three times, layers 10 and 11.",
    ),
}
N_LAYER = 12

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f;text-anchor:middle}"
    ".plain{fill:#eaeef2;stroke:#8c959f}.looped{fill:#ffd8b5;stroke:#bc4c00}.again{fill:#fff1e5;stroke:#bc4c00}"
    ".flow{fill:none;stroke:#57606a;stroke-width:1.5;marker-end:url(#arrow)}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.plain{fill:#30363d;stroke:#8b949e}.looped{fill:#5a2a05;stroke:#f0883e}"
    ".again{fill:#3a1d08;stroke:#f0883e}.flow{stroke:#8b949e}#arrow path{fill:#8b949e}}"
)
ARROW = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"><path d="M0 0 8 4 0 8z" fill="#57606a"/></marker>'


def picture(spec: str, about: str) -> str:
    """The layers in the order in which they are applied: one column each, a row down for every further pass."""
    from edgeloop import Loop

    loop = Loop.parse(spec)
    order = loop.expanded(N_LAYER)
    passes: dict[int, int] = {}
    cells = []
    for il in order:
        cells.append((il, passes.get(il, 0)))
        passes[il] = cells[-1][1] + 1
    n_rows = max(passes.values())
    width = 2 * MARGIN + N_LAYER * (CELL + GAP) - GAP
    height = 2 * MARGIN + n_rows * ROW + CELL - ROW

    def middle(cell: tuple[int, int]) -> tuple[float, float]:
        return MARGIN + cell[0] * (CELL + GAP) + CELL / 2, MARGIN + cell[1] * ROW + CELL / 2

    parts = []
    for il, i in cells:
        x, y = middle((il, i))
        kind = "plain" if passes[il] == 1 else "looped" if i == 0 else "again"
        parts.append(
            f'<rect class="{kind}" x="{x - CELL / 2:g}" y="{y - CELL / 2:g}" width="{CELL}" height="{CELL}" rx="5"/>'
        )
        parts.append(f'<text x="{x:g}" y="{y + 4.5:g}">{il}</text>')
    for before, after in zip(cells, cells[1:]):
        if after == (before[0] + 1, before[1]):
            continue  # side by side says it
        (x0, y0), (x1, y1) = middle(before), middle(after)
        if after[1] > before[1]:  # the next pass
            way = f"M{x0:g} {y0 + CELL / 2:g} L{x1:g} {y1 - CELL / 2:g}"
        else:  # out of the span
            x = (x0 + x1) / 2
            way = f"M{x0 + CELL / 2:g} {y0:g} H{x - 3:g} Q{x:g} {y0:g} {x:g} {y0 - 3:g} V{y1 + 3:g} Q{x:g} {y1:g} {x + 3:g} {y1:g} H{x1 - CELL / 2:g}"
        parts.append(f'<path class="flow" d="{way}"/>')
    title = html.escape(f"{spec}. {about}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{title}</title><style>{STYLE}</style><defs>{ARROW}</defs>{''.join(parts)}</svg>\n"
    )


# ---- all of them ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a file is stale")
    args = parser.parse_args()
    files = {"cli.md": command_line(), "recipes.md": recipes()}
    files |= {f"pictures/{name}.svg": picture(*loop) for name, loop in LOOPS.items()}
    stale = []
    for name, text in files.items():
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"docs/{name}")
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if args.check and stale:
        sys.exit(f"{', '.join(stale)}: stale; run scripts/docs.py")


if __name__ == "__main__":
    main()

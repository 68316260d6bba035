"""`edgeloop pull`, `list` and `rm`: the models in the Hugging Face hub's cache."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Optional

import typer

from edgeloop.cli.console import note, size
from edgeloop.cli.display import Progress, table
from edgeloop.errors import EdgeloopError, ModelError

NAME_HELP = "USER/REPO on the hub, or USER/REPO:QUANT, for example USER/REPO:Q4_K_M."


def pull(
    model: Annotated[
        Optional[str], typer.Argument(metavar="MODEL", help=NAME_HELP + " Default: the demo model.", show_default=False)
    ] = None,
    mmproj: Annotated[bool, typer.Option("--mmproj", help="Also the vision part of the model (mmproj).")] = False,
) -> None:
    """Download a model, or bring it up to date.

    Prints the path of its file. A download that was stopped continues where it was.
    """
    from edgeloop import hub, huggingface

    if model is None:
        print(hub.demo_model(say=note))
        return
    repo, quant = _parse(model)
    try:
        with Progress() as progress:
            path = huggingface.pull(repo, quant, say=note, progress=progress)
            projector = huggingface.pull_projector(repo, say=note, progress=progress) if mmproj else None
    except KeyboardInterrupt:
        note("stopped; the same command continues where it was")
        raise
    print(path)
    if projector:
        print(projector)
    elif mmproj:
        raise ModelError(f"{repo}: has no vision part (a file with mmproj in its name)")


def list_(json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False) -> None:
    """List the models that are there.

    The demo model, and the GGUF models in the cache that all programs of the Hugging Face hub share.
    """
    from edgeloop import hub, huggingface

    models = [
        {"name": m.name, "bytes": m.size, "last_used": m.last_used, "path": str(m.path)}
        for m in huggingface.cached_models()
    ]
    demo = hub.models_dir() / hub.DEMO_NAME
    if demo.exists():
        facts = demo.stat()
        models.append({"name": None, "bytes": facts.st_size, "last_used": facts.st_atime, "path": str(demo)})
    if json:
        import json as j

        print(j.dumps(models, ensure_ascii=False))
    elif models:
        rows = ((m["name"] or "(none: the demo model)", size(m["bytes"]), _ago(m["last_used"])) for m in models)
        table(["MODEL", "size", "used"], rows)
    else:
        note("no models yet; `edgeloop pull USER/REPO` fetches one")


def rm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=NAME_HELP, show_default=False)],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete a downloaded model.

    Without a quant all GGUF files of the repository, unfinished downloads too; its other files stay.
    """
    from edgeloop import huggingface

    deletion = huggingface.deletion(*_parse(model))
    what = f"{', '.join(deletion.names)} ({size(deletion.size)})"
    if not yes:
        if not sys.stdin.isatty():
            raise EdgeloopError(f"{model}: {what} would be deleted; add --yes where nobody can be asked")
        if not typer.confirm(f"Delete {what}?", err=True):
            raise typer.Abort()
    deletion.execute()
    note(f"deleted {what}")


def _parse(model: str) -> tuple[str, str | None]:
    from edgeloop.huggingface import parse_name

    name = parse_name(model)
    if name is None:
        raise ModelError(f"{model}: is no model of the hub; write USER/REPO or USER/REPO:QUANT")
    return name


def _ago(then: float) -> str:
    days = int((time.time() - then) // 86400)
    return ["today", "yesterday"][max(days, 0)] if days < 2 else f"{days} days ago"

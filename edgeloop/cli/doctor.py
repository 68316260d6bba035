"""`edgeloop doctor`: what was built, what was found, and a run of the demo model."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import error, note, size


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    demo: Annotated[bool, typer.Option("--demo/--no-demo", help="Run the demo model (98 MB, fetched once).")] = True,
    threads: o.Threads = None,
    offline: o.Offline = False,
) -> None:
    """Show what this installation is made of and check that it works."""
    from edgeloop import doctor as examine
    from edgeloop.hub import demo_model

    found = examine.facts()
    wrong = examine.problems(found)
    if demo:
        found["demo"] = examine.demo(demo_model(offline=offline, say=note), threads=threads or o.physical_cores())
        wrong += found["demo"]["problems"]
    found["problems"] = wrong
    if json:
        import json as j

        print(j.dumps(found, ensure_ascii=False))
    else:
        for label, value in _rows(found):
            print(f"{label:<18}{value}")
    for problem in wrong:
        error(problem)
    if wrong:
        raise typer.Exit(1)


def _rows(found: dict):
    yield "edgeloop", f"{found['edgeloop']}, loop interface {found['loop_library']}"
    yield "llama.cpp", f"{found['llama_cpp']} with llama-cpp-python {found['llama_cpp_python']}"
    yield "python", found["python"]
    yield "platform", found["platform"]
    yield "libraries", found["library_folder"]
    yield "", ", ".join(found["libraries"])
    yield "backends", ", ".join(found["backends"]) or "none"
    for i, device in enumerate(found["devices"]):
        memory = f", {size(device['memory_bytes'])}" if device["memory_bytes"] else ""
        yield "" if i else "devices", f"{device['name']}: {device['description']} ({device['kind']}{memory})"
    yield "CPU features", ", ".join(found["cpu_features"])
    if "demo" in found:
        plain, looped = found["demo"]["plain"], found["demo"]["looped"]
        yield "demo", f"{found['demo']['prompt']} ..."
        yield "  plain", f"{' '.join(plain['text'].split())} ({plain['tokens_per_second']:.0f} tokens/s)"
        yield "  " + looped["loop"], f"{' '.join(looped['text'].split())} ({looped['tokens_per_second']:.0f} tokens/s)"
    yield "verdict", f"{len(found['problems'])} problems" if found["problems"] else "all is well"

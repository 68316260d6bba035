"""`edgeloop inspect`: what a model file holds, and what a loop costs on it."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import note, size


def inspect(
    model: o.Model = None,
    model_flag: o.ModelFlag = None,
    loop: o.LoopSpec = "off",
    ctx_size: o.CtxSize = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: o.Offline = False,
) -> None:
    """Show a model's layers and sizes, and what a loop costs on it."""
    from edgeloop.gguf_tools import inspect as read
    from edgeloop.loop import Loop

    wanted = Loop.parse(loop)
    info = read(o.model_path(model, model_flag, offline))
    n_ctx = o.default_context(info.n_ctx_train) if ctx_size is None else ctx_size or info.n_ctx_train
    if wanted.is_auto:
        from edgeloop.recipes import choose

        choice = choose(info.metadata)
        note(choice.why)
        wanted = choice.loop
    resolved = wanted.resolve(info.n_layer)
    facts = {
        "path": info.path,
        "name": info.name,
        "architecture": info.architecture,
        "layers": info.n_layer,
        "embedding": info.n_embd,
        "parameters": info.n_params,
        "file_bytes": info.file_size,
        "layer_bytes": list(info.layer_sizes),
        "tensor_types": info.tensor_types,
        "train_context": info.n_ctx_train,
        "context": n_ctx,
        "kv_bytes": info.kv_bytes(n_ctx),
        "file_loop": info.loop,
    }
    if resolved:
        facts |= {
            "loop": str(resolved),
            "layer_order": resolved.expanded(info.n_layer),
            "cost_ratio": round(resolved.cost(info.n_layer), 4),
            "bytes_ratio": round(info.predicted_cost(resolved), 4),
            "loop_memory_bytes": info.loop_memory_bytes(resolved, n_ctx),
        }
    if json:
        import json as j

        print(j.dumps(facts, ensure_ascii=False))
        return
    for label, value in _rows(facts):
        print(f"{label:<18}{value}")


def _rows(facts: dict):
    layer = max(facts["layer_bytes"])
    yield "file", f"{facts['path']} ({size(facts['file_bytes'])})"
    if facts["name"]:
        yield "name", facts["name"]
    yield "architecture", facts["architecture"]
    yield "parameters", f"{facts['parameters'] / 1e6:,.0f} million"
    yield (
        "layers",
        f"{facts['layers']} (0 to {facts['layers'] - 1}), {facts['embedding']} wide, up to {size(layer)} each",
    )
    yield "tensor types", ", ".join(f"{n} {t}" for t, n in facts["tensor_types"].items())
    yield "context", f"trained with {facts['train_context']:,} tokens"
    yield "keys and values", f"{size(facts['kv_bytes'])} at {facts['context']:,} tokens (f16)"
    if facts["file_loop"]:
        yield "loop in the file", facts["file_loop"]
    if "loop" in facts:
        yield "loop", facts["loop"]
        yield "layer order", _ranges(facts["layer_order"])
        yield (
            "cost",
            f"{facts['cost_ratio']:.2f} times the layers, {facts['bytes_ratio']:.2f} times the bytes read for a token",
        )
        extra = facts["loop_memory_bytes"]
        if extra is None:
            yield "extra memory", "a recurrent state for every further pass; keys and values with kv=own"
        else:
            yield (
                "extra memory",
                f"{size(extra)} of keys and values at {facts['context']:,} tokens" if extra else "none",
            )


def _ranges(order: list[int]) -> str:
    """0-11 12-14 12-14 15-29: ascending stretches."""
    stretches: list[list[int]] = []
    for il in order:
        if stretches and il == stretches[-1][1] + 1:
            stretches[-1][1] = il
        else:
            stretches.append([il, il])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in stretches)

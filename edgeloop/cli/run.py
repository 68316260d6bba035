"""`edgeloop run`: one answer to stdout."""

from __future__ import annotations

import sys
from contextlib import closing
from itertools import chain
from typing import Annotated, Optional

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import spinner
from edgeloop.errors import EdgeloopError


def run(
    model: o.Model = None,
    model_flag: o.ModelFlag = None,
    prompt: Annotated[
        Optional[str], typer.Option("-p", "--prompt", help="The question. Default: standard input.", show_default=False)
    ] = None,
    loop: o.LoopSpec = "off",
    ctx_size: o.CtxSize = None,
    predict: o.Predict = -1,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = -1,
    temp: o.Temp = 0.8,
    top_k: o.TopK = 40,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    seed: o.Seed = -1,
    system: o.System = None,
    mmproj: o.Mmproj = None,
    image: Annotated[
        Optional[list[str]],
        typer.Option(
            "--image", help="A picture before the prompt; may be repeated.", metavar="FILE", show_default=False
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    rpc: o.Rpc = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
) -> None:
    """Answer one prompt and exit."""
    if prompt is None:
        if sys.stdin.isatty():
            raise EdgeloopError("no prompt; give one with -p TEXT or on standard input")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise EdgeloopError("the prompt is empty")
    if raw and (system or image):
        raise EdgeloopError("--raw has no place for a system message or a picture; leave out -sys and --image")
    if image and not mmproj:
        raise EdgeloopError("--image needs the vision part of the model, --mmproj FILE")
    path = o.model_path(model, model_flag, offline)
    llm = o.load(
        path,
        loop=loop,
        ctx_size=ctx_size,
        threads=threads,
        gpu_layers=gpu_layers,
        seed=seed,
        rpc=rpc,
        verbose=verbose,
        mmproj=mmproj,
    )

    from edgeloop.generate import Generation
    from edgeloop.vision import with_images

    with closing(llm):
        messages = [{"role": "system", "content": system}] if system else []
        content = with_images(prompt, [llm.chat_handler.image(file) for file in image or ()])
        messages.append({"role": "user", "content": content})
        generation = Generation(
            llm,
            prompt if raw else messages,
            max_tokens=predict,
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        pieces = iter(generation)
        with spinner(lambda: generation.progress):
            first = next(pieces, "")
        for text in chain([first], pieces):
            if not json:
                print(text, end="", flush=True)
    if json:
        import json as j

        print(j.dumps({"model": str(path), "loop": str(llm.loop), **generation.as_dict()}, ensure_ascii=False))
    elif not generation.text.endswith("\n"):
        print(flush=True)

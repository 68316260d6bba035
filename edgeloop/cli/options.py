"""The options that commands share, named and defaulted as in llama.cpp; each has an environment variable EDGELOOP_*."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from edgeloop.cli.console import note, spinner
from edgeloop.errors import ModelError

DEFAULT_CTX = 8192  # or the model's, if that is smaller: its K/V must fit a laptop

MODEL_HELP = "GGUF file, or USER/REPO[:QUANT] on the Hugging Face hub; the demo model if left out."


def _option(*names: str, help: str, **kwargs: Any) -> Any:
    long = next(n for n in names if n.startswith("--"))
    variable = "EDGELOOP_" + long.removeprefix("--").split("/")[0].replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable, **kwargs)


Model = Annotated[Optional[str], typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelFlag = Annotated[Optional[str], _option("-m", "--model", help="The same as MODEL.", show_default=False)]
LoopSpec = Annotated[
    str, _option("--loop", help="Loop spec, for example 12-20x3; auto: a known one for this model.", metavar="SPEC")
]
CtxSize = Annotated[
    Optional[int],
    _option(
        "-c",
        "--ctx-size",
        help=f"Tokens of context, 0: the model's. Default: the model's, at most {DEFAULT_CTX}.",
        min=0,
        show_default=False,
    ),
]
Predict = Annotated[int, _option("-n", "--predict", help="Tokens to generate at most, -1: no limit.", min=-1)]
Threads = Annotated[
    Optional[int],
    _option("-t", "--threads", help="CPU threads. Default: the physical cores.", min=1, show_default=False),
]
GpuLayers = Annotated[int, _option("-ngl", "--gpu-layers", help="Layers to keep on the GPU, -1: all.", min=-1)]
Temp = Annotated[float, _option("--temp", help="Temperature, 0: the most likely token.", min=0)]
TopK = Annotated[int, _option("--top-k", help="Sample from the K most likely tokens, 0: from all.", min=0)]
TopP = Annotated[float, _option("--top-p", help="Sample from the tokens that make up this probability.", min=0, max=1)]
MinP = Annotated[
    float, _option("--min-p", help="Leave out tokens less likely than this times the most likely.", min=0, max=1)
]
Seed = Annotated[int, _option("-s", "--seed", help="Seed of the sampler, -1: random.", min=-1)]
System = Annotated[Optional[str], _option("-sys", "--system-prompt", help="System message.", show_default=False)]
Rpc = Annotated[
    Optional[str],
    _option(
        "--rpc", help="Offload to these RPC servers, HOST:PORT[,HOST:PORT...].", metavar="LIST", show_default=False
    ),
]
Mmproj = Annotated[
    Optional[str],
    _option("--mmproj", help="Vision part of the model, a GGUF file.", metavar="FILE", show_default=False),
]
Offline = Annotated[bool, _option("--offline", help="Never use the network.")]
Verbose = Annotated[bool, _option("-v", "--verbose", help="Show llama.cpp's log.")]


def model_path(model: str | None, flag: str | None, offline: bool) -> Path:
    """The local file that MODEL or -m means, fetched if need be."""
    from edgeloop.cli.display import Progress
    from edgeloop.hub import resolve_model

    if model and flag and model != flag:
        raise ModelError(f"two models are given, {model} and -m {flag}; name one")
    with Progress() as progress:
        return resolve_model(model or flag, offline=offline, say=note, progress=progress)


def load(
    path: Path,
    *,
    loop: str,
    ctx_size: int | None,
    threads: int | None,
    gpu_layers: int,
    seed: int,
    rpc: str | None,
    verbose: bool,
    mmproj: str | None = None,
    kind: type | None = None,
):
    """An edgeloop.Llama, or a `kind` of one, from the shared options."""
    from edgeloop.gguf_tools import inspect
    from edgeloop.llama import Llama
    from edgeloop.loop import Loop

    wanted = Loop.parse(loop)  # a typing error should not cost the time to load
    if ctx_size is None:
        ctx_size = default_context(inspect(path).n_ctx_train)
    if rpc:
        from edgeloop.rpc import add_servers

        add_servers(rpc)
    threads = threads or physical_cores()
    with nullcontext() if verbose else spinner(lambda: f"loading {path.name}"):
        llm = (kind or Llama)(
            str(path),
            loop=wanted,
            n_ctx=ctx_size,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=gpu_layers,
            seed=seed if seed >= 0 else 0xFFFFFFFF,
            verbose=verbose,
        )
        if mmproj:
            from edgeloop.vision import Vision

            llm.chat_handler = Vision(llm, mmproj)
    if wanted.is_auto:
        from edgeloop.recipes import choose

        note(choose(llm.metadata).why)
    return llm


def default_context(n_ctx_train: int) -> int:
    """Tokens of context where -c is left out, for a model trained with `n_ctx_train` (0: not known)."""
    return min(n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)


def physical_cores() -> int:
    """Hyper-threads only get in each other's way in matrix products."""
    import psutil

    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1

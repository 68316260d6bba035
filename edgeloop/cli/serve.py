"""`edgeloop serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import os
from ipaddress import ip_address
from typing import Annotated, Optional

import typer

from edgeloop.cli import options as o
from edgeloop.cli.console import note
from edgeloop.errors import EdgeloopError


def serve(
    model: o.Model = None,
    model_flag: o.ModelFlag = None,
    loop: o.LoopSpec = "off",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on, 0.0.0.0: all.", envvar="EDGELOOP_HOST")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", help="Port to listen on, 0: any free one.", min=0, max=65535, envvar="EDGELOOP_PORT"),
    ] = 8080,
    api_key: Annotated[
        Optional[str],
        typer.Option(
            "--api-key",
            help="Key that clients must send.",
            metavar="KEY",
            show_default=False,
            envvar="EDGELOOP_API_KEY",
        ),
    ] = None,
    cors: Annotated[
        Optional[list[str]],
        typer.Option(
            "--cors",
            help="Origin whose pages may use the server, again for more.",
            metavar="ORIGIN",
            envvar="EDGELOOP_CORS",
        ),
    ] = None,
    alias: Annotated[
        Optional[str],
        typer.Option(
            "--alias", help="Name of the model. Default: the file's.", show_default=False, envvar="EDGELOOP_ALIAS"
        ),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            "--patience", help="Seconds that a client may leave its answer unread.", min=0.1, envvar="EDGELOOP_PATIENCE"
        ),
    ] = 30.0,
    ctx_size: o.CtxSize = None,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = -1,
    rpc: o.Rpc = None,
    offline: o.Offline = False,
    verbose: o.Verbose = False,
) -> None:
    """Serve a model to OpenAI clients; a request may name its own loop."""
    if api_key == "":
        raise EdgeloopError("the API key is empty; leave --api-key out to need none")
    try:
        from edgeloop.server.app import create_app
        from edgeloop.server.engine import Engine
        from edgeloop.server.model import ServerLlama
        from edgeloop.server.run import CLOSE_SECONDS, Server, listen
    except ModuleNotFoundError as missing:
        raise EdgeloopError(f"the server needs {missing.name}; run `pip install 'edgeloop[server]'`") from None

    path = o.model_path(model, model_flag, offline)
    # before the model is loaded; who connects meanwhile waits
    with listen(host, port) as sock:
        llm = o.load(
            path,
            loop=loop,
            ctx_size=ctx_size,
            threads=threads,
            gpu_layers=gpu_layers,
            seed=-1,
            rpc=rpc,
            verbose=verbose,
            kind=ServerLlama,
        )
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
        engine = Engine(llm)
        app = create_app(engine, name=alias or path.stem, api_key=api_key, cors=cors or [], patience=patience)
        note(f"{path.name}, {llm.n_layer} layers, loop {llm.loop}, {llm.n_ctx()} tokens of context")
        note(f"listening on {_url(sock)}, Ctrl-C stops")
        if not api_key and not ip_address(sock.getsockname()[0]).is_loopback:
            note("whoever reaches this address can use it; --api-key asks for a key")
        try:
            Server(app, engine, access_log=verbose).run(sockets=[sock])
        finally:
            if not engine.close(CLOSE_SECONDS):
                os._exit(130)  # a long batch cannot be stopped, and must not run while the process ends


def _url(sock) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

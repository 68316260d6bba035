"""Layers on other machines: servers that run `ggml-rpc-server` become devices, to which -ngl offloads.

Weights and K/V of an offloaded layer live on its server; a few hidden states per token and border travel. The protocol
has no encryption and no password: use it in a network that you trust.
"""

from __future__ import annotations

import ctypes
import re
import socket

from llama_cpp._ctypes_extensions import load_shared_library
from llama_cpp._ggml import libggml, libggml_base_path

from edgeloop.errors import EdgeloopError

_ENDPOINT = re.compile(r"[\w.\-\[\]:]+:\d{1,5}")

_added: set[str] = set()

CONNECT_SECONDS = 5.0


def add_servers(endpoints: str) -> None:
    """Make the servers HOST:PORT[,HOST:PORT...] devices of this process, before a model is loaded.

    Raises EdgeloopError when one is not written so, does not answer, or RPC was not built in.
    """
    try:
        lib = load_shared_library("ggml-rpc", libggml_base_path)
    except FileNotFoundError:
        raise EdgeloopError("this build has no RPC; build with CMAKE_ARGS=-DGGML_RPC=ON") from None
    lib.ggml_backend_rpc_add_server.restype, lib.ggml_backend_rpc_add_server.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_char_p],
    )
    libggml.ggml_backend_register.restype, libggml.ggml_backend_register.argtypes = None, [ctypes.c_void_p]
    for endpoint in filter(None, (part.strip() for part in endpoints.split(","))):
        if not _ENDPOINT.fullmatch(endpoint):
            raise EdgeloopError(f"'{endpoint}' is not HOST:PORT")
        if endpoint in _added:
            continue
        # upstream ends the process when nobody answers
        host, _, port = endpoint.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError):
            raise EdgeloopError(f"no RPC server answers at {endpoint}; start ggml-rpc-server there") from None
        registry = lib.ggml_backend_rpc_add_server(endpoint.encode())
        libggml.ggml_backend_register(registry)
        _added.add(endpoint)

"""`edgeloop config`: what a Makefile needs to build a program in C or C++ against the libraries that edgeloop carries."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from edgeloop.errors import EdgeloopError


def config(
    cflags: Annotated[bool, typer.Option("--cflags", help="Options for the compiler.")] = False,
    libs: Annotated[bool, typer.Option("--libs", help="Options for the linker.")] = False,
    rpath: Annotated[
        bool, typer.Option("--rpath", help="Option for the linker by which the program finds the libraries here.")
    ] = False,
    include_dir: Annotated[bool, typer.Option("--include-dir", help="Folder of llama-loop.h and llama.h.")] = False,
    lib_dir: Annotated[bool, typer.Option("--lib-dir", help="Folder of the libraries.")] = False,
    cmake_dir: Annotated[bool, typer.Option("--cmake-dir", help="For cmake -Dedgeloop_DIR=DIR.")] = False,
    pkgconfig_dir: Annotated[bool, typer.Option("--pkgconfig-dir", help="For PKG_CONFIG_PATH.")] = False,
) -> None:
    """Print what it takes to compile a C program against libllama with the loop, in one line."""
    from edgeloop._llama_cpp import vendor_dir

    vendor = vendor_dir()
    include, lib = str(vendor / "include"), str(vendor / "llama_cpp" / "lib")
    values = [
        (cflags, [f"-I{include}"]),
        (libs, [f"-L{lib}", "-lllama", "-lggml", "-lggml-base"]),
        (rpath, [f"-Wl,-rpath,{lib}"]),
        (include_dir, [include]),
        (lib_dir, [lib]),
        (cmake_dir, [str(vendor / "cmake")]),
        (pkgconfig_dir, [str(vendor / "pkgconfig")]),
    ]
    words = [word for is_wanted, words in values if is_wanted for word in words]
    if not words:
        raise EdgeloopError("say what to print, for example `edgeloop config --cflags --libs --rpath`")
    print(shlex.join(words))

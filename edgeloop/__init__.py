"""Run GGUF models with a span of layers applied more than once, damped, without a second copy of the weights.

    import edgeloop

    llm = edgeloop.Llama("model.gguf", loop="12-20x3")   # a llama_cpp.Llama in every other respect
    with llm.looped("off"):
        plain = llm.create_chat_completion([{"role": "user", "content": "Hello"}])

After `import edgeloop`, `import llama_cpp` anywhere in the process is the patched one that edgeloop carries. One `Llama`
belongs to one thread at a time; several of them, each with its own loop, may run in several threads.
"""

from importlib import import_module

from edgeloop._llama_cpp import use_vendored_llama_cpp

use_vendored_llama_cpp()

__version__ = "0.1.0"

# name -> module; imported on first use, so that `edgeloop --help` stays quick
_PUBLIC = {
    "AsyncLlama": "edgeloop.aio",
    "Llama": "edgeloop.llama",
    "Loop": "edgeloop.loop",
    "LoopError": "edgeloop.errors",
    "ModelError": "edgeloop.errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'edgeloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

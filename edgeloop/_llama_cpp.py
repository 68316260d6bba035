"""Makes `import llama_cpp` find the patched package that edgeloop carries. Imports nothing heavy."""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

NAME = "llama_cpp"


def vendor_dir() -> Path:
    """The folder that the build wrote: llama_cpp with its libraries, include/, licenses/."""
    spec = importlib.util.find_spec("edgeloop._vendor")
    if spec is None or spec.origin is None:
        raise ImportError("edgeloop was not built: run `pip install .` in its folder, and do not import it from there")
    return Path(spec.origin).parent


class _VendoredLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        _load_backends()


def _load_backends() -> None:
    """Portable builds have a library for each kind of CPU, which llama.cpp would look for beside the python program."""
    from llama_cpp._ggml import libggml, libggml_base_path

    libggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    libggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    libggml.ggml_backend_load_all_from_path.restype = None
    if not libggml.ggml_backend_reg_count():
        libggml.ggml_backend_load_all_from_path(str(libggml_base_path).encode())


class _VendoredFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        package = vendor_dir() / NAME
        source = str(package / "__init__.py")
        return importlib.util.spec_from_file_location(
            name, source, loader=_VendoredLoader(name, source), submodule_search_locations=[str(package)]
        )


def use_vendored_llama_cpp() -> None:
    """From now on `import llama_cpp` is the vendored one.

    Raises ImportError when another llama_cpp is loaded already: two of them cannot share a process.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        if Path(loaded.__file__ or "").parent != vendor_dir() / NAME:
            raise ImportError(
                f"another llama_cpp is already loaded from {loaded.__file__}; import edgeloop first, "
                "then `import llama_cpp` is the one that edgeloop carries"
            )
        return
    if not any(isinstance(finder, _VendoredFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _VendoredFinder())

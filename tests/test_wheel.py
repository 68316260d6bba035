"""The built wheel, in a fresh environment next to another llama_cpp."""

import os
import subprocess
import sys
import zipfile

import pytest

WHEEL = os.environ.get("EDGELOOP_WHEEL")

pytestmark = pytest.mark.skipif(not WHEEL, reason="EDGELOOP_WHEEL names no wheel; `make test` builds and names it")


def test_it_is_complete():
    assert os.path.basename(WHEEL).split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(WHEEL) as archive:
        names = archive.namelist()
    vendor = "edgeloop/_vendor/"
    libraries = [
        os.path.basename(n).split(".")[0].removeprefix("lib") for n in names if n.startswith(vendor + "llama_cpp/lib/")
    ]
    assert len(libraries) == len(set(libraries))  # each once: no copies for version links
    assert {"llama", "mtmd", "ggml", "ggml-base", "ggml-cpu"} <= set(libraries)
    for name in (
        "llama_cpp/__init__.py",
        "llama_cpp/server/app.py",
        "include/llama-loop.h",
        "include/llama.h",
        "models/qwen3-4b.toml",
        "licenses/llama.cpp.txt",
    ):
        assert vendor + name in names
    assert not [n for n in names if n.endswith((".cpp", ".c", ".gguf", ".a"))]


def test_run_in_a_fresh_environment(demo_model, tmp_path):
    """Dependencies come from the test environment: what is proved here is the wheel."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = next((venv / folder / "python" for folder in ("bin", "Scripts") if (venv / folder).exists()))
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with zipfile.ZipFile(WHEEL) as archive:
        archive.extractall(site)
    # another llama_cpp in the same environment, as an installed llama-cpp-python would be
    os.makedirs(os.path.join(site, "llama_cpp"))
    with open(os.path.join(site, "llama_cpp", "__init__.py"), "w") as f:
        f.write("__version__ = 'other'\n")
    import typer

    dependencies = os.path.dirname(os.path.dirname(typer.__file__))
    with open(os.path.join(site, "dependencies.pth"), "w") as f:
        f.write(dependencies + "\n")

    def run(*command):
        return subprocess.run([python, *command], capture_output=True, text=True, cwd=tmp_path)

    done = run(
        "-m",
        "edgeloop.cli",
        "run",
        demo_model,
        "-p",
        "What is the capital of France?",
        "--loop",
        "12-14x3",
        "--temp",
        "0",
        "-t",
        "1",
    )
    assert "Paris" in done.stdout, done.stderr
    origin = run("-c", "import edgeloop; print(edgeloop.__file__)").stdout
    assert str(venv) in origin
    assert run("-c", "import llama_cpp; print(llama_cpp.__version__)").stdout.strip() == "other"
    assert run("-c", "import edgeloop, llama_cpp; print(llama_cpp.__version__)").stdout.strip() == "0.3.36"

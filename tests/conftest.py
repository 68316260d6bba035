"""What every test gets: a clean environment, one thread, and models. Tests need no network but the package index."""

import os
import sys

import pytest

import edgeloop  # from here on `import llama_cpp` is the one that it carries

os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header():
    import llama_cpp

    return f"edgeloop {edgeloop.__version__} at {os.path.dirname(edgeloop.__file__)}, llama_cpp {llama_cpp.__version__}"


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Not the source folder: programs that a test starts there would import its edgeloop, which has no libraries."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("EDGELOOP_", "LLAMA_")) and name != "EDGELOOP_WHEEL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="session")
def demo_model() -> str:
    from edgeloop import hub

    return str(hub.demo_model(say=lambda text: print(text, file=sys.stderr)))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    import tiny

    path = tmp_path_factory.mktemp("models") / "tiny-llama.gguf"
    tiny.write_llama(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory) -> str:
    import tiny

    path = tmp_path_factory.mktemp("models") / "tiny-gemma3.gguf"
    tiny.write_gemma3(path)
    return str(path)


@pytest.fixture
def load():
    """Load a model with one thread; closed at the end of the test."""
    from edgeloop import Llama

    opened = []

    def open_model(path, **kwargs):
        kwargs = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1} | kwargs
        opened.append(Llama(str(path), **kwargs))
        return opened[-1]

    yield open_model
    for llm in opened:
        llm.close()

"""The programs in examples/: run as their users run them, the desktop window in a real X server, one frozen by PyInstaller.

`make test-embedding` installs what they need; without it most of these tests are skipped.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
QUESTION = "What is the capital of France?"
LOOPS = ("12-14x3", "12-14x2:naive")  # two short answers; the plain model goes on and on
ALONE = {"OMP_THREAD_LIMIT": "1"}  # for programs that do not say how many threads
SECONDS = 300


@pytest.fixture(scope="module")
def answers(demo_model):
    """What edgeloop.Llama answers to QUESTION, by loop."""
    from edgeloop import Llama

    llm = Llama(demo_model, n_ctx=2048, n_threads=1, n_threads_batch=1)
    messages = [{"role": "user", "content": QUESTION}]
    texts = {
        loop: llm.create_chat_completion(messages, temperature=0, loop=loop)["choices"][0]["message"]["content"]
        for loop in LOOPS
    }
    llm.close()
    assert len(set(texts.values())) == len(LOOPS)
    return texts


def test_ask(demo_model, answers):
    for loop, text in answers.items():
        command = [sys.executable, EXAMPLES / "ask.py", demo_model, QUESTION, loop]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALONE)
        assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")


#
# frozen
#

# not for the program's sake: they are in the tests' environment
UNRELATED = ("pytest", "hypothesis", "IPython", "PIL", "tkinter", "huggingface_hub", "fastapi", "gguf")


@pytest.mark.timeout(1800)
def test_a_frozen_program_answers_alike(demo_model, answers, tmp_path):
    pytest.importorskip("PyInstaller")
    environment = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)} | ALONE  # nothing of python's
    for mode, program in (("--onedir", "ask/ask"), ("--onefile", "ask")):
        command = [sys.executable, "-m", "PyInstaller", EXAMPLES / "ask.py", mode, "--noconfirm", "--log-level=ERROR"]
        command += [f"--exclude-module={name}" for name in UNRELATED]
        subprocess.run(command, cwd=tmp_path, check=True)
        moved = tmp_path / f"moved{mode}"
        shutil.move(tmp_path / "dist", moved)
        for loop, text in answers.items():
            command = [moved / program, demo_model, QUESTION, loop]
            done = subprocess.run(command, capture_output=True, text=True, cwd=moved, env=environment)
            assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")


#
# the desktop window
#


@pytest.fixture
def display(monkeypatch):
    """An X server of its own, so that nobody's windows come in between."""
    if sys.platform != "linux":
        yield
        return
    if not shutil.which("Xvfb"):
        pytest.skip("needs Xvfb")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "800x600x24"], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    os.close(write)
    with open(read) as f:
        monkeypatch.setenv("DISPLAY", f":{f.readline().strip()}")
    yield
    server.terminate()
    server.wait()


class User:
    """Someone at the window: waits, types and clicks."""

    def __init__(self, window):
        self.window = window
        self.turns = 0  # of the window's event loop

    def wait_until(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.text()
            self.window.update()
            self.turns += 1
            time.sleep(0.005)

    def text(self):
        return self.window.transcript.get("1.0", "end")

    def ask(self, question):
        entry = self.window.entry
        entry.focus_force()
        self.window.update()
        for character in question:
            entry.event_generate(
                "<Key>", keysym={" ": "space", "?": "question", ".": "period"}.get(character, character)
            )
        self.window.update()
        assert entry.get() == question
        entry.event_generate("<Return>")
        self.window.update()

    def is_answered(self):
        return self.window.task is None


def test_the_desktop_chat(display, demo_model, answers, monkeypatch):
    pytest.importorskip("tkinter")
    monkeypatch.syspath_prepend(EXAMPLES)
    import desktop_chat

    window = desktop_chat.ChatWindow(demo_model, n_ctx=2048, n_threads=1, n_threads_batch=1)
    user = User(window)
    try:
        user.wait_until(lambda: window.button.instate(["!disabled"]))
        assert (window.first.get(), window.last.get(), window.status["text"]) == (12, 14, "the plain model")

        # an answer comes while the window goes on
        user.ask(QUESTION)
        assert window.button["text"] == "Stop"
        before = user.turns
        user.wait_until(user.is_answered)
        assert user.turns - before > 5
        assert window.button["text"] == "Send"
        assert [message["role"] for message in window.messages] == ["user", "assistant"]
        assert window.messages[1]["content"] in user.text()

        # the slider and the fields make the loop
        window.slider.set(3)
        window.update()
        assert window.status["text"] == "12-14x3, 1.20 times the layers"
        window.spinboxes[1].set(40)
        window.update()
        assert "30 layers" in window.status["text"]
        user.ask("Not now.")  # a wrong loop is not used
        assert len(window.messages) == 2
        window.entry.delete(0, "end")
        window.spinboxes[1].set(14)

        # stopping keeps what there is
        user.ask("Tell me a very long story about a fox and a dog in a forest.")
        shown = len(user.text())
        user.wait_until(lambda: len(user.text()) > shown + 40)
        window.button.invoke()
        user.wait_until(user.is_answered)
        assert len(window.messages) == 4 and len(window.messages[3]["content"]) < 2000
        seen = asyncio.run_coroutine_threadsafe(window.llm.run(lambda llm: llm.n_tokens), window.loop).result(SECONDS)
        again = asyncio.run_coroutine_threadsafe(window.llm.run(lambda llm: llm.n_tokens), window.loop).result(SECONDS)
        assert seen == again
        loop = asyncio.run_coroutine_threadsafe(window.llm.run(lambda llm: str(llm.loop)), window.loop).result(SECONDS)
        assert loop == "12-14x3"
    finally:
        window.close()


#
# the server and the notebook
#


@contextlib.contextmanager
def serving(app):
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(SECONDS)


def post(address, **body):
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=SECONDS)


def test_the_endpoint(demo_model, monkeypatch):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("MODEL", demo_model)
    import fastapi_app

    with serving(fastapi_app.app) as address:

        def seconds():
            start = time.process_time()
            with post(f"{address}/answer", question=QUESTION, loop=LOOPS[0]) as answer:
                assert answer.read().decode()
            return time.process_time() - start

        alone = seconds()
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{address}/answer", question=QUESTION, loop="12-30x2")
        assert refused.value.code == 422
        assert "30 layers, 0 to 29" in json.load(refused.value)["detail"]

        # a client that goes away does not leave 512 tokens with six times the layers to compute
        with post(f"{address}/answer", question="Tell me a very long story.", loop="0-29x6:naive") as answer:
            answer.read(10)
        assert seconds() < 10 * alone


def test_the_notebook(demo_model, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path[1:]))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    texts = [line[15:] for line in printed[3].splitlines()]
    assert len(texts) == 4 and len(set(texts)) > 1
    rows = [line.split() for line in printed[5].splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        [f"12-14x{n}", str(30 + 3 * (n - 1)), f"{1 + 0.1 * (n - 1):.2f}"] for n in range(1, 7)
    ]
    assert all(0.2 < float(row[3]) < 20 for row in rows)  # a busy machine

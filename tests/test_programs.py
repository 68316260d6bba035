"""Stock programs: upstream's own llama-perplexity and llama-server, built without our patches, with our libraries under them.

They know nothing of loops and get one from LLAMA_LOOP. What they compute is compared with edgeloop.Llama, and without a
loop with what they compute with upstream's libraries.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from edgeloop._llama_cpp import vendor_dir
from edgeloop.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import stock  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="puts libraries under a program by LD_LIBRARY_PATH"),
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja"),
]

LOOPS = ["off", "12-14x3", "12-14x3:naive,kv=own", "26-29x2:unit=layer,kv=own"]
ALIKE = ["-t", "1", "-fa", "off", "--no-warmup"]  # as edgeloop.Llama computes

N_CTX = 128
TEXT = (Path(__file__).resolve().parent.parent / "LICENSE").read_text() * 2  # four chunks
PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+)")

STARTUP_SECONDS = 120
PROMPTS = [
    "Once upon a time, in a small village",
    "Once upon a time, in a small town by the sea",
    "The capital of France is",
]
N_PREDICT = 24


@pytest.fixture(scope="module")
def programs():
    """The folder of upstream's programs, built when they are not there."""
    return stock.build(stock.FOLDER, "llama-perplexity", "llama-server")


@pytest.fixture(scope="module")
def our_libraries(programs, tmp_path_factory):
    """A folder with our libraries under the names that the programs ask for: ours carry no version in theirs."""
    folder = tmp_path_factory.mktemp("libraries")
    ours = {path.name: path for path in (vendor_dir() / "llama_cpp" / "lib").glob("lib*.so")}
    for name in {*ours, *(path.name for path in programs.glob("lib*.so*"))}:
        plain = name.split(".so")[0] + ".so"
        if plain in ours:
            (folder / name).symlink_to(ours[plain])
    return folder


def environment(libraries, loop=None):
    given = {"LD_LIBRARY_PATH": str(libraries)} if libraries else {}
    return os.environ | given | ({"LLAMA_LOOP": loop} if loop else {})


def written(spec, model, capsys):
    """What `edgeloop env` writes, or None for off."""
    if spec == "off":
        return None
    with pytest.raises(SystemExit) as done:
        main(["env", spec, "-m", model])
    assert done.value.code == 0
    return capsys.readouterr().out.strip().removeprefix("LLAMA_LOOP=")


#
# llama-perplexity
#


def run_perplexity(programs, libraries, model, text, loop=None):
    command = [programs / "llama-perplexity", "-m", model, "-f", text, "-c", str(N_CTX), "-b", str(N_CTX), *ALIKE]
    return subprocess.run(command, capture_output=True, text=True, env=environment(libraries, loop))


def perplexity_of(done):
    assert done.returncode == 0, done.stderr
    return float(PERPLEXITY.search(done.stdout + done.stderr)[1])


def perplexity(llm, text):
    """As llama-perplexity does it: the second half of every chunk is scored, the first is context."""
    tokens = llm.tokenize(text.encode())
    losses = []
    for start in range(0, len(tokens) // N_CTX * N_CTX, N_CTX):
        chunk = tokens[start : start + N_CTX]
        llm.reset()
        llm.eval(chunk)
        logits = llm.scores[N_CTX // 2 : N_CTX - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        targets = chunk[N_CTX // 2 + 1 :]
        losses.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets])
    return float(np.exp(np.mean(losses)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_perplexity_is_that_of_the_looped_model(programs, our_libraries, demo_model, load, text, capsys):
    llm = load(demo_model, n_ctx=N_CTX, logits_all=True)
    assert not llm._model.add_bos_token(), "llama-perplexity replaces the first token of every chunk by BOS"
    assert len(llm.tokenize(TEXT.encode())) >= 2 * N_CTX
    measured = {}
    for spec in LOOPS:
        done = run_perplexity(programs, our_libraries, demo_model, text, written(spec, demo_model, capsys))
        llm.loop = spec
        measured[spec] = perplexity_of(done)
        assert measured[spec] == pytest.approx(perplexity(llm, TEXT), rel=1e-3), spec
    values = sorted(measured.values())
    assert min(b / a for a, b in zip(values, values[1:])) > 1.01, measured  # the tolerance tells them apart
    assert measured["off"] == perplexity_of(run_perplexity(programs, None, demo_model, text))


def test_a_wrong_loop_stops_llama_perplexity(programs, our_libraries, demo_model, text):
    done = run_perplexity(programs, our_libraries, demo_model, text, "12-14x3")
    assert done.returncode == 1 and not PERPLEXITY.search(done.stdout + done.stderr)
    assert "LLAMA_LOOP: a number and ',' were expected at '12-14x3'" in done.stderr


#
# llama-server
#


@pytest.fixture
def serve(programs, our_libraries, tmp_path):
    """Start llama-server on loopback, under a loop; returns its address when it is ready, else its output."""
    running = []

    def start(model, loop, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path / f"server-{port}.log"
        command = [programs / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["-c", "256", "-np", "1", *ALIKE, *options]
        with open(log, "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(our_libraries, loop))
        running.append(process)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + STARTUP_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                return address, log
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        return None, log

    yield start
    for process in running:
        process.kill()
        process.wait()


def completion(address, prompt, **options):
    body = {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0, "return_tokens": True} | options
    request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def greedy(llm, prompt):
    """The tokens that the server returns; it leaves out the one that ends an answer."""
    tokens = []
    for token in llm.generate(llm.tokenize(prompt.encode()), temp=0):
        if token == llm.token_eos():
            break
        tokens.append(token)
        if len(tokens) == N_PREDICT:
            break
    return tokens


@pytest.mark.parametrize("spec", LOOPS)
def test_the_server_gives_the_looped_models_tokens(serve, demo_model, load, capsys, spec):
    address, log = serve(demo_model, written(spec, demo_model, capsys))
    assert address, log.read_text()
    llm = load(demo_model, loop=spec)
    expected = [greedy(llm, prompt) for prompt in PROMPTS]
    for cache_prompt in (True, False):
        assert [completion(address, prompt, cache_prompt=cache_prompt) for prompt in PROMPTS] == expected
    if spec != "off":
        llm.loop = "off"
        assert [greedy(llm, prompt) for prompt in PROMPTS] != expected


@pytest.mark.parametrize(
    "loop, message",
    [
        ("12-14x3", "LLAMA_LOOP: a number and ',' were expected at '12-14x3'"),
        ("28-31x2", "is not in the model, which has layers 0..29"),
    ],
)
def test_a_wrong_loop_stops_the_server(serve, demo_model, capsys, loop, message):
    if loop == "28-31x2":
        loop = written("28-29x2", demo_model, capsys).replace("28,29", "28,31")
    address, log = serve(demo_model, loop)
    assert address is None and message in log.read_text()

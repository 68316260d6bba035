"""Layers on another device: upstream's RPC server on loopback, built from the same source. Every split gives the CPU's tokens."""

import json
import socket
import subprocess
import sys
import time

import pytest

from edgeloop._llama_cpp import vendor_dir

SERVER = next(iter((vendor_dir() / "llama_cpp" / "lib").glob("ggml-rpc-server*")), None)

pytestmark = pytest.mark.skipif(SERVER is None, reason="built without GGML_RPC")

SPECS = [
    "off",
    "12-14x3:naive",
    "12-14x3:naive,kv=own",
    "26-29x3:kv=own,unit=layer",
    "12-14x2:kv=first",
    "0-1x2:kv=last",
]
SPLITS = [0, 14, -1]  # layers on the device: none, the upper half with a border inside spans, all

# in a process of its own: a device stays registered until the process ends
WORKER = """
import json, sys
import edgeloop
from edgeloop import rpc

model, endpoint, specs, splits = json.loads(sys.argv[1])
prompt = "Once upon a time, in a small village"

def answers(n_gpu_layers):
    llm = edgeloop.Llama(model, n_gpu_layers=n_gpu_layers, n_ctx=256, n_threads=1, n_threads_batch=1)
    found = [llm(prompt, max_tokens=16, temperature=0, loop=spec)["choices"][0]["text"] for spec in specs + specs[:2]]
    llm.close()
    return found

alone = answers(0)
rpc.add_servers(endpoint)
print(json.dumps([alone, *map(answers, splits)]))
"""


@pytest.fixture
def server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [SERVER, "-H", "127.0.0.1", "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_every_split_gives_the_cpus_tokens(server, demo_model):
    job = json.dumps([demo_model, server, SPECS, SPLITS])
    done = subprocess.run([sys.executable, "-c", WORKER, job], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    alone, *offloaded = json.loads(done.stdout)
    assert len(set(alone)) == len(SPECS)
    for split, answers in zip(SPLITS, offloaded):
        assert answers == alone, split


def test_the_command_line(server, demo_model):
    command = [
        sys.executable,
        "-m",
        "edgeloop.cli",
        "run",
        demo_model,
        "-p",
        "What is the capital of France?",
        "--temp",
        "0",
        "-t",
        "1",
    ]
    command += ["--loop", "12-14x3", "--rpc", server]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "Paris" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "endpoint, message",
    [("nowhere", "'nowhere' is not HOST:PORT"), ("127.0.0.1:1", "no RPC server answers at 127.0.0.1:1")],
)
def test_a_server_that_is_not_there(endpoint, message, demo_model):
    command = [sys.executable, "-m", "edgeloop.cli", "run", demo_model, "-p", "x", "--rpc", endpoint]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1

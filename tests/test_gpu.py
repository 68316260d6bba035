"""Loops with every layer on a GPU, of whatever kind the build has: the CPU's logits, and no operation that the loop leaves to the CPU.

Mesa's lavapipe runs a Vulkan build's shaders without a GPU: GGML_VK_VISIBLE_DEVICES=0 makes it one (`make test-vulkan`).
"""

import ctypes
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import numpy as np
import pytest
import tiny
import tiny_more

import edgeloop  # before llama_cpp, also in a process without conftest.py

import llama_cpp
from llama_cpp._ggml import libggml

GPU, INTEGRATED_GPU = 1, 2  # enum ggml_backend_dev_type

libggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
pytestmark = pytest.mark.skipif(
    not any(libggml.ggml_backend_dev_by_type(kind) for kind in (GPU, INTEGRATED_GPU)),
    reason="no GPU, or a build without GGML_CUDA, GGML_METAL and GGML_VULKAN",
)

WRITERS = {
    "llama": tiny.write_llama,
    "gemma3": tiny.write_gemma3,
    "qwen3moe": tiny_more.write_qwen3moe,
    "deepseek2": tiny_more.write_deepseek2,
    "mamba2": tiny_more.write_mamba2,
    "lfm2": tiny_more.write_lfm2,
}
ROUTED = {"qwen3moe", "deepseek2"}
# of six layers; at the start, in the middle and at the end, where rows without an output are dropped
SPECS = [
    "2-3x3",
    "2-3x3:naive,kv=own",
    "4-5x3:naive,kv=own,unit=layer",
    "0-1x2:naive,kv=first",
    "4-5x2:naive,kv=last",
    "1-2x6:anchored",
    "0-1x2+3-5x3:heavy-ball",
    "2-3x4:rk4",
    "4-5x3:auto-align",
    "3-5x3:running-mean",
    "2-3x2:naive,scope=prompt",
    "4-5x2:naive,scope=gen",
    "2-3x3:naive,norm=hold",
    "4-5x3:unit=layer,norm=interp",
]
CASES = [(arch, spec) for arch in WRITERS for spec in SPECS]
CASES += [("qwen3moe", spec) for spec in ("2-3x3:routing=frozen", "4-5x2:naive,kv=own,routing=frozen")]

ON_CPU = {"n_gpu_layers": 0, "offload_kqv": False, "op_offload": False}
ON_GPU = {"n_gpu_layers": -1}

MARGIN = 10  # times the plain model's own difference between the devices
TOKENS = np.random.default_rng(1).integers(3, len(tiny.VOCAB), 24).tolist()
SPLIT = 20  # tokens evaluated at once; the others one by one
TEXT = "Once upon a time, in a small village nestled in the rolling hills, there lived a young girl named Mia."

NODE = re.compile(r"^node #\s*\d+ \(\s*(\w+)\):\s*(\S*) \(\s*\S+\) \[\s*(\w+)", re.M)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    for arch, write in WRITERS.items():
        write(folder / f"{arch}.gguf")
    return folder


@pytest.fixture(scope="module")
def plain(models):
    """arch -> the plain model's logits on the CPU, and how far the GPU's are from them"""

    @cache
    def plain_of(arch):
        on_cpu = evaluate(models / f"{arch}.gguf", "off", ON_CPU)
        return on_cpu, distance(evaluate(models / f"{arch}.gguf", "off", ON_GPU), on_cpu)

    return plain_of


def open_model(path, where, **options):
    return edgeloop.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, **where, **options)


def logits(llm, tokens=TOKENS):
    """Of the last token of a prompt and of those after it."""
    llm.reset()
    rows = []
    for part in (tokens[:SPLIT], *([token] for token in tokens[SPLIT:])):
        llm.eval(part)
        rows.append(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)).copy())
    return np.array(rows)


def evaluate(path, spec, where, tokens=TOKENS):
    llm = open_model(path, where, loop=spec)
    rows = logits(llm, tokens)
    llm.close()
    return rows


def distance(a, b, over_tokens=np.max):
    return over_tokens(np.abs(a - b).max(axis=1)) / np.abs(b).max()


@pytest.mark.parametrize("arch, spec", CASES)
def test_the_gpu_gives_the_cpus_logits(models, plain, arch, spec):
    on_cpu, on_gpu = (evaluate(models / f"{arch}.gguf", spec, where) for where in (ON_CPU, ON_GPU))
    off, apart = plain(arch)
    # rounding may choose the other of two experts that are as good as equal for a token
    over_tokens = np.median if arch in ROUTED else np.max
    assert distance(on_gpu, on_cpu, over_tokens) < MARGIN * apart
    assert distance(on_cpu, off) > 2 * MARGIN * apart  # which tells a loop from none


def on_the_cpu(path, spec, monkeypatch, capfd):
    """(operation, name) of what the scheduler gives to the CPU although every layer is offloaded."""
    monkeypatch.setenv("GGML_SCHED_DEBUG", "2")
    llm = open_model(path, ON_GPU, loop=spec, verbose=True)
    capfd.readouterr()
    llm.eval(TOKENS)
    llm.close()
    nodes = NODE.findall(capfd.readouterr().err)
    assert len(nodes) > 50
    return {(operation, name) for operation, name, backend in nodes if backend == "CPU"}


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_the_loop_leaves_nothing_to_the_cpu(models, monkeypatch, capfd, arch):
    path = models / f"{arch}.gguf"
    without = on_the_cpu(path, "off", monkeypatch, capfd)
    for spec in [spec for a, spec in CASES if a == arch]:
        assert on_the_cpu(path, spec, monkeypatch, capfd) == without, spec


def plan_anew(path):
    """The plain model, whose memory is planned anew before every prompt."""
    llm = open_model(path, ON_GPU)
    for _ in range(4):
        llama_cpp.llama_set_adapter_cvec(llm.ctx, None, 0, tiny.N_EMBD, 0, 0)
        logits(llm)


def in_turn(path, specs):
    llm = open_model(path, ON_GPU)
    rows = []
    for llm.loop in specs:
        rows.append(logits(llm))
    return rows


def test_the_loop_can_be_changed(models):
    """In processes of their own: drivers crash here (Mesa 22.3's lavapipe does, 25.0's does not)."""
    path, specs = models / "llama.gguf", ["off", SPECS[0], SPECS[1], SPECS[2], "off", SPECS[1]]
    spawn = multiprocessing.get_context("spawn")
    control = spawn.Process(target=plan_anew, args=(path,))
    control.start()
    control.join()
    if control.exitcode < 0:
        pytest.skip("this driver crashes when the memory of a plain model is planned anew")
    assert control.exitcode == 0
    with ProcessPoolExecutor(1, mp_context=spawn) as child:
        changed = child.submit(in_turn, path, specs).result()
    for spec, rows in zip(specs, changed):
        assert distance(rows, evaluate(path, spec, ON_GPU)) < 1e-6, spec


def test_the_demo_model(demo_model):
    """Not its greedy tokens: without a loop, too, the two devices choose differently where two are as good as equal."""
    tokens = open_model(demo_model, ON_CPU).tokenize(TEXT.encode())
    off = evaluate(demo_model, "off", ON_CPU, tokens)
    apart = distance(evaluate(demo_model, "off", ON_GPU, tokens), off)
    for spec in ("12-14x3", "12-14x3:naive,kv=own", "26-29x2:unit=layer,kv=own", "12-14x3:auto-align"):
        on_cpu, on_gpu = (evaluate(demo_model, spec, where, tokens) for where in (ON_CPU, ON_GPU))
        assert distance(on_gpu, on_cpu) < 2 * apart < distance(on_cpu, off), spec

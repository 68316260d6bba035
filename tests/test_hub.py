"""What MODEL means, and models from a hub: the real client against a hub on loopback."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pexpect
import pytest
import tiny
from fakehub import NEWCOMER, TOKEN, Hub, Repo

from edgeloop import ModelError, huggingface
from edgeloop.hub import resolve_model

EDGELOOP = [sys.executable, "-m", "edgeloop.cli"]
CHUNK = 10 << 20  # the client writes in pieces of this size

SMALL = b"GGUF" + b"small" * 1000
OTHER = b"GGUF" + b"other" * 1000
FILES = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-UD-Q4_K_XL.gguf", "mmproj-m-F16.gguf", "m.imatrix.gguf"]
SHARDS = [f"BF16/m-BF16-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture
def run(tmp_path):
    """`run(hub, arguments...)` runs the command line with a cache of its own."""

    def command(hub, *arguments, start=subprocess.run, **environment):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), **environment}
        variables |= {"EDGELOOP_CACHE": str(tmp_path / "demo"), "HF_HUB_DOWNLOAD_TIMEOUT": "200"}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return start([*EDGELOOP, *map(str, arguments)], cwd="/", env=variables, **pipes)

    return command


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "hf" / "hub"


def python(run, hub, code: str) -> str:
    """What a piece of Python prints with the same cache."""
    return run(hub, start=lambda command, **pipes: subprocess.run([command[0], "-c", code], **pipes)).stdout.strip()


def contents(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and ".locks" not in path.parts)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, meant",
    [
        ("user/repo", ("user/repo", None)),
        ("user/repo-1.5_GGUF:Q4_K_M", ("user/repo-1.5_GGUF", "Q4_K_M")),
        ("user/repo:a/m-Q8_0.gguf", ("user/repo", "a/m-Q8_0.gguf")),
        ("user/repo.gguf", None),
        ("user/repo.GGUF", None),
        ("./user/repo", None),
        ("../repo", None),
        ("/user/repo", None),
        ("~/repo", None),
        ("models\\repo", None),
        ("C:/repo", None),
        ("a/b/c", None),
        ("repo", None),
        ("user/repo:", None),
    ],
)
def test_names_and_paths(model, meant):
    assert huggingface.parse_name(model) == meant


@pytest.mark.parametrize(
    "files, quant, chosen",
    [
        (FILES, None, ["m-Q4_K_M.gguf"]),
        (FILES, "q8_0", ["m-Q8_0.gguf"]),
        (FILES, "UD-q4_k_xl", ["m-UD-Q4_K_XL.gguf"]),
        (FILES, "Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        (FILES, "m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        (FILES + SHARDS, "bf16", SHARDS),
        (FILES + SHARDS[:2], "bf16", "has no bf16; there are Q4_K_M, Q8_0, UD-Q4_K_XL"),
        (FILES, "Q4", "has no Q4; there are Q4_K_M"),
        (FILES, "F16", "has no F16"),
        (["a.q5_k_m.gguf", "a.q4_0.gguf", "a.q8_0.gguf"], None, ["a.q4_0.gguf"]),
        (["a-Q2_K.gguf"], None, ["a-Q2_K.gguf"]),
        (["model.gguf"], None, ["model.gguf"]),
        (["a-Q2_K.gguf", "a-F16.gguf"], None, "name one of F16, Q2_K, for example u/r:F16"),
        (["7b-Q4_0.gguf", "1b-Q4_0.gguf"], "Q4_0", "2 models are Q4_0; name a file: 1b-Q4_0.gguf, 7b-Q4_0.gguf"),
        (["README.md", "mmproj-F16.gguf", "model.safetensors"], None, "holds no GGUF model"),
    ],
)
def test_which_file(files, quant, chosen):
    if isinstance(chosen, list):
        assert huggingface.choose("u/r", random.sample(files, len(files)), quant) == chosen
    else:
        with pytest.raises(ModelError) as caught:
            huggingface.choose("u/r", files, quant)
        assert chosen in str(caught.value) and str(caught.value).startswith("u/r: ")


def test_which_projector():
    assert huggingface.choose_projector(FILES) == "mmproj-m-F16.gguf"
    assert (
        huggingface.choose_projector(["mmproj-Q8_0.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf"]) == "mmproj-BF16.gguf"
    )
    assert huggingface.choose_projector(["m-Q8_0.gguf"]) is None


# ---- the life of a model -------------------------------------------------------------------------------------------


def test_pull_use_list_remove(run, cache, tiny_llama):
    model = Path(tiny_llama).read_bytes()
    with Hub({"u/tiny-GGUF": Repo({"README.md": b"hello", "t-Q8_0.gguf": model, "t-F16.gguf": OTHER})}) as hub:
        first = run(hub, "inspect", "u/tiny-GGUF", "--json")
        assert first.returncode == 0, first.stderr
        assert f"fetching u/tiny-GGUF: t-Q8_0.gguf ({len(model) / 1e6:.0f} MB) from {hub.endpoint}\n" == first.stderr
        path = json.loads(first.stdout)["path"]
        assert Path(path).name == "t-Q8_0.gguf" and Path(path).read_bytes() == model
        asked = len(hub.requests)
        again = run(hub, "inspect", "u/tiny-GGUF", "--json")
        assert json.loads(again.stdout)["path"] == path and len(hub.requests) == asked  # without the network
        assert again.stderr == "u/tiny-GGUF: t-Q8_0.gguf from the cache\n"

        other = run(hub, "pull", "u/tiny-GGUF:f16")
        assert Path(other.stdout.strip()).read_bytes() == OTHER
        listed = json.loads(run(hub, "list", "--json").stdout)
        assert {m["name"]: m["bytes"] for m in listed} == {
            "u/tiny-GGUF:Q8_0": len(model),
            "u/tiny-GGUF:F16": len(OTHER),
        }
        assert all(abs(m["last_used"] - time.time()) < 3600 for m in listed)
        table = run(hub, "list").stdout
        assert "u/tiny-GGUF:F16" in table and "today" in table

    # the hub is gone
    assert run(hub, "inspect", "u/tiny-GGUF:Q8_0", "--offline").returncode == 0
    refused = run(hub, "rm", "u/tiny-GGUF:F16")
    assert refused.returncode == 2 and "add --yes" in refused.stderr and "t-F16.gguf" in contents(cache)
    assert run(hub, "rm", "u/tiny-GGUF:F16", "--yes").returncode == 0
    assert [name for name in contents(cache) if name.endswith(".gguf")] == ["t-Q8_0.gguf"] and Path(path).exists()
    gone = run(hub, "rm", "u/tiny-GGUF:F16", "--yes")
    assert gone.returncode == 2 and "is not in the cache; there are u/tiny-GGUF:Q8_0" in gone.stderr
    assert run(hub, "rm", "u/tiny-GGUF", "--yes").returncode == 0
    assert not list(cache.glob("models--*")) and json.loads(run(hub, "list", "--json").stdout) == []


def test_files_of_other_programs_stay(run, cache):
    with Hub({"u/r": Repo({"config.json": b"{}", "m-Q4_0.gguf": SMALL})}) as hub:
        run(hub, "pull", "u/r")
        python(run, hub, "import huggingface_hub as h; h.hf_hub_download('u/r', 'config.json')")
        assert run(hub, "rm", "u/r", "--yes").returncode == 0
    assert "config.json" in contents(cache) and "m-Q4_0.gguf" not in contents(cache)


def test_rm_asks(run, cache):
    with Hub({"u/r": Repo({"m-Q4_0.gguf": SMALL})}) as hub:
        run(hub, "pull", "u/r")
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache.parent)}
        for answer, code, there in (("n", 130, True), ("y", 0, False)):
            child = pexpect.spawn(EDGELOOP[0], [*EDGELOOP[1:], "rm", "u/r"], env=environment, cwd="/", encoding="utf-8")
            child.expect(r"Delete m-Q4_0.gguf \(5.0 kB\)\?")
            child.sendline(answer)
            child.expect(pexpect.EOF)
            child.close()
            assert child.exitstatus == code and ("m-Q4_0.gguf" in contents(cache)) == there


def test_a_new_version_comes_with_pull_only(run, cache):
    with Hub({"u/r": Repo({"m-Q4_0.gguf": SMALL, "m-Q8_0.gguf": SMALL})}) as hub:
        old = run(hub, "pull", "u/r").stdout.strip()
        hub.repos["u/r"] = Repo({"m-Q4_0.gguf": OTHER, "m-Q8_0.gguf": OTHER}, commit="b" * 40)
        assert Path(run(hub, "pull", "u/r:Q8_0").stdout.strip()).read_bytes() == OTHER
        resolve = "from edgeloop import hub; print(hub.resolve_model('u/r:Q4_0', offline=True))"
        assert python(run, hub, resolve) == old  # though it is of an older commit
        new = run(hub, "pull", "u/r")
        assert Path(new.stdout.strip()).read_bytes() == OTHER and "fetching" in new.stderr
        assert "fetching" not in run(hub, "pull", "u/r").stderr
        assert run(hub, "rm", "u/r:Q4_0", "--yes").returncode == 0  # both versions
    assert [name for name in contents(cache) if name.endswith(".gguf")] == ["m-Q8_0.gguf"]


def test_a_split_model(run, tmp_path, monkeypatch, tiny_llama):
    import gguf

    monkeypatch.setattr(tiny.gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=25))
    tiny.write_llama(tmp_path / "t-F32.gguf")
    shards = {path.name: path.read_bytes() for path in tmp_path.glob("t-F32-*.gguf")}
    assert len(shards) == 3
    with Hub({"u/split": Repo({f"F32/{name}": data for name, data in shards.items()})}) as hub:
        split = json.loads(run(hub, "inspect", "u/split:f32", "--json").stdout)
        whole = json.loads(run(hub, "inspect", tiny_llama, "--json").stdout)
        assert split["path"].endswith("/F32/t-F32-00001-of-00003.gguf")
        assert {key: split[key] for key in ("parameters", "layer_bytes", "tensor_types")} == {
            key: whole[key] for key in ("parameters", "layer_bytes", "tensor_types")
        }
        assert split["file_bytes"] == sum(map(len, shards.values()))
        answers = {
            run(hub, "run", model, "--raw", "-p", "abc", "-n", 8, "--temp", 0, "-t", 1, "--offline").stdout
            for model in ("u/split", tiny_llama)
        }
        assert len(answers) == 1 and answers != {""}
        listed = json.loads(run(hub, "list", "--json").stdout)
        assert [(m["name"], m["bytes"]) for m in listed] == [("u/split:F32", split["file_bytes"])]
        assert run(hub, "rm", "u/split:F32", "--yes").returncode == 0
    assert json.loads(run(hub, "list", "--json").stdout) == []


def test_the_vision_part(run):
    with Hub(
        {"u/see": Repo({"m-Q4_0.gguf": SMALL, "mmproj-F16.gguf": OTHER}), "u/blind": Repo({"m.gguf": SMALL})}
    ) as hub:
        model, projector = map(Path, run(hub, "pull", "u/see", "--mmproj").stdout.split())
        assert model.read_bytes() == SMALL and projector.read_bytes() == OTHER
        blind = run(hub, "pull", "u/blind", "--mmproj")
        assert blind.returncode == 2 and "has no vision part" in blind.stderr and len(blind.stdout.split()) == 1
        both = f"from edgeloop.hub import resolve_projector as r; print(r('u/see', offline=True), r('{model}'), r('u/blind'))"
        assert python(run, hub, both) == f"{projector} {projector} None"


# ---- downloads that are stopped ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> bytes:
    return b"GGUF" + random.Random(0).randbytes(3 * CHUNK)


def stalled(run, hub, cache) -> subprocess.Popen:
    """Start a download of which two pieces come."""
    hub.stall_at = 2 * CHUNK + 5000
    child = run(hub, "pull", "u/large", start=subprocess.Popen)
    deadline = time.monotonic() + 100
    while sum(p.stat().st_size for p in cache.rglob("*.incomplete")) < 2 * CHUNK:
        assert time.monotonic() < deadline and child.poll() is None, child.communicate()
        time.sleep(0.05)
    return child


def stopped(run, hub, cache, how) -> subprocess.Popen:
    """Start a download and stop it when two pieces are there."""
    child = stalled(run, hub, cache)
    child.send_signal(how)
    child.wait(timeout=60)
    hub.stall_at = None
    return child


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download_continues(run, cache, large, how):
    with Hub({"u/large": Repo({"large-Q4_0.gguf": large})}) as hub:
        child = stopped(run, hub, cache, how)
        if how == signal.SIGINT:
            assert child.returncode == 130 and "the same command continues" in child.stderr.read()
        assert json.loads(run(hub, "list", "--json").stdout) == []
        asked = run(hub, "inspect", "u/large", "--offline")
        assert asked.returncode == 2 and "--offline forbids the download" in asked.stderr
        done = run(hub, "pull", "u/large")
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).read_bytes() == large
        assert hub.ranges() == [None, f"bytes={2 * CHUNK}-"]
    assert not list(cache.rglob("*.incomplete"))


def test_what_is_left_of_a_download_is_checked(run, cache, large):
    with Hub({"u/large": Repo({"large-Q4_0.gguf": large})}) as hub:
        part = cache / "models--u--large" / "blobs" / (hashlib.sha256(large).hexdigest() + ".incomplete")
        part.parent.mkdir(parents=True)
        part.write_bytes(b"x" * 1000)
        damaged = run(hub, "pull", "u/large")
        assert damaged.returncode == 1 and "was damaged and is deleted; try again" in damaged.stderr
        assert Path(run(hub, "pull", "u/large").stdout.strip()).read_bytes() == large
        part.write_bytes(b"x" * 1000)
        assert run(hub, "rm", "u/large", "--yes").returncode == 0
    assert not list(cache.glob("models--*"))


def test_unfinished_downloads_can_be_removed(run, cache, large):
    with Hub({"u/large": Repo({"large-Q4_0.gguf": large})}) as hub:
        stopped(run, hub, cache, signal.SIGKILL)
        removed = run(hub, "rm", "u/large", "--yes")
        assert removed.returncode == 0 and "(a part)" in removed.stderr
    assert not list(cache.rglob("*.incomplete"))


def test_two_at_once(run, cache, large):
    with Hub({"u/large": Repo({"large-Q4_0.gguf": large})}) as hub:
        first = stalled(run, hub, cache)
        second = run(hub, "pull", "u/large", start=subprocess.Popen)
        assert "fetching" in second.stderr.readline()
        assert "another program is downloading it" in second.stderr.readline()
        hub.go_on.set()
        assert {Path(child.communicate()[0].strip()).read_bytes() == large for child in (first, second)} == {True}
        assert hub.ranges() == [None]


def test_the_bar_is_for_terminals(run, cache, large):
    with Hub({"u/large": Repo({"large-Q4_0.gguf": large})}) as hub:
        hub.stall_at = 2 * CHUNK
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache.parent), "HF_HUB_DOWNLOAD_TIMEOUT": "200"}
        environment = os.environ | environment | {"TERM": "xterm"}
        child = pexpect.spawn(
            EDGELOOP[0], [*EDGELOOP[1:], "pull", "u/large"], env=environment, cwd="/", dimensions=(24, 120)
        )
        child.expect(rb"large-Q4_0.gguf .*21.0/31.5 MB", timeout=100)
        hub.go_on.set()
        child.expect(pexpect.EOF)
        hub.stall_at = None
        piped = run(hub, "pull", "u/large", HF_HOME=str(cache.parent / "other"))
    assert len(piped.stderr.splitlines()) == 1 and "\r" not in piped.stderr and "\033" not in piped.stderr


# ---- errors --------------------------------------------------------------------------------------------------------


REPOS = {
    "u/open": Repo({"m-Q4_0.gguf": SMALL}),
    "u/docs": Repo({"README.md": b""}),
    "u/gated": Repo({"m-Q4_0.gguf": SMALL}, gated=True),
    "u/private": Repo({"m-Q4_0.gguf": SMALL}, private=True),
}
TOKENS = {"no token": "", "newcomer": NEWCOMER, "good": TOKEN, "wrong": "hf_wrong"}
PULLS = [
    ("u/none", "no token", 2, "u/none: is not on http://127.0.0.1:PORT, or is private and needs a token in HF_TOKEN"),
    ("u/none", "good", 2, "u/none: is not on"),
    ("u/private", "newcomer", 2, "u/private: is not on"),
    ("u/gated", "no token", 1, "is gated: accept its terms on http://127.0.0.1:PORT/u/gated and set HF_TOKEN"),
    (
        "u/gated",
        "newcomer",
        1,
        "the account of your token has no access yet; ask for it on http://127.0.0.1:PORT/u/gated",
    ),
    ("u/open", "wrong", 1, "does not accept the token in HF_TOKEN"),
    ("u/open:Q9_9", "no token", 2, "u/open: has no Q9_9; there are Q4_0"),
    ("u/docs", "no token", 2, "u/docs: holds no GGUF model"),
    ("u/a--b", "no token", 2, "u/a--b: Cannot have -- or .."),
    ("u/private", "good", 0, ""),
    ("u/gated", "good", 0, ""),
]
# all of them in one process: the client takes a second to be imported
PULL_ALL = f"""
import json, os
from edgeloop import huggingface
from edgeloop.errors import EdgeloopError
for model, token, *_ in {PULLS}:
    os.environ["HF_TOKEN"] = {TOKENS}[token]
    try:
        print(json.dumps([0, str(huggingface.pull(*huggingface.parse_name(model)))]))
    except EdgeloopError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


@pytest.fixture(scope="module")
def pulled(tmp_path_factory):
    with Hub(REPOS) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
        done = subprocess.run(
            [sys.executable, "-c", PULL_ALL], env=environment, capture_output=True, text=True, cwd="/"
        )
    assert len(done.stdout.splitlines()) == len(PULLS) and not done.stderr, done.stderr
    return hub, dict(zip(PULLS, map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("case", PULLS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_what_the_hub_refuses(pulled, case):
    hub, answers = pulled
    code, message = answers[case]
    assert code == case[2] and "\n" not in message and case[3].replace("PORT", str(hub.port)) in message
    if not code:
        assert Path(message).read_bytes() == SMALL
        # the token goes to the hub and not to the host that it sends on to
        sent = {
            (r.token, r.path.startswith("/cdn/")) for r in hub.requests if r.path.endswith(f"{case[0]}//m-Q4_0.gguf")
        }
        assert sent == {(None, True)} and TOKEN in {r.token for r in hub.requests if case[0] in r.path}


@pytest.mark.parametrize("model", ["./u/open", "a/b/c"])
def test_only_names_of_the_hub_can_be_pulled(run, model):
    with Hub({}) as hub:
        done = run(hub, "pull", model)
    assert done.returncode == 2 and done.stderr.startswith(f"Error: {model}: is no model of the hub; write USER/REPO")
    assert not hub.requests and not done.stdout and len(done.stderr.splitlines()) == 1


def test_a_hub_that_is_not_there(run):
    with Hub({}) as hub:
        pass
    done = run(hub, "pull", "u/r")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{hub.endpoint} cannot be reached (" in done.stderr
    with Hub({}, status=503) as hub:
        down = run(hub, "pull", "u/r")
    assert down.returncode == 1 and "answered 503 (maintenance)" in down.stderr and len(down.stderr.splitlines()) == 1
    offline = run(hub, "pull", "u/r", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "cannot be reached" in offline.stderr


def test_a_file_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "r").write_bytes(SMALL)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("u/r") == Path("u/r")


@pytest.mark.parametrize(
    "typo", ["u/r.gguf", "./u/q", "../u/q", "~/u/q", "~nobody-here/q", "u\\r", "/u/q", "u", "a/b/c", "x" * 5000]
)
def test_a_mistyped_path_does_not_go_to_the_hub(typo):
    with pytest.raises(ModelError, match="no such file; a model on the hub is written USER/REPO"):
        resolve_model(typo)


def test_offline_names_what_there_is(run):
    with Hub({"u/r": Repo({"m-Q4_0.gguf": SMALL, "m-Q8_0.gguf": SMALL})}) as hub:
        run(hub, "pull", "u/r")
        done = run(hub, "inspect", "u/r:Q8_0", "--offline")
    assert done.returncode == 2 and "--offline forbids the download; there are u/r:Q4_0" in done.stderr


def test_a_full_disk(run, cache, large):
    import resource

    def limited(command, **pipes):
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2 * CHUNK, 2 * CHUNK))
        return subprocess.run(command, preexec_fn=limit, **pipes)

    with Hub({"u/large": Repo({"large-Q4_0.gguf": large})}) as hub:
        done = run(hub, "pull", "u/large", start=limited)
    assert done.returncode == 1 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 2

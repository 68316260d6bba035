"""cmake/upstream.py: every way in which upstream can be wrong ends in one clear sentence."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "cmake" / "upstream.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def upstream():
    spec = importlib.util.spec_from_file_location("edgeloop_upstream", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fresh(upstream, tmp_path_factory):
    """The unpacked source distribution, from the cache that the build filled."""
    folder = tmp_path_factory.mktemp("upstream")
    upstream.unpack(upstream.fetch(upstream.user_cache()), folder)
    return folder


def prepare(out, *arguments):
    return subprocess.run([sys.executable, SCRIPT, "--out", out, *arguments], capture_output=True, text=True)


def one_line(done):
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("edgeloop: ")
    return done.stderr


def test_from_a_folder(fresh, tmp_path):
    done = prepare(tmp_path / "out", "--patches", ROOT / "patches", "--upstream-dir", fresh)
    assert done.returncode == 0, done.stderr
    models = tmp_path / "out/vendor/llama.cpp/src/models"
    rewritten = sum(path.read_text(encoding="utf-8").count("loop_next(") for path in models.glob("*.cpp"))
    assert rewritten == 131 + 1  # hrm_text's comes with a patch
    assert "llama_loop" in (models.parent / "llama-graph.h").read_text()


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    done = prepare(tmp_path / "out", "--patches", ROOT / "patches", "--upstream-dir", tmp_path / "empty")
    assert "is not the unpacked source distribution of llama-cpp-python" in one_line(done)


def test_another_version(fresh, tmp_path):
    shutil.copytree(fresh, tmp_path / "other")
    init = tmp_path / "other/llama_cpp/__init__.py"
    init.write_text(init.read_text().replace("0.3.36", "0.3.35"))
    done = prepare(tmp_path / "out", "--patches", ROOT / "patches", "--upstream-dir", tmp_path / "other")
    assert "holds llama-cpp-python 0.3.35, this build needs 0.3.36" in one_line(done)


def test_a_patch_that_does_not_apply(fresh, tmp_path):
    shutil.copytree(ROOT / "patches", tmp_path / "patches")
    bad = tmp_path / "patches/0001-context.patch"
    bad.write_text(bad.read_text().replace(" struct llama_cparams {", " struct llama_other {"))
    done = prepare(tmp_path / "out", "--patches", tmp_path / "patches", "--upstream-dir", fresh)
    assert "patches/0001-context.patch does not apply" in one_line(done)


def test_a_builder_that_changed(fresh, tmp_path):
    shutil.copytree(fresh, tmp_path / "changed")
    path = tmp_path / "changed/vendor/llama.cpp/src/models/qwen2.cpp"
    path.write_text(
        path.read_text().replace("for (int il = 0; il < n_layer; ++il) {", "for (int il = 0; il != n_layer; ++il) {")
    )
    done = prepare(tmp_path / "out", "--patches", ROOT / "patches", "--upstream-dir", tmp_path / "changed")
    assert "130 layer loops and 123 tests for the last layer were rewritten, 131 and 124 expected" in one_line(done)


def test_a_download_that_fails(upstream, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(upstream.UpstreamError, match="could not be downloaded through pip .*EDGELOOP_UPSTREAM_DIR"):
        upstream.fetch(tmp_path / "cache")


def test_a_wrong_hash(upstream, tmp_path, monkeypatch):
    (tmp_path / upstream.SDIST).write_bytes(b"not what was expected")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(upstream.UpstreamError, match="does not have the sha256"):
        upstream.fetch(tmp_path / "cache")


def test_a_damaged_cache_is_downloaded_again(upstream, tmp_path, monkeypatch):
    (tmp_path / upstream.SDIST).write_bytes(b"cut off")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(upstream.UpstreamError, match="could not be downloaded"):
        upstream.fetch(tmp_path)


def upgrade(folder):
    return subprocess.run([sys.executable, ROOT / "scripts/upgrade.py", folder], capture_output=True, text=True)


def test_what_an_upgrade_would_take(fresh, tmp_path):
    done = upgrade(fresh)
    assert done.returncode == 0 and done.stdout.count(": applies") == len(list((ROOT / "patches").glob("*.patch")))
    newer = tmp_path / "newer"
    shutil.copytree(fresh, newer)
    for path, old, new in (
        ("llama_cpp/__init__.py", "0.3.36", "0.3.99"),
        ("vendor/llama.cpp/src/llama-cparams.h", "struct llama_cparams {", "struct llama_parameters {"),
        ("vendor/llama.cpp/src/models/qwen2.cpp", "il < n_layer", "il != n_layer"),
    ):
        text = (newer / path).read_text()
        assert old in text
        (newer / path).write_text(text.replace(old, new))
    done = upgrade(newer)
    assert done.returncode == 1
    assert "0001-context.patch: does not apply to src/llama-cparams.h\n" in done.stdout
    assert "0002-graph.patch: applies" in done.stdout and "130 rewritten, 131 expected" in done.stdout

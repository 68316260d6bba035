"""What a program in another language is built with: `edgeloop config`, pkg-config and CMake, on a program in C."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeloop._llama_cpp import vendor_dir
from edgeloop.cli import main

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "c"
TEXT = "Once upon a time, in a small village near the sea,"
N_PREDICT = 32  # in loop.c

# programs that pip installed stand beside python
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
CC = shutil.which("cc")

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not CC, reason="needs a C compiler `cc`")


def tool(name):
    return shutil.which(name, path=PATH) or pytest.skip(f"needs {name}")


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def compiled(*command, **environment):
    done = run(*command, **environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def config(capsys):
    def call(*options):
        with pytest.raises(SystemExit) as done:
            main(["config", *options])
        assert done.value.code == 0
        return capsys.readouterr().out.strip()

    return call


def with_config(folder, config):
    words = config("--cflags", "--libs", "--rpath").split()
    compiled(
        CC, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", EXAMPLE / "loop.c", *words, "-o", folder / "loop"
    )
    return folder / "loop"


def with_pkg_config(folder, config):
    words = compiled(
        tool("pkg-config"), "--cflags", "--libs", "edgeloop", PKG_CONFIG_PATH=config("--pkgconfig-dir")
    ).split()
    compiled(CC, EXAMPLE / "loop.c", *words, config("--rpath"), "-o", folder / "loop")
    return folder / "loop"


def with_cmake(folder, config):
    cmake = tool("cmake")
    compiled(cmake, "-S", EXAMPLE, "-B", folder, f"-Dedgeloop_DIR={config('--cmake-dir')}")
    compiled(cmake, "--build", folder)
    return folder / "loop"


@pytest.mark.parametrize("build", [with_config, with_pkg_config, with_cmake])
def test_a_c_program_computes_what_llama_computes(build, demo_model, load, config, tmp_path):
    llm = load(demo_model, n_ctx=512, flash_attn=True)  # which is what C programs get unless they say otherwise
    expected = [
        llm(TEXT, max_tokens=N_PREDICT, temperature=0, loop=loop)["choices"][0]["text"] for loop in ("3-5x3", "off")
    ]
    program = build(tmp_path, config)
    # a portable build's backends are looked for in the current folder
    done = subprocess.run(
        [program, demo_model, "3", "5", TEXT],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},
        cwd=config("--lib-dir"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.removesuffix("\n") == expected[0] != expected[1]
    done = run(program, demo_model, "3", "30", TEXT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "span 3..30 is not in the model, which has layers 0..29" in done.stderr


def test_the_package_can_be_moved(tmp_path, monkeypatch):
    """pkg-config and CMake files name no folder of the build's."""
    moved = tmp_path / "moved"
    (moved / "llama_cpp").mkdir(parents=True)
    for part in ("cmake", "pkgconfig", "include", "llama_cpp/lib"):
        shutil.copytree(vendor_dir() / part, moved / part)
    environment = {"PKG_CONFIG_PATH": str(moved / "pkgconfig")}
    words = compiled(tool("pkg-config"), "--cflags", "--libs", "edgeloop", **environment).split()
    assert words == [f"-I{moved}/pkgconfig/../include", f"-L{moved}/pkgconfig/../llama_cpp/lib", *words[2:]]
    cmake = tool("cmake")
    compiled(cmake, "-S", EXAMPLE, "-B", tmp_path / "build", f"-Dedgeloop_DIR={moved / 'cmake'}")
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert str(moved / "cmake") in cache and str(vendor_dir()) not in cache
    compiled(cmake, "--build", tmp_path / "build")


def test_versions_agree(config):
    import edgeloop

    version = compiled(tool("pkg-config"), "--modversion", "edgeloop", PKG_CONFIG_PATH=config("--pkgconfig-dir"))
    assert version.strip() == edgeloop.__version__
    assert f'"{edgeloop.__version__}"' in (Path(config("--cmake-dir")) / "edgeloop-config-version.cmake").read_text()


def test_config_prints_folders_that_exist(config, capsys):
    assert (Path(config("--include-dir")) / "llama-loop.h").is_file()
    assert list(Path(config("--lib-dir")).glob("*llama.*"))
    assert (Path(config("--cmake-dir")) / "edgeloop-config.cmake").is_file()
    assert (Path(config("--pkgconfig-dir")) / "edgeloop.pc").is_file()
    assert config("--lib-dir", "--include-dir").split() == [config("--include-dir"), config("--lib-dir")]
    with pytest.raises(SystemExit) as done:
        main(["config"])
    assert done.value.code == 2 and "--cflags" in capsys.readouterr().err


def test_a_packaged_program_does_not_start_itself_to_fetch_the_demo_model(tmp_path, monkeypatch):
    from edgeloop import ModelError, hub

    monkeypatch.setenv("EDGELOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ModelError, match="a packaged program cannot fetch the demo model"):
        hub.demo_model()

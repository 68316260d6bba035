"""Put a patched copy of upstream's sources into the build folder.

Upstream is the source distribution of llama-cpp-python: its Python package and the llama.cpp inside belong together.
It is downloaded through pip with its sha256 required and kept in the user's cache, or taken from a folder. Then the
patches are applied and the header of every layer loop is rewritten, so that the next layer comes from the graph context
(native/llama-loop-graph.cpp). Every failure is one sentence on stderr and exit code 1.

Needs patch-ng and, to download, pip, scikit-build-core and pathspec; knows nothing of CMake.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"

# what the build needs of the source distribution (176 MB of it are not)
WANTED = (
    "LICENSE.md",
    "llama_cpp",
    "vendor/llama.cpp/CMakeLists.txt",
    "vendor/llama.cpp/LICENSE",
    "vendor/llama.cpp/cmake",
    "vendor/llama.cpp/common",
    "vendor/llama.cpp/ggml",
    "vendor/llama.cpp/include",
    "vendor/llama.cpp/licenses",
    "vendor/llama.cpp/src",
    "vendor/llama.cpp/tools",
    "vendor/llama.cpp/vendor",
)

# a layer loop, and the test in it for the layer after which only rows with an output are needed
LOOP_HEADER = re.compile(r"^( *)for \(int il = 0; il < n_layer; \+\+il\) \{$")
LOOP_REWRITTEN = "for (int il = loop_begin({x}); il < n_layer; il = loop_next({x})) {{"
LAST_LAYER = "il == n_layer - 1"
LAST_REWRITTEN = "loop_is_last(il)"
N_LOOPS_REWRITTEN = 131
N_LAST_REWRITTEN = 124

# the residual stream that a loop hands on, in inpL but for one builder
STREAMS = {"lfm2.cpp": "cur"}


class UpstreamError(Exception):
    pass


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def user_cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgeloop")) / "upstream"


def fetch(cache: Path) -> Path:
    """The checked source distribution in the cache, downloaded first if it is not there."""
    sdist = cache / SDIST
    if sdist.exists() and sha256_of(sdist) == SHA256:
        return sdist
    print(f"edgeloop: downloading llama-cpp-python {VERSION} (77 MB) through pip", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "-d", tmp, "-r", str(requirements)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            output = done.stderr + done.stdout
            if "THESE PACKAGES DO NOT MATCH THE HASHES" in output:
                raise UpstreamError(
                    f"the source distribution of llama-cpp-python {VERSION} does not have the sha256 {SHA256}"
                )
            reason = next((line for line in output.splitlines() if line.startswith("ERROR")), output.strip())
            raise UpstreamError(
                f"llama-cpp-python {VERSION} could not be downloaded through pip ({reason}); without a network, unpack its "
                "source distribution and pass -DEDGELOOP_UPSTREAM_DIR=FOLDER in CMAKE_ARGS"
            )
        os.replace(Path(tmp) / SDIST, sdist)
    return sdist


def unpack(sdist: Path, out: Path) -> None:
    root = SDIST.removesuffix(".tar.gz")
    wanted = tuple(f"{root}/{w}" for w in WANTED)
    with tarfile.open(sdist) as tar:
        for member in tar:
            if member.isfile() and any(member.name == w or member.name.startswith(w + "/") for w in wanted):
                target = out / member.name.removeprefix(root + "/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as src, open(target, "wb") as dst:
                    shutil.copyfileobj(src, dst)


def copy_folder(folder: Path, out: Path, any_version: bool = False) -> None:
    for wanted in WANTED:
        source = folder / wanted
        if not source.exists():
            raise UpstreamError(
                f"{folder} is not the unpacked source distribution of llama-cpp-python {VERSION}: it has no {wanted}"
            )
        target = out / wanted
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
    version = re.search(r'__version__ = "(.*)"', (out / "llama_cpp/__init__.py").read_text())
    if not any_version and (not version or version[1] != VERSION):
        raise UpstreamError(
            f"{folder} holds llama-cpp-python {version[1] if version else '?'}, this build needs {VERSION}"
        )


def apply_patches(patches: Path, llama: Path) -> None:
    import logging

    import patch_ng

    logging.getLogger("patch_ng").setLevel(logging.CRITICAL)
    for path in sorted(patches.glob("*.patch")):
        patch = patch_ng.fromfile(str(path))
        if not patch or not patch.apply(strip=1, root=str(llama)):
            raise UpstreamError(f"patches/{path.name} does not apply to llama-cpp-python {VERSION}")


def rewrite_loops(models: Path) -> tuple[int, int]:
    """Rewrite every layer loop of the builders; how many there were, and how many tests for the last layer."""
    loops = lasts = 0
    for path in sorted(models.glob("*.cpp")):
        lines = path.read_text(encoding="utf-8").split("\n")
        stream = STREAMS.get(path.name, "inpL")
        found = 0
        for i, line in enumerate(lines):
            header = LOOP_HEADER.match(line)
            if not header:
                continue
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(header[1] + "}"))
            if not any(re.match(rf"\s*{stream} += ", body) for body in lines[i:end]):
                continue
            lines[i] = header[1] + LOOP_REWRITTEN.format(x=stream)
            found += 1
            for j in range(i, end):
                lasts += lines[j].count(LAST_LAYER)
                lines[j] = lines[j].replace(LAST_LAYER, LAST_REWRITTEN)
        if found:
            path.write_text("\n".join(lines), encoding="utf-8")
            loops += found
    return loops, lasts


def sync(fresh: Path, out: Path) -> None:
    """Move what changed, so that a build tool compiles only that."""
    keep = set()
    for path in fresh.rglob("*"):
        if not path.is_file():
            continue
        relative = path.relative_to(fresh)
        keep.add(relative)
        target = out / relative
        if target.exists() and target.read_bytes() == path.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for path in list(out.rglob("*")):
        if path.is_file() and path.relative_to(out) not in keep:
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, below the build folder")
    parser.add_argument("--patches", type=Path, required=True)
    parser.add_argument("--upstream-dir", type=Path, help="unpacked source distribution to use instead of downloading")
    args = parser.parse_args()

    own = [Path(__file__), *sorted(args.patches.glob("*.patch"))]
    stamp = args.out.with_suffix(".stamp")
    state = "\n".join([SHA256, str(args.upstream_dir), *(f"{p.name} {sha256_of(p)}" for p in own)])
    if stamp.exists() and stamp.read_text() == state and not args.upstream_dir:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as tmp:
        fresh = Path(tmp)
        if args.upstream_dir:
            copy_folder(args.upstream_dir, fresh)
        else:
            unpack(fetch(user_cache()), fresh)
        llama = fresh / "vendor/llama.cpp"
        apply_patches(args.patches, llama)
        loops, lasts = rewrite_loops(llama / "src/models")
        if (loops, lasts) != (N_LOOPS_REWRITTEN, N_LAST_REWRITTEN):
            raise UpstreamError(
                f"{loops} layer loops and {lasts} tests for the last layer were rewritten, {N_LOOPS_REWRITTEN} and "
                f"{N_LAST_REWRITTEN} expected: the builders in src/models have changed"
            )
        sync(fresh, args.out)
    stamp.write_text(state)


if __name__ == "__main__":
    try:
        main()
    except UpstreamError as error:
        sys.exit(f"edgeloop: {error}")

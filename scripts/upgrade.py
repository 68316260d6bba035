"""Report what moving to another llama-cpp-python would take: which patches fail, which layer loops have changed.

    python scripts/upgrade.py 0.3.40           downloads that source distribution through pip
    python scripts/upgrade.py path/to/folder   an unpacked one

Changes nothing. Exit code 1 when something does not apply. docs/upgrading.md says what to do then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

import upstream  # noqa: E402


def download(version: str, folder: Path) -> Path:
    """The source distribution of a version, unpacked below `folder`."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        ":all:",
    ]
    pip += ["--no-build-isolation", "-d", folder, f"llama-cpp-python=={version}"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
        sys.exit(f"llama-cpp-python {version} could not be downloaded through pip ({reason})")
    sdist = next(folder.glob("*.tar.gz"))
    print(f"sha256 {upstream.sha256_of(sdist)}")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def failed_files(patch: Path, llama: Path) -> list[str]:
    """The files of a patch that it does not apply to; the others are changed."""
    import logging

    import patch_ng

    logging.getLogger("patch_ng").setLevel(logging.CRITICAL)
    failed = []
    for item in patch_ng.fromfile(str(patch)).items:
        one = patch_ng.PatchSet()
        one.items = [item]
        name = item.target.decode().removeprefix("b/")
        if not (llama / name).exists() or not one.apply(strip=1, root=str(llama)):
            failed.append(name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a version, or the folder of an unpacked source distribution")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(args.source)
        source = folder if folder.is_dir() else download(args.source, Path(tmp))
        copy = Path(tmp) / "patched"
        llama = copy / "vendor/llama.cpp"
        try:
            upstream.copy_folder(source, copy, any_version=True)
        except upstream.UpstreamError as error:
            sys.exit(str(error))
        works = True
        for patch in sorted((ROOT / "patches").glob("*.patch")):
            failed = failed_files(patch, llama)
            works &= not failed
            print(f"{patch.name}: {'does not apply to ' + ', '.join(failed) if failed else 'applies'}")
        loops, lasts = upstream.rewrite_loops(llama / "src/models")
        expected = upstream.N_LOOPS_REWRITTEN, upstream.N_LAST_REWRITTEN
        works &= (loops, lasts) == expected
        print(
            f"layer loops: {loops} rewritten, {expected[0]} expected; tests for the last layer: {lasts}, {expected[1]} expected"
        )
        sys.exit(not works)


if __name__ == "__main__":
    main()

"""GGUF models on the Hugging Face hub: what USER/REPO[:QUANT] means, downloads that resume, and the hub's own cache.

huggingface_hub does the talking, so HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE have their usual meaning, and a
model is kept once for every program that uses the hub. Knows nothing of terminals.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

from edgeloop.errors import HubError, ModelError, WriteError

# the first of these that a repository has, when none is named; what llama.cpp takes first, then its neighbours in size
DEFAULT_QUANTS = ("Q4_K_M", "Q4_K_S", "Q4_K_XL", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0")
PROJECTOR_QUANTS = ("F16", "BF16", "Q8_0", "F32")

_INFO_SECONDS = 20.0  # a hub that does not answer in that time cannot be reached
_LOCK_SECONDS = 1.0

_NAME = re.compile(r"([\w][\w.-]*/[\w][\w.-]*?)(?::([^/\\].*))?", re.ASCII)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(r"(?<![a-z0-9])(?:UD-)?(?:I?Q\d|TQ\d|BF16|FP?16|FP?32|MXFP\d|NVFP\d)\w*", re.IGNORECASE)
_BLOB = re.compile(r"[\w-]{8,128}", re.ASCII)  # a name that stays in its folder
# GGUF files that are no language model of their own; llama.cpp's list
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # told a file's name, the bytes that are there, and all of them


def silent(*args: object) -> None:
    """For whoever wants to hear nothing."""


def parse_name(model: str) -> tuple[str, str | None] | None:
    """USER/REPO[:QUANT] -> repository and quant; None for what is no such name or looks like a path."""
    if model.startswith((".", "/", "~")) or "\\" in model or (":" not in model and model.lower().endswith(".gguf")):
        return None
    name = _NAME.fullmatch(model)
    return (name[1], name[2]) if name else None


# ---- which file ----------------------------------------------------------------------------------------------------


def models_among(files: Iterable[str]) -> dict[str, list[str]]:
    """The complete models among a repository's files: the first file of each -> all its files, in order."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        name = file.rpartition("/")[2].lower()
        if name.endswith(".gguf") and not any(word in name for word in _NOT_MODELS):
            models.setdefault(_PART.sub(r"-00001-of-\2.gguf", file), []).append(file)
    return {first: parts for first, parts in models.items() if len(parts) == _part_count(first)}


def _part_count(file: str) -> int:
    part = _PART.search(file)
    return int(part[2]) if part else 1


def quant_of(file: str) -> str:
    """The quantization that a file's name tells, Q4_K_M for example; the name itself when it tells none."""
    stem = _PART.sub("", file).removesuffix(".gguf")
    found = _QUANT.findall(stem)
    return found[-1].upper() if found else stem.rpartition("/")[2]


def choose(repo: str, files: Iterable[str], quant: str | None) -> list[str]:
    """The files of the model that `quant` names among a repository's files, or of the default one.

    A quant is written as in the file's name, in capitals or not; a whole file name is possible as well. Raises
    ModelError when there is none or more than one.
    """
    models = models_among(files)
    if not models:
        raise ModelError(f"{repo}: holds no GGUF model; repositories that do often have a name that ends in -GGUF")
    if quant is None:
        fitting = next((found for q in DEFAULT_QUANTS if (found := _named(models, q))), list(models))
    else:
        fitting = _named(models, quant)
    if len(fitting) == 1:
        return models[fitting[0]]
    there = ", ".join(sorted({quant_of(first) for first in models}))
    if quant is not None and not fitting:
        raise ModelError(f"{repo}: has no {quant}; there are {there}")
    if len({quant_of(first) for first in fitting}) > 1:
        raise ModelError(f"{repo}: name one of {there}, for example {repo}:{quant_of(fitting[0])}")
    raise ModelError(f"{repo}: {len(fitting)} models are {quant_of(fitting[0])}; name a file: {', '.join(fitting)}")


def _named(models: Iterable[str], quant: str) -> list[str]:
    wanted = quant.lower()
    exact = [m for m in models if wanted in (quant_of(m).lower(), m.lower(), m.rpartition("/")[2].lower())]
    return exact or [m for m in models if quant_of(m).lower().endswith("-" + wanted)]


def choose_projector(files: Iterable[str]) -> str | None:
    """The vision projector (mmproj) among a repository's files, in half precision where there are several."""
    there = sorted(f for f in files if f.lower().endswith(".gguf") and "mmproj" in f.rpartition("/")[2].lower())
    preferred = (f for quant in PROJECTOR_QUANTS for f in there if quant_of(f) == quant)
    return next(preferred, there[0] if there else None)


# ---- what is in the cache ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's cache."""

    name: str  # to use as MODEL
    path: Path  # of its first file
    size: int  # bytes
    last_used: float  # seconds since 1970


def find(repo: str, quant: str | None) -> Path | None:
    """The first file of a model that is in the cache, whole; the newest one. None if it is not there."""
    for snapshot, files in _snapshots(repo):
        try:
            return snapshot / choose(repo, files, quant)[0]
        except ModelError:
            continue
    return None


def find_projector(repo: str) -> Path | None:
    """The vision projector of a repository that is in the cache, or None."""
    for snapshot, files in _snapshots(repo):
        if projector := choose_projector(files):
            return snapshot / projector
    return None


def _snapshots(repo: str) -> Iterator[tuple[Path, list[str]]]:
    folder = _folder(repo)
    main = folder / "refs" / "main"
    current = main.read_text().strip() if main.exists() else ""
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda s: (s.name == current, s.stat().st_mtime))
    for snapshot in reversed(snapshots):
        yield snapshot, [f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*.gguf") if f.exists()]


def _folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def cached_models() -> list[CachedModel]:
    """All GGUF models in the cache that are whole, the one used last first."""
    found: dict[str, CachedModel] = {}
    for repo in _scan().repos:
        for revision in sorted(repo.revisions if repo.repo_type == "model" else (), key=lambda r: r.last_modified):
            files = {f.file_path.relative_to(revision.snapshot_path).as_posix(): f for f in revision.files}
            models = models_among(files)
            quants = Counter(map(quant_of, models))
            for first, parts in models.items():
                name = f"{repo.repo_id}:{quant_of(first) if quants[quant_of(first)] == 1 else first}"
                size = sum({files[part].blob_path: files[part].size_on_disk for part in parts}.values())
                last_used = max(files[part].blob_last_accessed for part in parts)
                found[name] = CachedModel(name, files[first].file_path, size, last_used)
    return sorted(found.values(), key=lambda model: (-model.last_used, model.name))


def _scan():
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        return scan_cache_dir()
    except CacheNotFound:
        Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
        return scan_cache_dir()


@dataclass(frozen=True)
class Deletion:
    """Files that can be deleted from the cache; `execute()` does it."""

    names: list[str]
    size: int  # bytes that become free
    execute: Callable[[], None]


def deletion(repo: str, quant: str | None) -> Deletion:
    """What deleting a model, or without a quant all GGUF files of a repository, would remove from the cache.

    What else the repository has there is left alone. Raises ModelError when nothing of it is in the cache.
    """
    scan = _scan()
    cached = next((r for r in scan.repos if r.repo_type == "model" and r.repo_id == repo), None)
    partial = [f for f in scan.incomplete_files if f.file_path.parent.parent == _folder(repo) and quant is None]
    everything, chosen = {}, {}
    for revision in cached.revisions if cached else ():
        files = {f.file_path.relative_to(revision.snapshot_path).as_posix(): f for f in revision.files}
        everything |= {f.file_path: f for f in files.values()}
        if quant is None:
            names = [name for name in files if name.lower().endswith(".gguf")]
        else:
            models = models_among(files)
            names = [part for first in _named(models, quant) for part in models[first]]
        chosen |= {files[name].file_path: (name, files[name]) for name in names}
    if not chosen and not partial:
        there = ", ".join(m.name for m in cached_models() if m.name.startswith(f"{repo}:"))
        what = repo if quant is None else f"{repo}:{quant}"
        raise ModelError(f"{what}: is not in the cache" + (f"; there are {there}" if there else ""))
    if chosen.keys() == everything.keys() and cached:
        strategy = scan.delete_revisions(*(revision.commit_hash for revision in cached.revisions))
    else:
        strategy = scan.delete_files(*(file for _, file in chosen.values()))

    def execute() -> None:
        strategy.execute()
        for file in partial:
            file.file_path.unlink(missing_ok=True)

    names = sorted({name for name, _ in chosen.values()}) + [f"{f.file_path.name} (a part)" for f in partial]
    return Deletion(names, strategy.expected_freed_size + sum(f.size_on_disk for f in partial), execute)


# ---- downloads -----------------------------------------------------------------------------------------------------


def pull(repo: str, quant: str | None, *, say: Say = silent, progress: Progress = silent) -> Path:
    """Download a model, or what the cache lacks of its newest version, and return its first file.

    A download that was stopped continues where it was. Raises ModelError when there is no such model, HubError when the
    hub cannot be reached or refuses, WriteError when the disk is full.
    """
    with _hub_errors(repo):
        return _download(repo, choose(repo, _files(repo), quant), say, progress)


def pull_projector(repo: str, *, say: Say = silent, progress: Progress = silent) -> Path | None:
    """Download the vision projector of a repository, if it has one. Raises as `pull` does."""
    with _hub_errors(repo):
        projector = choose_projector(_files(repo))
        return _download(repo, [projector], say, progress) if projector else None


def _files(repo: str) -> list[str]:
    from huggingface_hub import model_info

    return [file.rfilename for file in model_info(repo, timeout=_INFO_SECONDS).siblings or ()]


def _download(repo: str, files: list[str], say: Say, progress: Progress) -> Path:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import are_symlinks_supported

    facts = {file: get_hf_file_metadata(hf_hub_url(repo, file)) for file in files}
    missing = [f for f in files if not isinstance(try_to_load_from_cache(repo, f, revision=facts[f].commit_hash), str)]
    if missing:
        size = sum(facts[file].size or 0 for file in missing) / 1e6
        what = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more"
        say(f"fetching {repo}: {what} ({size:,.0f} MB) from {constants.ENDPOINT}")
    for file in missing:
        etag, size = facts[file].etag or "", facts[file].size or math.inf
        # without symbolic links the blob would be copied; above this size the hub offers only its own protocol
        if are_symlinks_supported() and _BLOB.fullmatch(etag) and size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            url = hf_hub_url(repo, file, revision=facts[file].commit_hash)
            _fetch_blob(url, _folder(repo) / "blobs" / etag, size, say, progress)
    # what is there by now is only given its name
    return [Path(hf_hub_download(repo, file, library_name="edgeloop")) for file in files][0]


def _fetch_blob(url: str, blob: Path, size: int, say: Say, progress: Progress) -> None:
    """Put a file where hf_hub_download looks for it, which itself forgets what it had of a download that was stopped."""
    from filelock import Timeout
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    # hf_hub_download's own lock and, in the versions that resumed, its own partial file
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    part = blob.with_name(blob.name + ".incomplete")
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(lock, timeout=_LOCK_SECONDS):
            pass
    except Timeout:
        say("another program is downloading it; waiting")
    with WeakFileLock(lock):
        if blob.exists():
            return
        with open(part, "ab") as file:
            if file.tell() > size:
                file.truncate(0)
            there = file.tell()
            free = shutil.disk_usage(blob.parent).free
            if free < size - there:
                raise WriteError(
                    f"{constants.HF_HUB_CACHE}: {(size - there) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
                )
            name = url.rpartition("/")[2]
            http_get(
                url,
                file,
                resume_size=there,
                headers=build_hf_headers(library_name="edgeloop"),
                expected_size=size,
                tqdm_class=_bar(lambda done: progress(name, done, size)),
            )
        # a file of the hub's large storage is named by its sha256; what an earlier run left may be damaged
        if there and len(blob.name) == 64 and _sha256(part) != blob.name:
            part.unlink()
            raise HubError(f"{name}: what was there of an earlier download was damaged and is deleted; try again")
        os.replace(part, blob)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _bar(report: Callable[[int], None]):
    """A stand-in for tqdm that draws nothing and reports the bytes that are there."""

    class Bar:
        def __init__(self, *args, initial: int = 0, **kwargs):
            self.n = initial

        def __enter__(self):
            return self

        def __exit__(self, *exc) -> None:
            pass

        def update(self, n: int) -> None:
            self.n += n
            report(self.n)

    return Bar


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Whatever huggingface_hub raises, as one sentence that says what to do."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import logging

    hub, verbosity = constants.ENDPOINT, logging.get_verbosity()
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError as error:
        if error.response.status_code == 401:
            todo = f"accept its terms on {hub}/{repo} and set HF_TOKEN to a token of that account"
        else:
            todo = f"the account of your token has no access yet; ask for it on {hub}/{repo}"
        raise HubError(f"{repo}: is gated: {todo}") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo}: {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(f"{hub} cannot be reached ({_first_line(error.__cause__ or error)})") from error
    except errors.HfHubHTTPError as error:
        if isinstance(error, errors.RepositoryNotFoundError) or (error.response.status_code == 401 and not get_token()):
            raise ModelError(f"{repo}: is not on {hub}, or is private and needs a token in HF_TOKEN") from error
        if error.response.status_code == 401:
            raise HubError(f"{hub} does not accept the token in HF_TOKEN or of `hf auth login`; correct it") from error
        what = error.server_message or error.response.reason_phrase
        raise HubError(f"{repo}: {hub} answered {error.response.status_code} ({what})") from error
    except errors.HTTPError as error:  # httpx's own, of whichever httpx it is
        raise HubError(f"{hub} cannot be reached ({_first_line(error)})") from error
    except OSError as error:
        if error.strerror is None:
            raise HubError(f"{repo}: {_first_line(error)}") from error
        raise WriteError(f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}") from error
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).split("\n")), "").rstrip(". ") or type(error).__name__

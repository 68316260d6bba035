"""Loop every architecture that upstream has and write docs/architectures.md.

Upstream's own test program `test-llama-archs` writes a tiny random model of nearly every architecture. For each of them,
in a process of its own, this script compares the loop with the plain model, with itself under other batch sizes, and the
plain model with a build of upstream without our patches.

    python scripts/architectures.py                 builds upstream, runs all, writes the table (about ten minutes)
    python scripts/architectures.py --check         runs all and fails when the table is stale
    python scripts/architectures.py --only qwen3    one architecture, printed

Needs an installed edgeloop, cmake, ninja and a C++ compiler. The build is kept, see stock.py.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import stock

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "architectures.md"

N_TOKENS = 24
N_CTX = 256
MAX_RATIO = 10.0  # of the plain model's own difference between a batch and single tokens
NOISE = (
    1e-4  # of the largest logit: rounding, which a loop repeats; a wrong key or state changes a hundred times as much
)
SEQUENCES = 3  # a model is wrong when it is with each of them: two experts may be as good as equal on one
TIMEOUT = 300

# llama_encode, not llama_decode: no cache, or an encoder
ENCODES = {"t5", "dream", "llada", "llada-moe", "rnd1"}

# of the span in the middle, 2 for all others: a span must lie in one of hrm_text's stacks
WIDTHS = {"hrm_text": 1}

LOOPS = {"own": "{span}x3:kv=own", "frozen": "{span}x3:kv=frozen"}


# ---- one model, in a process of its own ----------------------------------------------------------------------------


class Model:
    """A model and a context through llama_cpp's plain functions."""

    def __init__(self, path: str, arch: str):
        import llama_cpp

        self.arch = arch
        self.c = llama_cpp
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._silent = silent
        llama_cpp.llama_log_set(silent, None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("upstream cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = N_CTX, 1, 1
        params.n_batch = params.n_ubatch = N_TOKENS
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError("upstream cannot make a context")
        self.encodes = arch in ENCODES
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def clear(self) -> None:
        if self.memory:
            self.c.llama_memory_clear(self.memory, True)

    def logits(self, tokens: list[int], start: int = 0, batch: int = N_TOKENS):
        """Logits of every token, shape (len(tokens), n_vocab); evaluated `batch` at a time after `start` others."""
        import numpy as np

        rows = []
        for at in range(0, len(tokens), batch):
            part = tokens[at : at + batch]
            b = self.c.llama_batch_init(len(part), 0, 1)
            b.n_tokens = len(part)
            for i, token in enumerate(part):
                b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, start + at + i, 1, True
                b.seq_id[i][0] = 0
            code = self.c.llama_encode(self.ctx, b) if self.encodes else self.c.llama_decode(self.ctx, b)
            if code:
                raise RuntimeError(f"decode failed with {code}")
            for i in range(len(part)):
                pointer = self.c.llama_get_logits_ith(self.ctx, i)
                if not pointer:
                    raise RuntimeError("no logits")
                rows.append(np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy())
            self.c.llama_batch_free(b)
        return np.array(rows)

    def fresh(self, tokens: list[int], batch: int = N_TOKENS):
        self.clear()
        return self.logits(tokens, batch=batch)


def tokens_for(n_vocab: int, sequence: int = 0) -> list[int]:
    return [(3 + (37 + 2 * sequence) * i) % n_vocab for i in range(N_TOKENS)]


def plain_digest(path: str, arch: str) -> dict:
    """A digest of the plain model's logits; runs under our build and under upstream's."""
    import hashlib

    model = Model(path, arch)
    return {"digest": hashlib.sha256(model.fresh(tokens_for(model.n_vocab)).tobytes()).hexdigest()}


def examine(path: str, arch: str) -> dict:
    """What the loop does on one model."""
    model = Model(path, arch)
    for sequence in range(SEQUENCES):
        result = examine_tokens(model, tokens_for(model.n_vocab, sequence))
        if not result.get("failed"):
            break
    return result


def examine_tokens(model: Model, tokens: list[int]) -> dict:
    """What the loop does with some tokens; raises nothing but what the engine raises."""
    import ctypes

    import numpy as np

    from edgeloop import Loop, native
    from edgeloop.llama import native_arguments

    plain = model.fresh(tokens)
    scale = float(np.abs(plain).max()) or 1.0

    def set_loop(spec: str) -> None:
        native.set_loop(model.ctx, **native_arguments(Loop.parse(spec).resolve(model.n_layer)))

    def distance(a, b) -> float:
        return float(np.abs(a - b).max()) / scale

    middle = model.n_layer // 2
    span = f"{max(0, middle - WIDTHS.get(model.arch, 2) + 1)}-{middle}" if model.n_layer > 1 else "0-0"
    spans = {span, "0-0", f"{model.n_layer - 1}-{model.n_layer - 1}"}
    result: dict = {"n_layer": model.n_layer, "failed": []}
    try:
        set_loop(f"{span}x1:naive,kv=own")
    except native.NativeLoopError as error:
        return {"refused": str(error), "n_layer": model.n_layer}

    def expect(name: str, holds: bool) -> None:
        if not holds:
            result["failed"].append(name)

    expect("x1 is off", np.array_equal(model.fresh(tokens), plain))
    set_loop(f"{span}x3:anchored,beta=1")
    expect("beta=1 is off", distance(model.fresh(tokens), plain) < NOISE)
    set_loop("off")
    by_one = None if model.encodes else distance(model.fresh(tokens, 1), plain)
    result["plain_by_one"] = by_one
    for s in sorted(spans):
        set_loop(f"{s}x2:naive,kv=own")
        looped = model.fresh(tokens)
        expect(f"naive own at {s} differs from off", distance(looped, plain) > 1e-6 and np.isfinite(looped).all())
        for kv, spec in LOOPS.items():
            set_loop(spec.format(span=s))
            whole = model.fresh(tokens)
            expect(f"{kv} at {s} is finite", bool(np.isfinite(whole).all()))
            if by_one is not None:
                difference = distance(model.fresh(tokens, 1), whole)
                result[f"{kv}_by_one"] = max(difference, result.get(f"{kv}_by_one", 0.0))
                expect(
                    f"{kv} at {s} by single tokens ({difference:.1e}, plain {by_one:.1e})",
                    difference <= max(MAX_RATIO * by_one, NOISE),
                )
            if model.memory and not model.encodes:
                half = N_TOKENS // 2
                model.clear()
                model.logits(tokens[:half])
                size = model.c.llama_state_get_size(model.ctx)
                state = (ctypes.c_uint8 * size)()
                written = model.c.llama_state_get_data(model.ctx, state, size)
                straight = model.logits(tokens[half:], start=half)
                model.clear()
                read = model.c.llama_state_set_data(model.ctx, state, written)
                expect(f"{kv} at {s}: state is read", read == written)
                expect(
                    f"{kv} at {s}: state goes on identically",
                    np.array_equal(model.logits(tokens[half:], start=half), straight),
                )
    set_loop("off")
    expect("off again is off", np.array_equal(model.fresh(tokens), plain))
    return result


# ---- all of them ---------------------------------------------------------------------------------------------------


def build_upstream(folder: Path) -> tuple[Path, Path]:
    """Upstream as it is, with test-llama-archs: the folder of its libraries and the folder of its models."""
    libraries, models = stock.build(folder, "test-llama-archs"), folder / "models"
    if not models.exists():
        models.mkdir()
        subprocess.run([libraries / "test-llama-archs", "-o", models], check=True, stdout=subprocess.DEVNULL)
    return libraries, models


def work(job: str, path: Path, arch: str, libraries: Path | None = None) -> dict:
    """Run one job in a process of its own: a crash is a result, too."""
    environment = os.environ | ({"LLAMA_CPP_LIB_PATH": str(libraries)} if libraries else {})
    command = [sys.executable, __file__, "--worker", job, str(path), arch]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, cwd="/")
    except subprocess.TimeoutExpired:
        return {"crashed": f"more than {TIMEOUT} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {
            "crashed": next(
                (line for line in lines if "ASSERT" in line), (lines or [f"exit code {done.returncode}"])[-1]
            )[:200]
        }


def architecture_of(path: Path) -> str:
    from edgeloop.gguf_file import GGUFFile

    with GGUFFile(path) as gguf:
        return gguf.metadata["general.architecture"]


def run_all(libraries: Path, models: Path, only: str | None) -> dict[str, dict]:
    results = {}
    for path in sorted(models.glob("*.gguf")):
        name = path.stem
        if only and only not in name:
            continue
        arch = architecture_of(path)
        result = work("examine", path, arch)
        ours, theirs = work("plain", path, arch), work("plain", path, arch, libraries)
        result["plain_is_upstream"] = ours == theirs and "digest" in ours
        results[name] = result
        print(name, verdict(result), file=sys.stderr, flush=True)
    return results


def verdict(result: dict) -> str:
    if "refused" in result:
        return f"refused: {result['refused']}"
    if "crashed" in result:
        return f"crashed: {result['crashed']}"
    if result["failed"]:
        return "wrong: " + "; ".join(result["failed"])
    return "yes" if result["plain_is_upstream"] else "wrong: loop off is not upstream"


def table(results: dict[str, dict]) -> str:
    good = [n for n, r in results.items() if verdict(r) == "yes"]
    refused = [n for n, r in results.items() if "refused" in r]
    lines = [
        "# Architectures",
        "",
        "Written by `scripts/architectures.py` from the tiny random models of upstream's own `test-llama-archs`. For each one: the",
        "plain model equals a build of upstream without our patches bit for bit; one pass and anchored with beta=1 equal the plain",
        "model; naive with kv=own differs from it; kv=own and kv=frozen give the same in one batch as token by token (to ten",
        f"times the plain model's own difference, or {NOISE:g} of the largest logit); a state saved half way goes on identically; off",
        "again equals off. Spans in the middle, at the first and at the last layer.",
        "",
        f"**{len(good)} of {len(results)} loop correctly, {len(refused)} are refused by name, {len(results) - len(good) - len(refused)} are wrong.**",
        "",
        "| model | layers | loops |",
        "|---|---|---|",
    ]
    for name, result in sorted(results.items()):
        lines.append(f"| {name} | {result.get('n_layer', '')} | {verdict(result)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=stock.FOLDER)
    parser.add_argument("--only", help="part of a model's name; prints instead of writing")
    parser.add_argument("--check", action="store_true", help="fail when the table is stale")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import edgeloop  # noqa: F401  from here on llama_cpp is the one that it carries

        job, path, arch = args.worker
        print(json.dumps({"examine": examine, "plain": plain_digest}[job](path, arch)))
        return
    libraries, models = build_upstream(args.build)
    text = table(run_all(libraries, models, args.only))
    if args.only:
        print(text)
    elif args.check:
        old = TABLE.read_text(encoding="utf-8")
        if old != text:
            print(
                *difflib.unified_diff(old.splitlines(), text.splitlines(), "written", "now", n=0, lineterm=""), sep="\n"
            )
            sys.exit(f"docs/{TABLE.name} is stale; run scripts/architectures.py")
    else:
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

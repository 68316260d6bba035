"""What must hold for a looped model of any architecture, on a tiny one of each kind that the engine has to cope with.

Nothing here computes what the right logits are (test_engine_oracle.py does, for two architectures): the looped model
is compared with the plain one, with itself under other conditions, and with the model whose layers are physically
repeated.
"""

from functools import partial

import numpy as np
import pytest
import tiny
import tiny_more

import edgeloop
from edgeloop import Loop, LoopError, gguf_tools

WRITERS = {
    "llama": tiny.write_llama,
    "gemma3": tiny.write_gemma3,
    "qwen2": tiny_more.write_qwen2,
    "qwen3": tiny_more.write_qwen3,
    "qwen3moe": tiny_more.write_qwen3moe,
    "deepseek2": tiny_more.write_deepseek2,
    "gemma3n": tiny_more.write_gemma3n,
    "mamba": partial(tiny.write_mamba, n_layer=6),
    "mamba2": tiny_more.write_mamba2,
    "qwen3next": tiny_more.write_qwen3next,
    "lfm2": tiny_more.write_lfm2,
    "hrm_text": tiny_more.write_hrm_text,
}
RECURRENT = {"mamba", "mamba2", "qwen3next", "lfm2"}
WITHOUT_KV = {"mamba", "mamba2"}
WINDOWED = {"gemma3", "gemma3n"}

# first, middle and last layers; gemma3n's middle one crosses over to the layers that have no K/V of their own
SPANS = dict.fromkeys(WRITERS, ("0-1", "2-3", "4-5")) | {
    "gemma3n": ("0-1", "18-20", "23-24"),
    "hrm_text": ("0-1", "4-4", "10-11"),  # stacks of two
}
CASES = [(arch, span) for arch in WRITERS for span in SPANS[arch]]
UNITS = ("block", "layer")
KV_MODES = ("frozen", "own")  # those that promise not to depend on how the tokens are batched

# layers may be given other numbers, if the arrays that the file has of them move along
UNIFORM = {"mamba", "mamba2", "qwen3next", "lfm2"}
UNIFORM_PER_LAYER = ("attention.recurrent_layers",)

TOLERANCE = 1e-4  # max |difference| / max |logit|
PLAINLY_DIFFERENT = 100 * TOLERANCE

PROMPT = np.random.default_rng(1).integers(3, len(tiny.VOCAB), 24)
OTHER = np.random.default_rng(2).integers(3, len(tiny.VOCAB), 24)
HALF = len(PROMPT) // 2


def open_model(path):
    f32 = {"type_k": 0, "type_v": 0}  # GGML_TYPE_F32; llama.cpp's default is F16
    return edgeloop.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, **f32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """arch -> (path, what the writer returns)"""
    folder = tmp_path_factory.mktemp("architectures")
    return {arch: (folder / f"{arch}.gguf", write(folder / f"{arch}.gguf")) for arch, write in WRITERS.items()}


@pytest.fixture(scope="module")
def engines(models):
    opened = {arch: open_model(path) for arch, (path, _) in models.items()}
    yield opened
    for llm in opened.values():
        llm.close()


def evaluate(llm, spec, batch=len(PROMPT), tokens=PROMPT):
    """Logits of all positions, evaluated `batch` tokens at a time."""
    llm.loop = spec
    llm.reset()
    return go_on(llm, tokens, batch)


def go_on(llm, tokens, batch=len(PROMPT)):
    for i in range(0, len(tokens), batch):
        llm.eval(tokens[i : i + batch].tolist())
    return llm.scores[: llm.n_tokens].copy()


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


#
# the plain model
#


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", CASES)
def test_loops_that_are_the_plain_model(engines, arch, span, unit):
    llm = engines[arch]
    plain = evaluate(llm, "off")
    assert np.isfinite(plain).all()
    assert np.array_equal(evaluate(llm, f"{span}x1:naive,unit={unit},kv=own"), plain)
    for kv in KV_MODES:
        assert distance(evaluate(llm, f"{span}x3:anchored,beta=1,unit={unit},kv={kv}"), plain) < 1e-5, kv
        looped = evaluate(llm, f"{span}x2:naive,unit={unit},kv={kv}")
        assert np.isfinite(looped).all()
        assert distance(looped, plain) > PLAINLY_DIFFERENT, kv
    assert np.array_equal(evaluate(llm, "off"), plain)


def test_a_span_stays_in_one_stack(engines):
    llm = engines["hrm_text"]
    with pytest.raises(LoopError, match="span 1..2 crosses the border between two of the model's stacks"):
        llm.loop = "1-2x2"
    llm.loop = "1-2x2:unit=layer"


#
# the same under other conditions
#


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", CASES)
def test_how_the_prompt_is_cut_does_not_matter(engines, arch, span, unit, kv):
    llm, spec = engines[arch], f"{span}x3:naive,unit={unit},kv={kv}"
    whole = evaluate(llm, spec)
    for batch in (7, 1):
        assert distance(evaluate(llm, spec, batch), whole) < TOLERANCE, batch


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", CASES)
def test_a_saved_state_goes_on_identically(engines, models, arch, span, unit, kv):
    llm, spec = engines[arch], f"{span}x3:naive,unit={unit},kv={kv}"
    evaluate(llm, spec, tokens=PROMPT[:HALF])
    state = llm.save_state()
    straight = go_on(llm, PROMPT[HALF:])

    evaluate(llm, spec, tokens=OTHER)
    llm.load_state(state)
    restored = go_on(llm, PROMPT[HALF:])
    # of a sliding window llama.cpp saves the tokens in it only: other cells, another order of sums, looped or not
    assert distance(restored, straight) <= (TOLERANCE if arch in WINDOWED else 0)

    other = open_model(models[arch][0])
    other.loop = spec
    other.load_state(state)
    assert np.array_equal(go_on(other, PROMPT[HALF:]), restored)
    other.close()


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", [case for case in CASES if case[0] not in RECURRENT])
def test_tokens_taken_back_leave_nothing(engines, arch, span, unit, kv):
    llm, spec = engines[arch], f"{span}x3:naive,unit={unit},kv={kv}"
    fresh = evaluate(llm, spec, HALF)
    evaluate(llm, spec, tokens=np.concatenate([PROMPT[:HALF], OTHER[HALF:]]), batch=HALF)
    llm.n_tokens = HALF  # llm.eval() removes what comes after
    assert np.array_equal(go_on(llm, PROMPT[HALF:]), fresh)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", [case for case in CASES if case[0] in WITHOUT_KV])
def test_recurrent_layers_know_no_kv_modes(engines, arch, span, unit):
    """One state per pass in each of them."""
    results = [evaluate(engines[arch], f"{span}x3:naive,unit={unit},kv={kv}", 7) for kv in edgeloop.loop.CHOICES["kv"]]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", CASES)
def test_memory(engines, models, arch, span, unit):
    """Each pass after the first costs what the layers keep: recurrent states in every mode, K/V with kv=own."""
    llm, model = engines[arch], models[arch][1]

    def size(passes, kv):
        llm.loop = f"{span}x{passes}:naive,unit={unit},kv={kv}"
        return llm.loop_memory_size()

    first, last = map(int, span.split("-"))
    n_recurrent = sum(is_recurrent(model, il) for il in range(first, last + 1))
    n_kv = sum(not is_recurrent(model, il) for il in range(first, min(last + 1, model.get("n_layer_kv", last + 1))))
    frozen, own = size(2, "frozen"), size(2, "own")
    assert (frozen > 0) == (n_recurrent > 0)
    assert (own > frozen) == (n_kv > 0)
    assert size(4, "frozen") == 3 * frozen and size(4, "own") == 3 * own
    llm.loop = "off"
    assert llm.loop_memory_size() == 0


def is_recurrent(model, il):
    return any(name.startswith((f"blk.{il}.ssm_", f"blk.{il}.shortconv.")) for name in model)


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("arch, span", CASES)
def test_memory_is_what_inspect_says(engines, models, arch, span, kv):
    llm = engines[arch]
    llm.loop = f"{span}x3:kv={kv}"
    info = gguf_tools.inspect(models[arch][0])
    if info.has_recurrent_state:
        assert info.loop_memory_bytes(llm.loop, llm.n_ctx()) is None
    else:
        f16 = 2  # inspect speaks of an f16 cache, the engines here have f32
        assert llm.loop_memory_size() == f16 * info.loop_memory_bytes(llm.loop, llm.n_ctx())


#
# the model whose layers are physically repeated
#


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch, span", [case for case in CASES if case[0] in gguf_tools._EXPORTABLE | UNIFORM])
def test_naive_own_is_the_duplicated_model(engines, models, monkeypatch, tmp_path, arch, span, unit):
    monkeypatch.setattr(gguf_tools, "_EXPORTABLE", gguf_tools._EXPORTABLE | UNIFORM)
    monkeypatch.setattr(gguf_tools, "_PER_LAYER", (*gguf_tools._PER_LAYER, *UNIFORM_PER_LAYER))
    spec = f"{span}x3:naive,unit={unit},kv=own"
    gguf_tools.export(models[arch][0], tmp_path / "duplicated.gguf", spec)
    expect_duplicated(engines[arch], tmp_path / "duplicated.gguf", spec)


@pytest.mark.parametrize("span", ("1-2", "2-3", "4-5"))
def test_duplicated_experts_after_dense_layers(engines, models, monkeypatch, tmp_path, span):
    """deepseek2's layers may be repeated behind the leading dense ones, which the file counts."""
    monkeypatch.setattr(gguf_tools, "_EXPORTABLE", {"deepseek2"})
    spec = f"{span}x3:naive,kv=own"
    gguf_tools.export(models["deepseek2"][0], tmp_path / "duplicated.gguf", spec)
    expect_duplicated(engines["deepseek2"], tmp_path / "duplicated.gguf", spec)


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
def test_duplicated_layers_without_kv(engines, models, tmp_path, unit, kv):
    """gemma3n's layers that read others' K/V may be repeated, each with its own part of the per-layer input."""
    spec = f"22-24x3:naive,unit={unit},kv={kv}"
    model = models["gemma3n"][1]
    order = Loop.parse(spec).expanded(model["n_layer"])
    outer = {name: value for name, value in model.items() if not name.startswith("blk.")}
    layers = {
        f"blk.{new}.{name.split('.', 2)[2]}": model[name]
        for new, il in enumerate(order)
        for name in model
        if name.startswith(f"blk.{il}.")
    }
    per_layer = {"attention.sliding_window_pattern": [il % 5 < 4 for il in order]}
    duplicated = outer | layers | {"n_layer": len(order), "metadata": model["metadata"] | per_layer}
    for name, axis in (("per_layer_token_embd.weight", 1), ("per_layer_model_proj.weight", 0)):
        parts = np.split(model[name], model["n_layer"], axis)
        duplicated[name] = np.concatenate([parts[il] for il in order], axis)
    tiny.write(tmp_path / "duplicated.gguf", duplicated)
    expect_duplicated(engines["gemma3n"], tmp_path / "duplicated.gguf", spec)


def expect_duplicated(llm, path, spec):
    duplicated = open_model(path)
    for batch in (len(PROMPT), 7, 1):
        assert np.array_equal(evaluate(llm, spec, batch), evaluate(duplicated, "off", batch)), batch
    duplicated.close()

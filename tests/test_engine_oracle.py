"""The engine's logits agree with oracle.py, for every solver, unit, K/V mode and place of a span, on two tiny models.

K/V are kept in F32 and one thread is used, so what is left is float rounding. The last tests show that the comparison
can fail: what should differ differs by far more than the tolerance.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations

import numpy as np
import oracle
import pytest
import tiny

import edgeloop
from edgeloop.loop import Loop

TOLERANCE = 1e-4  # max |difference| / max |logit|
PLAINLY_DIFFERENT = 100 * TOLERANCE

WRITERS = {"llama": tiny.write_llama, "gemma3": tiny.write_gemma3}
ARCHS = tuple(WRITERS)
PROMPT = np.random.default_rng(1).integers(3, len(tiny.VOCAB), 20)
LONG_PROMPT = np.random.default_rng(2).integers(3, len(tiny.VOCAB), 300)

F32 = {"type_k": 0, "type_v": 0}  # GGML_TYPE_F32; llama.cpp's default is F16
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}

SOLVERS = (
    "x3:naive",
    "x3:euler",
    "x3:euler,step=0.5",
    "x3:anchored",
    "x3:anchored,beta=0.2",
    "x3:residual-scaled",
    "x3:input-anchor",
    "x3:input-anchor,alpha=0.7",
    "x3:heavy-ball",
    "x4:heavy-ball,alpha=0.4,beta=0.2",
    "x4:midpoint",
    "x4:midpoint,step=0.8",
    "x4:heun",
    "x4:heun,step=0.8",
    "x4:rk4",
    "x8:rk4,step=0.8",
    "x2:poly,weights=0.1/0.2/0.7",
    "x3:poly,weights=1/-1/0.5/0.5",
    "x3:uniform",
    "x3:moving-average",
    "x4:moving-average,lambda=0.3",
    "x4:running-mean",  # with unit=layer it is uniform with as many passes
    "x4:auto-align",
)
NORMED = ("x3:naive", "x3:euler", "x6:anchored", "x4:rk4", "x4:heavy-ball", "x3:running-mean", "x4:auto-align")
SPANS = ("0-1", "2-3", "4-5")  # start, middle, end
UNITS = ("block", "layer")
KV_MODES = ("frozen", "own", "first", "last")

CORNERS = (
    "off",
    "2-3x1",
    "0-0x3",
    "5-5x3",
    "0-5x3",
    "2-2x3+3-3x2",
    "0-1x2+4-5x3",
    "0-0x2+2-3x3+5-5x4:heavy-ball",
    "2-3x64",
    "4-5x3:anchored,beta=1",
    "4-5x3:poly,weights=0/0/0/1",
    "4-5x3:poly,weights=0.5/0.5/0/0",  # the last passes are evaluated for nothing but their K/V
    "4-5x3:poly,weights=1/0/0/0",
)

# Loops whose graphs have equally many nodes and leaves: ggml's allocator looks at little more than these numbers before
# it takes the old graph's memory plan for the new one. Naive adds no nodes between passes, so it is the likeliest.
LOOKALIKES = (
    ("2-3x2:naive,kv=own", "4-5x2:naive,kv=own"),
    ("4-5x3:naive,kv=last", "2-3x3:naive,kv=last"),
    ("4-5x3:naive,unit=layer,kv=last", "4-5x3:naive,kv=last"),
    ("4-5x3:naive", "4-5x3:naive,unit=layer"),
    ("2-3x3:euler", "2-3x3:input-anchor", "2-3x3:euler"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """arch -> (path, the oracle's model)"""
    folder = tmp_path_factory.mktemp("tiny")
    return {arch: (str(folder / f"{arch}.gguf"), write(folder / f"{arch}.gguf")) for arch, write in WRITERS.items()}


@pytest.fixture(scope="module")
def engines(models):
    """arch -> Llama that keeps the logits of all positions"""
    return {a: edgeloop.Llama(path, logits_all=True, n_ctx=64, **F32, **ONE_THREAD) for a, (path, _) in models.items()}


@pytest.fixture(scope="module")
def last_only_engines(models):
    """arch -> Llama whose graphs keep the rows of the last position only"""
    return {a: edgeloop.Llama(path, logits_all=False, n_ctx=64, **F32, **ONE_THREAD) for a, (path, _) in models.items()}


@pytest.fixture(scope="module")
def small_window_engine(models):
    """gemma3 whose sliding-window cache has 256 cells (llama.cpp rounds up to that), fewer than LONG_PROMPT"""
    path, _ = models["gemma3"]
    return edgeloop.Llama(path, logits_all=True, n_ctx=512, n_batch=32, swa_full=False, **F32, **ONE_THREAD)


def evaluate(llm, spec, tokens=PROMPT, split=()):
    """Logits of all positions, from one llm.eval() for each batch."""
    llm.loop = spec
    llm.reset()
    for batch in np.split(tokens, split):
        llm.eval(batch.tolist())
    return llm.scores[: llm.n_tokens].copy()


def expect(model, spec, tokens=PROMPT, split=()):
    return oracle.forward(model, tokens, Loop.parse(spec), split)


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("kv", ("frozen", "own"))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_solver(engines, models, arch, solver, span, unit, kv):
    spec = f"{span}{solver},unit={unit},kv={kv}"
    assert distance(evaluate(engines[arch], spec), expect(models[arch][1], spec)) < TOLERANCE


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_corner(engines, models, arch, corner, unit, kv):
    if corner == "off":
        spec = corner
    else:
        spec = corner + ("," if ":" in corner else ":") + f"unit={unit},kv={kv}"
    assert distance(evaluate(engines[arch], spec), expect(models[arch][1], spec)) < TOLERANCE


@pytest.mark.parametrize("norm", ("hold", "interp"))
@pytest.mark.parametrize("kv", ("frozen", "own"))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("solver", NORMED)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ARCHS)
def test_norm(engines, models, arch, span, solver, unit, kv, norm):
    spec = f"{span}{solver},unit={unit},kv={kv},norm={norm}"
    assert distance(evaluate(engines[arch], spec), expect(models[arch][1], spec)) < TOLERANCE


@pytest.mark.parametrize("norm", ("hold", "interp"))
@pytest.mark.parametrize("arch", ARCHS)
def test_norm_keeps_the_plain_model(engines, arch, norm):
    plain = evaluate(engines[arch], "off")
    assert np.array_equal(evaluate(engines[arch], f"2-3x1:norm={norm}"), plain)
    assert distance(evaluate(engines[arch], f"2-3x3:anchored,beta=1,norm={norm}"), plain) < TOLERANCE


@pytest.mark.parametrize("split", ((9,), (5, 6, 13), tuple(range(1, len(PROMPT)))), ids=("two", "four", "one-by-one"))
@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("spans", ("0-1x3:naive", "2-3x3", "4-5x3:naive", "0-1x2+4-5x3:anchored"))
@pytest.mark.parametrize("arch", ARCHS)
def test_batches(engines, models, arch, spans, unit, kv, split):
    spec = spans + ("," if ":" in spans else ":") + f"unit={unit},kv={kv}"
    assert distance(evaluate(engines[arch], spec, split=split), expect(models[arch][1], spec, split=split)) < TOLERANCE


@pytest.mark.parametrize("split", ((), (9,)), ids=("one", "two"))
@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("spans", ("4-5x3:naive", "4-5x3:heavy-ball", "5-5x4:rk4", "0-1x2+3-5x2:heun", "2-3x3:naive"))
@pytest.mark.parametrize("arch", ARCHS)
def test_last_position_only(last_only_engines, models, arch, spans, unit, kv, split):
    """The engine drops the other rows in the last layer, but not before the last pass."""
    llm = last_only_engines[arch]
    spec = f"{spans},unit={unit},kv={kv}"
    evaluate(llm, spec, split=split)
    got = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(tiny.VOCAB),))
    assert distance(got, expect(models[arch][1], spec, split=split)[-1]) < TOLERANCE


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("spans", ("1-2x3:naive", "4-5x3:euler"))
def test_sliding_window_cache(small_window_engine, models, spans, unit, kv):
    """swa_full=False: the cells of tokens that left the window are used again."""
    spec = f"{spans},unit={unit},kv={kv}"
    got = evaluate(small_window_engine, spec, LONG_PROMPT)
    split = range(small_window_engine.n_batch, len(LONG_PROMPT), small_window_engine.n_batch)
    assert distance(got, expect(models["gemma3"][1], spec, LONG_PROMPT, split)) < TOLERANCE


def evaluate_in_turn(path, specs):
    llm = edgeloop.Llama(path, logits_all=True, n_ctx=64, **F32, **ONE_THREAD)
    return [evaluate(llm, spec) for spec in specs]


@pytest.mark.parametrize("specs", LOOKALIKES, ids=" then ".join)
@pytest.mark.parametrize("arch", ARCHS)
def test_change_to_a_lookalike(models, arch, specs):
    """In a process of its own, because what goes wrong here is a crash."""
    path, model = models[arch]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        results = child.submit(evaluate_in_turn, path, specs).result(timeout=60)
    for spec, got in zip(specs, results):
        assert distance(got, expect(model, spec)) < TOLERANCE, spec


#
# controls: a comparison with the wrong thing fails
#


@pytest.mark.parametrize(
    "spec, other, split",
    (
        ("2-3x3:naive", "off", ()),
        ("2-3x3:naive", "2-3x3:euler", ()),
        ("2-3x3:naive", "3-4x3:naive", ()),
        ("2-3x3:naive", "2-3x2:naive", ()),
        ("2-3x3:naive", "2-3x3:naive,unit=layer", ()),
        ("2-3x3:naive", "2-3x3:naive,norm=hold", ()),
        ("2-3x3:naive", "2-3x3:naive,norm=interp", ()),
        ("0-1x3:naive,norm=hold", "0-1x3:naive,norm=interp", ()),
        *((f"2-3x3:naive,kv={a}", f"2-3x3:naive,kv={b}", (9,)) for a, b in combinations(KV_MODES, 2)),
    ),
    ids=str,
)
@pytest.mark.parametrize("arch", ARCHS)
def test_control_wrong_loop(engines, models, arch, spec, other, split):
    got = evaluate(engines[arch], spec, split=split)
    assert distance(got, expect(models[arch][1], other, split=split)) > PLAINLY_DIFFERENT


def test_control_wrong_window(engines, models):
    model = models["gemma3"][1]
    got = evaluate(engines["gemma3"], "2-3x3")
    for n_swa in (model["n_swa"] - 1, model["n_swa"] + 1):
        assert distance(got, expect(model | {"n_swa": n_swa}, "2-3x3")) > PLAINLY_DIFFERENT


def test_control_wrong_activation(engines, models, monkeypatch):
    """gemma3's feed-forward networks are scaled down (see tiny.py), yet not out of sight."""
    got = evaluate(engines["gemma3"], "2-3x3")
    monkeypatch.setattr(oracle, "gelu", oracle.silu)
    assert distance(got, expect(models["gemma3"][1], "2-3x3")) > PLAINLY_DIFFERENT


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arch", ARCHS)
def test_control_solvers_are_told_apart(models, arch, unit):
    logits = {solver: expect(models[arch][1], f"2-3{solver},unit={unit}") for solver in SOLVERS}
    for a, b in combinations(SOLVERS, 2):
        assert distance(logits[a], logits[b]) > 10 * TOLERANCE, f"{a} and {b} are too close to tell"

"""The engine's logits agree with oracle.py on qwen3 and qwen3moe, for both routings; see test_engine_oracle.py.

Where two experts are almost equally probable, float rounding may choose the other one, which is no error and yet far
from small. So the seeds are chosen such that this does not happen, and every comparison checks that it did not.
"""

import numpy as np
import oracle
import pytest
import tiny
import tiny_more
from test_engine_oracle import F32, KV_MODES, ONE_THREAD, PLAINLY_DIFFERENT, TOLERANCE, UNITS, distance, evaluate

import edgeloop
from edgeloop.loop import Loop

MODEL_SEED, PROMPT_SEED = 3, 2
PROMPT = np.random.default_rng(PROMPT_SEED).integers(3, len(tiny.VOCAB), 20)
MIN_ROUTER_GAP = 5e-5  # between the logits of the last expert that is used and the first that is not

WRITERS = {"qwen3": tiny_more.write_qwen3, "qwen3moe": tiny_more.write_qwen3moe}
CASES = (("qwen3", "free"), ("qwen3moe", "free"), ("qwen3moe", "frozen"))
SOLVERS = ("x3:naive", "x3:euler", "x3:anchored", "x3:heavy-ball", "x4:rk4", "x2:poly,weights=0.1/0.2/0.7")
SPANS = ("0-1", "2-3", "4-5")  # start, middle, end


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """arch -> (path, the oracle's model)"""
    folder = tmp_path_factory.mktemp("tiny")
    paths = {arch: str(folder / f"{arch}.gguf") for arch in WRITERS}
    return {arch: (path, WRITERS[arch](path, MODEL_SEED)) for arch, path in paths.items()}


@pytest.fixture(scope="module")
def engines(models):
    """(arch, logits_all) -> Llama; with logits_all=False its graphs keep the rows of the last position only"""
    return {
        (arch, every): edgeloop.Llama(path, logits_all=every, n_ctx=64, **F32, **ONE_THREAD)
        for arch, (path, _) in models.items()
        for every in (True, False)
    }


@pytest.fixture
def expect(models, monkeypatch):
    """(arch, spec, split) -> the oracle's logits, none of which hangs on a near-tie in a router"""

    def top_k_softmax(logits, k, original=oracle.top_k_softmax):
        ascending = np.sort(logits)
        gap = (ascending[:, -k] - ascending[:, -k - 1]).min()
        assert gap > MIN_ROUTER_GAP, f"a near-tie in the router, {gap:.1e}: choose other seeds"
        return original(logits, k)

    monkeypatch.setattr(oracle, "top_k_softmax", top_k_softmax)
    return lambda arch, spec, split=(): oracle.forward(models[arch][1], PROMPT, Loop.parse(spec), split)


@pytest.mark.parametrize("arch", WRITERS)
def test_plain(engines, expect, arch):
    assert distance(evaluate(engines[arch, True], "off", PROMPT), expect(arch, "off")) < TOLERANCE


@pytest.mark.parametrize("kv", ("frozen", "own"))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("arch, routing", CASES)
def test_solver(engines, expect, arch, routing, solver, span, unit, kv):
    spec = f"{span}{solver},unit={unit},kv={kv},routing={routing}"
    assert distance(evaluate(engines[arch, True], spec, PROMPT), expect(arch, spec)) < TOLERANCE


@pytest.mark.parametrize("split", ((9,), (9, 19)), ids=("two", "a-token-last"))
@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("spans", ("2-3x3:naive", "0-1x2+4-5x3:anchored", "2-2x3+3-4x2:euler"))
@pytest.mark.parametrize("arch, routing", CASES)
def test_batches(engines, expect, arch, routing, spans, unit, kv, split):
    spec = f"{spans},unit={unit},kv={kv},routing={routing}"
    assert distance(evaluate(engines[arch, True], spec, PROMPT, split), expect(arch, spec, split)) < TOLERANCE


@pytest.mark.parametrize("split", ((), (9,)), ids=("one", "two"))
@pytest.mark.parametrize("kv", ("frozen", "own"))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("spans", ("4-5x3:naive", "5-5x4:rk4", "0-1x2+3-5x2:heun", "2-3x3:naive"))
@pytest.mark.parametrize("arch, routing", CASES)
def test_last_position_only(engines, expect, arch, routing, spans, unit, kv, split):
    """The engine drops the other rows in the last layer's last pass, and then of the frozen routing too."""
    llm = engines[arch, False]
    spec = f"{spans},unit={unit},kv={kv},routing={routing}"
    evaluate(llm, spec, PROMPT, split)
    got = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(tiny.VOCAB),))
    assert distance(got, expect(arch, spec, split)[-1]) < TOLERANCE


def test_change_of_routing(engines, expect):
    """Nothing else changes, so the old graph must not be used again."""
    for routing in ("free", "frozen", "free"):
        spec = f"2-3x3:naive,routing={routing}"
        assert distance(evaluate(engines["qwen3moe", True], spec, PROMPT), expect("qwen3moe", spec)) < TOLERANCE


def test_dense_model_has_no_routing(engines):
    with pytest.raises(edgeloop.LoopError, match="no experts"):
        engines["qwen3", True].loop = "2-3x3:routing=frozen"


#
# controls: a comparison with the wrong thing fails
#


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_control_routings_are_told_apart(expect, solver, span, unit):
    free, frozen = (expect("qwen3moe", f"{span}{solver},unit={unit},routing={r}") for r in ("free", "frozen"))
    assert distance(free, frozen) > PLAINLY_DIFFERENT


def test_control_weights_are_frozen_too(engines, models, monkeypatch):
    """The first pass's experts with the weights that each pass would give them are something else."""

    def route(self, il, logits):
        if self.i == 0:
            self.routed[il] = oracle.top_k_softmax(logits, tiny_more.N_EXPERT_USED) > 0
        return oracle.softmax(np.where(self.routed[il], logits, -np.inf))

    monkeypatch.setattr(oracle.Pass, "_route", route)
    spec = "2-3x3:naive,routing=frozen"
    wrong = oracle.forward(models["qwen3moe"][1], PROMPT, Loop.parse(spec))
    assert distance(evaluate(engines["qwen3moe", True], spec, PROMPT), wrong) > PLAINLY_DIFFERENT

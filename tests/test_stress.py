"""1,000 random loops on one context of the demo model: no crash, no NaN, memory flat, and the plain model afterwards."""

import gc
import random

import numpy as np
import psutil
import pytest

from edgeloop.loop import CHOICES, MAX_VISITS
from edgeloop.solvers import SOLVERS

N_LAYER = 30
N_LOOPS = 1000
TOKENS = 4
SETTLED = 100  # loops after which the buffers have met the largest graphs


def random_spec(rng: random.Random) -> str:
    solver = rng.choice([name for name, s in SOLVERS.items() if not s.takes_weights])
    spans, at, visits = [], 0, N_LAYER
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if at >= N_LAYER:
            break
        first = rng.randrange(at, N_LAYER)
        last = min(N_LAYER - 1, first + rng.choice([0, 1, 2, 3, 7]))
        passes = SOLVERS[solver].multiple * rng.choice([1, 2, 3, 4])
        if visits + (passes - 1) * (last - first + 1) > MAX_VISITS:
            continue
        visits += (passes - 1) * (last - first + 1)
        spans.append(f"{first}-{last}x{passes}")
        at = last + 1
    choices = {key: rng.choice(allowed) for key, allowed in CHOICES.items() if key != "routing"}
    if choices["kv"] == "last":
        choices["scope"] = "all"
    options = [solver, *(f"{key}={value}" for key, value in choices.items())]
    return "+".join(spans or ["0-1x4"]) + ":" + ",".join(options)


@pytest.mark.slow
def test_a_thousand_random_loops(demo_model, load):
    rng = random.Random(0)
    llm = load(demo_model, n_ctx=128)
    prompt = llm.tokenize(b"The capital of France is")

    def evaluate():
        llm.reset()
        llm.eval(prompt)
        rows = []
        for _ in range(TOKENS):
            row = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()
            rows.append(row)
            llm.eval([int(row.argmax())])
        return np.array(rows)

    plain = evaluate()
    resident = None
    for i in range(N_LOOPS):
        spec = random_spec(rng)
        llm.loop = spec
        assert np.isfinite(evaluate()).all(), spec
        if i == SETTLED:
            gc.collect()
            resident = psutil.Process().memory_info().rss
    llm.loop = "off"
    assert np.array_equal(evaluate(), plain)
    gc.collect()
    grown = psutil.Process().memory_info().rss - resident
    assert grown < 64 << 20, f"{grown >> 20} MB more after {N_LOOPS - SETTLED} loops"

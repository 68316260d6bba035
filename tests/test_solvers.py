"""Every solver's mix matrix makes the recursion of its definition. Checked on random maps, without the engine.

The definitions are written down here a second time, in the words of the papers: on states, not on matrices.
"""

import numpy as np
import pytest

from edgeloop.loop import Loop
from edgeloop.solvers import SOLVERS, mix

N = 5  # numbers in a state


def random_map(seed, bend=0.0):
    """(G, x0): a map that neither explodes nor dies within the passes used here, and a state. Affine, unless bent."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(N, N)) * 0.9 / np.sqrt(N)
    b = rng.normal(size=N)
    return lambda x: a @ x + b + bend * np.tanh(x), rng.normal(size=N)


def run_mix(rows, g, x0):
    """What the engine does with a mix."""
    x, k = [x0], []
    for row in rows:
        k.append(g(x[-1]) - x[-1])
        x.append(x0 + sum(m * kj for m, kj in zip(row, k, strict=True)))
    return x[-1]


def power(g, x, n):
    for _ in range(n):
        x = g(x)
    return x


# ---- the definitions ----


def naive(g, x, passes):
    return power(g, x, passes)


def euler(g, x, passes, step=None):
    h = step or 1 / passes
    for _ in range(passes):
        x = x + h * (g(x) - x)
    return x


def anchored(g, x, passes, beta=0.5):
    return beta * g(x) + (1 - beta) * euler(g, x, passes)


def residual_scaled(g, x, passes):
    return x + (power(g, x, passes) - x) / passes


def input_anchor(g, x0, passes, alpha=0.5):
    x = x0
    for _ in range(passes):
        x = alpha * g(x) + (1 - alpha) * x0
    return x


def heavy_ball(g, x, passes, alpha=0.5, beta=0.3):
    before = x
    for _ in range(passes):
        x, before = x + alpha * (g(x) - x) + beta * (x - before), x
    return x


def midpoint(g, x, passes, step=None):
    h = step or 2 / passes
    for _ in range(passes // 2):
        half = x + h / 2 * (g(x) - x)
        x = x + h * (g(half) - half)
    return x


def heun(g, x, passes, step=None):
    h = step or 2 / passes
    for _ in range(passes // 2):
        slope = g(x) - x
        end = x + h * slope
        x = x + h / 2 * (slope + g(end) - end)
    return x


def rk4(g, x, passes, step=None):
    def f(x):
        return g(x) - x

    h = step or 4 / passes
    for _ in range(passes // 4):
        k1 = f(x)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + h / 2 * k2)
        k4 = f(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def poly(g, x, passes, weights):
    return sum(w * power(g, x, p) for p, w in enumerate(weights))


def uniform(g, x, passes):
    outputs = []
    for _ in range(passes):
        outputs.append(g(x))
        x = np.mean(outputs, axis=0)
    return x


def moving_average(g, x, passes, lambda_=0.5):
    first = g(x)
    x = first
    for _ in range(passes - 1):
        x = lambda_ * first + (1 - lambda_) * g(x)
    return x


ANY = (2, 3, 4, 6, 17, 64)
EVEN = (2, 4, 6, 64)
FOURS = (4, 8, 12, 64)

CASES = [
    # definition, numbers of passes, parameters
    (naive, ANY, {}),
    (euler, ANY, {}),
    (euler, ANY, {"step": 0.5}),
    (euler, ANY, {"step": 1.0}),
    (euler, (2, 3, 4), {"step": 2.0}),
    (anchored, ANY, {}),
    (anchored, ANY, {"beta": 0.0}),
    (anchored, ANY, {"beta": 0.3}),
    (anchored, ANY, {"beta": 1.0}),
    (residual_scaled, ANY, {}),
    (input_anchor, ANY, {}),
    (input_anchor, ANY, {"alpha": 0.9}),
    (input_anchor, (2, 3, 4), {"alpha": 2.0}),
    (heavy_ball, ANY, {}),
    (heavy_ball, ANY, {"alpha": 0.2}),
    (heavy_ball, ANY, {"alpha": 0.4, "beta": 0.0}),
    (heavy_ball, (2, 3, 4), {"alpha": 2.0, "beta": 1.0}),
    (midpoint, EVEN, {}),
    (midpoint, EVEN, {"step": 0.7}),
    (heun, EVEN, {}),
    (heun, EVEN, {"step": 0.7}),
    (rk4, FOURS, {}),
    (rk4, FOURS, {"step": 0.7}),
    (poly, (2,), {"weights": (0.0, 0.0, 1.0)}),
    (poly, (2,), {"weights": (0.5, 0.25, 0.25)}),
    (poly, (3,), {"weights": (-1.0, 3.0, -2.0, 1.0)}),
    (poly, (6,), {"weights": (0.1, 0.2, 0.3, 0.4, -0.3, 0.2, 0.1)}),
    (uniform, ANY, {}),
    (moving_average, ANY, {}),
    (moving_average, ANY, {"lambda": 0.0}),
    (moving_average, ANY, {"lambda": 0.2}),
    (moving_average, ANY, {"lambda": 1.0}),
]


def name_of(definition):
    return definition.__name__.replace("_", "-")


@pytest.mark.parametrize(
    "definition, passes, parameters",
    [(definition, k, parameters) for definition, passes, parameters in CASES for k in passes],
    ids=lambda v: name_of(v) if callable(v) else None,
)
def test_mix_is_the_definition(definition, passes, parameters):
    rows = mix(name_of(definition), passes, parameters)
    assert [len(row) for row in rows] == list(range(1, passes + 1))
    arguments = {name.replace("lambda", "lambda_"): value for name, value in parameters.items()}
    for seed, bend in ((0, 0.0), (1, 0.0), (2, 0.5)):  # affine maps alone could not tell heun from midpoint
        g, x0 = random_map(seed, bend)
        np.testing.assert_allclose(run_mix(rows, g, x0), definition(g, x0, passes, **arguments), rtol=1e-9, atol=1e-9)


def test_every_solver_is_checked_with_every_parameter():
    checked = {}
    for definition, _, parameters in CASES:
        checked.setdefault(name_of(definition), set()).update(parameters)
    known = {
        name: set(s.parameters) | ({"weights"} if s.takes_weights else set())
        for name, s in SOLVERS.items()
        if s.rule == "mix"
    }
    assert checked == known


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_pass_is_the_plain_model(solver):
    assert mix(solver, 1, {}) == [[1.0]]


@pytest.mark.parametrize("spec", ["8-9x1", "8-9x1:naive", "8-9x1:anchored", "8-9x1:uniform,kv=own,unit=layer"])
def test_one_pass_of_a_spec_is_the_plain_model(spec):
    assert Loop.parse(spec).mixes() == [[[1.0]]]


def test_a_loop_has_one_mix_for_each_span():
    loop = Loop.parse("1-1x1+2-3x2+4-4x3:step=0.5")
    assert loop.mixes() == [[[1.0]], [[0.5], [0.5, 0.5]], [[0.5], [0.5, 0.5], [0.5, 0.5, 0.5]]]
    assert Loop.parse("off").mixes() == []
    assert Loop.parse("1-2x2:moving-average,lambda=0.25").mixes() == [mix("moving-average", 2, {"lambda": 0.25})]
    assert Loop.parse("1-2x2:poly,weights=0/0.5/0.5").mixes() == [mix("poly", 2, {"weights": (0.0, 0.5, 0.5)})]


# ---- identities ----


@pytest.mark.parametrize("passes", ANY)
def test_anchored_at_one_gives_the_first_output(passes):
    rows = mix("anchored", passes, {"beta": 1.0})
    assert rows[-1] == [1.0] + [0.0] * (passes - 1)
    g, x0 = random_map(7)
    np.testing.assert_allclose(run_mix(rows, g, x0), g(x0), rtol=1e-15)


def test_euler_with_two_passes_is_two_half_steps():
    assert mix("euler", 2, {}) == [[0.5], [0.5, 0.5]]


@pytest.mark.parametrize("passes", ANY)
def test_naive_is_euler_with_whole_steps(passes):
    assert mix("naive", passes, {}) == mix("euler", passes, {"step": 1.0}) == [[1.0] * n for n in range(1, passes + 1)]


@pytest.mark.parametrize("passes", ANY)
@pytest.mark.parametrize(
    "solver, parameters, weights",
    [
        ("residual-scaled", {}, lambda k: (1 - 1 / k, *[0.0] * (k - 1), 1 / k)),
        ("naive", {}, lambda k: (*[0.0] * k, 1.0)),
        ("anchored", {"beta": 1.0}, lambda k: (0.0, 1.0, *[0.0] * (k - 1))),
    ],
)
def test_solvers_that_are_polynomials(passes, solver, parameters, weights):
    g, x0 = random_map(8)
    out = run_mix(mix("poly", passes, {"weights": weights(passes)}), g, x0)
    np.testing.assert_allclose(run_mix(mix(solver, passes, parameters), g, x0), out, rtol=1e-9)


@pytest.mark.parametrize("passes", ANY)
def test_the_limits_of_the_others(passes):
    g, x0 = random_map(9)

    def out(solver, **parameters):
        return run_mix(mix(solver, passes, {name.rstrip("_"): value for name, value in parameters.items()}), g, x0)

    np.testing.assert_allclose(out("moving-average", lambda_=0.0), power(g, x0, passes))
    np.testing.assert_allclose(out("moving-average", lambda_=1.0), g(x0))
    np.testing.assert_allclose(out("input-anchor", alpha=1.0), power(g, x0, passes))
    np.testing.assert_allclose(out("heavy-ball", alpha=0.4, beta=0.0), out("euler", step=0.4))
    np.testing.assert_allclose(out("anchored", beta=0.0), out("euler"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fixed_point_stays(solver):
    g, _ = random_map(10)
    shift = g(np.zeros(N))
    fixed = np.linalg.solve(np.eye(N) - np.column_stack([g(e) - shift for e in np.eye(N)]), shift)
    parameters = {"weights": (0.3, -0.2, 0.4, 0.1, 0.4)} if SOLVERS[solver].takes_weights else {}
    np.testing.assert_allclose(run_mix(mix(solver, 4, parameters), g, fixed), fixed)


# ---- order of convergence ----


@pytest.mark.parametrize(
    "solver, passes, order", [("euler", 32, 1), ("midpoint", 32, 2), ("heun", 32, 2), ("rk4", 32, 4)]
)
def test_order_of_convergence(solver, passes, order):
    """The passes go from time 0 to 1 of dx/dt = G(x) - x; twice the steps divide the error by 2^order."""
    rng = np.random.default_rng(11)
    root = rng.normal(size=(N, N))
    values, vectors = np.linalg.eigh((root + root.T) / 12)
    b, x0 = rng.normal(size=N), rng.normal(size=N)
    a = vectors @ np.diag(values) @ vectors.T

    # x' = (A - 1) x + b, solved in the eigenbasis of A
    rate, c, y = values - 1.0, vectors.T @ b, vectors.T @ x0
    exact = vectors @ ((y + c / rate) * np.exp(rate) - c / rate)

    def error(k):
        return np.linalg.norm(run_mix(mix(solver, k, {}), lambda x: a @ x + b, x0) - exact)

    assert error(passes) < 0.1
    assert error(passes) / error(2 * passes) == pytest.approx(2**order, rel=0.1)

"""Solver -> mix matrix. Pure functions, no dependency on the engine.

With x[0] the state that enters a span, G one pass and k[j] = G(x[j]) - x[j], the engine computes

    x[i+1] = x[0] + sum over j <= i of mix[i][j] * k[j]

so a solver is a lower-triangular matrix of shape (passes, passes). Row i is built here as the list of the weights of
k[0..i]; `G(x[i]) - x[0]` is then row i-1 plus one more k[i], which is all that most schemes need.

Sources: arXiv 2605.23872 for all but uniform and moving-average, which follow the prose of arXiv 2602.14759 (its
equations are not public in full).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

Row = list[float]
Mix = list[Row]


@dataclass(frozen=True)
class Parameter:
    """A number that a solver takes: its default (None: needed, or computed), and the closed range it must lie in."""

    default: float | None
    low: float
    high: float
    low_open: bool = False


@dataclass(frozen=True)
class Solver:
    name: str
    rows: Callable[..., Mix]
    parameters: dict[str, Parameter]
    multiple: int = 1  # the passes of one step: their count must be a multiple
    takes_weights: bool = False
    rule: str = "mix"  # the engine's rule where no matrix says it; the mix is then not used


def _ones(k: int) -> Mix:
    return [[1.0] * (i + 1) for i in range(k)]


def _naive(k: int) -> Mix:
    """x <- G(x)."""
    return _ones(k)


def _euler(k: int, step: float | None = None) -> Mix:
    """x <- x + step (G(x) - x), step 1/passes unless given."""
    h = 1.0 / k if step is None else step
    return [[h] * (i + 1) for i in range(k)]


def _anchored(k: int, beta: float) -> Mix:
    """Euler, then out = beta G(x[0]) + (1 - beta) x[k]."""
    rows = _euler(k)
    rows[-1] = [(1.0 - beta) * m for m in rows[-1]]
    rows[-1][0] += beta
    return rows


def _residual_scaled(k: int) -> Mix:
    """y = G^k(x[0]), out = x[0] + (y - x[0]) / k."""
    rows = _ones(k)
    rows[-1] = [1.0 / k] * k
    return rows


def _input_anchor(k: int, alpha: float) -> Mix:
    """x <- alpha G(x) + (1 - alpha) x[0]."""
    rows: Mix = []
    for i in range(k):
        rows.append([alpha * m for m in (rows[-1] if rows else [])] + [alpha])
    return rows


def _heavy_ball(k: int, alpha: float, beta: float) -> Mix:
    """x[i+1] = x[i] + alpha k[i] + beta (x[i] - x[i-1])."""
    rows: Mix = []
    for i in range(k):
        now = rows[i - 1] if i else []
        before = (rows[i - 2] if i > 1 else []) + [0.0] * i
        rows.append([m + beta * (m - b) for m, b in zip(now, before)] + [alpha])
    return rows


def _steps(k: int, tableau: list[Row], step: float | None) -> Mix:
    """An explicit Runge-Kutta scheme on F(x) = G(x) - x: row s of the tableau says where stage s + 1 stands, the last
    row where the step ends, in units of the step size (1/steps unless given)."""
    stages = len(tableau)
    h = stages / k if step is None else step
    rows: Mix = []
    base: Row = []
    for _ in range(k // stages):
        for s in range(stages):
            rows.append(base + [h * w for w in tableau[s]])
        base = rows[-1]
    return rows


def _midpoint(k: int, step: float | None = None) -> Mix:
    """Two passes a step: half a step with k[0], then a whole one with the slope there."""
    return _steps(k, [[0.5], [0.0, 1.0]], step)


def _heun(k: int, step: float | None = None) -> Mix:
    """Two passes a step: a whole step with k[0], then the mean of both slopes."""
    return _steps(k, [[1.0], [0.5, 0.5]], step)


def _rk4(k: int, step: float | None = None) -> Mix:
    """Four passes a step: the classical Runge-Kutta scheme."""
    return _steps(k, [[0.5], [0.0, 0.5], [0.0, 0.0, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]], step)


def _poly(k: int, weights: tuple[float, ...]) -> Mix:
    """out = sum over p = 0..k of weights[p] G^p(x[0]); the weights sum to 1."""
    rows = _ones(k)
    rows[-1] = [sum(weights[j + 1 :]) for j in range(k)]
    return rows


def _uniform(k: int) -> Mix:
    """Next input = mean of all outputs so far, out = mean of all (regularizer 1 of 2602.14759, from its prose)."""
    return [[1.0 / (j + 1) for j in range(i + 1)] for i in range(k)]


def _moving_average(k: int, lambda_: float) -> Mix:
    """Next input = lambda G(x[0]) + (1 - lambda) G(x[i]) (regularizer 2 of 2602.14759, from its prose)."""
    rows: Mix = [[1.0]]
    for i in range(1, k):
        rows.append([(1.0 - lambda_) * m for m in rows[-1]] + [1.0 - lambda_])
        rows[-1][0] += lambda_
    return rows


_STEP = {"step": Parameter(None, 0.0, 2.0, low_open=True)}

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("naive", _naive, {}),
        Solver("euler", _euler, _STEP),
        Solver("anchored", _anchored, {"beta": Parameter(0.5, 0.0, 1.0)}),
        Solver("residual-scaled", _residual_scaled, {}),
        Solver("input-anchor", _input_anchor, {"alpha": Parameter(0.5, 0.0, 2.0, low_open=True)}),
        Solver(
            "heavy-ball",
            _heavy_ball,
            {"alpha": Parameter(0.5, 0.0, 2.0, low_open=True), "beta": Parameter(0.3, 0.0, 1.0)},
        ),
        Solver("midpoint", _midpoint, _STEP, multiple=2),
        Solver("heun", _heun, _STEP, multiple=2),
        Solver("rk4", _rk4, _STEP, multiple=4),
        Solver("poly", _poly, {}, takes_weights=True),
        Solver("uniform", _uniform, {}),
        Solver("moving-average", _moving_average, {"lambda": Parameter(0.5, 0.0, 1.0)}),
        # every layer passes on the mean of its outputs in the passes so far ("uniform" in the code of 2605.23872)
        Solver("running-mean", _naive, {}, rule="running-mean"),
        # next input = sum of w[j] G(x[j]), for each token w[j] ~ max(cos(G(x[j]), G(x[0])), 0), sum 1 (regularizer 3 of
        # 2602.14759, from its prose)
        Solver("auto-align", _naive, {}, rule="auto-align"),
    )
}


def mix(solver: str, passes: int, parameters: dict[str, float | tuple[float, ...]]) -> Mix:
    """The lower-triangular rows (row i has i + 1 entries) of a solver that loop.py has checked.

    One pass is the plain model, whatever the solver.
    """
    if passes == 1:
        return [[1.0]]
    chosen = SOLVERS[solver]
    values = {name: p.default for name, p in chosen.parameters.items()} | parameters
    arguments = {("lambda_" if name == "lambda" else name): value for name, value in values.items()}
    return chosen.rows(passes, **arguments)

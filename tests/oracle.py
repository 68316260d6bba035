"""The logits of a looped model in NumPy float64, written from the mathematics and not from our C++ or solvers.py.

Takes the dict that a writer of tiny.py returns, or write_qwen3 and write_qwen3moe of tiny_more.py. A solver is its
textbook recursion here, never a mix matrix; a pass is a function that the recursion calls. Slow and short on purpose.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Sequence

import numpy as np

Array = np.ndarray
Map = Callable[[Array], Array]


def forward(model: dict[str, Any], tokens: Sequence[int], loop=None, split: Sequence[int] = ()) -> Array:
    """Logits of all positions, shape (len(tokens), n_vocab).

    loop: None, or anything with .spans (each with .first, .last, .passes), .solver, .parameters (pairs), .unit, .kv,
    .routing and .norm.
    split: positions at which a new batch begins, as for np.split; the default is one batch.
    """
    keys_values = KeysValues(loop.kv if loop else "frozen")
    logits = []
    for position in np.split(np.arange(len(tokens)), split):
        x = model["token_embd.weight"][np.asarray(tokens)[position]].astype(np.float64)
        if model["arch"] == "gemma3":
            x *= np.sqrt(model["n_embd"])
        for layers, passes in blocks(model["n_layer"], loop):
            kind = NormedPass if loop and loop.norm != "none" and passes > 1 else Pass
            g = kind(model, layers, passes, position, keys_values, loop)
            x = SOLVERS[loop.solver](g, x, passes, **parameters(loop)) if passes > 1 else g(x)
            assert g.i == passes, f"{loop.solver} made {g.i} passes of {passes}"
        x = rms_norm(x, model["output_norm.weight"], model["norm_eps"])
        logits.append(x @ model.get("output.weight", model["token_embd.weight"]).T)
    return np.concatenate(logits)


def blocks(n_layer: int, loop) -> list[tuple[range, int]]:
    """What is iterated together, in order: (layers, passes)."""
    spans = {span.first: span for span in loop.spans} if loop else {}
    result = []
    il = 0
    while il < n_layer:
        last, passes = (spans[il].last, spans[il].passes) if il in spans else (il, 1)
        if loop and loop.unit == "layer":
            result += [(range(i, i + 1), passes) for i in range(il, last + 1)]
        else:
            result.append((range(il, last + 1), passes))
        il = last + 1
    return result


def parameters(loop) -> dict[str, Any]:
    return {"lambda_" if name == "lambda" else name: value for name, value in loop.parameters}


class Pass:
    """G: x -> the state after some layers. Every call is the next pass."""

    def __init__(self, model, layers: range, passes: int, position: Array, keys_values: KeysValues, loop):
        self.loop = loop
        self.model = model
        self.layers = layers
        self.passes = passes
        self.position = position
        self.keys_values = keys_values
        self.routed: dict[int, Array] = {}
        self.passes_on: Callable[[int, Array], Array] = lambda il, x: (
            x
        )  # what a layer hands to the next, given its output
        self.i = 0

    def __call__(self, x: Array) -> Array:
        for il in self.layers:
            x = layer(self.model, il, x, self.position, partial(self._see, il), partial(self._route, il))
            x = self.passes_on(il, x)
        self.i += 1
        return x

    def _see(self, il: int, k: Array, v: Array) -> tuple[Array, Array]:
        return self.keys_values.see(il, self.i, self.passes, self.position[0], (k, v))

    def _route(self, il: int, logits: Array) -> Array:
        """The experts' weights in this pass, given the router's logits; frozen: those of the first pass."""
        if self.loop is None or self.loop.routing == "free" or self.i == 0:
            self.routed[il] = top_k_softmax(logits, self.model["metadata"]["expert_used_count"])
        return self.routed[il]


class NormedPass(Pass):
    """G of the rescaled state. A solver that adds updates gets the update of the rescaled state, added to its own."""

    def __call__(self, x: Array) -> Array:
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        if self.i == 0:
            y = super().__call__(x)
            self.entry, self.first = length, np.linalg.norm(y, axis=-1, keepdims=True)
            return y
        way = self.i / self.passes if self.loop.norm == "interp" else 0
        z = x / length * ((1 - way) * self.entry + way * self.first)
        y = super().__call__(z)
        return y if self.loop.solver in ("auto-align", "running-mean") else x + y - z


class KeysValues:
    """K and V of all tokens so far, and which of them a pass sees: the table of DESIGN section 4."""

    def __init__(self, mode: str):
        self.mode = mode
        self.kept: dict[tuple[int, int], tuple[Array, Array]] = {}

    def see(self, il: int, i: int, passes: int, n_past: int, new: tuple[Array, Array]) -> tuple[Array, Array]:
        """What pass i of layer il attends to, given the batch's new K and V. Keeps what the mode keeps."""
        slot = (il, i if self.mode == "own" else 0)
        if self.mode == "frozen" and i > 0:
            return self.kept[slot]
        older = [old[:n_past] for old in self.kept[slot]] if n_past else [n[:0] for n in new]
        seen = tuple(np.concatenate(pair) for pair in zip(older, new))
        if self.mode == "own" or i == (passes - 1 if self.mode == "last" else 0):
            self.kept[slot] = seen
        return seen


#
# one layer
#


def layer(
    model, il: int, x: Array, position: Array, see: Callable[[Array, Array], tuple[Array, Array]], route: Map
) -> Array:
    def weight(name: str) -> Array:
        return model[f"blk.{il}.{name}.weight"]

    def norm(x: Array, name: str) -> Array:
        return rms_norm(x, weight(name), model["norm_eps"])

    is_llama, is_gemma = model["arch"] == "llama", model["arch"] == "gemma3"
    is_windowed = is_gemma and (il + 1) % model["swa_period"] != 0
    window = model["n_swa"] if is_windowed else np.inf
    base = model["rope_base_swa"] if is_windowed else model["rope_base"]

    h = norm(x, "attn_norm")
    q, k, v = ((h @ weight(f"attn_{name}").T).reshape(len(x), -1, model["n_head_dim"]) for name in "qkv")
    if not is_llama:
        q, k = norm(q, "attn_q_norm"), norm(k, "attn_k_norm")
    q, k = (rope(z, position, base, adjacent=is_llama) for z in (q, k))
    y = attention(q, *see(k, v), position, window) @ weight("attn_output").T
    x = x + (norm(y, "post_attention_norm") if is_gemma else y)

    h = norm(x, "ffn_norm")
    if model["arch"] == "qwen3moe":
        experts = zip(weight("ffn_gate_exps"), weight("ffn_up_exps"), weight("ffn_down_exps"))
        w = route(h @ weight("ffn_gate_inp").T)
        y = sum(w[:, [e]] * gated(h, *expert, silu) for e, expert in enumerate(experts))
    else:
        y = gated(h, weight("ffn_gate"), weight("ffn_up"), weight("ffn_down"), gelu if is_gemma else silu)
    return x + (norm(y, "post_ffw_norm") if is_gemma else y)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: Array, position: Array, base: float, adjacent: bool) -> Array:
    """Rotates pair i of x (tokens, heads, dim) by position * base^(-2i/dim); pairs are (2i, 2i+1) or (i, i + dim/2)."""
    dim = x.shape[-1]
    turn = np.exp(1j * np.outer(position, base ** (-np.arange(0, dim, 2) / dim)))[:, None, :]
    real, imag = (x[..., 0::2], x[..., 1::2]) if adjacent else (x[..., : dim // 2], x[..., dim // 2 :])
    z = (real + 1j * imag) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape) if adjacent else np.concatenate([z.real, z.imag], -1)


def attention(q: Array, k: Array, v: Array, position: Array, window: float) -> Array:
    """q (tokens, heads, dim), k and v (all tokens, K/V heads, dim); a query sees `window` tokens, itself included."""
    n_token, n_head, dim = q.shape
    k, v = (np.repeat(z, n_head // z.shape[1], axis=1) for z in (k, v))
    distance = position[:, None] - np.arange(len(k))[None, :]
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
    p = softmax(np.where((distance >= 0) & (distance < window), scores, -np.inf))
    return np.einsum("hqk,khd->qhd", p, v).reshape(n_token, n_head * dim)


def gated(x: Array, gate: Array, up: Array, down: Array, activation: Map) -> Array:
    return (activation(x @ gate.T) * (x @ up.T)) @ down.T


def top_k_softmax(logits: Array, k: int) -> Array:
    """The k largest probabilities of each row, normalised to sum 1; 0 for the others."""
    p = softmax(logits)
    p = np.where(p >= np.sort(p)[:, [-k]], p, 0)
    return p / p.sum(axis=-1, keepdims=True)


def softmax(x: Array) -> Array:
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """The tanh approximation, with half-precision input and output: ggml's CPU code looks it up in a table of those."""
    x = x.astype(np.float16).astype(np.float64)
    y = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y.astype(np.float16).astype(np.float64)


#
# solvers: the recursions of DESIGN section 2, K passes of G from x. One pass never comes here: it is the plain model.
#


def naive(g: Map, x: Array, K: int) -> Array:
    for _ in range(K):
        x = g(x)
    return x


def euler(g: Map, x: Array, K: int, step: float | None = None) -> Array:
    h = step or 1 / K
    for _ in range(K):
        x = x + h * (g(x) - x)
    return x


def anchored(g: Map, x: Array, K: int, beta: float = 0.5) -> Array:
    first = g(x)
    x = x + (first - x) / K
    return beta * first + (1 - beta) * euler(g, x, K - 1, step=1 / K)


def residual_scaled(g: Map, x: Array, K: int) -> Array:
    return x + (naive(g, x, K) - x) / K


def input_anchor(g: Map, x: Array, K: int, alpha: float = 0.5) -> Array:
    anchor = x
    for _ in range(K):
        x = alpha * g(x) + (1 - alpha) * anchor
    return x


def heavy_ball(g: Map, x: Array, K: int, alpha: float = 0.5, beta: float = 0.3) -> Array:
    before = x
    for _ in range(K):
        x, before = x + alpha * (g(x) - x) + beta * (x - before), x
    return x


def midpoint(g: Map, x: Array, K: int, step: float | None = None) -> Array:
    h = step or 2 / K
    for _ in range(K // 2):
        middle = x + h / 2 * (g(x) - x)
        x = x + h * (g(middle) - middle)
    return x


def heun(g: Map, x: Array, K: int, step: float | None = None) -> Array:
    h = step or 2 / K
    for _ in range(K // 2):
        k1 = g(x) - x
        end = x + h * k1
        k2 = g(end) - end
        x = x + h * (k1 + k2) / 2
    return x


def rk4(g: Map, x: Array, K: int, step: float | None = None) -> Array:
    def f(x: Array) -> Array:
        return g(x) - x

    h = step or 4 / K
    for _ in range(K // 4):
        k1 = f(x)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + h / 2 * k2)
        k4 = f(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def poly(g: Map, x: Array, K: int, weights: Sequence[float]) -> Array:
    out = weights[0] * x
    for w in weights[1:]:
        x = g(x)
        out = out + w * x
    return out


def uniform(g: Map, x: Array, K: int) -> Array:
    outputs: list[Array] = []
    for _ in range(K):
        outputs.append(g(x))
        x = np.mean(outputs, axis=0)
    return x


def moving_average(g: Map, x: Array, K: int, lambda_: float = 0.5) -> Array:
    x = first = g(x)  # the average of G(x_0) with itself
    for _ in range(K - 1):
        x = lambda_ * first + (1 - lambda_) * g(x)
    return x


def auto_align(g: Map, x: Array, K: int) -> Array:
    outputs: list[Array] = []
    for _ in range(K):
        outputs.append(g(x))
        first = outputs[0]
        cos = [np.sum(y * first, -1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(first, axis=-1) for y in outputs]
        w = np.maximum(cos, 0)
        x = np.einsum("jt,jtd->td", w / w.sum(axis=0), outputs)
    return x


def running_mean(g: Pass, x: Array, K: int) -> Array:
    outputs: dict[int, list[Array]] = {il: [] for il in g.layers}

    def mean(il: int, y: Array) -> Array:
        outputs[il].append(y)
        return np.mean(outputs[il], axis=0)

    g.passes_on = mean
    return naive(g, x, K)


SOLVERS: dict[str, Callable[..., Array]] = {
    "auto-align": auto_align,
    "running-mean": running_mean,
    "naive": naive,
    "euler": euler,
    "anchored": anchored,
    "residual-scaled": residual_scaled,
    "input-anchor": input_anchor,
    "heavy-ball": heavy_ball,
    "midpoint": midpoint,
    "heun": heun,
    "rk4": rk4,
    "poly": poly,
    "uniform": uniform,
    "moving-average": moving_average,
}

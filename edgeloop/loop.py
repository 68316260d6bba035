"""The loop spec: parse, format, resolve against a model, expanded order, cost.

One string everywhere (command line, Python, HTTP, recipes, GGUF metadata):

    12-20x3                          layers 12..20, three passes, euler with step 1/3
    15-18x6:anchored,beta=0.5        a solver and its numbers
    8-10x2+20-23x3:step=0.5          several spans, ascending
    40%-55%x3                        fractions of the depth
    45-51x2:naive,kv=own             plain repetition, every pass with its own keys and values
    auto | off

A spec may come from the network, so everything is bounded before it is used. Knows nothing of the engine.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal

from edgeloop.errors import LoopError
from edgeloop.solvers import SOLVERS, Mix, mix

MAX_SPEC_CHARS = 2000  # a 64-pass poly with every digit of its weights fits
MAX_PASSES = 64
MAX_VISITS = 512  # layers applied to one token, repeated ones counted each time
MAX_WEIGHT = 10.0

DEFAULT_SOLVER = "euler"
# keys with a fixed set of values, the default first; every one is a field of Loop
CHOICES = {
    "unit": ("block", "layer"),
    "kv": ("frozen", "own", "first", "last"),
    "scope": ("all", "prompt", "gen"),
    "routing": ("free", "frozen"),
    "norm": ("none", "hold", "interp"),
}

_KEYS = {
    *CHOICES,
    "weights",
    *(name for solver in SOLVERS.values() for name in solver.parameters),
}
_SPAN = re.compile(r"(\d{1,4}(?:\.\d{1,4})?)(%?)-(\d{1,4}(?:\.\d{1,4})?)(%?)x(\d{1,4})")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)  # MAX_SPEC_CHARS bounds it


@dataclass(frozen=True)
class Span:
    """Layers first..last, both inclusive, or fractions of the depth in percent; and how often they are applied."""

    first: int | Decimal
    last: int | Decimal
    passes: int
    is_fraction: bool = field(init=False, repr=False)  # a field, because 40% and layer 40 must not be equal

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_fraction", isinstance(self.first, Decimal))

    @property
    def width(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        if self.is_fraction:
            return f"{self.first:f}%-{self.last:f}%x{self.passes}"
        return f"{self.first}-{self.last}x{self.passes}"


@dataclass(frozen=True)
class Loop:
    """One or more spans with a solver, a unit and a K/V mode. No spans: off. Compare and hash by value.

    `str(loop)` is the canonical spec and parses back to an equal loop.
    """

    spans: tuple[Span, ...] = ()
    solver: str = DEFAULT_SOLVER
    parameters: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    unit: str = "block"
    kv: str = "frozen"
    scope: str = "all"
    routing: str = "free"
    norm: str = "none"
    is_auto: bool = field(default=False)

    @classmethod
    def parse(cls, spec: str | Loop | None) -> Loop:
        """A loop from its spec; None is off. Raises LoopError that names the offending part."""
        if isinstance(spec, Loop):
            return spec
        return _parse(spec if spec is not None else "off")

    @property
    def is_off(self) -> bool:
        return not self.spans and not self.is_auto

    def __bool__(self) -> bool:
        return not self.is_off

    def __str__(self) -> str:
        if self.is_auto:
            return "auto"
        if self.is_off:
            return "off"
        options = [] if self.solver == DEFAULT_SOLVER else [self.solver]
        options += [f"{name}={_format_value(value)}" for name, value in self.parameters]
        options += [
            f"{key}={getattr(self, key)}" for key, (default, *_) in CHOICES.items() if getattr(self, key) != default
        ]
        return "+".join(map(str, self.spans)) + (":" + ",".join(options) if options else "")

    def resolve(self, n_layer: int) -> Loop:
        """The same loop in layers of a model that has `n_layer` of them.

        Raises LoopError when a span lies outside, spans overlap, or more than 512 layers would be applied to a token.
        """
        if self.is_auto:
            raise LoopError("auto has to be looked up first, with edgeloop.recipes.choose")
        spans = tuple(_resolve_span(span, n_layer) for span in self.spans)
        _check_order(spans)
        visits = n_layer + sum((s.passes - 1) * s.width for s in spans)
        if spans and visits > MAX_VISITS:
            raise LoopError(
                f"'{self}' applies {visits} layers to every token, the limit is {MAX_VISITS}; use fewer passes or a shorter span"
            )
        return replace(self, spans=spans)

    @property
    def rule(self) -> str:
        """How the engine puts states together: "mix", or the solver that needs arithmetic beyond the matrix."""
        return SOLVERS[self.solver].rule

    def mixes(self) -> list[Mix]:
        """The mix of every span: lower-triangular rows, see solvers.py."""
        return [mix(self.solver, span.passes, dict(self.parameters)) for span in self.spans]

    def expanded(self, n_layer: int) -> list[int]:
        """The layers in the order in which they are applied, repeated ones each time."""
        order: list[int] = []
        at = 0
        for span in self.resolve(n_layer).spans:
            order += range(at, span.first)
            layers = range(span.first, span.last + 1)
            if self.unit == "layer":
                order += [il for il in layers for _ in range(span.passes)]
            else:
                order += list(layers) * span.passes
            at = span.last + 1
        return order + list(range(at, n_layer))

    def cost(self, n_layer: int) -> float:
        """Layers applied with the loop / without it: 1 + sum of (passes - 1) * width / n_layer."""
        return len(self.expanded(n_layer)) / n_layer


OFF = Loop()
AUTO = Loop(is_auto=True)


def _parse(spec: str) -> Loop:
    if not isinstance(spec, str):
        raise LoopError(f"a loop is a string such as '12-20x3', got {type(spec).__name__}")
    if len(spec) > MAX_SPEC_CHARS:
        raise LoopError(f"the loop spec has {len(spec)} characters, the limit is {MAX_SPEC_CHARS}")
    text = spec.strip()
    wrong = next((char for char in text if not (char.isascii() and char.isprintable())), None)
    if wrong is not None:
        raise LoopError(f"{ascii(wrong)} cannot be in a loop spec; it is plain ASCII, for example 12-20x3")
    if text == "off":
        return OFF
    if text == "auto":
        return AUTO
    if not text:
        raise LoopError("the loop spec is empty; write a span such as '12-20x3', or 'off'")
    span_text, colon, option_text = text.partition(":")
    spans = tuple(_parse_span(part) for part in span_text.split("+"))
    if len({s.is_fraction for s in spans}) > 1:
        raise LoopError(f"'{span_text}' mixes layers and percentages; write all spans the same way")
    _check_order(spans)
    if colon and not option_text:
        raise LoopError(f"'{text}' ends with ':'; name a solver or a key after it, or leave it out")
    loop = _parse_options(spans, option_text.split(",") if colon else [])
    _check_passes(loop)
    if len(str(loop)) > MAX_SPEC_CHARS:
        raise LoopError(
            f"the loop spec has {len(str(loop))} characters with every number written out, the limit is {MAX_SPEC_CHARS}"
        )
    return loop


def _parse_span(part: str) -> Span:
    match = _SPAN.fullmatch(part)
    if not match:
        raise LoopError(f"'{part}' is not a span; write FIRST-LASTxPASSES, for example 12-20x3 or 40%-55%x3")
    first, percent_first, last, percent_last, passes = match.groups()
    if percent_first != percent_last:
        raise LoopError(f"'{part}' mixes a layer and a percentage; write both ends the same way")
    if percent_first:
        lo, hi = Decimal(first).normalize(), Decimal(last).normalize()
        if hi > 100:
            raise LoopError(f"'{part}' ends at {last}%, the depth ends at 100%")
        if lo >= hi:
            raise LoopError(f"'{part}' must end after it starts")
    else:
        if "." in first or "." in last:
            raise LoopError(f"'{part}': layers are whole numbers; fractions of the depth need a %")
        lo, hi = int(first), int(last)
        if lo > hi:
            raise LoopError(f"'{part}' starts after its end; both ends belong to the span, and layers count from 0")
    count = int(passes)
    if not 1 <= count <= MAX_PASSES:
        raise LoopError(f"'{part}' asks for {count} passes, 1 to {MAX_PASSES} are possible")
    return Span(lo, hi, count)


def _check_order(spans: tuple[Span, ...]) -> None:
    for before, span in zip(spans, spans[1:]):
        overlap = span.first < before.last if span.is_fraction else span.first <= before.last
        if overlap:
            raise LoopError(f"spans '{before}' and '{span}' overlap or are not in ascending order")


def _parse_options(spans: tuple[Span, ...], options: list[str]) -> Loop:
    solver = DEFAULT_SOLVER
    values: dict[str, str] = {}
    for position, option in enumerate(options):
        key, equals, value = option.partition("=")
        if not equals:
            if key in _KEYS:
                raise LoopError(f"'{key}' needs a value, {key}=...")
            if key not in SOLVERS:
                raise LoopError(f"'{key}' is not a solver; there are {', '.join(SOLVERS)}")
            if position:
                raise LoopError(f"the solver '{key}' must come first after ':'")
            solver = key
        elif key in values:
            raise LoopError(f"'{key}' is given twice")
        else:
            values[key] = value

    choices = {key: _choice(key, values.pop(key, allowed[0]), allowed) for key, allowed in CHOICES.items()}
    if choices["scope"] != "all" and choices["kv"] == "last":
        raise LoopError(
            f"scope={choices['scope']} does not go with kv=last, which keeps K/V that tokens outside the scope do not have"
        )

    chosen = SOLVERS[solver]
    parameters: list[tuple[str, float | tuple[float, ...]]] = []
    for name, parameter in chosen.parameters.items():
        if name in values:
            number = _number(name, values.pop(name))
            in_range = parameter.low <= number <= parameter.high and not (
                parameter.low_open and number == parameter.low
            )
            if not in_range:
                bracket = "(" if parameter.low_open else "["
                raise LoopError(
                    f"{name}={_format_value(number)} is out of range; {solver} takes {bracket}{parameter.low:g}, {parameter.high:g}]"
                )
            if number != parameter.default:
                parameters.append((name, number))
    if chosen.takes_weights:
        parameters.append(("weights", _weights(values.pop("weights", None), spans)))
    if values:
        allowed = [*chosen.parameters, *["weights"] * chosen.takes_weights, *CHOICES]
        raise LoopError(f"'{next(iter(values))}' is not a key of {solver}; it takes {', '.join(allowed)}")
    return Loop(spans, solver, tuple(parameters), **choices)


def _check_passes(loop: Loop) -> None:
    multiple = SOLVERS[loop.solver].multiple
    for span in loop.spans:
        if span.passes % multiple:
            raise LoopError(
                f"'{span}': {loop.solver} makes {multiple} passes a step, so their number must be a multiple of {multiple}"
            )
    if loop.parameters and all(span.passes == 1 for span in loop.spans):
        names = ", ".join(name for name, _ in loop.parameters)
        raise LoopError(f"{names} has no effect with one pass, which is the plain model; use x2 or more")


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise LoopError(f"{key}={value} is not known; {key} is one of {', '.join(allowed)}")
    return value


def _number(name: str, text: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(number):
        raise LoopError(f"{name}={text} is not a number")
    return number + 0.0  # -0 is 0, so that equal loops have one spelling


def _weights(text: str | None, spans: tuple[Span, ...]) -> tuple[float, ...]:
    if text is None:
        raise LoopError("poly needs weights=W0/W1/.../Wk, one for every power of the span from 0 to its passes, sum 1")
    weights = tuple(_number("weights", part) for part in text.split("/"))
    for span in spans:
        if len(weights) != span.passes + 1:
            raise LoopError(
                f"'{span}' needs {span.passes + 1} weights (powers 0 to {span.passes}), {len(weights)} are given"
            )
    if any(abs(w) > MAX_WEIGHT for w in weights):
        raise LoopError(f"weights={text}: each must lie in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise LoopError(f"weights={text} sum to {sum(weights):.12g}, they must sum to 1")
    return weights


def _resolve_span(span: Span, n_layer: int) -> Span:
    if span.is_fraction:
        # the layers whose stretch of the depth, [il/n, (il+1)/n), meets the fraction
        first = int(span.first * n_layer / 100)
        last = max(first, math.ceil(span.last * n_layer / 100) - 1)
        return Span(first, last, span.passes)
    if span.last >= n_layer:
        raise LoopError(f"'{span}' ends after the model's last layer; it has {n_layer} layers, 0 to {n_layer - 1}")
    return span


def _format_value(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_format_value, value))
    return repr(value).removesuffix(".0")

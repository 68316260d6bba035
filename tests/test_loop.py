"""Loop specs: what parses, what is refused and with which words, what a spec means for a model. No model is loaded."""

import itertools
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeloop.errors import LoopError
from edgeloop.loop import AUTO, CHOICES, MAX_PASSES, MAX_SPEC_CHARS, MAX_VISITS, OFF, Loop, Span
from edgeloop.solvers import SOLVERS

# a parse takes far below a millisecond; the deadline only has to tell it from one that hangs
fuzz = settings(deadline=500, max_examples=300)

ROOM_FOR_WEIGHTS = 24  # passes of poly whose weights fit into a spec with every digit written


# ---- specs that are valid, with the loop they must give ----


@st.composite
def _layers(draw, n):
    spans, at = [], 0
    for _ in range(n):
        first = at + draw(st.integers(0, 40))
        last = first + draw(st.integers(0, 40))
        spans.append((str(first), str(last), first, last))
        at = last + 1
    return spans


@st.composite
def _fractions(draw, n):
    ticks = sorted(draw(st.sets(st.integers(0, 1_000_000), min_size=2 * n, max_size=2 * n)))
    points = [Decimal(t) / 10_000 for t in ticks]
    return [(f"{lo}%", f"{hi}%", lo, hi) for lo, hi in zip(points[::2], points[1::2])]


@st.composite
def _weights(draw, passes):
    bound = 9 / passes  # the last one makes the sum 1 and must itself stay within 10
    some = draw(st.lists(st.floats(-bound, bound), min_size=passes, max_size=passes))
    return tuple([*some, 1.0 - sum(some)])


@st.composite
def specs(draw):
    """(text, Loop): any valid spec, in any of its spellings."""
    solver = SOLVERS[draw(st.sampled_from(list(SOLVERS)))]
    ends = draw(st.integers(1, 4).flatmap(draw(st.sampled_from([_layers, _fractions]))))

    options, parameters = [], []
    for name, p in solver.parameters.items():
        if draw(st.booleans()):
            value = draw(st.floats(p.low, p.high, exclude_min=p.low_open))
            options.append(f"{name}={draw(st.sampled_from(['', '+']))}{value!r}")
            if value != p.default:
                parameters.append((name, value))

    most = ROOM_FOR_WEIGHTS if solver.takes_weights else MAX_PASSES
    counts = st.integers(1, most // solver.multiple).map(lambda steps: steps * solver.multiple)
    passes = [draw(counts) for _ in ends]
    if solver.takes_weights:
        passes = [max(2, passes[0])] * len(ends)
        weights = draw(_weights(passes[0]))
        options.append("weights=" + "/".join(map(repr, weights)))
        parameters.append(("weights", weights))
    elif parameters:
        passes[0] = max(2, passes[0])  # with one pass a number would have no effect, which is refused

    choices = {key: draw(st.sampled_from(allowed)) for key, allowed in CHOICES.items()}
    if choices["kv"] == "last":
        choices["scope"] = "all"
    for key, value in choices.items():
        options += [f"{key}={value}"] * (value != CHOICES[key][0] or draw(st.booleans()))
    options = draw(st.permutations(options))
    options = [solver.name] * (solver.name != "euler" or draw(st.booleans())) + options

    text = "+".join(f"{first}-{last}x{n}" for (first, last, _, _), n in zip(ends, passes))
    text = draw(st.sampled_from(["", " ", "\t"])) + text + (":" + ",".join(options) if options else "")
    spans = tuple(Span(first, last, n) for (_, _, first, last), n in zip(ends, passes))
    return text, Loop(spans, solver.name, tuple(parameters), **choices)


@fuzz
@given(specs())
def test_a_spec_gives_its_loop_and_the_loop_its_canonical_spec(case):
    text, expected = case
    loop = Loop.parse(text)
    assert loop == expected
    assert hash(loop) == hash(expected)
    again = Loop.parse(str(loop))
    assert again == loop and hash(again) == hash(loop)
    assert str(again) == str(loop)
    assert Loop.parse(loop) is loop
    assert loop and not loop.is_off


@pytest.mark.parametrize(
    "spec, canonical",
    [
        (None, "off"),
        (" off\n", "off"),
        ("auto", "auto"),
        ("012-0020x03", "12-20x3"),
        ("12-12x1", "12-12x1"),
        ("12-20x3:euler", "12-20x3"),
        ("12-20x3:euler,unit=block,kv=frozen", "12-20x3"),
        ("12-20x3:kv=own,unit=layer", "12-20x3:unit=layer,kv=own"),
        ("12-20x3:kv=last,step=.5", "12-20x3:step=0.5,kv=last"),
        ("12-20x3:step=2e0", "12-20x3:step=2"),
        ("12-20x3:step=1E-05", "12-20x3:step=1e-05"),
        ("15-18x6:anchored,beta=0.50", "15-18x6:anchored"),
        ("15-18x6:anchored,beta=1.", "15-18x6:anchored,beta=1"),
        ("8-9x2:heavy-ball,beta=.25,alpha=1", "8-9x2:heavy-ball,alpha=1,beta=0.25"),
        ("8-9x2:poly,weights=0.25/+0.25/5e-1", "8-9x2:poly,weights=0.25/0.25/0.5"),
        ("8-9x2:moving-average,lambda=0", "8-9x2:moving-average,lambda=0"),
        ("40.0%-55.50%x3", "40%-55.5%x3"),
        ("0%-100%x2", "0%-100%x2"),
        ("0%-50%x2+50%-100%x3", "0%-50%x2+50%-100%x3"),
        ("8-10x2+11-11x64+20-23x3:naive", "8-10x2+11-11x64+20-23x3:naive"),
        ("45-51x2:naive,kv=own", "45-51x2:naive,kv=own"),
    ],
)
def test_canonical(spec, canonical):
    assert str(Loop.parse(spec)) == canonical
    assert str(Loop.parse(canonical)) == canonical


def test_off_and_auto():
    assert Loop.parse(None) == Loop.parse("off") == OFF and OFF.is_off and not OFF
    assert Loop.parse("auto") == AUTO and AUTO and not AUTO.is_off
    assert OFF != AUTO


@pytest.mark.parametrize("step", [1 / 27, 1.2345678901234567e-2, 1.2345678901234567e-4, 1e-116, 5e-324])
def test_every_float_that_python_prints_is_a_number(step):
    assert Loop.parse(f"1-2x3:step={step!r}").parameters == (("step", step),)


@pytest.mark.parametrize("number", ["1.2345678901234567e-2", ".00000000000000001e-99"])
def test_a_number_in_another_spelling_comes_back(number):
    loop = Loop.parse(f"1-2x3:step={number}")
    assert Loop.parse(str(loop)) == loop


def test_a_canonical_spec_is_never_too_long_to_parse():
    spec = "0-1x64:poly,weights=" + "/".join([".0153846153846"] * 64 + [".0153846153856"])
    assert len(spec) <= MAX_SPEC_CHARS
    try:
        loop = Loop.parse(spec)
    except LoopError:
        return  # refused as too long is fine, too
    assert Loop.parse(str(loop)) == loop


@pytest.mark.parametrize(
    "spec, other",
    [("1-2x3:anchored,beta=0", "1-2x3:anchored,beta=-0"), ("1-2x2:poly,weights=0/0/1", "1-2x2:poly,weights=-0/0/1")],
)
def test_equal_loops_have_one_spelling(spec, other):
    assert Loop.parse(spec) == Loop.parse(other)
    assert str(Loop.parse(spec)) == str(Loop.parse(other))


def test_loops_that_mean_different_things_differ():
    different = [
        "off", "auto", "40-50x2", "40%-50%x2", "40-50x3", "40-51x2", "39-50x2", "40-50x2:naive", "40-50x2:step=0.25",
        "40-50x2:kv=own", "40-50x2:unit=layer", "40-44x2+45-50x2",
    ]  # fmt: skip
    assert len({Loop.parse(spec) for spec in different}) == len(different)


# ---- text that is not valid ----

JUNK = [
    "", "", "-", "x", "%", "+", ":", ",", "=", "/", ".", "0", "9", "e9", "inf", "nan", "_", " ", "\n", "\x1b[2J",
    "\x00", "\u0663", "\uff11", "\ud800", "naive", "poly", "step=1", "kv=own", "off", "99999999999999999999",
]  # fmt: skip


@st.composite
def mutated(draw):
    text, _ = draw(specs())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.sampled_from([0, 0, 1, 1, 5]))
        text = text[:at] + draw(st.sampled_from([*JUNK, text[at : at + 5]])) + text[at + cut :]
    return text


@fuzz
@given(st.text() | st.text("0123456789-x%+:,=./e \u0663", max_size=40) | mutated())
def test_any_text_is_a_loop_or_a_loop_error(text):
    try:
        loop = Loop.parse(text)
    except LoopError as error:
        assert str(error).isprintable()  # one line, and nothing that a terminal or a log would obey
        return
    assert text.strip().isascii()
    assert Loop.parse(str(loop)) == loop
    assert len(loop.mixes()) == len(loop.spans)


BAD = [
    # the shape of a span
    ("", "empty"),
    (" \t", "empty"),
    ("12", "'12'"),
    ("12-20", "'12-20'"),
    ("x3", "'x3'"),
    ("12-x3", "'12-x3'"),
    ("-20x3", "'-20x3'"),
    ("-1-20x3", "'-1-20x3'"),
    ("12--20x3", "'12--20x3'"),
    ("12-20x", "'12-20x'"),
    ("12-20X3", "'12-20X3'"),
    ("12-20x-3", "'12-20x-3'"),
    ("12-20x3.5", "'12-20x3.5'"),
    ("12-20x3x4", "'12-20x3x4'"),
    ("12 - 20x3", "'12 - 20x3'"),
    ("0x1-0x2x3", "'0x1-0x2x3'"),
    ("1e1-20x3", "'1e1-20x3'"),
    ("1_0-20x3", "'1_0-20x3'"),
    ("12-20x3;naive", "'12-20x3;naive'"),
    ("OFF", "'OFF'"),
    ("off:naive", "'off'"),
    ("auto+12-20x3", "'auto'"),
    # its numbers
    ("12-20x0", "'12-20x0' asks for 0 passes"),
    ("12-20x65", "'12-20x65' asks for 65 passes, 1 to 64"),
    ("12-20x" + "9" * 30, "x" + "9" * 30),
    ("9" * 30 + "-20x3", "9" * 30),
    ("20-12x3", "'20-12x3' starts after its end"),
    ("1.5-20x3", "'1.5-20x3'"),
    ("40%-55x3", "'40%-55x3' mixes"),
    ("40-55%x3", "'40-55%x3' mixes"),
    ("55%-40%x3", "'55%-40%x3'"),
    ("40%-40%x3", "'40%-40%x3'"),
    ("40%-100.1%x3", "100.1%"),
    ("40%-1e2%x3", "'40%-1e2%x3'"),
    ("40.%-55%x3", "'40.%-55%x3'"),
    # several of them
    ("12-20x3+", "''"),
    ("+12-20x3", "''"),
    ("8-10x2++12-20x3", "''"),
    ("8-10x2+10-12x2", "'8-10x2' and '10-12x2'"),
    ("8-10x2+8-10x2", "'8-10x2' and '8-10x2'"),
    ("20-23x2+8-10x2", "'20-23x2' and '8-10x2'"),
    ("40%-50%x2+49.9%-60%x2", "'40%-50%x2' and '49.9%-60%x2'"),
    ("60%-70%x2+40%-50%x2", "'60%-70%x2' and '40%-50%x2'"),
    ("8-10x2+40%-50%x2", "'8-10x2+40%-50%x2' mixes"),
    # solvers and keys
    ("12-20x3:", "ends with ':'"),
    ("12-20x3::", "':'"),
    ("12-20x3:,naive", "''"),
    ("12-20x3:naive,", "''"),
    ("12-20x3:step=1,", "''"),
    ("12-20x3:rk5", "'rk5' is not a solver"),
    ("12-20x3:Naive", "'Naive' is not a solver"),
    ("12-20x3: naive", "' naive' is not a solver"),
    ("12-20x3:naive:euler", "'naive:euler'"),
    ("12-20x3:naive,euler", "'euler' must come first"),
    ("12-20x3:kv=own,naive", "'naive' must come first"),
    ("12-20x3:scope=some", "scope=some is not known; scope is one of all, prompt, gen"),
    ("12-20x3:scope=gen,kv=last", "scope=gen does not go with kv=last"),
    ("12-20x3:routing=cold", "routing=cold is not known; routing is one of free, frozen"),
    ("12-20x3:stepp=1", "'stepp' is not a key of euler"),
    ("12-20x3:naive,step=1", "'step' is not a key of naive"),
    ("12-20x3:beta=1", "'beta' is not a key of euler"),
    ("12-20x3:weights=1/0/0/0", "'weights' is not a key of euler"),
    ("12-20x3:=1", "''"),
    ("12-20x3:step=1,step=1", "'step' is given twice"),
    ("12-20x3:kv=own,kv=frozen", "'kv' is given twice"),
    ("12-20x3:kv=mine", "kv=mine"),
    ("12-20x3:kv=", "kv="),
    ("12-20x3:kv=own=own", "kv=own=own"),
    ("12-20x3:unit=head", "unit=head"),
    # numbers of a solver
    ("12-20x3:step=", "step= "),
    ("12-20x3:step=one", "step=one"),
    ("12-20x3:step=nan", "step=nan"),
    ("12-20x3:step=inf", "step=inf"),
    ("12-20x3:step=-Infinity", "step=-Infinity"),
    ("12-20x3:step=1_0", "step=1_0"),
    ("12-20x3:step=0x1", "step=0x1"),
    ("12-20x3:step=1/3", "step=1/3"),
    ("12-20x3:step= 1", "step= 1"),
    ("12-20x3:step=1e999", "step=1e999"),
    ("12-20x3:step=1e99", "step=1e"),
    ("12-20x3:step=" + "9" * 400, "step=" + "9" * 6),
    ("12-20x3:step=0", "step=0 is out of range"),
    ("12-20x3:step=-1", "step=-1 is out of range"),
    ("12-20x3:step=2.5", "step=2.5 is out of range; euler takes (0, 2]"),
    ("12-20x3:step=2.0000001", "step=2.0000001"),
    ("12-20x3:anchored,beta=1.01", "beta=1.01 is out of range; anchored takes [0, 1]"),
    ("12-20x3:input-anchor,alpha=0", "alpha=0"),
    ("12-20x3:heavy-ball,beta=-.1", "beta=-0.1"),
    ("12-20x3:moving-average,lambda=1.1", "lambda=1.1"),
    ("12-20x3:moving-average,lambda_=1", "'lambda_' is not a key"),
    # the number of passes
    ("12-20x3:midpoint", "'12-20x3': midpoint"),
    ("12-20x1:heun", "'12-20x1': heun"),
    ("12-20x6:rk4", "a multiple of 4"),
    ("8-10x4+12-20x2:rk4", "'12-20x2': rk4"),
    ("12-20x1:step=0.5", "step has no effect"),
    ("12-20x1:anchored,beta=1", "beta has no effect"),
    ("8-10x1+12-20x1:step=0.5", "step has no effect"),
    # weights
    ("12-20x2:poly", "poly needs weights="),
    ("12-20x2:poly,weights=", "weights="),
    ("12-20x2:poly,weights=1/0/", "weights="),
    ("12-20x2:poly,weights=1/0/a", "weights=a"),
    ("12-20x2:poly,weights=1/0/nan", "weights=nan"),
    ("12-20x2:poly,weights=0.5/0.5", "needs 3 weights (powers 0 to 2), 2 are given"),
    ("12-20x2:poly,weights=0/0/0/1", "needs 3 weights (powers 0 to 2), 4 are given"),
    ("8-10x2+12-20x3:poly,weights=0/0/1", "'12-20x3' needs 4 weights"),
    ("12-20x2:poly,weights=0/0/0.9", "sum to 0.9"),
    ("12-20x2:poly,weights=0.5/0.5/0.000002", "sum to 1.000002"),
    ("12-20x2:poly,weights=11/-10/0", "weights=11/-10/0"),
    ("12-20x2:poly,step=1,weights=0/0/1", "'step' is not a key of poly"),
    # the length
    ("12-20x3" + " " * MAX_SPEC_CHARS, f"{MAX_SPEC_CHARS + 7} characters"),
    ("+".join(f"{i}-{i}x2" for i in range(1000, 1200)), f"characters, the limit is {MAX_SPEC_CHARS}"),
    ("1" * 10_000_000, "10000000 characters"),
]


@pytest.mark.parametrize("spec, part", BAD, ids=[spec[:32] for spec, _ in BAD])
def test_a_bad_spec_is_refused_by_name(spec, part):
    with pytest.raises(LoopError) as caught:
        Loop.parse(spec)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "\u0661\u0662-\u0662\u0660x\u0663",  # Arabic-Indic
        "\uff11\uff12-20x3",  # full width
        "12-20x\u0969",  # Devanagari
        "\u0664\u0660%-55%x3",
        "12-20x3:step=\u0660.\u0665",
        "12-20x3:step=1e-\u0661",
        "12-20x2:poly,weights=0/0/\u0661",
        "12\u201320x3",  # en dash
        "12-20\u00d73",  # multiplication sign
        "12-20x\u00b2",  # superscript
    ],
)
def test_only_ascii_is_a_spec(spec):
    with pytest.raises(LoopError):
        Loop.parse(spec)


@pytest.mark.parametrize(
    "spec", ["12\n-20x3", "12-20x3:\x1b[2J", "12-20x3:kv=\r\n0", "12-20x3:step=\ud800", "12-20x3:a\x00=1"]
)
def test_an_error_is_one_printable_line(spec):
    with pytest.raises(LoopError) as caught:
        Loop.parse(spec)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("spec", [12, 1.5, True, b"12-20x3", ["12-20x3"], ("12-20x3",), {}, Span(12, 20, 3), object()])
def test_only_a_string_is_a_spec(spec):
    with pytest.raises(LoopError, match=type(spec).__name__):
        Loop.parse(spec)


# ---- what a spec means for a model ----


@pytest.mark.parametrize(
    "spec, n_layer, part",
    [
        ("12-20x3", 20, "'12-20x3' ends after the model's last layer; it has 20 layers, 0 to 19"),
        ("0-0x2+9999-9999x2", 9999, "'9999-9999x2'"),
        ("0-9x64", 10, "applies 640 layers to every token, the limit is 512"),
        ("0-7x64+8-8x1", 9, "applies 513 layers"),
        ("0-9x33+20-29x21", 30, "applies 550 layers"),
        ("0%-100%x33", 16, "applies 528 layers"),
        ("40%-45%x2+45%-50%x2", 28, "'11-12x2' and '12-13x2' overlap"),  # both fractions meet layer 12
        ("auto", 30, "auto"),
    ],
)
def test_a_loop_that_does_not_fit_is_refused_by_name(spec, n_layer, part):
    loop = Loop.parse(spec)
    for use in (loop.resolve, loop.expanded, loop.cost):
        with pytest.raises(LoopError) as caught:
            use(n_layer)
        assert part in str(caught.value)


@pytest.mark.parametrize("spec, n_layer", [("0-7x64", 8), ("0-15x32", 16), ("0-9x25+20-29x25", 32)])
def test_the_most_layers_that_are_allowed(spec, n_layer):
    assert len(Loop.parse(spec).expanded(n_layer)) == MAX_VISITS


def test_a_plain_model_may_have_any_number_of_layers():
    assert OFF.expanded(600) == list(range(600))


@pytest.mark.parametrize(
    "spec, n_layer, resolved",
    [
        ("40%-55%x3", 24, "9-13x3"),  # 9.6 .. 13.2
        ("40%-55%x3", 28, "11-15x3"),  # 11.2 .. 15.4
        ("40%-55%x3", 36, "14-19x3"),  # 14.4 .. 19.8
        ("25%-50%x2", 24, "6-11x2"),  # ends where a layer ends
        ("25%-50%x2+50%-75%x3:naive", 28, "7-13x2+14-20x3:naive"),
        ("0%-100%x2:kv=own", 36, "0-35x2:kv=own"),
        ("0%-0.0001%x2", 28, "0-0x2"),
        ("99.9999%-100%x2", 28, "27-27x2"),
        ("50%-50.1%x2", 1, "0-0x2"),
        ("12-20x3:unit=layer", 21, "12-20x3:unit=layer"),
        ("off", 24, "off"),
    ],
)
def test_resolve(spec, n_layer, resolved):
    loop = Loop.parse(spec).resolve(n_layer)
    assert str(loop) == resolved
    assert loop == Loop.parse(resolved)
    assert loop.resolve(n_layer) == loop


@fuzz
@given(st.sampled_from([24, 28, 36]), _fractions(1))
def test_a_fraction_is_the_layers_that_it_meets(n_layer, ends):
    [(first, last, lo, hi)] = ends
    (span,) = Loop.parse(f"{first}-{last}x2").resolve(n_layer).spans
    lo, hi = Fraction(lo) / 100, Fraction(hi) / 100
    met = [il for il in range(n_layer) if Fraction(il, n_layer) < hi and Fraction(il + 1, n_layer) > lo]
    assert list(range(span.first, span.last + 1)) == met


@pytest.mark.parametrize(
    "spec, order",
    [
        ("off", "0123456"),
        ("2-4x1", "0123456"),
        ("2-4x2", "0123423456"),
        ("2-4x3:unit=layer", "0122233344456"),
        ("2-4x2:naive,kv=own,unit=layer", "0122334456"),
        ("0-1x2+2-2x3+5-6x2", "0101222345656"),
        ("0-1x2+5-6x3:unit=layer", "0011234555666"),
        ("0-6x2", "01234560123456"),
        ("50%-60%x3", "01234343456"),  # 3.5 .. 4.2
    ],
)
def test_expanded_order_and_cost(spec, order):
    loop = Loop.parse(spec)
    assert loop.expanded(7) == [int(il) for il in order]
    assert loop.cost(7) == pytest.approx(len(order) / 7)


@fuzz
@given(specs(), st.integers(1, 400))
def test_expanded_is_every_layer_as_often_as_its_span_says(case, n_layer):
    loop = case[1]
    try:
        resolved = loop.resolve(n_layer)
    except LoopError:
        return
    times = [next((s.passes for s in resolved.spans if s.first <= il <= s.last), 1) for il in range(n_layer)]
    order = loop.expanded(n_layer)
    assert [order.count(il) for il in range(n_layer)] == times
    assert loop.cost(n_layer) == pytest.approx(sum(times) / n_layer)
    if loop.unit == "layer":
        assert order == sorted(order)
    else:  # a step back leads from the end of a span to its start
        back = {(a, b) for a, b in itertools.pairwise(order) if b != a + 1}
        assert back <= {(s.last, s.first) for s in resolved.spans}

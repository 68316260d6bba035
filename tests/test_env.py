"""LLAMA_LOOP for programs that know nothing of edgeloop, and room made in advance."""

import llama_cpp
import numpy as np
import pytest

from edgeloop import Loop, log, native
from edgeloop.cli import main
from edgeloop.llama import native_arguments

TOKENS = [5 + 7 * i % 240 for i in range(20)]
OPTIONS = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}


def logits(llm):
    llm.reset()
    llm.eval(TOKENS)
    return llm.scores[: len(TOKENS)].copy()


def arguments(spec, n_layer=6):
    return native_arguments(Loop.parse(spec).resolve(n_layer))


@pytest.mark.parametrize(
    "spec",
    [
        "2-3x3",
        "0-0x2:naive,kv=own",
        "1-2x4:rk4,unit=layer",
        "0-1x2+4-5x3:heavy-ball,kv=first",
        "2-3x2:naive,scope=gen",
        "3-4x64",
        "2-3x3:running-mean",
        "1-2x3:auto-align,kv=own",
        "1-2x3:norm=interp",
    ],
)
def test_a_program_that_does_not_know_the_loop_gets_it(tiny_llama, load, monkeypatch, capsys, spec):
    with pytest.raises(SystemExit) as done:
        main(["env", spec, "-m", tiny_llama])
    name, value = capsys.readouterr().out.strip().split("=")
    assert done.value.code == 0 and name == "LLAMA_LOOP"
    expected = logits(load(tiny_llama, loop=spec, **OPTIONS))
    monkeypatch.setenv(name, value)
    stock = llama_cpp.Llama(tiny_llama, **OPTIONS)
    if "scope" in spec:
        native.set_phase(stock.ctx, "prompt")  # what edgeloop.Llama says of several tokens
    assert np.array_equal(logits(stock), expected)
    assert load(tiny_llama, **OPTIONS).loop.is_off
    plain = logits(load(tiny_llama, **OPTIONS))  # the argument counts, not the variable
    assert np.array_equal(plain, expected) == ("scope=gen" in spec)


@pytest.mark.parametrize(
    "value, message",
    [
        ("12-20x3", "a number and ',' were expected at '12-20x3'"),
        ("x", "a number and ',' were expected at 'x'"),
        ("0,0,0,0,0,0", "a number and '/' were expected at '0'"),
        ("0,0,0,0,0,0/", "a number and ',' were expected at ''"),
        ("0,0,0,0,0,0/1,2,2,1,1", "a number and ',' were expected at '1'"),
        ("0,0,0,0,0,0/1,2,2,1,1,1,1", "a number and '/' were expected at '1,1'"),
        ("0,0,0,0,0,0/1,2,2,1,1,1/", "a number and ',' were expected at ''"),
        ("0,0,0,0,0,0/1,2,65," + "1," * 2000, "65 passes, 1 to 64 are possible"),
        ("0,0,0,0,0,0/1,2,-1,1", "-1 passes, 1 to 64 are possible"),
        ("0,0,0,0,0,0/1,99999999999,2,1,1,1", "99999999999 is out of range"),
        ("0,0,0,0,0,0/1,6,2,1,1,1", "span 1..6 is not in the model, which has layers 0..5"),
        ("9,0,0,0,0,0/1,2,2,1,1,1", "unit 9 is unknown"),
        ("0,0,0,0,0,0/1,2,2,1,nan,1", "is not a finite number"),
        ("0,0,0,0,0,0/2,3,2,1,1,1/1,1,2,1,1,1", "starts before the end of the one before it"),
    ],
)
def test_a_wrong_value_is_an_error_and_never_an_unlooped_model(tiny_llama, monkeypatch, value, message):
    monkeypatch.setenv("LLAMA_LOOP", value)
    with log.collect_errors() as errors, pytest.raises(ValueError):
        llama_cpp.Llama(tiny_llama, **OPTIONS)
    assert any("LLAMA_LOOP: " in line and message in line for line in errors), errors


def test_room_made_in_advance_serves_every_smaller_loop(demo_model, load):
    llm = load(demo_model)
    text = "The capital of France is"
    plain = llm(text, max_tokens=8, temperature=0)["choices"][0]["text"]
    llm.eval(llm.tokenize(text.encode()))
    assert (
        native.reserve(llm.ctx, **arguments("10-17x4:kv=own", 30)) is True
    )  # room was made, and what was evaluated is gone
    llm.reset()
    assert not native.reserve(llm.ctx, **arguments("10-17x4:kv=own", 30))
    for spec in ("12-14x2:kv=own", "10-17x4:kv=own", "10-11x4:naive,kv=own", "12-14x8", "10-17x3:unit=layer,kv=own"):
        assert native.set_loop(llm.ctx, **arguments(spec, 30)) is False, spec
    assert native.set_loop(llm.ctx, **arguments("9-10x2:kv=own", 30)) is True  # beyond it
    native.set_loop(llm.ctx, [])
    llm.reset()
    assert llm(text, max_tokens=8, temperature=0)["choices"][0]["text"] == plain


def test_reserving_a_wrong_loop_changes_nothing(tiny_llama, load):
    llm = load(tiny_llama, loop="1-2x2", n_ctx=64)
    with pytest.raises(native.NativeLoopError, match="is not in the model"):
        native.reserve(llm.ctx, **arguments("40-41x2", 50))
    assert native.lib.llama_get_loop(llm.ctx).contents.spans[0].first == 1

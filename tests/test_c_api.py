"""llama-loop.h, called as a C program would: what is refused and how, and what a context then says about itself.

Everything here goes through ctypes, below edgeloop.loop, because other programs have no Python in front of the library.
"""

import ctypes
import sys
import threading
from contextlib import contextmanager

import edgeloop  # before llama_cpp, which is then the one that edgeloop carries
import llama_cpp
import numpy as np
import pytest
import tiny
from edgeloop import native
from edgeloop.native import lib, llama_loop_params, llama_loop_span

N_LAYER = 16  # 32 passes over all of them are exactly the 512 visits that are allowed
MAX_PASSES = 64
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
INVALID, MEMORY = -1, -3
BLOCK, LAYER = 0, 1
FROZEN, OWN, FIRST, LAST = range(4)

lib.llama_loop_default_params.argtypes = []
lib.llama_loop_default_params.restype = llama_loop_params


def euler(n):
    return np.tril(np.full((n, n), 1 / n, np.float32))


def span(first, last, mix, n_passes=None):
    """A span whose n_passes may be a lie about the mix; no mix is a null pointer."""
    if mix is None:
        return llama_loop_span(first, last, 2 if n_passes is None else n_passes, None)
    mix = np.ascontiguousarray(mix, np.float32)
    data = (ctypes.c_float * mix.size)(*mix.ravel())
    return llama_loop_span(first, last, len(mix) if n_passes is None else n_passes, data)


def params(spans, unit=BLOCK, kv=FROZEN, n_spans=None, routing=0, scope=0, rule=0, norm=0):
    array = None if spans is None else (llama_loop_span * len(spans))(*spans)
    return llama_loop_params(array, len(spans) if n_spans is None else n_spans, unit, kv, routing, scope, rule, norm)


def set_loop(ctx, loop):
    return lib.llama_set_loop(ctx, None if loop is None else ctypes.byref(loop))


def last_error():
    return lib.llama_loop_last_error().decode()


def get_loop(ctx):
    """(spans, unit, kv) in Python's types, spans as (first, last, mix); None when the loop is off."""
    loop = lib.llama_get_loop(ctx)
    if not loop:
        return None
    spans = []
    for s in loop.contents.spans[: loop.contents.n_spans]:
        mix = np.ctypeslib.as_array(s.mix, (s.n_passes, s.n_passes))
        spans.append((s.first, s.last, np.tril(mix).tolist()))
    return spans, loop.contents.unit, loop.contents.kv


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("c_api") / "tiny.gguf"
    tiny.write_llama(path, n_layer=N_LAYER)
    return edgeloop.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1)


@pytest.fixture
def ctx(llm):
    assert set_loop(llm.ctx, None) == 0
    yield llm.ctx
    assert set_loop(llm.ctx, None) == 0


def with_entry(i, j, value, n=3):
    mix = euler(n)
    mix[i, j] = value
    return mix


REFUSED = {
    # the list of spans
    "no spans": (lambda: params([]), "1 to 512 spans, got 0"),
    "null spans": (lambda: params(None, n_spans=0), "has no spans; pass NULL"),
    "null spans, said to be three": (lambda: params(None, n_spans=3), "has no spans; pass NULL"),
    "null spans, said to be INT_MAX": (lambda: params(None, n_spans=INT_MAX), "has no spans; pass NULL"),
    "one span, said to be INT_MAX": (lambda: params([span(1, 2, euler(2))], n_spans=INT_MAX), "got 2147483647"),
    "one span, said to be -1": (lambda: params([span(1, 2, euler(2))], n_spans=-1), "got -1"),
    "one span, said to be INT_MIN": (lambda: params([span(1, 2, euler(2))], n_spans=INT_MIN), "got -2147483648"),
    "513 spans": (lambda: params([span(1, 2, euler(2))] * 513), "got 513"),
    "512 spans": (lambda: params([span(1, 1, euler(1))] * 512), "1..1 starts before the end of the one before it"),
    "the default params": (lambda: lib.llama_loop_default_params(), "has no spans; pass NULL"),
    # enums
    "unit -1": (lambda: params([span(1, 2, euler(2))], unit=-1), "unit -1"),
    "unit 2": (lambda: params([span(1, 2, euler(2))], unit=2), "unit 2"),
    "unit INT_MAX": (lambda: params([span(1, 2, euler(2))], unit=INT_MAX), "unit 2147483647"),
    "kv -1": (lambda: params([span(1, 2, euler(2))], kv=-1), "kv mode -1"),
    "kv 4": (lambda: params([span(1, 2, euler(2))], kv=4), "kv mode 4"),
    "routing 2": (lambda: params([span(1, 2, euler(2))], routing=2), "routing 2"),
    "routing frozen without experts": (lambda: params([span(1, 2, euler(2))], routing=1), "has no experts"),
    "norm 3": (lambda: params([span(1, 2, euler(2))], norm=3), "norm 3"),
    "rule 3": (lambda: params([span(1, 2, euler(2))], rule=3), "rule 3"),
    "scope -1": (lambda: params([span(1, 2, euler(2))], scope=-1), "scope -1"),
    "scope 3": (lambda: params([span(1, 2, euler(2))], scope=3), "scope 3"),
    "scope gen, kv last": (lambda: params([span(1, 2, euler(2))], scope=2, kv=3), "kv=last keeps the last pass's K/V"),
    "kv INT_MIN": (lambda: params([span(1, 2, euler(2))], kv=INT_MIN), "kv mode -2147483648"),
    # where a span lies
    "first -1": (lambda: params([span(-1, 2, euler(2))]), "span -1..2 is not in the model, which has layers 0..15"),
    "first INT_MIN": (lambda: params([span(INT_MIN, 2, euler(2))]), "span -2147483648..2"),
    "last -1": (lambda: params([span(0, -1, euler(2))]), "span 0..-1"),
    "last past the end": (lambda: params([span(3, N_LAYER, euler(2))]), "span 3..16"),
    "last INT_MAX": (lambda: params([span(0, INT_MAX, euler(2))]), "span 0..2147483647"),
    "all of int32": (lambda: params([span(INT_MIN, INT_MAX, euler(2))]), "span -2147483648..2147483647"),
    "backwards": (lambda: params([span(5, 4, euler(2))]), "span 5..4"),
    "a second one past the end": (lambda: params([span(0, 1, euler(2)), span(16, 16, euler(2))]), "span 16..16"),
    "overlapping": (lambda: params([span(1, 4, euler(2)), span(4, 6, euler(2))]), "span 4..6 starts before the end"),
    "twice the same": (lambda: params([span(1, 4, euler(2))] * 2), "span 1..4 starts before the end"),
    "descending": (lambda: params([span(8, 9, euler(2)), span(1, 2, euler(2))]), "span 1..2 starts before the end"),
    # how often: the mix has fewer entries than n_passes says, so none may be read
    "0 passes": (lambda: params([span(1, 2, euler(1), n_passes=0)]), "0 passes asked for, 1 to 64"),
    "-1 passes": (lambda: params([span(1, 2, euler(1), n_passes=-1)]), "-1 passes"),
    "65 passes": (lambda: params([span(1, 2, euler(1), n_passes=65)]), "65 passes"),
    "INT_MAX passes": (lambda: params([span(1, 2, euler(1), n_passes=INT_MAX)]), "2147483647 passes"),
    "INT_MIN passes": (lambda: params([span(1, 2, euler(1), n_passes=INT_MIN)]), "-2147483648 passes"),
    "64 passes everywhere": (lambda: params([span(0, 15, euler(1), n_passes=64)]), "more than 512 layers"),
    "528 visits": (lambda: params([span(0, 15, euler(33))]), "more than 512 layers"),
    "513 visits": (lambda: params([span(0, 14, euler(32)), span(15, 15, euler(33))]), "more than 512 layers"),
    "513 visits by layer": (
        lambda: params([span(0, 14, euler(32)), span(15, 15, euler(33))], unit=LAYER),
        "more than 512 layers",
    ),
    # the mix
    "null mix": (lambda: params([span(1, 2, None)]), "span 1..2 has no mix"),
    "null mix of the second": (lambda: params([span(1, 2, euler(2)), span(3, 4, None)]), "span 3..4 has no mix"),
    "NaN": (lambda: params([span(1, 2, with_entry(0, 0, np.nan))]), "mix[0][0] is not a finite number"),
    "-NaN": (lambda: params([span(1, 2, with_entry(2, 1, -np.nan))]), "span 1..2: mix[2][1]"),
    "inf": (lambda: params([span(1, 2, with_entry(2, 2, np.inf))]), "span 1..2: mix[2][2]"),
    "-inf": (lambda: params([span(1, 2, euler(2)), span(3, 4, with_entry(1, 0, -np.inf))]), "span 3..4: mix[1][0]"),
}


@pytest.mark.parametrize("before", ["off", "a loop"])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_params_are_refused_and_the_old_loop_stays(ctx, case, before):
    make, part = REFUSED[case]
    if before == "a loop":
        assert set_loop(ctx, params([span(3, 5, euler(3)), span(7, 7, euler(2))], unit=LAYER, kv=LAST)) == 0
    old = get_loop(ctx)
    assert set_loop(ctx, make()) == INVALID
    assert part in last_error()
    assert get_loop(ctx) == old


def test_without_a_context_nothing_is_set():
    for loop in (None, params([span(1, 2, euler(2))]), params([])):
        assert set_loop(None, loop) == INVALID
        assert last_error() == "the context is NULL"


def test_default_params():
    loop = lib.llama_loop_default_params()
    assert (bool(loop.spans), loop.n_spans, loop.unit, loop.kv) == (False, 0, BLOCK, FROZEN)


def random_mix(n):
    return np.tril(np.random.default_rng(n).normal(size=(n, n)).astype(np.float32))


ACCEPTED = {
    "one pass": [(4, 4, euler(1))],
    "the first layer": [(0, 0, random_mix(2))],
    "the last layer": [(N_LAYER - 1, N_LAYER - 1, random_mix(3))],
    "the whole model": [(0, N_LAYER - 1, random_mix(2))],
    "64 passes": [(2, 3, random_mix(MAX_PASSES))],
    "512 visits": [(0, N_LAYER - 1, random_mix(32))],
    "spans that touch": [(0, 1, random_mix(2)), (2, 2, random_mix(5)), (3, 9, random_mix(3))],
    "a span for each layer": [(il, il, random_mix(1 + il)) for il in range(N_LAYER)],
    "zeros": [(1, 2, np.zeros((2, 2)))],
    "large and tiny numbers": [(1, 2, np.float32([[3e38, 0], [-3e38, 1e-44]]))],
}


@pytest.mark.parametrize("unit", [BLOCK, LAYER])
@pytest.mark.parametrize("kv", [FROZEN, FIRST, LAST])
@pytest.mark.parametrize("case", ACCEPTED)
def test_what_was_set_is_what_one_gets(ctx, case, unit, kv):
    spans = ACCEPTED[case]
    assert set_loop(ctx, params([span(*s) for s in spans], unit, kv)) == 0
    assert last_error() == ""
    assert get_loop(ctx) == ([(first, last, mix.tolist()) for first, last, mix in spans], unit, kv)
    assert lib.llama_loop_memory_size(ctx) == 0


def test_null_turns_it_off(ctx):
    assert get_loop(ctx) is None
    assert set_loop(ctx, params([span(1, 2, euler(2))])) == 0
    assert get_loop(ctx) is not None
    assert set_loop(ctx, None) == 0
    assert get_loop(ctx) is None


def test_the_params_are_copied(ctx):
    loop = params([span(1, 2, euler(2))])
    assert set_loop(ctx, loop) == 0
    before = get_loop(ctx)
    loop.spans[0].first = loop.spans[0].n_passes = loop.kv = 77
    ctypes.memset(loop.spans[0].mix, 0xFF, 16)
    assert get_loop(ctx) == before == ([(1, 2, euler(2).tolist())], BLOCK, FROZEN)


def test_entries_above_the_diagonal_are_not_read(ctx):
    assert set_loop(ctx, params([span(1, 2, [[1, np.nan], [0.5, 0.5]])])) == 0
    assert get_loop(ctx) == ([(1, 2, [[1.0, 0.0], [0.5, 0.5]])], BLOCK, FROZEN)


@pytest.mark.parametrize("kv", [FROZEN, OWN, FIRST, LAST])
def test_the_same_loop_again_is_no_change(ctx, kv):
    def loop():
        return params([span(1, 2, euler(3))], kv=kv)

    assert set_loop(ctx, loop()) >= 0
    address = ctypes.cast(lib.llama_get_loop(ctx), ctypes.c_void_p).value
    assert set_loop(ctx, loop()) == 0
    assert ctypes.cast(lib.llama_get_loop(ctx), ctypes.c_void_p).value == address  # so the graph is kept, too
    assert set_loop(ctx, params([span(1, 2, euler(2))], kv=kv)) >= 0
    assert get_loop(ctx) == ([(1, 2, euler(2).tolist())], BLOCK, kv)


@contextmanager
def new_context(llm, n_ctx=64):
    ctx_params = llama_cpp.llama_context_default_params()
    ctx_params.n_ctx, ctx_params.n_threads, ctx_params.n_threads_batch = n_ctx, 1, 1
    ctx = llama_cpp.llama_init_from_model(llm.model, ctx_params)
    assert ctx
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


def test_own_keys_and_values_make_room_once(llm):
    with new_context(llm) as ctx:
        wide = params([span(1, 4, euler(3))], kv=OWN)
        assert set_loop(ctx, wide) == 1
        assert last_error() == ""
        size = lib.llama_loop_memory_size(ctx)
        assert size > 0 and size % 8 == 0  # four layers, two passes more

        assert set_loop(ctx, params([span(1, 20, euler(2))], kv=OWN)) == INVALID
        assert lib.llama_loop_memory_size(ctx) == size

        for loop, expected in [
            (None, 0),
            (wide, size),
            (params([span(2, 3, euler(2))], kv=OWN), size // 8 * 2),  # a part of it fits into the same room
            (params([span(1, 4, euler(3))], kv=FROZEN), 0),
            (params([span(1, 4, euler(3))], kv=OWN, unit=LAYER), size),
        ]:
            assert set_loop(ctx, loop) == 0
            assert lib.llama_loop_memory_size(ctx) == expected

        assert set_loop(ctx, params([span(1, 5, euler(3))], kv=OWN)) == 1
        assert lib.llama_loop_memory_size(ctx) == size // 8 * 10


@contextmanager
def little_memory_left(n_bytes):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        in_use = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory as only Linux does")
def test_without_memory_the_old_loop_stays(llm):
    with new_context(llm, n_ctx=16384) as ctx:
        assert set_loop(ctx, params([span(1, 2, euler(2))], kv=OWN)) == 1
        old, size = get_loop(ctx), lib.llama_loop_memory_size(ctx)
        loop = params([span(0, 15, euler(17))], kv=OWN)  # needs 512 MiB
        with little_memory_left(2**26):
            code = set_loop(ctx, loop)
        assert code == MEMORY
        assert "not enough memory" in last_error()
        assert (get_loop(ctx), lib.llama_loop_memory_size(ctx)) == (old, size)


def test_contexts_of_one_model_have_their_own_loops(llm, ctx):
    with new_context(llm) as other:
        assert set_loop(ctx, params([span(1, 2, euler(2))])) == 0
        assert get_loop(other) is None
        assert set_loop(other, params([span(3, 4, euler(3))])) == 0
        assert get_loop(ctx) == ([(1, 2, euler(2).tolist())], BLOCK, FROZEN)
        assert set_loop(ctx, None) == 0
        assert get_loop(other) == ([(3, 4, euler(3).tolist())], BLOCK, FROZEN)


def test_the_last_error_belongs_to_its_thread_and_goes_with_a_success(ctx):
    assert set_loop(ctx, params([])) == INVALID
    error = last_error()
    assert error

    seen = []

    def another():
        seen.append(last_error())
        set_loop(None, None)
        seen.append(last_error())

    thread = threading.Thread(target=another)
    thread.start()
    thread.join()
    assert seen == ["", "the context is NULL"]
    assert last_error() == error

    assert set_loop(ctx, None) == 0
    assert last_error() == ""


def test_a_refused_loop_changes_no_result(llm, ctx):
    def logits():
        llm.reset()
        llm.eval([1, 70, 80, 90])
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()

    off = logits()
    assert set_loop(ctx, params([span(3, 5, euler(3))])) == 0
    looped = logits()
    assert not np.allclose(off, looped, rtol=1e-3)
    for make, _ in REFUSED.values():
        assert set_loop(ctx, make()) == INVALID
    np.testing.assert_array_equal(logits(), looped)
    assert set_loop(ctx, None) == 0
    np.testing.assert_array_equal(logits(), off)


def test_the_largest_loop_can_be_evaluated(llm, ctx):
    assert set_loop(ctx, params([span(0, N_LAYER - 1, euler(32))])) == 0
    llm.reset()
    llm.eval([1, 70, 80])
    assert np.isfinite(llama_cpp.llama_get_logits_ith(llm.ctx, -1)[: llm.n_vocab()]).all()


# ---- edgeloop.native, the thin layer above ----


def test_native_set_loop(llm):
    with new_context(llm) as ctx:
        spans = [native.NativeSpan(1, 2, [[0.5], [0.25, 0.75]]), native.NativeSpan(4, 4, [[1.0]])]
        assert native.set_loop(ctx, spans, unit="layer", kv="last") is False
        assert get_loop(ctx) == ([(1, 2, [[0.5, 0.0], [0.25, 0.75]]), (4, 4, [[1.0]])], LAYER, LAST)
        assert native.set_loop(ctx, spans, kv="own") is True
        assert native.loop_memory_size(ctx) == lib.llama_loop_memory_size(ctx) > 0
        with pytest.raises(native.NativeLoopError, match=r"span 1\.\.99 is not in the model") as caught:
            native.set_loop(ctx, [native.NativeSpan(1, 99, [[1.0]])])
        assert caught.value.code == INVALID
        assert native.set_loop(ctx, []) is False
        assert get_loop(ctx) is None

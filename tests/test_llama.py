"""edgeloop.Llama on the demo model: against the duplicated model, the plain model, and itself under other conditions."""

import gc
import threading

import llama_cpp
import numpy as np
import psutil
import pytest
from llama_cpp import LlamaRAMCache

from edgeloop import Loop, LoopError, ModelError, gguf_tools, native
from edgeloop.llama import native_arguments

PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun until the evening comes"
SPAN = "12-14"


def logits(llm, text=PROMPT):
    """Logits of every position, shape (tokens, vocabulary)."""
    llm.reset()
    llm.eval(llm.tokenize(text.encode()))
    return llm.scores[: llm.n_tokens].copy()


def greedy(llm, prompt=PROMPT, n=32, **kwargs):
    return llm(prompt, max_tokens=n, temperature=0, **kwargs)["choices"][0]["text"]


@pytest.mark.parametrize(
    "spec",
    [
        "12-14x2:naive,kv=own",
        "0-1x3:naive,kv=own",
        "28-29x2:naive,kv=own",
        "3-4x2+20-22x3:naive,kv=own",
        "10-12x2:naive,unit=layer,kv=own",
    ],
)
def test_naive_own_is_the_duplicated_model_bit_for_bit(demo_model, load, tmp_path, spec):
    out = tmp_path / "duplicated.gguf"
    order = gguf_tools.export(demo_model, out, spec)
    assert order == Loop.parse(spec).expanded(30)
    duplicated, looped = load(out, logits_all=True), load(demo_model, loop=spec, logits_all=True)
    assert duplicated.n_layer == len(order)
    assert np.array_equal(logits(duplicated), logits(looped))
    assert greedy(duplicated) == greedy(looped)


def test_naive_own_is_the_duplicated_model_with_a_sliding_window(tiny_gemma3, load, tmp_path):
    spec = "1-4x3:naive,kv=own"
    out = tmp_path / "duplicated.gguf"
    gguf_tools.export(tiny_gemma3, out, spec)
    options = {"n_ctx": 64, "logits_all": True, "swa_full": False}
    duplicated, looped = load(out, **options), load(tiny_gemma3, loop=spec, **options)
    tokens = list(range(5, 45))
    for llm in (duplicated, looped):
        llm.eval(tokens)
    assert np.array_equal(duplicated.scores[:40], looped.scores[:40])


def test_one_pass_is_the_plain_model(demo_model, load):
    llm = load(demo_model, logits_all=True)
    plain = logits(llm)
    for spec in (f"{SPAN}x1", "0-29x1:naive,kv=own", "0-29x1:unit=layer"):
        llm.loop = spec
        assert np.array_equal(logits(llm), plain), spec
    llm.loop = f"{SPAN}x3:anchored,beta=1"
    np.testing.assert_allclose(logits(llm), plain, rtol=0, atol=1e-4)
    llm.loop = f"{SPAN}x3"
    assert np.abs(logits(llm) - plain).max() > 0.1  # the comparison above can fail


def test_off_is_stock_llama_cpp_python(demo_model, load):
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    stock = llama_cpp.Llama(demo_model, **options)
    assert greedy(load(demo_model)) == greedy(stock)


@pytest.mark.parametrize("kv", ["frozen", "own"])
def test_how_the_prompt_is_cut_does_not_matter(demo_model, load, kv):
    # matrix products of quantized weights depend a little on the batch; this prompt's answer has no close calls
    prompt = "Once upon a time, in a small village near the sea,"
    answers = {n: greedy(load(demo_model, loop=f"{SPAN}x3:kv={kv}", n_batch=n), prompt) for n in (512, 7, 1)}
    assert answers[7] == answers[512]
    assert answers[1] == answers[512]
    assert answers[512] != greedy(load(demo_model), prompt)


@pytest.mark.parametrize("kv, independent", [("frozen", True), ("own", True), ("first", False), ("last", False)])
def test_batches_in_full_precision(tiny_llama, load, kv, independent):
    tokens = [5 + 7 * i % 240 for i in range(40)]
    got = {}
    for n in (512, 7, 1):
        llm = load(tiny_llama, loop=f"1-4x3:naive,kv={kv}", n_ctx=64, n_batch=n, logits_all=True, type_k=0, type_v=0)
        llm.eval(tokens)
        got[n] = llm.scores[: len(tokens)].copy()
    for n in (7, 1):
        difference = np.abs(got[n] - got[512]).max() / np.abs(got[512]).max()
        assert (difference < 1e-4) == independent, (n, difference)


@pytest.mark.parametrize("n_ctx", [256, 300, 1024])
@pytest.mark.parametrize("spec", ["12-14x3:kv=own", "0-1x2+5-5x4:kv=own", "12-14x3", "12-14x3:kv=last"])
def test_kv_size_is_what_inspect_says(demo_model, load, spec, n_ctx):
    llm = load(demo_model, loop=spec, n_ctx=n_ctx)
    assert llm.loop_memory_size() == gguf_tools.inspect(demo_model).loop_memory_bytes(llm.loop, n_ctx)
    assert (llm.loop_memory_size() > 0) == ("own" in spec)


@pytest.mark.parametrize("spec", ["12-14x3:kv=own", "12-14x3", "12-14x3:kv=first"])
def test_saved_state_grows_by_what_inspect_says(demo_model, load, spec):
    """An independent reading of the cells and bytes in use: the size of the context's saved state, every cell filled."""
    sizes = {}
    for name in ("off", spec):
        llm = load(demo_model, loop=name)
        llm.eval([1] * 256)
        sizes[name] = llama_cpp.llama_state_get_size(llm.ctx)
    loop = Loop.parse(spec)
    n_slots = len(loop.expanded(30)) - 30 if loop.kv == "own" else 0
    headers = sizes[spec] - sizes["off"] - gguf_tools.inspect(demo_model).loop_memory_bytes(loop, 256)
    assert 0 <= headers <= 64 * (n_slots + 1)  # the loop's name and a few words of description for each slot


def test_changing_the_loop_200_times_leaks_nothing(demo_model, load):
    llm = load(demo_model)
    plain = greedy(llm, n=8)
    specs = [
        "12-14x2",
        "0-1x3:kv=own",
        "28-29x4:naive",
        "off",
        "5-9x2:kv=first",
        "5-9x2:kv=last,unit=layer",
        "3-3x8:rk4,kv=own",
    ]

    def round_trip(n):
        for i in range(n):
            llm.loop = specs[i % len(specs)]
            greedy(llm, n=2)

    round_trip(28)
    gc.collect()
    before = psutil.Process().memory_info().rss
    round_trip(200)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert grown < 8 << 20, f"{grown >> 20} MB more after 200 changes"
    llm.loop = "off"
    assert greedy(llm, n=8) == plain


class Context:
    """A second context on a loaded model, through the plain C functions."""

    def __init__(self, llm, spec):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
        self.llm, self.ctx = llm, llama_cpp.llama_init_from_model(llm.model, params)
        native.set_loop(self.ctx, **native_arguments(Loop.parse(spec).resolve(llm.n_layer)))

    def greedy(self, tokens, n):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
        batch, out = list(tokens), []
        for _ in range(n):
            array = (llama_cpp.llama_token * len(batch))(*batch)
            assert llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(array, len(batch))) == 0
            row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), shape=(self.llm.n_vocab(),))
            batch = [int(row.argmax())]
            out += batch
        return out


def test_two_threads_with_two_loops_on_one_model(demo_model, load):
    llm = load(demo_model)
    tokens = llm.tokenize(PROMPT.encode())
    contexts = [Context(llm, "12-14x3:naive"), Context(llm, "20-23x2:naive,kv=own")]
    alone = [c.greedy(tokens, 24) for c in contexts]
    assert alone[0] != alone[1]
    together = [None, None]

    def work(i):
        together[i] = [contexts[i].greedy(tokens, 24) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        assert together[i] == [alone[i]] * 3
    for c in contexts:
        llama_cpp.llama_free(c.ctx)


def test_a_prefix_is_never_reused_under_another_loop(demo_model, load):
    specs = ["off", f"{SPAN}x3:naive", f"{SPAN}x3:naive,kv=own", "5-8x2:kv=last"]
    fresh = {spec: greedy(load(demo_model, loop=spec)) for spec in specs}
    assert len(set(fresh.values())) == len(specs)
    llm = load(demo_model)
    for spec in [*specs, *reversed(specs), specs[2], specs[1]]:
        llm.loop = spec
        assert greedy(llm) == fresh[spec], spec


def test_ways_to_set_a_loop(demo_model, load):
    llm = load(demo_model)
    plain, looped = greedy(llm), f"{SPAN}x3:naive"
    assert llm.loop == Loop.parse("off") and not llm.loop
    with llm.looped(looped):
        inside = greedy(llm)
        assert str(llm.loop) == looped
    assert llm.loop.is_off and greedy(llm) == plain != inside
    assert greedy(llm, loop=looped) == inside and llm.loop.is_off
    assert llm.create_completion(PROMPT, max_tokens=32, temperature=0, loop=looped)["choices"][0]["text"] == inside
    assert (
        "".join(c["choices"][0]["text"] for c in llm(PROMPT, max_tokens=32, temperature=0, stream=True, loop=looped))
        == inside
    )
    assert llm.loop.is_off
    stream = llm(PROMPT, max_tokens=32, temperature=0, stream=True, loop=looped)
    next(stream)
    assert str(llm.loop) == looped
    stream.close()  # given up half way
    assert llm.loop.is_off and greedy(llm) == plain
    messages = [{"role": "user", "content": "Name three colours."}]
    chats = {
        spec: llm.create_chat_completion(messages, max_tokens=16, temperature=0, loop=spec)["choices"][0]["message"][
            "content"
        ]
        for spec in (None, "10-17x2:naive")
    }
    assert len(set(chats.values())) == 2
    llm.loop = "40%-50%x3"
    assert str(llm.loop) == "12-14x3"
    llm.loop = None
    assert llm.loop.is_off


@pytest.mark.parametrize(
    "spec, message",
    [
        ("12-30x2", "30 layers, 0 to 29"),
        ("x", "is not a span"),
        ("12-14x65", "1 to 64"),
        ("0-29x64", "the limit is 512"),
        (7, "int"),
    ],
)
def test_a_wrong_loop_changes_nothing(tiny_llama, demo_model, load, spec, message):
    llm = load(demo_model, loop=f"{SPAN}x2")
    for attempt in (
        lambda: setattr(llm, "loop", spec),
        lambda: llm("a", loop=spec),
        lambda: llm("a", loop=spec, stream=True),
    ):
        with pytest.raises(LoopError, match=message):
            attempt()
        assert str(llm.loop) == f"{SPAN}x2"


def test_cache_and_state_carry_the_loop(demo_model, load):
    llm = load(demo_model)
    plain = greedy(llm)
    llm.set_cache(LlamaRAMCache())
    looped = greedy(llm, loop=f"{SPAN}x3:naive")
    assert greedy(llm) == plain
    assert greedy(llm, loop=f"{SPAN}x3:naive") == looped != plain
    llm.set_cache(None)
    llm.loop = f"{SPAN}x3:naive,kv=own"
    greedy(llm, n=4)
    state = llm.save_state()
    again = greedy(llm)
    with pytest.raises(LoopError, match=f"saved with loop '{SPAN}x3:naive,kv=own', this model has 'off'"):
        with llm.looped("off"):
            llm.load_state(state)
    llm.reset()
    llm.load_state(state)
    assert greedy(llm) == again


@pytest.mark.parametrize("model", ["demo_model", "mamba"])
def test_the_engine_refuses_a_state_of_another_loop(model, load, tmp_path, request):
    """Through the plain C functions: whole states and those of one sequence give 0 bytes read under another loop."""
    import ctypes

    if model == "mamba":
        import tiny

        tiny.write_mamba(tmp_path / "mamba.gguf", n_layer=4)
    llm = load(tmp_path / "mamba.gguf" if model == "mamba" else request.getfixturevalue(model), n_ctx=256)
    specs = ["off", "1-2x3", "1-2x4", "1-2x3:kv=own", "1-2x3:naive", "1-2x3:unit=layer", "1-2x3:scope=gen"]
    saved = {}
    for spec in specs:
        llm.loop = spec
        llm.eval([5, 6, 7, 8])
        size = max(llama_cpp.llama_state_get_size(llm.ctx), llama_cpp.llama_state_seq_get_size(llm.ctx, 0))
        whole, one = (ctypes.c_uint8 * size)(), (ctypes.c_uint8 * size)()
        n_whole = llama_cpp.llama_state_get_data(llm.ctx, whole, size)
        n_one = llama_cpp.llama_state_seq_get_data(llm.ctx, one, size, 0)
        saved[spec] = (whole, n_whole, one, n_one)
    for spec in specs:
        llm.loop = spec
        for other, (whole, n_whole, one, n_one) in saved.items():
            expected = (n_whole, n_one) if other == spec else (0, 0)
            got = (
                llama_cpp.llama_state_set_data(llm.ctx, whole, n_whole),
                llama_cpp.llama_state_seq_set_data(llm.ctx, one, n_one, 0),
            )
            assert got == expected, (spec, other)
        llm.reset()
        llm.eval([5, 6, 7])  # still usable


def test_draft_model_and_embeddings_work_under_a_loop(demo_model, load):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    repeat = "one two three four five six seven one two three four five six seven one two"
    spec = f"{SPAN}x3:naive"
    plain = greedy(load(demo_model, loop=spec), repeat)
    assert (
        greedy(load(demo_model, loop=spec, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4)), repeat) == plain
    )
    embedder = load(demo_model, embedding=True)
    off = embedder.embed("hello", normalize=True)
    embedder.loop = spec
    assert not np.allclose(off, embedder.embed("hello", normalize=True))


def test_what_cannot_be_looped_is_refused_by_name(tmp_path, load):
    import tiny_more

    path = tmp_path / "t5.gguf"
    tiny_more.write_t5(path)
    llm = load(path, n_ctx=64)
    with pytest.raises(LoopError, match="architecture 't5' cannot be looped: .* encoder and a decoder"):
        llm.loop = "0-1x2"
    assert llm.loop.is_off


@pytest.mark.parametrize(
    "content, message",
    [(None, "no such file"), (b"hello", "not a GGUF file"), (b"GGUF\3\0\0\0", "tiny|read|header|load")],
)
def test_bad_model_files(tmp_path, load, content, message):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(path)
    assert "\n" not in str(pytest.raises(ModelError, load, path).value)


def test_truncated_model(demo_model, tmp_path, load):
    path = tmp_path / "short.gguf"
    with open(demo_model, "rb") as f:
        path.write_bytes(f.read(60_000_000))
    with pytest.raises(ModelError, match="incomplete|truncated|bounds"):
        load(path)
    with pytest.raises(ModelError, match="truncated, .* bytes are missing"):
        gguf_tools.inspect(path)

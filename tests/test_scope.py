"""The loop's scope: which tokens are looped is the same as switching the loop on and off between batches."""

import llama_cpp
import numpy as np
import pytest

from edgeloop import Loop, native
from edgeloop.llama import native_arguments

PROMPT = [5 + 7 * i % 240 for i in range(20)]
NEXT = [17, 99, 203]
SPANS = ["2-3x3", "0-1x2:naive", "4-5x3:naive,unit=layer", "1-2x2+4-5x3"]


def set_loop(llm, spec):
    """Without forgetting what was evaluated."""
    native.set_loop(llm.ctx, **native_arguments(Loop.parse(spec).resolve(llm.n_layer)))


def with_keys(span, *keys):
    return span + ("," if ":" in span else ":") + ",".join(keys)


def last_logits(llm):
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


def go(llm, prompt_spec, gen_spec):
    """Logits after the prompt and after each further token, under a loop for each of both."""
    set_loop(llm, prompt_spec)
    llm.reset()
    llm.eval(PROMPT)
    rows = [last_logits(llm)]
    set_loop(llm, gen_spec)
    for token in NEXT:
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.array(rows)


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("kv", ["frozen", "first"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("arch", ["tiny_llama", "tiny_gemma3"])
def test_scope_is_switching_between_batches(arch, span, kv, load, request):
    llm = load(request.getfixturevalue(arch), n_ctx=64, type_k=0, type_v=0)
    loop = with_keys(span, f"kv={kv}")
    for scope, prompt_spec, gen_spec in (("prompt", loop, "off"), ("gen", "off", loop), ("all", loop, loop)):
        spec = with_keys(span, f"kv={kv}", f"scope={scope}")
        scoped = go(llm, spec, spec)
        assert np.array_equal(scoped, go(llm, prompt_spec, gen_spec)), scope
        assert distance(go(llm, "off", "off"), scoped) > 1e-3


@pytest.mark.parametrize("kv", ["frozen", "own", "first"])
@pytest.mark.parametrize("span", SPANS)
def test_a_batch_of_both(span, kv, tiny_llama, load):
    """One sequence with a prompt and one with a generated token in the same batch: as each alone."""
    llm = load(tiny_llama, n_ctx=64, type_k=0, type_v=0)
    llm.close()
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified, params.n_threads, params.n_threads_batch = 128, 2, True, 1, 1
    params.type_k = params.type_v = 0
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    model = llama_cpp.llama_model_load_from_file(tiny_llama.encode(), llama_cpp.llama_model_default_params())
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    class Context:
        n_layer = llama_cpp.llama_model_n_layer(model)

        def __init__(self):
            self.ctx = llama_cpp.llama_init_from_model(model, params)

        def decode(self, tokens):
            """tokens: (token, position, sequence); the logits of all of them."""
            batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, True
                batch.seq_id[i][0] = sequence
            assert llama_cpp.llama_decode(self.ctx, batch) == 0
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, i), shape=(n_vocab,)).copy()
                for i in range(len(tokens))
            ]
            llama_cpp.llama_batch_free(batch)
            return np.array(rows)

    prompt = [(t, i, 0) for i, t in enumerate(PROMPT)]
    other = [(t, i, 1) for i, t in enumerate(PROMPT[:9])]
    one = [(NEXT[0], 9, 1)]
    for scope in ("prompt", "gen"):
        spec = with_keys(span, f"kv={kv}", f"scope={scope}")
        together, apart = Context(), Context()
        for context in (together, apart):
            set_loop(context, spec)
            context.decode(other)
        both = together.decode(prompt + one)
        alone = np.concatenate([apart.decode(prompt), apart.decode(one)])
        assert distance(both, alone) < 1e-5, scope
        # what was kept serves the next tokens equally well
        follow = [(NEXT[1], len(PROMPT), 0), (NEXT[2], 10, 1)]
        assert distance(together.decode(follow), apart.decode(follow)) < 1e-5, scope
        for context in (together, apart):
            llama_cpp.llama_free(context.ctx)
    llama_cpp.llama_model_free(model)


def test_the_caller_can_say_which(tiny_llama, load):
    llm = load(tiny_llama, n_ctx=64, type_k=0, type_v=0)
    spec = "2-3x3:naive,scope=gen"
    by_one = go(llm, spec, spec)[1:]
    llm.reset()
    llm.eval(PROMPT)
    native.set_phase(llm.ctx, "gen")  # a batch of drafted tokens
    batch = llama_cpp.llama_batch_init(len(NEXT), 0, 1)
    batch.n_tokens = len(NEXT)
    for i, token in enumerate(NEXT):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, len(PROMPT) + i, 1, True
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, i), shape=(llm.n_vocab(),)).copy()
        for i in range(len(NEXT))
    ]
    llama_cpp.llama_batch_free(batch)
    assert distance(np.array(rows), by_one) < 1e-5


def test_drafted_tokens_are_generated_ones(demo_model, load):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    text = "one two three four five six seven one two three four five six seven one two"

    def answer(**kwargs):
        return load(demo_model, loop="12-14x3:naive,scope=gen", **kwargs)(text, max_tokens=24, temperature=0)[
            "choices"
        ][0]["text"]

    assert answer(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4)) == answer()


def test_scopes_differ(demo_model, load):
    llm = load(demo_model)
    answers = {
        spec: llm("Once upon a time, in a small village", max_tokens=24, temperature=0, loop=spec)["choices"][0]["text"]
        for spec in ("off", "10-15x2:naive", "10-15x2:naive,scope=prompt", "10-15x2:naive,scope=gen")
    }
    assert len(set(answers.values())) == 4

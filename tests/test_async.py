"""edgeloop.AsyncLlama: against edgeloop.Llama for what it answers, against llama.cpp's counters and the CPU clock for what it stops."""

import asyncio
import random
import subprocess
import sys
import threading
import time
from itertools import islice

import llama_cpp
import numpy as np
import pytest
import tiny
import tiny_more

from edgeloop import AsyncLlama, Llama, LoopError, ModelError
from edgeloop.errors import EdgeloopError
from edgeloop.generate import ContextFull

OPTIONS = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
LOOP = "12-14x3:naive"
MESSAGES = [{"role": "user", "content": "Tell me a long story about a fox and a dog."}]
PROMPT = "Once upon a time, in a small village near the sea,"
GREEDY = {"temperature": 0}


def run(path, test, **options):
    """`test` is a coroutine function that is given the opened model."""

    async def main():
        async with AsyncLlama(path, **OPTIONS | options) as llm:
            return await asyncio.wait_for(test(llm), 300)

    return asyncio.run(main())


async def collect(stream):
    return [item async for item in stream]


async def evaluated(llm):
    """Tokens that llama.cpp evaluated so far, by its own count; asked behind everything that is queued."""

    def count(llama):
        counts = llama_cpp.llama_perf_context(llama.ctx)
        return counts.n_p_eval + counts.n_eval

    return await llm.run(count)


def fixed(answer):
    """An answer without what differs each time."""
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def test_it_answers_what_llama_answers(demo_model, load):
    plain = load(demo_model, n_ctx=512, embedding=True)

    async def test(llm):
        for loop in ("off", LOOP):
            with plain.looped(loop):
                chat = plain.create_chat_completion(MESSAGES, max_tokens=12, **GREEDY)
                chunks = list(plain.create_chat_completion(MESSAGES, max_tokens=12, stream=True, **GREEDY))
                completion = plain.create_completion(PROMPT, max_tokens=12, **GREEDY)
                completion_chunks = list(plain(PROMPT, max_tokens=12, stream=True, **GREEDY))
                embedding = plain.embed(PROMPT)

            options = {"loop": loop, "max_tokens": 12, **GREEDY}
            assert fixed(await llm.create_chat_completion(MESSAGES, **options)) == fixed(chat)
            stream = await llm.create_chat_completion(MESSAGES, stream=True, **options)
            assert [fixed(chunk) for chunk in await collect(stream)] == [fixed(chunk) for chunk in chunks]
            assert fixed(await llm.create_completion(PROMPT, **options)) == fixed(completion)
            stream = await llm.create_completion(PROMPT, stream=True, **options)
            assert [fixed(chunk) for chunk in await collect(stream)] == [fixed(chunk) for chunk in completion_chunks]
            assert "".join(await collect(llm.chat(MESSAGES, **options))) == chat["choices"][0]["message"]["content"]
            assert await llm.embed(PROMPT, loop=loop) == embedding
        assert llm.n_layer == 30

    run(demo_model, test, embedding=True)


def test_the_loop_of_requests_that_name_none(demo_model, load):
    plain = load(demo_model)
    texts = {loop: plain(PROMPT, max_tokens=12, loop=loop, **GREEDY)["choices"][0]["text"] for loop in ("off", LOOP)}
    assert len(set(texts.values())) == 2

    async def text(llm, **options):
        return (await llm.create_completion(PROMPT, max_tokens=12, **options, **GREEDY))["choices"][0]["text"]

    async def test(llm):
        assert str(llm.loop) == LOOP
        assert await text(llm) == texts[LOOP]
        assert await text(llm, loop="off") == texts["off"]
        assert await text(llm) == texts[LOOP]
        llm.loop = "off"
        assert await text(llm) == texts["off"]
        with pytest.raises(LoopError, match="30 layers, 0 to 29"):
            llm.loop = "12-30x2"
        assert llm.loop.is_off

    run(demo_model, test, loop=LOOP)


def test_a_conversation_is_not_evaluated_again(demo_model):
    async def test(llm):
        question = [{"role": "user", "content": "Name a colour. " * 20}]
        answer = "".join(await collect(llm.chat(question, loop=LOOP, max_tokens=8, **GREEDY)))
        before = await evaluated(llm)
        more = [*question, {"role": "assistant", "content": answer}, {"role": "user", "content": "Another?"}]
        await collect(llm.chat(more, loop=LOOP, max_tokens=1, **GREEDY))
        assert await evaluated(llm) - before < 40 < before

    run(demo_model, test)


def test_requests_are_answered_in_order(demo_model):
    async def test(llm):
        done = []

        async def ask(i):
            await llm.create_completion(PROMPT, max_tokens=1 if i % 2 else 8, loop=LOOP if i % 3 else "off")
            done.append(i)

        await asyncio.gather(*(ask(i) for i in range(8)))
        assert done == list(range(8))

    run(demo_model, test)


def test_the_event_loop_goes_on_meanwhile(demo_model):
    async def test(llm):
        task = asyncio.create_task(llm.run(lambda llama: llama.eval([5] * 400)))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 10

    run(demo_model, test)


@pytest.mark.parametrize("how", ["cancel", "break", "raise", "aclose", "cancel a plain call"])
def test_a_stopped_answer_is_not_computed_any_further(demo_model, how):
    n_pieces = 3

    async def read(llm, got):
        if how == "cancel a plain call":
            return await llm.create_chat_completion(MESSAGES, max_tokens=400)
        if how == "aclose":
            stream = llm.chat(MESSAGES, max_tokens=400)
            got.append(await anext(stream))
            return await stream.aclose()
        async for piece in llm.chat(MESSAGES, max_tokens=400):
            got.append(piece)
            if len(got) == n_pieces:
                if how == "break":
                    break
                if how == "raise":
                    raise KeyError("the program's own")
                await asyncio.Event().wait()

    async def test(llm):
        # buffered pieces are no excuse: at most one token is computed after the stop
        got = []
        task = asyncio.create_task(read(llm, got))
        if how.startswith("cancel"):
            while len(got) < n_pieces and how == "cancel":
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.2)
            task.cancel()
        at_stop = llm._llm.n_tokens
        try:
            await task
        except (asyncio.CancelledError, KeyError):
            pass
        stopped = await llm.run(lambda llama: llama.n_tokens)
        assert stopped < 200  # of more than 400
        if how.startswith("cancel"):
            assert stopped <= at_stop + 1
        total = await evaluated(llm)
        await asyncio.sleep(0.3)
        assert await evaluated(llm) == total
        answer = await llm.create_completion("The capital of France is", max_tokens=4, **GREEDY)
        assert "Paris" in answer["choices"][0]["text"]

    run(demo_model, test, loop=LOOP, buffer=8)


def test_a_request_that_waits_can_be_cancelled(demo_model):
    async def test(llm):
        first = asyncio.create_task(llm.create_completion(PROMPT, max_tokens=60))
        called = []
        second = asyncio.create_task(llm.run(called.append))
        third = asyncio.create_task(llm.run(lambda llama: "third"))
        await asyncio.sleep(0.05)
        second.cancel()
        assert await third == "third"
        assert first.done() and second.cancelled() and not called

    run(demo_model, test)


def test_a_long_prompt_is_interrupted_amid_a_batch(demo_model):
    prompt = [5 + i % 200 for i in range(1000)]

    async def test(llm):
        start = time.process_time()
        await llm.run(lambda llama: llama.eval(prompt))
        whole = time.process_time() - start

        await llm.run(lambda llama: llama.reset())
        start = time.process_time()
        task = asyncio.create_task(llm.create_completion(prompt, max_tokens=1))
        while time.process_time() - start < whole / 10:
            await asyncio.sleep(0.001)
        task.cancel()
        assert await llm.run(lambda llama: llama.n_tokens) == 0  # one batch: nothing of it is kept
        assert time.process_time() - start < whole / 2

    run(demo_model, test, n_ctx=1024, n_batch=1024, n_ubatch=1024)


MEMORIES = {
    "attention": (tiny.write_llama, "1-3x3", {}),
    "own": (tiny.write_llama, "1-3x3:naive,kv=own", {}),
    "window": (tiny.write_gemma3, "1-3x3", {"swa_full": False}),
    "recurrent": (tiny.write_mamba, "0-1x3", {}),
    "hybrid": (tiny_more.write_lfm2, "1-3x3", {}),
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_an_interruption_leaves_is_right(memory, tmp_path):
    """Prompts interrupted anywhere, then asked for again: the answer ends as that of a model that was never interrupted."""
    write, loop, options = MEMORIES[memory]
    path = tmp_path / "model.gguf"
    write(path)
    prompt = [5 + 7 * i % 240 for i in range(600)]
    # batches of 64 tokens; a longer context than the window by far
    options = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "type_k": 0, "type_v": 0, **options}

    def answer(llama):
        for _ in islice(llama.generate(prompt, temp=0), 40):
            pass
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()

    plain = Llama(str(path), loop=loop, **OPTIONS | options)
    start = time.perf_counter()
    expected = answer(plain)
    seconds = time.perf_counter() - start
    plain.close()
    rng = random.Random(1)

    async def test(llm):
        n_interrupted = 0
        for _ in range(12):
            await llm.run(lambda llama: llama.reset())
            task = asyncio.create_task(llm.run(answer))
            await asyncio.sleep(rng.uniform(0, seconds))
            n_interrupted += not task.done()
            task.cancel()
            np.testing.assert_allclose(await llm.run(answer), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        assert n_interrupted > 2

    run(path, test, loop=loop, **options)


def test_asking_again_after_the_first_token(tmp_path):
    """The whole prompt is evaluated, but the logits behind it are gone with the token that was interrupted."""
    path = tmp_path / "model.gguf"
    tiny_more.write_lfm2(path, n_layer=96)  # so deep that the second token takes a while
    prompt = [5 + 7 * i % 240 for i in range(20)]

    def tokens(llama):
        return list(islice(llama.generate(prompt, temp=0), 8))

    async def test(llm):
        expected = await llm.run(tokens)
        n_exact = 0
        for _ in range(20):
            await llm.run(lambda llama: llama.reset())
            stream = llm._stream(None, lambda llama: llama.generate(prompt, temp=0))
            assert await anext(stream) == expected[0]
            await stream.aclose()
            n_exact += await llm.run(lambda llama: llama.n_tokens) == len(prompt)
            assert await llm.run(tokens) == expected
        assert n_exact

    run(path, test, loop="1-94x3")


def test_a_stopped_embedding_leaves_no_prompt_behind(demo_model):
    """embed clears the memory; what was evaluated before must not be taken for still there."""

    def complete(llm):
        return llm.create_completion(PROMPT, max_tokens=8, **GREEDY)

    async def test(llm):
        expected = await complete(llm)
        task = asyncio.create_task(llm.embed(["word " * 400] * 8))
        await asyncio.sleep(0.2)
        task.cancel()
        assert (await complete(llm))["choices"] == expected["choices"]
        assert task.cancelled()

    run(demo_model, test, embedding=True)


def test_a_slow_reader_holds_the_computation(demo_model):
    async def test(llm):
        stream = llm.chat(MESSAGES, max_tokens=100)
        await anext(stream)
        seen = -1
        while seen != llm._llm.n_tokens:
            seen = llm._llm.n_tokens
            await asyncio.sleep(0.5)
        n_prompt = len(llm._llm.tokenize(MESSAGES[0]["content"].encode())) + 40
        assert seen < n_prompt + 12
        assert len(await collect(stream)) > 80

    run(demo_model, test, buffer=4)


def test_errors_reach_who_awaits(demo_model, tmp_path):
    async def test(llm):
        for loop, message in (("12-30x2", "30 layers, 0 to 29"), ("nonsense", "is not a span")):
            for attempt in (
                lambda: llm.create_completion(PROMPT, loop=loop),
                lambda: collect(llm.chat(MESSAGES, loop=loop)),
                lambda: llm.create_chat_completion(MESSAGES, loop=loop, stream=True),  # before it is read
                lambda: llm.embed("a", loop=loop),
            ):
                with pytest.raises(LoopError, match=message):
                    await attempt()
        with pytest.raises(ContextFull):
            await collect(llm.chat([{"role": "user", "content": "word " * 600}]))
        with pytest.raises(ZeroDivisionError):
            await llm.run(lambda llama: 1 / 0)
        with pytest.raises(TypeError, match="nonsense"):
            await llm.create_completion(PROMPT, nonsense=1)
        with pytest.raises(RuntimeError, match="embedding=True"):
            await llm.embed(PROMPT)
        assert (await llm.create_completion("The capital of France is", max_tokens=4))["choices"]

    run(demo_model, test)

    async def not_opened():
        with pytest.raises(ModelError, match="no such file"):
            async with AsyncLlama(tmp_path / "none.gguf"):
                pass
        with pytest.raises(LoopError, match="is not a span"):
            AsyncLlama(demo_model, loop="nonsense")
        with pytest.raises(EdgeloopError, match="is not open"):
            await AsyncLlama(demo_model).run(print)

    asyncio.run(not_opened())


def test_closing_stops_what_runs_and_refuses_what_waits(demo_model):
    before = set(threading.enumerate())

    async def main():
        llm = AsyncLlama(demo_model, **OPTIONS)
        await llm.open()
        running = asyncio.create_task(collect(llm.chat(MESSAGES, max_tokens=400, loop="5-25x6")))
        waiting = asyncio.create_task(llm.create_completion(PROMPT))
        await asyncio.sleep(0.3)
        assert "edgeloop_0" in {thread.name for thread in set(threading.enumerate()) - before}
        await asyncio.wait_for(llm.close(), 30)
        for task in (running, waiting):
            with pytest.raises(EdgeloopError, match="closed before the answer was complete"):
                await task
        with pytest.raises(EdgeloopError, match="is not open"):
            await llm.create_completion(PROMPT)
        await llm.close()  # once more is nothing
        await llm.open()  # and it can be opened again
        assert (await llm.create_completion(PROMPT, max_tokens=1))["choices"]
        await llm.close()

    asyncio.run(main())
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


def test_two_models_are_loaded_at_a_time_and_what_others_print_is_kept(demo_model, tiny_llama, capfd):
    async def main():
        models = [AsyncLlama(path, **OPTIONS) for path in (demo_model, tiny_llama, demo_model, tiny_llama)]
        opening = asyncio.gather(*(llm.open() for llm in models))
        n_printed = 0
        while not opening.done():
            print("meanwhile", flush=True)
            n_printed += 1
            await asyncio.sleep(0.001)
        await opening
        print("afterwards", flush=True)
        await asyncio.gather(*(llm.close() for llm in models))
        return n_printed

    n_printed = asyncio.run(main())
    output = capfd.readouterr()
    assert output.out == "meanwhile\n" * n_printed + "afterwards\n"
    assert not output.err


QUIET = """
import sys
sys.addaudithook(lambda event, _: (event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess")) and sys.exit(event)))
import asyncio, edgeloop

async def main():
    async with edgeloop.AsyncLlama(sys.argv[1], loop="12-14x3", n_ctx=256, n_threads=1, n_threads_batch=1) as llm:
        messages = [{"role": "user", "content": "Hello"}]
        async for piece in llm.chat(messages, max_tokens=8):
            break
        task = asyncio.create_task(llm.create_completion([5] * 200))
        await asyncio.sleep(0.1)
        task.cancel()
        await llm.create_chat_completion(messages, max_tokens=2)

asyncio.run(main(), debug=True)
"""


def test_it_prints_nothing_and_uses_no_network(demo_model):
    done = subprocess.run([sys.executable, "-W", "error", "-c", QUIET, demo_model], capture_output=True, text=True)
    # asyncio's debug mode says when a callback held the event loop for a tenth of a second; a busy machine may
    noise = [line for line in done.stderr.splitlines() if not line.startswith("Executing ")]
    assert (done.returncode, done.stdout, noise) == (0, "", [])

"""The server over real connections, against edgeloop.Llama called directly."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import tiny
import tiny_more
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import running

from edgeloop import ModelError
from edgeloop.server import chat
from edgeloop.server.completion import StopStrings
from edgeloop.server.engine import MAX_UNREAD
from edgeloop.server.types import ChatRequest

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LOOPS = ("off", "12-14x3", "10-17x2:naive")
TINY_LOOPS = ("off", "1-4x3", "2-3x4:naive", "0-1x2+3-4x2:kv=own")
MESSAGES = [{"role": "user", "content": "Name three colours."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"enum": [1, 2, 3]}},
            "required": ["place", "days"],
            "$defs": {
                "Place": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
            },
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
NO_END = {str(tiny.EOS): -100.0}


@pytest.fixture(scope="module")
def demo(demo_model):
    with running(demo_model, n_ctx=1024, name="demo") as server:
        yield server


@pytest.fixture(scope="module")
def small(tiny_llama):
    with running(tiny_llama) as server:
        yield server


@pytest.fixture(scope="module")
def long(tiny_llama):
    """Takes a while to fill its context, and has little patience."""
    with running(tiny_llama, n_ctx=16384, patience=0.5) as server:
        yield server


def chunks(response):
    """The events of a stream, which must end as it should."""
    assert response.status_code == 200, response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def stream(server, path, **body):
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        return chunks(response)


def content(events):
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def greedy_text(llm, prompt, n, loop="off"):
    """The first n tokens as text, through Llama.generate."""
    llm.loop = loop
    tokens = llm.generate(llm.tokenize(prompt.encode(), special=True), temp=0)
    text = llm.detokenize([token for _, token in zip(range(n), tokens)])
    return text.decode("utf-8", "ignore")


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_chat_is_what_llama_says_under_each_loop_in_turn(demo, demo_model, load):
    llm = load(demo_model, n_ctx=1024)
    options = {"temperature": 0, "max_tokens": 12}
    expected = {loop: llm.create_chat_completion(MESSAGES, loop=loop, **options) for loop in LOOPS}
    texts = {loop: answer["choices"][0]["message"]["content"] for loop, answer in expected.items()}
    assert len(set(texts.values())) == len(LOOPS)
    for loop in (*LOOPS, *reversed(LOOPS)):
        body = {"messages": MESSAGES, "loop": loop, **options}
        answer = demo.post(CHAT, **body).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": texts[loop]}
        assert answer["choices"][0]["finish_reason"] == expected[loop]["choices"][0]["finish_reason"]
        assert answer["usage"] == expected[loop]["usage"]
        assert (answer["loop"], answer["model"], answer["object"]) == (loop, "demo", "chat.completion")
    # once more, now that the same prompt is known already
    again = demo.post(CHAT, **body).json()["choices"][0]["message"]["content"]
    events = stream(demo, CHAT, **body, stream_options={"include_usage": True})
    assert content(events) == again
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    last = events[-1]
    assert last["choices"] == [] and last["usage"] == expected[loop]["usage"]
    assert last["timings"]["predicted_n"] == 12 and last["timings"]["predicted_ms"] > 0
    assert last["timings"]["prompt_n"] == 1  # the others were there from the same request before


def test_completion_is_what_llama_says(demo, demo_model, load):
    llm = load(demo_model, n_ctx=1024)
    prompt, options = "The capital of France is", {"temperature": 0, "max_tokens": 12}
    expected = llm.create_completion(prompt, loop=LOOPS[1], **options)
    text = expected["choices"][0]["text"]
    body = {"prompt": prompt, "loop": LOOPS[1], **options}
    answer = demo.post(TEXT, **body).json()
    assert answer["choices"][0] == expected["choices"][0] and answer["usage"] == expected["usage"]
    events = stream(demo, TEXT, **body)
    assert "".join(e["choices"][0]["text"] for e in events) == text
    assert events[-1]["timings"]["predicted_n"] == 12
    tokens = llm.tokenize(prompt.encode())
    assert demo.post(TEXT, **body | {"prompt": tokens, "echo": True}).json()["choices"][0]["text"] == prompt + text
    assert demo.post(TEXT, **body | {"prompt": [prompt], "max_tokens": 0}).json()["choices"][0]["text"] == ""
    # up to a stop string that spans tokens
    stop = text[9:14]
    for got in (
        demo.post(TEXT, **body, stop=["never", stop]).json()["choices"],
        [c for e in stream(demo, TEXT, **body, stop=stop) for c in e["choices"]],
    ):
        assert "".join(choice["text"] for choice in got) == text[: text.index(stop)]
        assert got[-1]["finish_reason"] == "stop"


def test_two_hundred_clients_at_once(small, tiny_llama, load):
    """Random weights say little that is text, so the log-probabilities of the tokens are compared."""
    llm = load(tiny_llama, logits_all=True)
    options = {"temperature": 0, "max_tokens": 6, "logprobs": 0, "logit_bias": NO_END}
    requests = [(f"prompt {i}, its own", TINY_LOOPS[i % len(TINY_LOOPS)]) for i in range(200)]
    expected = []
    for prompt, loop in requests:
        (choice,) = llm.create_completion(prompt, loop=loop, **options)["choices"]
        expected.append(choice["logprobs"]["token_logprobs"][:6])  # it goes on to the end of a character
    assert len(set(map(tuple, np.round(expected, 3)))) == 200

    async def ask(client, i, prompt, loop):
        body = {"prompt": prompt, "loop": loop, "stream": i % 3 == 0, **options}
        response = await client.post(TEXT, json=body)
        assert response.status_code == 200, response.text
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        parts = [json.loads(event)["choices"][0]["logprobs"] for event in events if event != "[DONE]"]
        return [logprob for part in parts if part for logprob in part["token_logprobs"]]

    async def ask_all():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=small.url, timeout=300, limits=limits) as client:
            return await asyncio.gather(*(ask(client, i, *request) for i, request in enumerate(requests)))

    before = small.metric("requests_total")
    np.testing.assert_allclose(asyncio.run(ask_all()), expected, atol=1e-3)
    assert small.metric("requests_total") - before == 200
    assert small.metric("waiting_requests") == small.metric("busy") == 0


def test_logprobs(demo, demo_model, load):
    llm = load(demo_model, logits_all=True)
    options = {"temperature": 0, "max_tokens": 4}
    prompt = "The capital of France is"
    expected = llm.create_completion(prompt, logprobs=3, **options)["choices"][0]["logprobs"]
    for got in (
        demo.post(TEXT, prompt=prompt, logprobs=3, **options).json()["choices"],
        [c for e in stream(demo, TEXT, prompt=prompt, logprobs=3, **options) for c in e["choices"]],
    ):
        got = [choice["logprobs"] for choice in got if choice["logprobs"]]
        assert sum((g["tokens"] for g in got), []) == expected["tokens"]
        assert sum((g["text_offset"] for g in got), []) == expected["text_offset"]
        assert sum((g["token_logprobs"] for g in got), []) == pytest.approx(expected["token_logprobs"], abs=1e-3)
        tops = sum((g["top_logprobs"] for g in got), [])
        assert all(
            top == pytest.approx(want, abs=1e-3) for top, want in zip(tops, expected["top_logprobs"], strict=True)
        )
    expected = llm.create_chat_completion(MESSAGES, logprobs=True, top_logprobs=2, **options)["choices"][0]["logprobs"]
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **options}
    got = demo.post(CHAT, **body).json()["choices"][0]["logprobs"]["content"]
    events = stream(demo, CHAT, **body)
    streamed = [entry for e in events for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    for entries in (got, streamed):
        assert [e["token"] for e in entries] == [e["token"] for e in expected["content"]]
        assert [bytes(e["bytes"]).decode() for e in entries] == [e["token"] for e in entries]
        assert [len(e["top_logprobs"]) for e in entries] == [2] * 4


def test_seed_and_bias(small):
    def text(**body):
        answer = small.post(TEXT, prompt="Once", max_tokens=12, **body).json()
        return answer["choices"][0]["text"]

    hot = {"temperature": 1.5, "logit_bias": NO_END}
    assert text(seed=7, **hot) == text(seed=7, **hot)
    assert len({text(seed=seed, **hot) for seed in range(4)}) > 1
    assert len({text(**hot) for _ in range(4)}) > 1
    letter = ord("x") + 3
    assert text(temperature=0, logit_bias={str(letter): 100}) == "x" * 12
    assert text(temperature=0, logit_bias={"x": 100}, logit_bias_type="tokens") == "x" * 12
    ends = {"prompt": "Once", "temperature": 0, "logit_bias": {str(tiny.EOS): 100}}
    assert small.post(TEXT, **ends).json()["usage"]["completion_tokens"] == 0
    assert small.post(TEXT, **ends, min_tokens=3).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("seed", range(4))
def test_json_schema(long, seed):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["é日", "😊"]}, "count": {"type": "integer"}, "all": {"type": "boolean"}},
        "required": ["kind", "count", "all"],
    }
    body = {"messages": MESSAGES, "temperature": 1.5, "seed": seed, "logit_bias": NO_END}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = long.post(CHAT, **body).json()["choices"][0]
    value = json.loads(answer["message"]["content"])
    assert set(value) == {"kind", "count", "all"} and type(value["count"]) is int and type(value["all"]) is bool
    assert value["kind"] in ("é日", "😊") and answer["finish_reason"] == "stop"


def test_a_stream_loses_no_character(long):
    wanted = "naïve 日本 😊"
    for schema in ({"const": wanted}, {"type": "string", "pattern": f"^{wanted}$"}):
        body = {"messages": MESSAGES, "response_format": {"type": "json_object", "schema": schema}, "stop": ["😊😊"]}
        whole = long.post(CHAT, **body).json()["choices"][0]["message"]["content"]
        assert json.loads(whole) == json.loads(content(stream(long, CHAT, **body))) == wanted


def test_forced_tools(long):
    body = {"messages": [{"role": "user", "content": "Weather in Rome?"}], "tools": [CLOCK, WEATHER], "temperature": 0}
    named = {"type": "function", "function": {"name": "get_weather"}}
    answers = {}
    for choice, names in ((named, {"get_weather"}), ("required", {"get_weather", "get_time"})):
        answer = long.post(CHAT, **body, tool_choice=choice).json()["choices"][0]
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["type"] == "function" and call["id"] and call["function"]["name"] in names
        answers[str(choice)] = json.loads(call["function"]["arguments"])
    arguments = answers[str(named)]
    assert arguments["place"]["city"] in ("Paris", "Rome") and arguments["days"] in (1, 2, 3)
    events = stream(long, CHAT, **body, tool_choice=named)
    (streamed,) = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert streamed["function"]["name"] == "get_weather" and json.loads(streamed["function"]["arguments"]) == arguments
    assert streamed["index"] == 0 and events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_conversation_goes_on_after_a_tool(long):
    call = {"id": "x", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "?"}]}]
    n_tokens = {}
    for more in (
        [],
        [{"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "tool", "content": "sunny"}],
    ):
        messages += more
        for choice in ("auto", "none"):
            body = {"messages": messages, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 4}
            n_tokens[len(messages), choice] = long.post(CHAT, **body).json()["usage"]["prompt_tokens"]
    assert n_tokens[1, "auto"] > n_tokens[1, "none"] + len("get_weather")
    assert n_tokens[2, "none"] > n_tokens[1, "none"] + len("get_weather")
    assert n_tokens[3, "none"] > n_tokens[2, "none"] + len("sunny")


TEMPLATE = """\
{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}\
{% for m in messages %}[{{ m.role }}]{{ m.content }}\
{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}\
{% endfor %}{% if messages[0].role == "assistant" %}{{ raise_exception("who asked?") }}{% endif %}[answer]"""


def test_a_template_that_knows_tools(tmp_path):
    model = tiny.hyperparameters("llama", 2, 1e4)
    model["metadata"]["tokenizer.chat_template"] = TEMPLATE
    shapes = tiny.common_shapes(model)
    tiny.write(tmp_path / "tools.gguf", model | tiny.random_tensors(shapes, 0))
    call = {"id": "x", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "x"},
    ]
    with running(tmp_path / "tools.gguf", n_ctx=1024) as server:
        for tools in ([], [WEATHER]):
            body = ChatRequest(messages=messages, tools=tools)
            prompt, _ = chat._render(server.engine.llm, body)
            text = server.engine.llm.detokenize(prompt).decode()
            assert text.endswith(
                "[system]Be brief.[user]Weather?[assistant]<tool_call>get_weather Rome[tool]sunny[answer]"
            )
            assert ("The weather in a city" in text) == bool(tools)
            assert server.post(CHAT, messages=messages, tools=tools, max_tokens=1).status_code == 200
        refused = server.post(CHAT, messages=messages[2:])
        assert refused.status_code == 400 and "who asked?" in refused.json()["error"]["message"]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_tool_calls_are_found_however_the_text_is_cut(data):
    one = '<tool_call>\n{"name": "f", "arguments": {"x": "<b>"}}\n</tool_call>'
    other = '<tool_call>{"name": "g"}</tool_call>'
    parts = ["Well. ", one, "\n", other, "\nDone < here", "<tool_call>no</tool_call>", '<tool_call>{"name": "h"}']
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    calls = chat.ToolCalls()
    got = [part for piece in pieces for part in calls.feed(piece)] + list(calls.feed("", is_last=True))
    found = [part["function"] for part in got if isinstance(part, dict)]
    assert [f["name"] for f in found] == ["f", "g", "h"]
    assert [json.loads(f["arguments"]) for f in found] == [{"x": "<b>"}, {}, {}]
    words = "".join(part for part in got if isinstance(part, str))
    assert words.split() == "Well. Done < here<tool_call>no</tool_call>".split()


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", max_size=3), max_size=3))
@settings(deadline=None)
def test_stop_strings_however_the_text_is_cut(pieces, strings):
    stops = StopStrings(strings)
    got = ""
    for piece in pieces:
        got += stops.feed(piece)
        if stops.found:
            break
    text = "".join(pieces)
    ends = [(text.index(s) + len(s), text.index(s)) for s in strings if s and s in text]
    assert got + stops.rest() == text[: min(ends)[1] if ends else len(text)]


def test_embeddings(small, tiny_llama, load):
    llm = load(tiny_llama, embedding=True)
    before = small.post(TEXT, prompt="Once", temperature=0, max_tokens=8).json()["choices"][0]["text"]
    seen = []
    for loop in TINY_LOOPS[:3]:
        llm.loop = loop
        expected = np.array(llm.embed("hello")).mean(axis=0)
        expected /= np.linalg.norm(expected)
        answer = small.post(EMBED, input=["hello", "other"], loop=loop).json()
        np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
        assert answer["data"][1]["index"] == 1 and answer["usage"]["prompt_tokens"] == 12
        coded = small.post(EMBED, input="hello", loop=loop, encoding_format="base64").json()["data"][0]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded["embedding"]), "<f4"), expected, atol=1e-5)
        seen.append(expected)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    after = small.post(TEXT, prompt="Once", temperature=0, max_tokens=8).json()["choices"][0]["text"]
    assert after == before == greedy_text(load(tiny_llama), "Once", 8)


def test_a_model_for_embeddings_only(tmp_path, load):
    tiny_more.write_bert(tmp_path / "bert.gguf")
    expected = np.array(load(tmp_path / "bert.gguf", embedding=True, n_ctx=64).embed("hello"))
    expected = expected.reshape(-1, expected.shape[-1]).mean(axis=0)
    with running(tmp_path / "bert.gguf", n_ctx=64) as server:
        got = server.post(EMBED, input="hello").json()["data"][0]["embedding"]
        np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-5)
        refused = server.post(TEXT, prompt="hello")
        assert refused.status_code == 400 and "embeddings only" in refused.json()["error"]["message"]


def test_a_model_that_cannot_be_served(tmp_path):
    tiny_more.write_t5(tmp_path / "t5.gguf")
    with pytest.raises(ModelError, match="an encoder and a decoder"), running(tmp_path / "t5.gguf", n_ctx=64):
        pass


# ---- what is refused -------------------------------------------------------------------------------------------------

DEEP = {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}


@pytest.mark.parametrize(
    "path, body, status, code, message",
    [
        (CHAT, {"messages": MESSAGES, "loop": "3-9x2"}, 422, "invalid_loop", "6 layers, 0 to 5"),
        (TEXT, {"prompt": "a", "loop": "1-2x3:euler,speed=2"}, 422, "invalid_loop", "speed"),
        (TEXT, {"prompt": "a", "loop": 3}, 422, "invalid_loop", "loop: Input should be a valid string"),
        (EMBED, {"input": "a", "loop": ""}, 422, "invalid_loop", "empty"),
        (CHAT, {"messages": MESSAGES, "n": 2}, 400, None, "n=2"),
        (CHAT, {"messages": []}, 400, None, "messages"),
        (CHAT, {}, 400, None, "messages: Field required"),
        (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, 400, None, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "messages.0.content"),
        (CHAT, {"messages": MESSAGES, "temperature": -1}, 400, None, "temperature"),
        (CHAT, {"messages": MESSAGES, "functions": []}, 400, None, "use tools"),
        (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, 400, None, "no tools"),
        (CHAT, {"messages": MESSAGES, "grammar": 'root ::= "a"'}, 400, None, "response_format"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, 400, None, "schema"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object", "schema": DEEP}}, 400, None, "repeat"),
        (
            CHAT,
            {"messages": MESSAGES, "response_format": {"type": "json_object", "schema": {"$ref": "#/no"}}},
            400,
            None,
            "this JSON schema cannot be used",
        ),
        (TEXT, {"prompt": "a" * 300}, 400, "context_length_exceeded", "301 tokens, the context 256"),
        (TEXT, {"prompt": []}, 400, None, "empty"),
        (TEXT, {"prompt": ["a", "b"]}, 400, None, "one text"),
        (TEXT, {"prompt": [5, 9999]}, 400, None, "9999 is not a token"),
        (TEXT, {"prompt": "a", "suffix": "b"}, 400, None, "suffix"),
        (TEXT, {"prompt": "a", "best_of": 3}, 400, None, "best_of=3"),
        (TEXT, {"prompt": "a", "logit_bias": {"100000": 1}}, 400, None, "not a token"),
        (TEXT, {"prompt": "a", "logit_bias": {"5": 1e30}}, 400, None, "logit_bias"),
        (TEXT, {"prompt": "a", "repeat_penalty": 0}, 400, None, "repeat_penalty"),
        (EMBED, {"input": "a" * 600}, 400, "context_length_exceeded", "601 tokens"),
        (EMBED, {"input": []}, 400, None, "input"),
        (EMBED, {"input": "a", "dimensions": 8}, 400, None, "dimensions"),
        ("/detokenize", {"tokens": [10**9]}, 400, None, "not a token"),
        ("/extras/detokenize", {"tokens": [-1]}, 400, None, "not a token"),
        ("/v1/nothing", {}, 404, None, "Not Found"),
        ("/v1/models", {}, 405, None, "Method Not Allowed"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_requests(small, path, body, status, code, message, streamed):
    response = small.post(path, **body, **({"stream": True} if streamed else {}))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code) and message in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert small.client.get("/health").json() == {"status": "ok"}


def test_bodies_that_are_no_request(small):
    for body, status in (
        (b"{", 400),
        (b"[1]", 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "' + b"a" * 2_000_000 + b'"}', 413),
    ):
        response = small.client.post(TEXT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status and response.json()["error"]["message"]
    chunked = small.client.post(
        TEXT, content=(b" " * 100_000 for _ in range(20)), headers={"Content-Type": "application/json"}
    )
    assert chunked.status_code == 413
    assert small.post(TEXT, prompt="a", max_tokens=1).status_code == 200


def test_a_schema_that_leads_nowhere(small):
    """llama.cpp would end the process."""
    schema = {"type": "object", "properties": {"a": {"pattern": "^[^\\x00-\\UFFFFFFFF]$"}}, "required": ["a"]}
    body = {"messages": MESSAGES, "response_format": {"type": "json_object", "schema": schema}}
    for temperature in (0, 1):
        response = small.post(CHAT, **body, temperature=temperature)
        assert response.status_code == 400 and "allows no token" in response.json()["error"]["message"]
        assert "allows no token" in stream(small, CHAT, **body, temperature=temperature)[-1]["error"]["message"]
    assert small.post(TEXT, prompt="a", max_tokens=1).status_code == 200


def test_a_model_that_computes_no_numbers(tmp_path):
    model = tiny.write_llama(tmp_path / "nan.gguf")
    tiny.write(tmp_path / "nan.gguf", model | {"output_norm.weight": model["output_norm.weight"] * np.float32(np.nan)})
    with running(tmp_path / "nan.gguf") as server:
        for _ in range(2):
            response = server.post(TEXT, prompt="a", temperature=1)
            assert response.status_code == 400 and "no numbers" in response.json()["error"]["message"]
        assert server.metric('requests_total{loop="off",outcome="refused"') == 2


def test_a_failure_of_the_engine_is_one_requests_failure(tiny_llama, monkeypatch):
    with running(tiny_llama) as server:
        before = server.post(TEXT, prompt="Once", temperature=0).json()["choices"]

        def no_memory(batch):
            raise RuntimeError("llama_decode returned 1")

        with monkeypatch.context() as broken:
            broken.setattr(server.engine.llm._ctx, "decode", no_memory)
            response = server.post(TEXT, prompt="Twice", temperature=0)
            assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert server.post(TEXT, prompt="Once", temperature=0).json()["choices"] == before


def test_a_loop_that_needs_more_memory_than_there_is(small, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    response = small.post(TEXT, prompt="a", loop="0-5x60:kv=own")
    assert response.status_code == 422 and "MB are free" in response.json()["error"]["message"]
    assert small.post(TEXT, prompt="a", max_tokens=1).status_code == 200


def test_api_key(tiny_llama):
    with running(tiny_llama, api_key="secret", cors=["https://app.example"]) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer secretx"},
        ):
            response = server.client.get("/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/health").status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert server.client.get("/v1/models", headers=key).status_code == 200
        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        allowed = server.client.options(CHAT, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = server.client.get("/v1/models", headers=key | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


# ---- who goes away, and who is slow ----------------------------------------------------------------------------------


def endless(streamed):
    body = {"prompt": "Once", "temperature": 0, "max_tokens": None, "logit_bias": NO_END, "stream": streamed}
    return json.dumps(body).encode()


def test_a_client_that_goes_frees_the_model(long):
    for streamed in (True, False):
        stopped, generated = (
            long.metric('requests_total{loop="off",outcome="stopped"'),
            long.metric("generated_tokens_total"),
        )
        first = long.raw(TEXT, endless(streamed))
        wait_for(lambda: long.metric("busy") == 1)
        waiting = [long.raw(TEXT, endless(streamed)) for _ in range(3)]
        wait_for(lambda: long.metric("waiting_requests") == 3)
        for sock in (*waiting, first):
            sock.close()
        wait_for(lambda: long.metric("busy") == 0)
        assert long.metric("waiting_requests") == 0
        assert long.metric('requests_total{loop="off",outcome="stopped"') - stopped == 4
        # far from the 16,000 that fit the context
        assert long.metric("generated_tokens_total") - generated < 8000
    assert long.post(TEXT, prompt="Once", max_tokens=2).status_code == 200


def test_a_queue_that_is_full(long, monkeypatch):
    monkeypatch.setattr("edgeloop.server.engine.MAX_WAITING", 2)
    first = long.raw(TEXT, endless(False))
    wait_for(lambda: long.metric("busy") == 1)
    waiting = [long.raw(TEXT, endless(False)) for _ in range(2)]
    wait_for(lambda: long.metric("waiting_requests") == 2)
    refused = long.post(TEXT, prompt="Once")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "busy"
    for sock in (first, *waiting):
        sock.close()
    wait_for(lambda: long.metric("busy") == 0)
    assert long.post(TEXT, prompt="Once", max_tokens=2).status_code == 200


def test_a_client_that_does_not_read_frees_the_model(long):
    generated = long.metric("generated_tokens_total")
    sock = long.raw(TEXT, endless(True), receive_buffer=4096)
    wait_for(lambda: long.metric("busy") == 1)
    assert long.post(TEXT, prompt="Once", max_tokens=2).status_code == 200  # waits until the patience has gone
    assert long.metric("generated_tokens_total") - generated < 4000 + MAX_UNREAD
    sock.close()


def test_a_slow_reader_gets_all(long):
    body = json.loads(endless(True)) | {"max_tokens": 1500}
    sock = long.raw(TEXT, json.dumps(body).encode(), receive_buffer=4096)
    received = b""
    while b"[DONE]" not in received:
        more = sock.recv(30_000)
        assert more
        received += more
        time.sleep(0.002)
    assert received.count(b'"finish_reason":null') >= 700  # bytes of a character come together
    assert b'"predicted_n":1500' in received
    sock.close()


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_models_and_loops(small, tmp_path, tiny_llama):
    (model,) = small.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["edgeloop"] == {"n_layer": 6, "architecture": "llama", "loop": "off", "n_ctx": 256}
    got = small.client.get("/v1/loop", params={"spec": "20%-60%x2:kv=own"}).json()
    assert got["loop"] == "1-3x2:kv=own" and got["order"] == [0, 1, 2, 3, 1, 2, 3, 4, 5] and got["cost"] == 1.5
    assert got["spans"] == [{"first": 1, "last": 3, "passes": 2}] and got["why"] is None
    assert got["memory_bytes"] == 3 * 2 * 2 * 16 * 2 * 256  # layers, K and V, heads, width, bytes, cells
    auto = small.client.get("/v1/loop", params={"spec": "auto"}).json()
    assert auto["loop"] == "off" and auto["why"]
    wrong = small.client.get("/v1/loop", params={"spec": "5-9x2"})
    assert wrong.status_code == 422 and wrong.json()["error"]["code"] == "invalid_loop"


def test_the_servers_own_loop_is_the_default(tiny_llama, load):
    with running(tiny_llama, loop=TINY_LOOPS[1]) as server:
        llm = load(tiny_llama)
        texts = {loop: greedy_text(llm, "Once", 8, loop) for loop in TINY_LOOPS[:2]}
        assert len(set(texts.values())) == 2
        for loop in (TINY_LOOPS[1], "off", TINY_LOOPS[1]):
            body = {"loop": loop} if loop == "off" else {}
            answer = server.post(TEXT, prompt="Once", temperature=0, max_tokens=8, **body).json()
            assert (answer["loop"], answer["choices"][0]["text"]) == (loop, texts[loop])
        assert server.client.get("/v1/models").json()["data"][0]["edgeloop"]["loop"] == TINY_LOOPS[1]


def test_tokenize(demo, demo_model, load):
    llm, text = load(demo_model), "<|im_start|>user hi 日"
    tokens = llm.tokenize(text.encode(), special=True)
    assert demo.post("/extras/tokenize", input=text).json() == {"tokens": tokens}
    assert demo.post("/extras/tokenize/count", input=text).json() == {"count": len(tokens)}
    assert demo.post("/extras/detokenize", tokens=tokens).json() == {"text": text}
    assert demo.post("/tokenize", content=text).json() == {"tokens": tokens}
    assert len(demo.post("/tokenize", content=text, parse_special=False).json()["tokens"]) > len(tokens)
    pieces = demo.post("/tokenize", content=text, with_pieces=True).json()["tokens"]
    raw = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(raw).decode() == text and [p["id"] for p in pieces] == tokens
    assert demo.post("/detokenize", tokens=tokens).json() == {"content": text}


def test_metrics(small):
    before = {loop: small.metric(f'generated_tokens_total{{loop="{loop}"') for loop in ("on", "off")}
    for loop in ("off", "1-2x2", "1-2x2"):
        assert small.post(TEXT, prompt="Once", max_tokens=3, loop=loop, logit_bias=NO_END).status_code == 200
    after = {loop: small.metric(f'generated_tokens_total{{loop="{loop}"') for loop in ("on", "off")}
    assert (after["on"] - before["on"], after["off"] - before["off"]) == (6, 3)
    assert small.metric("prompt_seconds_total") > 0 < small.metric("generation_seconds_total")


def test_page(small):
    from edgeloop.server.app import WEB

    response = small.client.get("/")
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    if not (WEB / "index.html").exists():
        pytest.skip("there is no page in this build")
    assert response.status_code == 200 and "<html" in response.text
    assert small.client.get("/web/index.html").text == response.text
    assert small.client.get("/web/../server/app.py").status_code == 404


# ---- the command -----------------------------------------------------------------------------------------------------


def serve(*arguments):
    command = [sys.executable, "-m", "edgeloop.cli", "serve", *map(str, arguments), "-t", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=os.environ)


def test_a_port_that_is_in_use(tiny_llama):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = serve(tiny_llama, "--port", port)
        out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not out
    assert err == f"Error: port {port} of 127.0.0.1 is in use; choose another with --port\n"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_amid_an_answer(tiny_llama, stop):
    process = serve(tiny_llama, "--port", 0, "-c", 16384, "--api-key", "k", "--alias", "me", "--loop", "1-2x2")
    lines = []
    while "listening" not in (lines[-1] if lines else ""):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    assert "6 layers, loop 1-2x2" in lines[0]
    url = lines[-1].split()[2].rstrip(",")
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "me"
        with client.stream(
            "POST", TEXT, content=endless(True), headers={"Content-Type": "application/json"}
        ) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(stop)
            start = time.monotonic()
            rest = "\n".join(events)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert "the server is stopping" in rest and rest.rstrip().endswith("[DONE]")
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGTERM)
    assert not out and not err, err

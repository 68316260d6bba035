"""The clients that people use, against the server on the demo model. `make test-clients` installs what this needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving import running

REASON = "needs the client packages: make test-clients"
openai = pytest.importorskip("openai", reason=REASON)

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
LOOP = "12-14x3"
GREEDY = {"temperature": 0, "max_tokens": 12}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def server(demo_model):
    with running(demo_model, n_ctx=2048, name="demo", api_key="key", patience=5) as running_server:
        running_server.client.headers["Authorization"] = "Bearer key"
        yield running_server


@pytest.fixture(scope="module")
def base(server):
    return f"{server.url}/v1"


@pytest.fixture(scope="module")
def answers(demo_model):
    """What edgeloop.Llama answers, without and with the loop."""
    from edgeloop import Llama

    llm = Llama(demo_model, n_ctx=2048, n_threads=1, n_threads_batch=1)
    texts = {}
    for loop in ("off", LOOP):
        answer = llm.create_chat_completion(MESSAGES, loop=loop, **GREEDY)
        texts[loop] = answer["choices"][0]["message"]["content"]
    llm.close()
    assert texts["off"] != texts[LOOP]
    return texts


def test_openai(base, answers):
    client = openai.OpenAI(base_url=base, api_key="key")
    assert [model.id for model in client.models.list()] == ["demo"]
    for loop in ("off", LOOP):
        answer = client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"loop": loop}, **GREEDY)
        assert answer.choices[0].message.content == answers[loop]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, extra_body={"loop": LOOP}, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content and len(deltas) > 3
    assert final.usage.prompt_tokens == answer.usage.prompt_tokens
    embedding = client.embeddings.create(model="demo", input=[QUESTION]).data[0].embedding
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5) and len(embedding) == 576
    text = client.completions.create(model="demo", prompt="Once upon a time", logprobs=2, **GREEDY).choices[0]
    assert text.text and len(text.logprobs.tokens) == len(text.logprobs.top_logprobs)


def test_openai_tools(base):
    client = openai.OpenAI(base_url=base, api_key="key")
    ask = {"model": "demo", "messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    choice = client.chat.completions.create(**ask).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*MESSAGES, choice.message, result]
    said = client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER], **GREEDY)
    assert said.choices[0].finish_reason in ("stop", "length")


def test_openai_errors(base):
    client = openai.OpenAI(base_url=base, api_key="key", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base, api_key="wrong").models.list()
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"loop": "12-99x2"})
    assert error.value.code == "invalid_loop" and error.value.param == "loop"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="demo", prompt="word " * 3000)
    assert error.value.code == "context_length_exceeded"


def test_openai_parses_into_a_class(base):
    from pydantic import BaseModel

    class Colour(BaseModel):
        name: str
        is_warm: bool

    client = openai.OpenAI(base_url=base, api_key="key")
    messages = [{"role": "user", "content": "A colour with a short name, as JSON"}]
    answer = client.chat.completions.parse(
        model="demo", messages=messages, response_format=Colour, temperature=0, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


def test_langchain(base, answers):
    langchain = pytest.importorskip("langchain_openai", reason=REASON)
    options = {"model": "demo", "base_url": base, "api_key": "key", **GREEDY}
    chat = langchain.ChatOpenAI(**options, extra_body={"loop": LOOP}, stream_usage=True)
    assert chat.invoke(QUESTION).content == answers[LOOP]
    chunks = list(chat.stream([("user", QUESTION)]))
    assert "".join(chunk.content for chunk in chunks) and any(chunk.usage_metadata for chunk in chunks)

    def get_weather(city: str) -> str:
        """The weather in a city."""

    bound = langchain.ChatOpenAI(**options | {"max_tokens": 200}).bind_tools([get_weather], tool_choice="get_weather")
    (call,) = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "get_weather" and isinstance(call["args"]["city"], str)
    texts = langchain.OpenAIEmbeddings(
        model="demo", base_url=base, api_key="key", check_embedding_ctx_length=False
    ).embed_documents(["a", "b"])
    assert len(texts) == 2 and texts[0] != texts[1]


def test_llama_index(base, answers):
    pytest.importorskip("llama_index.llms.openai_like", reason=REASON)
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model="demo",
        api_base=base,
        api_key="key",
        is_chat_model=True,
        context_window=2048,
        additional_kwargs={"extra_body": {"loop": LOOP}},
        **GREEDY,
    )
    assert llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content == answers[LOOP]
    assert "".join(piece.delta for piece in llm.stream_chat([ChatMessage(role="user", content=QUESTION)]))


def test_llm(base, answers, tmp_path):
    pytest.importorskip("llm", reason=REASON)
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: looped\n  model_name: demo\n  api_base: {base}\n  api_key_name: edgeloop\n"
    )
    (tmp_path / "keys.json").write_text('{"edgeloop": "key"}')
    command = [sys.executable, "-m", "llm", "-m", "looped", QUESTION]
    command += ["-o", "temperature", "0", "-o", "max_tokens", str(GREEDY["max_tokens"])]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=os.environ | {"LLM_USER_PATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answers["off"].strip()


def test_schemathesis(tiny_llama):
    """Requests that the schema allows and many that it does not: no failure inside, and answers as documented."""
    pytest.importorskip("schemathesis", reason=REASON)
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with running(tiny_llama, n_ctx=256) as server:
        command = [
            program,
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            checks,
            "--max-examples",
            "20",
            "--seed",
            "1",
        ]
        command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--no-color"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert server.metric('requests_total{loop="off",outcome="failed"') == 0
        assert server.metric('requests_total{loop="off",outcome="answered"') > 20

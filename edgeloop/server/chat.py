"""Messages and tools -> a prompt, and text -> tool calls.

Tool calls are written as Hermes, Qwen and their relatives write them, which every model can be told to do:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

llama-cpp-python's own handler for tools, chatml-function-calling, cannot stream unless one tool is forced, and leaves a
model that wants to answer in words no words.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator, Iterator
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import get_chat_completion_handler

from edgeloop.server import grammar
from edgeloop.server.completion import Piece, complete, overlap
from edgeloop.server.engine import Usage
from edgeloop.server.errors import RequestError
from edgeloop.server.model import ServerLlama
from edgeloop.server.types import ChatRequest, Message, NamedTool

OPEN, CLOSE = "<tool_call>", "</tool_call>"

TOOLS_PROMPT = """\
You may call functions. To call one, answer with the tag <tool_call>, a JSON object with its name and arguments, and the \
tag </tool_call>:
<tool_call>
{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}
</tool_call>
The functions are, one on each line:
"""


def complete_chat(llm: ServerLlama, body: ChatRequest, usage: Usage) -> Generator[Piece, None, None]:
    """Yields the answer to a conversation. Raises RequestError when the model's template refuses the messages."""
    prompt, stop = _render(llm, body)
    limits = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    yield from complete(
        llm,
        prompt,
        body,
        usage,
        max_tokens=min(limits, default=None),
        n_top=(body.top_logprobs or 0) if body.logprobs else None,
        stop=stop,
        gbnf=_grammar_of(body),
    )


def _grammar_of(body: ChatRequest) -> str | None:
    choice, wanted = body.tool_choice, body.response_format
    if isinstance(choice, NamedTool) or choice == "required":
        name = choice.function.name if isinstance(choice, NamedTool) else None
        return grammar.of_tool_call([tool for tool in body.used_tools if name in (None, tool.name)])
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema.json_schema if wanted.json_schema else wanted.object_schema
    return grammar.any_json() if schema is None else grammar.of_schema(schema)


def _render(llm: ServerLlama, body: ChatRequest) -> tuple[list[int], list[str]]:
    """The prompt's tokens and the template's own stop strings."""
    knows_tools = OPEN in llm.metadata.get("tokenizer.chat_template", "")
    tools = [{"type": "function", "function": tool.model_dump(exclude_none=True)} for tool in body.used_tools]
    messages = [_message(message, knows_tools) for message in body.messages]
    if tools and not knows_tools:
        _explain_tools(messages, tools)
    handler = llm._chat_handlers.get(llm.chat_format) or get_chat_completion_handler(llm.chat_format)
    recorder = _Recorder(llm)
    try:
        handler(llama=recorder, messages=messages, tools=tools if tools and knows_tools else None, stream=True)
    except (ValueError, TypeError, jinja2.TemplateError) as problem:
        raise RequestError(f"the model's chat template refuses the messages: {problem}", param="messages") from None
    return recorder.asked["prompt"], recorder.asked["stop"]


class _Recorder:
    """Stands in for the Llama of a chat handler, which renders the messages and then asks for a completion."""

    verbose = False

    def __init__(self, llm: ServerLlama):
        self.tokenize = llm.tokenize
        self.asked: dict[str, Any] = {}

    def create_completion(self, **asked: Any) -> Iterator[Any]:
        self.asked = asked
        return iter(())


def _message(message: Message, knows_tools: bool) -> dict[str, Any]:
    """A message as templates want it: one text, and the arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    text = message.text()
    calls = [{"name": c.function.name, "arguments": _parsed(c.function.arguments)} for c in message.tool_calls or []]
    if knows_tools:
        rendered = message.model_dump(exclude_none=True) | {"role": role, "content": text}
        return rendered | ({"tool_calls": [{"type": "function", "function": call} for call in calls]} if calls else {})
    if role == "tool":
        role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
    parts = [text, *(f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}" for call in calls)]
    return {"role": role, "content": "\n".join(filter(None, parts))}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _explain_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """Puts the tools in front of the system message, or of the first one: not every template takes a system message."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = "\n".join([TOOLS_PROMPT + lines[0], *lines[1:]])
    first = next((message for message in messages if message["role"] == "system"), messages[0])
    first["content"] = f"{text}\n\n{first['content']}"


class ToolCalls:
    """Takes the calls out of a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self.n_calls = 0

    def feed(self, text: str, is_last: bool = False) -> Iterator[str | dict[str, Any]]:
        """Yields texts, and calls {"id", "type", "function"} as soon as they are whole. What is no call stays text."""
        self._held += text
        while self._held:
            before, tag, rest = self._held.partition(OPEN)
            if not tag:
                # a tag may begin here, and white space before it is no text
                end = len(before) if is_last else len(before[: len(before) - overlap(before, OPEN)].rstrip())
                self._held = before[end:]
                if before[:end].strip() or not self.n_calls:
                    yield before[:end]
                return
            inside, closing, after = rest.partition(CLOSE)
            if not closing and not is_last:
                return
            if before.strip():
                yield before
            call = _call(inside)
            self.n_calls += call is not None
            yield call or tag + inside + closing
            self._held = after


def _call(text: str) -> dict[str, Any] | None:
    call = _parsed(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

"""JSON schemas -> grammars of llama.cpp. A schema comes from the network, so it is bounded before it is used."""

from __future__ import annotations

import json
import re
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from edgeloop.server.errors import RequestError
from edgeloop.server.types import Function

# the converter writes out every repetition
MAX_REPEATS = 2000  # at one place, llama.cpp's own limit
MAX_REPEATS_IN_ALL = 20_000
MAX_PARTS = 10_000

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
# a literal, a class of characters, a number of repetitions, or a name
_GRAMMAR_WORD = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}|[\w-]+')
# the converter writes a character beyond U+FFFF as two escapes, which a grammar takes for two characters
_SURROGATES = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")
_QUANTIFIER = re.compile(r"[{,]\s*(\d+)")  # both numbers of {1,5}


def any_json() -> str:
    """The grammar of any JSON value."""
    return JSON_GBNF


def of_schema(schema: Any) -> str:
    """The grammar of a JSON schema. Raises RequestError when it is wrong, too large or uses what cannot be converted."""
    _check(schema)
    try:
        gbnf = json_schema_to_gbnf(json.dumps(schema))
    except Exception as problem:  # the converter asserts, indexes and recurses
        reason = str(problem) or type(problem).__name__
        raise RequestError(f"this JSON schema cannot be used: {reason[:200]}", param="response_format") from None
    return _SURROGATES.sub(lambda pair: json.loads(f'"{pair[0]}"'), gbnf)


def of_tool_call(tools: list[Function]) -> str:
    """The grammar of a call of one of the tools, as chat.py has it written."""
    names = " | ".join(f"call-{i}" for i in range(len(tools)))
    rules = [f'root ::= "<tool_call>\\n" ({names}) "\\n</tool_call>"']
    for i, tool in enumerate(tools):
        start = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        rules.append(f'call-{i} ::= {json.dumps(start)} tool-{i}-root "}}"')
        rules.append(_with_prefix(f"tool-{i}-", of_schema(tool.parameters or {})))
    return "\n".join(rules)


def _with_prefix(prefix: str, gbnf: str) -> str:
    """A grammar with other names for its rules, so that it can be part of another one."""
    names = set(re.findall(r"^([\w-]+) ::=", gbnf, re.MULTILINE))
    return _GRAMMAR_WORD.sub(lambda word: prefix + word[0] if word[0] in names else word[0], gbnf)


def _check(schema: Any) -> None:
    """Raises RequestError for what would take all memory to write out."""
    n_parts, n_repeats, todo = 0, 0, [schema]
    while todo:
        part = todo.pop()
        n_parts += 1
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
            counts = [part[key] for key in _COUNTS if isinstance(part.get(key), int)]
            if isinstance(part.get("pattern"), str):
                counts += [int(n) for n in _QUANTIFIER.findall(part["pattern"])]
            n_repeats += sum(counts)
            if any(not 0 <= n <= MAX_REPEATS for n in counts):
                raise RequestError(f"a JSON schema repeats up to {MAX_REPEATS} times", param="response_format")
    if n_parts > MAX_PARTS or n_repeats > MAX_REPEATS_IN_ALL:
        raise RequestError("the JSON schema is too large", param="response_format")

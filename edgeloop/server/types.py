"""What requests look like: those of llama_cpp.server and OpenAI's newer fields, `loop` among them; and the answers' schemas.

What cannot be done is refused, never ignored: `n`, `suffix`, `functions`, `grammar` and the like. Fields that nobody knows
are ignored, because clients send many of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from llama_cpp.llama_types import (
    ChatCompletionLogprobs,
    ChatCompletionMessageToolCalls,
    CompletionLogprobs,
    CompletionUsage,
)
from llama_cpp.server import types as upstream
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_LOGPROBS = 20
MAX_EMBEDDING_INPUTS = 256
MAX_BIAS = 100.0

Stop = Annotated[str, Field(max_length=1000)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingFields(BaseModel):
    """What chat and plain completions share beyond llama_cpp.server's fields, or differently."""

    model_config = ConfigDict(allow_inf_nan=False)

    loop: Optional[str] = Field(
        default=None,
        description="The loop for this request, such as 12-20x3 or off; the server's own if left out.",
        examples=["12-20x3"],
    )
    stream_options: Optional[StreamOptions] = None
    temperature: float = Field(default=0.8, ge=0, le=100)
    # as edgeloop.Llama; zero or less would divide by zero
    repeat_penalty: float = Field(default=1.0, gt=0, le=100)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    stop: Optional[Union[Stop, Annotated[list[Stop], Field(max_length=64)]]] = None
    seed: Optional[int] = None
    logit_bias: Optional[dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]]] = None
    n: Optional[int] = None
    grammar: Optional[str] = None

    @model_validator(mode="after")
    def _refuse_what_cannot_be_done(self):
        if self.n not in (None, 1):
            raise ValueError(f"n={self.n} is not possible; there is one choice for each request")
        if self.grammar is not None:
            raise ValueError("grammar is not possible; use response_format with a JSON schema")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(SamplingFields, upstream.CreateCompletionRequest):
    prompt: Union[str, list[str], list[int]] = Field(
        description="A text, a list with one text, or a list of token ids.", examples=["Once upon a time"]
    )
    logprobs: Optional[int] = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _refuse_what_completions_cannot(self):
        if self.best_of not in (None, 1):
            raise ValueError(f"best_of={self.best_of} is not possible; there is one choice for each request")
        if self.suffix is not None:
            raise ValueError("suffix is not possible; write the model's own fill-in-the-middle tokens into the prompt")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs are not possible together")
        if self.text is None and any(isinstance(part, str) for part in self.prompt):
            raise ValueError("prompt must be one text; send a request for each")
        return self

    @property
    def text(self) -> Optional[str]:
        """The prompt; None if it is tokens."""
        match self.prompt:
            case str(text) | [str(text)]:
                return text
        return None


class Function(BaseModel):
    name: str = Field(pattern=r"^[ -~]{1,256}$")
    description: Optional[str] = None
    parameters: Optional[dict[str, Any]] = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: FunctionName


class FunctionCall(BaseModel):
    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    id: Optional[str] = None
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Optional[Union[str, list[TextPart]]] = None
    name: Optional[str] = None
    tool_calls: Optional[list[ToolCall]] = None
    tool_call_id: Optional[str] = None

    def text(self) -> str:
        return "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content or ""


class JsonSchema(BaseModel):
    name: Optional[str] = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's, and llama_cpp.server's json_object with a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Optional[JsonSchema] = None
    object_schema: Optional[dict[str, Any]] = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _needs_its_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format json_schema needs json_schema with a schema in it")
        return self


class ChatRequest(SamplingFields, upstream.CreateChatCompletionRequest):
    messages: list[Message] = Field(min_length=1, examples=[[{"role": "user", "content": "Hello"}]])
    max_tokens: Optional[int] = Field(default=None, ge=0, description="No limit but the context if left out.")
    max_completion_tokens: Optional[int] = Field(default=None, ge=0, description="The same as max_tokens.")
    tools: Optional[list[Tool]] = Field(default=None, max_length=128)
    tool_choice: Optional[Union[Literal["none", "auto", "required"], NamedTool]] = None
    response_format: Optional[ResponseFormat] = None
    top_logprobs: Optional[int] = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _refuse_what_chat_cannot(self):
        if self.functions is not None or self.function_call is not None:
            raise ValueError("functions are not possible; use tools")
        if self.used_tools and self.response_format and self.response_format.type != "text":
            raise ValueError("tools and response_format are not possible together")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in {
            tool.function.name for tool in self.tools or []
        }:
            raise ValueError(f"tool_choice: there is no tool named '{self.tool_choice.function.name}'")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: required, but there are no tools")
        return self

    @property
    def used_tools(self) -> list[Function]:
        return [tool.function for tool in self.tools or []] if self.tool_choice != "none" else []


class EmbeddingRequest(upstream.CreateEmbeddingRequest):
    input: Union[str, Annotated[list[str], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)]] = Field(
        examples=["The food was delicious."]
    )
    loop: Optional[str] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Optional[int] = None

    @model_validator(mode="after")
    def _refuse_what_embeddings_cannot(self):
        if self.dimensions is not None:
            raise ValueError("dimensions is not possible; an embedding is as wide as the model")
        return self


class TokenizeRequest(BaseModel):
    """llama-server's."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    tokens: list[int]


# ---- answers, for the documentation ---------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    type: str
    param: Optional[str]
    code: Optional[str]


class Error(BaseModel):
    error: ErrorBody


class Timings(BaseModel):
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Optional[CompletionLogprobs]
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    loop: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    timings: Timings


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: Optional[str]
    tool_calls: ChatCompletionMessageToolCalls = []


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: Optional[ChatCompletionLogprobs]
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    loop: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    timings: Timings


class EmbeddingData(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: Union[list[float], str] = Field(description="A unit vector; base64 of 32-bit floats if asked for.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[EmbeddingData]
    usage: EmbeddingUsage


class TokenPiece(BaseModel):
    id: int
    piece: Union[str, list[int]] = Field(description="Its bytes where they are no text.")


class TokenizeResponse(BaseModel):
    tokens: Union[list[int], list[TokenPiece]]


class DetokenizeResponse(BaseModel):
    content: str


class Health(BaseModel):
    status: Literal["ok"]


class ModelFacts(BaseModel):
    n_layer: int
    architecture: str
    loop: str
    n_ctx: int


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    edgeloop: ModelFacts


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class SpanFacts(BaseModel):
    first: int
    last: int
    passes: int


class LoopFacts(BaseModel):
    loop: str
    spans: list[SpanFacts]
    order: list[int] = Field(description="The layers in the order in which they are applied.")
    cost: float = Field(description="Layers applied with the loop / without it.")
    memory_bytes: Optional[int] = Field(description="Extra keys and values; null where only the engine knows.")
    why: Optional[str] = Field(description="For auto, where the loop comes from.")

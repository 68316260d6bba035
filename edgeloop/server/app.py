"""The routes."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from llama_cpp.server.types import (
    DetokenizeInputRequest,
    DetokenizeInputResponse,
    TokenizeInputCountResponse,
    TokenizeInputRequest,
    TokenizeInputResponse,
)
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from edgeloop import __version__, recipes
from edgeloop.errors import EdgeloopError
from edgeloop.loop import Loop
from edgeloop.server import types as t
from edgeloop.server.answers import Answer, ChatAnswer, CompletionAnswer
from edgeloop.server.chat import complete_chat
from edgeloop.server.completion import Piece, check_tokens, complete_text, embed
from edgeloop.server.engine import Engine, Job, Usage
from edgeloop.server.errors import RequestError, Stopped
from edgeloop.server.http import EventStream, Guard, error_response, watched
from edgeloop.server.model import ServerLlama

WEB = Path(__file__).parent.parent / "web"
MIN_MAX_BODY = 1 << 20
BODY_BYTES_PER_TOKEN = 16  # of the context: a body that is longer cannot be a prompt that fits
PATIENCE = 30.0  # seconds that a client may leave a stream unread


class Service:
    """What the routes share.

    Attributes:
        name: the model's, whatever name a request gives; as llama-server with one model does.
        loop: that of requests which name none, resolved.
        patience: seconds that a client may leave a stream unread.
    """

    def __init__(self, engine: Engine, name: str, patience: float):
        self.engine = engine
        self.llm = engine.llm
        self.name = name
        self.loop = engine.llm.loop
        self.patience = patience
        self.started = int(time.time())

    def resolve(self, spec: str | None) -> tuple[Loop, str | None]:
        """The loop of a request, and why where it is auto. Raises LoopError."""
        if spec is None:
            return self.loop, None
        loop, why = Loop.parse(spec), None
        if loop.is_auto:
            choice = recipes.choose(self.llm.metadata)
            loop, why = choice.loop, choice.why
        return loop.resolve(self.llm.n_layer), why

    async def pieces(self, request: Request, job: Job) -> list[Any]:
        """All of an answer; the job ends when the client goes."""
        async with watched(self.engine, job, request.receive):
            return [piece async for piece in job]

    async def answer(self, request: Request, job: Job, answer: Answer, stream: bool) -> Response:
        if not stream:
            return JSONResponse(answer.whole(await self.pieces(request, job)))
        pieces = aiter(job)
        async with watched(self.engine, job, request.receive):
            first = await anext(pieces)  # what fails before it has a status of its own

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            for chunk in answer.chunks(first):
                yield chunk
            async for piece in pieces:
                for chunk in answer.chunks(piece):
                    yield chunk

        return EventStream(self.engine, job, chunks(), self.patience)


async def _service(request: Request) -> Service:
    return request.app.state.service


Uses = Annotated[Service, Depends(_service)]

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": t.Error, "description": "The request is wrong or too long for the context."},
    401: {"model": t.Error, "description": "The API key is missing or wrong."},
    413: {"model": t.Error, "description": "The body is too large."},
    422: {"model": t.Error, "description": "The loop is wrong or does not fit the model."},
    500: {"model": t.Error, "description": "The engine failed."},
    503: {"model": t.Error, "description": "Too many requests are waiting, or the server is stopping."},
}
EVENT = {
    "type": "object",
    "description": "With stream: server-sent events.",
    "properties": {"data": {"type": "string", "description": "A chunk in JSON, at the end [DONE]."}},
    "required": ["data"],
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}

router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions", response_model=t.ChatCompletion, responses=STREAM)
async def chat_completions(request: Request, body: t.ChatRequest, service: Uses) -> Response:
    def work(llm: ServerLlama, usage: Usage) -> Generator[Piece, None, None]:
        return complete_chat(llm, body, usage)

    job = service.engine.submit(work, service.resolve(body.loop)[0])
    answer = ChatAnswer(service.name, job, body.include_usage, with_tools=bool(body.used_tools))
    return await service.answer(request, job, answer, body.stream)


@router.post("/v1/completions", response_model=t.Completion, responses=STREAM)
async def completions(request: Request, body: t.CompletionRequest, service: Uses) -> Response:
    def work(llm: ServerLlama, usage: Usage) -> Generator[Piece, None, None]:
        return complete_text(llm, body, usage)

    job = service.engine.submit(work, service.resolve(body.loop)[0])
    answer = CompletionAnswer(service.name, job, body.include_usage, offset=len(body.text or ""))
    return await service.answer(request, job, answer, body.stream)


@router.post("/v1/embeddings", response_model=t.Embeddings)
async def embeddings(request: Request, body: t.EmbeddingRequest, service: Uses) -> Response:
    def work(llm: ServerLlama, usage: Usage) -> Generator[np.ndarray, None, None]:
        return embed(llm, body, usage)

    job = service.engine.submit(work, service.resolve(body.loop)[0])
    vectors = await service.pieces(request, job)
    if body.encoding_format == "base64":
        data: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        data = [vector.tolist() for vector in vectors]
    return JSONResponse(
        {
            "object": "list",
            "model": service.name,
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(data)],
            "usage": {"prompt_tokens": job.usage.prompt_tokens, "total_tokens": job.usage.prompt_tokens},
        }
    )


@router.get("/v1/models")
async def models(service: Uses) -> t.ModelList:
    llm = service.llm
    facts = t.ModelFacts(
        n_layer=llm.n_layer, architecture=llm.info.architecture, loop=str(service.loop), n_ctx=llm.n_ctx()
    )
    model = t.Model(id=service.name, object="model", created=service.started, owned_by="edgeloop", edgeloop=facts)
    return t.ModelList(object="list", data=[model])


@router.get("/v1/loop")
async def loop(service: Uses, spec: str | None = None) -> t.LoopFacts:
    """What a loop spec means on this model."""
    found, why = service.resolve(spec)
    llm = service.llm
    return t.LoopFacts(
        loop=str(found),
        spans=[t.SpanFacts(first=span.first, last=span.last, passes=span.passes) for span in found.spans],
        order=found.expanded(llm.n_layer),
        cost=found.cost(llm.n_layer),
        memory_bytes=llm.info.loop_memory_bytes(found, llm.n_ctx()),
        why=why,
    )


# not async, so that a long text does not keep the others waiting; the vocabulary may be read in any thread


@router.post("/extras/tokenize")
def extras_tokenize(body: TokenizeInputRequest, service: Uses) -> TokenizeInputResponse:
    return TokenizeInputResponse(tokens=service.llm.tokenize(body.input.encode(), special=True))


@router.post("/extras/tokenize/count")
def extras_tokenize_count(body: TokenizeInputRequest, service: Uses) -> TokenizeInputCountResponse:
    return TokenizeInputCountResponse(count=len(service.llm.tokenize(body.input.encode(), special=True)))


@router.post("/extras/detokenize")
def extras_detokenize(body: DetokenizeInputRequest, service: Uses) -> DetokenizeInputResponse:
    return DetokenizeInputResponse(text=_text_of(service.llm, body.tokens))


@router.post("/tokenize")
def tokenize(body: t.TokenizeRequest, service: Uses) -> t.TokenizeResponse:
    """As llama-server's."""
    llm = service.llm
    tokens = llm.tokenize(body.content.encode(), add_bos=body.add_special, special=body.parse_special)
    if not body.with_pieces:
        return t.TokenizeResponse(tokens=tokens)
    pieces = [llm.detokenize([token], special=True) for token in tokens]
    return t.TokenizeResponse(tokens=[t.TokenPiece(id=i, piece=_text_or_bytes(p)) for i, p in zip(tokens, pieces)])


@router.post("/detokenize")
def detokenize(body: t.DetokenizeRequest, service: Uses) -> t.DetokenizeResponse:
    """As llama-server's."""
    return t.DetokenizeResponse(content=_text_of(service.llm, body.tokens))


def _text_of(llm: ServerLlama, tokens: list[int]) -> str:
    check_tokens(llm, tokens, "tokens")
    return llm.detokenize(tokens, special=True).decode("utf-8", "replace")


def _text_or_bytes(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


@router.get("/health")
async def health() -> t.Health:
    return t.Health(status="ok")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Uses) -> Response:
    """In the text format of Prometheus."""
    return Response(generate_latest(service.engine.registry), media_type=CONTENT_TYPE_LATEST)


async def _page() -> Response:
    return FileResponse(WEB / "index.html")


def create_app(
    engine: Engine,
    *,
    name: str,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    patience: float = PATIENCE,
) -> FastAPI:
    """The application for an engine's model, to be run by any ASGI server in one process.

    Args:
        name: the model's id.
        api_key: asked for as a bearer token, except for `/health` and the page.
        cors: origins whose pages may use the server; none by default.
        patience: seconds that a client may leave a stream unread before its answer is stopped.
    """
    max_body = max(MIN_MAX_BODY, BODY_BYTES_PER_TOKEN * engine.llm.n_ctx())
    middleware = [Middleware(Guard, api_key=api_key, max_body=max_body)]
    if cors:
        origins = Middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, origins)
    # the pages of FastAPI's documentation come from other servers
    app = FastAPI(title="edgeloop", version=__version__, docs_url=None, redoc_url=None, middleware=middleware)
    app.state.service = Service(engine, name, patience)
    app.include_router(router)
    if WEB.is_dir():
        app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
        app.mount("/web", StaticFiles(directory=WEB))
    for kind in (EdgeloopError, UnicodeEncodeError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Stopped, _on_stopped)
    return app


async def _on_error(request: Request, problem: Exception) -> Response:
    return error_response(problem)


async def _on_http_error(request: Request, problem: HTTPException) -> Response:
    return error_response(RequestError(str(problem.detail), status=problem.status_code))


async def _on_stopped(request: Request, problem: Stopped) -> Response:
    return Response(status_code=499)  # the client has gone, nobody reads it


async def _on_invalid(request: Request, problem: RequestValidationError) -> Response:
    first = problem.errors()[0]
    place = [str(part) for part in first["loc"][1:]]  # without "body" or "query"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return error_response(RequestError(f"the body is not JSON: {first['ctx']['error']}"))
    if place:
        message = f"{'.'.join(place)}: {message}"
    is_loop = place[:1] == ["loop"]
    status, code = (422, "invalid_loop") if is_loop else (400, None)
    return error_response(RequestError(message, status=status, param=place[0] if place else None, code=code))

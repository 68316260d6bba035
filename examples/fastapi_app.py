"""An endpoint that streams answers; a client that goes away stops the computation.

MODEL=model.gguf uvicorn fastapi_app:app
curl -N localhost:8000/answer --json '{"question": "Why is the sky blue?", "loop": "12-20x3"}'
"""

import os
from contextlib import asynccontextmanager

from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

import edgeloop


@asynccontextmanager
async def lifespan(app: FastAPI):
    async with edgeloop.AsyncLlama(os.environ["MODEL"], n_ctx=2048) as app.state.llm:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/answer")
async def answer(question: str = Body(), loop: str = Body("off")) -> StreamingResponse:
    try:
        pieces = app.state.llm.chat([{"role": "user", "content": question}], loop=loop, max_tokens=512)
    except edgeloop.LoopError as problem:
        raise HTTPException(422, str(problem)) from None
    return StreamingResponse(pieces, media_type="text/plain")

"""One streamed answer: python ask.py model.gguf "Why is the sky blue?" 12-20x3"""

import asyncio
import sys

import edgeloop


async def main(model: str, question: str, loop: str = "off") -> None:
    async with edgeloop.AsyncLlama(model, loop=loop, n_ctx=2048) as llm:
        async for piece in llm.chat([{"role": "user", "content": question}], temperature=0):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

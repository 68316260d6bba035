"""Images in chat messages, through the vision part of a model (its mmproj file) and llama.cpp's mtmd."""

from __future__ import annotations

import base64
import ctypes
import mimetypes
from pathlib import Path
from typing import Any

from llama_cpp import mtmd_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler, get_chat_completion_handler

from edgeloop import log
from edgeloop.errors import EdgeloopError, ModelError
from edgeloop.gguf_file import check_magic
from edgeloop.llama import Llama

MAX_IMAGE_BYTES = 50_000_000

mtmd_cpp.mtmd_helper_log_set(log.callback, ctypes.c_void_p(0))


class Vision(MTMDChatHandler):
    """The chat handler of a model that sees. Messages without an image go the ordinary way, which keeps what is evaluated.

    Raises ModelError when the mmproj file is missing, damaged or belongs to another model.
    """

    def __init__(self, llm: Llama, mmproj: str | Path):
        check_magic(mmproj)
        super().__init__(str(mmproj), verbose=llm.verbose)
        self._without_images = llm._chat_handlers.get(llm.chat_format) or get_chat_completion_handler(llm.chat_format)
        with log.collect_errors() as errors:
            try:
                self._init_mtmd_context(llm)
            except ValueError as problem:
                why = errors[0].removeprefix("error: ").splitlines()[0] if errors else problem
                raise ModelError(f"{mmproj}: is not the vision part of this model ({why})") from None

    def __call__(self, *, llama: Llama, messages: list[dict[str, Any]], **kwargs: Any):
        if not self.get_image_urls(messages):
            return self._without_images(llama=llama, messages=messages, **kwargs)
        # the places of an image have no token: what is left there must not look like the beginning of a later prompt
        llama.input_ids[:] = -1
        # all that is evaluated in here is the prompt, of which a text between two images may be a single token
        llama._phase = "prompt"
        try:
            return super().__call__(llama=llama, messages=messages, **kwargs)
        except ValueError as problem:
            if "exceeds n_ctx" in str(problem):
                raise
            raise EdgeloopError(f"the model could not read the images ({problem})") from None
        finally:
            llama._phase = None

    def load_image(self, image_url: str) -> bytes:
        """Only the data itself: a conversation that comes from a file must not fetch anything."""
        if not image_url.startswith("data:"):
            raise EdgeloopError("an image must be in the message as a data: URI")
        return super().load_image(image_url)

    def image(self, path: str | Path) -> dict[str, Any]:
        """A file as the part of a message. Raises EdgeloopError when it is not an image that can be read."""
        path = Path(path).expanduser()
        try:
            data = path.read_bytes() if path.stat().st_size <= MAX_IMAGE_BYTES else None
        except OSError as problem:
            raise EdgeloopError(f"{path}: {problem.strerror}") from None
        if data is None:
            raise EdgeloopError(f"{path}: is larger than {MAX_IMAGE_BYTES // 1_000_000} MB")
        try:
            with log.collect_errors():
                bitmap = self._create_bitmap_from_bytes(data)
        except ValueError:
            raise EdgeloopError(f"{path}: not an image that can be read; JPEG, PNG, BMP and GIF can") from None
        self._mtmd_cpp.mtmd_bitmap_free(bitmap)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return {
            "type": "image_url",
            "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"},
        }


def with_images(text: str, images: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a message: the text alone, or the images and then the text."""
    return [*images, {"type": "text", "text": text}] if images else text

"""A conversation with a model: ask, take back, ask again, compare, save. Knows nothing of terminals."""

from __future__ import annotations

import json
import os
from os.path import commonprefix
from pathlib import Path
from typing import Any, Iterator

from edgeloop import __version__
from edgeloop.errors import EdgeloopError, WriteError
from edgeloop.generate import Generation, Messages
from edgeloop.llama import Llama
from edgeloop.vision import Vision, with_images

ROLES = ("user", "assistant")  # in turns


class Chat:
    """A conversation. Between two answers `messages` holds whole exchanges, a question and its answer each.

    Args:
        sampling: keywords of Generation, such as max_tokens and temperature.
    """

    def __init__(self, llm: Llama, system: str | None = None, **sampling: Any):
        self.llm = llm
        self.system = system
        self.sampling = sampling
        self.messages: Messages = []
        self.images: Messages = []  # go with the next question
        self.generation: Generation | None = None  # the newest, which may be under way
        self.last: Generation | None = None  # made the last answer; None when the conversation was changed since

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces. One that is stopped is kept as far as it goes; without a word, nothing is."""
        question = self._question(text)
        try:
            yield from self._answer(self.messages, question)
        finally:
            if any(message is question for message in self.messages[-2:]):
                self.images = []

    def retry(self) -> Iterator[str]:
        """Yields another answer to the last question; the old one stays if there is none."""
        return self._answer(*self._last_question())

    def undo(self) -> str:
        """Takes back the last exchange; returns the text of its question."""
        self.messages, question = self._last_question()
        self.last = None
        return text_of(question)

    def _answer(self, before: Messages, question: dict[str, Any]) -> Iterator[str]:
        self.generation = generation = Generation(self.llm, self._prompt(before, question), **self.sampling)
        try:
            yield from generation
        finally:
            if generation.text:
                self.messages = [*before, question, {"role": "assistant", "content": generation.text}]
                self.last = generation

    def _question(self, text: str) -> dict[str, Any]:
        return {"role": "user", "content": with_images(text, self.images)}

    def _last_question(self) -> tuple[Messages, dict[str, Any]]:
        """What was said before the last question, and that question."""
        if not self.messages:
            raise EdgeloopError("nothing was asked yet")
        *before, question, _ = self.messages
        return before, question

    def _prompt(self, before: Messages, question: dict[str, Any]) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *before, question]

    def reset(self) -> None:
        """Forgets the conversation, not the system message and the loop."""
        self.messages, self.images, self.last = [], [], None

    def set_system(self, text: str | None) -> None:
        """Another system message, or none, from now on."""
        self.system, self.last = text, None

    def attach(self, path: str | Path) -> None:
        """An image goes with the next question. Raises EdgeloopError when it cannot be read, or the model does not see."""
        if not isinstance(self.llm.chat_handler, Vision):
            raise EdgeloopError("images need the vision part of the model; start again with --mmproj FILE")
        self.images.append(self.llm.chat_handler.image(path))

    def compare(self, text: str = "") -> Comparison:
        """A question, or the last one again, without and with the loop. The conversation stays as it is."""
        if self.llm.loop.is_off:
            raise EdgeloopError("no loop is set, so there is nothing to compare; set one with /loop SPEC")
        before, question = (self.messages, self._question(text)) if text else self._last_question()
        return Comparison(self.llm, self._prompt(before, question), self.sampling)

    def n_tokens(self) -> tuple[int, bool]:
        """The tokens of the conversation, and whether they were counted; else they are estimated, without images."""
        if self.last:
            return self.last.prompt_tokens + len(self.last.tokens), True
        texts = [text_of(message) for message in self.messages] + [self.system or ""]
        return sum(len(self.llm.tokenize(text.encode(), add_bos=False)) for text in texts), not self.messages

    def save(self, path: str | Path) -> Path:
        """Write the conversation as JSON. Only a file that is a conversation itself is replaced."""
        path = Path(path).expanduser()
        saved = {
            "edgeloop": __version__,
            "model": self._model_name(),
            "loop": str(self.llm.loop),
            "system": self.system,
            "messages": self.messages,
        }
        if path.exists():
            try:
                _read(path)
            except EdgeloopError:
                raise EdgeloopError(f"{path}: exists and is not a saved conversation; choose another name") from None
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as problem:
            part.unlink(missing_ok=True)
            raise WriteError(f"{path}: {problem.strerror}") from None
        return path

    def load(self, path: str | Path) -> list[str]:
        """Read a conversation with its system message and loop; returns what is different here, a sentence each.

        Raises EdgeloopError, and changes nothing, when the file is not a saved conversation.
        """
        saved = _read(Path(path).expanduser())
        differences = []
        if saved["model"] != self._model_name():
            differences.append(f"it was saved with {saved['model']}, this is {self._model_name()}")
        if not isinstance(self.llm.chat_handler, Vision) and any(
            isinstance(m["content"], list) for m in saved["messages"]
        ):
            raise EdgeloopError(f"{path}: has images; start again with --mmproj FILE")
        try:
            self.llm.loop = saved["loop"]
        except EdgeloopError as problem:
            differences.append(f"its loop is left out: {problem}")
        self.reset()
        self.messages, self.system = saved["messages"], saved["system"]
        return differences

    def _model_name(self) -> str:
        return Path(self.llm.model_path).name


class Comparison:
    """One prompt without and with the loop, greedily, so that only the loop makes a difference.

    Iterate: it yields the one of `plain` and `looped` that has grown.
    """

    def __init__(self, llm: Llama, prompt: Messages, sampling: dict[str, Any]):
        greedy = sampling | {"temperature": 0.0}
        self._llm = llm
        self.plain = Generation(llm, prompt, **greedy)
        self.looped = Generation(llm, prompt, **greedy)

    def __iter__(self) -> Iterator[Generation]:
        # the loop comes last, so that its keys and values are those that the next answer needs
        with self._llm.looped("off"):
            for _ in self.plain:
                yield self.plain
        for _ in self.looped:
            yield self.looped

    @property
    def is_identical(self) -> bool:
        return (self.plain.tokens, self.plain.text) == (self.looped.tokens, self.looped.text)

    @property
    def common_tokens(self) -> int:
        """Generated tokens before the answers part."""
        return len(commonprefix([self.plain.tokens, self.looped.tokens]))

    @property
    def common_text(self) -> str:
        """What both answers begin with."""
        return commonprefix([self.plain.text, self.looped.text])


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _read(path: Path) -> dict[str, Any]:
    """A saved conversation that can be used as it is; images in it are data, never addresses."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise EdgeloopError(f"{path}: {problem.strerror}") from None
    except (ValueError, RecursionError):
        raise EdgeloopError(f"{path}: not a saved conversation (no JSON)") from None
    wrong = _what_is_wrong(saved)
    if wrong:
        raise EdgeloopError(f"{path}: not a saved conversation ({wrong})")
    return saved


def _what_is_wrong(saved: Any) -> str | None:
    if not isinstance(saved, dict) or "edgeloop" not in saved:
        return "edgeloop did not write it"
    for key in ("model", "loop"):
        if not isinstance(saved.get(key), str):
            return f"'{key}' is missing"
    if not isinstance(saved.get("system"), (str, type(None))):
        return "'system' is no text"
    messages = saved.get("messages")
    if not isinstance(messages, list) or len(messages) % 2:
        return "'messages' is no list of questions and answers"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] != ROLES[i % 2]:
            return f"message {i} is not of the {ROLES[i % 2]}"
        content = message["content"]
        if not isinstance(content, str) and not (ROLES[i % 2] == "user" and _is_parts(content)):
            return f"message {i} has no text"
    return None


def _is_parts(content: Any) -> bool:
    """A text and images, as with_images makes them."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and (
            (set(part) == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str))
            or (
                set(part) == {"type", "image_url"}
                and part["type"] == "image_url"
                and isinstance(part["image_url"], dict)
                and str(part["image_url"].get("url")).startswith("data:")
            )
        )
        for part in content
    )

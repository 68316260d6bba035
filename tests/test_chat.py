"""`edgeloop chat`: the conversation against direct calls of the model, what is shown, and the program in a terminal."""

import base64
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import zlib
from functools import cache
from os.path import commonprefix

import gguf
import llama_cpp
import numpy as np
import pexpect
import pytest
import tiny
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, MTMDChatHandler

from edgeloop import Llama, LoopError, ModelError
from edgeloop.chat import Chat
from edgeloop.cli import console
from edgeloop.errors import EdgeloopError
from edgeloop.generate import ContextFull, Generation
from edgeloop.loop import Loop
from edgeloop.solvers import SOLVERS
from edgeloop.vision import Vision, with_images

LOOP = "20-22x2"
HELLO = "Say hello to Bob."  # without and with LOOP the demo model begins alike
PARIS = "What is the capital of France?"
GREEDY = {"temperature": 0.0, "max_tokens": 6}


def open_llama(path, **kwargs):
    return Llama(str(path), **{"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1} | kwargs)


@pytest.fixture(scope="module")
def llm(demo_model):
    """The model under test."""
    llm = open_llama(demo_model)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def direct(demo_model):
    """Asks another copy of the model through llama-cpp-python alone."""
    reference = open_llama(demo_model)

    @cache
    def ask(*turns, system=None, loop="off", **options):
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return reference.create_chat_completion(messages, loop=loop, **GREEDY | options)

    ask.llm = reference
    yield ask
    reference.close()


def text_of(completion):
    return completion["choices"][0]["message"]["content"]


@pytest.fixture
def chat(llm):
    llm.loop = "off"
    llm.reset()
    return Chat(llm, **GREEDY)


def said(chat):
    return [message["content"] for message in chat.messages]


def test_a_conversation_is_that_of_the_model(chat, direct):
    first = "".join(chat.ask(PARIS))
    assert first == text_of(direct(PARIS))
    chat.llm.loop = LOOP
    second = "".join(chat.ask(HELLO))
    expected = direct(PARIS, first, HELLO, loop=LOOP)
    assert second == text_of(expected)
    assert said(chat) == [PARIS, first, HELLO, second]

    last, usage = chat.last, expected["usage"]
    assert (last.prompt_tokens, len(last.tokens)) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert last.finish_reason == expected["choices"][0]["finish_reason"] == "length" and not last.is_context_full
    assert direct.llm.detokenize(last.tokens).decode() == second
    assert 0 < last.seconds_to_first < last.seconds and last.loop == LOOP
    # the tokens after the first take the time after the first
    assert last.tokens_per_second == pytest.approx(5 / (last.seconds - last.seconds_to_first), rel=0.2)
    assert chat.n_tokens() == (usage["total_tokens"], True)

    assert chat.undo() == HELLO and said(chat) == [PARIS, first]
    n, is_counted = chat.n_tokens()
    assert not is_counted and 0 < n < usage["prompt_tokens"]
    chat.reset()
    assert chat.messages == [] and chat.n_tokens() == (0, True)


def test_an_end_token_is_not_counted(chat, direct):
    chat.sampling["max_tokens"] = 12
    chat.llm.loop = "12-14x2"
    expected = direct(PARIS, loop="12-14x2", max_tokens=12)
    assert "".join(chat.ask(PARIS)) == text_of(expected)
    assert expected["choices"][0]["finish_reason"] == chat.last.finish_reason == "stop"
    assert len(chat.last.tokens) == expected["usage"]["completion_tokens"] < 12


def test_a_stopped_answer_is_kept_and_an_empty_one_is_not(chat, direct):
    pieces = chat.ask(PARIS)
    beginning = next(pieces) + next(pieces)
    pieces.close()
    assert said(chat) == [PARIS, beginning]

    # the conversation goes on from there
    assert "".join(chat.ask(HELLO)) == text_of(direct(PARIS, beginning, HELLO))

    before = said(chat)
    chat.ask("never asked").close()
    chat.sampling["max_tokens"] = 0
    assert list(chat.ask("no answer")) == [] and list(chat.retry()) == []
    assert said(chat) == before
    assert "generate" not in vars(chat.llm)  # nothing watches the model any more


def test_ctrl_c_stops_a_prompt_at_once(chat, direct):
    list(chat.ask(PARIS))
    before = said(chat)
    pieces = chat.ask("word " * 150)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    memory = llama_cpp.llama_get_memory(chat.llm.ctx)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) < 100  # the batch was not completed
    assert said(chat) == before and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "".join(chat.ask(HELLO)) == text_of(direct(*before, HELLO))


@pytest.mark.parametrize("write", [tiny.write_llama, tiny.write_gemma3, tiny.write_mamba])
def test_what_ctrl_c_leaves_is_not_used(write, tmp_path, load):
    write(tmp_path / "model.gguf")

    class PressedLlama(Llama):
        """Ctrl-C is pressed when so many tokens are evaluated at once."""

        def eval(self, tokens):
            if len(tokens) > 100:
                os.kill(os.getpid(), signal.SIGINT)
            super().eval(tokens)

    def complete(llm, prompt):
        generation = Generation(llm, prompt, max_tokens=8, temperature=0)
        list(generation)
        return generation.tokens

    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "loop": "0-1x2:kv=own"}
    llm = PressedLlama(str(tmp_path / "model.gguf"), **options)
    for prompt in ("abc", "abcd", "abcdef"):
        with pytest.raises(KeyboardInterrupt):
            complete(llm, prompt + "x" * 200)
        assert complete(llm, prompt) == complete(load(tmp_path / "model.gguf", **options), prompt)
    llm.close()


def test_retry_and_system(chat, direct):
    with pytest.raises(EdgeloopError, match="nothing was asked yet"):
        chat.retry()
    with pytest.raises(EdgeloopError, match="nothing was asked yet"):
        chat.undo()
    list(chat.ask(PARIS))
    chat.set_system("You are a pirate.")
    chat.llm.loop = LOOP
    again = "".join(chat.retry())
    assert again == text_of(direct(PARIS, system="You are a pirate.", loop=LOOP))
    assert said(chat) == [PARIS, again]


@cache
def greedy_tokens(direct, text, loop):
    """By the token, from a prompt that is written out here."""
    llm = direct.llm
    formatter = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    prompt = formatter(messages=[{"role": "user", "content": text}]).prompt
    tokens = []
    with llm.looped(loop):
        for token in llm.generate(llm.tokenize(prompt.encode(), special=True), temp=0.0):
            if token == llm.token_eos() or len(tokens) == GREEDY["max_tokens"]:
                return tokens
            tokens.append(token)


def test_compare(chat, direct):
    with pytest.raises(EdgeloopError, match="no loop is set"):
        chat.compare(HELLO)
    chat.llm.loop = LOOP
    with pytest.raises(EdgeloopError, match="nothing was asked yet"):
        chat.compare()
    chat.sampling["temperature"] = 5.0  # a comparison is greedy all the same
    comparison = chat.compare(HELLO)
    assert {id(answer) for answer in comparison} == {id(comparison.plain), id(comparison.looped)}
    plain, looped = text_of(direct(HELLO)), text_of(direct(HELLO, loop=LOOP))
    assert (comparison.plain.text, comparison.looped.text) == (plain, looped)
    assert (comparison.plain.loop, comparison.looped.loop) == ("off", LOOP)
    assert not comparison.is_identical and comparison.common_text == commonprefix([plain, looped]) != ""
    tokens = [greedy_tokens(direct, HELLO, loop) for loop in ("off", LOOP)]
    assert comparison.common_tokens == len(commonprefix(tokens)) > 0
    assert chat.messages == [] and str(chat.llm.loop) == LOOP

    # the last question, and one pass, which is the plain model
    chat.sampling["temperature"] = 0.0
    list(chat.ask(HELLO))
    before = said(chat)
    chat.llm.loop = "12-14x1"
    comparison = chat.compare()
    list(comparison)
    assert comparison.is_identical and comparison.plain.text == plain and comparison.common_tokens == len(tokens[0])
    assert said(chat) == before


def test_save_and_load(chat, direct, tmp_path):
    file = tmp_path / "a b.json"
    chat.llm.loop = LOOP
    chat.set_system("Be brief.")
    first = "".join(chat.ask(PARIS))
    assert chat.save(file) == file
    saved = json.loads(file.read_text())
    assert saved["loop"] == LOOP and saved["system"] == "Be brief." and saved["model"] in chat.llm.model_path
    assert [m["content"] for m in saved["messages"]] == [PARIS, first] and saved["edgeloop"]

    chat.llm.loop = "off"
    other = Chat(chat.llm, **GREEDY)
    assert other.load(file) == []
    assert "".join(other.ask(HELLO)) == text_of(direct(PARIS, first, HELLO, system="Be brief.", loop=LOOP))

    assert other.save(file) == file  # its own file may be replaced
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(EdgeloopError, match="exists and is not a saved conversation"):
        chat.save(tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(EdgeloopError, match="No such file"):
        chat.save(tmp_path / "no" / "folder.json")

    file.write_text(json.dumps(saved | {"model": "other.gguf", "loop": "12-99x2"}))
    chat.llm.loop = "3-4x2"
    model, loop = chat.load(file)
    assert "saved with other.gguf" in model and "it has 30 layers" in loop
    assert said(chat) == [PARIS, first] and str(chat.llm.loop) == "3-4x2"


GOOD = {"edgeloop": "0", "model": "m", "loop": "off", "system": None, "messages": []}
QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def picture(url):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("no json", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("\xff\xfe", "no JSON"),
        ("[]", "edgeloop did not write it"),
        ({}, "edgeloop did not write it"),
        (GOOD | {"loop": 3}, "'loop' is missing"),
        (GOOD | {"system": 3}, "'system' is no text"),
        (GOOD | {"messages": {}}, "no list of questions and answers"),
        (GOOD | {"messages": [QUESTION]}, "no list of questions and answers"),
        (GOOD | {"messages": [ANSWER, QUESTION]}, "message 0 is not of the user"),
        (GOOD | {"messages": [QUESTION, QUESTION]}, "message 1 is not of the assistant"),
        (GOOD | {"messages": [QUESTION, "b"]}, "message 1 is not of the assistant"),
        (GOOD | {"messages": [QUESTION | {"content": None}, ANSWER]}, "message 0 has no text"),
        (GOOD | {"messages": [QUESTION, ANSWER | {"content": []}]}, "message 1 has no text"),
        (GOOD | {"messages": [picture("file:///etc/passwd"), ANSWER]}, "message 0 has no text"),
        (GOOD | {"messages": [picture("data:,x"), ANSWER]}, "has images; start again with --mmproj"),
    ],
)
def test_a_bad_file_loses_nothing(chat, tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    chat.messages, chat.system = [QUESTION, ANSWER], "s"
    chat.llm.loop = LOOP
    with pytest.raises(EdgeloopError, match=message) as caught:
        chat.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert chat.messages == [QUESTION, ANSWER] and chat.system == "s" and str(chat.llm.loop) == LOOP


# --- pictures: a tiny model and a vision part that are made here -----------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}a:"
)


def write_mmproj(path, n_embd=tiny.N_EMBD, width=32, n_ff=64, n_layer=2, patch=8, size=32):
    """A vision part as LLaVA's: patches, positions, a transformer, two matrices. 16 tokens a picture."""
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in {
        "embedding_length": width,
        "attention.head_count": 2,
        "feed_forward_length": n_ff,
        "block_count": n_layer,
        "projection_dim": n_embd,
        "image_size": size,
        "patch_size": patch,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    shapes = {"v.patch_embd.weight": (width, 3, patch, patch), "v.position_embd.weight": ((size // patch) ** 2, width)}
    layer = {f"attn_{part}.weight": (width, width) for part in ("q", "k", "v", "out")}
    layer |= {"ffn_up.weight": (n_ff, width), "ffn_down.weight": (width, n_ff)}
    layer |= {f"ln{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    for il in range(n_layer):
        shapes |= {f"v.blk.{il}.{name}": shape for name, shape in layer.items()}
    shapes |= {"mm.0.weight": (n_embd, width), "mm.0.bias": (n_embd,)}
    shapes |= {"mm.2.weight": (n_embd, n_embd), "mm.2.bias": (n_embd,)}
    for name, values in tiny.random_tensors(shapes, 0).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_png(path, colour, size=32):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(colour) * size) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A folder with a tiny model that chats, its vision part, and two pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    model = tiny.hyperparameters("llama", 6, rope_base=1e4)
    model["metadata"]["tokenizer.chat_template"] = TEMPLATE
    shapes = tiny.common_shapes(model) | {"output.weight": (len(tiny.VOCAB), tiny.N_EMBD)}
    tiny.write(folder / "model.gguf", model | tiny.random_tensors(shapes, 0))
    write_mmproj(folder / "mmproj.gguf")
    write_png(folder / "red.png", (255, 0, 0))
    write_png(folder / "blue.png", (0, 0, 255))
    return folder


def data_uri(file):
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def test_pictures(seeing, load):
    reference = load(seeing / "model.gguf")
    reference.chat_handler = MTMDChatHandler(str(seeing / "mmproj.gguf"), verbose=False)

    def direct(*messages):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(messages)]
        return text_of(reference.create_chat_completion(messages, **GREEDY))

    def seen(file, text):
        return [{"type": "image_url", "image_url": {"url": data_uri(seeing / file)}}, {"type": "text", "text": text}]

    llm = load(seeing / "model.gguf")
    chat = Chat(llm, **GREEDY)
    with pytest.raises(EdgeloopError, match="start again with --mmproj FILE"):
        chat.attach(seeing / "red.png")
    llm.chat_handler = Vision(llm, seeing / "mmproj.gguf")
    (seeing / "text.png").write_text("no picture")
    for wrong, message in [("no.png", "No such file"), ("text.png", "not an image"), ("", "Is a directory")]:
        with pytest.raises(EdgeloopError, match=message):
            chat.attach(seeing / wrong)

    plain = "".join(chat.ask("Hi"))
    assert plain == direct("Hi")
    chat.reset()
    chat.attach(seeing / "red.png")
    red = "".join(chat.ask("Hi"))
    assert red == direct(seen("red.png", "Hi")) and chat.images == []
    assert chat.last.prompt_tokens == reference.n_tokens - len(chat.last.tokens) + 1
    follow = "".join(chat.ask("And?"))
    assert follow == direct(seen("red.png", "Hi"), red, "And?")
    chat.save(seeing / "chat.json")

    # what a picture leaves in the context is never taken for text, nor for another picture
    chat.reset()
    assert "".join(chat.ask("Hi")) == plain
    chat.reset()
    chat.attach(seeing / "blue.png")
    blue = "".join(chat.ask("Hi"))
    assert blue == direct(seen("blue.png", "Hi")) and len({plain, red, blue}) == 3

    chat.load(seeing / "chat.json")
    assert "".join(chat.retry()) == follow

    chat.messages[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(EdgeloopError, match="could not read the images"):
        list(chat.retry())


def test_a_full_context_keeps_the_conversation(seeing, load):
    llm = load(seeing / "model.gguf")
    chat = Chat(llm, **GREEDY)
    list(chat.ask("a"))
    before = said(chat)
    with pytest.raises(ContextFull) as caught:
        list(chat.ask("b" * 300))
    prompt = f"u:a;a:{before[1]};u:{'b' * 300};a:"
    assert caught.value.n_ctx == 256 and caught.value.n_tokens == len(llm.tokenize(prompt.encode()))
    assert said(chat) == before

    chat.sampling["max_tokens"] = -1
    for question in ("x" * 100, "b" * 180):  # the second answer ends within a character
        chat.reset()
        list(chat.ask(question))
        assert chat.last.is_context_full and chat.last.text and chat.n_tokens() == (256, True)

    llm.chat_handler = Vision(llm, seeing / "mmproj.gguf")
    chat.attach(seeing / "red.png")
    with pytest.raises(ContextFull):
        list(chat.ask("?" * 100))
    assert len(chat.images) == 1  # it goes with the next question still


def test_a_picture_belongs_to_the_prompt(seeing, load):
    llm = load(seeing / "model.gguf")
    llm.chat_handler = Vision(llm, seeing / "mmproj.gguf")
    pictures = [llm.chat_handler.image(seeing / f"{name}.png") for name in ("red", "blue")]
    # "-" is one token between two pictures, which alone would look like a generated one
    content = [pictures[0], {"type": "text", "text": "-"}, pictures[1]]

    def logits(loop):
        llm.loop = loop
        list(Generation(llm, [{"role": "user", "content": content}], max_tokens=1, temperature=0))
        return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()

    plain, looped = logits("off"), logits("2-3x3:naive")
    assert np.abs(plain - looped).max() > 0.1
    np.testing.assert_array_equal(logits("2-3x3:naive,scope=prompt"), looped)
    np.testing.assert_array_equal(logits("2-3x3:naive,scope=gen"), plain)


def test_a_wrong_vision_part_is_refused(seeing, load, tmp_path):
    llm = load(seeing / "model.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    for wrong, message in [
        (tmp_path / "no.gguf", "no such file"),
        (tmp_path / "text.gguf", "not a GGUF file"),
        (seeing / "model.gguf", "not the vision part of this model"),
        (write_mmproj(tmp_path / "wide.gguf", n_embd=48), r"n_embd = 64.*n_embd = 48"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            Vision(llm, wrong)
        assert "\n" not in str(caught.value)
    assert llm.chat_handler is None
    assert with_images("a", []) == "a"


def run(*arguments, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "edgeloop.cli", *map(str, arguments), "-t", "1"],
        input=stdin,
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | environment,
    )


def test_run_with_pictures(seeing, load):
    model, mmproj = (
        ["run", seeing / "model.gguf", "-p", "Hi", "-n", "6", "--temp", "0", "--json"],
        seeing / "mmproj.gguf",
    )
    red, blue = (["--image", seeing / f"{colour}.png"] for colour in ("red", "blue"))
    done = run(*model, "--mmproj", mmproj, *red, *blue, "--loop", "2-3x2")
    assert not done.stderr
    answer = json.loads(done.stdout)
    llm = load(seeing / "model.gguf", n_ctx=1024, loop="2-3x2")
    llm.chat_handler = MTMDChatHandler(str(mmproj), verbose=False)
    parts = [{"type": "image_url", "image_url": {"url": data_uri(seeing / f"{name}.png")}} for name in ("red", "blue")]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Hi"}]}]
    expected = llm.create_chat_completion(messages, max_tokens=6, temperature=0)
    assert answer["text"] == text_of(expected)
    assert answer["prompt_tokens"] == expected["usage"]["prompt_tokens"] > 32
    assert answer["completion_tokens"] == expected["usage"]["completion_tokens"] == 6
    assert answer["tokens_per_second"] > 1

    for wrong, message in [(red, "--mmproj FILE"), ([*red, "--raw"], "leave out")]:
        done = run(*model, *wrong)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


# --- what is shown --------------------------------------------------------------------------------------------------

MARKDOWN = """\
# Title

Some **bold** text and `code`,
on two lines, <b>no HTML</b>, ![x](y.png) and [a link](http://z).

9. nine
10. ten
    - inside

```python
def f(x):
    return x
```

> quoted

---
- a

- b
"""

RENDERED = """\
Title

Some bold text and code,
on two lines, <b>no HTML</b>, !x (y.png) and
a link (http://z).

  9. nine
 10. ten
      • inside

  def f(x):
      return x

▌ quoted

────────────────────────────────────────────

 • a
 • b
"""


def terminal(written, height):
    """What stands in a terminal of `height` lines and its scrollback in the end, without styles and trailing blanks."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\d*(?:;\d+)*[A-Za-z]|.", written, re.DOTALL):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif token == "\r":
            column = 0
        elif token.endswith("A") and len(token) > 1:
            row = max(row - int(token[2:-1]), len(lines) - height, 0)
        elif token == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        elif len(token) == 1:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines)


def stream_markdown(monkeypatch, text, height, pieces=None):
    from edgeloop.cli.markdown import MarkdownStream

    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("LINES", str(height))
    monkeypatch.setattr(console, "SECONDS_BETWEEN_DRAWS", 0)
    monkeypatch.setattr(console, "SHARE_OF_TIME", float("inf"))
    out = io.StringIO()
    stream = MarkdownStream(out)
    for piece in [text] if pieces is None else pieces:
        stream.write(piece)
    stream.close()
    return terminal(out.getvalue(), height)


def test_markdown(monkeypatch):
    assert stream_markdown(monkeypatch, MARKDOWN, 50) == RENDERED
    assert stream_markdown(monkeypatch, "", 50, []) == ""
    table = stream_markdown(monkeypatch, "| a | b |\n|---|--:|\n| 1 | 22 |\n| 3333 | 4 |", 50)
    assert [line.split() for line in table.splitlines() if not set(line) & set("─━")] == [
        ["a", "b"],
        ["1", "22"],
        ["3333", "4"],
    ]
    escape = "a \x1b[31mred\x1b[0m\x07 \x9b2J b"  # a model must not command the terminal
    assert stream_markdown(monkeypatch, escape, 50) == "a [31mred[0m 2J b\n"


@pytest.mark.parametrize("height", [3, 7, 12, 50])
def test_markdown_that_comes_in_pieces_ends_the_same(monkeypatch, height):
    rows = "".join(f"| {'wide' * (i // 3)} | {i} |\n" for i in range(14))
    items = "".join(f"{i}. item {i}\n" for i in range(1, 15))
    code = "".join(f"line{i} = {i}\n" for i in range(14))
    long = f"{MARKDOWN}\n{items}\n| a | b |\n|---|---|\n{rows}\n```python\n{code}```\n" + "word " * 100
    expected = stream_markdown(monkeypatch, long, 1000)
    rng = random.Random(height)
    cuts = sorted(rng.sample(range(len(long)), 80))
    pieces = [long[a:b] for a, b in zip([0, *cuts], [*cuts, len(long)])]
    got = stream_markdown(monkeypatch, long, height, pieces)
    # numbers get more room when the list reaches ten, and lines may have scrolled away by then
    assert re.sub(r"(?m)^ +(?=\d\. )", "", got) == re.sub(r"(?m)^ +(?=\d\. )", "", expected)


def test_completion_of_loops():
    from edgeloop.cli.editor import complete_loop

    def complete(spec):
        return {spec[: len(spec) - length] + word for word, length in complete_loop(spec)}

    assert complete("") == {"off", "auto"} and complete("of") == {"off"} and complete("12-20x") == set()
    assert {f"12-20x4:{solver}" for solver in SOLVERS} <= complete("12-20x4:")
    assert complete("12-20x4:an") == {"12-20x4:anchored"}
    assert complete("12-20x4:kv=f") == {"12-20x4:kv=frozen", "12-20x4:kv=first"}
    assert complete("1-2x4:kv=own,k") == set()
    # the keys that are offered are those that the parser takes
    for solver in SOLVERS:
        offered = {spec.rpartition(",")[2] for spec in complete(f"12-20x4:{solver},")}
        complete_so_far = f"12-20x4:{solver}" + (",weights=0/0/0/0/1" if SOLVERS[solver].takes_weights else "")
        for key in ("step", "alpha", "beta", "lambda", "weights", "unit", "kv", "scope", "routing", "norm"):
            with pytest.raises(LoopError) as caught:
                Loop.parse(f"{complete_so_far},{key}=?")
            assert (f"'{key}' is not a key of" not in str(caught.value)) == (f"{key}=" in offered), (solver, key)


# --- the program in a terminal ---------------------------------------------------------------------------------------

READY = "\x1b[?2004h"  # the line editor asks for bracketed paste when it begins to read
UP, CTRL_C, ESC_ENTER = "\x1b[A", "\x03", "\x1b\r"


@pytest.fixture
def terminal_chat(monkeypatch, tmp_path):
    opened = []

    def start(model, *arguments, columns=80, ready=READY, **environment):
        environment = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "EDGELOOP_HISTORY": "off"} | environment
        child = pexpect.spawn(
            sys.executable,
            ["-m", "edgeloop.cli", "chat", str(model), "--temp", "0", "-t", "1", *map(str, arguments)],
            env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment,
            encoding="utf-8",
            timeout=100,
            cwd=tmp_path,
            dimensions=(50, columns),
        )
        opened.append(child)
        child.expect_exact(ready)
        return child

    yield start
    for child in opened:
        child.close(force=True)


def tell(child, line, *expected):
    """Type a line, wait for what is expected and for the next prompt; returns what was shown, without styles."""
    child.send(line + "\r")
    shown = ""
    for pattern in (*expected, re.escape(READY)):
        child.expect(pattern)
        shown += child.before + child.after
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)


def leave(child, how="/exit\r"):
    child.send(how)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and child.signalstatus is None


def test_talking(demo_model, direct, terminal_chat, tmp_path):
    child = terminal_chat(demo_model, "--loop", LOOP, "-n", 6, "-c", 256, columns=120)
    first = text_of(direct(HELLO, loop=LOOP))
    tell(child, HELLO, re.escape(first))
    plain, looped = text_of(direct(HELLO)), first
    shown = tell(child, "/compare", "greedy", "they part after")
    tokens = [greedy_tokens(direct, HELLO, loop) for loop in ("off", LOOP)]
    assert re.search(rf"without the loop +with {LOOP}", shown)
    assert re.search(rf"{re.escape(plain)} +{re.escape(looped)}", shown)
    assert f"after {len(commonprefix(tokens))} tokens, {len(commonprefix([plain, looped]))} characters" in shown
    for line, answer in [
        ("/loop off", "loop off"),
        ("/compare", "no loop is set"),
        ("/loop 3-4x2:naive,kv=own", "loop 3-4x2:naive,kv=own, 1.07 times the layers, .* more keys and values"),
        ("/loop 3-4x99", "1 to 64 are possible"),
        ("/loop", "loop 3-4x2:naive,kv=own"),
        ("/stats", r"1 exchange, \d+ of 256 tokens"),
        ("/help", "/compare .*/load FILE"),
        ("/cmopare", "did you mean /compare?"),
        ("/xyzzy", "/help lists them"),
        ("/system Be brief.", "system message: Be brief."),
        ("/image red.png", "start again with --mmproj FILE"),
        ("/load no.json", "no.json: No such file"),
        ("/save", "no file is named"),
        ("/save 'my chat.json'", "saved in my chat.json"),
        ("word " * 300, "the context is full: .* 256 fit.*/reset"),
        ("/undo", f"taken back: {HELLO}"),
        ("/retry", "nothing was asked yet"),
        ("/load my chat.json", "1 exchange, loop 3-4x2"),
        ("/reset", "forgotten"),
    ]:
        tell(child, line, answer)
    leave(child)
    saved = json.loads((tmp_path / "my chat.json").read_text())
    assert [m["content"] for m in saved["messages"]] == [HELLO, first] and saved["system"] == "Be brief."


def test_ctrl_c_stops_the_answer_and_not_the_program(demo_model, terminal_chat):
    child = terminal_chat(demo_model, "--loop", "12-14x2")
    child.send("Write a very long story about a dog and a cat, at least two thousand words.\r")
    child.expect("Once|In |The |As ")
    child.send("typed too early")
    child.sendintr()
    child.expect("stopped")
    child.expect_exact(READY)
    tell(child, "/loop 12-13x2", "loop 12-13x2")
    tell(child, "/reset", "forgotten")
    child.send("not sent" + CTRL_C)  # clears the line
    tell(child, PARIS, "Paris")
    child.send(CTRL_C)
    child.expect("/exit leaves")
    child.expect_exact(READY)
    leave(child, "\x04")


def test_messages_of_several_lines_and_history(seeing, terminal_chat, tmp_path):
    history = tmp_path / "state" / "history"
    options = {"EDGELOOP_HISTORY": str(history)}
    child = terminal_chat(seeing / "model.gguf", "-n", 2, "--no-markdown", **options)
    pasted = "def f(x):\n    return x\n\n/reset"
    for typed in (f"\x1b[200~{pasted}\n\x1b[201~", f"one{ESC_ENTER}two", "one\\\rtwo", " /usr is a folder"):
        tell(child, typed)
    tell(child, "/save a.json", "saved")
    leave(child)
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == [pasted, "one\ntwo", "one\ntwo", " /usr is a folder"]
    assert history.stat().st_mode & 0o077 == 0  # nobody else's

    child = terminal_chat(seeing / "model.gguf", "-n", 2, **options)
    tell(child, "/loop", "loop off")
    tell(child, UP * 5)  # over /loop, /exit, /save and the last message
    tell(child, "/save b.json", "saved")
    leave(child)
    assert json.loads((tmp_path / "b.json").read_text())["messages"][0]["content"] == "one\ntwo"

    size = history.stat().st_size
    child = terminal_chat(seeing / "model.gguf", EDGELOOP_HISTORY="off")
    tell(child, "/loop", "loop off")
    leave(child)
    assert history.stat().st_size == size and not (tmp_path / "off").exists()


def test_tab_completes(seeing, terminal_chat):
    child = terminal_chat(seeing / "model.gguf")
    child.send("/lo")
    child.expect("/load")
    child.send("op 2-3x2:anc")
    child.expect(" anchored ")  # the menu
    child.send("\t")
    child.expect("hored")
    tell(child, "", "loop 2-3x2:anchored")
    leave(child)


def test_terminals_that_want_no_colour(seeing, terminal_chat):
    child = terminal_chat(seeing / "model.gguf", "-n", 2, NO_COLOR="1")
    assert "loop off" in tell(child, "/loop") and "\x1b[2m" not in child.before
    leave(child)
    child = terminal_chat(seeing / "model.gguf", "-n", 2, TERM="dumb", ready="> ")
    child.send("/loop\r")
    child.expect("loop off")
    child.expect("> ")
    assert "\x1b" not in child.before
    leave(child)


def test_from_a_pipe(demo_model, direct):
    """What goes to a file is the text alone, and a comparison marks where the answers part."""
    options = ["--temp", "0", "-n", "6", "--loop", LOOP]
    done = run("chat", demo_model, *options, stdin=f"/compare {HELLO}\nSay hello\\\nto Bob.\n")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr and "greedy" in done.stderr
    plain, looped = text_of(direct(HELLO)), text_of(direct(HELLO, loop=LOOP))
    at = len(commonprefix([plain, looped]))
    for title, text in (("without the loop", plain), (f"with {LOOP}", looped)):
        marked = re.escape(f"{text[:at]}||{text[at:]}")
        assert re.search(rf"(?m)^{title} \(6 tokens, [\d.]+ tokens/s\):\n{marked}$", done.stdout)
    *_, verdict, answer = done.stdout.splitlines()
    assert verdict.endswith(f"{at} characters, at ||") and answer == text_of(direct("Say hello\nto Bob.", loop=LOOP))

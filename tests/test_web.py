"""The page of `edgeloop serve`, in a real browser against the real server."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

import edgeloop
from edgeloop.loop import CHOICES, Loop
from edgeloop.solvers import SOLVERS

try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect, sync_playwright
except ModuleNotFoundError:
    sync_playwright = None

VENDOR = Path(edgeloop.__file__).parent / "web" / "vendor"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

N_LAYER = 30  # of the demo model
LOOP = "12-20x3"
PROMPT = "Why is the sky blue?"
MAX_TOKENS = 16
ANSWER_MS = 120_000  # for an answer on a busy machine

ENDED = ".footer:is([data-state=done], [data-state=cut])"
LAST_ANSWER = ".turns > li:last-child"


@contextmanager
def serving(model, *options):
    command = [sys.executable, "-m", "edgeloop.cli", "serve", model, "--port", "0", "-t", "1", *options]
    # not in the source folder, which has no built libraries
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"listening on (http://\S+),", line):
                    break
            else:
                pytest.fail("the server did not start: " + "".join(said))
            yield found[1], process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(demo_model):
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    with serving(demo_model, "--loop", LOOP, "-c", "2048") as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None:
        pytest.skip("playwright and axe are not installed; `make test-web` does that")
    if CHROMIUM is None:
        pytest.skip("there is no chromium; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
            yield browser


@contextmanager
def open_page(browser, url, **options):
    """A page that stayed without errors and asked no other origin for anything."""
    problems = []
    with browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options) as context:
        page = context.new_page()
        # a browser counts every refused request as an error, and a wrong loop is refused with 422, a wrong key with 401
        refused = re.compile("status of (401|422)")
        page.on(
            "console",
            lambda m: m.type in ("error", "warning") and not refused.search(m.text) and problems.append(m.text),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(request.url))
        page.goto(url)
        yield page
    assert not problems


@pytest.fixture
def page(browser, server):
    with open_page(browser, server) as page:
        page.get_by_label("Tokens at most").fill(str(MAX_TOKENS))
        yield page


def get(url):
    with urllib.request.urlopen(url) as response:
        return response.read().decode()


def answer_of(server, prompt, loop):
    """What the API says at temperature 0. Ask with another loop in between: a prompt of which the beginning is known is
    evaluated in another batch, and the last bits of that may be another answer."""
    body = {"messages": [{"role": "user", "content": prompt}], "loop": loop, "temperature": 0, "max_tokens": MAX_TOKENS}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(get(request))["choices"][0]["message"]["content"]


def send(page, text, view="chat"):
    page.fill(f"#message-{view}", text)
    page.press(f"#message-{view}", "Enter")


def set_loop(page, spec):
    """Type a spec and wait until the server has answered."""
    with page.expect_response(lambda response: f"spec={quote(spec, safe='')}" in response.url):
        page.fill("#loop", spec)


def test_libraries_are_as_published():
    rows = re.findall(r"^\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|$", (VENDOR / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {str(path.relative_to(VENDOR)) for path in VENDOR.rglob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_opens(page, server):
    expect(page).to_have_title("edgeloop")
    expect(page.locator(".model")).to_contain_text(f"llama, {N_LAYER} layers")
    expect(page.locator("#loop")).to_have_value(LOOP)
    with urllib.request.urlopen(server) as response:
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]


def test_an_answer_streams(page, server):
    page.evaluate("""() => {
        window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector(".markdown")?.textContent.length))
            .observe(document.body, { subtree: true, childList: true, characterData: true });
    }""")
    plain = answer_of(server, PROMPT, "off")
    send(page, PROMPT)
    expect(page.locator(f"{LAST_ANSWER} {ENDED}")).to_have_text(
        re.compile(r"(cut off, )?\d+ tokens, [\d.]+ tokens/s"), timeout=ANSWER_MS
    )
    expect(page.locator(f"{LAST_ANSWER} h3 code")).to_have_text(LOOP)
    shown = page.locator(f"{LAST_ANSWER} .markdown").text_content()
    assert answer_of(server, PROMPT, "off") == plain
    assert re.findall(r"\w+", shown) == re.findall(r"\w+", answer_of(server, PROMPT, LOOP))
    assert len(page.evaluate("[...lengths]")) > 5
    assert shown.strip() in page.locator(".chat [role=status]").text_content()  # said once, when it is whole


def test_a_conversation_is_remembered(page):
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    send(page, "I am Ada. <b>Hello!</b>")
    page.wait_for_selector(f"{LAST_ANSWER} {ENDED}", timeout=ANSWER_MS)
    set_loop(page, "off")
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Who am I?")
    body = asked.value.post_data_json
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in body["messages"]][:2] == ["Be brief.", "I am Ada. <b>Hello!</b>"]
    assert (body["loop"], body["temperature"], body["max_tokens"]) == ("off", 0.5, MAX_TOKENS)
    page.wait_for_selector(f"{LAST_ANSWER} {ENDED}", timeout=ANSWER_MS)
    expect(page.locator(".turns h3")).to_have_text(["You", LOOP, "You", "Loop off"])
    expect(page.locator(".turns .plain").first).to_have_text("I am Ada. <b>Hello!</b>")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".turns > li")).to_have_count(0)
    expect(page.locator("#message-chat")).to_be_focused()


WRONG = ["12-20x", "12-40x3", "12-20x3:eulr", "12-20x3:rk4", "", "1-2x3+2-4x2", "é"]


def test_a_wrong_loop(page):
    for spec in WRONG:
        set_loop(page, spec)
        with pytest.raises(ValueError) as problem:
            Loop.parse(spec).resolve(N_LAYER)
        expect(page.locator("#loop-error")).to_have_text(str(problem.value))
        expect(page.locator("#loop")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#loop-error")).to_have_attribute("aria-live", "polite")
    assert "loop-error" in page.get_attribute("#loop", "aria-describedby")
    expect(page.locator("rect.layer.looped")).to_have_count(9)  # the last right one
    send(page, PROMPT)
    expect(page.locator("#loop")).to_be_focused()
    expect(page.locator(".turns > li")).to_have_count(0)
    set_loop(page, LOOP)
    expect(page.locator("#loop")).to_have_attribute("aria-invalid", "false")
    expect(page.locator("#loop-error")).to_be_empty()


PICTURES = [
    # spec, labels, blocks of further passes
    ("13-20x3", ["×3"], 2),
    ("4-4x2+12-20x4:anchored,beta=0.3", ["×2", "×4"], 1 + 3),
    ("4-6x2+12-20x4:unit=layer", ["×2", "×4"], 3 + 9),
    ("40%-55%x3", ["×3"], 2),
    ("8-10x1", [], 0),
    ("auto", [], 0),  # there is no recipe for this model
    ("off", [], 0),
]


def test_the_picture(page):
    for spec, times, n_blocks in PICTURES:
        set_loop(page, spec)
        loop = Loop.parse("off" if spec == "auto" else spec).resolve(N_LAYER)
        looped = {il for span in loop.spans if span.passes > 1 for il in range(span.first, span.last + 1)}
        expect(page.locator(".times")).to_have_text(times)
        expect(page.locator("rect.pass")).to_have_count(n_blocks)
        is_looped = page.locator("rect.layer").evaluate_all("all => all.map(rect => rect.matches('.looped'))")
        assert is_looped == [il in looped for il in range(N_LAYER)]
        means = page.locator("#loop-means")
        if loop.spans:
            applied = len(loop.expanded(N_LAYER))
            expect(means).to_contain_text(f"{loop.cost(N_LAYER):.2f}× the layers: {applied} applied")
        else:
            expect(means).to_contain_text("no recipe is known" if spec == "auto" else "The plain model")
        said = page.get_by_role("img", name=f"{N_LAYER} layers").get_attribute("aria-label")
        assert all(f"layers {s.first} to {s.last} make {s.passes} passes" in said for s in loop.spans if s.passes > 1)


def test_the_controls_write_the_spec(page):
    field = page.locator("#loop")
    first, last, passes = (page.get_by_role("slider", name=n) for n in ("First layer", "Last layer", "Passes"))
    first.press("ArrowRight")
    last.press("ArrowLeft")
    passes.press("ArrowRight")
    expect(field).to_have_value("13-19x4")
    first.fill("25")  # past the end, which goes along
    expect(field).to_have_value("25-25x4")
    last.fill("10")
    passes.fill("3")
    expect(field).to_have_value("10-10x3")
    page.get_by_label("K/V").select_option("own")
    page.get_by_label("Solver").select_option("rk4")  # which makes four passes a step
    expect(field).to_have_value("10-10x4:rk4,kv=own")
    expect(page.locator("#loop-means")).to_contain_text("MB extra memory")

    page.get_by_role("button", name="Add a span").click()
    expect(field).to_have_value("10-10x4+12-15x4:rk4,kv=own")
    first.first.fill("29")  # the neighbour is in the way
    expect(field).to_have_value("11-11x4+12-15x4:rk4,kv=own")
    expect(first.first).to_have_value("11")
    page.get_by_role("button", name="Remove span 1").click()
    expect(field).to_have_value("12-15x4:rk4,kv=own")

    switch = page.get_by_role("switch", name="Loop")
    switch.click()
    expect(field).to_have_value("off")
    expect(first).to_have_count(0)
    switch.click()
    expect(field).to_have_value("12-15x4:rk4,kv=own")
    expect(page.locator("#loop-error")).to_be_empty()


def test_the_controls_follow_the_spec(page):
    set_loop(page, "40%-55%x6:heavy-ball,alpha=0.4,beta=0.1,scope=gen,kv=first")
    values = [page.get_by_role("slider", name=name) for name in ("First layer", "Last layer", "Passes")]
    values += [page.get_by_role("combobox", name=name) for name in ("Solver", "K/V")]
    for control, value in zip(values, ("12", "16", "6", "heavy-ball", "first")):
        expect(control).to_have_value(value)
    values[0].press("ArrowLeft")
    expect(page.locator("#loop")).to_have_value("11-16x6:heavy-ball,alpha=0.4,beta=0.1,scope=gen,kv=first")
    values[3].select_option("naive")  # which takes no numbers
    expect(page.locator("#loop")).to_have_value("11-16x6:naive,scope=gen,kv=first")
    set_loop(page, "3-4x2:poly,weights=0/0.5/0.5")
    expect(values[3]).to_have_value("poly")


def test_the_controls_offer_all_there_is(page):
    names = page.get_by_label("Solver").locator("option").all_text_contents()
    assert {*names, "poly"} == set(SOLVERS)
    assert len(names) == len(SOLVERS) - 1
    kv = page.get_by_label("K/V").locator("option")
    assert tuple(kv.evaluate_all("all => all.map(option => option.value)")) == CHOICES["kv"]


def side(page, i):
    """The text of an answer, what of it is not marked, and what is before the parting."""
    return page.locator(f"article:nth-of-type({i}) .plain").evaluate("""plain => {
        const copy = plain.cloneNode(true);
        const before = document.createRange();
        before.setStart(copy, 0);
        const parting = copy.querySelector(".parting");
        if (parting) before.setEndBefore(parting);
        const same = before.toString();
        parting?.remove();
        const text = copy.textContent;
        copy.querySelectorAll("mark").forEach(mark => mark.remove());
        return [text, copy.textContent, same];
    }""")


def test_compare(page, server):
    page.get_by_role("link", name="Compare").click()
    send(page, PROMPT, "compare")
    page.wait_for_selector(f"article:nth-of-type(1) {ENDED}", timeout=ANSWER_MS)
    assert page.locator(f"article:nth-of-type(2) {ENDED}").count() == 0  # one after the other
    page.wait_for_selector(f"article:nth-of-type(2) {ENDED}", timeout=ANSWER_MS)
    (left, left_rest, left_same), (right, right_rest, right_same) = side(page, 1), side(page, 2)
    plain, looped = answer_of(server, PROMPT, "off"), answer_of(server, PROMPT, LOOP)
    assert (left, right) == (plain, looped)
    assert plain != looped, "this prompt shows nothing"

    common = os.path.commonprefix([plain, looped])
    assert left_same == right_same and common.startswith(left_same) and not re.search(r"\s", common[len(left_same) :])
    assert left_rest.split() == right_rest.split()  # what is not marked is the same
    assert page.locator("article mark").count() > 0
    decoration = page.locator("mark").first.evaluate("mark => getComputedStyle(mark).textDecorationLine")
    assert decoration == "underline"  # not by colour alone

    n_same = len(re.findall(r"[\w'’]+", left_same))
    expect(page.locator(".summary")).to_contain_text(f"agree for {n_same} word")
    expect(page.locator(".summary")).to_contain_text(re.compile(r"A token took [\d.]+ times as long"))
    expect(page.locator("article h3")).to_have_text(["Loop off", LOOP])


def test_compare_with_the_plain_model(page):
    page.goto(page.url + "#compare")
    set_loop(page, "12-20x1")
    send(page, "Name a colour.", "compare")
    expect(page.locator(".summary")).to_contain_text("Both answers are the same", timeout=ANSWER_MS)
    assert page.locator("article :is(mark, .parting)").count() == 0
    expect(page.locator("#message-compare")).to_have_value("Name a colour.")  # for the next loop


def test_differences(page):
    draw = random.Random(1)
    words = ["the", "sky", "is", "blue", ",", "not", "green.", "\n", "Das", "空は青い", "é", "1.5"]
    texts = ["", "the", *(" ".join(draw.choices(words, k=draw.randrange(1, 40))) for _ in range(100))]
    pairs = [(a, draw.choice([a, draw.choice(texts), a + " sky", a[: len(a) // 2]])) for a in texts for _ in range(4)]
    found = page.evaluate(
        "async pairs => { const { compare } = await import('./web/differences.js'); return pairs.map(([a, b]) => compare(a, b)); }",
        pairs,
    )
    for (a, b), result in zip(pairs, found):
        left, right = result["left"], result["right"]
        assert (
            result["same"] + "".join(r["text"] for r in left),
            result["same"] + "".join(r["text"] for r in right),
        ) == (a, b)
        assert result["parted"] == (a != b)
        kept = ["".join(r["text"] for r in runs if not r["differs"]).split() for runs in (left, right)]
        assert kept[0] == kept[1]
        assert 0 <= result["shared"] <= 1 and (a != b or not any(r["differs"] for r in left + right))


@pytest.mark.parametrize("how", ["button", "key"])
@pytest.mark.parametrize("view", ["chat", "compare"])
def test_stop(page, server, view, how):
    page.goto(page.url + f"#{view}")
    page.get_by_label("Tokens at most").fill("1920")
    send(page, "Write a long story about a lighthouse, with many chapters.", view)
    page.wait_for_selector(f"#message-{view} ~ .stop")
    page.wait_for_selector(".footer[data-state=streaming]", timeout=ANSWER_MS)
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.press(f"#message-{view}", "Escape")
    expect(page.locator(".footer[data-state=stopped]")).to_contain_text("stopped")
    expect(page.locator(f"#message-{view} ~ [type=submit]")).to_have_text("Send" if view == "chat" else "Compare")
    shown = page.locator(".turns" if view == "chat" else ".columns").text_content()
    for _ in range(50):
        if "edgeloop_busy 0.0" in get(f"{server}/metrics"):
            break
        page.wait_for_timeout(200)
    else:
        pytest.fail("the server still generates")
    assert page.locator(".turns" if view == "chat" else ".columns").text_content() == shown


def test_keyboard(page):
    def back_to(selector):
        """Shift+Tab until there; how often. The focus is seen all the way."""
        for n in range(1, 20):
            page.keyboard.press("Shift+Tab")
            style = "style => [style.outlineStyle, style.outlineWidth]"
            line, width = page.evaluate(f"({style})(getComputedStyle(document.activeElement))")
            assert line != "none" and float(width.removesuffix("px")) >= 2
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return n
        pytest.fail(f"{selector} is not reached")

    page.reload()
    message = page.locator("#message-chat")
    expect(message).to_be_focused()
    n_stops = back_to("#loop")
    page.keyboard.press("Control+a")
    page.keyboard.type("14-16x2")
    for _ in range(n_stops):
        page.keyboard.press("Tab")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    expect(page.locator(f"{LAST_ANSWER} .plain")).to_have_text("Hello\nthere")
    expect(page.locator(f"{LAST_ANSWER} h3 code")).to_have_text("14-16x2")
    page.keyboard.press("Escape")
    expect(page.locator(f"{LAST_ANSWER} .footer")).to_contain_text("stopped")
    expect(message).to_be_focused()
    back_to(".skip")
    page.keyboard.press("Enter")
    expect(message).to_be_focused()


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "![x](https://example.com/x.png)",
    "[x](javascript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "<a href='https://example.com' onclick='window.hacked=1' style='position:fixed;inset:0'>x</a>",
    "<svg><style><img src=x onerror=window.hacked=1></style></svg>",
    "<form action='https://example.com'><input name=key></form>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "```html\n<script>window.hacked=1</script>\n```",
    '[x](https://example.com "\\" onmouseover=\\"window.hacked=1")',
]


def test_markdown_is_harmless(page):
    for text in HOSTILE:
        found = page.evaluate(
            """async text => {
                const { render } = await import("./web/markdown.js");
                const box = document.querySelector("main").appendChild(document.createElement("div"));
                box.innerHTML = render(text);
                const all = [...box.querySelectorAll("*")];
                return [all.map(e => e.localName), all.flatMap(e => e.getAttributeNames()), box.textContent,
                        [...box.querySelectorAll("a")].map(a => a.protocol)];
            }""",
            text,
        )
        tags, attributes, shown, protocols = found
        assert set(tags) <= {"p", "a", "pre", "code"}, text
        assert set(attributes) <= {"href", "target", "rel"}, text
        assert set(protocols) <= {"https:", ":"}, text
        if text.startswith(("<", "`")):
            assert re.findall(r"\w+", shown) == re.findall(r"\w+", text.replace("```html", "")), "shown, not obeyed"
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None


def test_markdown_is_rendered(page):
    text = "# A\n\n1. *b*\n2. `c`\n\n> d\n\n| e | f |\n|---|---|\n| 1 | 2 |\n\n[g](https://example.com)"
    html = page.evaluate("async text => (await import('./web/markdown.js')).render(text)", text)
    for part in ("<h4>A</h4>", "<li><em>b</em></li>", "<li><code>c</code></li>", "<blockquote>", "<td>1</td>"):
        assert part in html
    assert re.search(r'<a(?=.* href="https://example\.com")(?=.* rel="noopener noreferrer").*>g</a>', html)


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser, server, scheme, width):
    def check(state):
        results = Axe().run(page)
        assert results.violations_count == 0, f"{state}: {results.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state

    with open_page(browser, server, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        page.wait_for_selector("#message-chat")
        check("empty")
        if width == 360:
            expect(page.locator("#loop")).to_be_hidden()
            page.get_by_role("button", name="Loop and settings").click()
        page.get_by_label("Tokens at most").fill(str(MAX_TOKENS))
        send(page, PROMPT)
        page.wait_for_selector(f"{LAST_ANSWER} {ENDED}", timeout=ANSWER_MS)
        check("chat")
        set_loop(page, "12-20x")
        expect(page.locator("#loop-error")).not_to_be_empty()
        check("a wrong loop")
        set_loop(page, "4-6x2+12-20x4:unit=layer")
        page.get_by_role("link", name="Compare").click()
        send(page, PROMPT, "compare")
        page.wait_for_selector(f"article:nth-of-type(2) {ENDED}", timeout=ANSWER_MS)
        check("compare")


def test_reduced_motion(browser, server):
    for motion, animation in (("reduce", "none"), ("no-preference", "breathe")):
        with open_page(browser, server, reduced_motion=motion) as page:
            page.wait_for_selector("#message-chat")
            name = page.evaluate("""() => {
                const footer = document.querySelector("main").appendChild(document.createElement("p"));
                footer.className = "footer";
                footer.dataset.state = "waiting";
                return getComputedStyle(footer, "::before").animationName;
            }""")
            assert name == animation


def test_key_and_a_server_that_goes(browser, tiny_llama):
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    with serving(tiny_llama, "--api-key", "sesame") as (url, process):
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(url)
            page.get_by_label("API key").fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#key-problem")).to_contain_text("wrong")
            assert Axe().run(page).violations_count == 0
            page.get_by_label("API key").fill("sesame")
            page.keyboard.press("Enter")
            expect(page.locator(".model")).to_contain_text("6 layers")
            page.get_by_role("switch", name="Loop").click()
            expect(page.locator("#loop")).to_have_value("1-4x3")
            page.get_by_label("Tokens at most").fill(str(MAX_TOKENS))
            send(page, "Hello")
            page.wait_for_selector(f"{LAST_ANSWER} {ENDED}", timeout=ANSWER_MS)
            page.reload()
            expect(page.locator(".model")).to_contain_text("6 layers")  # the key is remembered

            process.terminate()
            process.wait()
            send(page, "Hello?")
            expect(page.get_by_role("alert")).to_contain_text("The server does not answer")

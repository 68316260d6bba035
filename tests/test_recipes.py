"""`auto`, and the recipes that are carried."""

import json
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import tiny
import tiny_more
from test_engine_oracle import PLAINLY_DIFFERENT, distance, evaluate

from edgeloop import Loop, LoopError, gguf_tools, recipes
from edgeloop.gguf_file import GGUFFile


def model(architecture, layers, width, feed_forward, **more):
    """What a GGUF file says of a model, from its public configuration; values are strings, as llama.cpp gives them."""
    numbers = {"block_count": layers, "embedding_length": width, "feed_forward_length": feed_forward} | more
    name = numbers.pop("name", "a name that tells nothing")
    return {"general.architecture": architecture, "general.name": name} | {
        f"{architecture}.{key}": str(value) for key, value in numbers.items()
    }


MODELS = {
    "Qwen3-4B": model("qwen3", 36, 2560, 9728, context_length=262144),
    "Qwen3-1.7B": model("qwen3", 28, 2048, 6144, context_length=40960),
    "Llama-3.2-3B": model("llama", 28, 3072, 8192, vocab_size=128256),
    "Qwen3-30B-A3B": model("qwen3moe", 48, 2048, 6144, expert_count=128, expert_used_count=8),
    "Moonlight-16B-A3B": model("deepseek2", 27, 2048, 11264, expert_count=64, expert_used_count=6, context_length=8192),
    "DeepSeek-V2-Lite": model(
        "deepseek2", 27, 2048, 10944, expert_count=64, expert_used_count=6, context_length=163840
    ),
    "Qwen1.5-MoE-A2.7B": model("qwen2moe", 24, 2048, 5632, expert_count=60, expert_used_count=4),
    "Qwen2.5-3B": model("qwen2", 36, 2048, 11008),
    "Gemma-2-2B": model("gemma2", 26, 2304, 9216),
    "Gemma-2-9B": model("gemma2", 42, 3584, 14336),
    "Qwen2-72B": model("qwen2", 80, 8192, 29568, name="Qwen2-72B-Instruct"),
}
NEIGHBOURS = {
    "Qwen3-0.6B": model("qwen3", 28, 1024, 3072),
    "Qwen3-8B": model("qwen3", 36, 4096, 12288),
    "Qwen3-Embedding-4B": model("qwen3", 36, 2560, 9728, pooling_type=3),
    "Qwen3-VL-4B": model("qwen3vl", 36, 2560, 9728),
    "Qwen3-235B-A22B": model("qwen3moe", 94, 4096, 12288, expert_count=128, expert_used_count=8),
    "Qwen2.5-7B": model("qwen2", 28, 3584, 18944),
    "Qwen2.5-72B": model("qwen2", 80, 8192, 29568, name="Qwen2.5 72B Instruct"),
    "Qwen1.5-72B": model("qwen2", 80, 8192, 24576, name="Qwen1.5-72B"),
    "RYS-XLarge": model("qwen2", 87, 8192, 29568, name="calme-2.1-qwen2-72b"),
    "Llama-3.2-1B": model("llama", 16, 2048, 8192),
    "Llama-3.1-8B": model("llama", 32, 4096, 14336),
    "Gemma-2-27B": model("gemma2", 46, 4608, 36864),
    "DeepSeek-V2": model("deepseek2", 60, 5120, 12288, expert_count=160, expert_used_count=6),
    "Kimi-VL-A3B": model("deepseek2", 27, 2048, 11264, expert_count=64, expert_used_count=6, context_length=131072),
    "Qwen2-57B-A14B": model("qwen2moe", 28, 3584, 18944, expert_count=64, expert_used_count=8),
    "SmolLM2-135M": model("llama", 30, 576, 1536),
}


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """A folder of their own for the recipes of the user."""
    monkeypatch.setenv("EDGELOOP_CONFIG", str(tmp_path / "config"))
    folder = tmp_path / "config" / "recipes"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def carried():
    return {recipe.name: recipe for recipe in recipes.load_recipes()}


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_fits_its_own_model(carried, name):
    assert [recipe.name for recipe in carried.values() if recipe.fits(MODELS[name])] == [name]
    recipe = carried[name]
    assert recipe.loop == recipe.loop.resolve(recipe.match["block_count"])  # in layers that the model has
    choice = recipes.choose(MODELS[name])
    assert choice.loop == (recipe.loop if recipe.recommended else Loop.parse("off"))
    assert str(recipe.loop) in choice.why and name in choice.why and "\n" not in choice.why


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_no_recipe_fits_a_neighbour(carried, name):
    assert not [recipe.name for recipe in carried.values() if recipe.fits(NEIGHBOURS[name])]


def test_a_recipe_needs_every_line_of_its_match(carried):
    for name, metadata in MODELS.items():
        match = carried[name].match
        for key in match.keys() - {"architecture", "name"}:
            assert not carried[name].fits(metadata | {f"{match['architecture']}.{key}": "3"}), (name, key)
    assert carried["Qwen2-72B"].fits(MODELS["Qwen2-72B"] | {"general.name": "calme-2.1-qwen2-72b"})


def test_the_evidence_of_the_recipes(carried):
    assert carried.keys() == MODELS.keys()
    for recipe in carried.values():
        assert recipe.evidence and all(e.task and e.source for e in recipe.evidence)
        assert {e.kind for e in recipe.evidence} <= {"published", "follow-up", "replication"}
        assert all(e.interval is None or e.interval[0] < e.gain < e.interval[1] for e in recipe.evidence)
        # a recipe is recommended only for a gain that others found as well, and certainly
        certain = any(e.kind == "replication" and e.interval and e.interval[0] > 0 for e in recipe.evidence)
        assert recipe.recommended == certain and bool(recipe.doubt) != recipe.recommended
    for name in ("Qwen2.5-3B", "Llama-3.2-3B", "Gemma-2-2B"):
        assert "replication found no gain" in recipes.choose(MODELS[name]).why


WRITERS = {
    "llama": tiny.write_llama,
    "gemma2": tiny.write_gemma3,
    "qwen2": tiny_more.write_qwen2,
    "qwen3": tiny_more.write_qwen3,
    "qwen2moe": tiny_more.write_qwen3moe,
    "qwen3moe": tiny_more.write_qwen3moe,
    "deepseek2": tiny_more.write_deepseek2,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loops_run(carried, load, tmp_path, name):
    """On a small model of the same kind."""
    recipe = carried[name]
    WRITERS[recipe.match["architecture"]](tmp_path / "tiny.gguf")
    span = recipe.loop.spans[0]
    llm = load(tmp_path / "tiny.gguf", n_ctx=64, logits_all=True)
    looped, plain = (evaluate(llm, spec) for spec in (str(recipe.loop).replace(str(span), f"1-4x{span.passes}"), "off"))
    assert np.isfinite(looped).all() and distance(looped, plain) > PLAINLY_DIFFERENT


def test_the_file_comes_first(tiny_llama, tmp_path, load):
    tagged = tmp_path / "tagged.gguf"
    gguf_tools.tag(tiny_llama, tagged, "2-3x4:naive")
    assert gguf_tools.inspect(tagged).loop == "2-3x4:naive"
    assert load(tagged, loop="auto", n_ctx=64).loop == Loop.parse("2-3x4:naive")
    assert load(tiny_llama, loop="auto", n_ctx=64).loop.is_off
    metadata = MODELS["Qwen3-4B"] | {recipes.METADATA_KEY: "1-2x2"}
    assert recipes.choose(metadata) == recipes.Choice(Loop.parse("1-2x2"), "loop 1-2x2 from the file's own metadata")


def test_a_wrong_loop_in_the_file_is_an_error():
    with pytest.raises(LoopError, match="is not a span"):
        recipes.choose({recipes.METADATA_KEY: "nonsense"})


def test_without_a_recipe_the_loop_stays_off():
    choice = recipes.choose(NEIGHBOURS["SmolLM2-135M"])
    assert choice.loop.is_off and "no recipe is known" in choice.why
    assert Loop.parse("45%-55%x3").resolve(30)  # what it proposes


# ---- recipes of the user -------------------------------------------------------------------------------------------

OWN = """
name = "mine"
loop = "1-2x2"
[match]
architecture = "qwen3"
block_count = 36
"""


def test_recipes_of_the_user_come_first(config):
    (config / "mine.toml").write_text(OWN)
    choice = recipes.choose(MODELS["Qwen3-4B"])
    assert choice.loop == Loop.parse("1-2x2") and "recipe for mine: it gives no evidence" in choice.why
    (config / "mine.toml").write_text(OWN.replace('"1-2x2"', '"1-2x2"\ndoubt = "it is late"'))
    choice = recipes.choose(MODELS["Qwen3-4B"])
    assert choice.loop.is_off and "not recommended, it is late; --loop '1-2x2' tries it" in choice.why
    assert recipes.choose(MODELS["Qwen3-1.7B"]).why != choice.why


@pytest.mark.parametrize(
    "change, message",
    [
        (("1-2x2", "1-2y2"), "is not a span"),
        (("1-2x2", "auto"), "not auto"),
        (('name = "mine"', ""), "needs name"),
        (("[match]", "[fits]"), "'fits' is not a key here; there are doubt, evidence, loop, match, name, recommended"),
        (('architecture = "qwen3"', ""), r"\[match\] needs architecture"),
        (("block_count = 36", 'name = "("'), "missing \\)"),
        (("[match]", "[["), "mine.toml: "),
        (("block_count = 36", "[[evidence]]\ngian = 3"), "'gian' is not a key here"),
        (("block_count = 36", "[[evidence]]\ngain = 3"), "task"),
        (("block_count = 36", "[[evidence]]\ntask='a'\nsource='b'\nkind='c'\ngain='d'"), "gain is a number"),
        (("block_count = 36", "[[evidence]]\ntask='a'\nsource='b'\nkind='c'\ninterval=[1]"), "not enough values"),
    ],
)
def test_a_wrong_recipe_is_named(config, change, message):
    (config / "mine.toml").write_text(OWN.replace(*change))
    with pytest.raises(LoopError, match=message) as caught:
        recipes.choose(MODELS["Qwen3-4B"])
    assert str(caught.value).startswith(str(config / "mine.toml: ")) and "\n" not in str(caught.value)


# ---- the command line ----------------------------------------------------------------------------------------------


def edgeloop(*arguments):
    return subprocess.run([sys.executable, "-m", "edgeloop.cli", *arguments], capture_output=True, text=True, cwd="/")


def test_recipes_are_listed(config):
    (config / "mine.toml").write_text(OWN)
    listed = json.loads(edgeloop("recipes", "--json").stdout)
    assert [r["name"] for r in listed] == ["mine", *(r.name for r in recipes.load_recipes()[1:])]
    assert listed[0]["path"] == str(config / "mine.toml") and listed[0]["recommended"]
    headline = next(r for r in listed if r["name"] == "Qwen3-4B")
    assert headline["loop"] == "15-18x3:kv=first" and headline["evidence"][2]["interval"] == [0.15, 1.0]
    done = edgeloop("recipes")
    assert "+0.57 [+0.15, +1.00] on MMLU, Instruct-2507 (replication)" in done.stdout and str(config) in done.stderr
    assert all(r["name"] in done.stdout and r["loop"] in done.stdout for r in listed)
    full = edgeloop("recipes", "a3b").stdout
    assert full.count("model ") == 2 and "arXiv 2605.23872" in full and "github.com/L-z-Chen" in full
    assert edgeloop("recipes", "nothing").returncode == 2


@pytest.mark.parametrize(
    "given, printed",
    [
        ("45,52", "45-51x2:naive,kv=own"),
        ("(45, 52)", "45-51x2:naive,kv=own"),
        ("7,8", "7-7x2:naive,kv=own"),
        ("45-51x2:naive,kv=own", "45,52"),
        ("45-51x2:kv=own,naive", None),
        ("0,0", "off"),
        ("off", "0,0"),
        ("52,45", None),
        ("7,7", None),
        ("1,2,3", None),
        ("45,99999", None),
        ("0,600", "0-599x2:naive,kv=own"),
        ("45-51x3:naive,kv=own", None),
        ("45-51x2:naive", None),
        ("45-51x2:naive,kv=own,scope=gen", None),
        ("1-2x2+4-5x2:naive,kv=own", None),
        ("10%-20%x2:naive,kv=own", None),
        ("auto", None),
    ],
)
def test_rys(given, printed):
    convert = recipes.to_rys if "x" in given or given in ("off", "auto") else lambda pair: str(recipes.from_rys(pair))
    if printed is None:
        with pytest.raises(LoopError):
            convert(given)
    else:
        assert convert(given) == printed


def test_every_pair_comes_back():
    for i, j in combinations(range(12), 2):
        assert recipes.to_rys(recipes.from_rys(f"{i},{j}")) == f"{i},{j}"
        assert recipes.from_rys(f"{i},{j}").expanded(12) == [*range(j), *range(i, 12)]  # as its author defines it


def test_rys_on_the_command_line():
    assert edgeloop("rys", "45,52").stdout == "45-51x2:naive,kv=own\n"
    assert edgeloop("rys", "45-51x2:naive,kv=own").stdout == "45,52\n"
    wrong = edgeloop("rys", "5")
    assert wrong.returncode == 2 and wrong.stderr.startswith("Error: '5' is not what RYS writes")


def test_auto_on_the_command_line(tiny_llama):
    done = edgeloop("inspect", tiny_llama, "--loop", "auto", "--json")
    assert "loop" not in json.loads(done.stdout) and "no recipe is known" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_gguf_metadata_has_what_a_match_asks_for(tiny_llama):
    with GGUFFile(tiny_llama) as gguf:
        assert {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length"} <= gguf.metadata.keys()

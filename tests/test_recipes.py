"""`auto`, and the recipes that are carried."""

import pytest

from edgeloop import Loop, LoopError, gguf_tools, recipes
from edgeloop.gguf_file import GGUFFile


def test_every_recipe_fits_its_own_model():
    carried = recipes.load_recipes()
    assert carried
    for recipe in carried:
        arch = recipe.match["architecture"]
        metadata = {"general.architecture": arch} | {
            f"{arch}.{k}": str(v) for k, v in recipe.match.items() if k != "architecture"
        }
        assert recipes.choose(metadata).loop == recipe.loop == recipe.loop.resolve(recipe.match["block_count"])
        assert recipe.evidence and all({"task", "gain", "source"} <= set(e) for e in recipe.evidence)
        assert not recipe.fits(metadata | {f"{arch}.block_count": "3"})


def test_the_file_comes_first(tiny_llama, tmp_path, load):
    tagged = tmp_path / "tagged.gguf"
    with GGUFFile(tiny_llama) as gguf:
        gguf.write_copy(tagged, [(t.name, t) for t in gguf.tensors], {recipes.METADATA_KEY: "2-3x4:naive"})
        originals = [
            (t.name, t.shape, t.type, gguf.path.read_bytes()[t.offset : t.offset + t.size]) for t in gguf.tensors
        ]
    with GGUFFile(tagged) as copy:
        assert originals == [
            (t.name, t.shape, t.type, tagged.read_bytes()[t.offset : t.offset + t.size]) for t in copy.tensors
        ]
    assert gguf_tools.inspect(tagged).loop == "2-3x4:naive"
    assert load(tagged, loop="auto", n_ctx=64).loop == Loop.parse("2-3x4:naive")
    assert load(tiny_llama, loop="auto", n_ctx=64).loop.is_off


def test_a_wrong_loop_in_the_file_is_an_error():
    with pytest.raises(LoopError, match="is not a span"):
        recipes.choose({recipes.METADATA_KEY: "nonsense"})

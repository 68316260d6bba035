"""Embedding models: no cache, all tokens at once, one vector for a text."""

import llama_cpp
import numpy as np
import pytest
import tiny_more

from edgeloop import gguf_tools

TEXT = "The quick brown fox"
KV_MODES = ("frozen", "own", "first", "last")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders") / "bert.gguf"
    tiny_more.write_bert(path)
    return path


@pytest.fixture
def embed(load):
    def embed(path, spec):
        llm = load(path, loop=spec, embedding=True, n_ctx=64, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
        return np.array(llm.embed(TEXT, normalize=True))

    return embed


@pytest.mark.parametrize("unit", ("block", "layer"))
@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("span", ("0-1", "2-3", "4-5"))
def test_an_encoder_loops(bert, embed, span, kv, unit):
    plain = embed(bert, "off")
    assert np.array_equal(embed(bert, f"{span}x1:naive,unit={unit},kv={kv}"), plain)
    assert np.allclose(embed(bert, f"{span}x3:anchored,beta=1,unit={unit},kv={kv}"), plain, atol=1e-5)
    looped = embed(bert, f"{span}x3:naive,unit={unit},kv={kv}")
    assert np.isfinite(looped).all() and np.abs(looped - plain).max() > 1e-3


@pytest.mark.parametrize("unit", ("block", "layer"))
@pytest.mark.parametrize("span", ("0-1", "2-3", "4-5"))
def test_naive_own_is_the_duplicated_model(bert, embed, monkeypatch, tmp_path, span, unit):
    monkeypatch.setattr(gguf_tools, "_EXPORTABLE", {"bert"})
    spec = f"{span}x3:naive,unit={unit},kv=own"
    gguf_tools.export(bert, tmp_path / "duplicated.gguf", spec)
    duplicated = embed(tmp_path / "duplicated.gguf", "off")
    assert np.array_equal(embed(bert, spec), duplicated)
    assert not np.allclose(embed(bert, spec.replace("own", "frozen")), duplicated, atol=1e-3)
